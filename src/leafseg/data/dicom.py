"""DICOM files and series as pixels and geometry, through pydicom; and which files belong together.

Only technical tags are ever parsed (``_TAGS``): names, dates and comments of a patient cannot reach a message or a log.
``dicom_group`` alone reads ids.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from leafseg.data.geometry import MAX_PIXELS, MAX_VOXELS, Geometry, Grid, Volume, check_geometry
from leafseg.errors import DataError, LeafsegError, MissingExtraError, last_line

DICOM_SUFFIXES = (".dcm", ".dicom")

_SEGMENTATION = "1.2.840.10008.5.1.4.1.1.66.4"
_DIRECTORY = "1.2.840.10008.1.3.10"
_DEFLATED = "1.2.840.10008.1.2.1.99"
_NATIVE = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2")

# Which of pydicom's decoders for these syntaxes; for others any. Never its binding of GDCM, which ends the whole
# process on damaged data (an exception that crosses no language border); the GDCM inside ITK raises, after our checks.
_JPEG_LS = ("1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81")
_DECODERS = {
    "1.2.840.10008.1.2.4.50": "pillow",  # JPEG baseline
    **dict.fromkeys(_JPEG_LS, "pyjpegls"),
    "1.2.840.10008.1.2.4.90": "pillow",  # JPEG 2000
    "1.2.840.10008.1.2.4.91": "pillow",
    "1.2.840.10008.1.2.5": "pydicom",  # RLE
}
_THROUGH_ITK = ("1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70")  # 12-bit, lossless JPEG

_TAGS = [
    *("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "SeriesNumber", "InstanceNumber", "NumberOfFrames"),
    *("Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
    *("PixelPaddingValue", "PixelPaddingRangeLimit", "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence"),
    *("WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "ImagerPixelSpacing"),
    *("EstimatedRadiographicMagnificationFactor", "SpacingBetweenSlices", "SliceThickness"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "SequenceOfUltrasoundRegions"),
]


@dataclass(frozen=True)
class DicomSeries:
    """Files of one series in one folder.

    Attributes:
        files: in the order of the slices of ``read_series``: ascending along the normal of the slices.
        uid: SeriesInstanceUID; identifies the series, so keep it out of messages.
        folder: where the files lie.
        is_volume: whether every file is one slice with a place in space (CT, MR, PET); else they are single images.
        number: SeriesNumber, None if the first file states none.
    """

    files: tuple[Path, ...]
    uid: str
    folder: Path
    is_volume: bool
    number: int | None = None


@dataclass(frozen=True)
class _Window:
    centre: float
    width: float
    function: str


@dataclass(frozen=True)
class _Frame:
    """Where one frame lies and what its numbers mean."""

    orientation: tuple[float, ...] | None
    position: tuple[float, ...] | None
    spacing: tuple[float, float] | None
    slope: float
    intercept: float
    window: _Window | None


@dataclass(frozen=True)
class _Header:
    """The technical part of one file. ``slice_spacing`` is only a guess, for a single slice."""

    path: Path
    syntax: str
    series_uid: str
    series_number: int | None
    instance: int
    size: tuple[int, int]
    samples: int
    photometric: str
    bits_allocated: int
    bits_stored: int
    signed: bool
    padding: tuple[int, int] | None
    has_luts: tuple[bool, bool]
    slice_spacing: float | None
    frames: tuple[_Frame, ...]

    @property
    def is_slice(self) -> bool:
        frame = self.frames[0]
        return len(self.frames) == 1 and frame.position is not None and frame.orientation is not None


# ---------------------------------------------------------------------------------------------- which files


def is_dicom(path: Path) -> bool:
    """Whether a file has the preamble of DICOM; False for a folder, and for what cannot be opened."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:
        return False


def holds_slices(folder: Path) -> bool:
    """Whether a folder is a volume in DICOM: its first DICOM image is one slice with a place in space.

    One folder is one volume. A folder of X-rays or of several series' folders is none.
    """
    for path in _candidates(folder):
        try:
            return _header(path).is_slice
        except DataError:  # a DICOMDIR, a report, a damaged file: reading the folder will say so
            continue
    return False


def is_volume(path: Path) -> bool:
    """Whether a path is a folder of slices, or a DICOM file of several frames; False where it cannot be read."""
    if path.is_dir():
        return holds_slices(path)
    try:
        return len(_header(path).frames) > 1
    except DataError:
        return False


def holds_image(path: Path) -> bool:
    """False for a DICOM object of another kind: a report, plan, segmentation or DICOMDIR; True where reading fails."""
    try:
        return _image_header(path) is not None
    except DataError:
        return True


