"""An ensemble is the mean of its models' probabilities, labelled by the rule of their mask code."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from leafseg.config import PreprocessingSettings
from leafseg.ensemble import EnsembleSegmenter, FlippedSegmenter, Flips, load_ensemble, load_model, split_of_ensemble
from leafseg.errors import CheckpointError
from leafseg.pipeline import LeafPipeline
from leafseg.predict import PipelineSegmenter, Segmentation, load_segmenter
from leafseg.runs import ensemble_models, model_sha256


@dataclass
class Says:
    """A segmenter that says the same of every pixel."""

    probability: tuple[float, ...]
    label_names: tuple[str, ...] = ("background", "foreground")
    overlapping: bool = False
    preprocessing: PreprocessingSettings = field(default_factory=PreprocessingSettings)
    presence: tuple[float, ...] = ()

    def read(self, path: Path, frame: int | None = None) -> NDArray[Any]:
        return np.full((2, 3), frame or 0, np.uint8)

    def segment(self, images: Sequence[Any]) -> list[Segmentation]:
        column = np.array(self.probability, np.float32)[:, None, None]
        return [Segmentation(np.tile(column, (1, *image.shape[:2])), None) for image in images]


IMAGE = np.zeros((2, 3), np.uint8)


def said(*models: Says) -> Segmentation:
    (result,) = EnsembleSegmenter(models).segment([IMAGE])
    return result


def test_two_models_are_their_mean() -> None:
    result = said(Says((0.25,)), Says((0.5,)))
    assert result.probability.dtype == np.float32
    np.testing.assert_array_equal(result.probability, np.full((1, 2, 3), 0.375))
    assert result.labels.dtype == np.uint8
    assert not result.labels.any()
    assert said(Says((0.5,)), Says((0.75,))).labels.all()  # 0.625
    assert not said(Says((0.25,)), Says((0.75,))).labels.any()  # 0.5 is not above 0.5


def test_of_several_classes_the_largest_mean_wins() -> None:
    names = ("background", "a", "b")
    result = said(Says((0.5, 0.25, 0.25), names), Says((0.0, 0.25, 0.75), names))
    np.testing.assert_array_equal(result.probability[:, 0, 0], np.float32([0.25, 0.25, 0.5]))
    assert (result.labels == 2).all()
    np.testing.assert_array_equal(result.mask, np.arange(3)[:, None, None] == result.labels)


def test_overlapping_labels_have_a_mask_each_and_no_label_map() -> None:
    two = [Says(p, ("a", "b"), overlapping=True) for p in ((0.75, 0.5), (0.5, 0.25))]
    result = said(*two)
    assert result.labels is None
    assert result.mask[0].all()  # 0.625
    assert not result.mask[1].any()  # 0.375


def test_models_of_other_labels_or_preprocessing_are_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match=r"two: its labels are background, lesion, those of one are"):
        EnsembleSegmenter([Says((0.5,)), Says((0.5,), ("background", "lesion"))], names=["one", "two"])
    with pytest.raises(CheckpointError, match="two: its labels"):
        EnsembleSegmenter([Says((0.5,)), Says((0.5,), overlapping=True)], names=["one", "two"])
    other = PreprocessingSettings(intensity="zscore", size=(128, 128))
    with pytest.raises(CheckpointError) as caught:
        EnsembleSegmenter([Says((0.5,)), Says((0.5,), preprocessing=other)], names=["one", "two"])
    message = str(caught.value)
    assert "size is (128, 128) and (256, 256); intensity is zscore and auto" in message
    with pytest.raises(CheckpointError, match="at least one"):
        EnsembleSegmenter([])


def test_an_ensemble_of_one_is_the_model(tiny_pipeline: LeafPipeline) -> None:
    model = PipelineSegmenter(tiny_pipeline)
    image = np.random.default_rng(0).integers(0, 256, (20, 24), dtype=np.uint8)
    (alone,), (among) = model.segment([image]), EnsembleSegmenter([model]).segment([image])
    np.testing.assert_array_equal(alone.probability, among[0].probability)
    np.testing.assert_array_equal(alone.labels, among[0].labels)
    assert EnsembleSegmenter([model]).preprocessing == model.preprocessing


def test_an_ensembles_folder_loads_the_models_that_it_lists(tiny_pipeline: LeafPipeline, tmp_path: Path) -> None:
    tiny_pipeline.save_pretrained(tmp_path / "a")
    with torch.no_grad():
        for weight in tiny_pipeline.unet.parameters():
            weight.add_(0.01)
    tiny_pipeline.save_pretrained(tmp_path / "inner" / "b")
    (tmp_path / "ensemble.json").write_text(json.dumps({"models": ["a", str(tmp_path / "inner" / "b")]}))
    ensemble = load_model(str(tmp_path), num_inference_steps=2)
    assert isinstance(ensemble, EnsembleSegmenter)
    singles = [load_segmenter(str(tmp_path / name), num_inference_steps=2) for name in ("a", "inner/b")]
    image = np.random.default_rng(1).integers(0, 256, (20, 24), dtype=np.uint8)
    one, two = (single.segment([image])[0].probability for single in singles)
    assert np.abs(one - two).max() > 1e-4
    np.testing.assert_allclose(ensemble.segment([image])[0].probability, (one + two) / 2, atol=1e-6)
    assert isinstance(load_model(str(tmp_path / "a")), PipelineSegmenter)
    whole = model_sha256(str(tmp_path))
    parts = [model_sha256(str(tmp_path / name)) for name in ("a", "inner/b")]
    assert len({whole, *parts} - {None}) == 3
    (tmp_path / "ensemble.json").write_text(json.dumps({"models": ["a", "a"]}))
    assert model_sha256(str(tmp_path)) != whole


@pytest.mark.parametrize("text", ["{}", '{"models": []}', '{"models": "a"}', '{"models": [1]}'])
def test_an_ensemble_without_models_is_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "ensemble.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"ensemble\.json: lists no models"):
        load_ensemble(tmp_path)


def test_the_split_of_an_ensemble_is_its_own_or_that_of_its_models(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, tested in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text("{}")
        rows = "".join(f"{key},{'test' if key == tested else 'train'}\n" for key in "12")
        (tmp_path / name / "split.csv").write_text(f"sha256,part\n{rows}")
    (tmp_path / "ensemble.json").write_text('{"models": ["a", "b"]}')
    assert ensemble_models(tmp_path) == [str(tmp_path / "a"), str(tmp_path / "b")]
    with caplog.at_level(logging.WARNING):
        assert split_of_ensemble(tmp_path) == tmp_path / "a" / "split.csv"
    assert not caplog.records
    (tmp_path / "ensemble.json").write_text('{"models": ["a", "c"]}')
    assert split_of_ensemble(tmp_path) == tmp_path / "a" / "split.csv"
    assert "different test parts" in caplog.text
    (tmp_path / "split.csv").write_text("")
    assert split_of_ensemble(tmp_path) == tmp_path / "split.csv"


def test_models_that_write_the_same_labels_in_different_planes_are_refused() -> None:
    with pytest.raises(CheckpointError, match="write 1 and 2 probabilities"):
        said(Says((0.5,)), Says((0.5, 0.5)))


class Brightness:
    """Says how bright a pixel is, half as much right of the middle: not what its mirror image would say."""

    label_names, overlapping, preprocessing = ("background", "foreground"), False, PreprocessingSettings()
    presence = ()

    def read(self, path: Path, frame: int | None = None) -> np.ndarray:
        raise NotImplementedError

    def segment(self, images: Sequence[np.ndarray | torch.Tensor]) -> list[Segmentation]:
        found = []
        for image in images:
            grey = np.asarray(image)[0] if isinstance(image, torch.Tensor) else image / np.float32(255)
            probability = grey.astype(np.float32).copy()
            probability[:, probability.shape[1] // 2 :] /= 2
            found.append(Segmentation(probability[None], (probability > 0.5).astype(np.uint8)))
        return found


@pytest.mark.parametrize(("flips", "factors"), [("horizontal", 0.75), ("vertical", None), ("both", 0.75)])
def test_flips_average_over_mirror_images_on_the_images_own_grid(flips: Flips, factors: float | None) -> None:
    image = np.random.default_rng(3).integers(0, 256, (5, 8), dtype=np.uint8)
    tensor = torch.from_numpy(image / np.float32(255)).expand(3, 5, 8)
    plain = Brightness().segment([image])[0].probability
    wanted = plain if factors is None else (image * np.float32(factors) / 255)[None]
    for given in (image, tensor):
        (found,) = FlippedSegmenter(Brightness(), flips).segment([given])
        np.testing.assert_allclose(found.probability, wanted, atol=1e-6)
        np.testing.assert_array_equal(found.labels, found.probability[0] > 0.5)


def test_flips_of_several_images_and_of_classes(tiny_pipeline: LeafPipeline) -> None:
    model = PipelineSegmenter(tiny_pipeline, noise="zeros")
    images = [
        np.random.default_rng(n).integers(0, 256, size, dtype=np.uint8) for n, size in ((4, (20, 24)), (5, (9, 30)))
    ]
    found = FlippedSegmenter(model, "horizontal").segment(images)
    for image, result in zip(images, found, strict=True):
        mirror = model.segment([np.ascontiguousarray(image[:, ::-1])])[0].probability[..., ::-1]
        straight = model.segment([image])[0].probability
        assert np.abs(mirror - straight).max() > 1e-4
        np.testing.assert_allclose(result.probability, (mirror + straight) / 2, atol=1e-5)
