"""Images in tiles: where tiles lie, how their results are blended, and the same for images beyond memory.

The network sees tiles at the image's own resolution. Neighbours overlap, and their probabilities are averaged with
Gaussian weights, so that a tile's border, where the network knows least, counts least.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from leafseg import rng
from leafseg.errors import DataError, MissingExtraError
from leafseg.progress import progress_bar

# Tiles [b, 3, h, w] in 0..1 and their starting noise [b, z, h/stride, w/stride] to probabilities [b, C, h, w] in 0..1,
# all on the CPU in float32.
Predict = Callable[[Tensor, Tensor], Tensor]
# The rows top..bottom of an image as the network sees them: [3, bottom - top, W] in 0..1.
Rows = Callable[[int, int], Tensor]

_SIGMA_SCALE = 0.125  # MONAI's default; deviation of the Gaussian in tile sides
_PIECE = 256  # side of a stored piece of the working files
_BYTES_A_CHANNEL = 10  # working files, a pixel and channel: sum and mean in float32, and a count in 16 bits


@dataclass(frozen=True)
class TileGrid:
    """Where the tiles of one image lie; (height, width) in pixels.

    Attributes:
        source: size of the image.
        padded: the image continued at the bottom and right (its last row and column repeated) to at least one tile and
            to whole latent cells, so that every tile starts at a latent cell and one noise canvas serves all.
        tile: size of a tile.
        step: from one tile to the next.
        stride: pixels a latent cell.
    """

    source: tuple[int, int]
    padded: tuple[int, int]
    tile: tuple[int, int]
    step: tuple[int, int]
    stride: int

    @classmethod
    def plan(cls, source: tuple[int, int], tile: tuple[int, int], *, overlap: float, stride: int) -> TileGrid:
        """The grid of an image; neighbours overlap by ``overlap`` (share of a tile, 0 <= overlap < 1) or a little more.

        ``tile`` is a multiple of ``stride``.
        """

        def whole(pixels: int) -> int:
            return -(-pixels // stride) * stride

        padded = (max(tile[0], whole(source[0])), max(tile[1], whole(source[1])))
        step = tuple(max(stride, int(side * (1 - overlap)) // stride * stride) for side in tile)
        return cls(source, padded, tile, (step[0], step[1]), stride)

    @property
    def cells(self) -> tuple[int, int]:
        """Size of the noise canvas in latent cells."""
        return self.padded[0] // self.stride, self.padded[1] // self.stride

    @property
    def tops(self) -> list[int]:
        """First rows of the tiles."""
        return self._starts(0)

    @property
    def lefts(self) -> list[int]:
        """First columns of the tiles."""
        return self._starts(1)

    def _starts(self, axis: int) -> list[int]:
        last = self.padded[axis] - self.tile[axis]
        return [*range(0, last, self.step[axis]), last]

    def pad(self, images: Tensor) -> Tensor:
        """Images ``[B, C, H, W]`` to the padded size.

        Edges are repeated, not mirrored or filled: it works for an image of any size, adds no second copy of a lesion,
        and no black border that the network would have to know.
        """
        below, right = self.padded[0] - self.source[0], self.padded[1] - self.source[1]
        return F.pad(images, (0, right, 0, below), mode="replicate") if below or right else images

    def crop_noise(self, canvas: Tensor, top: int, left: int) -> Tensor:
        """The part of a noise canvas ``[..., H/stride, W/stride]`` that belongs to the tile at (top, left)."""
        y, x = top // self.stride, left // self.stride
        return canvas[..., y : y + self.tile[0] // self.stride, x : x + self.tile[1] // self.stride]


def image_position(bands: Iterable[Tensor]) -> int:
    """The position of an image's noise in its stream: from its content, whatever bands ``[3, h, W]`` it comes in.

    Content is in 8-bit steps, so that the last bit of the intensity arithmetic cannot change the noise.
    """
    digest = hashlib.sha256()
    for band in bands:
        steps = (band * 255).round().to(torch.uint8).permute(1, 2, 0)  # row by row, so that bands can be cut anywhere
        digest.update(steps.contiguous().numpy().data)
    return rng.content_position(digest.hexdigest())


def blend_tiles(images: Tensor, noise: Tensor, predict: Predict, grid: TileGrid, *, batch_size: int) -> Tensor:
    """Probabilities of whole images from those of their tiles, through MONAI's sliding window.

    Args:
        images: ``[B, 3, H, W]`` in 0..1.
        noise: canvases ``[B, z, *grid.cells]``.
        predict: the network.
        grid: of images of this size.
        batch_size: tiles at once.

    Returns:
        ``[B, C, H, W]`` float32. One such map and one of weights ``[1, 1, H, W]`` are all that grows with the image.
    """
    from monai.inferers import sliding_window_inference

    def predict_at(tiles: Tensor, places: list[list[slice]]) -> Tensor:
        crops = [grid.crop_noise(noise[batch.start], y.start, x.start) for batch, _, y, x in places]
        return predict(tiles, torch.stack(crops))

    # MONAI takes a share and truncates tile * (1 - share) to pixels: half a pixel more than the step survives rounding.
    overlap = [max(0.0, 1 - (step + 0.5) / side) for step, side in zip(grid.step, grid.tile, strict=True)]
    blended = sliding_window_inference(
        grid.pad(images),
        grid.tile,
        batch_size,
        predict_at,
        overlap=overlap,
        mode="gaussian",
        sigma_scale=_SIGMA_SCALE,
        with_coord=True,
    )
    result: Tensor = blended[..., : grid.source[0], : grid.source[1]]
    return result


@contextmanager
def blended_on_disk(
    rows: Rows,
    noise: Tensor,
    predict: Predict,
    grid: TileGrid,
    *,
    channels: int,
    batch_size: int,
    folder: Path,
) -> Iterator[Callable[[slice, slice], Tensor]]:
    """As :func:`blend_tiles` for one image that need not fit into memory: MONAI's Zarr merger keeps the sums on disk.

    Args:
        rows: reads the image; asked for bands of one tile's height.
        noise: canvas ``[z, *grid.cells]``, which may be mapped from a file.
        predict, grid, batch_size: as in :func:`blend_tiles`.
        channels: C of the probabilities.
        folder: an existing folder for the working files, about ``10 * (C + 1)`` bytes a pixel.

    Yields:
        A reader: (rows, columns) as slices to probabilities ``[C, h, w]`` float32.

    Raises:
        MissingExtraError: if zarr is not installed.
    """
    try:
        from zarr.storage import LocalStore
    except ImportError as error:
        raise MissingExtraError(
            'images beyond memory need zarr; install it with pip install "leafseg[large]"'
        ) from error
    from monai.data.utils import compute_importance_map
    from monai.inferers import PatchInferer, ZarrAvgMerger

    weights = compute_importance_map(grid.tile, mode="gaussian", sigma_scale=_SIGMA_SCALE)  # [h, w]

    # The merger averages with equal weights. Averaging p * w and w beside each other, with the same counts, leaves the
    # Gaussian blend as their quotient.
    def predict_at(tiles: Tensor) -> Tensor:
        places = tiles[:, 3:, 0, 0].long().tolist()
        crops = [grid.crop_noise(noise, top, left) for top, left in places]
        probability = predict(tiles[:, :3], torch.stack(crops))  # [b, C, h, w]
        return torch.cat([probability * weights, weights.expand(len(tiles), 1, -1, -1)], 1)  # [b, C + 1, h, w]

    def tiles() -> Iterator[tuple[Tensor, tuple[int, int]]]:
        """Tiles ``[1, 5, h, w]`` (the last two channels say where they lie) and their places, band by band."""
        height, width = grid.tile
        with progress_bar("tiles", total=len(grid.tops) * len(grid.lefts)) as bar:
            for top in grid.tops:
                band = rows(top, min(top + height, grid.source[0]))[None]
                below, right = height - band.shape[2], grid.padded[1] - grid.source[1]
                band = F.pad(band, (0, right, 0, below), mode="replicate") if below or right else band
                for left in grid.lefts:
                    place = torch.tensor([top, left]).float()[None, :, None, None].expand(1, 2, height, width)
                    yield torch.cat([band[..., left : left + width], place], 1), (top, left)
                    bar.advance()

    # The merger's own temporary folders are not used: of the two that it makes, the first is never removed.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".tmp-tiles-") as working:
        inferer = PatchInferer(
            merger_cls=ZarrAvgMerger,
            batch_size=batch_size,
            merged_shape=(1, channels + 1, *grid.padded),
            cropped_shape=(1, channels + 1, *grid.source),
            chunks=(1, channels + 1, _PIECE, _PIECE),
            count_dtype="uint16",  # the default, 8 bits, comes round to 0 where 256 tiles overlap
            store=LocalStore(f"{working}/mean"),
            value_store=LocalStore(f"{working}/sum"),
            count_store=LocalStore(f"{working}/count"),
        )
        mean = inferer(tiles(), predict_at)

        def read(y: slice, x: slice) -> Tensor:
            piece = torch.from_numpy(np.asarray(mean[0, :, y, x]))
            return piece[:-1] / piece[-1:]

        yield read


def working_bytes(grid: TileGrid, *, channels: int, noise_channels: int) -> int:
    """Disk space that :func:`blended_on_disk` and its noise canvas take at most."""
    pixels = math.prod(grid.padded)
    return pixels * _BYTES_A_CHANNEL * (channels + 1) + math.prod(grid.cells) * noise_channels * 4


def check_free_space(folder: Path, needed: int, *, path: Path) -> None:
    """Before hours of work: does the folder's disk hold the working files?

    Raises:
        DataError: if not.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DataError(
            f"{path}: segmenting it in tiles needs {needed / 1e9:.1f} GB of working space in {folder}, which has "
            f"{free / 1e9:.1f} GB; free some or choose another --out"
        )