def find_series(folder: Path, *, recursive: bool = True) -> list[DicomSeries]:
    """The series in a folder and, if wanted, in the folders beneath; one that lies in two folders counts twice.

    Reports, plans and segmentations among the images are passed over.

    Raises:
        DataError: for a folder or a DICOM image that cannot be read.
        MissingExtraError: without pydicom.
    """
    found: dict[tuple[Path, str], list[_Header]] = defaultdict(list)
    for parent, folders, _ in os.walk(folder):
        folders[:] = sorted(name for name in folders if recursive and not name.startswith("."))
        for path in _candidates(Path(parent)):
            header = _image_header(path)
            if header is not None:
                found[path.parent, header.series_uid].append(header)
    return [_series(parent, uid, headers) for (parent, uid), headers in found.items()]


def series_at(path: Path) -> DicomSeries:
    """The one series of a folder, or of a single file; ``files`` are in the order of the volume's slices.

    Raises:
        DataError: if the folder holds none or several, or a file cannot be read.
    """
    with _errors_of(path):
        if not path.is_dir():
            return _series(path.parent, _header(path).series_uid, [_header(path)])
        found = find_series(path, recursive=False)
        if not found:
            raise DataError(f"{path}: holds no DICOM images; give the folder that the files lie in")
        if len(found) > 1:
            raise DataError(f"{path}: holds {len(found)} DICOM series; one folder is one volume, move each to its own")
        return found[0]


def dicom_group(path: Path, level: Literal["patient", "study", "series"] = "patient") -> str | None:
    """The raw id that a DICOM file or folder states: to be hashed at once and never shown.

    Returns:
        PatientID, StudyInstanceUID or SeriesInstanceUID; None if there is none, or the path is no DICOM.

    Raises:
        DataError: if the file cannot be read.
    """
    keyword = {"patient": "PatientID", "study": "StudyInstanceUID", "series": "SeriesInstanceUID"}[level]
    first = next(iter(_candidates(path)), None) if path.is_dir() else path
    if first is None or not is_dicom(first):
        return None
    with _errors_of(first):
        value = str(_dataset(first, [keyword]).get(keyword) or "").strip()
        return value or None


def _candidates(folder: Path) -> Iterator[Path]:
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror}); check the path and its rights") from error
    for name in names:
        if is_dicom(folder / name):
            yield folder / name


def _series(folder: Path, uid: str, headers: Sequence[_Header]) -> DicomSeries:
    volume = all(header.is_slice for header in headers)
    if volume:
        normal = _normal(headers[0].frames[0].orientation)
        ordered = sorted(headers, key=lambda h: (float(np.dot(normal, h.frames[0].position or ())), h.path.name))
    else:
        ordered = sorted(headers, key=lambda h: (h.instance, h.path.name))
    return DicomSeries(tuple(header.path for header in ordered), uid, folder, volume, headers[0].series_number)


def separate_slices(series: DicomSeries) -> DicomSeries | None:
    """The slices of a series without single images that state no place; None if there are no slices.

    Raises:
        DataError: if a file cannot be read.
    """
    headers = [header for file in series.files if (header := _header(file)).is_slice]
    return _series(series.folder, series.uid, headers) if headers else None


# ---------------------------------------------------------------------------------------------- reading


def read_series(series: DicomSeries) -> tuple[NDArray[Any], Geometry]:
    """The slices of a series, or the frames of one file, as ``read_volume`` gives them.

    Returns:
        Voxels ``[Z, Y, X]`` in the units of the rescale tags, ascending along the slices' normal, and their geometry.

    Raises:
        DataError: if they do not form one regular grid, or a file cannot be read.
    """
    volume = _read(series.folder, [_checked_header(path) for path in series.files])
    return volume.voxels, volume.grid.geometry


def read_volume(path: Path, *, window: bool = False, as_mask: bool = False) -> Volume:
    """A folder of slices, or all frames of a file.

    Args:
        path: of the folder or file.
        window: map each frame through the window that it states, to float32 in 0..1.
        as_mask: values as they are: no inversion, no palette, no window.

    Raises:
        DataError: as ``read_series``.
    """
    return _read(path, _headers(path), window=window, as_mask=as_mask)


def read_grid(path: Path) -> Grid:
    """The grid of what ``read_volume`` would give; no pixel is decoded."""
    headers = _headers(path)
    with _errors_of(path):
        return _place(path, headers)[1]


def frame_order(path: Path) -> list[int]:
    """Which frame each slice of ``read_volume`` is, counted through ``series_at(path).files``; no pixel is decoded."""
    headers = _headers(path)
    with _errors_of(path):
        return _place(path, headers)[0]


