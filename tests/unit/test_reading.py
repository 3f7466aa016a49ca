"""How volumes are turned, cut and brought to 0..1: expected values by hand, or from ITK's own reorientation."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from leafseg.config import DataSettings, PreprocessingSettings
from leafseg.data import images
from leafseg.data.geometry import Geometry, Grid, Slicing, Volume, slicing
from leafseg.data.images import (
    STORED,
    Reading,
    check_image,
    count_frames,
    pixel_spacing,
    read_image,
    read_mask,
    read_oriented,
    read_volume,
    write_volume,
)
from leafseg.data.manifest import load_manifest, read_labels
from leafseg.data.transforms import Preprocessor
from leafseg.errors import DataError

IDENTITY = (1, 0, 0, 0, 1, 0, 0, 0, 1)
READINGS = [Reading(o, a) for o in ("LPS", "stored") for a in ("z", "y", "x")]


def volume_file(path: Path, voxels: np.ndarray, direction: tuple[float, ...] = IDENTITY, **grid: object) -> Path:
    geometry = {"spacing_mm": (1.0, 1.0, 1.0), "origin": (0.0, 0.0, 0.0), **grid}
    write_volume(path, voxels, Geometry(voxels.shape[::-1], direction=direction, **geometry))
    return path


def preprocessor(**options: object) -> Preprocessor:
    return Preprocessor(PreprocessingSettings(**{"size": (16, 16), **options}))


# ---------------------------------------------------------------------------------------------- turning and cutting


def test_a_volume_stored_right_anterior_superior_is_turned_by_hand(tmp_path: Path) -> None:
    # NIfTI's usual storage: x runs to the right, y to the front, z to the head. To L and P both are reversed.
    voxels = np.arange(24).reshape(2, 3, 4).astype(np.int16)
    path = volume_file(tmp_path / "v.mha", voxels, (-1, 0, 0, 0, -1, 0, 0, 0, 1), spacing_mm=(0.5, 0.75, 3.0))
    np.testing.assert_array_equal(read_image(path, 0), voxels[0, ::-1, ::-1])
    np.testing.assert_array_equal(read_image(path, 0, reading=STORED), voxels[0])
    # Coronal: from front to back (y reversed), the head on top (z reversed), the patient's right at the left.
    coronal = read_image(path, 0, reading=Reading(slice_axis="y"))
    np.testing.assert_array_equal(coronal, voxels[::-1, -1, ::-1])
    # Sagittal: from right to left, the head on top, the front at the left.
    sagittal = read_image(path, 1, reading=Reading(slice_axis="x"))
    np.testing.assert_array_equal(sagittal, voxels[::-1, ::-1, -2])
    assert [count_frames(path, reading=Reading(slice_axis=a)) for a in "zyx"] == [2, 3, 4]
    # (row, column) of z, y and x slices: (y, x), (z, x), (z, y).
    spacings = [pixel_spacing(path, reading=Reading(slice_axis=a)) for a in "zyx"]
    assert spacings == [(0.75, 0.5), (3.0, 0.5), (3.0, 0.75)]
    assert spacings == [read_oriented(path, Reading(slice_axis=a)).spacing_mm for a in "zyx"]


def test_a_stored_volume_is_cut_without_any_flip(tmp_path: Path) -> None:
    voxels = np.arange(24).reshape(2, 3, 4).astype(np.int16)
    path = volume_file(tmp_path / "v.mha", voxels, (0, 0, -1, 1, 0, 0, 0, -1, 0))
    np.testing.assert_array_equal(read_image(path, 1, reading=Reading("stored", "y")), voxels[:, 1])
    np.testing.assert_array_equal(read_image(path, 1, reading=Reading("stored", "x")), voxels[:, :, 1])


def directions() -> list[tuple[float, ...]]:
    """All 48 ways in which three axes can lie along L, P and S, forwards or backwards; half of them mirror."""
    found = []
    for axes in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            matrix = np.zeros((3, 3))
            for column, (axis, sign) in enumerate(zip(axes, signs, strict=True)):
                matrix[axis, column] = sign
            found.append(tuple(matrix.ravel()))
    return found


@pytest.mark.parametrize("direction", directions())
def test_itk_turns_every_axis_order_and_direction_to_the_same_slices(direction: tuple[float, ...]) -> None:
    voxels = np.arange(60).reshape(3, 4, 5)
    image = SimpleITK.GetImageFromArray(voxels)
    image.SetSpacing((0.5, 0.75, 3.0))
    image.SetOrigin((-10, 20, 30))
    image.SetDirection(direction)
    theirs = SimpleITK.DICOMOrient(image, "LPS")
    geometry = Geometry((5, 4, 3), (0.5, 0.75, 3.0), (-10, 20, 30), direction)
    cut = slicing(geometry, Reading())
    np.testing.assert_array_equal(cut.apply(voxels), SimpleITK.GetArrayFromImage(theirs))
    affine = cut.affine(geometry)
    np.testing.assert_allclose(affine[:3, 3], theirs.GetOrigin(), atol=1e-9)
    np.testing.assert_allclose(affine[:3, :3], np.diag(theirs.GetSpacing()), atol=1e-9)


@given(st.integers(0, 2**16), st.sampled_from(READINGS), st.tuples(*[st.integers(1, 4)] * 3))
@settings(deadline=None)
def test_labels_go_back_to_the_voxels_that_they_came_from(seed: int, reading: Reading, shape: tuple[int, ...]) -> None:
    generator = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(generator.normal(size=(3, 3)))  # any oblique, perhaps mirrored direction
    spacing, origin = generator.uniform(0.2, 5, 3), generator.normal(0, 50, 3)
    voxels = generator.integers(0, 99, shape)
    geometry = Geometry(shape[::-1], tuple(spacing), tuple(origin), tuple(rotation.ravel()))
    cut = slicing(geometry, reading)
    slices = cut.apply(voxels)
    np.testing.assert_array_equal(cut.undo(slices), voxels)
    # A voxel lies where its slice, row and column say: the position is carried as an image of its own.
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), -1)[..., ::-1]  # (x, y, z)
    places = grid @ geometry.affine[:3, :3].T + geometry.affine[:3, 3]
    turned = cut.apply(places)
    index = np.stack(np.meshgrid(*(np.arange(n) for n in slices.shape), indexing="ij"), -1)[..., ::-1]
    expected = index @ cut.affine(geometry)[:3, :3].T + cut.affine(geometry)[:3, 3]
    np.testing.assert_allclose(turned, expected, atol=1e-9)


@pytest.mark.parametrize("axis", ["z", "y", "x"])
def test_oblique_axes_go_to_the_nearest_ones_and_nothing_is_resampled(tmp_path: Path, axis: str) -> None:
    angle = np.radians(30)
    c, s = float(np.cos(angle)), float(np.sin(angle))
    voxels = np.random.default_rng(0).normal(size=(3, 4, 5))
    # Rotated by 30 degrees about z, then x reversed: x is nearest to -L, y to P.
    path = volume_file(tmp_path / "v.mha", voxels, (-c, -s, 0, -s, c, 0, 0, 0, 1))
    oriented = read_oriented(path, Reading(slice_axis=axis))
    expected = {"z": voxels[:, :, ::-1], "y": voxels[::-1, :, ::-1].transpose(1, 0, 2)}
    expected["x"] = voxels[::-1, :, ::-1].transpose(2, 0, 1)
    np.testing.assert_array_equal(oriented.voxels, expected[axis])
    np.testing.assert_array_equal(oriented.labels_to_stored(oriented.voxels), voxels)
    assert oriented.slices == len(expected[axis])


def test_labels_of_another_shape_are_not_put_back(tmp_path: Path) -> None:
    oriented = read_oriented(volume_file(tmp_path / "v.mha", np.zeros((2, 3, 4), np.uint8)), Reading(slice_axis="x"))
    with pytest.raises(ValueError, match="labels are 2x3x4; the slices are 4x2x3"):
        oriented.labels_to_stored(np.zeros((2, 3, 4)))


def test_neighbouring_slices_are_channels_and_the_first_and_last_are_repeated(tmp_path: Path) -> None:
    voxels = np.arange(24).reshape(4, 2, 3).astype(np.int16)
    path = volume_file(tmp_path / "v.mha", voxels)
    reading = Reading(neighbouring_slices=True)
    for frame, around in ((0, (0, 0, 1)), (1, (0, 1, 2)), (3, (2, 3, 3))):
        np.testing.assert_array_equal(
            read_image(path, frame, reading=reading), np.moveaxis(voxels[list(around)], 0, -1)
        )
    assert check_image(path, 2, reading=reading) == (2, 3)
    np.testing.assert_array_equal(read_mask(path, 2, reading=reading), voxels[2])


def test_flat_files_know_nothing_of_readings(tmp_path: Path) -> None:
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    Image.fromarray(grey).save(tmp_path / "a.png")
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(grey), str(tmp_path / "a.mha"))
    reading = Reading(slice_axis="x", neighbouring_slices=True, dicom_window=True)
    for name in ("a.png", "a.mha"):
        np.testing.assert_array_equal(read_image(tmp_path / name, reading=reading), grey)
        assert count_frames(tmp_path / name, reading=reading) is None


# ---------------------------------------------------------------------------------------------- spacing of flat files


@pytest.mark.parametrize(("unit", "mm"), [("µm", 0.001), ("mm", 1.0), ("nm", 1e-6), (None, 0.001)])
def test_an_ome_tiff_states_its_physical_size(tmp_path: Path, unit: str | None, mm: float) -> None:
    metadata = {"axes": "YX", "PhysicalSizeX": 0.25, "PhysicalSizeY": 0.5}
    if unit:
        metadata |= {"PhysicalSizeXUnit": unit, "PhysicalSizeYUnit": unit}
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(path, np.zeros((4, 5), np.uint8), ome=True, metadata=metadata)
    assert pixel_spacing(path) == pytest.approx((0.5 * mm, 0.25 * mm), rel=1e-12)


def test_a_resolution_for_printing_is_no_spacing(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg", "a.tif", "a.bmp"):
        Image.fromarray(np.zeros((4, 5), np.uint8)).save(tmp_path / name, dpi=(72, 72))
        assert pixel_spacing(tmp_path / name) is None


# ---------------------------------------------------------------------------------------------- intensities


def test_slices_of_a_volume_share_its_percentiles(tmp_path: Path) -> None:
    voxels = np.zeros((2, 10, 10), np.int16)
    voxels[0] = np.arange(100).reshape(10, 10)
    voxels[1] = voxels[0] + 100
    path = volume_file(tmp_path / "v.mha", voxels)
    there = preprocessor(intensity="percentile", percentiles=(0, 100))
    # 0..199 over both slices.
    np.testing.assert_allclose(there.read(path, 0)[0], voxels[0] / 199, atol=1e-6)
    np.testing.assert_allclose(there.read(path, 1)[2], voxels[1] / 199, atol=1e-6)


def test_a_z_score_spans_three_deviations_of_the_whole_volume(tmp_path: Path) -> None:
    # Half the voxels 0, half 10: mean 5, deviation 5, so -10..20 becomes 0..1. One outlier changes that little.
    voxels = np.zeros((2, 4, 4), np.float32)
    voxels[1] = 10
    there = preprocessor(intensity="zscore")
    path = volume_file(tmp_path / "v.nii", voxels)
    assert there.read(path, 0).unique().tolist() == pytest.approx([1 / 3])
    assert there.read(path, 1).unique().tolist() == pytest.approx([2 / 3])
    # The same by itself: a constant image has no deviation.
    assert not there.intensity_to_unit(voxels[1]).any()


def test_a_window_maps_its_ends_to_0_and_1_for_every_kind_of_image(tmp_path: Path) -> None:
    there = preprocessor(intensity="window", window=(40, 80))
    expected = [0.0, 0.0, 0.5, 1.0, 1.0]
    values = np.array([[-100, 0, 40, 80, 3000]])
    assert there.intensity_to_unit(values.astype(np.int16))[0, 0].tolist() == expected
    path = volume_file(tmp_path / "v.mha", values[None].astype(np.int16))
    assert there.read(path, 0)[1, 0].tolist() == expected
    assert there.intensity_to_unit(np.array([[0, 20, 60, 80]], np.uint8))[0, 0].tolist() == [0, 0.25, 0.75, 1]


def test_what_is_no_number_counts_for_no_statistic(tmp_path: Path) -> None:
    voxels = np.linspace(0, 1, 100, dtype=np.float32).reshape(1, 10, 10) * 50
    path = volume_file(tmp_path / "v.mha", voxels)
    broken = voxels.copy()
    broken[0, 0, 0] = np.nan  # the smallest value
    other = volume_file(tmp_path / "w.mha", np.concatenate([broken, voxels]))
    for intensity in ("percentile", "zscore"):
        there = preprocessor(intensity=intensity)
        assert there.read(other, 0)[0, 0, 0] == 0
        torch.testing.assert_close(there.read(other, 1), there.read(path, 0), atol=0.02, rtol=0)


def test_a_flat_image_is_read_as_its_pixels_are_converted(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 60_000, (6, 7)).astype(np.uint16)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for intensity in ("auto", "range", "percentile", "zscore"):
        there = preprocessor(intensity=intensity)
        torch.testing.assert_close(there.read(tmp_path / "a.png"), there.intensity_to_unit(pixels), atol=0, rtol=0)


def test_neighbouring_slices_are_brought_to_one_scale(tmp_path: Path) -> None:
    voxels = np.arange(48).reshape(3, 4, 4).astype(np.int16)
    path = volume_file(tmp_path / "v.mha", voxels)
    there = preprocessor(intensity="percentile", percentiles=(0, 100), neighbouring_slices=True)
    np.testing.assert_allclose(there.read(path, 1), voxels / 47, atol=1e-6)


def test_a_unit_tensor_needs_no_second_conversion(tmp_path: Path) -> None:
    path = volume_file(tmp_path / "v.mha", np.arange(512).reshape(2, 16, 16).astype(np.int16))
    there = preprocessor()
    unit = there.read(path, 1)
    image, placement = there.apply(unit)
    assert placement.source_size == (16, 16)
    torch.testing.assert_close(image, unit)


def test_a_reading_error_names_the_file_once(tmp_path: Path) -> None:
    path = volume_file(tmp_path / "v.mha", np.full((2, 4, 4), np.nan, np.float32))
    with pytest.raises(DataError, match="no finite pixel") as caught:
        preprocessor().read(path, 0)
    assert str(caught.value).count(str(path)) == 1


# ---------------------------------------------------------------------------------------------- caching


def cached(n_bytes: int) -> Volume:
    geometry = Geometry((n_bytes, 1, 1), (1, 1, 1), (0, 0, 0), IDENTITY)
    return Volume(np.zeros((1, 1, n_bytes), np.uint8), Grid(geometry))


def test_threads_that_want_one_volume_read_it_once() -> None:
    cache, reads, started = images._Cache(100), [], threading.Barrier(4)

    def read() -> Volume:
        reads.append(1)
        return cached(50)

    def want(_: int) -> Volume:
        started.wait()
        return cache.get("a", read)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(want, range(4)))
    assert len(reads) == 1
    assert all(volume is found[0] for volume in found)


def test_the_oldest_volumes_are_forgotten_when_the_limit_is_passed() -> None:
    cache, reads = images._Cache(100), []

    def get(name: str, n_bytes: int = 40) -> None:
        cache.get(name, lambda: reads.append(name) or cached(n_bytes))

    for name in "aba":
        get(name)
    get("c")  # 120 bytes: b was asked for the longest time ago
    for name in "acb":
        get(name)
    assert "".join(reads) == "abcb"
    get("large", 1000)
    get("large", 1000)  # kept, though above the limit alone
    assert reads.count("large") == 1


def test_a_failed_read_is_tried_again() -> None:
    cache = images._Cache(100)

    def fail() -> Volume:
        raise DataError("broken")

    for _ in range(2):
        with pytest.raises(DataError):
            cache.get("a", fail)
    assert cache.get("a", lambda: cached(1)).voxels.size == 1


# ---------------------------------------------------------------------------------------------- data folders


def test_image_and_mask_are_brought_to_one_orientation(tmp_path: Path) -> None:
    voxels = np.random.default_rng(0).integers(0, 2, (2, 3, 4)).astype(np.uint8)
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    volume_file(tmp_path / "images" / "a.nii.gz", voxels.astype(np.int16) * 100)
    # The same voxels, stored the other way round along x and y.
    turned = Slicing(flips=(1, 2)).apply(voxels)
    volume_file(tmp_path / "masks" / "a.nrrd", turned, (-1, 0, 0, 0, -1, 0, 0, 0, 1), origin=(3.0, 2.0, 0.0))
    for axis, count in (("z", 2), ("y", 3), ("x", 4)):
        chosen = DataSettings(preprocessing=PreprocessingSettings(size=(16, 16), slice_axis=axis))
        manifest = load_manifest(tmp_path, settings=chosen)
        assert manifest.reading == Reading(slice_axis=axis)
        assert len(manifest) == count
        for sample in manifest.samples:
            pixels = read_image(sample.image, sample.frame, reading=manifest.reading)
            labels = read_labels(sample, manifest.label_map, reading=manifest.reading)
            np.testing.assert_array_equal(pixels > 0, labels > 0)


def test_a_folder_of_dicom_slices_is_one_image_of_a_data_folder(tmp_path: Path) -> None:
    pytest.importorskip("pydicom")
    voxels = np.random.default_rng(0).integers(0, 2, (3, 4, 5)).astype(np.int16)
    folder = tmp_path / "images" / "patient 1"
    folder.mkdir(parents=True)
    (tmp_path / "masks").mkdir()
    for k, plane in enumerate(voxels):
        image = SimpleITK.GetImageFromArray(plane[None] * 100)
        image.SetSpacing((0.5, 0.5, 2.0))
        tags = {"0020|0032": f"0\\0\\{2 * k}", "0020|0037": "1\\0\\0\\0\\1\\0", "0020|000e": "1.2.3", "0008|0060": "CT"}
        for tag, value in tags.items():
            image.SetMetaData(tag, value)
        writer = SimpleITK.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(str(folder / f"{9 - k}.dcm"))
        writer.Execute(image)
    volume_file(tmp_path / "masks" / "patient 1.nii", voxels.astype(np.uint8), spacing_mm=(0.5, 0.5, 2.0))
    manifest = load_manifest(tmp_path, settings=DataSettings())
    assert [sample.name for sample in manifest.samples] == [f"patient 1_{k:04d}" for k in range(3)]
    assert len({sample.group for sample in manifest.samples}) == 1
    for sample in manifest.samples:
        labels = read_labels(sample, manifest.label_map, reading=manifest.reading)
        np.testing.assert_array_equal(read_image(sample.image, sample.frame) > 0, labels > 0)
    (folder / "9.dcm").rename(folder / "another name.dcm")  # its content is the same
    assert load_manifest(tmp_path, settings=DataSettings()).split_sha256 == manifest.split_sha256
    assert read_volume(folder)[1].spacing_mm == (0.5, 0.5, 2.0)
