"""Shares of pixels instead of one label a pixel: resizing, drawing, loss, and what a training sees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from leafseg.config import AugmentationSettings, DataSettings, PreprocessingSettings
from leafseg.data.dataset import SegmentationDataset
from leafseg.data.images import write_png
from leafseg.data.manifest import load_manifest
from leafseg.data.transforms import Preprocessor
from leafseg.errors import DataError
from leafseg.mask_code import make_mask_code
from leafseg.objective import pixel_loss

NAMES = ("background", "a", "b", "c")


def preprocessor(size: tuple[int, int] = (16, 24), **settings: object) -> Preprocessor:
    return Preprocessor(PreprocessingSettings(size=size, **settings))


def test_a_disc_that_is_shrunk_keeps_its_area_and_comes_back_more_exact_than_by_one_label_a_pixel() -> None:
    y, x = np.mgrid[:96, :96]
    disc = (((y - 40.3) ** 2 + (x - 51.7) ** 2) < 9**2).astype(np.uint8)
    prepared = preprocessor((32, 32))
    placement = prepared.placement((96, 96))
    shares = prepared.apply_label_shares(disc, placement, classes=2)
    assert shares.shape == (1, 32, 32)
    assert 0 <= shares.min() < shares.max() <= 1
    assert shares.sum().item() * 9 == pytest.approx(disc.sum(), rel=0.01)

    def dice_of(small: torch.Tensor) -> float:
        back = (prepared.restore(small, placement)[0] > 0.5).numpy()
        return float(2 * (back & (disc > 0)).sum() / (back.sum() + disc.sum()))

    hard = prepared.apply_labels(disc, placement)[None].float()
    assert dice_of(shares) > 0.95
    assert dice_of(shares) > dice_of(hard) + 0.02


def test_shares_of_classes_sum_to_one_with_the_background_also_in_padding() -> None:
    labels = np.random.default_rng(0).integers(0, 4, (40, 30), dtype=np.uint8)
    prepared = preprocessor((16, 24), fit="pad")
    placement = prepared.placement((40, 30))
    shares = prepared.apply_label_shares(labels, placement, classes=4)
    assert shares.shape == (4, 16, 24)
    torch.testing.assert_close(shares.sum(0), torch.ones(16, 24), atol=1e-5, rtol=0)
    assert (shares[0, :, 0] == 1).all()


def test_without_resizing_shares_are_the_labels() -> None:
    labels = np.random.default_rng(1).integers(0, 4, (16, 24), dtype=np.uint8)
    prepared = preprocessor()
    shares = prepared.apply_label_shares(labels, prepared.placement((16, 24)), classes=4)
    np.testing.assert_array_equal(shares.argmax(0), labels)
    assert set(shares.unique().tolist()) == {0.0, 1.0}
    several = np.random.default_rng(2).random((3, 16, 24)) > 0.5
    overlapping = prepared.apply_label_shares(several, prepared.placement((16, 24)), classes=3)
    np.testing.assert_array_equal(overlapping, several)


def test_a_mask_that_becomes_one_pixel_wide_keeps_its_rows() -> None:
    labels = np.zeros((400, 4), np.uint8)
    labels[200:] = 1
    prepared = preprocessor((16, 16), fit="pad")
    placement = prepared.placement((400, 4))
    assert placement.content_size == (16, 1)
    column = prepared.apply_label_shares(labels, placement, classes=2)[0][:, placement.left]
    assert column[:7].max() < 0.1
    assert column[9:].min() > 0.9


def test_labels_of_another_grid_are_refused() -> None:
    prepared = preprocessor()
    with pytest.raises(DataError, match="mask is 5x4, image is 24x16"):
        prepared.apply_label_shares(np.zeros((4, 5), np.uint8), prepared.placement((16, 24)), classes=2)


@pytest.mark.parametrize(("code", "names"), [("binary", NAMES[:2]), ("planes", NAMES), ("bits", NAMES)])
def test_whole_shares_are_drawn_as_labels_are_and_others_in_between(code: str, names: tuple[str, ...]) -> None:
    made = make_mask_code(code, names)
    labels = torch.randint(0, len(names), (2, 5, 6), generator=torch.Generator().manual_seed(0))
    shares = F.one_hot(labels, len(names)).movedim(-1, 1).float()
    shares = shares[:, 1:] if len(names) == 2 else shares
    torch.testing.assert_close(made.encode(shares), made.encode(labels), atol=1e-6, rtol=0)
    between = (made.encode(labels) + made.encode(labels.flip(0))) / 2
    torch.testing.assert_close(made.encode((shares + shares.flip(0)) / 2), between)


def test_overlapping_shares_are_drawn_one_a_label() -> None:
    made = make_mask_code("overlapping", ("a", "b"))
    several = torch.rand(2, 2, 5, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(made.encode(several), several.repeat_interleave(3, 1) * 2 - 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_loss_of_whole_shares_is_that_of_labels_and_its_minimum_lies_at_the_share(channels: int) -> None:
    draws = torch.Generator().manual_seed(0)
    logits = torch.randn(2, channels, 4, 5, generator=draws)
    labels = torch.randint(0, max(channels, 2), (2, 4, 5), generator=draws)
    whole = F.one_hot(labels, max(channels, 2)).movedim(-1, 1).float()
    whole = whole[:, 1:] if channels == 1 else whole
    torch.testing.assert_close(pixel_loss(logits, whole), pixel_loss(logits, labels))

    shares = torch.rand(2, channels, 4, 5, generator=draws) * 0.8 + 0.1
    shares = shares if channels == 1 else shares / shares.sum(1, keepdim=True)
    best = torch.logit(shares) if channels == 1 else shares.log()
    least = pixel_loss(best, shares)
    for scale in (0.7, 1.5):  # less sure, and surer than the share
        assert pixel_loss(best * scale, shares) > least + 1e-3


def write_pair(folder: Path, name: str, classes: int) -> None:
    """An image and a mask of noise; another for each name."""
    draws = np.random.default_rng(int(name))
    write_png(folder / "images" / f"{name}.png", draws.integers(0, 256, (40, 40, 3), dtype=np.uint8))
    write_png(folder / "masks" / f"{name}.png", draws.integers(0, classes, (40, 40), dtype=np.uint8))


@pytest.mark.parametrize("classes", [2, 3])
def test_a_training_sees_shares_that_move_with_the_image(classes: int, tmp_path: Path) -> None:
    for number in range(3):
        write_pair(tmp_path, str(number), classes)
    manifest = load_manifest(tmp_path, settings=DataSettings())

    def samples(augmentation: AugmentationSettings | None, *, soft: bool = True) -> SegmentationDataset:
        return SegmentationDataset(
            manifest, preprocessor((24, 24)), augmentation=augmentation, seed=0, cache_mb=1, soft_labels=soft
        )

    plain = samples(None)[0, 0]
    assert plain["labels"].dtype == torch.float32
    assert plain["labels"].shape == ((1 if classes == 2 else 3), 24, 24)
    assert samples(None, soft=False)[0, 0]["labels"].dtype == torch.int64
    flips = AugmentationSettings(horizontal_flip=True)
    turned = AugmentationSettings(horizontal_flip=False, rotation_degrees=40, translation=0.3)
    for position in range(8):
        flipped = samples(flips)[position, 0]
        mirrored = torch.flip(plain["labels"], [-1]) if flipped["augmentation"][0] else plain["labels"]
        torch.testing.assert_close(flipped["labels"], mirrored, atol=0.01, rtol=0)
        moved = samples(turned)[position, 0]["labels"]
        assert moved.min() >= 0
        assert moved.max() <= 1
        if classes == 3:
            torch.testing.assert_close(moved.sum(0), torch.ones(24, 24), atol=1e-5, rtol=0)


def test_tiles_and_ignored_pixels_keep_one_label_a_pixel(tmp_path: Path) -> None:
    for number in range(3):
        write_pair(tmp_path, str(number), 3)
    for settings, prepared in (
        (DataSettings(ignore_label=2), preprocessor((24, 24))),
        (DataSettings(), preprocessor((24, 24), fit="tile")),
    ):
        dataset = SegmentationDataset(
            load_manifest(tmp_path, settings=settings),
            prepared,
            augmentation=None,
            seed=0,
            cache_mb=1,
            soft_labels=True,
        )
        assert dataset[0, 0]["labels"].dtype == torch.int64
