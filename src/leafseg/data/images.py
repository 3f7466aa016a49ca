"""Read one image, mask or volume into pixels and geometry, and write masks back.

Whatever is wrong with a file, the caller sees one ``DataError`` that names it. SimpleITK and tifffile are imported only
where a file needs them: they cost more to import than most images take to read.
"""

from __future__ import annotations

import gzip
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import (
    BmpImagePlugin,
    Image,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
)

from leafseg.errors import DataError
from leafseg.files import atomic_path

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
VOLUME_SUFFIXES = (".nii", ".nii.gz", ".mha", ".nrrd")

MAX_PIXELS = 89_478_485  # Pillow's own limit against decompression bombs: a quarter of a gigabyte as RGB
MAX_VOXELS = 2**30

# Only decoders that need no helper program: Pillow's EPS reader would start Ghostscript. Naming the classes imports
# them too, which Pillow leaves out when it is given a list.
_PILLOW_FORMATS = tuple(
    plugin.format
    for plugin in (
        PngImagePlugin.PngImageFile,
        JpegImagePlugin.JpegImageFile,
        TiffImagePlugin.TiffImageFile,
        BmpImagePlugin.BmpImageFile,
    )
)
_PILLOW_GREY = ("L", "I", "I;16", "I;16L", "I;16B", "I;16N", "F")
_OPEN_LOCK = threading.Lock()


@dataclass(frozen=True)
class Geometry:
    """The grid of a volume: enough to write another volume onto it. All tuples are in ITK's axis order, x first.

    Attributes:
        size: voxels along x, y (, z).
        spacing_mm: distance between voxel centres along x, y (, z).
        origin: physical position of the first voxel's centre, in mm.
        direction: row-major matrix of axis directions; 9 numbers, 4 for a two-dimensional file.
    """

    size: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    origin: tuple[float, ...]
    direction: tuple[float, ...]

    @property
    def affine(self) -> NDArray[np.float64]:
        """Homogeneous matrix from voxel index (x, y, z) to physical position in mm (ITK's LPS convention)."""
        n = len(self.size)
        matrix = np.eye(n + 1)
        matrix[:n, :n] = np.reshape(self.direction, (n, n)) @ np.diag(self.spacing_mm)
        matrix[:n, n] = self.origin
        return matrix


def image_suffix(path: Path) -> str | None:
    """The accepted suffix that the file name ends with, in lower case; None if it has none."""
    name = path.name.lower()
    for suffix in sorted(IMAGE_SUFFIXES + VOLUME_SUFFIXES, key=len, reverse=True):
        if name.endswith(suffix) and len(name) > len(suffix):
            return suffix
    return None


def image_stem(path: Path) -> str:
    """The file name without its suffix; ``.nii.gz`` counts as one suffix."""
    suffix = image_suffix(path)
    return path.name[: -len(suffix)] if suffix else path.stem


def read_image(path: Path, frame: int | None = None) -> NDArray[Any]:
    """The pixels of one image, one page of a TIFF, or one axial slice of a volume.

    Args:
        path: PNG, JPEG, TIFF, BMP, NIfTI, MHA or NRRD.
        frame: page, or index along the first NumPy axis of a volume; needed where the file holds more than one.

    Returns:
        ``[H, W]`` or ``[H, W, 3]`` in the file's own type (16-bit RGB PNGs come as 8 bits, Pillow's limit). EXIF
        orientation is applied, palettes are looked up, alpha is dropped.

    Raises:
        DataError: for a file that is missing, damaged, too large, of another kind, or has no such frame.
    """
    with _reading(path):
        if _is_volume(path):
            return _read_slice(path, frame)
        return _read_flat(path, frame, as_mask=False)


def read_mask(path: Path, frame: int | None = None) -> NDArray[np.int64]:
    """The raw label values of one mask, ``[H, W]``: palette indices stay indices, nothing is resampled or thresholded.

    Raises:
        DataError: as ``read_image``; also for a mask in colours, or with values that are not whole numbers.
    """
    with _reading(path):
        raw = _read_slice(path, frame) if _is_volume(path) else _read_flat(path, frame, as_mask=True)
        if raw.ndim == 3:
            if (raw != raw[..., :1]).any():
                raise DataError(
                    f"{path}: the mask is in colours; a mask holds one label id a pixel, save it as grey or palette"
                )
            raw = raw[..., 0]
        if raw.dtype.kind == "f":
            if not (np.isfinite(raw).all() and (raw == np.rint(raw)).all()):
                raise DataError(
                    f"{path}: the mask holds broken numbers; a mask holds whole label ids, save it as integers"
                )
        elif raw.dtype.kind not in "biu":
            raise DataError(f"{path}: the mask's type is {raw.dtype}; a mask holds label ids, save it as integers")
        return raw.astype(np.int64)


