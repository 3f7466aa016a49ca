"""Near duplicates: what counts as the same picture, and what does not."""

from __future__ import annotations

import imagehash
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter

from leafseg.data import duplicates
from leafseg.data.duplicates import TURNS, low_frequencies, near_duplicates, perceptual_hashes, thumbnail


def textures(count: int, *, seed: int = 0) -> NDArray[np.uint8]:
    """Different pictures ``[N, 64, 64]`` with detail at several scales."""
    noise = np.random.Generator(np.random.Philox(seed)).normal(size=(count, 64, 64))
    mixed = sum(gaussian_filter(noise, (0, sigma, sigma)) * sigma for sigma in (1, 3, 8))
    low, high = mixed.min((1, 2), keepdims=True), mixed.max((1, 2), keepdims=True)
    return ((mixed - low) / (high - low) * 255).astype(np.uint8)


def test_the_hash_is_that_of_imagehash() -> None:
    pictures = textures(50)
    halved = pictures.reshape(-1, 32, 2, 32, 2).mean((2, 4)).astype(np.uint8)
    doubled = halved.repeat(2, axis=1).repeat(2, axis=2)  # whose halves are whole numbers again
    for ours, picture in zip(perceptual_hashes(low_frequencies(doubled)), halved, strict=True):
        assert np.packbits(imagehash.phash(Image.fromarray(picture)).hash.ravel()).tobytes() == ours.tobytes()


@pytest.mark.parametrize("name", TURNS)
def test_turning_frequencies_is_turning_pictures(name: str) -> None:
    pictures, turn = textures(5), TURNS[name]
    expected = low_frequencies(turn.of_pictures(pictures))
    np.testing.assert_allclose(turn.of_frequencies(low_frequencies(pictures)), expected, rtol=1e-4, atol=0.5)


def test_the_eight_turns_are_eight_different_ones() -> None:
    picture = textures(1)
    assert len({turn.of_pictures(picture).tobytes() for turn in TURNS.values()}) == 8


def test_different_pictures_are_no_duplicates() -> None:
    assert near_duplicates(textures(300)) == ([], 10)


@pytest.mark.parametrize("name", TURNS)
def test_a_turned_copy_is_found_and_its_turn_is_named(name: str) -> None:
    pictures = textures(20)
    inverse = {"turned by 90 degrees": "turned by 270 degrees", "turned by 270 degrees": "turned by 90 degrees"}
    copy = TURNS[inverse.get(name, name)].of_pictures(pictures[3:4])
    (pair,), _ = near_duplicates(np.concatenate((pictures, copy)))
    assert (pair.first, pair.second, pair.turn) == (3, 20, name)
    assert pair.similarity == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    "change",
    [
        lambda p: (p * 0.6 + 30).astype(np.uint8),
        lambda p: np.roll(p, (1, 2), (0, 1)),
        lambda p: np.clip(p + np.random.Generator(np.random.Philox(9)).normal(0, 4, p.shape), 0, 255).astype(np.uint8),
    ],
    ids=["darker", "shifted", "noisier"],
)
def test_a_changed_copy_is_found(change: object) -> None:
    pictures = textures(30)
    changed = change(pictures[7])[None]  # type: ignore[operator]
    pairs, _ = near_duplicates(np.concatenate((pictures, changed)))
    assert [(pair.first, pair.second, pair.turn) for pair in pairs] == [(7, 30, "")]


def test_constant_pictures_resemble_nothing() -> None:
    black = np.zeros((3, 64, 64), np.uint8)
    (pair,), _ = near_duplicates(np.concatenate((black, textures(2), textures(1), black)))
    assert (pair.first, pair.second) == (3, 5)


def test_too_many_candidates_narrow_the_search_and_keep_the_closest(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = textures(40)
    shifted = np.roll(pictures[7], (1, 2), (0, 1))[None]
    both = np.concatenate((pictures, pictures[5:6], shifted))
    assert [(p.first, p.second) for p in near_duplicates(both)[0]] == [(5, 40), (7, 41)]
    monkeypatch.setattr(duplicates, "_MAX_CANDIDATES", 1)
    pairs, radius = near_duplicates(both)
    assert [(p.first, p.second) for p in pairs] == [(5, 40)]
    assert radius < 10


def test_a_large_set_is_compared_in_blocks_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = textures(30)
    both = np.concatenate((pictures, pictures[::-1]))
    expected = [(p.first, p.second) for p in near_duplicates(both)[0]]
    assert sorted(expected) == [(i, 59 - i) for i in range(30)]
    monkeypatch.setattr(duplicates, "_HASHES_AT_ONCE", 200)
    monkeypatch.setattr(duplicates, "_PAIRS_AT_ONCE", 7)
    assert [(p.first, p.second) for p in near_duplicates(both)[0]] == expected


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32])
def test_a_thumbnail_is_the_picture_in_small_whatever_its_type(dtype: type) -> None:
    step = np.zeros((128, 192), dtype)
    step[:, 96:] = np.asarray(200).astype(dtype)
    small = thumbnail(step)
    assert small.shape == (64, 64)
    assert (small[:, :32] == small[0, 0]).all()
    assert (small[:, 32:] == small[0, 63]).all()
    assert small[0, 63] >= 200
    assert small[0, 0] == 0


def test_a_thumbnail_of_broken_numbers_is_a_picture_still() -> None:
    pixels = np.full((64, 64), np.nan, np.float32)
    pixels[:, 32:] = np.linspace(0, 1, 32)
    assert thumbnail(pixels)[:, 40:].std() > 0
