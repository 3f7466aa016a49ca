"""Latents are kept by key, up to a limit, and are the same whether kept or computed."""

from __future__ import annotations

import pytest
import torch

from leafseg.data.transforms import AUGMENTATION_KINDS, Augmentation, flips_alone
from leafseg.model.latent_cache import LatentCache

LATENT = torch.zeros(1, 4, 128, 128)  # 256 KiB


def test_what_is_kept_is_not_computed_again_and_rows_stay_in_order() -> None:
    cache, asked = LatentCache(1), []

    def compute(position: int) -> torch.Tensor:
        asked.append(position)
        return LATENT + len(asked)

    first = cache.latents(["a", "b", "a"], compute)
    assert asked == [0, 1]
    assert first[:, 0, 0, 0].tolist() == [1, 2, 1]
    assert cache.latents(["b", "c"], compute)[:, 0, 0, 0].tolist() == [2, 3]
    assert asked == [0, 1, 1]


@pytest.mark.parametrize(("megabytes", "computed"), [(0, 12), (1, 8), (2, 6)])
def test_what_does_not_fit_is_computed_each_time(megabytes: int, computed: int) -> None:
    cache, asked = LatentCache(megabytes), []

    def compute(position: int) -> torch.Tensor:
        asked.append(position)
        return LATENT + position

    for _ in range(2):
        assert cache.latents(range(6), compute)[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert len(asked) == computed
    assert len(cache) == 12 - computed


@pytest.mark.parametrize("name", AUGMENTATION_KINDS)
def test_only_what_moves_labels_in_other_ways_than_flips_keeps_them_from_the_cache(name: str) -> None:
    kind = AUGMENTATION_KINDS[name]
    found = flips_alone(Augmentation(**{name: True if kind == "flip" else 0.25}))
    if kind == "geometric":
        assert found is None
    else:
        assert found == (name == "flip_horizontal", name == "flip_vertical")
