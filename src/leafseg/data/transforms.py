"""From pixels to network input and back, and the random changes of training samples: pure functions and one object.

Training, evaluation, prediction and export all go through one ``Preprocessor``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from leafseg import rng
from leafseg.config import AugmentationSettings, PreprocessingSettings
from leafseg.data.images import Reading
from leafseg.data.pixels import PixelPreprocessor, Placement
from leafseg.errors import DataError


class Preprocessor:
    """Pixels to network input, labels along, and maps back to the source grid: ``PixelPreprocessor`` for tensors."""

    def __init__(self, settings: PreprocessingSettings) -> None:
        self.settings = settings
        self.pixels = PixelPreprocessor(settings)

    @property
    def reading(self) -> Reading:
        """How volumes are turned and cut."""
        return self.pixels.reading

    def read(self, path: Path, frame: int | None = None) -> Tensor:
        """An image file, or a frame of it, as float32 ``[3, H, W]`` in 0..1, see :meth:`PixelPreprocessor.read`."""
        return torch.from_numpy(self.pixels.read(path, frame))

    def intensity_to_unit(self, pixels: NDArray[Any]) -> Tensor:
        """Pixels as float32 ``[3, H, W]`` in 0..1, see :meth:`PixelPreprocessor.intensity_to_unit`."""
        return torch.from_numpy(self.pixels.intensity_to_unit(pixels))

    def parts_to_unit(self, sample: NDArray[Any]) -> Callable[[NDArray[Any]], Tensor]:
        """``intensity_to_unit`` for parts of one image, see :meth:`PixelPreprocessor.parts_to_unit`."""
        to_unit = self.pixels.parts_to_unit(sample)
        return lambda pixels: torch.from_numpy(to_unit(pixels))

    def apply(self, image: NDArray[Any] | Tensor) -> tuple[Tensor, Placement]:
        """Network input ``[3, h, w]`` in 0..1, and where the image lies in it.

        Args:
            image: float32 ``[3, H, W]`` in 0..1 as ``read`` gives it, or pixels as ``intensity_to_unit`` takes them.

        Raises:
            DataError: as ``intensity_to_unit``.
        """
        unit = image if isinstance(image, Tensor) else self.intensity_to_unit(image)
        placed, placement = self.pixels.place(unit.numpy())
        return torch.from_numpy(placed), placement

    def resize_tensor(self, images: Tensor) -> tuple[Tensor, Placement]:
        """Images ``[B, 3, H, W]`` in 0..1 to ``[B, 3, h, w]`` in 0..1, stretched or padded as the settings say."""
        placed = [self.pixels.place(image)[0] for image in images.numpy()]
        return torch.from_numpy(np.stack(placed)), self.placement((images.shape[-2], images.shape[-1]))

    def placement(self, source_size: tuple[int, int]) -> Placement:
        """Where an image of this (height, width) will lie in the network input."""
        return self.pixels.placement(source_size)

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

    def apply_label_shares(
        self, labels: NDArray[np.uint8] | NDArray[np.bool_], placement: Placement, *, classes: int
    ) -> Tensor:
        """How much of each input pixel a label covers, float32 ``[K, h, w]`` in 0..1, by antialiased resizing.

        Args:
            labels, placement: as of :meth:`apply_labels`.
            classes: C with the background; of exclusive labels K is C, or 1 (the foreground) where C is 2. Overlapping
                labels have their own K.

        Raises:
            DataError: if the labels are not on the image's grid.
        """
        if labels.shape[-2:] != placement.source_size:
            self.apply_labels(labels, placement)  # raises
        tensor = torch.from_numpy(np.ascontiguousarray(labels, dtype=np.uint8))
        if labels.ndim == 2:
            ids = torch.arange(1, classes, dtype=torch.uint8)
            tensor = tensor == ids[:, None, None]
        planes = tensor[None].float()
        if placement.source_size != placement.content_size:
            height, width = placement.content_size
            turned = width == 1  # torch 2.13 repeats the first row of results that are one pixel wide
            planes, size = (planes.mT, (width, height)) if turned else (planes, (height, width))
            planes = F.interpolate(planes, size, mode="bilinear", antialias=True).clamp(0.0, 1.0)
            planes = planes.mT if turned else planes
        planes = _pad(planes, placement)[0]
        return with_background(planes) if labels.ndim == 2 and classes > 2 else planes

    def restore(self, maps: Tensor, placement: Placement) -> Tensor:
        """Maps ``[C, h, w]`` on the network input's grid (probabilities) back to the source grid, ``[C, H, W]``.

        By torch, whose threads share the work: one image may have many large maps. It is ``PixelPreprocessor.restore``
        to the last bits.
        """
        if placement.source_size[1] == 1:  # torch 2.13 repeats the first row of results that are one pixel wide
            return torch.from_numpy(self.pixels.restore(maps.numpy(), placement))
        bottom, right = placement.top + placement.content_size[0], placement.left + placement.content_size[1]
        content = maps[:, placement.top : bottom, placement.left : right]
        if tuple(content.shape[1:]) == placement.source_size:
            return content
        return F.interpolate(content[None], placement.source_size, mode="bilinear", antialias=True)[0]


def with_background(planes: Tensor) -> Tensor:
    """Shares of the foreground classes ``[K, h, w]``, and before them what they leave over, ``[1 + K, h, w]``."""
    return torch.cat([(1.0 - planes.sum(0, keepdim=True)).clamp(min=0.0), planes])


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
        elastic: standard deviation of the control points' displacement, as a share of the side.
        elastic_seed: a whole number below 2 ** 24, which says what displacement it is.
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
    elastic: float = 0.0
    elastic_seed: float = 0.0


# Caches decide by it what they may keep: moves and bends can be applied to cached features, colours cannot.
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
        "elastic": "geometric",
        "elastic_seed": "geometric",
    }
)
AUGMENTATION_SIZE = len(fields(Augmentation))


def draw_augmentation(settings: AugmentationSettings, generator: np.random.Generator) -> Augmentation:
    """Draw one change; the same count of numbers is drawn whatever the settings, so that streams stay comparable."""
    u = generator.random(AUGMENTATION_SIZE)
    sides = 2.0 * u - 1.0

    def exact(value: float) -> float:
        return float(np.float32(value))  # survives pack_augmentation unchanged

    drawn = Augmentation(
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
        elastic=exact(settings.elastic),
        elastic_seed=float(int(u[11] * 2**24)) if settings.elastic > 0 else 0.0,
    )
    happens = dict(zip(("geometric", "photometric"), generator.random(2) < settings.probability, strict=True))
    still = Augmentation()
    left_out = (name for name, kind in AUGMENTATION_KINDS.items() if not happens.get(kind, True))
    return replace(drawn, **{name: getattr(still, name) for name in left_out})


def pack_augmentation(augmentation: Augmentation) -> Tensor:
    """The drawn values as a float32 vector ``[13]``, in the order of the fields, so that batches can carry them."""
    return torch.tensor([float(value) for value in astuple(augmentation)], dtype=torch.float32)


def unpack_augmentation(vector: Tensor) -> Augmentation:
    """The inverse of ``pack_augmentation``."""
    values = vector.tolist()
    if len(values) != AUGMENTATION_SIZE:
        raise ValueError(f"vector has {len(values)} values; an augmentation has {AUGMENTATION_SIZE}")
    return Augmentation(bool(values[0]), bool(values[1]), *values[2:])


Box = tuple[int, int, int, int]  # top, left, bottom, right: the last two are outside


def draw_mix(
    share: float, n: int, index: int, size: tuple[int, int], generator: np.random.Generator
) -> tuple[int, Box]:
    """Which sample lends a rectangle, and where: CutMix (Yun et al. 2019, arXiv 1905.04899) with labels pasted.

    Args:
        share: how often anything is pasted; otherwise the rectangle is empty.
        n: samples; the lender is any of them but ``index``, unless there is no other.
        index: the sample that is pasted into.
        size: (height, width) of the images. The rectangle has their aspect, an area uniform in 0..1 of theirs and a
            uniform centre; what lies beyond the border is lost.
        generator: five numbers are drawn from it, whatever the case.
    """
    u = generator.random(5)
    lender = (index + 1 + min(int(u[1] * (n - 1)), max(n - 2, 0))) % n
    if u[0] >= share:
        return lender, (0, 0, 0, 0)
    ends = []
    for side, centre in zip(size, u[3:], strict=True):
        half = math.sqrt(u[2]) / 2
        ends.append([round(min(max(end, 0.0), 1.0) * side) for end in (centre - half, centre + half)])
    (top, bottom), (left, right) = ends
    return lender, (top, left, bottom, right)


def paste(under: Tensor, over: Tensor, box: Box) -> Tensor:
    """``under`` with the rectangle ``box`` taken from ``over``, both ``[..., h, w]``."""
    top, left, bottom, right = box
    pasted = under.clone()
    pasted[..., top:bottom, left:right] = over[..., top:bottom, left:right]
    return pasted


def paste_grid(under: Tensor, over: Tensor, box: Box, *, image_size: tuple[int, int]) -> Tensor:
    """:func:`paste` for features ``[D, gh, gw]``: a patch is taken whose centre lies in the rectangle of the image."""
    cells = [
        math.ceil(end * count / side - 0.5)
        for end, count, side in zip(box, under.shape[-2:] * 2, image_size * 2, strict=True)
    ]
    return paste(under, over, (cells[0], cells[1], cells[2], cells[3]))


def flips_alone(augmentation: Augmentation) -> tuple[bool, bool] | None:
    """(horizontal, vertical), if flips are all that moves the labels, whatever happens to colours; else None."""
    still = Augmentation()
    for name, kind in AUGMENTATION_KINDS.items():
        if kind == "geometric" and getattr(augmentation, name) != getattr(still, name):
            return None
    return augmentation.flip_horizontal, augmentation.flip_vertical


def augment(image: Tensor, labels: Tensor, augmentation: Augmentation) -> tuple[Tensor, Tensor]:
    """Change an image ``[3, h, w]`` in 0..1 and its labels together.

    Labels are ``[h, w]`` int64, ``[C, h, w]`` bool, or shares ``[K, h, w]`` float, which are interpolated. Beyond the
    border the image repeats its edge and the labels are background: of shares all are 0.
    """
    image, labels = _flip(image, augmentation), _flip(labels, augmentation)
    size = (image.shape[-2], image.shape[-1])
    grid = _sampling_grid(augmentation, size, image_size=size)
    if grid is not None:
        image = F.grid_sample(image[None], grid, mode="bilinear", padding_mode="border", align_corners=False)[0]
        layers = labels.reshape(1, -1, *size).to(grid.dtype)
        mode = "bilinear" if labels.is_floating_point() else "nearest"
        sampled = F.grid_sample(layers, grid, mode=mode, padding_mode="zeros", align_corners=False)
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
    grid = _sampling_grid(augmentation, grid_size, image_size=image_size or grid_size)
    if grid is None:
        return features
    grid = grid.to(features.device, features.dtype)
    return F.grid_sample(features[None], grid, mode="bilinear", padding_mode="border", align_corners=False)[0]


def _flip(tensor: Tensor, augmentation: Augmentation) -> Tensor:
    axes = [-1] * augmentation.flip_horizontal + [-2] * augmentation.flip_vertical
    return torch.flip(tensor, axes) if axes else tensor


def _sampling_grid(
    augmentation: Augmentation, out_size: tuple[int, int], *, image_size: tuple[int, int]
) -> Tensor | None:
    """Where each output pixel reads, ``[1, h, w, 2]``; None for the identity, which must stay exact and free."""
    grid = _affine_grid(augmentation, out_size, image_size=image_size)
    if augmentation.elastic == 0.0:
        return grid
    if grid is None:
        grid = F.affine_grid(torch.eye(2, 3)[None], [1, 1, *out_size], align_corners=False)
    # The same field on every grid: control points spread over the whole image, a cubic surface through them.
    drawn = rng.generator(int(augmentation.elastic_seed), "elastic", 0).standard_normal((1, 2, 4, 4), dtype=np.float32)
    field = F.interpolate(torch.from_numpy(drawn), out_size, mode="bicubic", align_corners=False)
    return grid + 2.0 * augmentation.elastic * field.permute(0, 2, 3, 1)  # -1..1 is the whole side


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