def _headers(path: Path) -> list[_Header]:
    return [_checked_header(file) for file in series_at(path).files]


def _read(path: Path, headers: Sequence[_Header], *, window: bool = False, as_mask: bool = False) -> Volume:
    with _errors_of(path):
        order, grid = _place(path, headers)
        kinds = {(header.samples, header.photometric == "PALETTE COLOR") for header in headers}
        if len(kinds) > 1:
            raise DataError(
                f"{path}: the series mixes grey and coloured images; one volume has one kind, separate them"
            )
        window = window and not as_mask and headers[0].samples == 1 and not kinds.pop()[1]
        frames = [frame for header in headers for frame in header.frames]
        dtype = np.dtype(np.float32) if window else _value_type(headers, frames)
        voxels: NDArray[Any] = np.empty(0)
        outside = np.zeros(0, np.bool_)
        at = 0
        for header in headers:
            with _errors_of(header.path):
                values, padded = _values(header, dtype, window=window, as_mask=as_mask)
            if not at:
                voxels = np.empty((len(frames), *values.shape[1:]), values.dtype)
                outside = np.zeros(voxels.shape, np.bool_)
            voxels[at : at + len(values)], outside[at : at + len(values)] = values, padded
            at += len(values)
        if outside.any() and not outside.all() and not as_mask:
            # What lies outside of the scanned field looks like the darkest of what lies inside, whatever number the
            # scanner wrote there: -3024 would spoil every percentile.
            voxels[outside] = voxels[~outside].min()
        if order != sorted(order):
            voxels = voxels[order]
        voxels.flags.writeable = False
        return Volume(voxels, grid)


def _values(
    header: _Header, dtype: np.dtype[Any], *, window: bool, as_mask: bool
) -> tuple[NDArray[Any], NDArray[np.bool_] | bool]:
    """Frames ``[N, H, W]`` or ``[N, H, W, 3]`` of one file, and where they are padded."""
    from pydicom.pixels.processing import apply_color_lut

    raw = _decode(header)
    tags: Any = None
    if header.photometric == "PALETTE COLOR" or any(header.has_luts):
        tags = _dataset(header.path, _TABLE_TAGS)
    if header.photometric == "PALETTE COLOR" and not as_mask:
        return apply_color_lut(raw, tags)[..., :3], False
    if raw.ndim == 4:
        return raw, False
    padded: NDArray[np.bool_] | bool = False
    if header.padding is not None and raw.dtype.kind in "iu":
        padded = (raw >= header.padding[0]) & (raw <= header.padding[1])
    if raw.dtype.kind == "f" or (header.has_luts[0] and not window):
        dtype = np.dtype(np.float32)
    result = np.empty(raw.shape, dtype)
    for index, frame in enumerate(header.frames):
        values = _rescaled(raw[index], header, frame, tags)
        if window:
            values = _windowed(values, header, frame, tags)
        if header.photometric == "MONOCHROME1" and not as_mask and raw.dtype.kind != "f":
            low, high = (0.0, 1.0) if window else _value_range(header, frame)
            if header.has_luts[0] and not window:
                low, high = 0.0, 2.0 ** int(tags.ModalityLUTSequence[0].LUTDescriptor[2]) - 1
            values = (low + high) - values.astype(np.float64)
        if dtype.kind in "iu" and values.dtype != dtype:
            limits = np.iinfo(dtype)  # beyond them only if the header lies about its bits
            values = values.clip(limits.min, limits.max)
        result[index] = values
    return result, padded


def _decode(header: _Header) -> NDArray[Any]:
    """Stored values ``[N, H, W]``, or RGB ``[N, H, W, 3]``."""
    from pydicom.pixels.utils import pixel_array

    if header.syntax in _THROUGH_ITK:
        return _decode_through_itk(header)
    if header.syntax in _JPEG_LS:
        _jpeg_frames(header)
    raw = pixel_array(header.path, decoding_plugin=_DECODERS.get(header.syntax, ""))
    if len(header.frames) == 1:
        raw = raw[None]
    if raw.shape[:3] != (len(header.frames), *header.size):
        raise ValueError(f"decoded {raw.shape[:3]}, stated {(len(header.frames), *header.size)}")
    return raw


_TABLE_TAGS = [
    *("PixelRepresentation", "ModalityLUTSequence", "VOILUTSequence"),
    *(
        f"{colour}PaletteColorLookupTable{part}"
        for colour in ("Red", "Green", "Blue")
        for part in ("Descriptor", "Data")
    ),
    *(f"Segmented{colour}PaletteColorLookupTableData" for colour in ("Red", "Green", "Blue")),
]
_PIXEL_TAGS = [
    *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelData"),
]


