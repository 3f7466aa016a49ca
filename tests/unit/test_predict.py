"""From files to mask files: sizes, formats, bad files, names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
import tifffile
import torch
from PIL import Image
from typer.testing import CliRunner

from leafseg.cli import app
from leafseg.config import PreprocessingSettings
from leafseg.data.images import Geometry, Reading, read_image, read_volume, write_png, write_volume
from leafseg.errors import CheckpointError, ConfigError, DataError
from leafseg.pipeline import LeafPipeline
from leafseg.predict import (
    PipelineSegmenter,
    Segmentation,
    display_pixels,
    draw_overlay,
    load_segmenter,
    predict_files,
)


class ThresholdSegmenter:
    """Calls everything above half of the type's range foreground: a segmenter whose answer is known."""

    label_names: tuple[str, ...] = ("background", "bright")
    overlapping = False
    preprocessing = PreprocessingSettings()

    def read(self, path: Path, frame: int | None = None) -> np.ndarray:
        return read_image(path, frame, reading=Reading.of(self.preprocessing))

    def segment(self, images: Sequence[np.ndarray]) -> list[Segmentation]:
        results = []
        for image in images:
            if image.max() == 66:
                raise DataError("image is the one that nobody can read")
            grey = image.mean(2) if image.ndim == 3 else image.astype(float)
            unit = (grey / np.iinfo(image.dtype).max).astype(np.float32)
            results.append(Segmentation(unit[None], (unit > 0.5).astype(np.uint8)))
        return results


class ThreeClassSegmenter:
    """Classes 0, 1 and 2 by the pixel's value; its probability is certain."""

    label_names = ("background", "cup", "disc")
    overlapping = False
    preprocessing = PreprocessingSettings()

    def read(self, path: Path, frame: int | None = None) -> np.ndarray:
        return read_image(path, frame, reading=Reading.of(self.preprocessing))

    def segment(self, images: Sequence[np.ndarray]) -> list[Segmentation]:
        labels = [np.clip(image, 0, 2).astype(np.uint8) for image in images]
        certain = [(one[None] == np.arange(3)[:, None, None]).astype(np.float32) for one in labels]
        return [Segmentation(p, one) for p, one in zip(certain, labels, strict=True)]


def picture(height: int = 21, width: int = 34, seed: int = 0, dtype: Any = np.uint8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, (height, width), dtype)


def pixels_of(path: Path) -> np.ndarray:
    return np.array(Image.open(path))


def test_a_mask_has_the_image_s_size_and_the_values_0_and_255(tmp_path: Path) -> None:
    image = picture()
    write_png(tmp_path / "in" / "a.png", image)
    Image.fromarray(np.full((30, 11, 3), 255, np.uint8)).save(tmp_path / "in" / "b.jpg")
    tifffile.imwrite(tmp_path / "in" / "c.tif", picture(13, 17, dtype=np.uint16))
    report = predict_files(ThresholdSegmenter(), [tmp_path / "in"], tmp_path / "out")
    assert not report.failed
    mask = pixels_of(tmp_path / "out" / "a.png")
    assert mask.dtype == np.uint8
    assert np.array_equal(mask, (image > 127.5) * 255)
    assert (pixels_of(tmp_path / "out" / "b.png") == 255).all()
    assert pixels_of(tmp_path / "out" / "b.png").shape == (30, 11)
    assert pixels_of(tmp_path / "out" / "c.png").shape == (13, 17)


def test_more_than_two_classes_are_written_as_class_ids(tmp_path: Path) -> None:
    image = np.array([[0, 1, 2], [2, 1, 0]], np.uint8)
    write_png(tmp_path / "a.png", image)
    predict_files(ThreeClassSegmenter(), [tmp_path / "a.png"], tmp_path / "out", probability=True)
    assert np.array_equal(pixels_of(tmp_path / "out" / "a.png"), image)
    for name, value in (("cup", 1), ("disc", 2)):
        assert np.array_equal(pixels_of(tmp_path / "out" / f"a_probability_{name}.png"), (image == value) * 65535)


