"""DICOM in: values, geometry and refusals; expected numbers are those written, or come from GDCM through ITK."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
from PIL import Image

from leafseg.data import dicom
from leafseg.data.images import (
    STORED,
    Reading,
    check_image,
    count_frames,
    image_stem,
    image_suffix,
    is_volume,
    pixel_spacing,
    read_image,
    read_mask,
    read_oriented,
    read_volume,
)
from leafseg.errors import DataError, MissingExtraError

pydicom = pytest.importorskip("pydicom")

from pydicom import uid as uids  # noqa: E402
from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402

AXIAL = [1, 0, 0, 0, 1, 0]
SECRET = "DOE^JANE"
RAMP = np.arange(20, dtype=np.uint16).reshape(4, 5) * 100


def dataset(pixels: np.ndarray, **tags: Any) -> Dataset:
    """A minimal image; ``pixels`` are ``[H, W]``, ``[N, H, W]`` with NumberOfFrames, or end with three colours."""
    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = uids.ExplicitVRLittleEndian
    made.SOPClassUID = tags.pop("SOPClassUID", uids.CTImageStorage)
    made.SOPInstanceUID = uids.generate_uid()
    made.file_meta.MediaStorageSOPClassUID = made.SOPClassUID
    made.file_meta.MediaStorageSOPInstanceUID = made.SOPInstanceUID
    made.PatientName, made.PatientID = SECRET, SECRET
    colours = pixels.ndim == 3 + ("NumberOfFrames" in tags)
    made.Rows, made.Columns = pixels.shape[-3:-1] if colours else pixels.shape[-2:]
    made.SamplesPerPixel = 3 if colours else 1
    made.PhotometricInterpretation = "RGB" if colours else "MONOCHROME2"
    if colours:
        made.PlanarConfiguration = 0
    made.BitsAllocated = made.BitsStored = 8 * pixels.dtype.itemsize
    made.HighBit = made.BitsStored - 1
    made.PixelRepresentation = int(pixels.dtype.kind == "i")
    for name, value in tags.items():
        setattr(made, name, value)
    made.PixelData = pixels.tobytes()
    made["PixelData"].VR = "OB" if made.BitsAllocated == 8 else "OW"
    return made


def write(path: Path, pixels: np.ndarray, **tags: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset(pixels, **tags).save_as(path, enforce_file_format=True)
    return path


def write_series(
    folder: Path,
    voxels: np.ndarray,
    *,
    first: Sequence[float] = (0.0, 0.0, 0.0),
    step: Sequence[float] = (0.0, 0.0, 2.0),
    orientation: Sequence[float] = AXIAL,
    spacing: Sequence[float] = (1.0, 1.0),
    change: Callable[[int, dict[str, Any]], None] = lambda number, tags: None,
    **tags: Any,
) -> Path:
    """Slice k of ``voxels`` at ``first + k * step``; files are named and numbered in an order that means nothing."""
    series = uids.generate_uid()
    order = np.random.default_rng(1).permutation(len(voxels))
    for number, k in enumerate(order):
        own = {
            "SeriesInstanceUID": series,
            "InstanceNumber": number + 1,
            "ImagePositionPatient": [float(a + k * b) for a, b in zip(first, step, strict=True)],
            "ImageOrientationPatient": [float(value) for value in orientation],
            "PixelSpacing": [float(value) for value in spacing],
            **tags,
        }
        change(int(k), own)
        write(folder / f"image{number}", voxels[k], **own)
    return folder


def noise(*shape: int, dtype: type = np.int16, high: int = 2000) -> np.ndarray:
    return np.random.default_rng(0).integers(0, high, shape).astype(dtype)


# ---------------------------------------------------------------------------------------------- a series as a volume


def test_slices_are_sorted_by_their_place_and_not_by_name_or_number(tmp_path: Path) -> None:
    voxels = noise(6, 4, 5)
    folder = write_series(tmp_path / "scan", voxels, first=(-10, -20, 7.5), step=(0, 0, 2.5), spacing=(0.7, 0.6))
    read, geometry = read_volume(folder)
    assert read.dtype == np.int16
    np.testing.assert_array_equal(read, voxels)
    assert geometry.size == (5, 4, 6)
    assert geometry.spacing_mm == (0.6, 0.7, 2.5)  # x is along the columns: PixelSpacing is (row, column)
    assert geometry.origin == (-10, -20, 7.5)
    assert geometry.direction == (1, 0, 0, 0, 1, 0, 0, 0, 1)


def test_the_voxels_of_a_reversed_sagittal_series_lie_where_its_tags_say(tmp_path: Path) -> None:
    # Rows run along +y, columns along -z, so the normal is y x -z = -x. Slices written along +x come back from the far
    # end: the first is the one at x = 30 + 2 * 4 = 38.
    voxels = noise(3, 4, 5)
    folder = write_series(
        tmp_path / "scan", voxels, first=(30, 5, 9), step=(4, 0, 0), orientation=[0, 1, 0, 0, 0, -1], spacing=(2, 0.5)
    )
    read, geometry = read_volume(folder)
    np.testing.assert_array_equal(read, voxels[::-1])
    assert geometry.origin == (38, 5, 9)
    # Voxel x=4 (column), y=3 (row), z=2 (slice): 38 - 2*4, 5 + 4*0.5, 9 - 3*2.
    np.testing.assert_allclose(geometry.affine @ [4, 3, 2, 1], [30, 7, 3, 1], atol=1e-12)


@pytest.mark.parametrize("slope", [1, 2, 0.37])
def test_itks_own_dicom_reader_finds_the_same_voxels_in_the_same_places(tmp_path: Path, slope: float) -> None:
    turned = np.array([[0.8, 0.6, 0.0], [-0.36, 0.48, 0.8]])  # perpendicular unit vectors, oblique to every axis
    normal = np.cross(*turned)
    folder = write_series(
        tmp_path / "scan",
        noise(5, 6, 7),
        first=(-31.5, 12.25, 100),
        step=normal * 3.2,
        orientation=turned.ravel(),
        spacing=(0.9, 0.45),
        RescaleSlope=slope,
        RescaleIntercept=-1024,
    )
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder)))
    theirs = reader.Execute()
    voxels, geometry = read_volume(folder)
    assert voxels.dtype == (np.float32 if slope == 0.37 else np.int32)
    np.testing.assert_allclose(voxels, SimpleITK.GetArrayFromImage(theirs), rtol=1e-6)
    np.testing.assert_allclose(geometry.spacing_mm, theirs.GetSpacing(), atol=1e-9)
    for index in ((0, 0, 0), (6, 5, 4), (3, 1, 2)):
        expected = theirs.TransformIndexToPhysicalPoint(index)
        np.testing.assert_allclose((geometry.affine @ [*index, 1])[:3], expected, atol=1e-6)


def test_every_slice_is_rescaled_by_its_own_slope(tmp_path: Path) -> None:  # PET
    def own_slope(number: int, tags: dict[str, Any]) -> None:
        tags["RescaleSlope"] = 0.5 * (number + 1)

    voxels = noise(3, 4, 5)
    read, _ = read_volume(write_series(tmp_path / "scan", voxels, change=own_slope, RescaleIntercept=1))
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, voxels * np.array([0.5, 1.0, 1.5])[:, None, None] + 1)


def test_one_slice_in_a_folder_is_a_volume_of_one(tmp_path: Path) -> None:
    read, geometry = read_volume(write_series(tmp_path / "scan", noise(1, 4, 5), SliceThickness=3))
    assert read.shape == (1, 4, 5)
    assert geometry.spacing_mm == (1, 1, 3)


def test_the_slices_of_a_series_are_its_frames_along_any_axis(tmp_path: Path) -> None:
    voxels = noise(3, 4, 5)
    folder = write_series(tmp_path / "scan", voxels, spacing=(0.5, 0.25))
    assert [count_frames(folder, reading=Reading(slice_axis=axis)) for axis in "zyx"] == [3, 4, 5]
    np.testing.assert_array_equal(read_image(folder, 2), voxels[2])
    coronal = Reading(slice_axis="y")
    np.testing.assert_array_equal(read_image(folder, 1, reading=coronal), voxels[::-1, 1])  # the head is on top
    assert pixel_spacing(folder) == (0.5, 0.25)
    assert pixel_spacing(folder, reading=coronal) == (2.0, 0.25)
    assert check_image(folder, 1, reading=coronal) == (3, 5)
    np.testing.assert_array_equal(read_mask(folder, 2), voxels[2])


def test_threads_that_read_one_series_get_the_same_voxels(tmp_path: Path) -> None:
    voxels = noise(8, 16, 16)
    folder = write_series(tmp_path / "scan", voxels)
    with ThreadPoolExecutor(4) as pool:
        slices = list(pool.map(lambda k: read_image(folder, k), [*range(8)] * 3))
    np.testing.assert_array_equal(slices, np.concatenate([voxels] * 3))


def spoil(k: int, **changed: Any) -> Callable[[int, dict[str, Any]], None]:
    def change(number: int, tags: dict[str, Any]) -> None:
        if number == k:
            tags.update(changed)

    return change


def moved(offsets: dict[int, tuple[float, float, float]]) -> Callable[[int, dict[str, Any]], None]:
    def change(number: int, tags: dict[str, Any]) -> None:
        move = offsets.get(number, (0, 0, 0))
        tags["ImagePositionPatient"] = [a + b for a, b in zip(tags["ImagePositionPatient"], move, strict=True)]

    return change


NO_GRID = {
    # Slices 2.0 mm apart; those above the gap are one place higher.
    "1 slices are missing, the first after slice 3 of 6 (4 mm instead of 2 mm)": moved(
        dict.fromkeys((3, 4, 5), (0, 0, 2))
    ),
    "the slices' distances run from 1.2 to 2.8 mm": moved({3: (0, 0, 0.8)}),
    "1 slices lie where another one lies": moved({3: (0, 0, 2), 4: (0, 0, 0), 5: (0, 0, 0)}),
    "1 of 6 slices are oriented otherwise": spoil(5, ImageOrientationPatient=[1, 0, 0, 0, 0, -1]),
    "its slices have 2 different pixel spacings": spoil(2, PixelSpacing=[1.0, 2.0]),
    "1 of 6 files state no place in space": spoil(2, ImagePositionPatient=None),
    "states no PixelSpacing": spoil(2, PixelSpacing=None),
    # 0.5 mm sideways each 2 mm: atan(0.25) = 14.04 degrees.
    "shifted against each other by 14 degrees (a tilted gantry)": moved({k: (0, 0.5 * k, 0) for k in range(6)}),
    "holds 2 DICOM series": spoil(4, SeriesInstanceUID="1.2.3"),
}


@pytest.mark.parametrize("expected", NO_GRID)
def test_what_is_no_regular_grid_is_refused_in_one_sentence(tmp_path: Path, expected: str) -> None:
    folder = write_series(tmp_path / "scan", noise(6, 4, 5), change=NO_GRID[expected])
    for function in (read_volume, count_frames, pixel_spacing, lambda path: read_image(path, 0)):
        with pytest.raises(DataError) as caught:
            function(folder)
        assert expected in str(caught.value)
        assert str(caught.value).startswith(f"{folder}: ")
        assert "\n" not in str(caught.value)


def test_slices_of_different_sizes_are_refused(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "scan", noise(3, 4, 5))
    write(folder / "other", noise(7, 5), **series_tags(folder), ImagePositionPatient=[0, 0, 6])
    with pytest.raises(DataError, match=r"its slices have 2 different sizes \(5x4, 5x7\)"):
        read_volume(folder)


def series_tags(folder: Path) -> dict[str, Any]:
    stored = pydicom.dcmread(folder / "image0")
    return {name: getattr(stored, name) for name in ("SeriesInstanceUID", "ImageOrientationPatient", "PixelSpacing")}


def test_rounding_in_the_header_does_not_make_a_series_uneven(tmp_path: Path) -> None:
    rounded = moved({k: (0, 0, 0.005 * (-1) ** k) for k in range(6)})
    _, geometry = read_volume(write_series(tmp_path / "scan", noise(6, 4, 5), change=rounded))
    assert geometry.spacing_mm[2] == pytest.approx(2.0, abs=0.0021)  # the last and first differ by 0.01 over 5 steps


# ---------------------------------------------------------------------------------------------- values of one file


def test_a_single_image_needs_no_place_and_no_suffix(tmp_path: Path) -> None:
    path = write(tmp_path / "IM-0001", RAMP)
    read = read_image(path)
    assert read.dtype == np.uint16
    np.testing.assert_array_equal(read, RAMP)
    assert count_frames(path) is None
    assert not is_volume(path)
    assert (image_suffix(path), image_stem(path)) == (".dcm", "IM-0001")
    assert image_stem(write(tmp_path / "1.2.840.1", RAMP)) == "1.2.840.1"
    assert image_stem(write(tmp_path / "a.dcm", RAMP)) == "a"


def test_a_rescaled_type_depends_on_the_header_and_not_on_the_values(tmp_path: Path) -> None:
    for name, stored, bits, slope, intercept, dtype in (
        ("ct", np.full((2, 2), 24, np.uint16), 12, 1, -1024, np.int16),  # -1024..3071
        ("wide", np.full((2, 2), 24, np.uint16), 16, 1, -1024, np.int32),  # -1024..64511
        ("byte", np.full((2, 2), 24, np.uint8), 8, 2, 0, np.int16),  # 0..510
        ("part", np.full((2, 2), 24, np.uint8), 8, 0.5, 0, np.float32),
        ("same", np.full((2, 2), 24, np.int16), 16, 1, 0, np.int16),
    ):
        tags = {"BitsStored": bits, "HighBit": bits - 1, "RescaleSlope": slope, "RescaleIntercept": intercept}
        read = read_image(write(tmp_path / name, stored, **tags))
        assert read.dtype == dtype, name
        assert (read == 24 * slope + intercept).all(), name


def test_bright_and_dark_are_exchanged_in_monochrome1_but_not_in_a_mask(tmp_path: Path) -> None:
    tags = {"BitsStored": 12, "HighBit": 11, "PhotometricInterpretation": "MONOCHROME1"}
    path = write(tmp_path / "a.dcm", RAMP, **tags)
    np.testing.assert_array_equal(read_image(path), 4095 - RAMP.astype(int))
    np.testing.assert_array_equal(read_mask(path), RAMP)
    signed = write(tmp_path / "b.dcm", RAMP.astype(np.int16) - 900, PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_array_equal(read_image(signed), -1 - (RAMP.astype(int) - 900))  # -32768 becomes 32767


def test_padding_becomes_the_darkest_value_of_the_image(tmp_path: Path) -> None:
    stored = RAMP.astype(np.int16)
    stored[0, :3] = -2000
    path = write(tmp_path / "a.dcm", stored, PixelPaddingValue=-2000, RescaleSlope=1, RescaleIntercept=-1024)
    expected = np.where(stored == -2000, 300, stored) - 1024  # 300 is the smallest number that is left
    np.testing.assert_array_equal(read_image(path), expected)


def test_a_palette_gives_colours_to_an_image_and_indices_to_a_mask(tmp_path: Path) -> None:
    indices = np.array([[0, 1], [2, 3]], np.uint8)
    red, green = np.array([0, 255, 10, 7], np.uint8), np.array([0, 5, 200, 9], np.uint8)
    tags: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for colour, values in {"Red": red, "Green": green, "Blue": green}.items():
        tags[f"{colour}PaletteColorLookupTableDescriptor"] = [4, 0, 8]
        tags[f"{colour}PaletteColorLookupTableData"] = values.tobytes()
    path = write(tmp_path / "a.dcm", indices, **tags)
    np.testing.assert_array_equal(read_image(path), np.stack([red, green, green], -1)[indices])
    np.testing.assert_array_equal(read_mask(path), indices)


def test_colours_are_read_as_rgb(tmp_path: Path) -> None:
    rgb = noise(4, 6, 3, dtype=np.uint8, high=256)
    np.testing.assert_array_equal(read_image(write(tmp_path / "rgb.dcm", rgb)), rgb)
    # ITU-R BT.601: pure luma has neutral chroma, 128.
    grey = np.full((4, 6, 3), 128, np.uint8)
    grey[..., 0] = np.arange(24).reshape(4, 6)
    path = write(tmp_path / "ybr.dcm", grey, PhotometricInterpretation="YBR_FULL")
    np.testing.assert_array_equal(read_image(path), np.repeat(grey[..., :1], 3, axis=2))


@pytest.mark.parametrize("order", ["ImplicitVRLittleEndian", "ExplicitVRBigEndian"])
def test_byte_order_and_implicit_types_do_not_matter(tmp_path: Path, order: str) -> None:
    made = dataset(RAMP)
    made.file_meta.TransferSyntaxUID = getattr(uids, order)
    if order == "ExplicitVRBigEndian":
        made.PixelData = RAMP.astype(">u2").tobytes()
    made.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    np.testing.assert_array_equal(read_image(tmp_path / "a.dcm"), RAMP)


COMPRESSED = {
    uids.RLELossless: "RLE",
    uids.JPEGLosslessSV1: "JPEG",
    uids.JPEGLSLossless: "JPEG-LS",
    uids.JPEG2000Lossless: "JPEG2000",
}


def compress(path: Path, syntax: str) -> Path:
    """Compress a file in place, with pydicom's encoders, or else ITK's."""
    made = pydicom.dcmread(path)
    if syntax in (uids.RLELossless, uids.JPEGLSLossless):
        made.compress(syntax)
    else:
        image = SimpleITK.GetImageFromArray(made.pixel_array, isVector=made.SamplesPerPixel > 1)
        writer = SimpleITK.ImageFileWriter()
        writer.SetImageIO("GDCMImageIO")
        writer.UseCompressionOn()
        writer.SetCompressor(COMPRESSED[syntax])
        writer.SetFileName(str(path))
        writer.Execute(image)
        theirs = pydicom.dcmread(path)
        assert theirs.file_meta.TransferSyntaxUID == syntax
        made.file_meta.TransferSyntaxUID = syntax
        made.PixelData = theirs.PixelData
        made["PixelData"].VR, made["PixelData"].is_undefined_length = "OB", True
        made.PhotometricInterpretation = (
            theirs.PhotometricInterpretation if made.SamplesPerPixel > 1 else made.PhotometricInterpretation
        )
    made.save_as(path, enforce_file_format=True)
    return path


def encapsulate(path: Path, rgb: np.ndarray, syntax: str, *, photometric: str, **options: Any) -> io.BytesIO:
    """Write colours that Pillow compressed, and return what it wrote."""
    stream = io.BytesIO()
    Image.fromarray(rgb).save(stream, **options)
    made = dataset(rgb, PhotometricInterpretation=photometric)
    made.file_meta.TransferSyntaxUID = syntax
    made.PixelData = pydicom.encaps.encapsulate([stream.getvalue()])
    made["PixelData"].is_undefined_length = True
    made.save_as(path, enforce_file_format=True)
    return stream


@pytest.mark.parametrize("syntax", COMPRESSED, ids=COMPRESSED.get)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16])
def test_lossless_compression_gives_back_every_value(tmp_path: Path, syntax: str, dtype: type) -> None:
    pixels = (noise(16, 12, high=250) - (100 if dtype is np.int16 else 0)).astype(dtype)
    read = read_image(compress(write(tmp_path / "a.dcm", pixels), syntax))
    assert read.dtype == dtype
    np.testing.assert_array_equal(read, pixels)


@pytest.mark.parametrize("syntax", COMPRESSED, ids=COMPRESSED.get)
def test_compressed_colours_and_rescaled_values_come_back_too(tmp_path: Path, syntax: str) -> None:
    rgb = noise(16, 12, 3, dtype=np.uint8, high=256)
    path = write(tmp_path / "rgb.dcm", rgb)
    if syntax == uids.JPEG2000Lossless:  # GDCM writes none in colours
        encapsulate(path, rgb, syntax, photometric="YBR_RCT", format="JPEG2000", irreversible=False, no_jp2=True, mct=1)
    else:
        compress(path, syntax)
    np.testing.assert_array_equal(read_image(path), rgb)
    tags = {"RescaleSlope": 2, "RescaleIntercept": -1024, "PhotometricInterpretation": "MONOCHROME1", "BitsStored": 12}
    ramp = np.arange(16 * 12, dtype=np.uint16).reshape(16, 12) * 20
    path = compress(write(tmp_path / "a.dcm", ramp, HighBit=11, **tags), syntax)
    np.testing.assert_array_equal(read_image(path), (4095 - ramp.astype(int)) * 2 - 1024)


@pytest.mark.parametrize("syntax", [uids.RLELossless, uids.JPEGLSLossless])
def test_compressed_frames_are_read_back_in_their_order(tmp_path: Path, syntax: str) -> None:
    frames = noise(3, 16, 12, dtype=np.uint16)
    made = dataset(frames, NumberOfFrames=3)
    made.compress(syntax)
    made.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    np.testing.assert_array_equal(read_volume(tmp_path / "a.dcm")[0], frames)


def test_a_jpeg_inside_is_read_as_pillow_reads_it(tmp_path: Path) -> None:
    smooth = np.add.outer(np.arange(32), np.arange(24))[..., None] * np.array([4, 2, 1])
    rgb = smooth.astype(np.uint8)
    path = tmp_path / "a.dcm"
    stream = encapsulate(
        path, rgb, uids.JPEGBaseline8Bit, photometric="YBR_FULL_422", format="JPEG", quality=95, subsampling=0
    )
    expected = np.array(Image.open(stream)).astype(int)
    assert np.abs(read_image(path).astype(int) - expected).max() <= 2  # two roundings of the colour matrix


def test_the_window_of_the_file_is_applied_when_asked_for_and_only_then(tmp_path: Path) -> None:
    tags = {"WindowCenter": [500, 40], "WindowWidth": [1001, 80], "RescaleSlope": 1, "RescaleIntercept": -100}
    path = write(tmp_path / "a.dcm", RAMP, **tags)
    np.testing.assert_array_equal(read_image(path), RAMP.astype(int) - 100)
    # PS3.3 C.11.2.1.2: (x - (500 - 0.5)) / 1000 + 0.5 = (x + 0.5) / 1000, cut to 0..1.
    windowed = read_image(path, reading=Reading(dicom_window=True))
    assert windowed.dtype == np.float32
    np.testing.assert_allclose(windowed, ((RAMP - 100.0 + 0.5) / 1000).clip(0, 1), rtol=1e-6)
    np.testing.assert_array_equal(read_mask(path, reading=Reading(dicom_window=True)), RAMP.astype(int) - 100)


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_windows_agree_with_pydicoms_own(tmp_path: Path, function: str, photometric: str) -> None:
    tags = {"WindowCenter": 700, "WindowWidth": 900, "VOILUTFunction": function}
    path = write(tmp_path / "a.dcm", RAMP, PhotometricInterpretation=photometric, **tags)
    stored = pydicom.dcmread(path)
    theirs = pydicom.pixels.apply_windowing(stored.pixel_array, stored) / 65535  # its output range is 16 bits
    expected = 1 - theirs if photometric == "MONOCHROME1" else theirs
    np.testing.assert_allclose(read_image(path, reading=Reading(dicom_window=True)), expected, atol=1e-6)


def test_a_look_up_table_is_a_window_too(tmp_path: Path) -> None:
    table = Dataset()
    table.LUTDescriptor = [2000, 0, 12]
    table.LUTData = [min(4095, 3 * i) for i in range(2000)]
    table["LUTDescriptor"].VR = table["LUTData"].VR = "US"
    path = write(tmp_path / "a.dcm", RAMP, VOILUTSequence=[table])
    windowed = read_image(path, reading=Reading(dicom_window=True))
    np.testing.assert_allclose(windowed, (3.0 * RAMP).clip(max=4095) / 4095, rtol=1e-6)


def test_a_file_without_a_window_is_refused_where_one_is_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm", RAMP)
    with pytest.raises(DataError, match=r"a\.dcm: states no window"):
        read_image(path, reading=Reading(dicom_window=True))


def test_spacing_is_that_of_the_patient_where_the_file_knows_it(tmp_path: Path) -> None:
    assert pixel_spacing(write(tmp_path / "none.dcm", RAMP)) is None
    assert pixel_spacing(write(tmp_path / "ct.dcm", RAMP, PixelSpacing=[0.5, 0.25])) == (0.5, 0.25)
    assert pixel_spacing(write(tmp_path / "dx.dcm", RAMP, ImagerPixelSpacing=[0.2, 0.1])) == (0.2, 0.1)
    enlarged = {"ImagerPixelSpacing": [0.2, 0.1], "EstimatedRadiographicMagnificationFactor": 2}
    assert pixel_spacing(write(tmp_path / "mg.dcm", RAMP, **enlarged)) == (0.1, 0.05)
    region = Dataset()
    region.PhysicalUnitsXDirection = region.PhysicalUnitsYDirection = 3  # cm
    region.PhysicalDeltaX, region.PhysicalDeltaY = 0.01, -0.02
    assert pixel_spacing(write(tmp_path / "us.dcm", RAMP, SequenceOfUltrasoundRegions=[region])) == (0.2, 0.1)


# ---------------------------------------------------------------------------------------------- several frames


def test_a_clip_is_read_frame_by_frame_and_is_not_turned(tmp_path: Path) -> None:
    frames = noise(3, 4, 5, dtype=np.uint8, high=256)
    path = write(tmp_path / "cine.dcm", frames, NumberOfFrames=3)
    assert is_volume(path)
    for reading in (STORED, Reading(), Reading(slice_axis="x")):
        assert count_frames(path, reading=reading) == 3
        np.testing.assert_array_equal(read_image(path, 2, reading=reading), frames[2])
    assert pixel_spacing(path) is None
    assert not read_oriented(path, Reading()).in_space
    with pytest.raises(DataError, match="holds 3 frames and none was chosen"):
        read_image(path)


def test_a_clip_in_colours_keeps_them(tmp_path: Path) -> None:
    frames = noise(2, 4, 5, 3, dtype=np.uint8, high=256)
    path = write(tmp_path / "cine.dcm", frames, NumberOfFrames=2)
    np.testing.assert_array_equal(read_image(path, 1), frames[1])
    with pytest.raises(DataError, match="leaves no channels"):
        read_image(path, 1, reading=Reading(neighbouring_slices=True))


def enhanced(path: Path, voxels: np.ndarray, positions: Sequence[Sequence[float]], **rescale: Any) -> Path:
    """Frame ``i`` of an enhanced file is slice ``i`` of ``voxels`` at ``positions[i]``."""

    def group(name: str, **tags: Any) -> Dataset:
        item, outer = Dataset(), Dataset()
        for tag, value in tags.items():
            setattr(item, tag, value)
        setattr(outer, name, [item])
        return outer

    shared = group("PixelMeasuresSequence", PixelSpacing=[0.5, 0.25], SliceThickness=9)
    shared.update(group("PlaneOrientationSequence", ImageOrientationPatient=AXIAL))
    frames = []
    for index, position in enumerate(positions):
        frame = group("PlanePositionSequence", ImagePositionPatient=[float(value) for value in position])
        frame.update(
            group("PixelValueTransformationSequence", **{name: values[index] for name, values in rescale.items()})
        )
        frames.append(frame)
    return write(
        path,
        voxels,
        SOPClassUID=uids.EnhancedMRImageStorage,
        NumberOfFrames=len(voxels),
        SharedFunctionalGroupsSequence=[shared],
        PerFrameFunctionalGroupsSequence=frames,
    )


def test_an_enhanced_file_is_a_volume_whatever_the_order_of_its_frames(tmp_path: Path) -> None:
    voxels = noise(4, 4, 5)
    order = [2, 0, 3, 1]  # frame i is slice order[i]
    positions = [(-1, -2, 10 + 3 * k) for k in order]
    rescale = {"RescaleSlope": [k + 1 for k in order], "RescaleIntercept": [-k for k in order]}
    path = enhanced(tmp_path / "a.dcm", voxels[order], positions, **rescale)
    read, geometry = read_volume(path)
    np.testing.assert_array_equal(read, voxels * np.arange(1, 5)[:, None, None] - np.arange(4)[:, None, None])
    assert geometry.spacing_mm == (0.25, 0.5, 3.0)
    assert geometry.origin == (-1, -2, 10)
    assert dicom.frame_order(path) == [1, 3, 0, 2]  # slice 0 is frame 1, ...
    assert count_frames(path, reading=Reading(slice_axis="x")) == 5


def test_frames_that_all_lie_in_one_place_follow_each_other_in_time(tmp_path: Path) -> None:
    voxels = noise(3, 4, 5)
    path = enhanced(tmp_path / "a.dcm", voxels, [(0, 0, 0)] * 3)
    np.testing.assert_array_equal(read_volume(path)[0], voxels)
    assert pixel_spacing(path) == (0.5, 0.25)
    assert not read_oriented(path, Reading()).in_space


def test_an_enhanced_file_with_a_missing_slice_is_refused(tmp_path: Path) -> None:
    path = enhanced(tmp_path / "a.dcm", noise(4, 4, 5), [(0, 0, z) for z in (0, 2, 4, 8)])
    with pytest.raises(DataError, match=r"a\.dcm: 1 slices are missing, the first after slice 3 of 4"):
        read_volume(path)


# ---------------------------------------------------------------------------------------------- which files


def test_series_are_found_in_a_tree_and_other_objects_passed_over(tmp_path: Path) -> None:
    write_series(tmp_path / "study" / "ct", noise(3, 4, 5))
    write_series(tmp_path / "study" / "mr", noise(2, 4, 5))
    write(tmp_path / "xray" / "a.dcm", RAMP, SeriesInstanceUID="1.2.3", InstanceNumber=2)
    write(tmp_path / "xray" / "b.dcm", RAMP, SeriesInstanceUID="1.2.3", InstanceNumber=1)
    (tmp_path / "xray" / "notes.txt").write_text("no image")
    report = dataset(RAMP, SOPClassUID=uids.BasicTextSRStorage, SeriesInstanceUID="1.9")
    del report.Rows, report.PixelData
    report.save_as(tmp_path / "xray" / "report.dcm", enforce_file_format=True)
    found = {series.folder.name: series for series in dicom.find_series(tmp_path)}
    assert {name: len(series.files) for name, series in found.items()} == {"ct": 3, "mr": 2, "xray": 2}
    assert {name: series.is_volume for name, series in found.items()} == {"ct": True, "mr": True, "xray": False}
    assert [path.name for path in found["xray"].files] == ["b.dcm", "a.dcm"]
    np.testing.assert_array_equal(dicom.read_series(found["mr"])[0], noise(2, 4, 5))
    assert [is_volume(tmp_path / name) for name in ("study", "study/ct", "xray")] == [False, True, False]
    assert image_stem(tmp_path / "study" / "ct") == "ct"
    with pytest.raises(DataError, match="is a folder, and not one of DICOM slices"):
        read_image(tmp_path / "xray")


def test_groups_are_the_ids_that_the_files_state(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "scan", noise(2, 4, 5), StudyInstanceUID="1.2.3", SeriesInstanceUID="1.2.4")
    levels = {level: dicom.dicom_group(folder, level) for level in ("patient", "study", "series")}
    assert levels == {"patient": SECRET, "study": "1.2.3", "series": "1.2.4"}
    assert dicom.dicom_group(folder / "image1") == SECRET
    assert dicom.dicom_group(write(tmp_path / "a.dcm", RAMP, PatientID="")) is None
    Image.fromarray(RAMP).save(tmp_path / "a.png")
    assert dicom.dicom_group(tmp_path / "a.png") is None


# ---------------------------------------------------------------------------------------------- refusals


OTHER_OBJECTS = {
    "SegmentationStorage": "is a DICOM segmentation, which is written but not read here",
    "RTStructureSetStorage": "is a DICOM object of the kind RT Structure Set Storage and holds no image",
    "BasicTextSRStorage": "is a DICOM object of the kind Basic Text SR Storage and holds no image",
    "MediaStorageDirectoryStorage": "is a DICOMDIR, a list of files",
}


@pytest.mark.parametrize("kind", OTHER_OBJECTS)
def test_a_dicom_object_that_is_no_image_is_called_by_its_name(tmp_path: Path, kind: str) -> None:
    made = dataset(RAMP, SOPClassUID=getattr(uids, kind))
    if kind != "SegmentationStorage":
        del made.Rows, made.Columns, made.PixelData
    path = tmp_path / "a.dcm"
    made.save_as(path, enforce_file_format=True)
    for function in (read_image, read_mask, count_frames, check_image, read_volume, pixel_spacing):
        with pytest.raises(DataError) as caught:
            function(path)
        assert OTHER_OBJECTS[kind] in str(caught.value)


BROKEN: dict[str, dict[str, Any]] = {
    "the image has more than": {"Rows": 30_000, "Columns": 30_000},
    "more than its": {"NumberOfFrames": 4000},
    "at most 1,073,741,824 voxels": {"NumberOfFrames": 2_000_000_000},
    "the pixel spacing is nan x 1 mm": {"PixelSpacing": ["nan", 1.0]},
    "the pixel spacing is 0 x 1 mm": {"PixelSpacing": [0.0, 1.0]},
    "the pixel spacing is -1 x 1 mm": {"PixelSpacing": [-1.0, 1.0]},
    "is no pair of perpendicular directions": {"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]},
    "is no proper number": {"RescaleSlope": "inf"},
    "bits a pixel": {"BitsAllocated": 12},
    "with 2 channels": {"SamplesPerPixel": 2},
    "cannot be read": {"BitsStored": "x"},
}


@pytest.mark.parametrize("expected", BROKEN)
def test_a_broken_header_is_one_sentence_without_the_patient(tmp_path: Path, expected: str) -> None:
    with pydicom.config.disable_value_validation():
        made = dataset(RAMP)
        if expected == "the image has more than":  # as many bytes as it says would be a slow test
            made.file_meta.TransferSyntaxUID = uids.JPEG2000Lossless
            made.PixelData = pydicom.encaps.encapsulate([b"\0" * 64])
        for name, value in BROKEN[expected].items():
            if value == "x":
                made.add(pydicom.dataelem.DataElement(name, "LO", "x"))
            else:
                setattr(made, name, value)
        made.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    with pytest.raises(DataError) as caught:
        read_image(tmp_path / "a.dcm")
    message = str(caught.value)
    assert expected in message
    assert message.startswith(f"{tmp_path / 'a.dcm'}: ")
    assert "\n" not in message
    assert SECRET not in message


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("syntax", [None, *COMPRESSED], ids=lambda syntax: COMPRESSED.get(syntax, "native"))
def test_a_cut_off_dicom_file_is_refused(tmp_path: Path, syntax: str | None, share: float) -> None:
    path = write(tmp_path / "a.dcm", noise(64, 64, dtype=np.uint8, high=256))
    if syntax:
        compress(path, syntax)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(DataError) as caught:
        read_image(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("offset", "byte"), [(4, 84), (5, 255), (7, 255), (9, 3)])  # bits, rows, columns, channels
@pytest.mark.parametrize("syntax", [uids.JPEGLosslessSV1, uids.JPEGLSLossless], ids=COMPRESSED.get)
def test_a_jpeg_that_contradicts_its_file_never_reaches_a_decoder(
    tmp_path: Path, syntax: str, offset: int, byte: int
) -> None:
    path = compress(write(tmp_path / "a.dcm", noise(16, 12, dtype=np.uint16)), syntax)
    content = bytearray(path.read_bytes())
    at = content.index(b"\xff\xc3\x00\x0b" if syntax == uids.JPEGLosslessSV1 else b"\xff\xf7\x00\x0b")
    content[at + offset] = byte
    path.write_bytes(content)
    with pytest.raises(DataError, match="unlike the header"):
        read_image(path)


def test_a_file_with_the_suffix_alone_is_no_dicom(tmp_path: Path) -> None:
    (tmp_path / "a.dcm").write_bytes(b"no preamble" * 50)
    with pytest.raises(DataError, match=r"a\.dcm: is no DICOM file"):
        read_image(tmp_path / "a.dcm")


def test_a_deflated_file_is_refused_before_it_is_inflated(tmp_path: Path) -> None:
    made = dataset(RAMP)
    made.file_meta.TransferSyntaxUID = uids.DeflatedExplicitVRLittleEndian
    made.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    with pytest.raises(DataError, match=r"a\.dcm: is stored deflated"):
        read_image(tmp_path / "a.dcm")


def test_without_pydicom_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.dcm", RAMP)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(MissingExtraError, match=r'pip install "leafseg\[dicom\]"'):
        read_image(path)
