"""Pictures that show the same thing twice: re-encoded, recoloured, scaled, a little shifted, flipped or turned.

Two steps, since all pairs are compared: perceptual hashes name candidates at about a nanosecond a pair, then the
correlation of small pictures decides. By hashes alone, one in sixty pairs of chest X-rays would be duplicates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

THUMBNAIL_SIDE = 64
# On five public sets (dermoscopy, ultrasound, X-rays, blood cells, nuclei) pairs of one lesion or one exam reach 0.58
# to 1.0, and the most alike X-rays of two people 0.57: docs/data-check.md.
MIN_SIMILARITY = 0.6

_LOW = 8
_RADIUS = 10  # of 64 bits; a shift by a few percent of the side costs about 8
_TURNED_RADIUS = 4  # a flipped copy is exact, and seven more comparisons must not cost seven times the candidates
_MAX_CANDIDATES = 200_000  # a minute of confirming; beyond it only closer hashes are candidates
_HASHES_AT_ONCE = 2**20  # comparisons: what fits into a processor's cache
_PAIRS_AT_ONCE = 1024
_MAX_SHIFT = 4  # thumbnail pixels
_CONTRAST_SIGMA, _CONTRAST_FLOOR = 1.5, 2.0  # thumbnail pixels; grey levels of 255


@dataclass(frozen=True)
class Turn:
    """One of the eight ways to lay a picture: first rows and columns change places, then each may run back."""

    transpose: bool = False
    flip_rows: bool = False
    flip_columns: bool = False

    def of_pictures(self, pictures: NDArray[Any]) -> NDArray[Any]:
        """Pictures ``[N, H, W]`` turned."""
        turned = pictures.swapaxes(1, 2) if self.transpose else pictures
        turned = turned[:, ::-1] if self.flip_rows else turned
        return np.ascontiguousarray(turned[:, :, ::-1] if self.flip_columns else turned)

    def of_frequencies(self, low: NDArray[Any]) -> NDArray[Any]:
        """Their cosine transforms ``[N, k, k]``: of a sequence that runs back, the odd frequencies change sign."""
        signs = np.where(np.arange(low.shape[1]) % 2, -1, 1).astype(low.dtype)
        turned = low.swapaxes(1, 2) if self.transpose else low
        turned = turned * signs[:, None] if self.flip_rows else turned
        return turned * signs if self.flip_columns else turned


# What must be done to the second picture of a pair to get the first.
TURNS = {
    "": Turn(),
    "mirrored": Turn(flip_columns=True),
    "mirrored upside down": Turn(flip_rows=True),
    "turned by 180 degrees": Turn(flip_rows=True, flip_columns=True),
    "turned by 90 degrees": Turn(transpose=True, flip_rows=True),
    "turned by 270 degrees": Turn(transpose=True, flip_columns=True),
    "transposed": Turn(transpose=True),
    "transposed, turned by 180 degrees": Turn(transpose=True, flip_rows=True, flip_columns=True),
}


@dataclass(frozen=True)
class Pair:
    """Two pictures that show the same.

    Attributes:
        first, second: their places in the input, ``first < second``.
        similarity: correlation of local contrast, ``MIN_SIMILARITY``..1.
        turn: a key of ``TURNS``; empty for pictures of one orientation.
    """

    first: int
    second: int
    similarity: float
    turn: str


def thumbnail(pixels: NDArray[Any]) -> NDArray[np.uint8]:
    """Pixels ``[H, W]`` or ``[H, W, 3]`` of any type as a grey picture ``[64, 64]``; its aspect ratio is not kept.

    8-bit pixels keep their values; others are stretched from their 0.5th..99.5th percentile. NaN becomes 0.
    """
    from PIL import Image

    if pixels.dtype == np.bool_:
        pixels = pixels.astype(np.uint8) * np.uint8(255)
    elif pixels.dtype != np.uint8:
        with np.errstate(all="ignore"):  # damaged numbers overflow
            sparse = pixels[:: max(1, pixels.shape[0] // 256), :: max(1, pixels.shape[1] // 256)].astype(np.float64)
            sparse = sparse[np.isfinite(sparse)]
            low, high = np.percentile(sparse, (0.5, 99.5)) if sparse.size else (0.0, 0.0)
            values = (pixels.astype(np.float64) - low) * (255.0 / (high - low) if high > low else 0.0)
        pixels = np.nan_to_num(values, posinf=0.0, neginf=0.0).clip(0, 255).astype(np.uint8)
    picture = Image.fromarray(np.ascontiguousarray(pixels)).convert("L")
    return np.asarray(picture.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BOX))


def low_frequencies(thumbnails: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The lowest 8x8 coefficients of the cosine transform of pictures ``[N, 64, 64]``, halved first."""
    from scipy.fft import dctn

    pixels = thumbnails.astype(np.float32)
    halved = pixels[:, ::2, ::2] + pixels[:, 1::2, ::2] + pixels[:, ::2, 1::2] + pixels[:, 1::2, 1::2]
    return dctn(halved / 4, axes=(1, 2))[:, :_LOW, :_LOW]


