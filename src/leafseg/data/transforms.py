"""From pixels to network input and back, and the random changes of training samples: pure functions and one object.

Training, evaluation, prediction and export all go through one ``Preprocessor``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import astuple, dataclass, fields
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from leafseg.config import AugmentationSettings, PreprocessingSettings
from leafseg.data.images import (
    DICOM_SUFFIXES,
    Reading,
    file_state,
    image_suffix,
    is_volume,
    read_image,
    read_volume,
)
from leafseg.errors import DataError

_STATISTICS_VALUES = 2**24  # a volume's percentiles, mean and deviation come from about this many of its voxels


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


class Preprocessor:
    """Pixels to network input, labels along, and maps back to the source grid."""

    def __init__(self, settings: PreprocessingSettings) -> None:
        self.settings = settings

    @property
    def reading(self) -> Reading:
        """How volumes are turned and cut."""
        return Reading.of(self.settings)

    def read(self, path: Path, frame: int | None = None) -> Tensor:
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

    def intensity_to_unit(self, pixels: NDArray[Any]) -> Tensor:
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

    def parts_to_unit(self, sample: NDArray[Any]) -> Callable[[NDArray[Any]], Tensor]:
        """``intensity_to_unit`` for parts of one image, with the percentiles, mean and deviation of a sample of it.

        Raises:
            DataError: if the sample holds no finite pixel.
        """
        bounds = _bounds(sample, self.settings)

        def to_unit(pixels: NDArray[Any]) -> Tensor:
            _check_pixels(pixels)
            return _three_channels(_range_to_unit(pixels) if bounds is None else _bounds_to_unit(pixels, *bounds))

        return to_unit

    def apply(self, image: NDArray[Any] | Tensor) -> tuple[Tensor, Placement]:
        """Network input ``[3, h, w]`` in 0..1, and where the image lies in it.

        Args:
            image: float32 ``[3, H, W]`` in 0..1 as ``read`` gives it, or pixels as ``intensity_to_unit`` takes them.

        Raises:
            DataError: as ``intensity_to_unit``.
        """
        unit = image if isinstance(image, Tensor) else self.intensity_to_unit(image)
        images, placement = self.resize_tensor(unit[None])
        return images[0], placement

    def resize_tensor(self, images: Tensor) -> tuple[Tensor, Placement]:
        """Images ``[B, 3, H, W]`` in 0..1 to ``[B, 3, h, w]`` in 0..1, stretched or padded as the settings say."""
        source_size = (images.shape[-2], images.shape[-1])
        placement = self.placement(source_size)
        resized = _resize(images, placement.content_size, self.settings.interpolation)
        return _pad(resized.clamp(0.0, 1.0), placement), placement  # bicubic overshoots

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

    def apply_labels(self, labels: NDArray[np.uint8] | NDArray[np.bool_], placement: Placement) -> Tensor:
        """Class ids ``[H, W]`` onto the network input's grid, ``[h, w]`` int64; bool ``[C, H, W]`` to ``[C, h, w]``.

        The padding is class 0, and no overlapping label.

        Raises:
            DataError: if the labels are not on the image's grid.
        """
        height, width = labels.shape[-2:]
        if (height, width) != placement.source_size:
            raise DataError(
                f"mask is {width}x{height}, image is {placement.source_size[1]}x"
                f"{placement.source_size[0]}; both must share one grid"
            )
        tensor = torch.from_numpy(np.ascontiguousarray(labels, dtype=np.uint8)).reshape(1, -1, height, width)
        if (height, width) != placement.content_size:
            tensor = F.interpolate(tensor, placement.content_size, mode="nearest-exact")
        placed = _pad(tensor, placement)[0]  # [1 or C, h, w]
        return placed[0].long() if labels.ndim == 2 else placed.bool()

    def restore(self, maps: Tensor, placement: Placement) -> Tensor:
        """Maps ``[C, h, w]`` on the network input's grid (probabilities) back to the source grid, ``[C, H, W]``."""
        bottom, right = placement.top + placement.content_size[0], placement.left + placement.content_size[1]
        content = maps[:, placement.top : bottom, placement.left : right]
        return _resize(content[None], placement.source_size, "bilinear")[0]


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


