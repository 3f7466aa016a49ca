"""Labels and probabilities as pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leafseg.data.images import write_png
from leafseg.files import atomic_path


def write_probability_png(path: Path, probability: NDArray[np.float32]) -> None:
    """A probability ``[H, W]`` as 16-bit PNG; 65535 is 1.

    Raises:
        DataError: if the system refuses to write.
    """
    write_png(path, (probability.clip(0, 1) * 65535).round().astype(np.uint16))


def write_pages(path: Path, pages: Sequence[NDArray[Any]]) -> None:
    """Pictures ``[H, W]`` or ``[H, W, 3]`` as the pages of one TIFF, compressed without loss; sizes may differ.

    Raises:
        DataError: if the system refuses to write.
    """
    import tifffile

    big = sum(page.nbytes for page in pages) > 2**31  # plain TIFF ends at 4 GB
    with atomic_path(path) as temporary, tifffile.TiffWriter(temporary, bigtiff=big) as writer:
        for page in pages:
            colours = "rgb" if page.ndim == 3 else "minisblack"
            writer.write(page, photometric=colours, compression="zlib", metadata=None, contiguous=False)


def write_tiled_tiff(
    path: Path, size: tuple[int, int], dtype: type[np.generic], read: Callable[[slice, slice], NDArray[Any]]
) -> None:
    """Write a map that need not fit into memory, piece by piece, as a tiled BigTIFF, compressed without loss.

    Args:
        path: the file.
        size: (height, width).
        dtype: of the values.
        read: (rows, columns) as slices to values ``[h, w]`` of that type; asked once for each piece.

    Raises:
        DataError: if the system refuses to write.
    """
    import tifffile

    (height, width), side = size, 256

    def pieces() -> Iterator[NDArray[Any]]:
        for top in range(0, height, side):
            for left in range(0, width, side):
                yield read(slice(top, min(top + side, height)), slice(left, min(left + side, width)))

    with atomic_path(path) as temporary, tifffile.TiffWriter(temporary, bigtiff=True) as writer:
        writer.write(
            pieces(),
            shape=size,
            dtype=dtype,
            tile=(side, side),
            photometric="minisblack",
            compression="zlib",
            metadata=None,
        )
