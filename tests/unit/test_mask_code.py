"""Mask codes: what each draws and reads, and that all, a new one too, go through everything that uses one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from leafseg import mask_code
from leafseg.config import Settings, load_settings, override_settings
from leafseg.errors import CheckpointError, ConfigError, LeafsegError
from leafseg.evaluation.round_trip import code_round_trip, label_dice
from leafseg.mask_code import BinaryMaskCode, MaskCode, foreground, make_mask_code, register_mask_code
from leafseg.model.autoencoder import build_autoencoder, decode_pictures, encode_pictures
from leafseg.model.build import Components, build_components, model_figures
from leafseg.objective import pixel_loss
from leafseg.pipeline import LeafPipeline
from leafseg.predict import PipelineSegmenter
from leafseg.training.autoencoder_task import one_class


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


@dataclass(frozen=True)
class Case:
    """A code with labels for it, and what must follow from them."""

    name: str
    label_names: tuple[str, ...]
    outputs: int
    pictures: int

    @property
    def overlapping(self) -> bool:
        return self.name == "overlapping"


CASES = (
    Case("toy-palette", ("background", "cup", "disc"), 3, 1),
    Case("overlapping", ("tumour", "vessel"), 2, 2),
    Case("planes", ("background", "cup", "disc"), 3, 2),
    Case("bits", ("background", *"abcde"), 6, 3),
)


@pytest.fixture(autouse=True)
def _toy_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask_code, "_CODES", dict(mask_code._CODES))
    register_mask_code("toy-palette")(PaletteCode)


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture
def case_settings(case: Case, tiny_settings: Settings) -> Settings:
    return override_settings(tiny_settings, [f"model.mask_code={case.name}"])


@pytest.fixture
def case_components(case: Case, case_settings: Settings) -> Components:
    torch.manual_seed(0)
    return build_components(case_settings, label_names=case.label_names, overlapping=case.overlapping)


@pytest.fixture
def case_pipeline(case_settings: Settings, case_components: Components) -> LeafPipeline:
    parts = case_components
    pipeline = LeafPipeline(
        unet=parts.unet.eval(),
        vae=parts.autoencoder,
        image_encoder=parts.image_encoder.eval(),
        scheduler=parts.scheduler,
        preprocessing=case_settings.data.preprocessing.model_dump(mode="json"),
        mask_code={"name": parts.mask_code.name, "label_names": list(parts.mask_code.label_names)},
    )
    return pipeline


def random_labels(case: Case, size: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if case.overlapping:
        return torch.rand(2, 2, size, size, generator=generator) > 0.5
    return torch.randint(0, case.outputs, (2, size, size), generator=generator)


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


# --- several classes, overlapping labels ------------------------------------------------------------------------------


def names_of(count: int) -> tuple[str, ...]:
    return ("background", *(f"class {index}" for index in range(1, count)))


@given(st.sampled_from(["planes", "bits"]), st.integers(2, 32), st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_classes_come_back_from_their_own_black_and_white_pictures(name: str, count: int, seed: int) -> None:
    code = make_mask_code(name, names_of(count))
    labels = torch.randint(0, count, (2, 3, 4), generator=torch.Generator().manual_seed(seed))
    pictures = code.encode(labels)
    assert pictures.shape == (2, code.n_channels, 3, 4)
    assert set(pictures.unique().tolist()) <= {-1.0, 1.0}
    grey = pictures.unflatten(1, (code.num_pictures, 3))
    assert torch.equal(grey, grey[:, :, :1].expand_as(grey))
    probability = code.probability(pictures)
    assert probability.shape == (2, count, 3, 4)
    assert torch.equal(code.labels(probability), labels)
    assert torch.equal(code.mask(probability), labels[:, None] == torch.arange(count)[:, None, None])


@pytest.mark.parametrize(
    ("count", "planes", "bits"), [(2, 1, 1), (3, 2, 2), (4, 3, 2), (5, 4, 3), (8, 7, 3), (32, 31, 5)]
)
def test_planes_take_a_picture_a_class_and_bits_the_logarithm(count: int, planes: int, bits: int) -> None:
    assert make_mask_code("planes", names_of(count)).num_pictures == planes
    assert make_mask_code("bits", names_of(count)).num_pictures == bits


@pytest.mark.parametrize("count", [2, 3, 9, 32])
def test_what_planes_decode_exactly_is_as_sure_as_a_binary_mask_for_any_number_of_classes(count: int) -> None:
    code = make_mask_code("planes", names_of(count))
    probability = code.probability(code.encode(torch.arange(count)[None, None]))[0, :, 0]  # [C, C]
    sure = 1 / (1 + math.exp(-4))  # 0.982
    torch.testing.assert_close(probability.diagonal(), torch.full((count,), sure))
    torch.testing.assert_close(probability.sum(0), torch.ones(count))


def test_what_bits_decode_exactly_has_the_product_of_its_bits_probabilities() -> None:
    code = make_mask_code("bits", names_of(8))
    probability = code.probability(code.encode(torch.arange(8)[None, None]))[0, :, 0]
    one = 1 / (1 + math.exp(-4 - math.log(3)))  # each of three bits
    torch.testing.assert_close(probability.diagonal(), torch.full((8,), one**3))
    torch.testing.assert_close(probability[0, 5], torch.tensor(one * (1 - one) ** 2))  # 5 = 101 differs in two bits


@pytest.mark.parametrize("name", ["planes", "bits"])
def test_two_classes_in_any_code_are_the_binary_code(name: str) -> None:
    decoded = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    logits, binary = make_mask_code(name, names_of(2)).logits(decoded), BinaryMaskCode().logits(decoded)
    torch.testing.assert_close(logits[:, 1:] - logits[:, :1], binary)


def test_a_blurred_border_between_two_classes_is_no_line_of_background() -> None:
    code = make_mask_code("planes", names_of(4))
    # From class 1 to class 3, both pictures pass through grey; a little too dark, as a blur leaves them.
    towards = torch.linspace(0, 1, 11)
    grey = torch.stack([1 - 2 * towards, -torch.ones(11), 2 * towards - 1]) - 0.1  # [3, 11]
    decoded = grey.repeat_interleave(3, 0)[None, :, None]  # [1, 9, 1, 11]
    assert code.labels(code.probability(decoded)).unique().tolist() == [1, 3]


@pytest.mark.parametrize("code", ["planes", "bits"])
def test_the_label_is_the_likeliest_class_and_the_first_of_equals(code: str) -> None:
    probability = torch.tensor([[0.2, 0.5, 0.3], [0.4, 0.4, 0.2], [0.1, 0.45, 0.45], [1 / 3, 1 / 3, 1 / 3]])
    labels = make_mask_code(code, ("background", "a", "b")).labels(probability.mT[None, :, :, None])
    assert labels[0, :, 0].tolist() == [1, 0, 1, 0]


def test_overlapping_labels_are_binary_masks_side_by_side() -> None:
    code, binary = make_mask_code("overlapping", ("tumour", "vessel", "bone")), BinaryMaskCode()
    generator = torch.Generator().manual_seed(0)
    labels, decoded = torch.rand(2, 3, 4, 5, generator=generator) > 0.5, torch.randn(2, 9, 4, 5, generator=generator)
    for index in range(3):
        mine = slice(3 * index, 3 * index + 3)
        assert torch.equal(code.encode(labels)[:, mine], binary.encode(labels[:, index].long()))
        for name in ("logits", "probability"):
            torch.testing.assert_close(
                getattr(code, name)(decoded)[:, [index]], getattr(binary, name)(decoded[:, mine])
            )
    assert torch.equal(code.mask(code.probability(code.encode(labels))), labels)
    assert code.labels(code.probability(decoded)) is None
    assert not code.exclusive


@pytest.mark.parametrize("name", ["planes", "bits", "overlapping"])
def test_the_gradient_reaches_every_picture_however_wrong_it_is(name: str) -> None:
    code = make_mask_code(name, names_of(5))
    for value in (-5.0, 0.0, 5.0):
        decoded = torch.full((1, code.n_channels, 2, 2), value, requires_grad=True)
        truth = torch.tensor([[[0, 1], [2, 3]]])
        target = truth if code.exclusive else truth[:, None] == torch.arange(5)[:, None, None]
        pixel_loss(code.logits(decoded), target, exclusive=code.exclusive).backward()
        assert decoded.grad.isfinite().all()
        assert (decoded.grad.abs().amax((0, 2, 3)) > 0).all()


@pytest.mark.parametrize(
    ("count", "overlapping", "wanted"), [(2, False, "binary"), (3, False, "planes"), (2, True, "overlapping")]
)
def test_auto_chooses_by_the_labels_and_the_code_knows_its_own_name(count: int, overlapping: bool, wanted: str) -> None:
    assert make_mask_code("auto", names_of(count), overlapping=overlapping).name == wanted


def test_codes_for_the_other_kind_of_labels_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'planes', which is for labels that exclude each other.*data overlap"):
        make_mask_code("planes", ("a", "b", "c"), overlapping=True)
    with pytest.raises(ConfigError, match=r"'overlapping', which is for labels that overlap.*leave it at 'auto'"):
        make_mask_code("overlapping", names_of(3), overlapping=False)
    with pytest.raises(ConfigError, match="has a background and a class"):
        make_mask_code("planes", ("background",))


def test_the_foreground_is_any_label_and_no_ignored_pixel() -> None:
    assert foreground(torch.tensor([[[0, 1, 2, 255]]])).tolist() == [[[0, 1, 1, 0]]]
    assert foreground(torch.tensor([[[[False, True]], [[False, False]]]])).tolist() == [[[0, 1]]]


# --- every code, and a new one, through everything that uses one ------------------------------------------------------


def test_a_new_code_sets_the_u_nets_channels(case: Case, case_components: Components) -> None:
    unet = case_components.unet
    assert unet.config["in_channels"] == 4 + 4 * case.pictures
    assert unet.config["out_channels"] == 4 * case.pictures
    assert case_components.mask_code.n_channels == 3 * case.pictures


def test_a_new_code_goes_from_labels_to_a_latent_and_back_to_a_loss(case: Case, case_components: Components) -> None:
    code, labels = case_components.mask_code, random_labels(case)
    latent = encode_pictures(case_components.autoencoder, code.encode(labels))
    assert latent.shape == (2, 4 * case.pictures, 4, 4)
    sample = torch.cat([latent.new_zeros(2, 4, 4, 4), latent], 1)
    assert case_components.unet.denoise(sample, 999).shape == latent.shape
    decoded = decode_pictures(case_components.autoencoder, latent)
    assert decoded.shape == (2, 3 * case.pictures, 32, 32)
    logits = code.logits(decoded)
    assert logits.shape == (2, case.outputs, 32, 32)
    assert pixel_loss(logits, labels, exclusive=code.exclusive).isfinite()


def test_a_new_code_gives_its_labels_back_when_nothing_lies_between(case: Case, case_components: Components) -> None:
    code, labels = case_components.mask_code, random_labels(case)
    probability = code.probability(code.encode(labels))
    if code.exclusive:
        assert torch.equal(code.labels(probability), labels)
    else:
        assert torch.equal(code.mask(probability), labels)


def test_a_new_code_segments_images_of_any_size(case: Case, case_pipeline: LeafPipeline) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 21, 45, 3), dtype=np.uint8)
    output = case_pipeline(list(images), num_samples=2)
    assert output.probability.shape == output.mask.shape == output.spread.shape == (2, case.outputs, 21, 45)
    assert output.mask.dtype == torch.bool
    if case.overlapping:
        assert output.labels is None
    else:
        assert output.labels.shape == (2, 21, 45)
        assert output.labels.dtype == torch.int64
        assert (output.mask.sum(1) == 1).all()
        torch.testing.assert_close(output.probability.sum(1), torch.ones(2, 21, 45))


def test_a_model_with_a_new_code_can_be_saved_and_loaded(
    case: Case, case_pipeline: LeafPipeline, tmp_path: Path
) -> None:
    image = np.random.default_rng(0).integers(0, 256, (30, 20), dtype=np.uint8)
    case_pipeline.save_pretrained(tmp_path / "model")
    loaded = LeafPipeline.from_pretrained(tmp_path / "model")
    assert loaded.label_names == case.label_names
    assert torch.equal(loaded(image).probability, case_pipeline(image).probability)


def test_a_model_whose_code_is_not_registered_is_refused(
    case: Case, case_pipeline: LeafPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case_pipeline.save_pretrained(tmp_path / "model")
    monkeypatch.delitem(mask_code._CODES, case.name)
    with pytest.raises(CheckpointError, match=f"'{case.name}'; known are"):
        LeafPipeline.from_pretrained(tmp_path / "model")


def test_a_segmenter_gives_class_ids_or_for_overlapping_labels_masks(case: Case, case_pipeline: LeafPipeline) -> None:
    segmenter = PipelineSegmenter(case_pipeline)
    result = segmenter.segment([np.zeros((20, 20), np.uint8)])[0]
    assert segmenter.overlapping == case.overlapping
    assert result.mask.shape == (case.outputs, 20, 20)
    if case.overlapping:
        assert result.labels is None
        assert np.array_equal(result.mask, result.probability > 0.5)
    else:
        assert result.labels.dtype == np.uint8
        assert np.array_equal(result.labels, result.probability.argmax(0))


def test_the_figures_of_a_new_code_count_every_picture_it_decodes(
    case: Case, case_settings: Settings, tiny_settings: Settings
) -> None:
    one, mine = (
        model_figures(tiny_settings),
        model_figures(case_settings, label_names=case.label_names, overlapping=case.overlapping),
    )
    assert mine.gflops["mask_decoder"] == pytest.approx(case.pictures * one.gflops["mask_decoder"])
    assert mine.parameters["autoencoder"] == one.parameters["autoencoder"]


# --- the autoencoder's side -------------------------------------------------------------------------------------------


def test_the_shipped_autoencoder_carries_touching_classes_and_overlapping_labels() -> None:
    autoencoder = build_autoencoder(load_settings("leaf-tiny").model.autoencoder).eval()
    y, x = torch.meshgrid(torch.arange(128), torch.arange(128), indexing="ij")
    cell = ((y - 60) / 50.0) ** 2 + ((x - 66) / 44.0) ** 2 <= 1
    nucleus = ((y - 52) / 22.0) ** 2 + ((x - 60) / 25.0) ** 2 <= 1
    labels = (cell.long() + (nucleus & cell).long())[None]
    both = torch.stack([cell, nucleus])[None]
    for name, truth, names in (
        ("planes", labels, ("background", "cytoplasm", "nucleus")),
        ("bits", labels, ("background", "cytoplasm", "nucleus")),
        ("overlapping", both, ("cell", "nucleus")),
    ):
        code = make_mask_code(name, names)
        dice = label_dice(code, code_round_trip(autoencoder, code, truth), truth)
        assert list(dice) == list(names[-2:])
        assert min(value for values in dice.values() for value in values) > 0.98, (name, dice)


def test_the_dice_of_labels_is_that_of_each_where_it_is_present() -> None:
    code = make_mask_code("planes", ("background", "a", "b"))
    labels = torch.tensor([[[0, 1, 1, 2]], [[0, 0, 0, 2]]])
    found = torch.tensor([[[1, 1, 0, 2]], [[1, 0, 2, 2]]])
    probability = code.probability(code.encode(found))
    # The first image: 1 of 2 + 2 pixels of a agree, 2 * 1 / 4; b agrees. The second has no a; of b 2 * 1 / (1 + 2).
    assert label_dice(code, probability, labels) == {"a": [pytest.approx(0.5)], "b": [1.0, pytest.approx(2 / 3)]}


def test_an_autoencoder_learns_a_class_or_label_at_a_time_and_never_ignored_pixels() -> None:
    labels = torch.tensor([[0, 1, 3, 255]])
    drawn = {tuple(one_class(labels, np.random.default_rng(seed))[0].tolist()) for seed in range(20)}
    assert drawn == {(False, True, False, False), (False, False, True, False)}
    layers = torch.tensor([[[True, True]], [[False, True]]])
    drawn = {tuple(one_class(layers, np.random.default_rng(seed))[0].tolist()) for seed in range(20)}
    assert drawn == {(True, True), (False, True)}
    untouched = np.random.default_rng(0)
    assert one_class(torch.tensor([[0, 1]]), untouched).tolist() == [[False, True]]
    assert not one_class(torch.tensor([[0, 255]]), untouched).any()
    assert untouched.random() == np.random.default_rng(0).random()  # binary data keep their samples