def _bounds(values: NDArray[Any], settings: PreprocessingSettings) -> tuple[float, float] | None:
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
def _volume_bounds(path: Path, state: Hashable, settings: PreprocessingSettings) -> tuple[float, float] | None:
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


def _three_channels(unit: NDArray[np.float32]) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(unit))
    if tensor.ndim == 2:
        return tensor.expand(3, -1, -1).contiguous()
    return tensor.permute(2, 0, 1).contiguous()


def _finite(pixels: NDArray[Any]) -> NDArray[Any]:
    if pixels.dtype.kind != "f":
        return pixels
    finite = pixels[np.isfinite(pixels)]
    if not finite.size:
        raise DataError("image holds no finite pixel; export it again")
    return finite.astype(np.float64)  # float16 would overflow in the percentiles' interpolation


def _resize(images: Tensor, size: tuple[int, int], mode: Literal["bilinear", "bicubic"]) -> Tensor:
    if tuple(images.shape[-2:]) == size:
        return images
    return F.interpolate(images, size, mode=mode, align_corners=False, antialias=True)


def _pad(images: Tensor, placement: Placement) -> Tensor:
    if placement.content_size == placement.input_size:
        return images
    below = placement.input_size[0] - placement.top - placement.content_size[0]
    right = placement.input_size[1] - placement.left - placement.content_size[1]
    return F.pad(images, (placement.left, right, placement.top, below))