def perceptual_hashes(low: NDArray[np.float32]) -> NDArray[np.uint64]:
    """The 64-bit pHash ``[N]`` of low frequencies ``[N, 8, 8]``: which are above their median.

    Source: ImageHash's ``phash`` of a 32x32 picture, for many at once.
    """
    flat = low.reshape(len(low), -1)
    bits = flat > np.median(flat, axis=1, keepdims=True)
    return np.packbits(bits, axis=1).view(np.uint64).ravel()


def near_duplicates(thumbnails: NDArray[np.uint8]) -> tuple[list[Pair], int]:
    """All pairs of pictures ``[N, 64, 64]`` that show the same, and the largest hash distance of candidates.

    Constant pictures are like nothing. The distance is below 10 only where more than 200,000 pairs were candidates.
    Cost: 4 N^2 hash comparisons (a nanosecond each: 100,000 pictures take half a minute), and 0.3 ms a candidate.
    """
    varied = np.flatnonzero(thumbnails.reshape(len(thumbnails), -1).std(axis=1) > 0)
    pictures = thumbnails[varied]
    if len(pictures) < 2:
        return [], _RADIUS
    candidates, radius = _candidates(pictures)
    best: dict[tuple[int, int], Pair] = {}
    for name, pairs in candidates.items():
        turned = TURNS[name].of_pictures(pictures)
        for (first, second), similarity in zip(pairs.tolist(), _similarities(pictures, turned, pairs), strict=True):
            places = int(varied[first]), int(varied[second])
            if similarity >= MIN_SIMILARITY and (places not in best or similarity > best[places].similarity):
                best[places] = Pair(*places, min(1.0, round(float(similarity), 3)), name)
    return sorted(best.values(), key=lambda pair: (-pair.similarity, pair.first, pair.second)), radius


def _candidates(pictures: NDArray[np.uint8]) -> tuple[dict[str, NDArray[np.int64]], int]:
    """Pairs ``[P, 2]`` of close hashes for every turn, and the distance that counted as close."""
    low = low_frequencies(pictures)
    turned = {name: perceptual_hashes(turn.of_frequencies(low)) for name, turn in TURNS.items()}
    hashes = turned[""]
    found: dict[str, list[NDArray[np.int64]]] = {name: [] for name in TURNS}
    radius = _RADIUS
    block = max(1, _HASHES_AT_ONCE // len(hashes))
    for start in range(0, len(hashes), block):
        rows = hashes[start : start + block, None]
        for name, others in turned.items():
            distance = np.bitwise_count(rows ^ others[None, start:]).ravel()  # of [rows, N - start]
            close = np.flatnonzero(distance <= (_TURNED_RADIUS if name else radius))  # flat: thrice as fast
            first, second = np.divmod(close, len(hashes) - start)
            later = second > first
            found[name].append(np.stack((first + start, second + start, distance[close]), axis=1)[later])
        while sum(map(len, found[""])) > _MAX_CANDIDATES and radius > 0:
            radius -= 1
            found[""] = [pairs[pairs[:, 2] <= radius] for pairs in found[""]]
    return {name: np.concatenate(blocks)[:, :2] for name, blocks in found.items()}, radius


def _similarities(
    pictures: NDArray[np.uint8], turned: NDArray[np.uint8], pairs: NDArray[np.int64]
) -> Iterator[np.float32]:
    """Of each pair (a place in ``pictures``, one in ``turned``): the highest correlation over small shifts."""
    reach = 2 * _MAX_SHIFT + 1
    edges = [*range(0, len(pairs), _PAIRS_AT_ONCE), len(pairs)]
    for start, end in pairwise(edges):
        part = pairs[start:end]
        spectra = []
        for source, column in ((pictures, part[:, 0]), (turned, part[:, 1])):
            unique, place = np.unique(column, return_inverse=True)
            spectra.append(np.fft.rfft2(_local_contrast(source[unique]))[place])
        correlation = np.fft.irfft2(spectra[0] * spectra[1].conj(), s=pictures.shape[1:])  # [P, 64, 64], by shift
        near = np.roll(correlation, (_MAX_SHIFT, _MAX_SHIFT), (1, 2))[:, :reach, :reach]
        yield from near.reshape(len(part), -1).max(axis=1).astype(np.float32)


def _local_contrast(pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Pictures less their local mean, over their local spread, of unit norm: blind to brightness and coarse anatomy."""
    from scipy.ndimage import gaussian_filter

    sigma = (0, _CONTRAST_SIGMA, _CONTRAST_SIGMA)
    values = pictures.astype(np.float32)
    values -= gaussian_filter(values, sigma)
    spread = np.sqrt(gaussian_filter(values**2, sigma))
    values /= spread + _CONTRAST_FLOOR
    values -= values.mean((1, 2), keepdims=True)
    norm = np.linalg.norm(values, axis=(1, 2), keepdims=True)
    return values / np.maximum(norm, np.float32(1e-6))
