"""Read one image, mask or volume into pixels and geometry, and write masks back; ``dicom.py`` does so for DICOM.

Whatever is wrong with a file, the caller sees one ``DataError`` that names it. SimpleITK and tifffile are imported only
where a file needs them: they cost more to import than most images take to read.
"""

from __future__ import annotations

import gzip
import os
import shutil
import struct
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

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

from leafseg.data import dicom
from leafseg.data.dicom import DICOM_SUFFIXES
from leafseg.data.geometry import (
    LPS,
    MAX_PIXELS,
    MAX_VOXELS,
    STORED,
    Geometry,
    Grid,
    Reading,
    Slicing,
    Volume,
    check_geometry,
    slicing,
)
from leafseg.errors import DataError, LeafsegError, last_line
from leafseg.files import atomic_path

if TYPE_CHECKING:
    import tifffile

__all__ = [
    "DICOM_SUFFIXES",
    "IMAGE_SUFFIXES",
    "LPS",
    "MAX_PIXELS",
    "STORED",
    "VOLUME_SUFFIXES",
    "Geometry",
    "OrientedVolume",
    "Reading",
    "check_image",
    "count_frames",
    "file_state",
    "image_stem",
    "image_suffix",
    "is_volume",
    "pixel_spacing",
    "read_image",
    "read_mask",
    "read_oriented",
    "read_volume",
    "write_png",
    "write_volume",
]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
VOLUME_SUFFIXES = (".nii", ".nii.gz", ".mha", ".nrrd")

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
_NRRD_LOCK = threading.Lock()
_MAX_PAGES = 65_536  # of a TIFF
_MAX_HEADER_LINES, _MAX_HEADER_BYTES = 5_000, 2**16  # of a NRRD, and of one of its lines
_MAX_SCANS = 64  # of a progressive JPEG; encoders write about ten


_MAX_DEFLATION = 1040  # zlib's own limit, by which a file may be shorter than its voxels
# A few volumes: the slices of one are asked for in turn, of an image and its mask alternately, by several threads.
_MAX_CACHED_BYTES = 2**31


def image_suffix(path: Path) -> str | None:
    """The accepted suffix that the file name ends with, in lower case; None if it has none.

    A DICOM file without a known suffix, and a folder of DICOM slices, count as ``.dcm``.
    """
    name = path.name.lower()
    for suffix in sorted(IMAGE_SUFFIXES + VOLUME_SUFFIXES + DICOM_SUFFIXES, key=len, reverse=True):
        if name.endswith(suffix) and len(name) > len(suffix) and not path.is_dir():
            return suffix
    if dicom.is_dicom(path) or (path.is_dir() and dicom.holds_slices(path)):
        return DICOM_SUFFIXES[0]
    return None


def image_stem(path: Path) -> str:
    """The file name without its suffix; ``.nii.gz`` counts as one suffix; a folder of DICOM slices has none."""
    suffix = image_suffix(path)
    if suffix is None:
        return path.stem
    return path.name[: -len(suffix)] if path.name.lower().endswith(suffix) and not path.is_dir() else path.name


def is_volume(path: Path) -> bool:
    """Whether a file holds a volume: by its suffix, a folder of DICOM slices, or a DICOM file of several frames.

    False for DICOM that cannot be read: reading it says why.
    """
    suffix = image_suffix(path)
    return suffix in VOLUME_SUFFIXES or (suffix in DICOM_SUFFIXES and dicom.is_volume(path))


def read_image(path: Path, frame: int | None = None, *, reading: Reading = LPS) -> NDArray[Any]:
    """The pixels of one image, one page of a TIFF, or one slice of a volume.

    Args:
        path: PNG, JPEG, TIFF, BMP, NIfTI, MHA, NRRD, DICOM, or a folder of DICOM slices.
        frame: page, or slice of the volume as ``reading`` turns it; needed where there is more than one.
        reading: how volumes are turned and cut; files without slices are unaffected.

    Returns:
        ``[H, W]`` or ``[H, W, 3]`` in the file's own type (16-bit RGB PNGs come as 8 bits, Pillow's limit). EXIF
        orientation is applied, palettes are looked up, alpha is dropped, DICOM values are rescaled to their units and
        MONOCHROME1 is turned to bright on dark. Neighbouring slices are three channels; beyond the first and the last
        slice, that one is repeated.

    Raises:
        DataError: for a file that is missing, damaged, too large, of another kind, or has no such frame.
    """
    with _reading(path):
        if not _is_sliced(path):
            return _read_flat(path, frame, as_mask=False)
        return _read_slice(path, frame, reading)