def draw_tile(
    image: Tensor,
    labels: Tensor,
    size: tuple[int, int],
    *,
    foreground_share: float,
    generator: np.random.Generator,
) -> tuple[Tensor, Tensor]:
    """A random crop of an image ``[3, H, W]`` and its labels, at their own resolution.

    The crop lies inside the image. Where the image is smaller than it, both repeat their last row and column, as the
    tiles of inference do.

    Args:
        image: any type.
        labels: class ids ``[H, W]``, or ``[C, H, W]`` with 1 where a label is; 255 is ignored.
        size: (height, width) of the crop.
        foreground_share: how often the crop is centred, as far as the image reaches, on a random labelled pixel (if
            there is any); otherwise all places are equally likely.
        generator: four numbers are drawn from it, whatever the case.
    """
    u = generator.random(4)
    limits = [max(0, side - wanted) for side, wanted in zip(image.shape[-2:], size, strict=True)]  # last place
    places = [min(int(share * (limit + 1)), limit) for share, limit in zip(u[:2], limits, strict=True)]
    if u[2] < foreground_share:
        labelled = ((labels > 0) & (labels != 255)).reshape(-1, *image.shape[-2:]).any(0).flatten().nonzero()[:, 0]
        if len(labelled):
            pixel = int(labelled[min(int(u[3] * len(labelled)), len(labelled) - 1)])
            centre = divmod(pixel, image.shape[-1])
            places = [min(max(0, c - s // 2), limit) for c, s, limit in zip(centre, size, limits, strict=True)]
    (top, left), (height, width) = places, size
    cut, cut_labels = (
        _repeat_edges(layers[..., top : top + height, left : left + width], size) for layers in (image, labels)
    )
    return cut, cut_labels


def _repeat_edges(layers: Tensor, size: tuple[int, int]) -> Tensor:
    below, right = size[0] - layers.shape[-2], size[1] - layers.shape[-1]
    if not (below or right):
        return layers
    rows = torch.arange(size[0]).clamp(max=layers.shape[-2] - 1)
    columns = torch.arange(size[1]).clamp(max=layers.shape[-1] - 1)
    return layers[..., rows[:, None], columns]


Kind = Literal["flip", "geometric", "photometric"]


@dataclass(frozen=True)
class Augmentation:
    """One drawn random change; the defaults change nothing. Applied in this order: flips, affine, photometric.

    Attributes:
        angle: degrees, counter-clockwise as seen.
        zoom: above 1 enlarges the content.
        shift_y, shift_x: shares of the side; positive moves the content down and right.
        brightness: offset on the 0..1 scale.
        contrast: factor about the image's mean.
        gamma: exponent.
        saturation: factor on the colours' distance from grey of equal luma.
        hue: turn of the colours, in shares of the circle.
    """

    flip_horizontal: bool = False
    flip_vertical: bool = False
    angle: float = 0.0
    zoom: float = 1.0
    shift_y: float = 0.0
    shift_x: float = 0.0
    brightness: float = 0.0
    contrast: float = 1.0
    gamma: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0


# Caches decide by it what they may keep: flips and affine moves can be applied to cached features, colours cannot.
AUGMENTATION_KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "flip_horizontal": "flip",
        "flip_vertical": "flip",
        "angle": "geometric",
        "zoom": "geometric",
        "shift_y": "geometric",
        "shift_x": "geometric",
        "brightness": "photometric",
        "contrast": "photometric",
        "gamma": "photometric",
        "saturation": "photometric",
        "hue": "photometric",
    }
)
AUGMENTATION_SIZE = len(fields(Augmentation))


def draw_augmentation(settings: AugmentationSettings, generator: np.random.Generator) -> Augmentation:
    """Draw one change; the same count of numbers is drawn whatever the settings, so that streams stay comparable."""
    u = generator.random(AUGMENTATION_SIZE)
    sides = 2.0 * u - 1.0

    def exact(value: float) -> float:
        return float(np.float32(value))  # survives pack_augmentation unchanged

    return Augmentation(
        flip_horizontal=settings.horizontal_flip and bool(u[0] < 0.5),
        flip_vertical=settings.vertical_flip and bool(u[1] < 0.5),
        angle=exact(settings.rotation_degrees * sides[2]),
        zoom=exact(settings.scale[0] + (settings.scale[1] - settings.scale[0]) * u[3]),
        shift_y=exact(settings.translation * sides[4]),
        shift_x=exact(settings.translation * sides[5]),
        brightness=exact(settings.brightness * sides[6]),
        contrast=exact(1.0 + settings.contrast * sides[7]),
        gamma=exact(math.exp(settings.gamma * sides[8])),
        saturation=exact(1.0 + settings.saturation * sides[9]),
        hue=exact(settings.hue * sides[10]),
    )


def pack_augmentation(augmentation: Augmentation) -> Tensor:
    """The drawn values as a float32 vector ``[11]``, in the order of the fields, so that batches can carry them."""
    return torch.tensor([float(value) for value in astuple(augmentation)], dtype=torch.float32)


def unpack_augmentation(vector: Tensor) -> Augmentation:
    """The inverse of ``pack_augmentation``."""
    values = vector.tolist()
    if len(values) != AUGMENTATION_SIZE:
        raise ValueError(f"vector has {len(values)} values; an augmentation has {AUGMENTATION_SIZE}")
    return Augmentation(bool(values[0]), bool(values[1]), *values[2:])


def augment(image: Tensor, labels: Tensor, augmentation: Augmentation) -> tuple[Tensor, Tensor]:
    """Change an image ``[3, h, w]`` in 0..1 and its labels, ``[h, w]`` int64 or ``[C, h, w]`` bool, together.

    Beyond the border the image repeats its edge and the labels are background.
    """
    image, labels = _flip(image, augmentation), _flip(labels, augmentation)
    size = (image.shape[-2], image.shape[-1])
    grid = _affine_grid(augmentation, size, image_size=size)
    if grid is not None:
        image = F.grid_sample(image[None], grid, mode="bilinear", padding_mode="border", align_corners=False)[0]
        layers = labels.reshape(1, -1, *size).to(grid.dtype)
        sampled = F.grid_sample(layers, grid, mode="nearest", padding_mode="zeros", align_corners=False)
        labels = sampled.reshape(labels.shape).to(labels.dtype)
    return _change_colours(image, augmentation), labels


def augment_grid(features: Tensor, augmentation: Augmentation, *, image_size: tuple[int, int] | None = None) -> Tensor:
    """Apply the flips and the affine move, not the colours, to cached features ``[D, gh, gw]``.

    Args:
        features: one vector a patch, over the whole image.
        image_size: (height, width) of the image that was augmented; needed where the patch grid has another aspect
            ratio, because a rotation is one of pixels. Default: the grid's own.
    """
    features = _flip(features, augmentation)
    grid_size = (features.shape[-2], features.shape[-1])
    grid = _affine_grid(augmentation, grid_size, image_size=image_size or grid_size)
    if grid is None:
        return features
    grid = grid.to(features.device, features.dtype)
    return F.grid_sample(features[None], grid, mode="bilinear", padding_mode="border", align_corners=False)[0]


def _flip(tensor: Tensor, augmentation: Augmentation) -> Tensor:
    axes = [-1] * augmentation.flip_horizontal + [-2] * augmentation.flip_vertical
    return torch.flip(tensor, axes) if axes else tensor


def _affine_grid(
    augmentation: Augmentation, out_size: tuple[int, int], *, image_size: tuple[int, int]
) -> Tensor | None:
    """Where each output pixel reads, ``[1, h, w, 2]``; None for the identity, which must stay exact and free."""
    move = (augmentation.angle, augmentation.zoom, augmentation.shift_y, augmentation.shift_x)
    if move == (0.0, 1.0, 0.0, 0.0):
        return None
    # Content moves by p_out = zoom * R * p_in + shift in pixels from the centre (y down), so reading inverts that.
    # grid_sample's coordinates run over -1..1 on each side, hence the aspect ratio on the off-diagonal.
    radians = math.radians(augmentation.angle)
    cos, sin = math.cos(radians) / augmentation.zoom, math.sin(radians) / augmentation.zoom
    aspect = image_size[0] / image_size[1]
    matrix = np.array([[cos, -sin * aspect], [sin / aspect, cos]])
    offset = -matrix @ (2.0 * np.array([augmentation.shift_x, augmentation.shift_y]))
    theta = torch.from_numpy(np.column_stack([matrix, offset]).astype(np.float32))[None]
    return F.affine_grid(theta, [1, 1, *out_size], align_corners=False)


def _change_colours(image: Tensor, augmentation: Augmentation) -> Tensor:
    # Mean and power in numpy: torch cuts an image among its threads, and the last bits of both depend on the cuts. A
    # loading process has one thread, the training process several, and both must give the same sample.
    if augmentation.brightness != 0.0 or augmentation.contrast != 1.0:
        mean = float(image.numpy().mean(dtype=np.float64))
        image = ((image - mean) * augmentation.contrast + mean + augmentation.brightness).clamp(0.0, 1.0)
    if augmentation.gamma != 1.0:
        image = torch.from_numpy(image.clamp(0.0, 1.0).numpy() ** np.float32(augmentation.gamma))
    if augmentation.saturation != 1.0 or augmentation.hue != 0.0:
        image = _turn_colours(image, augmentation.saturation, augmentation.hue)
    return image


# Luma and two colour differences of NTSC television (FCC 1953): a grey pixel has no colour difference, and luma keeps
# its weight whatever happens to them.
_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])


def _turn_colours(image: Tensor, saturation: float, hue: float) -> Tensor:
    """Scale and turn the colour differences of ``[3, h, w]``; luma stays."""
    angle = 2 * math.pi * hue
    cos, sin = saturation * math.cos(angle), saturation * math.sin(angle)
    turn = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
    matrix = (np.linalg.inv(_TO_YIQ) @ turn @ _TO_YIQ).astype(np.float32)
    red, green, blue = image.numpy()
    # Written out: a matrix product may round differently with another number of threads.
    turned = [row[0] * red + row[1] * green + row[2] * blue for row in matrix]
    return torch.from_numpy(np.stack(turned)).clamp(0.0, 1.0)
