"""Images beyond memory: regions of one page of a TIFF or OME-TIFF, decoded when they are asked for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leafseg.data.images import MAX_PIXELS
from leafseg.errors import DataError, MissingExtraError

# Above it, an image is read, segmented and written piece by piece. In memory, a pixel takes about 85 bytes on the way
# from file to label map: 1.7 GB here.
LARGE_PIXELS = 20_000_000

_MAX_PIECE = 2**26  # samples of one stored tile or strip, which is decoded whole
_TAKEN = {1: "grey", 2: "RGB", 6: "YCbCr"}  # photometric interpretations that tifffile decodes to grey or RGB
_JPEG = (6, 7, 34892, 33007)  # in these compressions tifffile turns YCbCr to RGB; in others the numbers stay YCbCr
_SAMPLE_PIXELS = 4_000_000
_SAMPLE_ROWS = 512


class LargeImage:
    """One page of an open TIFF; see :func:`open_large`.

    Attributes:
        size: (height, width) in pixels.
    """

    def __init__(self, path: Path, stored: Any, *, size: tuple[int, int], channels_first: bool) -> None:
        self.path, self.size = path, size
        self._stored, self._channels_first = stored, channels_first

    def region(self, top: int, left: int, height: int, width: int) -> NDArray[Any]:
        """Pixels ``[height, width]`` or ``[height, width, 3]`` in the file's own type; alpha is dropped.

        Every stored tile or strip that the region touches is decoded, nothing else.

        Raises:
            DataError: if the file is damaged there, or needs a decoder that is not installed.
        """
        rows, columns = slice(top, top + height), slice(left, left + width)
        try:
            if self._stored.ndim == 2:
                return np.asarray(self._stored[rows, columns])
            if self._channels_first:
                pixels = np.moveaxis(np.asarray(self._stored[:, rows, columns]), 0, -1)
            else:
                pixels = np.asarray(self._stored[rows, columns])
        except Exception as error:  # decoders raise nearly anything on damaged bytes
            raise _unreadable(self.path, error) from error
        return pixels[..., 0] if pixels.shape[2] < 3 else pixels[..., :3]

    def sample(self) -> NDArray[Any]:
        """Every n-th pixel of every n-th row, about four million at most; for percentiles and the like.

        Raises:
            DataError: as ``region``.
        """
        height, width = self.size
        step = max(1, math.ceil(math.sqrt(height * width / _SAMPLE_PIXELS)))
        rows = max(1, _SAMPLE_ROWS // step) * step  # whole steps, so that the grid goes on in the next band
        bands = (self.region(top, 0, min(rows, height - top), width) for top in range(0, height, rows))
        return np.concatenate([band[::step, ::step] for band in bands])


def tiff_size(path: Path) -> tuple[int, int] | None:
    """(height, width) of a TIFF's first page as its header states them; None for any other file."""
    if path.suffix.lower() not in (".tif", ".tiff") or not path.is_file():
        return None
    import tifffile

    try:
        with tifffile.TiffFile(path) as tiff:
            page: Any = tiff.pages[0]
            return int(page.imagelength), int(page.imagewidth)
    except Exception:  # whoever reads the file will say what is wrong with it
        return None


def tiff_pages(path: Path) -> int | None:
    """How many pages a TIFF holds at full resolution; None for one.

    Raises:
        DataError: if it cannot be read.
    """
    import tifffile

    try:
        with tifffile.TiffFile(path) as tiff:
            count = len(_full_pages(tiff))
    except Exception as error:
        raise _unreadable(path, error) from error
    return count if count > 1 else None


def wants_pieces(path: Path) -> bool:
    """Whether an image is to be read piece by piece: a TIFF of more than ``LARGE_PIXELS`` pixels.

    If it cannot be, and is small enough for a whole read, that may know its compression.
    """
    height, width = tiff_size(path) or (0, 0)
    if height * width <= LARGE_PIXELS:
        return False
    if height * width > MAX_PIXELS:
        return True
    try:
        with open_large(path, 0) as image:
            image.region(0, 0, 1, 1)
    except (DataError, MissingExtraError):
        return False
    return True


@contextmanager
def open_large(path: Path, frame: int | None = None) -> Iterator[LargeImage]:
    """Open one page of a TIFF or OME-TIFF (its full resolution, where it holds a pyramid) without reading pixels.

    Args:
        path: the file.
        frame: page of the file, the smaller copies of a pyramid not counted; needed where it holds more than one.

    Raises:
        DataError: for a file that is missing, damaged, no TIFF, stored in pieces too large to decode one by one, or in
            colours or an orientation that only whole reads resolve.
        MissingExtraError: if zarr is not installed.
    """
    try:
        import zarr
    except ImportError as error:
        raise MissingExtraError(
            f'{path}: images beyond memory need zarr; install it with pip install "leafseg[large]"'
        ) from error
    import tifffile

    try:
        tiff = tifffile.TiffFile(path)
    except Exception as error:
        raise _unreadable(path, error) from error
    with tiff:
        try:
            pages = _full_pages(tiff)
            count = len(pages)
            if frame is None and count > 1:
                raise DataError(
                    f"{path}: the file holds {count} frames and none was chosen; name one of 0..{count - 1}"
                )
            page: Any = pages[frame or 0]
            _check_page(path, page)
            store = page.aszarr()
            stored = zarr.open(store, mode="r")
        except DataError:
            raise
        except Exception as error:
            raise _unreadable(path, error) from error
        try:
            size = (int(page.imagelength), int(page.imagewidth))
            yield LargeImage(path, stored, size=size, channels_first=page.axes == "SYX")
        finally:
            store.close()


def _full_pages(tiff: Any) -> list[Any]:
    """The pages but those marked as smaller copies: many writers keep a pyramid so, instead of in SubIFDs."""
    return [page for page in tiff.pages if not page.is_reduced]


def _check_page(path: Path, page: Any) -> None:
    if page.axes not in ("YX", "YXS", "SYX") or page.samplesperpixel > 4:
        raise DataError(
            f"{path}: the page has axes {page.axes} and {page.samplesperpixel} channels; 1 or 3 channels are accepted "
            "(and alpha), split it"
        )
    if page.dtype is None or page.dtype.kind not in "uif" or int(page.photometric) not in _TAKEN:
        raise DataError(
            f"{path}: pixels are {page.dtype} in photometric interpretation {int(page.photometric)}; images beyond "
            "memory are read as grey or RGB numbers, save it as such"
        )
    if int(page.photometric) == 6 and int(page.compression) not in _JPEG:
        raise DataError(
            f"{path}: holds YCbCr colours that are not JPEG; images beyond memory are read as grey or RGB, save it as "
            "such"
        )
    if 274 in page.tags and int(page.tags[274].value) != 1:
        raise DataError(
            f"{path}: is stored turned (orientation {page.tags[274].value}); images beyond memory are read upright, "
            "save it upright"
        )
    piece = math.prod(page.chunks)
    if piece > _MAX_PIECE:
        raise DataError(
            f"{path}: is stored in pieces of {piece:,} values; at most {_MAX_PIECE:,} are decoded at once, save it as "
            "a tiled TIFF"
        )


def _unreadable(path: Path, error: Exception) -> DataError:
    if not path.is_file():
        return DataError(f"{path}: no such file; check the path")
    reason = (str(error) or type(error).__name__).splitlines()[0]
    if "imagecodecs" in reason:
        return DataError(
            f"{path}: its compression needs the package imagecodecs; install it, or save the file with deflate or no "
            "compression"
        )
    return DataError(f"{path}: cannot be read ({reason}); the file may be damaged or cut off, copy or export it again")