def read_mask(path: Path, frame: int | None = None, *, reading: Reading = LPS) -> NDArray[np.int64]:
    """The raw label values of one mask, ``[H, W]``: palette indices stay indices, nothing is resampled or thresholded.

    Volumes are turned and cut as ``reading`` says; a mask has no neighbouring slices and no window.

    Raises:
        DataError: as ``read_image``; also for a mask in colours, or with values that are not whole numbers.
    """
    with _reading(path):
        sliced = _is_sliced(path)
        raw = _read_slice(path, frame, reading, as_mask=True) if sliced else _read_flat(path, frame, as_mask=True)
        if raw.ndim == 3:
            if (raw != raw[..., :1]).any():
                raise DataError(
                    f"{path}: the mask is in colours; a mask holds one label id a pixel, save it as grey or palette"
                )
            raw = raw[..., 0]
        if raw.dtype.kind == "f":
            if not (np.isfinite(raw).all() and (raw == np.rint(raw)).all() and (np.abs(raw) < 2**53).all()):
                raise DataError(
                    f"{path}: the mask holds broken numbers; a mask holds whole label ids, save it as integers"
                )
        elif raw.dtype.kind not in "biu":
            raise DataError(f"{path}: the mask's type is {raw.dtype}; a mask holds label ids, save it as integers")
        return raw.astype(np.int64)


def count_frames(path: Path, *, reading: Reading = LPS) -> int | None:
    """How many slices a volume has as ``reading`` cuts it, or how many pages a TIFF; None for a plain image.

    Raises:
        DataError: for a file that is missing or cannot be read.
    """
    with _reading(path):
        if _is_sliced(path):
            grid = _grid(path)
            if len(grid.geometry.size) == 2 or not is_volume(path):
                return None
            return grid.geometry.size[2 - _cut(path, grid, reading).axes[0]]
        try:
            with _open(path) as image:
                pages = _page_count(image)
        except UnidentifiedImageError:
            if not _is_tiff(path):
                raise
            pages = _tiff_page_count(path)
        return pages if pages > 1 else None


