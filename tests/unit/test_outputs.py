"""Results on the grid of their source: volumes, pages and pictures, opened by independent readers."""

from __future__ import annotations

import gzip
import json
import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
import tifffile
from PIL import Image

from leafseg.config import PreprocessingSettings
from leafseg.data.images import Reading, read_image, write_png
from leafseg.predict import Segmentation, predict_files

COS, SIN = math.cos(math.pi / 6), math.sin(math.pi / 6)
SPACING, ORIGIN = (0.5, 0.75, 3.0), (10.0, -20.0, 5.5)

# Where the voxel with index x=2, y=3, z=1 lies: (1, 2.25, 3) mm from the origin along the axes, by hand.
GRIDS = {
    "straight": ((1, 0, 0, 0, 1, 0, 0, 0, 1), (11.0, -17.75, 8.5)),
    "flipped": ((-1, 0, 0, 0, -1, 0, 0, 0, 1), (9.0, -22.25, 8.5)),
    "upside down": ((1, 0, 0, 0, 1, 0, 0, 0, -1), (11.0, -17.75, 2.5)),
    "sagittal": ((0, 0, 1, 1, 0, 0, 0, 1, 0), (13.0, -19.0, 7.75)),
    # 30 degrees about z: x = cos 30 * 1 - sin 30 * 2.25, y = sin 30 * 1 + cos 30 * 2.25.
    "oblique": ((COS, -SIN, 0, SIN, COS, 0, 0, 0, 1), (9.7410254, -17.5514428, 8.5)),
}


class ValueSegmenter:
    """Takes a pixel's value for its label; of overlapping labels, the value's bits. Certain to 0.75."""

    def __init__(self, *label_names: str, overlapping: bool = False, **preprocessing: Any) -> None:
        self.label_names = label_names
        self.overlapping = overlapping
        self.preprocessing = PreprocessingSettings(**preprocessing)

    def read(self, path: Path, frame: int | None = None) -> np.ndarray:
        return read_image(path, frame, reading=Reading.of(self.preprocessing))

    def segment(self, images: Sequence[np.ndarray]) -> list[Segmentation]:
        results = []
        for image in images:
            values = image.astype(np.int64)
            if self.overlapping:
                present = np.stack([(values >> bit) & 1 for bit in range(len(self.label_names))])
                results.append(Segmentation((present * 0.75).astype(np.float32), None))
            else:
                present = np.stack([values == number for number in range(len(self.label_names))])
                results.append(Segmentation((present * 0.75).astype(np.float32), values.astype(np.uint8)))
        return results


def write_scan(path: Path, voxels: np.ndarray, direction: Sequence[float]) -> SimpleITK.Image:
    image = SimpleITK.GetImageFromArray(voxels)
    image.SetSpacing(SPACING)
    image.SetOrigin(ORIGIN)
    image.SetDirection(direction)
    SimpleITK.WriteImage(image, str(path))
    return image


def marked_voxels() -> np.ndarray:
    """Label 1 somewhere, label 2 in one voxel: x=2, y=3, z=1 of 6x5x4."""
    voxels = np.zeros((4, 5, 6), np.int16)
    voxels[0, 1:4, 1:5] = 1
    voxels[1, 3, 2] = 2
    return voxels


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
@pytest.mark.parametrize("name", list(GRIDS))
def test_a_marked_voxel_lies_where_it_was_computed_by_hand(tmp_path: Path, name: str, suffix: str) -> None:
    direction, position = GRIDS[name]
    voxels = marked_voxels()
    source = write_scan(tmp_path / f"scan{suffix}", voxels, direction)
    segmenter = ValueSegmenter("background", "organ", "nodule")
    report = predict_files(segmenter, [tmp_path / f"scan{suffix}"], tmp_path / "out")
    assert report.written == {str(tmp_path / f"scan{suffix}"): [f"scan{suffix}"]}
    found = SimpleITK.ReadImage(str(tmp_path / "out" / f"scan{suffix}"))
    assert found.GetSize() == source.GetSize()
    np.testing.assert_allclose(found.GetSpacing(), SPACING, atol=1e-6)
    np.testing.assert_allclose(found.GetOrigin(), ORIGIN, atol=1e-5)
    np.testing.assert_allclose(found.GetDirection(), direction, atol=1e-6)
    labels = SimpleITK.GetArrayFromImage(found)
    assert np.array_equal(labels, voxels)
    assert found.GetPixelID() == SimpleITK.sitkUInt8
    ((z, y, x),) = np.argwhere(labels == 2).tolist()
    np.testing.assert_allclose(found.TransformIndexToPhysicalPoint((x, y, z)), position, atol=1e-4)