def _decode_through_itk(header: _Header) -> NDArray[Any]:
    """Stored values as ``_decode`` gives them, from a copy that has pixels and nothing else for ITK to apply."""
    import pydicom
    import SimpleITK
    from pydicom.uid import SecondaryCaptureImageStorage, generate_uid

    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    copy = pydicom.dcmread(header.path, specific_tags=_PIXEL_TAGS)
    copy.PixelData = pydicom.encaps.encapsulate(_jpeg_frames(header))
    if header.samples == 1:
        copy.PhotometricInterpretation = "MONOCHROME2"  # palettes are looked up elsewhere
    copy.SOPClassUID = copy.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    copy.SOPInstanceUID = copy.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    with tempfile.TemporaryDirectory(prefix="leafseg-") as folder:
        path = Path(folder) / "pixels.dcm"
        copy.save_as(path, enforce_file_format=True)
        values = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path), imageIO="GDCMImageIO"))
    colours = (3,) if header.samples == 3 else ()
    return values.reshape((len(header.frames), *header.size, *colours))


def _jpeg_frames(header: _Header) -> list[bytes]:
    """The compressed frames, once what they state of themselves is known to fit the file's header.

    On damaged ones GDCM asks for all the memory that they state or ends the process, and CharLS computes for seconds.
    """
    import pydicom

    stored = pydicom.dcmread(header.path, specific_tags=["PixelData"])
    frames = list(pydicom.encaps.generate_frames(stored.PixelData, number_of_frames=len(header.frames)))
    for frame in frames:
        precision, height, width, samples = _jpeg_format(frame)
        if (height, width, samples) != (*header.size, header.samples) or not 2 <= precision <= header.bits_allocated:
            raise ValueError(
                f"a frame is {width}x{height} with {samples} channels of {precision} bits, unlike the header"
            )
    return frames


def _jpeg_format(frame: bytes) -> tuple[int, int, int, int]:
    """(precision, height, width, channels) that a JPEG or JPEG-LS states in its frame header (ITU T.81, B.2.2)."""
    at = 2
    while frame[at : at + 1] == b"\xff" and at + 10 <= len(frame):
        marker, length = frame[at + 1], int.from_bytes(frame[at + 2 : at + 4])
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            return (
                frame[at + 4],
                int.from_bytes(frame[at + 5 : at + 7]),
                int.from_bytes(frame[at + 7 : at + 9]),
                frame[at + 9],
            )
        at += 2 + length
    raise ValueError("a frame is no JPEG")


def _rescaled(stored: NDArray[Any], header: _Header, frame: _Frame, tags: Any) -> NDArray[Any]:
    """One frame in the units of its modality: whole numbers stay whole."""
    from pydicom.pixels.processing import apply_modality_lut

    if header.has_luts[0]:
        return apply_modality_lut(stored, tags)
    if (frame.slope, frame.intercept) == (1.0, 0.0):
        return stored
    if frame.slope % 1 or frame.intercept % 1 or stored.dtype.kind == "f":
        return stored.astype(np.float64) * frame.slope + frame.intercept
    return stored.astype(np.int64) * int(frame.slope) + int(frame.intercept)


def _windowed(values: NDArray[Any], header: _Header, frame: _Frame, tags: Any) -> NDArray[np.float64]:
    """One frame through the first window that it states, in 0..1.

    Source: DICOM PS3.3 C.11.2.1.2 and C.11.2.1.3, with 0..1 as the output range.
    """
    from pydicom.pixels.processing import apply_voi

    if header.has_luts[1]:
        table = tags.VOILUTSequence[0]
        return apply_voi(np.rint(values).astype(np.int32), tags) / (2.0 ** int(table.LUTDescriptor[2]) - 1.0)
    window = frame.window
    if window is None:
        raise DataError(
            f"{header.path}: states no window (VOI LUT), which data.preprocessing.dicom_window asks for; leave that "
            "setting out, or use intensity window with numbers of your own"
        )
    shades = values.astype(np.float64)
    if window.function == "SIGMOID":
        return 1.0 / (1.0 + np.exp(np.clip(-4.0 * (shades - window.centre) / window.width, -700.0, 700.0)))
    if window.function == "LINEAR_EXACT":
        return ((shades - window.centre) / window.width + 0.5).clip(0.0, 1.0)
    if window.width <= 1:
        return (shades > window.centre - 0.5).astype(np.float64)
    return ((shades - (window.centre - 0.5)) / (window.width - 1.0) + 0.5).clip(0.0, 1.0)