def test_every_page_of_a_tiff_gives_a_mask(tmp_path: Path) -> None:
    pages = np.stack([picture(seed=seed) for seed in range(3)])
    tifffile.imwrite(tmp_path / "stack.tif", pages, photometric="minisblack")
    report = predict_files(ThresholdSegmenter(), [tmp_path / "stack.tif"], tmp_path / "out")
    names = [f"stack_{index:04d}.png" for index in range(3)]
    assert report.written == {str(tmp_path / "stack.tif"): names}
    for page, name in zip(pages, names, strict=True):
        assert np.array_equal(pixels_of(tmp_path / "out" / name) > 0, page > 127.5)


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".mha", ".nrrd"])
def test_a_volume_gives_class_ids_on_the_same_geometry(tmp_path: Path, suffix: str) -> None:
    voxels = np.stack([picture(9, 7, seed=seed) for seed in range(4)])
    turned = (0.0, 1.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0, 1.0)
    geometry = Geometry((7, 9, 4), (0.5, 0.75, 3.0), (10.0, -20.0, 5.5), turned)
    write_volume(tmp_path / f"scan{suffix}", voxels, geometry)
    predict_files(ThresholdSegmenter(), [tmp_path / f"scan{suffix}"], tmp_path / "out")
    labels, found = read_volume(tmp_path / "out" / f"scan{suffix}")
    assert np.array_equal(labels, voxels > 127.5)
    assert found.size == geometry.size
    np.testing.assert_allclose(found.affine, geometry.affine, atol=1e-5)
    assert SimpleITK.ReadImage(str(tmp_path / "out" / f"scan{suffix}")).GetPixelID() == SimpleITK.sitkUInt8


def test_a_real_pipeline_writes_masks_of_any_size(tmp_path: Path, tiny_pipeline: LeafPipeline) -> None:
    image = picture(45, 23)
    write_png(tmp_path / "a.png", image)
    voxels = np.stack([picture(9, 7, seed=seed, dtype=np.uint16) for seed in range(2)])
    write_volume(tmp_path / "v.nii.gz", voxels, Geometry((7, 9, 2), (1, 1, 1), (0, 0, 0), (1, 0, 0, 0, 1, 0, 0, 0, 1)))
    segmenter = PipelineSegmenter(tiny_pipeline)
    report = predict_files(
        segmenter, [tmp_path / "a.png", tmp_path / "v.nii.gz"], tmp_path / "out", probability=True, overlay=True
    )
    assert report.written[str(tmp_path / "a.png")] == ["a.png", "a_probability.png", "a_overlay.png"]
    probability = tiny_pipeline(image).probability[0, 0].numpy()
    assert np.array_equal(pixels_of(tmp_path / "out" / "a.png") > 0, probability > 0.5)
    stored = pixels_of(tmp_path / "out" / "a_probability.png")
    assert stored.dtype == np.uint16
    np.testing.assert_allclose(stored / 65535, probability, atol=1 / 65535)
    assert pixels_of(tmp_path / "out" / "a_overlay.png").shape == (45, 23, 3)
    labels, _ = read_volume(tmp_path / "out" / "v.nii.gz")
    assert np.array_equal(labels[1], segmenter.segment([segmenter.read(tmp_path / "v.nii.gz", 1)])[0].labels)


def test_images_of_many_sizes_come_back_in_their_order(tiny_pipeline: LeafPipeline) -> None:
    images = [picture(20, 30), picture(30, 20), picture(20, 30, seed=1), picture(20, 30, seed=2)]
    segmenter = PipelineSegmenter(tiny_pipeline)
    together = segmenter.segment(images)
    for image, result in zip(images, together, strict=True):
        assert result.labels.shape == image.shape
        assert result.labels.dtype == np.uint8
        np.testing.assert_allclose(result.probability, segmenter.segment([image])[0].probability, atol=1e-5)
    assert segmenter.segment([]) == []
    assert segmenter.label_names == ("background", "foreground")


def test_tensors_give_what_their_arrays_give(tiny_pipeline: LeafPipeline) -> None:
    segmenter = PipelineSegmenter(tiny_pipeline)
    arrays = [picture(20, 30), picture(30, 20), picture(20, 30, seed=1)]
    tensors = [tiny_pipeline.preprocessor.intensity_to_unit(array) for array in arrays]
    mixed = [tensors[0], arrays[1], tensors[2]]
    for expected, found in zip(segmenter.segment(arrays), segmenter.segment(mixed), strict=True):
        np.testing.assert_allclose(found.probability, expected.probability, atol=1e-5)
        assert found.labels is not None
        assert np.array_equal(found.mask[0], found.labels == 1)
    assert not segmenter.overlapping
    assert segmenter.preprocessing == tiny_pipeline.preprocessor.settings