@pytest.mark.parametrize("axis", ["z", "y", "x"])
@pytest.mark.parametrize("orientation", ["LPS", "stored"])
def test_the_way_a_volume_is_cut_does_not_move_its_labels(tmp_path: Path, orientation: str, axis: str) -> None:
    voxels = np.random.default_rng(0).integers(0, 3, (4, 5, 6)).astype(np.int16)
    write_scan(tmp_path / "scan.nrrd", voxels, GRIDS["sagittal"][0])
    segmenter = ValueSegmenter("background", "a", "b", orientation=orientation, slice_axis=axis)
    predict_files(segmenter, [tmp_path / "scan.nrrd"], tmp_path / "out", probability=True, overlay=True)
    assert np.array_equal(SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(tmp_path / "out" / "scan.nrrd"))), voxels)
    for number, name in ((1, "a"), (2, "b")):
        scores = SimpleITK.ReadImage(str(tmp_path / "out" / f"scan_probability_{name}.nrrd"))
        assert scores.GetPixelID() == SimpleITK.sitkFloat32
        assert np.array_equal(SimpleITK.GetArrayFromImage(scores), (voxels == number) * np.float32(0.75))
    # The overlay has a page a slice as the model saw it: across x, y, z of the patient, which are stored as Z, X, Y.
    expected = {"LPS": {"z": 5, "y": 6, "x": 4}, "stored": {"z": 4, "y": 5, "x": 6}}[orientation][axis]
    with tifffile.TiffFile(tmp_path / "out" / "scan_overlay.tif") as pages:
        assert len(pages.pages) == expected


@pytest.mark.parametrize(("wanted", "suffix"), [("nifti", ".nii.gz"), ("nrrd", ".nrrd"), ("mha", ".mha")])
def test_a_volume_can_be_written_in_another_format(tmp_path: Path, wanted: Any, suffix: str) -> None:
    voxels = marked_voxels()
    direction, position = GRIDS["oblique"]
    write_scan(tmp_path / "scan.nii", voxels, direction)
    segmenter = ValueSegmenter("background", "organ", "nodule")
    predict_files(segmenter, [tmp_path / "scan.nii"], tmp_path / "out", output_format=wanted)
    name = "scan.nii" if wanted == "nifti" else f"scan{suffix}"  # the source's own suffix where it is of the format
    found = SimpleITK.ReadImage(str(tmp_path / "out" / name))
    np.testing.assert_allclose(found.TransformIndexToPhysicalPoint((2, 3, 1)), position, atol=1e-4)
    assert found[2, 3, 1] == 2


def test_a_volume_can_be_written_as_pages_or_pictures_of_its_stored_slices(tmp_path: Path) -> None:
    voxels = marked_voxels()
    write_scan(tmp_path / "scan.nii.gz", voxels, GRIDS["flipped"][0])
    segmenter = ValueSegmenter("background", "organ", "nodule")
    predict_files(segmenter, [tmp_path / "scan.nii.gz"], tmp_path / "pages", output_format="tiff")
    assert np.array_equal(tifffile.imread(tmp_path / "pages" / "scan.tif"), voxels)
    predict_files(segmenter, [tmp_path / "scan.nii.gz"], tmp_path / "pictures", output_format="png")
    for index in range(4):
        assert np.array_equal(np.array(Image.open(tmp_path / "pictures" / f"scan_{index:04d}.png")), voxels[index])


def test_pages_of_a_tiff_become_pages_of_one_label_tiff(tmp_path: Path) -> None:
    pages = np.random.default_rng(1).integers(0, 3, (3, 7, 9)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "stack.tif", pages, photometric="minisblack")
    segmenter = ValueSegmenter("background", "a", "b")
    report = predict_files(
        segmenter, [tmp_path / "stack.tif"], tmp_path / "out", output_format="tiff", probability=True, overlay=True
    )
    names = ["stack.tif", "stack_probability_a.tif", "stack_probability_b.tif", "stack_overlay.tif"]
    assert report.written[str(tmp_path / "stack.tif")] == names
    assert np.array_equal(tifffile.imread(tmp_path / "out" / "stack.tif"), pages)
    scores = tifffile.imread(tmp_path / "out" / "stack_probability_b.tif")
    assert scores.dtype == np.float32
    assert np.array_equal(scores, (pages == 2) * np.float32(0.75))
    assert tifffile.imread(tmp_path / "out" / "stack_overlay.tif").shape == (3, 7, 9, 3)
    assert np.array(Image.open(tmp_path / "out" / "stack.tif")).shape == (7, 9)  # Pillow opens it too