def _stored_range(header: _Header) -> tuple[int, int]:
    bits = header.bits_stored
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if header.signed else (0, 2**bits - 1)


def _value_range(header: _Header, frame: _Frame) -> tuple[float, float]:
    ends = [frame.slope * end + frame.intercept for end in _stored_range(header)]
    return min(ends), max(ends)


def _value_type(headers: Sequence[_Header], frames: Sequence[_Frame]) -> np.dtype[Any]:
    """The type that holds every value that these headers allow: it must not depend on the values that happen to occur.

    Without a rescale it is the stored one. With a whole one it has at least 16 bits, because 8 bits mean a picture
    whose range is the display's. With another it is float32.
    """
    if all((frame.slope, frame.intercept) == (1.0, 0.0) for frame in frames):
        stored = {(header.bits_allocated, header.signed) for header in headers}
        if len(stored) == 1:
            bits, signed = stored.pop()
            return np.dtype(f"{'int' if signed else 'uint'}{max(8, bits)}")
    if any(frame.slope % 1 or frame.intercept % 1 for frame in frames):
        return np.dtype(np.float32)
    ends = [end for header in headers for frame in header.frames for end in _value_range(header, frame)]
    for candidate in (np.int16, np.uint16, np.int32, np.uint32):
        if np.iinfo(candidate).min <= min(ends) and max(ends) <= np.iinfo(candidate).max:
            return np.dtype(candidate)
    return np.dtype(np.float32)


# ---------------------------------------------------------------------------------------------- geometry


def _place(path: Path, headers: Sequence[_Header]) -> tuple[list[int], Grid]:
    """The order of the frames along the slices' normal, and their grid."""
    sizes = {header.size for header in headers}
    if len(sizes) > 1:
        listed = ", ".join(f"{width}x{height}" for height, width in sorted(sizes)[:3])
        raise DataError(f"{path}: its slices have {len(sizes)} different sizes ({listed}); one volume has one size")
    (height, width) = sizes.pop()
    frames = [frame for header in headers for frame in header.frames]
    if height * width * len(frames) * headers[0].samples > MAX_VOXELS:
        raise DataError(
            f"{path}: the volume is {len(frames)}x{height}x{width}; at most {MAX_VOXELS:,} voxels are read, crop it"
        )
    if len(frames) == 1 and frames[0].spacing is None:
        return [0], Grid(_flat_geometry(height, width, 1, (1.0, 1.0)), spacing_known=False, in_space=False)
    placed = [frame for frame in frames if frame.position is not None and frame.orientation is not None]
    if len(headers) > 1 and len(placed) < len(frames):
        raise DataError(
            f"{path}: {len(frames) - len(placed)} of {len(frames)} files state no place in space "
            "(ImagePositionPatient); they are single images, give them as files"
        )
    in_time = len(frames) > 1 and len({frame.position for frame in frames}) == 1
    if len(placed) < len(frames) or (in_time and len(headers) == 1):
        spacing = frames[0].spacing
        flat = _flat_geometry(height, width, len(frames), spacing or (1.0, 1.0))
        return list(range(len(frames))), Grid(flat, spacing is not None, in_space=False)

    spacings = {frame.spacing for frame in frames}
    if None in spacings:
        raise DataError(f"{path}: states no PixelSpacing; a volume without it has no size, export the series again")
    if max(np.ptp([s for s in spacings if s is not None], axis=0)) > 1e-4:
        raise DataError(f"{path}: its slices have {len(spacings)} different pixel spacings; resample them to one")
    row_mm, column_mm = frames[0].spacing or (1.0, 1.0)

    cosines = np.array([frame.orientation for frame in frames])
    turned = int((np.abs(cosines - cosines[0]).max(axis=1) > 1e-4).sum())
    if turned:
        raise DataError(
            f"{path}: {turned} of {len(frames)} slices are oriented otherwise than the first (a localizer?); move them "
            "elsewhere"
        )
    normal = _normal(frames[0].orientation)
    row = cosines[0, :3] / np.linalg.norm(cosines[0, :3])
    column = np.cross(normal, row)
    positions = np.array([frame.position for frame in frames])
    heights = positions @ normal
    order = [int(index) for index in np.argsort(heights, kind="stable")]
    step = headers[0].slice_spacing
    if len(frames) > 1:
        step = _even_step(path, positions[order], heights[order], normal)
    geometry = Geometry(
        (width, height, len(frames)),
        (column_mm, row_mm, 1.0 if step is None else step),
        tuple(float(value) for value in positions[order[0]]),
        tuple(float(value) for value in np.column_stack([row, column, normal]).ravel()),
    )
    check_geometry(path, geometry)
    return order, Grid(geometry, depth_known=step is not None)