def check_image(path: Path, frame: int | None = None, *, reading: Reading = LPS) -> tuple[int, int]:
    """Decode an image as cheaply as still finds damage, and return its (height, width) as ``read_image`` would give it.

    Raises:
        DataError: as ``read_image``.
    """
    with _reading(path):
        if frame is None and path.suffix.lower() in (".jpg", ".jpeg"):
            with _open(path) as image:
                width, height = image.size
                turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
                image.draft("L", (max(1, width // 8), max(1, height // 8)))  # reads all bytes, skips most arithmetic
                image.load()
            return (width, height) if turned else (height, width)
    height, width = read_image(path, frame, reading=reading).shape[:2]
    return height, width


def pixel_spacing(path: Path, *, reading: Reading = LPS) -> tuple[float, float] | None:
    """(row, column) distance in mm of the pixels that ``read_image`` gives; no pixel is decoded.

    Returns:
        None where a file states none: PNG, JPEG, BMP and plain TIFF (their resolution is the printer's), DICOM without
        calibration.

    Raises:
        DataError: as ``read_image``.
    """
    with _reading(path):
        if not _is_sliced(path):
            return _ome_spacing(path) if _is_tiff(path) else None
        grid = _grid(path)
        if not grid.spacing_known:
            return None
        cut = _cut(path, grid, reading)
        if not grid.depth_known and cut.axes[0] != 0:  # seen edge-on
            return None
        sides = grid.geometry.spacing_mm[::-1]
        return (sides[0], sides[1]) if len(sides) == 2 else (sides[cut.axes[1]], sides[cut.axes[2]])


@dataclass(frozen=True)
class OrientedVolume:
    """A volume as a reading turns and cuts it, and the way back to the file's own grid: exchanges of axes and flips.

    Attributes:
        voxels: ``[slices, H, W]``, or ``[slices, H, W, 3]`` in colours; a read-only view of the cached voxels.
        geometry: of the file as stored.
        spacing_known: False where the file states no spacing; ``spacing_mm`` is then None.
        in_space: False where the frames follow each other in time (a video clip): there is no third spacing.
        depth_known: False for a single slice that states no thickness: its third spacing is made up.
    """

    voxels: NDArray[Any]
    geometry: Geometry
    spacing_known: bool
    _cut: Slicing
    in_space: bool = True
    depth_known: bool = True

    @property
    def slices(self) -> int:
        return len(self.voxels)

    @property
    def spacing_mm(self) -> tuple[float, float] | None:
        """(row, column) distance of a slice's pixels in mm."""
        if not self.spacing_known or (not self.depth_known and self._cut.axes[0] != 0):
            return None
        sides = (*((1.0,) if len(self.geometry.size) == 2 else ()), *self.geometry.spacing_mm[::-1])
        return sides[self._cut.axes[1]], sides[self._cut.axes[2]]

    @property
    def affine(self) -> NDArray[np.float64]:
        """Homogeneous matrix from (column, row, slice) to physical position in mm (LPS); of a 2-D file, (x, y)."""
        return self.geometry.affine if len(self.geometry.size) == 2 else self._cut.affine(self.geometry)

    def labels_to_stored(self, labels: NDArray[Any]) -> NDArray[Any]:
        """Anything ``[slices, H, W]`` on these slices as ``[Z, Y, X]`` on the file's own grid.

        Raises:
            ValueError: for another shape.
        """
        if labels.shape[:3] != self.voxels.shape[:3]:
            raise ValueError(f"labels are {_shape(labels.shape)}; the slices are {_shape(self.voxels.shape[:3])}")
        return np.ascontiguousarray(self._cut.undo(labels))


def read_oriented(path: Path, reading: Reading = LPS) -> OrientedVolume:
    """A volume, turned and cut as ``reading`` says; its neighbouring slices are not its channels yet.

    Raises:
        DataError: as ``read_volume``.
    """
    with _reading(path):
        return _oriented(path, reading)


def read_volume(path: Path) -> tuple[NDArray[Any], Geometry]:
    """All slices of a NIfTI, MHA, NRRD or DICOM file, or of a folder that holds one DICOM series, as stored.

    Returns:
        Voxels ``[Z, Y, X]`` (DICOM: along the slices' normal, in the units of the rescale tags; ``[Z, Y, X, 3]`` for a
        clip in colours), read-only because a small cache shares them (copy before changing), and their geometry.

    Raises:
        DataError: for a file that is missing, damaged, too large, or not a single-channel volume.
    """
    with _reading(path):
        if not _is_sliced(path):
            kinds = ", ".join(VOLUME_SUFFIXES)
            raise DataError(f"{path}: is not a volume; accepted are {kinds} and DICOM, convert it")
        volume = _volume(path)
        return volume.voxels, volume.grid.geometry


def write_volume(path: Path, array: NDArray[Any], geometry: Geometry, *, like: Path | None = None) -> None:
    """Write voxels ``[Z, Y, X]`` onto the grid of ``geometry``; the suffix decides the format.

    Args:
        path: the new file.
        array: the voxels.
        geometry: their grid.
        like: a NIfTI file with that grid. A NIfTI file states its place in up to two forms, of which ITK reads one and
            writes it as both; a NIfTI ``path`` gets both as ``like`` has them, other formats can hold only the one.

    Raises:
        DataError: if shape and geometry differ, the suffix is no volume's, or the system refuses to write.
    """
    import SimpleITK

    if image_suffix(path) not in VOLUME_SUFFIXES:
        raise DataError(f"{path}: is not a volume's name; accepted are {', '.join(VOLUME_SUFFIXES)}")
    expected = (*((1,) if len(geometry.size) == 2 else ()), *reversed(geometry.size))
    if array.shape != expected:
        raise DataError(f"{path}: array is {_shape(array.shape)}, its grid is {_shape(expected)}; both must be equal")
    values = array.astype(np.uint8) if array.dtype == np.bool_ else array
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(values[0] if len(geometry.size) == 2 else values))
    image.SetSpacing(geometry.spacing_mm)
    image.SetOrigin(geometry.origin)
    image.SetDirection(geometry.direction)
    own_place = None if like is None else _nifti_place(like)
    with atomic_path(path) as temporary:
        try:
            if own_place is None or image_suffix(path) not in (".nii", ".nii.gz"):
                SimpleITK.WriteImage(image, str(temporary), useCompression=not path.name.lower().endswith(".nii"))
            elif image_suffix(path) == ".nii":
                SimpleITK.WriteImage(image, str(temporary))
                _set_nifti_place(temporary, own_place)
            else:
                plain = temporary.with_name(temporary.name[: -len(".gz")])
                try:
                    SimpleITK.WriteImage(image, str(plain))
                    _set_nifti_place(plain, own_place)
                    with plain.open("rb") as source, gzip.open(temporary, "wb", compresslevel=6) as target:
                        shutil.copyfileobj(source, target, 2**20)
                finally:
                    plain.unlink(missing_ok=True)
        except RuntimeError as error:
            raise OSError(last_line(error)) from error


# Where a NIfTI header says where its voxels lie (offset, types as in ``struct``): pixdim[0..3], xyzt_units, qform_code
# and sform_code, then quatern_b to srow_z, which follow each other. Source: nifti1.h and nifti2.h of the standard.
_NIFTI_PLACE = {
    348: ((76, "4f"), (123, "B"), (252, "2h"), (256, "18f")),
    540: ((104, "4d"), (500, "i"), (344, "2i"), (352, "18d")),
}


def _nifti_place(path: Path) -> list[tuple[Any, ...]] | None:
    """What a NIfTI file states of its place, as in ``_NIFTI_PLACE``; None for its forerunner, ANALYZE 7.5."""
    with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as stream:
        header = stream.read(540)
    order = "<" if header[:4] in (n.to_bytes(4, "little") for n in _NIFTI_PLACE) else ">"
    size = int(struct.unpack_from(f"{order}i", header)[0])
    magic = header[344:347] if size == 348 else header[4:7]
    if size not in _NIFTI_PLACE or magic not in (b"n+1", b"n+2"):
        return None
    return [struct.unpack_from(f"{order}{types}", header, offset) for offset, types in _NIFTI_PLACE[size]]


def _set_nifti_place(path: Path, place: list[tuple[Any, ...]]) -> None:
    """Change the header of an uncompressed NIfTI-1 file, which ITK writes in this machine's byte order."""
    with path.open("r+b") as stream:
        for (offset, types), values in zip(_NIFTI_PLACE[348], place, strict=True):
            stream.seek(offset)
            stream.write(struct.pack(f"={types}", *values))


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
        if path.is_dir():
            if not dicom.holds_slices(path):
                raise DataError(f"{path}: is a folder, and not one of DICOM slices; give a file")
        elif not path.is_file():
            raise DataError(f"{path}: no such file; check the path")
        yield
    except LeafsegError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise DataError(
            f"{path}: the image has more than {MAX_PIXELS:,} pixels; cut it into tiles or shrink it"
        ) from error
    except MemoryError as error:
        raise DataError(f"{path}: the file does not fit into memory; cut it into tiles or shrink it") from error
    except UnidentifiedImageError as error:
        raise DataError(
            f"{path}: is not an image that can be read; accepted are PNG, JPEG, TIFF, BMP, NIfTI, MHA, NRRD and "
            "DICOM, convert it or remove it"
        ) from error
    except Exception as error:
        raise DataError(
            f"{path}: cannot be read ({last_line(error)}); the file may be damaged or cut off, copy or export it again"
        ) from error


def _is_sliced(path: Path) -> bool:
    """Whether a file is read as voxels with a grid, though a DICOM file may hold a single image."""
    suffix = image_suffix(path)
    return suffix in VOLUME_SUFFIXES or suffix in DICOM_SUFFIXES


def _is_tiff(path: Path) -> bool:
    return path.suffix.lower() in (".tif", ".tiff")


@contextmanager
def _open(path: Path) -> Iterator[Image.Image]:
    # Given a stream, not a name, Pillow does not map memory, which scrambles raw TIFFs with orientation 5..8.
    with path.open("rb") as stream, _opened(stream) as image:
        if image.width * image.height > MAX_PIXELS:  # an application may have raised Pillow's limit
            raise Image.DecompressionBombError
        if image.format in ("JPEG", "MPO") and image.info.get("progressive"):
            # Each scan of a few bytes costs a pass over the whole image, and a file may state thousands.
            scans = path.read_bytes().count(b"\xff\xda")
            if scans > _MAX_SCANS:
                raise DataError(f"{path}: the JPEG has {scans} scans, at most {_MAX_SCANS} are read; save it again")
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
            pages = _page_total(path, tiff)
    except tifffile.TiffFileError as error:
        raise UnidentifiedImageError from error
    if not pages:
        raise UnidentifiedImageError
    return pages


def _page_total(path: Path, tiff: tifffile.TiffFile) -> int:
    """How many pages tifffile finds, which would follow a chain of pages that runs in a circle for ever."""
    try:
        tiff.pages[_MAX_PAGES]
    except IndexError:
        return len(tiff.pages)
    raise DataError(f"{path}: has more than {_MAX_PAGES:,} pages, or their chain runs in a circle; export it again")


def _read_tiff(path: Path, frame: int | None) -> NDArray[Any]:
    import tifffile

    try:
        tiff_file = tifffile.TiffFile(path)
    except tifffile.TiffFileError as error:
        raise UnidentifiedImageError from error
    with tiff_file as tiff:
        page = tiff.pages[_check_frame(path, frame, _page_total(path, tiff))]
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


class _Cache:
    """The values read last, up to a number of bytes together; the newest is kept however large it is.

    Threads that want the same value wait for one of them to read it.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._slots: dict[Hashable, _Slot] = {}  # oldest first

    def get(self, key: Hashable, read: Callable[[], Volume]) -> Volume:
        with self._lock:
            slot = self._slots.pop(key, None) or _Slot()
            self._slots[key] = slot
        with slot.lock:
            if slot.volume is None:
                slot.volume = read()
        with self._lock:
            held = sum(slot.n_bytes for slot in self._slots.values())
            for old in list(self._slots)[:-1]:
                if held <= self._max_bytes:
                    break
                held -= self._slots.pop(old).n_bytes
        return slot.volume


@dataclass
class _Slot:
    lock: threading.Lock = field(default_factory=threading.Lock)
    volume: Volume | None = None

    @property
    def n_bytes(self) -> int:
        return 0 if self.volume is None else self.volume.voxels.nbytes


_volumes = _Cache(_MAX_CACHED_BYTES)


def file_state(path: Path) -> Hashable:
    """Changes when a file, or a file of a folder, is written: a key for what was read from it."""
    if not path.is_dir():
        status = path.stat()
        return str(path), status.st_mtime_ns, status.st_size
    with os.scandir(path) as entries:
        found = [(entry.name, (status := entry.stat()).st_mtime_ns, status.st_size) for entry in entries]
    return str(path), *sorted(found)


def _volume(path: Path, *, window: bool = False, as_mask: bool = False) -> Volume:
    if image_suffix(path) in VOLUME_SUFFIXES:
        return _volumes.get(file_state(path), lambda: _read_with_itk(path))
    return _volumes.get(
        (file_state(path), window, as_mask), lambda: dicom.read_volume(path, window=window, as_mask=as_mask)
    )


def _grid(path: Path) -> Grid:
    return Grid(_itk_geometry(path)[0]) if image_suffix(path) in VOLUME_SUFFIXES else dicom.read_grid(path)


def _itk_geometry(path: Path) -> tuple[Geometry, int]:
    """The grid that a header states, checked, and how many bytes its voxels take."""
    import SimpleITK

    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)  # ITK would write to stderr beside the exception
    _check_text_header(path)
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(path))
    with _turn(path):
        reader.ReadImageInformation()
    axes = len(reader.GetSize())
    size = tuple(int(side) for side in reader.GetSize())
    while len(size) > 3 and size[-1] == 1:  # NIfTI may state a time axis of one
        size = size[:-1]
    if len(size) not in (2, 3) or reader.GetNumberOfComponents() != 1:
        raise DataError(
            f"{path}: the volume has {axes} axes and {reader.GetNumberOfComponents()} channels; one channel and at "
            "most 3 axes are accepted, split it"
        )
    if 0 in size:
        raise DataError(f"{path}: the volume is {_shape(size)} and holds no voxels; export it again")
    if int(np.prod(size, dtype=object)) > MAX_VOXELS:
        raise DataError(f"{path}: the volume is {_shape(size)}; at most {MAX_VOXELS:,} voxels are read, crop it")
    n = len(size)
    direction = np.reshape(reader.GetDirection(), (axes, axes))[:n, :n]
    geometry = Geometry(size, reader.GetSpacing()[:n], reader.GetOrigin()[:n], tuple(direction.ravel().tolist()))
    check_geometry(path, geometry)
    if image_suffix(path) in (".nii", ".nii.gz"):
        _check_nifti(path, reader, n)
    n_bytes = int(np.prod(size, dtype=object)) * _itk_voxel_bytes(reader)
    held = path.stat().st_size * _MAX_DEFLATION
    if n_bytes > held:
        raise EOFError(f"{n_bytes:,} bytes of voxels, and the file can hold {held:,} at most")
    if path.name.lower().endswith(".nii"):
        # ITK fills what a cut-off NIfTI lacks with zeros and says nothing.
        voxels = int(np.prod([max(1, int(reader.GetMetaData(f"dim[{axis}]"))) for axis in range(1, 8)], dtype=object))
        expected = float(reader.GetMetaData("vox_offset")) + voxels * int(reader.GetMetaData("bitpix")) / 8
        if path.stat().st_size < expected:
            raise EOFError(f"{path.stat().st_size} of {expected:.0f} bytes")
    return geometry, n_bytes


def _check_nifti(path: Path, reader: Any, axes: int) -> None:
    """Refuse a grid that ITK would mend without a word: it reads a spacing of 0, NaN or infinity as 1 mm."""
    with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as stream:
        header = stream.read(76 + 4 * 8)
    order = "<" if header[:4] == (348).to_bytes(4, "little") else ">"
    if header[:4] in ((348).to_bytes(4, "little"), (348).to_bytes(4, "big")):  # NIfTI-1; NIfTI-2 is too rare to matter
        spacing = np.frombuffer(header, f"{order}f4", axes, offset=80)
        if not (np.isfinite(spacing).all() and (spacing != 0).all()):
            sides = " x ".join(f"{side:g}" for side in spacing)
            raise DataError(f"{path}: spacing is {sides} mm and must be positive; the header is damaged, mend it")
    rows = " ".join(reader.GetMetaData(f"srow_{axis}") for axis in "xyz" if reader.HasMetaDataKey(f"srow_{axis}"))
    if "nan" in rows or "inf" in rows:
        raise DataError(
            f"{path}: the matrix of its place in space (sform) is no number; the header is damaged, mend it"
        )


def _turn(path: Path) -> AbstractContextManager[Any]:
    """ITK's NRRD library collects its errors in one place: two threads with damaged files crash the process."""
    return _NRRD_LOCK if path.name.lower().endswith(".nrrd") else nullcontext()


def _check_text_header(path: Path) -> None:
    """ITK takes time with the square of a NRRD header's lines: a hundred thousand take minutes."""
    if not path.name.lower().endswith(".nrrd"):
        return
    lines = 0
    with path.open("rb") as stream:
        if stream.readline(16)[:4] != b"NRRD":
            return  # ITK says what is wrong with it
        while lines <= _MAX_HEADER_LINES and stream.readline(_MAX_HEADER_BYTES).strip(b"\r\n"):
            lines += 1
    if lines > _MAX_HEADER_LINES:
        raise DataError(f"{path}: its header has more than {_MAX_HEADER_LINES:,} lines; export it again")


def _itk_voxel_bytes(reader: Any) -> int:
    import SimpleITK

    name = SimpleITK.GetPixelIDValueAsString(reader.GetPixelID())
    return next((int(bits) // 8 for bits in ("64", "32", "16", "8") if bits in name), 8)


def _read_with_itk(path: Path) -> Volume:
    import SimpleITK

    geometry, n_bytes = _itk_geometry(path)
    if path.name.lower().endswith(".gz"):
        _check_gzip(path, n_bytes)
    with _turn(path):
        image = SimpleITK.ReadImage(str(path))
    voxels = SimpleITK.GetArrayFromImage(image)
    voxels = voxels.reshape((*((1,) if len(geometry.size) == 2 else ()), *reversed(geometry.size)))
    voxels.flags.writeable = False
    return Volume(voxels, Grid(geometry))


def _check_gzip(path: Path, n_bytes: int) -> None:
    """Read a file to its end: that raises on a cut-off or changed stream, which ITK would fill with zeros."""
    beyond = n_bytes + 2**24  # the header and its extensions
    with gzip.open(path) as stream:
        while chunk := stream.read(2**20):
            beyond -= len(chunk)
            if beyond < 0:
                raise DataError(
                    f"{path}: unpacks to more than the {n_bytes:,} bytes that its header states; write the file again"
                )


def _oriented(path: Path, reading: Reading, *, as_mask: bool = False) -> OrientedVolume:
    volume = _volume(path, window=reading.dicom_window and not as_mask, as_mask=as_mask)
    grid, cut = volume.grid, _cut(path, volume.grid, reading)
    return OrientedVolume(
        cut.apply(volume.voxels), grid.geometry, grid.spacing_known, cut, grid.in_space, grid.depth_known
    )


def _cut(path: Path, grid: Grid, reading: Reading) -> Slicing:
    """A single image, or a clip, is not turned: its frames are the only ones that there are."""
    return slicing(grid.geometry, reading) if grid.in_space and is_volume(path) else Slicing()


def _read_slice(path: Path, frame: int | None, reading: Reading, *, as_mask: bool = False) -> NDArray[Any]:
    volume = _oriented(path, reading, as_mask=as_mask)
    index = _check_frame(path, frame, volume.slices)
    if not reading.neighbouring_slices or as_mask or not is_volume(path) or len(volume.geometry.size) == 2:
        return volume.voxels[index].copy()
    if volume.voxels.ndim == 4:
        raise DataError(
            f"{path}: the frames are in colours, which leaves no channels for data.preprocessing.neighbouring_slices; "
            "leave that setting out"
        )
    around = (max(index - 1, 0), index, min(index + 1, volume.slices - 1))
    return np.stack([volume.voxels[i] for i in around], axis=-1)


_OME_UNIT_MM = {"km": 1e6, "m": 1e3, "dm": 100.0, "cm": 10.0, "mm": 1.0, "µm": 1e-3, "um": 1e-3, "nm": 1e-6}


def _ome_spacing(path: Path) -> tuple[float, float] | None:
    """The physical size that the metadata of an OME-TIFF states; without a unit it is in micrometres."""
    import tifffile

    sides = []
    try:
        with tifffile.TiffFile(path) as tiff:
            text = tiff.ome_metadata
        image = tifffile.xml2dict(text).get("OME", {}).get("Image", {}) if text else {}
        pixels = (image[0] if isinstance(image, list) else image).get("Pixels", {})
        for axis in ("Y", "X"):
            size = pixels.get(f"PhysicalSize{axis}")
            unit = _OME_UNIT_MM.get(pixels.get(f"PhysicalSize{axis}Unit", "µm"))
            if size is None or unit is None:
                return None
            sides.append(float(size) * unit)
    except Exception:  # Pillow reads what tifffile, or the metadata's parser, does not: then there are none
        return None
    if not all(np.isfinite(side) and side > 0 for side in sides):
        raise DataError(f"{path}: its OME metadata state pixels of {sides[0]:g} x {sides[1]:g} mm; correct them")
    return sides[0], sides[1]


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(str(side) for side in shape)
