"""From pixels to the network's grid and back, in NumPy and Pillow alone.

The one place where intensities and resizing are defined: training, evaluation and prediction take it through
:class:`leafseg.data.transforms.Preprocessor`, exported models through :mod:`leafseg.runtime`, which has no torch.
Resizing is Pillow's and never torch's, because the two differ in the last bit, and the starting noise of an image
follows from its resized content: a tie that is rounded the other way would draw other noise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from leafseg import rng
from leafseg.data.geometry import Reading, ReadingValues
from leafseg.data.images import DICOM_SUFFIXES, file_state, image_suffix, is_volume, read_image, read_volume
from leafseg.errors import DataError

_STATISTICS_VALUES = 2**24  # a volume's percentiles, mean and deviation come from about this many of its voxels
_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


class PreprocessingValues(ReadingValues, Protocol):
    """The values of :class:`leafseg.config.PreprocessingSettings` that matter here."""

    def __hash__(self) -> int: ...
    @property
    def size(self) -> tuple[int, int]: ...
    @property
    def fit(self) -> Literal["stretch", "pad", "tile"]: ...
    @property
    def interpolation(self) -> Literal["bilinear", "bicubic"]: ...
    @property
    def intensity(self) -> Literal["auto", "range", "percentile", "window", "zscore"]: ...
    @property
    def percentiles(self) -> tuple[float, float]: ...
    @property
    def window(self) -> tuple[float, float] | None: ...


@dataclass(frozen=True)
class Placement:
    """Where an image lies in the network input; sizes are (height, width) in pixels.

    Attributes:
        source_size: of the image as read.
        input_size: of the network input.
        top, left, content_size: the rectangle of the input that the image fills; the rest is padding.
    """

    source_size: tuple[int, int]
    input_size: tuple[int, int]
    top: int
    left: int
    content_size: tuple[int, int]


class PixelPreprocessor:
    """Pixels to network input, and maps back to the source grid."""

    def __init__(self, settings: PreprocessingValues) -> None:
        self.settings = settings

    @property
    def reading(self) -> Reading:
        """How volumes are turned and cut."""
        return Reading.of(self.settings)

    def read(self, path: Path, frame: int | None = None) -> NDArray[np.float32]:
        """An image file, or a frame of it, as float32 ``[3, H, W]`` in 0..1 on its own grid.

        The slices of a volume share its percentiles, mean and deviation, so that equal tissue stays equally bright.
        With ``dicom_window``, a DICOM image is what its window makes of it, whatever ``intensity`` says.

        Raises:
            DataError: as ``read_image`` and ``intensity_to_unit``, and names the file.
        """
        pixels = read_image(path, frame, reading=self.reading)
        try:
            if self.settings.dicom_window and pixels.dtype.kind == "f" and image_suffix(path) in DICOM_SUFFIXES:
                return _three_channels(_range_to_unit(pixels))
            if not is_volume(path):
                return self.intensity_to_unit(pixels)
            _check_pixels(pixels)
            bounds = _volume_bounds(path, file_state(path), self.settings)
            return _three_channels(_range_to_unit(pixels) if bounds is None else _bounds_to_unit(pixels, *bounds))
        except DataError as error:
            raise DataError(f"{path}: {error}") from error

    def intensity_to_unit(self, pixels: NDArray[Any]) -> NDArray[np.float32]:
        """Pixels ``[H, W]`` or ``[H, W, 3]`` as float32 ``[3, H, W]`` in 0..1; grey becomes three equal channels.

        ``range`` divides integers by their type's maximum (negative ones become 0) and takes floats as they are, which
        must lie in 0..1. ``percentile`` maps the image's own two percentiles to 0..1, ``zscore`` its mean minus and
        plus three standard deviations; a constant image becomes zeros. ``window`` maps its centre minus and plus half
        its width. NaN and -inf become 0 and +inf becomes 1; they do not count for the percentiles, mean and deviation.

        Raises:
            DataError: for another shape or type, no finite pixel at all, or floats outside 0..1 with ``range``.
        """
        _check_pixels(pixels)
        return self.parts_to_unit(pixels)(pixels)

    def parts_to_unit(self, sample: NDArray[Any]) -> Callable[[NDArray[Any]], NDArray[np.float32]]:
        """``intensity_to_unit`` for parts of one image, with the percentiles, mean and deviation of a sample of it.

        Raises:
            DataError: if the sample holds no finite pixel.
        """
        bounds = _bounds(sample, self.settings)

        def to_unit(pixels: NDArray[Any]) -> NDArray[np.float32]:
            _check_pixels(pixels)
            return _three_channels(_range_to_unit(pixels) if bounds is None else _bounds_to_unit(pixels, *bounds))

        return to_unit

    def place(self, unit: NDArray[np.float32]) -> tuple[NDArray[np.float32], Placement]:
        """An image ``[3, H, W]`` in 0..1 as network input ``[3, h, w]`` in 0..1, and where it lies in it."""
        placement = self.placement((unit.shape[1], unit.shape[2]))
        content = _resize(unit, placement.content_size, self.settings.interpolation)
        content = np.clip(content, np.float32(0), np.float32(1))  # bicubic overshoots
        if placement.content_size == placement.input_size:
            return content, placement
        bottom, right = placement.top + content.shape[1], placement.left + content.shape[2]
        padded = np.zeros((3, *placement.input_size), np.float32)
        padded[:, placement.top : bottom, placement.left : right] = content
        return padded, placement

    def placement(self, source_size: tuple[int, int]) -> Placement:
        """Where an image of this (height, width) will lie in the network input."""
        size = self.settings.size
        if self.settings.fit == "tile":  # the tiles are cut later, from the image as it is
            return Placement(source_size, source_size, 0, 0, source_size)
        if self.settings.fit == "stretch":
            return Placement(source_size, size, 0, 0, size)
        shrink = min(size[0] / source_size[0], size[1] / source_size[1])
        content = (
            min(size[0], max(1, round(source_size[0] * shrink))),
            min(size[1], max(1, round(source_size[1] * shrink))),
        )
        return Placement(source_size, size, (size[0] - content[0]) // 2, (size[1] - content[1]) // 2, content)

    def restore(self, maps: NDArray[np.float32], placement: Placement) -> NDArray[np.float32]:
        """Maps ``[C, h, w]`` on the network input's grid (probabilities) back to the source grid, ``[C, H, W]``."""
        bottom, right = placement.top + placement.content_size[0], placement.left + placement.content_size[1]
        return _resize(maps[:, placement.top : bottom, placement.left : right], placement.source_size, "bilinear")