def _flat_geometry(height: int, width: int, frames: int, spacing: tuple[float, float]) -> Geometry:
    """Of frames that lie nowhere in space: an X-ray, a clip."""
    return Geometry((width, height, frames), (spacing[1], spacing[0], 1.0), (0.0, 0.0, 0.0), tuple(np.eye(3).ravel()))


def _even_step(path: Path, positions: NDArray[np.float64], heights: NDArray[np.float64], normal: Any) -> float:
    """The slice spacing of sorted positions ``[N, 3]``, once they are known to be even and straight."""
    steps = np.diff(heights)
    tolerance = max(0.01, 0.02 * float(np.median(steps)))  # headers are rounded; at most this is lost, in mm
    doubled = int((steps <= min(tolerance, 0.01)).sum())
    if doubled:
        raise DataError(
            f"{path}: {doubled} slices lie where another one lies (several times or echoes in one series?); one volume "
            "has one slice a place, separate them"
        )
    usual = float(np.median(steps))
    mean = float(heights[-1] - heights[0]) / len(steps)
    if np.abs(heights - heights[0] - mean * np.arange(len(heights))).max() > tolerance:
        gaps = np.flatnonzero(steps > 1.5 * usual)
        whole = np.abs(steps / usual - np.rint(steps / usual)).max() < 0.1
        if len(gaps) and whole:
            missing = int(np.rint(steps / usual).sum()) - len(steps)
            raise DataError(
                f"{path}: {missing} slices are missing, the first after slice {gaps[0] + 1} of {len(heights)} "
                f"({steps[gaps[0]]:.4g} mm instead of {usual:.4g} mm); add them"
            )
        raise DataError(
            f"{path}: the slices' distances run from {steps.min():.4g} to {steps.max():.4g} mm; a volume needs even "
            "ones, resample it"
        )
    sideways = positions - positions[0] - np.outer(heights - heights[0], normal)
    if np.linalg.norm(sideways, axis=1).max() > tolerance:
        angle = np.degrees(np.arctan2(np.linalg.norm(sideways[-1]), heights[-1] - heights[0]))
        raise DataError(
            f"{path}: the slices are shifted against each other by {angle:.3g} degrees (a tilted gantry); no straight "
            "grid holds them, resample the series to one, or give the slices as files"
        )
    return mean


def _normal(orientation: tuple[float, ...] | None) -> NDArray[np.float64]:
    row, column = np.reshape(orientation or (1.0, 0.0, 0.0, 0.0, 1.0, 0.0), (2, 3))
    normal = np.cross(row, column)
    return np.asarray(normal / max(float(np.linalg.norm(normal)), 1e-12))


# ---------------------------------------------------------------------------------------------- headers


def _image_header(path: Path) -> _Header | None:
    """The header of an image; None for a DICOM object of another kind that may lie beside images."""
    try:
        return _header(path)
    except _NoImageError:
        return None


class _NoImageError(DataError):
    pass


def _header(path: Path) -> _Header:
    with _errors_of(path):
        status = path.stat()
        return _cached_header(str(path), status.st_mtime_ns, status.st_size)


def _checked_header(path: Path) -> _Header:
    """A header whose image can be decoded without asking for more memory than the limits allow."""
    header = _header(path)
    height, width = header.size
    if height * width > MAX_PIXELS:
        raise DataError(f"{path}: the image has more than {MAX_PIXELS:,} pixels; cut it into tiles or shrink it")
    if height * width * len(header.frames) * header.samples > MAX_VOXELS:
        raise DataError(
            f"{path}: the file holds {len(header.frames)} frames of {width}x{height}; at most {MAX_VOXELS:,} voxels "
            "are read, split it"
        )
    return header


