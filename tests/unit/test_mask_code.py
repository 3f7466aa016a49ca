"""Mask codes: the binary one, and that a new one needs no change elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from leafseg import mask_code
from leafseg.config import Settings, override_settings
from leafseg.errors import CheckpointError, ConfigError, LeafsegError
from leafseg.mask_code import BinaryMaskCode, MaskCode, make_mask_code, register_mask_code
from leafseg.model.autoencoder import decode_pictures, encode_pictures
from leafseg.model.build import Components, build_components, model_figures
from leafseg.objective import pixel_loss
from leafseg.pipeline import LeafPipeline
from leafseg.predict import PipelineSegmenter


class PaletteCode(MaskCode):
    """Three exclusive classes, one of them in each colour channel."""

    @property
    def n_outputs(self) -> int:
        return 3

    def encode(self, labels: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(labels, 3).movedim(-1, 1).float() * 2 - 1

    def logits(self, decoded: Tensor) -> Tensor:
        return 4 * decoded

    def probability(self, decoded: Tensor) -> Tensor:
        return self.logits(decoded).softmax(1)

    def labels(self, probability: Tensor) -> Tensor:
        return probability.argmax(1)

    def mask(self, probability: Tensor) -> Tensor:
        return self.labels(probability)[:, None] == torch.arange(3)[:, None, None]


class TwoPictureCode(MaskCode):
    """Two overlapping labels, each a grey picture of its own."""

    num_pictures = 2
    exclusive = False

    @property
    def n_outputs(self) -> int:
        return 2

    def encode(self, labels: Tensor) -> Tensor:
        return (labels.float() * 2 - 1).repeat_interleave(3, 1)

    def logits(self, decoded: Tensor) -> Tensor:
        return 4 * decoded.unflatten(1, (2, 3)).mean(2)

    def probability(self, decoded: Tensor) -> Tensor:
        return self.logits(decoded).sigmoid()

    def labels(self, probability: Tensor) -> None:
        return None

    def mask(self, probability: Tensor) -> Tensor:
        return probability > 0.5


@dataclass(frozen=True)
class Toy:
    name: str
    label_names: tuple[str, ...]
    outputs: int
    pictures: int


TOYS = (Toy("toy-palette", ("background", "cup", "disc"), 3, 1), Toy("toy-overlap", ("tumour", "vessel"), 2, 2))


@pytest.fixture(autouse=True)
def _toy_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask_code, "_CODES", dict(mask_code._CODES))
    register_mask_code("toy-palette")(PaletteCode)
    register_mask_code("toy-overlap")(TwoPictureCode)


@pytest.fixture(params=TOYS, ids=lambda toy: toy.name)
def toy(request: pytest.FixtureRequest) -> Toy:
    return request.param


@pytest.fixture
def toy_settings(toy: Toy, tiny_settings: Settings) -> Settings:
    return override_settings(tiny_settings, [f"model.mask_code={toy.name}"])


@pytest.fixture
def toy_components(toy: Toy, toy_settings: Settings) -> Components:
    torch.manual_seed(0)
    return build_components(toy_settings, label_names=toy.label_names)


@pytest.fixture
def toy_pipeline(toy_settings: Settings, toy_components: Components) -> LeafPipeline:
    parts = toy_components
    pipeline = LeafPipeline(
        unet=parts.unet.eval(),
        vae=parts.autoencoder,
        image_encoder=parts.image_encoder.eval(),
        scheduler=parts.scheduler,
        preprocessing=toy_settings.data.preprocessing.model_dump(mode="json"),
        mask_code={"name": parts.mask_code.name, "label_names": list(parts.mask_code.label_names)},
    )
    return pipeline


def random_labels(toy: Toy, size: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if toy.name == "toy-overlap":
        return torch.rand(2, 2, size, size, generator=generator) > 0.5
    return torch.randint(0, 3, (2, size, size), generator=generator)


# --- binary ---------------------------------------------------------------------------------------------------------


def test_the_binary_code_gives_its_labels_back() -> None:
    code = BinaryMaskCode()
    labels = torch.randint(0, 2, (3, 5, 7), generator=torch.Generator().manual_seed(0))
    pictures = code.encode(labels)
    assert pictures.shape == (3, 3, 5, 7)
    assert set(pictures.unique().tolist()) == {-1.0, 1.0}
    probability = code.probability(pictures)
    assert torch.equal(code.labels(probability), labels)
    assert torch.equal(code.mask(probability), labels[:, None] == 1)
    assert (code.n_channels, code.n_outputs, code.num_pictures, code.exclusive) == (3, 1, 1, True)


def test_a_binary_probability_is_the_mean_of_the_clamped_channels_and_foreground_starts_above_one_half() -> None:
    code = BinaryMaskCode()
    decoded = torch.tensor([[3.0, -1.0, 0.0], [-7.0, 1.0, 0.0], [0.0, 0.0, 0.0]]).T[None, :, None]  # [1, 3, 1, 3]
    probability = code.probability(decoded)
    torch.testing.assert_close(probability.flatten(), torch.tensor([0.5, 0.5, 0.5]))
    assert not code.labels(probability).any()  # exactly one half is background
    assert code.labels(torch.nextafter(probability, torch.ones(()))).all()


def test_binary_logits_agree_with_the_mask_and_have_a_gradient_beyond_the_clamp() -> None:
    code = BinaryMaskCode()
    decoded = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 0.3
    assert torch.equal(code.logits(decoded) > 0, code.mask(code.probability(decoded)))
    far = torch.full((1, 3, 1, 1), -5.0, requires_grad=True)
    code.logits(far).sum().backward()
    assert far.grad is not None
    assert (far.grad > 0).all()


def test_the_binary_code_refuses_three_classes_and_names_the_way_out() -> None:
    with pytest.raises(LeafsegError, match=r"hold 3 classes \(background, cup, disc\).*foreground_labels=\[1\]"):
        make_mask_code("binary", ("background", "cup", "disc"))


def test_an_unknown_code_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"model\.mask_code is 'binry'; known are binary"):
        make_mask_code("binry", ("background", "foreground"))


# --- a new code, through everything that uses one --------------------------------------------------------------------


def test_a_new_code_sets_the_u_nets_channels(toy: Toy, toy_components: Components) -> None:
    unet = toy_components.unet
    assert unet.config["in_channels"] == 4 + 4 * toy.pictures
    assert unet.config["out_channels"] == 4 * toy.pictures
    assert toy_components.mask_code.n_channels == 3 * toy.pictures


def test_a_new_code_goes_from_labels_to_a_latent_and_back_to_a_loss(toy: Toy, toy_components: Components) -> None:
    code, labels = toy_components.mask_code, random_labels(toy)
    latent = encode_pictures(toy_components.autoencoder, code.encode(labels))
    assert latent.shape == (2, 4 * toy.pictures, 4, 4)
    sample = torch.cat([latent.new_zeros(2, 4, 4, 4), latent], 1)
    assert toy_components.unet.denoise(sample, 999).shape == latent.shape
    decoded = decode_pictures(toy_components.autoencoder, latent)
    assert decoded.shape == (2, 3 * toy.pictures, 32, 32)
    logits = code.logits(decoded)
    assert logits.shape == (2, toy.outputs, 32, 32)
    assert pixel_loss(logits, labels, exclusive=code.exclusive).isfinite()


def test_a_new_code_gives_its_labels_back_when_nothing_lies_between(toy: Toy, toy_components: Components) -> None:
    code, labels = toy_components.mask_code, random_labels(toy)
    probability = code.probability(code.encode(labels))
    if code.exclusive:
        assert torch.equal(code.labels(probability), labels)
    else:
        assert torch.equal(code.mask(probability), labels)


def test_a_new_code_segments_images_of_any_size(toy: Toy, toy_pipeline: LeafPipeline) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 21, 45, 3), dtype=np.uint8)
    output = toy_pipeline(list(images), num_samples=2)
    assert output.probability.shape == output.mask.shape == output.spread.shape == (2, toy.outputs, 21, 45)
    assert output.mask.dtype == torch.bool
    if toy.name == "toy-overlap":
        assert output.labels is None
    else:
        assert output.labels.shape == (2, 21, 45)
        assert output.labels.dtype == torch.int64
        assert (output.mask.sum(1) == 1).all()
        torch.testing.assert_close(output.probability.sum(1), torch.ones(2, 21, 45))


def test_a_model_with_a_new_code_can_be_saved_and_loaded(toy: Toy, toy_pipeline: LeafPipeline, tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (30, 20), dtype=np.uint8)
    toy_pipeline.save_pretrained(tmp_path / "model")
    loaded = LeafPipeline.from_pretrained(tmp_path / "model")
    assert loaded.label_names == toy.label_names
    assert torch.equal(loaded(image).probability, toy_pipeline(image).probability)


def test_a_model_whose_code_is_not_registered_is_refused(
    toy: Toy, toy_pipeline: LeafPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy_pipeline.save_pretrained(tmp_path / "model")
    monkeypatch.delitem(mask_code._CODES, toy.name)
    with pytest.raises(CheckpointError, match=f"'{toy.name}'; known are"):
        LeafPipeline.from_pretrained(tmp_path / "model")


def test_a_segmenter_writes_class_ids_and_refuses_overlapping_labels(toy: Toy, toy_pipeline: LeafPipeline) -> None:
    segmenter = PipelineSegmenter(toy_pipeline)
    image = np.zeros((20, 20), np.uint8)
    if toy.name == "toy-overlap":
        with pytest.raises(LeafsegError, match="labels overlap"):
            segmenter.segment([image])
    else:
        result = segmenter.segment([image])[0]
        assert result.labels.dtype == np.uint8
        assert np.array_equal(result.labels, result.probability.argmax(0))


def test_the_figures_of_a_new_code_count_every_picture_it_decodes(
    toy: Toy, toy_settings: Settings, tiny_settings: Settings
) -> None:
    one, mine = model_figures(tiny_settings), model_figures(toy_settings, label_names=toy.label_names)
    assert mine.gflops["mask_decoder"] == pytest.approx(toy.pictures * one.gflops["mask_decoder"])
    assert mine.parameters["autoencoder"] == one.parameters["autoencoder"]