def test_pages_of_different_sizes_keep_them(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "s.tif") as writer:
        for side in (4, 6):
            writer.write(np.ones((side, 5), np.uint8), photometric="minisblack", contiguous=False)
    predict_files(ValueSegmenter("background", "a"), [tmp_path / "s.tif"], tmp_path / "out", output_format="tiff")
    with tifffile.TiffFile(tmp_path / "out" / "s.tif") as found:
        assert [page.asarray().tolist() for page in found.pages] == [
            np.full((side, 5), 255).tolist() for side in (4, 6)
        ]


def test_overlapping_labels_are_written_to_a_file_each(tmp_path: Path) -> None:
    values = np.array([[0, 1, 2], [3, 3, 1]], np.uint8)
    write_png(tmp_path / "a.png", values)
    segmenter = ValueSegmenter("optic disc", "cup", overlapping=True)
    report = predict_files(
        segmenter, [tmp_path / "a.png"], tmp_path / "out", probability=True, overlay=True, contours="geojson"
    )
    names = ["a_optic-disc.png", "a_cup.png", "a_probability_optic-disc.png", "a_probability_cup.png", "a_overlay.png"]
    assert report.written[str(tmp_path / "a.png")] == [*names, "a.geojson"]
    for bit, name in enumerate(("optic-disc", "cup")):
        mask = np.array(Image.open(tmp_path / "out" / f"a_{name}.png"))
        assert np.array_equal(mask, ((values >> bit) & 1) * 255)
    assert report.figures[str(tmp_path / "a.png")]["pixels"] == {"optic disc": 4, "cup": 3}
    features = json.loads((tmp_path / "out" / "a.geojson").read_text())["features"]
    assert {(f["properties"]["label"], f["properties"]["score"]) for f in features} == {
        ("optic disc", 0.75),
        ("cup", 0.75),
    }


def test_labels_whose_names_become_one_in_a_file_name_all_get_their_file(tmp_path: Path) -> None:
    values = np.array([[0, 1, 2], [3, 3, 1]], np.uint8)
    write_png(tmp_path / "a.png", values)
    predict_files(
        ValueSegmenter("a b", "a/b", overlapping=True), [tmp_path / "a.png"], tmp_path / "out", probability=True
    )
    for bit, name in enumerate(("1-a-b", "2-a-b")):
        present = (values >> bit) & 1
        assert np.array_equal(np.array(Image.open(tmp_path / "out" / f"a_{name}.png")), present * 255)
        scores = np.array(Image.open(tmp_path / "out" / f"a_probability_{name}.png"))
        assert np.array_equal(scores > 0, present == 1)


def test_overlapping_labels_of_a_volume_are_written_to_a_volume_each(tmp_path: Path) -> None:
    values = np.random.default_rng(2).integers(0, 4, (4, 5, 6)).astype(np.int16)
    write_scan(tmp_path / "scan.nii.gz", values, GRIDS["upside down"][0])
    segmenter = ValueSegmenter("organ", "lesion", overlapping=True)
    predict_files(segmenter, [tmp_path / "scan.nii.gz"], tmp_path / "out")
    for bit, name in enumerate(("organ", "lesion")):
        found = SimpleITK.ReadImage(str(tmp_path / "out" / f"scan_{name}.nii.gz"))
        assert np.array_equal(SimpleITK.GetArrayFromImage(found), (values >> bit) & 1)
        np.testing.assert_allclose(found.GetDirection(), GRIDS["upside down"][0], atol=1e-6)


def test_contours_of_a_volume_lie_on_its_stored_slices(tmp_path: Path) -> None:
    write_scan(tmp_path / "scan.nii.gz", marked_voxels(), GRIDS["flipped"][0])
    segmenter = ValueSegmenter("background", "organ", "nodule")
    predict_files(segmenter, [tmp_path / "scan.nii.gz"], tmp_path / "out", contours="geojson")
    features = json.loads((tmp_path / "out" / "scan.geojson").read_text())["features"]
    assert [f["properties"] for f in features] == [
        {"label": "organ", "area": 12, "score": 0.75, "frame": 0},
        {"label": "nodule", "area": 1, "score": 0.75, "frame": 1},
    ]
    ring = np.array(features[1]["geometry"]["coordinates"][0])
    assert (ring.min(0) + ring.max(0)).tolist() == [2 * 2.5, 2 * 3.5]  # about the centre of column 2, row 3