@lru_cache(maxsize=8192)
def _cached_header(name: str, modified_ns: int, n_bytes: int) -> _Header:
    path = Path(name)
    if not is_dicom(path):
        raise DataError(f"{path}: is no DICOM file, it lacks the preamble; export it again as a DICOM file (Part 10)")
    dataset = _dataset(path, _TAGS)
    kind = dataset.get("SOPClassUID") or dataset.file_meta.get("MediaStorageSOPClassUID") or ""
    if kind == _DIRECTORY:
        raise _NoImageError(f"{path}: is a DICOMDIR, a list of files; give the images or their folder")
    if kind == _SEGMENTATION:
        raise _NoImageError(
            f"{path}: is a DICOM segmentation, which is written but not read here; convert it to NIfTI or NRRD on its "
            "image's grid (3D Slicer, dcmqi)"
        )
    height, width = _whole(dataset, "Rows", 0), _whole(dataset, "Columns", 0)
    if not height or not width:
        name = getattr(kind, "name", "")
        called = f"a DICOM object of the kind {name}" if name else "a DICOM object of unknown kind"
        raise _NoImageError(f"{path}: is {called} and holds no image; give the images")
    count = _whole(dataset, "NumberOfFrames", 1) or 1
    samples = _whole(dataset, "SamplesPerPixel", 1)
    if height < 0 or width < 0 or count < 0 or samples not in (1, 3):
        raise DataError(f"{path}: states {count} frames of {width}x{height} with {samples} channels; export it again")
    if count * height * width > MAX_VOXELS:  # before a list of that many frames is made
        raise DataError(
            f"{path}: the file states {count} frames of {width}x{height}; at most {MAX_VOXELS:,} voxels are read, "
            "split it"
        )
    allocated = _whole(dataset, "BitsAllocated", 0)
    stored = _whole(dataset, "BitsStored", allocated)
    if allocated not in (1, 8, 16, 32, 64) or not 0 < stored <= allocated:
        raise DataError(f"{path}: states {stored} of {allocated} bits a pixel, which cannot be read; export it again")
    if not _holds(dataset, n_bytes, pixels=count * height * width * samples, bits=allocated, frames=count):
        raise DataError(
            f"{path}: states {count} frames of {width}x{height}, more than its {n_bytes:,} bytes hold; the file may be "
            "cut off, copy or export it again"
        )
    groups = dataset.get("PerFrameFunctionalGroupsSequence") or []
    signed = bool(_whole(dataset, "PixelRepresentation", 0))
    return _Header(
        path=path,
        syntax=str(dataset.file_meta.get("TransferSyntaxUID") or ""),
        series_uid=str(dataset.get("SeriesInstanceUID") or ""),
        series_number=int(number) if (number := dataset.get("SeriesNumber")) not in (None, "") else None,
        instance=_whole(dataset, "InstanceNumber", 0),
        size=(height, width),
        samples=samples,
        photometric=str(dataset.get("PhotometricInterpretation") or "MONOCHROME2").strip(),
        bits_allocated=allocated,
        bits_stored=stored,
        signed=signed,
        padding=_padding(dataset, allocated, signed=signed),
        has_luts=(bool(dataset.get("ModalityLUTSequence")), bool(dataset.get("VOILUTSequence"))),
        slice_spacing=_slice_spacing(dataset),
        frames=tuple(_frame(path, dataset, groups[index] if index < len(groups) else None) for index in range(count)),
    )


def _holds(dataset: Any, n_bytes: int, *, pixels: int, bits: int, frames: int) -> bool:
    """Whether a file is long enough for its pixels; compressed, a frame takes 16 bytes at the least."""
    if dataset.file_meta.get("TransferSyntaxUID") not in _NATIVE:
        return n_bytes >= frames * 16
    if dataset.get("PhotometricInterpretation") == "YBR_FULL_422":  # two pixels share their colour
        pixels = pixels * 2 // 3
    return n_bytes >= pixels * bits // 8


def _frame(path: Path, dataset: Any, group: Any) -> _Frame:
    """One frame's values: its own functional group's, else the shared ones', else the file's."""
    shared = (dataset.get("SharedFunctionalGroupsSequence") or [None])[0]

    def look(sequence: str, keyword: str) -> Any:
        for source in (group, shared):
            items = source.get(sequence) if source is not None else None
            if items and items[0].get(keyword) is not None:
                return items[0].get(keyword)
        return dataset.get(keyword)

    orientation = _numbers(look("PlaneOrientationSequence", "ImageOrientationPatient"), 6)
    position = _numbers(look("PlanePositionSequence", "ImagePositionPatient"), 3)
    slope = _numbers(look("PixelValueTransformationSequence", "RescaleSlope"), 1) or (1.0,)
    intercept = _numbers(look("PixelValueTransformationSequence", "RescaleIntercept"), 1) or (0.0,)
    if orientation is not None:
        row, column = np.array(orientation).reshape(2, 3)
        if not (abs(row @ row - 1) < 0.02 and abs(column @ column - 1) < 0.02 and abs(row @ column) < 0.01):
            raise DataError(f"{path}: ImageOrientationPatient is no pair of perpendicular directions; export it again")
    if not np.isfinite([*(position or ()), *slope, *intercept]).all() or slope[0] == 0:
        raise DataError(
            f"{path}: its position or its rescale is no proper number; the header is damaged, export it again"
        )
    centre = _numbers(look("FrameVOILUTSequence", "WindowCenter"), None)
    width = _numbers(look("FrameVOILUTSequence", "WindowWidth"), None)
    window = None
    if centre and width and np.isfinite([centre[0], width[0]]).all() and width[0] > 0:
        window = _Window(centre[0], width[0], str(look("FrameVOILUTSequence", "VOILUTFunction") or "LINEAR"))
    return _Frame(orientation, position, _spacing(path, dataset, look), slope[0], intercept[0], window)