def test_a_mask_follows_from_labels_and_of_overlapping_labels_from_probabilities() -> None:
    labels = np.array([[0, 1], [2, 1]], np.uint8)
    binary = Segmentation(np.zeros((1, 2, 2), np.float32), (labels == 1).astype(np.uint8))
    assert binary.mask.tolist() == [[[False, True], [False, True]]]
    several = Segmentation(np.zeros((3, 2, 2), np.float32), labels)
    assert several.mask.sum((1, 2)).tolist() == [1, 2, 1]
    assert np.array_equal(several.mask.argmax(0), labels)
    overlapping = Segmentation(np.array([[[0.9, 0.2]], [[0.8, 0.5]]], np.float32), None)
    assert overlapping.mask.tolist() == [[[True, False]], [[True, False]]]


def test_bad_files_do_not_stop_the_others_and_are_named_with_their_reason(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write_png(folder / "good.png", picture())
    write_png(folder / "strange.png", np.full((4, 4), 66, np.uint8))
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("nothing to see")
    (folder / "._good.png").write_bytes(b"what another system leaves behind")
    voxels = np.full((2, 3, 3), 66, np.uint8)
    write_volume(folder / "volume.nii", voxels, Geometry((3, 3, 2), (1, 1, 1), (0, 0, 0), (1, 0, 0, 0, 1, 0, 0, 0, 1)))
    report = predict_files(ThresholdSegmenter(), [folder], tmp_path / "out", model_name="threshold")
    assert list(report.written) == [str(folder / "good.png")]
    assert set(report.failed) == {str(folder / name) for name in ("broken.png", "strange.png", "volume.nii")}
    for path, reason in report.failed.items():
        assert path in reason
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["good.png", "report.json"]
    stored = json.loads((tmp_path / "out" / "report.json").read_text())
    assert stored["failed"] == report.failed
    assert stored["written"] == report.written
    assert (stored["model"], stored["label_names"]) == ("threshold", ["background", "bright"])


def test_the_report_holds_figures_of_every_input(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", np.array([[0, 1, 2], [2, 1, 2]], np.uint8))
    voxels = np.zeros((2, 3, 4), np.uint8)
    voxels[1, 2, :3] = 1
    flat = (1, 0, 0, 0, 1, 0, 0, 0, 1)
    write_volume(tmp_path / "v.mha", voxels, Geometry((4, 3, 2), (0.5, 0.8, 2.5), (0, 0, 0), flat))
    report = predict_files(ThreeClassSegmenter(), [tmp_path / "a.png", tmp_path / "v.mha"], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "report.json").read_text())["figures"] == report.figures
    picture_figures, volume_figures = report.figures.values()
    assert picture_figures.pop("seconds") >= 0
    assert picture_figures == {"pixels": {"cup": 2, "disc": 3}, "shape": [2, 3]}
    assert volume_figures.pop("seconds") >= 0
    # A voxel is 0.5 x 0.8 x 2.5 = 1 cubic millimetre.
    assert volume_figures == {
        "pixels": {"cup": 3, "disc": 0},
        "shape": [2, 3, 4],
        "spacing_mm": [2.5, 0.8, 0.5],
        "volume_ml": {"cup": 0.003, "disc": 0.0},
    }


def test_a_data_folder_gives_its_images_and_not_its_masks(tmp_path: Path) -> None:
    write_png(tmp_path / "images" / "a.png", picture())
    write_png(tmp_path / "masks" / "b.png", picture())
    report = predict_files(ThresholdSegmenter(), [tmp_path], tmp_path / "out")
    assert list(report.written) == [str(tmp_path / "images" / "a.png")]


@pytest.mark.parametrize("what", ["missing file", "empty folder"])
def test_nothing_to_do_is_an_error(tmp_path: Path, what: str) -> None:
    (tmp_path / "empty").mkdir()
    given = tmp_path / ("none.png" if what == "missing file" else "empty")
    with pytest.raises(DataError, match="no such file" if what == "missing file" else "no images"):
        predict_files(ThresholdSegmenter(), [given], tmp_path / "out")


# --- names ------------------------------------------------------------------------------------------------------------


def test_files_of_one_stem_keep_their_suffix(tmp_path: Path) -> None:
    write_png(tmp_path / "in" / "a.png", np.zeros((4, 4), np.uint8))
    Image.fromarray(np.full((4, 4), 255, np.uint8)).save(tmp_path / "in" / "a.bmp")
    predict_files(ThresholdSegmenter(), [tmp_path / "in"], tmp_path / "out")
    assert (pixels_of(tmp_path / "out" / "a.png.png") == 0).all()
    assert (pixels_of(tmp_path / "out" / "a.bmp.png") == 255).all()


def test_files_of_one_name_in_two_folders_are_refused(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        write_png(tmp_path / folder / "a.png", picture())
    with pytest.raises(DataError, match=r"two inputs are named 'a\.png'"):
        predict_files(ThresholdSegmenter(), [tmp_path / "one", tmp_path / "two"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_given_twice_is_predicted_once(tmp_path: Path) -> None:
    write_png(tmp_path / "in" / "a.png", picture())
    report = predict_files(ThresholdSegmenter(), [tmp_path / "in", tmp_path / "in" / "a.png"], tmp_path / "out")
    assert report.written == {str(tmp_path / "in" / "a.png"): ["a.png"]}
    assert not report.failed


def test_an_image_is_never_replaced_by_its_own_mask(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", picture())
    with pytest.raises(DataError, match="lies in the output folder"):
        predict_files(ThresholdSegmenter(), [tmp_path / "a.png"], tmp_path / "." / "")
    assert np.array_equal(read_image(tmp_path / "a.png"), picture())


def test_a_result_never_replaces_that_of_another_input(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write_png(folder / "a.png", np.zeros((4, 4), np.uint8))
    write_png(folder / "a_probability.png", np.full((4, 4), 255, np.uint8))
    tifffile.imwrite(folder / "s.tif", np.zeros((2, 4, 4), np.uint8), photometric="minisblack")
    write_png(folder / "s_0001.png", np.full((4, 4), 255, np.uint8))
    report = predict_files(ThresholdSegmenter(), [folder], tmp_path / "out", probability=True)
    assert set(report.failed) == {str(folder / "a_probability.png"), str(folder / "s_0001.png")}
    assert "would replace that of" in report.failed[str(folder / "s_0001.png")]
    assert pixels_of(tmp_path / "out" / "a_probability.png").dtype == np.uint16
    assert (pixels_of(tmp_path / "out" / "s_0001.png") == 0).all()


def test_an_output_that_cannot_be_a_folder_is_found_before_the_work(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", picture())
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot be written"):
        predict_files(ThresholdSegmenter(), [tmp_path / "a.png"], tmp_path / "file")


# --- loading and looking ----------------------------------------------------------------------------------------------


def test_a_segmenter_loads_from_a_pipeline_folder_and_computes_the_same(
    tmp_path: Path, tiny_pipeline: LeafPipeline
) -> None:
    tiny_pipeline.save_pretrained(tmp_path / "checkpoint" / "pipeline")
    expected = tiny_pipeline(picture()).probability[0].numpy()
    for name in ("checkpoint", "checkpoint/pipeline"):
        found = load_segmenter(str(tmp_path / name), device="cpu").segment([picture()])[0]
        np.testing.assert_allclose(found.probability, expected, atol=1e-5)  # channels last: another order of adding
    half = load_segmenter(str(tmp_path / "checkpoint"), precision="bf16", device="cpu").segment([picture()])[0]
    assert half.probability.dtype == np.float32
    np.testing.assert_allclose(half.probability, expected, atol=0.1)
    several = load_segmenter(str(tmp_path / "checkpoint"), num_samples=2, num_inference_steps=2, device="cpu")
    assert several.segment([picture()])[0].spread is not None


def test_the_command_takes_formats_contours_and_coded_names(tmp_path: Path, tiny_pipeline: LeafPipeline) -> None:
    tiny_pipeline.save_pretrained(tmp_path / "model")
    voxels = np.stack([picture(9, 7, seed=seed, dtype=np.uint16) for seed in range(2)])
    write_volume(tmp_path / "v.nii.gz", voxels, Geometry((7, 9, 2), (1, 1, 1), (0, 0, 0), (1, 0, 0, 0, 1, 0, 0, 0, 1)))
    code = {"value": "10200004", "scheme": "SCT", "meaning": "Liver"}
    (tmp_path / "segments.json").write_text(json.dumps({"foreground": {"type": code}}))
    given = ["predict", str(tmp_path / "model"), str(tmp_path / "v.nii.gz"), "--out", str(tmp_path / "out")]
    options = ["--format", "mha", "--contours", "coco", "--probability", "--segments", str(tmp_path / "segments.json")]
    ended = CliRunner().invoke(app, [*given, *options], catch_exceptions=False)
    assert ended.exit_code == 0
    names = ["annotations.json", "report.json", "v.mha", "v_probability.mha"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    (tmp_path / "segments.json").write_text(json.dumps({"liver": {"type": code}}))
    with pytest.raises(ConfigError, match="'liver', which is no label of the model; it has foreground"):
        CliRunner().invoke(app, [*given, *options], catch_exceptions=False)


def test_a_segmenter_refuses_more_steps_than_the_schedule_has(tmp_path: Path, tiny_pipeline: LeafPipeline) -> None:
    tiny_pipeline.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"--steps is 1001; the model's schedule has 1\.\.1000"):
        load_segmenter(str(tmp_path), num_inference_steps=1001)


def test_an_overlay_changes_nothing_outside_the_mask_and_its_outline() -> None:
    grey = np.full((20, 20, 3), 100, np.uint8)
    labels = np.zeros((20, 20), np.uint8)
    assert np.array_equal(draw_overlay(grey, labels), grey)
    labels[5:12, 5:12] = 1
    drawn = draw_overlay(grey, labels)
    changed = (drawn != grey).any(2)
    assert changed[5:12, 5:12].all()
    assert not changed[:4].any()
    assert not changed[13:].any()
    assert (grey == 100).all()


def test_an_overlay_draws_overlapping_labels_each_in_its_colour() -> None:
    masks = np.zeros((2, 30, 30), bool)
    masks[0, 2:20, 2:20] = True
    masks[1, 10:28, 10:28] = True
    drawn = draw_overlay(np.full((30, 30, 3), 100, np.uint8), masks)
    single = np.zeros((30, 30), np.uint8)
    single[2:20, 2:20] = 1
    assert np.array_equal(drawn[2, 2], draw_overlay(np.full((30, 30, 3), 100, np.uint8), single)[2, 2])
    assert (
        len({tuple(drawn[row, row]) for row in (0, 2, 5, 15, 27)}) == 5
    )  # outside, two outlines, one tint, both tints


def test_pictures_for_looking_at_are_8_bit_rgb() -> None:
    eight = picture(4, 5)
    assert np.array_equal(display_pixels(eight), np.stack([eight] * 3, -1))
    wide = display_pixels(np.linspace(-500, 3000, 400).reshape(20, 20))
    assert wide.dtype == np.uint8
    assert wide.shape == (20, 20, 3)
    assert (wide.min(), wide.max()) == (0, 255)
    assert (display_pixels(np.full((3, 3), 7.0)) == 0).all()
    unit = torch.tensor([0.0, 0.2, 1.0]).reshape(3, 1, 1).expand(3, 4, 5)
    assert display_pixels(unit).shape == (4, 5, 3)
    assert display_pixels(unit)[2, 3].tolist() == [0, 51, 255]


def test_a_true_mask_in_the_output_folder_is_never_replaced(tmp_path: Path) -> None:
    write_png(tmp_path / "images" / "a.png", np.full((4, 5), 200, np.uint8))
    write_png(tmp_path / "masks" / "a.png", np.zeros((4, 5), np.uint8))
    write_png(tmp_path / "masks" / "ab.png", np.zeros((4, 5), np.uint8))
    before = (tmp_path / "masks" / "a.png").read_bytes()
    with pytest.raises(DataError, match=r"masks: holds a\.png, which a result could replace"):
        predict_files(ThresholdSegmenter(), [tmp_path], tmp_path / "masks")
    assert (tmp_path / "masks" / "a.png").read_bytes() == before
    assert sorted(path.name for path in (tmp_path / "masks").iterdir()) == ["a.png", "ab.png"]


def test_results_of_any_earlier_prediction_are_replaced(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_png(tmp_path / f"{name}.png", np.full((4, 5), 200, np.uint8))
    for name in ("a", "b", "a"):  # the second report must not forget the first one's file
        report = predict_files(ThresholdSegmenter(), [tmp_path / f"{name}.png"], tmp_path / "out", overlay=True)
        assert report.failed == {}
    stored = json.loads((tmp_path / "out" / "report.json").read_text())
    assert stored["files"] == ["a.png", "a_overlay.png", "b.png", "b_overlay.png"]


def test_a_report_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", np.full((4, 5), 200, np.uint8))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.json").write_text('{"dice": 0.9}')
    with pytest.raises(DataError, match="is no report of leafseg predict"):
        predict_files(ThresholdSegmenter(), [tmp_path / "a.png"], tmp_path / "out")


def test_a_run_that_was_interrupted_can_be_repeated(tmp_path: Path) -> None:
    class Stops(ThresholdSegmenter):
        def read(self, path: Path, frame: int | None = None) -> np.ndarray:
            if path.name == "b.png":
                raise KeyboardInterrupt
            return super().read(path, frame)

    for name in ("a", "b"):
        write_png(tmp_path / "in" / f"{name}.png", np.full((4, 5), 200, np.uint8))
    with pytest.raises(KeyboardInterrupt):
        predict_files(Stops(), [tmp_path / "in"], tmp_path / "out")
    assert len(predict_files(ThresholdSegmenter(), [tmp_path / "in"], tmp_path / "out").written) == 2