def test_one_coco_file_holds_all_inputs(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_png(tmp_path / "in" / f"{name}.png", np.eye(4, 5, dtype=np.uint8))
    (tmp_path / "in" / "c.png").write_bytes(b"broken")
    report = predict_files(ValueSegmenter("background", "spot"), [tmp_path / "in"], tmp_path / "out", contours="coco")
    assert list(report.failed) == [str(tmp_path / "in" / "c.png")]
    content = json.loads((tmp_path / "out" / "annotations.json").read_text())
    assert [image["file_name"] for image in content["images"]] == ["a.png", "b.png"]
    assert [annotation["image_id"] for annotation in content["annotations"]] == [1] * 4 + [2] * 4


@pytest.mark.parametrize(
    ("wanted", "name", "message"),
    [
        ("nifti", "a.png", "is a flat image, and --format nifti takes volumes"),
        ("dicom-seg", "a.png", "is not DICOM"),
        ("dicom-seg", "scan.nii.gz", "is not DICOM"),
    ],
)
def test_a_format_that_does_not_fit_is_one_sentence(tmp_path: Path, wanted: Any, name: str, message: str) -> None:
    write_png(tmp_path / "a.png", np.eye(3, dtype=np.uint8))
    write_scan(tmp_path / "scan.nii.gz", marked_voxels(), GRIDS["straight"][0])
    report = predict_files(
        ValueSegmenter("background", "a", "b"), [tmp_path / name], tmp_path / "out", output_format=wanted
    )
    (reason,) = report.failed.values()
    assert message in reason
    assert str(tmp_path / name) in reason
    assert "\n" not in reason


def test_probabilities_of_a_volume_are_only_kept_when_asked(tmp_path: Path) -> None:
    import tracemalloc

    write_scan(tmp_path / "scan.nrrd", np.zeros((40, 64, 64), np.uint8), GRIDS["straight"][0])
    segmenter = ValueSegmenter("background", *"abcdefg")
    peaks = []
    for probability in (False, True):
        tracemalloc.start()
        predict_files(segmenter, [tmp_path / "scan.nrrd"], tmp_path / f"{probability}", probability=probability)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    voxels = 40 * 64 * 64
    assert peaks[1] > 7 * 4 * voxels  # seven float32 maps
    assert peaks[0] < 7 * voxels  # labels and their copies, one byte a voxel each


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_both_forms_of_a_nifti_source_are_kept(tmp_path: Path, suffix: str, order: str) -> None:
    # By hand: qform turned by 90 degrees about z in 2x3x4 mm, sform straight at another place (an MNI one, code 4).
    voxels = marked_voxels()
    header = bytearray(352)
    struct.pack_into(f"{order}i", header, 0, 348)
    struct.pack_into(f"{order}8h", header, 40, 3, 6, 5, 4, 1, 1, 1, 1)
    struct.pack_into(f"{order}2h", header, 70, 4, 16)  # int16
    struct.pack_into(f"{order}8f", header, 76, -1, 2, 3, 4, 0, 0, 0, 0)
    struct.pack_into(f"{order}f", header, 108, 352)
    header[123] = 2 | 8  # mm, s
    struct.pack_into(f"{order}2h", header, 252, 1, 4)
    struct.pack_into(f"{order}6f", header, 256, 0, 0, 0.70710678, 10, 20, 30)
    struct.pack_into(f"{order}12f", header, 280, 2, 0, 0, -5, 0, 3, 0, -6, 0, 0, 4, -7)
    header[344:347] = b"n+1"
    content = bytes(header) + voxels.astype(f"{order}i2").tobytes()
    source = tmp_path / f"scan{suffix}"
    source.write_bytes(gzip.compress(content) if suffix == ".nii.gz" else content)
    assert predict_files(ValueSegmenter("background", "a", "b"), [source], tmp_path / "out").failed == {}
    result = tmp_path / "out" / source.name
    written = gzip.decompress(result.read_bytes()) if suffix == ".nii.gz" else result.read_bytes()
    for offset, types in ((76, "4f"), (123, "B"), (252, "2h"), (256, "18f")):
        expected = struct.unpack_from(f"{order}{types}", header, offset)
        assert struct.unpack_from(f"<{types}", written, offset) == expected
    ours, theirs = SimpleITK.ReadImage(str(result)), SimpleITK.ReadImage(str(source))
    assert (ours.GetOrigin(), ours.GetDirection()) == (theirs.GetOrigin(), theirs.GetDirection())
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(ours), voxels)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(["report.json", source.name])