def _spacing(path: Path, dataset: Any, look: Any) -> tuple[float, float] | None:
    spacing = _numbers(look("PixelMeasuresSequence", "PixelSpacing"), 2)
    if spacing is None:
        spacing = _numbers(dataset.get("ImagerPixelSpacing"), 2)
        magnified = _numbers(dataset.get("EstimatedRadiographicMagnificationFactor"), 1)
        if spacing is not None and magnified and magnified[0] > 0:
            spacing = (spacing[0] / magnified[0], spacing[1] / magnified[0])
    if spacing is None:
        spacing = _ultrasound_spacing(dataset)
    if spacing is None:
        return None
    if not all(np.isfinite(side) and side > 0 for side in spacing):
        raise DataError(f"{path}: the pixel spacing is {spacing[0]:g} x {spacing[1]:g} mm and must be positive")
    return spacing[0], spacing[1]


def _ultrasound_spacing(dataset: Any) -> tuple[float, ...] | None:
    """From the calibrated regions, where all that are lengths (unit 3, cm) agree."""
    found = {
        (abs(float(region.PhysicalDeltaY)) * 10, abs(float(region.PhysicalDeltaX)) * 10)
        for region in dataset.get("SequenceOfUltrasoundRegions") or []
        if region.get("PhysicalUnitsXDirection") == 3 and region.get("PhysicalUnitsYDirection") == 3
    }
    return found.pop() if len(found) == 1 else None


def _slice_spacing(dataset: Any) -> float | None:
    places = [dataset]
    for groups in ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"):
        places += [
            measures
            for group in (dataset.get(groups) or [])[:1]
            for measures in group.get("PixelMeasuresSequence") or []
        ]
    for place in places:
        for keyword in ("SpacingBetweenSlices", "SliceThickness"):
            value = _numbers(place.get(keyword), 1)
            if value and np.isfinite(value[0]) and value[0] > 0:
                return value[0]
    return None


def _padding(dataset: Any, allocated: int, *, signed: bool) -> tuple[int, int] | None:
    ends = [dataset.get(keyword) for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    if not isinstance(ends[0], int):
        return None
    values = [int(end) for end in ends if isinstance(end, int)]
    if signed:  # some writers store the two's complement as an unsigned number
        values = [value - 2**allocated if value >= 2 ** (allocated - 1) else value for value in values]
    return min(values), max(values)


def _numbers(value: Any, count: int | None) -> tuple[float, ...] | None:
    """The numbers of a tag; None if it is absent, empty, or has another count (None: any)."""
    if value is None or value == "":
        return None
    values = [value] if isinstance(value, int | float | str) else list(value)
    if count is not None and len(values) != count:
        return None
    return tuple(float(item) for item in values)


def _whole(dataset: Any, keyword: str, default: int) -> int:
    value = dataset.get(keyword)
    return default if value is None or value == "" else int(value)


def _dataset(path: Path, keywords: Sequence[str]) -> Any:
    """The tags asked for, without the pixels."""
    try:
        import pydicom
    except ImportError as error:
        raise MissingExtraError(f'{path}: reading DICOM needs pydicom; pip install "leafseg[dicom]"') from error

    # pydicom warns of every oddity of a header and quotes it.
    warnings.filterwarnings("ignore", module=r"pydicom(\..*)?")
    # A deflated file would be inflated whole, in memory, before its first tag is known: a kilobyte may ask for all.
    if pydicom.filereader.read_file_meta_info(path).get("TransferSyntaxUID") == _DEFLATED:
        raise DataError(f"{path}: is stored deflated, which is not read; convert it to an uncompressed transfer syntax")
    return pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(keywords))


@contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    """Turn whatever goes wrong into a DataError: pydicom raises nearly anything on damaged bytes."""
    try:
        yield
    except LeafsegError:
        raise
    except MemoryError as error:
        raise DataError(f"{path}: the file does not fit into memory; split it or shrink it") from error
    except Exception as error:
        raise DataError(
            f"{path}: cannot be read ({last_line(error)}); the file may be damaged or cut off, copy or export it again"
        ) from error