def noise_position(placed: NDArray[np.float32]) -> int:
    """The position of an image's starting noise in its stream, from the network input ``[3, h, w]`` that it makes.

    Content is in 8-bit steps, so that what rounds alike draws alike.
    """
    content = (placed * np.float32(255)).round().astype(np.uint8)
    return rng.content_position(hashlib.sha256(np.ascontiguousarray(content).data).hexdigest())


def draw_noise(position: int, shape: tuple[int, ...], *, seed: int, num_samples: int) -> NDArray[np.float32]:
    """Starting noise ``[num_samples, *shape]`` of an image at this position."""
    return np.stack([rng.normal(seed, noise_stream(draw), position, shape) for draw in range(num_samples)])


def noise_stream(draw: int) -> str:
    """The stream of the starting noise of draw number ``draw`` of an image, see :func:`leafseg.rng.normal`."""
    return f"inference-noise-{draw}"


def _resize(planes: NDArray[np.float32], size: tuple[int, int], mode: str) -> NDArray[np.float32]:
    """Planes ``[C, H, W]`` to ``[C, *size]``, antialiased; those of that size come back as they are."""
    if planes.shape[1:] == size:
        return planes
    height, width = size
    resized = [Image.fromarray(plane).resize((width, height), _RESAMPLING[mode]) for plane in planes]
    return np.stack([np.asarray(plane) for plane in resized])


def _range_to_unit(pixels: NDArray[Any]) -> NDArray[np.float32]:
    if pixels.dtype.kind == "b":
        return pixels.astype(np.float32)
    if pixels.dtype.kind in "ui":
        top = np.iinfo(pixels.dtype).max
        return (pixels.astype(np.float32) / np.float32(top)).clip(min=np.float32(0.0))
    finite = _finite(pixels)
    if finite.min() < 0 or finite.max() > 1:
        raise DataError(
            f"image holds values from {finite.min():g} to {finite.max():g}; with intensity 'range' real numbers must "
            "lie in 0..1, use 'percentile'"
        )
    return np.nan_to_num(pixels.astype(np.float32), nan=0.0, posinf=1.0, neginf=0.0)


def _bounds(values: NDArray[Any], settings: PreprocessingValues) -> tuple[float, float] | None:
    """What becomes 0 and what becomes 1; None where the type says it (intensity range)."""
    kind = settings.intensity
    if kind == "auto":
        kind = "range" if values.dtype in (np.uint8, np.bool_) else "percentile"
    if kind == "range":
        return None
    if kind == "window" and settings.window is not None:
        centre, width = settings.window
        return centre - width / 2, centre + width / 2
    finite = _finite(values)
    if kind == "zscore":
        mean, deviation = float(finite.mean(dtype=np.float64)), float(finite.std(dtype=np.float64))
        return mean - 3 * deviation, mean + 3 * deviation
    low, high = np.percentile(finite, settings.percentiles)
    return float(low), float(high)


@lru_cache(maxsize=1024)
def _volume_bounds(path: Path, state: Hashable, settings: PreprocessingValues) -> tuple[float, float] | None:
    voxels = read_volume(path)[0]
    # An odd step meets every column and row of a volume in turn.
    return _bounds(voxels.reshape(-1)[:: voxels.size // _STATISTICS_VALUES | 1], settings)


def _bounds_to_unit(pixels: NDArray[Any], low: float, high: float) -> NDArray[np.float32]:
    if not high > low:
        return np.zeros(pixels.shape, dtype=np.float32)
    # float64: the difference of two large float32 values would lose the contrast of a narrow window
    with np.errstate(invalid="ignore"):  # signalling NaN
        scaled = (pixels.astype(np.float64) - low) / (high - low)
    return np.nan_to_num(np.clip(scaled, 0.0, 1.0), nan=0.0).astype(np.float32)


def _check_pixels(pixels: NDArray[Any]) -> None:
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] != 3) or 0 in pixels.shape:
        raise DataError(f"image has shape {list(pixels.shape)}; accepted are [H, W] and [H, W, 3]")
    if pixels.dtype.kind not in "buif":
        raise DataError(f"image has type {pixels.dtype}; accepted are integers and real numbers")


def _three_channels(unit: NDArray[np.float32]) -> NDArray[np.float32]:
    planes = np.broadcast_to(unit, (3, *unit.shape)) if unit.ndim == 2 else unit.transpose(2, 0, 1)
    return np.ascontiguousarray(planes)


def _finite(pixels: NDArray[Any]) -> NDArray[Any]:
    if pixels.dtype.kind != "f":
        return pixels
    finite = pixels[np.isfinite(pixels)]
    if not finite.size:
        raise DataError("image holds no finite pixel; export it again")
    return finite.astype(np.float64)  # float16 would overflow in the percentiles' interpolation
