"""Reading and writing of images, masks and volumes; expected pixels are the ones that were put in."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from leafseg.data import images
from leafseg.data.images import (
    check_image,
    count_frames,
    image_stem,
    pixel_spacing,
    read_image,
    read_mask,
    read_volume,
    write_png,
    write_volume,
)
from leafseg.errors import DataError
from leafseg.files import atomic_path, write_json_atomic

IDENTITY = (1, 0, 0, 0, 1, 0, 0, 0, 1)
GREY = np.arange(12, dtype=np.uint8).reshape(3, 4)
RGB = np.arange(36, dtype=np.uint8).reshape(3, 4, 3)


def save(path: Path, array: np.ndarray, mode: str | None = None, **options: object) -> Path:
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp"])
def test_grey_and_colour_pixels_come_back_as_they_were_written(tmp_path: Path, suffix: str) -> None:
    for array in (GREY, RGB):
        read = read_image(save(tmp_path / f"a.{suffix}", array))
        assert read.dtype == np.uint8
        np.testing.assert_array_equal(read, array)


def test_a_jpeg_is_read_close_to_what_was_written(tmp_path: Path) -> None:
    flat = np.full((16, 24, 3), 90, np.uint8)
    read = read_image(save(tmp_path / "a.jpg", flat, quality=95))
    assert read.shape == flat.shape
    assert np.abs(read.astype(int) - 90).max() <= 2


def test_alpha_is_dropped_and_colours_stay(tmp_path: Path) -> None:
    alpha = np.full((3, 4, 1), 7, np.uint8)
    np.testing.assert_array_equal(read_image(save(tmp_path / "a.png", np.concatenate([RGB, alpha], 2))), RGB)
    grey_alpha = np.stack([GREY, alpha[..., 0]], 2)
    Image.frombytes("LA", (4, 3), grey_alpha.tobytes()).save(tmp_path / "b.png")
    np.testing.assert_array_equal(read_image(tmp_path / "b.png"), GREY)


def palette_file(path: Path) -> np.ndarray:
    """Index 0 is black, 1 red, 2 green; returns the indices."""
    indices = np.array([[0, 1], [2, 1]], np.uint8)
    image = Image.fromarray(indices).convert("P")
    image.putdata(indices.ravel().tolist())
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    image.save(path)
    return indices


def test_a_palette_is_colours_in_an_image_and_indices_in_a_mask(tmp_path: Path) -> None:
    indices = palette_file(tmp_path / "a.png")
    colours = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0]])
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), colours[indices])
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), indices)


def test_a_one_bit_file_is_0_and_255_as_an_image_and_0_and_1_as_a_mask(tmp_path: Path) -> None:
    bits = np.array([[True, False], [False, True]])
    Image.fromarray(bits).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), bits * 255)
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), bits * 1)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bit_grey_keeps_every_bit(tmp_path: Path, suffix: str) -> None:
    deep = np.array([[0, 1, 256], [4095, 40_000, 65_535]], np.uint16)
    read = read_image(save(tmp_path / f"a.{suffix}", deep))
    assert read.dtype == np.uint16
    np.testing.assert_array_equal(read, deep)


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.float32, np.float64, np.uint32])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_deep_tiffs_keep_type_and_values(tmp_path: Path, dtype: type, channels: int) -> None:
    array = (np.arange(5 * 6 * channels).reshape(5, 6, channels) * 100).astype(dtype)
    array = array[..., 0] if channels == 1 else array
    options = {} if channels == 1 else {"photometric": "rgb"}
    if channels == 4:
        options["extrasamples"] = ["unassalpha"]
    tifffile.imwrite(tmp_path / "a.tif", array, **options)
    read = read_image(tmp_path / "a.tif")
    assert read.dtype == dtype
    np.testing.assert_array_equal(read, array[..., :3] if channels > 1 else array)


def test_a_planar_tiff_is_read_as_an_interleaved_one(tmp_path: Path) -> None:
    deep = RGB.astype(np.uint16) * 1000
    tifffile.imwrite(tmp_path / "a.tif", np.moveaxis(deep, 2, 0), photometric="rgb", planarconfig="separate")
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), deep)


# What each EXIF orientation asks for, in NumPy's words.
UPRIGHT = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: np.swapaxes(a, 0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.swapaxes(np.rot90(a, 2), 0, 1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif", "deep.tif"])
def test_exif_orientation_is_applied_to_image_and_mask(tmp_path: Path, orientation: int, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    if suffix == "deep.tif":
        stored = GREY.astype(np.int16)
        tifffile.imwrite(path, stored, extratags=[(274, "H", 1, orientation, True)])
    else:
        stored = GREY
        exif = Image.Exif()
        exif[0x0112] = orientation
        save(path, stored, exif=exif)
    expected = UPRIGHT[orientation](stored)
    np.testing.assert_array_equal(read_image(path), expected)
    np.testing.assert_array_equal(read_mask(path), expected)
    assert check_image(path) == expected.shape


def test_the_cheap_check_of_a_turned_jpeg_gives_its_upright_size(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "a.jpg", np.zeros((40, 72), np.uint8), exif=exif)
    assert check_image(tmp_path / "a.jpg") == read_image(tmp_path / "a.jpg").shape == (72, 40)


def test_pages_of_a_tiff_are_read_by_frame(tmp_path: Path) -> None:
    pages = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    tifffile.imwrite(tmp_path / "a.tif", pages, photometric="minisblack")
    assert count_frames(tmp_path / "a.tif") == 2
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif", 1), pages[1])
    np.testing.assert_array_equal(read_mask(tmp_path / "a.tif", 0), pages[0])
    with pytest.raises(DataError, match=r"a\.tif: the file holds 2 frames and none was chosen"):
        read_image(tmp_path / "a.tif")


def test_a_plain_file_has_no_frames(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", GREY)
    assert count_frames(path) is None
    np.testing.assert_array_equal(read_image(path, 0), GREY)


@pytest.mark.parametrize("suffix", ["nii", "nii.gz", "mha", "nrrd"])
def test_a_volume_and_its_grid_survive_writing_and_reading(tmp_path: Path, suffix: str) -> None:
    voxels = np.arange(24, dtype=np.int16).reshape(2, 3, 4) - 7
    geometry = images.Geometry((4, 3, 2), (0.5, 0.75, 3.0), (-10.0, 20.0, 5.5), (0, 1, 0, 1, 0, 0, 0, 0, -1))
    path = tmp_path / f"v.{suffix}"
    write_volume(path, voxels, geometry)
    read, found = read_volume(path)
    assert read.dtype == np.int16
    np.testing.assert_array_equal(read, voxels)
    np.testing.assert_allclose(found.affine, geometry.affine, atol=1e-5)
    assert found.size == geometry.size
    assert count_frames(path) == 2
    np.testing.assert_array_equal(read_image(path, 1, reading=images.STORED), voxels[1])
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert image_stem(path) == "v"


def test_the_affine_maps_indices_to_the_positions_that_itk_gives(tmp_path: Path) -> None:
    image = SimpleITK.Image([4, 3, 2], SimpleITK.sitkUInt8)
    image.SetSpacing((0.5, 0.75, 3.0))
    image.SetOrigin((1.0, 2.0, 3.0))
    image.SetDirection((0, -1, 0, 1, 0, 0, 0, 0, 1))
    SimpleITK.WriteImage(image, str(tmp_path / "v.mha"))
    _, geometry = read_volume(tmp_path / "v.mha")
    np.testing.assert_allclose(
        geometry.affine @ [3, 2, 1, 1], [*image.TransformIndexToPhysicalPoint((3, 2, 1)), 1.0], rtol=1e-12
    )


def test_a_changed_volume_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "v.mha"
    geometry = images.Geometry((2, 2, 1), (1, 1, 1), (0, 0, 0), (1, 0, 0, 0, 1, 0, 0, 0, 1))
    for value in (1, 2):
        write_volume(path, np.full((1, 2, 2), value, np.uint8), geometry)
        os.utime(path, ns=(value, value))
        assert read_volume(path)[0].max() == value


def test_a_slice_can_be_changed_without_changing_the_cached_volume(tmp_path: Path) -> None:
    path = tmp_path / "v.mha"
    geometry = images.Geometry((2, 2, 1), (1, 1, 1), (0, 0, 0), (1, 0, 0, 0, 1, 0, 0, 0, 1))
    write_volume(path, np.zeros((1, 2, 2), np.uint8), geometry)
    read_image(path, 0)[:] = 9
    assert read_image(path, 0).max() == 0


def test_a_grey_mask_saved_in_colours_is_accepted_and_a_coloured_one_is_not(tmp_path: Path) -> None:
    same = np.repeat(GREY[..., None], 3, axis=2)
    np.testing.assert_array_equal(read_mask(save(tmp_path / "a.png", same)), GREY)
    with pytest.raises(DataError, match=r"b\.png: the mask is in colours"):
        read_mask(save(tmp_path / "b.png", RGB))


def test_whole_numbers_in_a_float_mask_are_accepted_and_others_are_not(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.array([[0.0, 3.0]], np.float32))
    mask = read_mask(tmp_path / "a.tif")
    assert mask.dtype == np.int64
    assert mask.tolist() == [[0, 3]]
    for value in (0.5, np.nan, np.inf):
        tifffile.imwrite(tmp_path / "b.tif", np.array([[0.0, value]], np.float32))
        with pytest.raises(DataError, match=r"b\.tif: the mask holds broken numbers"):
            read_mask(tmp_path / "b.tif")


@given(st.data())
@settings(deadline=None)
def test_a_png_gives_back_what_was_written(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    kind = data.draw(st.sampled_from([((), np.uint8), ((3,), np.uint8), ((), np.uint16)]))
    generator = np.random.default_rng(data.draw(st.integers(0, 99)))
    array = generator.integers(0, np.iinfo(kind[1]).max + 1, (height, width, *kind[0])).astype(kind[1])
    path = tmp_path_factory.mktemp("png") / "a.png"
    write_png(path, array)
    read = read_image(path)
    assert read.dtype == array.dtype
    np.testing.assert_array_equal(read, array)


BAD_FILES = {
    "empty.png": b"",
    "text.png": b"this is no image at all",
    "text.tif": b"II*\0 broken",
    "text.nii.gz": b"this is no volume",
    "text.mha": b"this is no volume",
    "postscript.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_is_no_image_is_named_in_one_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(BAD_FILES[name])
    for function in (read_image, read_mask, count_frames, check_image):
        with pytest.raises(DataError) as caught:
            function(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "deep.tif", "bmp", "nii", "nii.gz", "mha", "nrrd"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_cut_off_file_is_refused(tmp_path: Path, suffix: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (60, 70)).astype(np.uint8)
    path = tmp_path / f"a.{suffix}"
    if suffix == "deep.tif":
        tifffile.imwrite(path, noise.astype(np.int16))
    elif suffix in ("png", "jpg", "tif", "bmp"):
        save(path, noise)
    else:
        geometry = images.Geometry((70, 60, 1), (1, 1, 1), (0, 0, 0), (1, 0, 0, 0, 1, 0, 0, 0, 1))
        write_volume(path, noise[None], geometry)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    for function in (read_image, check_image):
        with pytest.raises(DataError, match=r"copy or export it again|is not an image"):
            function(path, None)


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.png: no such file"):
        read_image(tmp_path / "none.png")
    with pytest.raises(DataError, match="is a folder"):
        read_image(tmp_path)
    with pytest.raises(DataError, match=r"none\.mha: no such file"):
        read_volume(tmp_path / "none.mha")


@pytest.mark.parametrize("frame", [-1, 1, 99])
def test_a_frame_that_is_not_there_is_refused(tmp_path: Path, frame: int) -> None:
    path = save(tmp_path / "a.png", GREY)
    with pytest.raises(DataError, match=rf"a\.png: frame is {frame}, the file holds 1"):
        read_image(path, frame)


def test_giant_dimensions_are_refused_before_memory_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    Image.new("1", (20_000, 20_000)).save(path)  # 400 million pixels in 50 kB
    for function in (read_image, read_mask, check_image):
        with pytest.raises(DataError, match=r"bomb\.png: the image has more than"):
            function(path)
    header = tmp_path / "bomb.mha"
    header.write_text(
        "ObjectType = Image\nNDims = 3\nDimSize = 90000 90000 9000\nElementType = MET_UCHAR\nElementDataFile = LOCAL\n"
    )
    with pytest.raises(DataError, match=r"bomb\.mha: the volume is 90000x90000x9000"):
        read_volume(header)


def test_a_volume_of_colours_or_of_times_is_refused(tmp_path: Path) -> None:
    SimpleITK.WriteImage(SimpleITK.Image([4, 3, 2], SimpleITK.sitkVectorUInt8, 3), str(tmp_path / "rgb.mha"))
    SimpleITK.WriteImage(SimpleITK.Image([4, 3, 2, 5], SimpleITK.sitkUInt8), str(tmp_path / "time.nii"))
    for name in ("rgb.mha", "time.nii"):
        with pytest.raises(DataError, match=name):
            read_volume(tmp_path / name)


# Where the number stands in a NIfTI header: pixdim[1], and the third entry of srow_x.
@pytest.mark.parametrize(
    ("offset", "value"), [(80, "nan"), (80, "inf"), (80, "0"), (80, "-2"), (288, "nan"), (288, "inf")]
)
@pytest.mark.parametrize("suffix", ["nii", "nii.gz"])
def test_a_nifti_whose_grid_is_no_number_is_refused(tmp_path: Path, suffix: str, offset: int, value: str) -> None:
    path = tmp_path / "v.nii"
    write_volume(path, np.ones((2, 3, 4), np.uint8), images.Geometry((4, 3, 2), (1, 1, 1), (0, 0, 0), IDENTITY))
    content = bytearray(path.read_bytes())
    content[offset : offset + 4] = np.float32(value).tobytes()
    path = tmp_path / f"v.{suffix}"
    path.write_bytes(content if suffix == "nii" else gzip.compress(content))
    for function in (read_volume, count_frames, pixel_spacing):
        with pytest.raises(DataError, match=r"must be positive|is no number|proper directions") as caught:
            function(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "line", ["ElementSpacing = 1 0 1", "ElementSpacing = 1 nan 1", "TransformMatrix = 1 0 0 1 0 0 0 0 1"]
)
def test_a_volume_without_a_proper_grid_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "v.mha"
    key = line.split(" = ")[0]
    header = [
        "ObjectType = Image", "NDims = 3", "BinaryData = True", "CompressedData = False",
        "TransformMatrix = 1 0 0 0 1 0 0 0 1", "Offset = 0 0 0", "ElementSpacing = 1 1 1", "DimSize = 4 3 2",
        "ElementType = MET_UCHAR", "ElementDataFile = LOCAL",
    ]  # fmt: skip
    text = "\n".join(line if entry.startswith(key) else entry for entry in header)
    path.write_bytes(text.encode() + b"\n" + bytes(24))
    with pytest.raises(DataError, match=r"v\.mha: .*(spacing|directions|cannot be read)"):
        read_volume(path)


def test_a_compressed_file_that_unpacks_to_more_than_it_states_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "v.nii"
    write_volume(path, np.ones((2, 3, 4), np.uint8), images.Geometry((4, 3, 2), (1, 1, 1), (0, 0, 0), IDENTITY))
    with gzip.open(tmp_path / "v.nii.gz", "wb") as stream:
        stream.write(path.read_bytes() + bytes(2**24 + 2**20))
    with pytest.raises(DataError, match=r"v\.nii\.gz: unpacks to more than the 24 bytes that its header states"):
        read_volume(tmp_path / "v.nii.gz")


def test_a_header_that_states_more_voxels_than_the_file_can_hold_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "v.nrrd"
    path.write_bytes(
        b"NRRD0004\ntype: float\ndimension: 3\nsizes: 1000 1000 1000\nencoding: gzip\nendian: little\n\n" + b"0" * 99
    )
    for function in (read_volume, count_frames):
        with pytest.raises(DataError, match=r"v\.nrrd: cannot be read \(4,000,000,000 bytes of voxels"):
            function(path)


def test_writing_onto_another_grid_is_refused(tmp_path: Path) -> None:
    geometry = images.Geometry((4, 3, 2), (1, 1, 1), (0, 0, 0), (1, 0, 0, 0, 1, 0, 0, 0, 1))
    with pytest.raises(DataError, match=r"v\.mha: array is 4x3x2, its grid is 2x3x4"):
        write_volume(tmp_path / "v.mha", np.zeros((4, 3, 2), np.uint8), geometry)


def test_a_write_that_the_system_refuses_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("I am no folder")
    for write in (lambda path: write_png(path, GREY), lambda path: write_json_atomic(path, {})):
        with pytest.raises(DataError, match=r"a\.png: cannot be written"):
            write(tmp_path / "file" / "a.png")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    with (
        pytest.raises(DataError, match=r"a\.txt: cannot be written \(No space left"),
        atomic_path(tmp_path / "a.txt"),
        Path("/dev/full").open("w") as full,
    ):
        full.write("x")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_previous_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("before")

    def fail() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
