"""What a compact autoencoder is shown: crops of images, masks, coarse masks and synthetic masks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from leafseg.config import AutoencoderTrainingSettings, DataSettings, load_autoencoder_settings
from leafseg.data.manifest import load_manifest
from leafseg.errors import ConfigError
from leafseg.training.autoencoder_task import AutoencoderDataset, AutoencoderTask


class OneMask:
    """A data set of one 64 x 64 image whose mask has single columns, too thin for a coarse grid."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, _key: tuple[int, int]) -> dict[str, Any]:
        labels = torch.zeros(64, 64, dtype=torch.int64)
        labels[:, ::4] = 1
        return {"image": torch.full((3, 64, 64), 0.25), "labels": labels}


def pictures(**settings: Any) -> list[dict[str, Any]]:
    chosen = load_autoencoder_settings(
        overrides=["crop=32", "preprocessing.size=[64,64]", *(f"{k}={v}" for k, v in settings.items())]
    )
    dataset = AutoencoderDataset(OneMask(), chosen)  # type: ignore[arg-type]
    return [dataset[position, 0] for position in range(40)]


def values(picture: Tensor) -> set[float]:
    return set(picture.unique().tolist())


def test_coarse_masks_are_the_same_size_and_grey_where_a_pixel_is_partly_covered() -> None:
    found = pictures(coarse_share=1, image_share=0, synthetic_share=0)
    for sample in found:
        assert sample["picture"].shape == (3, 32, 32)
        # One column of every second pair is covered: half of each such pixel.
        assert values(sample["picture"]) == {-1.0, 0.0}


def test_the_share_of_coarse_masks_is_kept_and_other_masks_stay_black_and_white() -> None:
    kinds = [0.0 in values(s["picture"]) for s in pictures(coarse_share=0.5, image_share=0, synthetic_share=0)]
    assert 10 < sum(kinds) < 30
    plain = pictures(coarse_share=0, image_share=0, synthetic_share=0)
    assert all(values(s["picture"]) == {-1.0, 1.0} for s in plain)


def test_images_are_never_coarse() -> None:
    for sample in pictures(coarse_share=1, image_share=1, synthetic_share=0):
        assert sample["picture"].shape == (3, 32, 32)
        assert values(sample["picture"]) == {-0.5}


def test_synthetic_masks_have_grey_outlines_where_they_are_coarse() -> None:
    samples = pictures(coarse_share=1, image_share=0, synthetic_share=1)
    assert all(s["picture"].shape == (3, 32, 32) for s in samples)
    assert any(len(values(s["picture"])) > 2 for s in samples)
    assert all(len(values(s["picture"])) <= 2 for s in pictures(coarse_share=0, image_share=0, synthetic_share=1))


def test_coarse_masks_of_too_small_pictures_are_refused(tiny_data: Callable[..., Path]) -> None:
    settings = AutoencoderTrainingSettings.model_validate(
        {"crop": 32, "preprocessing": {"size": [48, 48]}, "coarse_share": 0.5}
    )
    with pytest.raises(ConfigError, match=r"coarse masks need preprocessing.size \(48\) of at least twice the crop"):
        AutoencoderTask([load_manifest(tiny_data(), settings=DataSettings())], settings.model, settings)