def count_frames(path: Path) -> int | None:
    """How many frames a volume or multi-page TIFF holds; None for a plain image.

    Raises:
        DataError: for a file that is missing or cannot be read.
    """
    with _reading(path):
        if _is_volume(path):
            size = _volume_size(path)
            return size[2] if len(size) == 3 else None
        try:
            with _open(path) as image:
                pages = _page_count(image)
        except UnidentifiedImageError:
            if not _is_tiff(path):
                raise
            pages = _tiff_page_count(path)
        return pages if pages > 1 else None


def check_image(path: Path, frame: int | None = None) -> tuple[int, int]:
    """Decode an image as cheaply as still finds damage, and return its (height, width) as ``read_image`` would give it.

    Raises:
        DataError: as ``read_image``.
    """
    with _reading(path):
        if not _is_volume(path) and frame is None and path.suffix.lower() in (".jpg", ".jpeg"):
            with _open(path) as image:
                width, height = image.size
                turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
                image.draft("L", (max(1, width // 8), max(1, height // 8)))  # reads all bytes, skips most arithmetic
                image.load()
            return (width, height) if turned else (height, width)
    height, width = read_image(path, frame).shape[:2]
    return height, width


def read_volume(path: Path) -> tuple[NDArray[Any], Geometry]:
    """All slices of a NIfTI, MHA or NRRD file.

    Returns:
        Voxels ``[Z, Y, X]``, read-only because a small cache shares them (copy before changing), and their geometry.

    Raises:
        DataError: for a file that is missing, damaged, too large, or not a single-channel volume.
    """
    with _reading(path):
        if not _is_volume(path):
            raise DataError(f"{path}: is not a volume; accepted are {', '.join(VOLUME_SUFFIXES)}, convert it")
        return _volume(path)


def write_volume(path: Path, array: NDArray[Any], geometry: Geometry) -> None:
    """Write voxels ``[Z, Y, X]`` onto the grid of ``geometry``; the suffix decides the format.

    Raises:
        DataError: if shape and geometry differ, the suffix is no volume's, or the system refuses to write.
    """
    import SimpleITK

    if not _is_volume(path):
        raise DataError(f"{path}: is not a volume's name; accepted are {', '.join(VOLUME_SUFFIXES)}")
    expected = (*((1,) if len(geometry.size) == 2 else ()), *reversed(geometry.size))
    if array.shape != expected:
        raise DataError(f"{path}: array is {_shape(array.shape)}, its grid is {_shape(expected)}; both must be equal")
    values = array.astype(np.uint8) if array.dtype == np.bool_ else array
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(values[0] if len(geometry.size) == 2 else values))
    image.SetSpacing(geometry.spacing_mm)
    image.SetOrigin(geometry.origin)
    image.SetDirection(geometry.direction)
    with atomic_path(path) as temporary:
        try:
            SimpleITK.WriteImage(image, str(temporary), useCompression=not path.name.lower().endswith(".nii"))
        except RuntimeError as error:
            raise OSError(_last_line(error)) from error


def write_png(path: Path, array: NDArray[Any]) -> None:
    """Write uint8 ``[H, W]`` or ``[H, W, 3]``, or uint16 ``[H, W]``, as PNG; no half-written file is ever left.

    Raises:
        DataError: if the system refuses to write.
        ValueError: for another type or shape.
    """
    grey = array.ndim == 2 and array.dtype in (np.uint8, np.uint16)
    rgb = array.ndim == 3 and array.shape[2] == 3 and array.dtype == np.uint8
    if not (grey or rgb) or 0 in array.shape:
        raise ValueError(f"array is {array.dtype} {_shape(array.shape)}; a PNG takes uint8 HxW or HxWx3, or uint16 HxW")
    image = Image.fromarray(np.ascontiguousarray(array))
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        image.save(stream, format="PNG")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn whatever goes wrong while reading into a DataError: decoders raise nearly anything on damaged bytes."""
    try:
        if not path.is_file():
            got = "is a folder, not a file" if path.is_dir() else "no such file"
            raise DataError(f"{path}: {got}; check the path")
        yield
    except DataError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise DataError(
            f"{path}: the image has more than {MAX_PIXELS:,} pixels; cut it into tiles or shrink it"
        ) from error
    except MemoryError as error:
        raise DataError(f"{path}: the file does not fit into memory; cut it into tiles or shrink it") from error
    except UnidentifiedImageError as error:
        raise DataError(
            f"{path}: is not an image that can be read; accepted are PNG, JPEG, TIFF, BMP, NIfTI, MHA and NRRD, "
            "convert it or remove it"
        ) from error
    except Exception as error:
        raise DataError(
            f"{path}: cannot be read ({_last_line(error)}); the file may be damaged or cut off, copy or export it again"
        ) from error


def _is_volume(path: Path) -> bool:
    return image_suffix(path) in VOLUME_SUFFIXES


def _is_tiff(path: Path) -> bool:
    return path.suffix.lower() in (".tif", ".tiff")


@contextmanager
def _open(path: Path) -> Iterator[Image.Image]:
    # Given a stream, not a name, Pillow does not map memory, which scrambles raw TIFFs with orientation 5..8.
    with path.open("rb") as stream, _opened(stream) as image:
        if image.width * image.height > MAX_PIXELS:  # an application may have raised Pillow's limit
            raise Image.DecompressionBombError
        yield image


def _opened(stream: BinaryIO) -> Image.Image:
    # Warning filters are global: the lock keeps concurrent readers from restoring each other's. It reads headers only.
    with _OPEN_LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return Image.open(stream, formats=_PILLOW_FORMATS)


def _page_count(image: Image.Image) -> int:
    # JPEGs of phones (MPO) and animated PNGs hold extra frames that are no data.
    return int(getattr(image, "n_frames", 1)) if image.format == "TIFF" else 1


def _check_frame(path: Path, frame: int | None, count: int) -> int:
    if frame is None:
        if count > 1:
            raise DataError(f"{path}: the file holds {count} frames and none was chosen; name one of 0..{count - 1}")
        return 0
    if not 0 <= frame < count:
        raise DataError(f"{path}: frame is {frame}, the file holds {count}; frames are counted from 0")
    return frame


def _read_flat(path: Path, frame: int | None, *, as_mask: bool) -> NDArray[Any]:
    try:
        return _read_with_pillow(path, frame, as_mask=as_mask)
    except UnidentifiedImageError:
        if not _is_tiff(path):
            raise
        return _read_tiff(path, frame)


def _read_with_pillow(path: Path, frame: int | None, *, as_mask: bool) -> NDArray[Any]:
    with _open(path) as image:
        index = _check_frame(path, frame, _page_count(image))
        if index:
            image.seek(index)
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
        if isinstance(image, TiffImagePlugin.TiffImageFile) and _beyond_pillow(image):
            return _read_tiff(path, frame)
        upright = ImageOps.exif_transpose(image)
        mode = upright.mode
        if mode in _PILLOW_GREY:
            pixels = np.array(upright)
            if mode == "I" and image.format == "PNG":  # older Pillow widens 16-bit PNGs
                pixels = pixels.astype(np.uint16)
            return pixels.astype(pixels.dtype.newbyteorder("="))
        if mode in ("LA", "La"):
            return np.array(upright.getchannel("L"))
        if mode == "1":
            return np.array(upright) if as_mask else np.array(upright.convert("L"))
        if as_mask and mode == "P":
            return np.array(upright)
        if as_mask and mode == "PA":
            return np.array(upright)[..., 0]
        if mode == "P" and "transparency" in upright.info:
            upright = upright.convert("RGBA")
        return np.array(upright.convert("RGB"))


def _beyond_pillow(image: TiffImagePlugin.TiffImageFile) -> bool:
    """Pillow cuts 16-bit RGB TIFFs to 8 bits and widens signed 16-bit ones."""
    bits = image.tag_v2.get(258, 1)
    widest = max(bits) if isinstance(bits, tuple) else int(bits)
    several = int(image.tag_v2.get(277, 1)) > 1
    return widest > 8 and (several or image.mode not in ("I;16", "I;16L", "I;16B", "I;16N", "F"))


def _tiff_page_count(path: Path) -> int:
    import tifffile

    try:
        with tifffile.TiffFile(path) as tiff:
            pages = len(tiff.pages)
    except tifffile.TiffFileError as error:
        raise UnidentifiedImageError from error
    if not pages:
        raise UnidentifiedImageError
    return pages


def _read_tiff(path: Path, frame: int | None) -> NDArray[Any]:
    import tifffile

    try:
        tiff_file = tifffile.TiffFile(path)
    except tifffile.TiffFileError as error:
        raise UnidentifiedImageError from error
    with tiff_file as tiff:
        page = tiff.pages[_check_frame(path, frame, len(tiff.pages))]
        if not isinstance(page, tifffile.TiffPage):  # a TiffFrame is only made on request
            raise TypeError(type(page).__name__)
        if page.imagelength * page.imagewidth > MAX_PIXELS:
            raise Image.DecompressionBombError
        pixels = page.asarray()
        planar = page.planarconfig == 2 and pixels.ndim == 3
        orientation = int(page.tags[274].value) if 274 in page.tags else 1
    if planar:
        pixels = np.moveaxis(pixels, 0, -1)
    if pixels.ndim == 3:
        channels = pixels.shape[2]
        if channels not in (1, 2, 3, 4):
            raise DataError(f"{path}: the image has {channels} channels; 1 or 3 are accepted (and alpha), split it")
        pixels = pixels[..., 0] if channels < 3 else pixels[..., :3]
    if pixels.ndim != 2 and pixels.ndim != 3:
        raise DataError(f"{path}: the image has {pixels.ndim} axes; 2 are accepted, or 3 with colours")
    return np.ascontiguousarray(_upright(pixels, orientation))


def _upright(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Apply an EXIF orientation (1..8) to an array."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def _volume_size(path: Path) -> tuple[int, ...]:
    import SimpleITK

    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)  # ITK would write to stderr beside the exception
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    size = tuple(int(side) for side in reader.GetSize())
    while len(size) > 3 and size[-1] == 1:  # NIfTI may state a time axis of one
        size = size[:-1]
    if len(size) not in (2, 3) or reader.GetNumberOfComponents() != 1:
        raise DataError(
            f"{path}: the volume has {len(reader.GetSize())} axes and {reader.GetNumberOfComponents()} channels; one "
            "channel and at most 3 axes are accepted, split it"
        )
    if int(np.prod(size, dtype=object)) > MAX_VOXELS:
        raise DataError(f"{path}: the volume is {_shape(size)}; at most {MAX_VOXELS:,} voxels are read, crop it")
    if path.name.lower().endswith(".nii"):
        # ITK fills what a cut-off NIfTI lacks with zeros and says nothing.
        voxels = int(np.prod([max(1, int(reader.GetMetaData(f"dim[{axis}]"))) for axis in range(1, 8)], dtype=object))
        expected = float(reader.GetMetaData("vox_offset")) + voxels * int(reader.GetMetaData("bitpix")) / 8
        if path.stat().st_size < expected:
            raise EOFError(f"{path.stat().st_size} of {expected:.0f} bytes")
    return size


def _volume(path: Path) -> tuple[NDArray[Any], Geometry]:
    status = path.stat()
    return _cached_volume(str(path), status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=3)  # slices of one volume are asked for in turn; more would hold gigabytes
def _cached_volume(name: str, modified_ns: int, n_bytes: int) -> tuple[NDArray[Any], Geometry]:
    import SimpleITK

    size = _volume_size(Path(name))
    if name.lower().endswith(".gz"):
        with gzip.open(name) as stream:  # raises on a cut-off or changed stream, which ITK would fill with zeros
            while stream.read(2**20):
                pass
    image = SimpleITK.ReadImage(name)
    if image.GetDimension() > 3:
        image = image[:, :, :, 0] if image.GetDimension() == 4 else SimpleITK.Extract(image, [*size, 0, 0])
    voxels = SimpleITK.GetArrayFromImage(image)
    if voxels.ndim == 2:
        voxels = voxels[None]
    voxels.flags.writeable = False
    return voxels, Geometry(image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection())


def _read_slice(path: Path, frame: int | None) -> NDArray[Any]:
    voxels, _ = _volume(path)
    chosen: NDArray[Any] = voxels[_check_frame(path, frame, len(voxels))].copy()
    return chosen


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(str(side) for side in shape)


def _last_line(error: BaseException) -> str:
    """ITK's exceptions span many lines; the last one says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
