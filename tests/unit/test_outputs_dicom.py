"""DICOM segmentations, read back through pydicom and highdicom: places, codes, references, odd headers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from leafseg.config import PreprocessingSettings
from leafseg.data.images import Reading, read_image, read_volume, write_png
from leafseg.errors import ConfigError, DataError, MissingExtraError
from leafseg.outputs.dicom_seg import _ALIASES, GENERIC, CodedName, default_codes, read_segment_codes
from leafseg.predict import Segmentation, predict_files

highdicom = pytest.importorskip("highdicom")
pydicom = pytest.importorskip("pydicom")

CT, XRAY, ENHANCED_MR = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.1.1", "1.2.840.10008.5.1.4.1.1.4.1"
ROOT = "1.2.826.0.1.3680043.8.498."
# Rows run down the patient's back-to-front axis, columns to the head: an oblique plane, 30 degrees about x.
COS, SIN = 0.8660254, 0.5
ORIENTATION = [1.0, 0.0, 0.0, 0.0, COS, SIN]
NORMAL = np.array([0.0, -SIN, COS])
ORIGIN = np.array([-30.0, 12.0, 100.0])
ROW_MM, COLUMN_MM, SLICE_MM = 0.75, 0.5, 3.0


class ValueSegmenter:
    """Takes a pixel's value for its label; of overlapping labels, the value's bits. Certain to 0.8."""

    preprocessing = PreprocessingSettings()

    def __init__(self, *label_names: str, overlapping: bool = False) -> None:
        self.label_names = label_names
        self.overlapping = overlapping

    def read(self, path: Path, frame: int | None = None) -> np.ndarray:
        return read_image(path, frame, reading=Reading.of(self.preprocessing))

    def segment(self, images: Sequence[np.ndarray]) -> list[Segmentation]:
        results = []
        for image in images:
            values = image.astype(np.int64)
            if self.overlapping:
                present = np.stack([(values >> bit) & 1 for bit in range(len(self.label_names))])
                results.append(Segmentation((present * 0.8).astype(np.float32), None))
            else:
                present = np.stack([values == number for number in range(len(self.label_names))])
                results.append(Segmentation((present * 0.8).astype(np.float32), values.astype(np.uint8)))
        return results


def dataset(sop_class: str, pixels: np.ndarray, *, number: int = 1, **tags: Any) -> Any:
    """A DICOM image ``[H, W]``, or one of several frames ``[N, H, W]``, of a made-up patient."""
    result = pydicom.Dataset()
    result.file_meta = pydicom.dataset.FileMetaDataset()
    result.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    result.file_meta.MediaStorageSOPClassUID = result.SOPClassUID = sop_class
    result.file_meta.MediaStorageSOPInstanceUID = result.SOPInstanceUID = f"{ROOT}3.{number}"
    result.StudyInstanceUID, result.SeriesInstanceUID = f"{ROOT}1", f"{ROOT}2"
    result.PatientID, result.PatientName, result.PatientBirthDate = "SECRET-77", "Meier^Anna", "19800102"
    result.PatientSex, result.AccessionNumber, result.StudyID = "F", "", ""
    result.StudyDate, result.StudyTime, result.Modality = "20200101", "120000", "CT"
    result.SeriesNumber, result.InstanceNumber = 4, number
    result.Rows, result.Columns = pixels.shape[-2:]
    result.SamplesPerPixel, result.PhotometricInterpretation = 1, "MONOCHROME2"
    result.BitsAllocated, result.BitsStored, result.HighBit, result.PixelRepresentation = 16, 16, 15, 0
    result.PixelData = pixels.astype("<u2").tobytes()
    for keyword, value in tags.items():
        setattr(result, keyword, value)
    return result


def save(path: Path, image: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save_as(path, enforce_file_format=True)
    return path


def slice_position(index: int) -> list[float]:
    return [float(value) for value in ORIGIN + index * SLICE_MM * NORMAL]


def write_series(folder: Path, volume: np.ndarray, **tags: Any) -> Path:
    """Slices in ascending order along the normal; their file names and numbers run the other way."""
    for index, pixels in enumerate(volume):
        image = dataset(CT, pixels, number=len(volume) - index, ImagePositionPatient=slice_position(index), **tags)
        image.ImageOrientationPatient, image.PixelSpacing = ORIENTATION, [ROW_MM, COLUMN_MM]
        image.SliceThickness, image.FrameOfReferenceUID, image.PositionReferenceIndicator = SLICE_MM, f"{ROOT}5", ""
        save(folder / f"{len(volume) - index:03d}.dcm", image)
    return folder


def marked_volume() -> np.ndarray:
    """Label 1 in two slices, label 2 in one voxel: slice 2, row 3, column 4 of 4x5x6."""
    volume = np.zeros((4, 5, 6), np.uint16)
    volume[1:3, 0:2, 1:5] = 1
    volume[2, 3, 4] = 2
    return volume


# By hand: column 4 is 2 mm along (1, 0, 0), row 3 is 2.25 mm along (0, cos, sin), slice 2 is 6 mm along (0, -sin, cos):
# (-30 + 2, 12 + 1.9485572 - 3, 100 + 1.125 + 5.1961524).
MARK = np.array([-28.0, 10.9485572, 106.3211524])


def frame_places(segmentation: Any) -> list[tuple[int, np.ndarray]]:
    """(segment number, position of the first pixel) of every frame, from the tags."""
    return [
        (
            int(group.SegmentIdentificationSequence[0].ReferencedSegmentNumber),
            np.array(group.PlanePositionSequence[0].ImagePositionPatient, float),
        )
        for group in segmentation.PerFrameFunctionalGroupsSequence
    ]


def place_of_mark(segmentation: Any, segment: int) -> np.ndarray:
    """Where the only pixel of a segment lies, from the tags of the object alone."""
    frames = np.atleast_3d(segmentation.pixel_array).reshape(-1, segmentation.Rows, segmentation.Columns)
    shared = segmentation.SharedFunctionalGroupsSequence[0]
    row_mm, column_mm = (float(side) for side in shared.PixelMeasuresSequence[0].PixelSpacing)
    along = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, float)
    found = []
    for pixels, (number, position) in zip(frames, frame_places(segmentation), strict=True):
        if number == segment:
            found += [position + c * column_mm * along[:3] + r * row_mm * along[3:] for r, c in np.argwhere(pixels)]
    (place,) = found
    return place


def test_a_series_becomes_a_segmentation_in_its_place_with_coded_names(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "ct", marked_volume())
    segmenter = ValueSegmenter("background", "liver", "blob 7")
    report = predict_files(segmenter, [folder], tmp_path / "out")
    assert report.failed == {}
    assert report.written == {str(folder): ["ct.dcm"]}
    found = pydicom.dcmread(tmp_path / "out" / "ct.dcm")
    np.testing.assert_allclose(place_of_mark(found, 2), MARK, atol=1e-4)

    first, second = found.SegmentSequence
    assert (first.SegmentLabel, second.SegmentLabel) == ("liver", "blob 7")
    assert (first.SegmentNumber, second.SegmentNumber) == (1, 2)
    assert {first.SegmentAlgorithmType, second.SegmentAlgorithmType} == {"AUTOMATIC"}
    assert first.SegmentAlgorithmName == "leafseg"
    kind, category = first.SegmentedPropertyTypeCodeSequence[0], first.SegmentedPropertyCategoryCodeSequence[0]
    assert (kind.CodeValue, kind.CodingSchemeDesignator, kind.CodeMeaning) == ("10200004", "SCT", "Liver")
    assert category.CodeMeaning == "Anatomical Structure"
    assert second.SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "Tissue"  # nobody knows what a blob is

    assert found.SegmentationType == "BINARY"
    assert found.Manufacturer == "leafseg"
    assert found.ContentLabel == "LEAFSEG"
    assert "not a medical device" in found.ContentDescription
    assert found.FrameOfReferenceUID == f"{ROOT}5"
    assert (found.StudyInstanceUID, found.PatientID) == (f"{ROOT}1", "SECRET-77")
    assert found.SeriesInstanceUID != f"{ROOT}2"
    (series,) = found.ReferencedSeriesSequence
    assert series.SeriesInstanceUID == f"{ROOT}2"
    assert len(series.ReferencedInstanceSequence) == 4
    # Each frame names its own slice: the mark's is slice 2, written as the second of four.
    sources = {
        int(group.SegmentIdentificationSequence[0].ReferencedSegmentNumber): group.DerivationImageSequence[0]
        .SourceImageSequence[0]
        .ReferencedSOPInstanceUID
        for group in found.PerFrameFunctionalGroupsSequence
    }
    assert sources[2] == f"{ROOT}3.2"
    assert "SECRET" not in (tmp_path / "out" / "report.json").read_text()
    assert "Meier" not in (tmp_path / "out" / "report.json").read_text()
    # A voxel is 0.75 x 0.5 x 3 = 1.125 cubic millimetres.
    figures = report.figures[str(folder)]
    assert figures["volume_ml"] == {"liver": 0.018, "blob 7": 0.001125}


def test_highdicom_reads_back_the_labels_of_every_slice(tmp_path: Path) -> None:
    volume = marked_volume()
    folder = write_series(tmp_path / "ct", volume)
    predict_files(ValueSegmenter("background", "liver", "lesion"), [folder], tmp_path / "out")
    found = highdicom.seg.segread(tmp_path / "out" / "ct.dcm")
    uids = [f"{ROOT}3.{number}" for number in (4, 3, 2, 1)]
    labels = found.get_pixels_by_source_instance(
        uids, combine_segments=True, assert_missing_frames_are_empty=True, ignore_spatial_locations=True
    )
    assert np.array_equal(labels, volume)


def test_overlapping_labels_share_pixels_in_their_own_segments(tmp_path: Path) -> None:
    volume = np.zeros((3, 5, 6), np.uint16)
    volume[1, 1:4, 1:5] = 1
    volume[1, 2, 2] = 3
    folder = write_series(tmp_path / "ct", volume)
    predict_files(ValueSegmenter("liver", "lesion", overlapping=True), [folder], tmp_path / "out")
    found = pydicom.dcmread(tmp_path / "out" / "ct.dcm")
    assert [item.SegmentLabel for item in found.SegmentSequence] == ["liver", "lesion"]
    assert [number for number, _ in frame_places(found)] == [1, 2]
    assert np.array_equal(found.pixel_array, [(volume[1] & 1), (volume[1] >> 1) & 1])


def test_a_segmentation_with_nothing_in_it_is_written(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "ct", np.zeros((3, 5, 6), np.uint16))
    report = predict_files(ValueSegmenter("background", "liver"), [folder], tmp_path / "out")
    assert report.failed == {}
    found = highdicom.seg.segread(tmp_path / "out" / "ct.dcm")
    assert found.pixel_array.max() == 0
    assert len(found.SegmentSequence) == 1


def test_probabilities_are_written_as_a_fractional_segmentation(tmp_path: Path) -> None:
    volume = marked_volume()
    folder = write_series(tmp_path / "ct", volume)
    report = predict_files(
        ValueSegmenter("background", "liver", "lesion"), [folder], tmp_path / "out", probability=True
    )
    assert report.written[str(folder)] == ["ct.dcm", "ct_probability.dcm"]
    found = pydicom.dcmread(tmp_path / "out" / "ct_probability.dcm")
    assert (found.SegmentationType, found.SegmentationFractionalType) == ("FRACTIONAL", "PROBABILITY")
    assert found.MaximumFractionalValue == 255
    assert sorted(np.unique(found.pixel_array).tolist()) == [0, 204]  # 0.8 * 255
    np.testing.assert_allclose(place_of_mark(found, 2), MARK, atol=1e-4)


def test_a_series_can_be_written_as_a_volume(tmp_path: Path) -> None:
    import SimpleITK

    folder = write_series(tmp_path / "ct", marked_volume())
    predict_files(ValueSegmenter("background", "liver", "lesion"), [folder], tmp_path / "out", output_format="nifti")
    found = SimpleITK.ReadImage(str(tmp_path / "out" / "ct.nii.gz"))
    assert found[4, 3, 2] == 2
    np.testing.assert_allclose(found.TransformIndexToPhysicalPoint((4, 3, 2)), MARK, atol=1e-4)


def test_every_series_of_a_folder_tree_is_segmented(tmp_path: Path) -> None:
    for patient in ("p1", "p2"):
        write_series(tmp_path / "in" / patient / "ct", marked_volume(), SeriesInstanceUID=f"{ROOT}9.{patient[1]}")
    save(tmp_path / "in" / "p2" / "xray" / "shot", dataset(XRAY, np.eye(5, 6)))
    write_png(tmp_path / "in" / "flat.png", np.eye(4, dtype=np.uint8))
    report = predict_files(ValueSegmenter("background", "liver", "lesion"), [tmp_path / "in"], tmp_path / "out")
    assert report.failed == {}
    assert sorted(name for names in report.written.values() for name in names) == [
        "flat.png",
        "p1_ct.dcm",
        "p2_ct.dcm",
        "p2_xray_shot.dcm",
    ]


def test_series_of_one_name_stay_apart_in_a_coco_file(tmp_path: Path) -> None:
    for patient in ("p1", "p2"):
        write_series(tmp_path / "in" / patient / "ct", marked_volume(), SeriesInstanceUID=f"{ROOT}9.{patient[1]}")
    predict_files(ValueSegmenter("background", "liver", "lesion"), [tmp_path / "in"], tmp_path / "out", contours="coco")
    images = json.loads((tmp_path / "out" / "annotations.json").read_text())["images"]
    folders = [(tmp_path / "in" / patient / "ct").as_posix() for patient in ("p1", "p2")]
    assert [(image["file_name"], image["frame"]) for image in images] == [(f, n) for f in folders for n in range(4)]


def test_reports_and_segmentations_beside_the_images_are_passed_over(tmp_path: Path) -> None:
    write_series(tmp_path / "in" / "ct", marked_volume())
    report = dataset("1.2.840.10008.5.1.4.1.1.88.11", np.eye(2), Modality="SR")
    for keyword in ("Rows", "Columns", "PixelData"):
        delattr(report, keyword)
    save(tmp_path / "in" / "other" / "report", report)
    segmenter = ValueSegmenter("background", "liver", "lesion")
    predict_files(segmenter, [tmp_path / "in" / "ct"], tmp_path / "in" / "segmentations")
    found = predict_files(segmenter, [tmp_path / "in"], tmp_path / "out")
    assert (found.written, found.failed) == ({str(tmp_path / "in" / "ct"): ["ct.dcm"]}, {})


def test_a_clip_in_time_has_pixels_but_no_volume(tmp_path: Path) -> None:
    frames = np.zeros((3, 5, 6), np.uint16)
    frames[1, 2, 3] = 1
    clip = dataset("1.2.840.10008.5.1.4.1.1.3.1", frames, Modality="US", NumberOfFrames=3, PixelSpacing=[0.3, 0.3])
    path = save(tmp_path / "clip.dcm", clip)
    report = predict_files(ValueSegmenter("background", "lesion"), [path], tmp_path / "out")
    assert report.failed == {}
    assert np.array_equal(tifffile.imread(tmp_path / "out" / "clip.tif"), frames * 255)
    figures = report.figures[str(path)]
    assert (figures["shape"], figures["spacing_mm"], figures["pixels"]) == ([3, 5, 6], [0.3, 0.3], {"lesion": 1})
    assert "volume_ml" not in figures
    for wanted in ("dicom-seg", "nifti"):
        report = predict_files(ValueSegmenter("background", "lesion"), [path], tmp_path / "out", output_format=wanted)
        assert "follow each other in time" in report.failed[str(path)]


@pytest.mark.parametrize("spacing", [{}, {"PixelSpacing": [0.3, 0.3]}])
def test_a_single_frame_of_an_ultrasound_clip_is_segmented(tmp_path: Path, spacing: dict[str, Any]) -> None:
    pixels = np.zeros((5, 6), np.uint16)
    pixels[1, 2] = 1
    path = save(
        tmp_path / "us.dcm", dataset("1.2.840.10008.5.1.4.1.1.3.1", pixels, Modality="US", NumberOfFrames=1, **spacing)
    )
    report = predict_files(ValueSegmenter("background", "lesion"), [path], tmp_path / "out")
    assert report.failed == {}
    found = highdicom.seg.segread(tmp_path / "out" / "us.dcm")
    assert np.array_equal(found.pixel_array.reshape(5, 6), pixels)


def test_without_highdicom_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    folder = write_series(tmp_path / "ct", marked_volume())
    write_png(tmp_path / "a.png", np.eye(4, dtype=np.uint8))
    monkeypatch.setitem(sys.modules, "highdicom", None)
    segmenter = ValueSegmenter("background", "liver", "lesion")
    report = predict_files(segmenter, [folder, tmp_path / "a.png"], tmp_path / "out")
    assert list(report.written.values()) == [["a.png"]]
    assert 'pip install "leafseg[dicom]"' in report.failed[str(folder)]
    with pytest.raises(MissingExtraError, match="highdicom"):
        predict_files(segmenter, [folder], tmp_path / "out", output_format="dicom-seg")


def enhanced(volume: np.ndarray, stored_order: Sequence[int]) -> Any:
    """A multi-frame MR whose frames are stored in another order than they lie in space."""
    image = dataset(ENHANCED_MR, volume[list(stored_order)], Modality="MR", NumberOfFrames=len(volume))
    image.FrameOfReferenceUID, image.PositionReferenceIndicator = f"{ROOT}5", ""
    shared, measures, plane = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
    measures.PixelSpacing, measures.SliceThickness = [ROW_MM, COLUMN_MM], SLICE_MM
    plane.ImageOrientationPatient = ORIENTATION
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [plane]
    image.SharedFunctionalGroupsSequence = [shared]
    groups = []
    for index in stored_order:
        group, position = pydicom.Dataset(), pydicom.Dataset()
        position.ImagePositionPatient = slice_position(index)
        group.PlanePositionSequence = [position]
        groups.append(group)
    image.PerFrameFunctionalGroupsSequence = groups
    return image


@pytest.mark.parametrize("shared", [True, False])
def test_frames_of_a_multi_frame_file_keep_their_place_whatever_their_order(tmp_path: Path, shared: bool) -> None:
    image = enhanced(marked_volume(), (3, 0, 2, 1))
    if not shared:  # some scanners repeat for every frame what is the same for all
        for keyword in ("PixelMeasuresSequence", "PlaneOrientationSequence"):
            for group in image.PerFrameFunctionalGroupsSequence:
                setattr(group, keyword, image.SharedFunctionalGroupsSequence[0][keyword].value)
            delattr(image.SharedFunctionalGroupsSequence[0], keyword)
    path = save(tmp_path / "mr.dcm", image)
    assert np.array_equal(read_volume(path)[0], marked_volume())
    report = predict_files(ValueSegmenter("background", "liver", "lesion"), [path], tmp_path / "out")
    assert report.failed == {}
    found = pydicom.dcmread(tmp_path / "out" / "mr.dcm")
    np.testing.assert_allclose(place_of_mark(found, 2), MARK, atol=1e-4)
    (group,) = [
        group
        for group in found.PerFrameFunctionalGroupsSequence
        if group.SegmentIdentificationSequence[0].ReferencedSegmentNumber == 2
    ]
    assert group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedFrameNumber == 3  # from 1: slice 2


def test_an_image_without_a_place_in_space_is_segmented_too(tmp_path: Path) -> None:
    pixels = np.zeros((5, 6), np.uint16)
    pixels[3, 4] = 1
    path = save(tmp_path / "xray.dcm", dataset(XRAY, pixels, Modality="DX", PixelSpacing=[0.2, 0.2]))
    report = predict_files(ValueSegmenter("background", "lesion"), [path], tmp_path / "out", overlay=True)
    assert report.failed == {}
    assert report.written[str(path)] == ["xray.dcm", "xray_overlay.png"]
    found = highdicom.seg.segread(tmp_path / "out" / "xray.dcm")
    assert np.array_equal(found.pixel_array.reshape(5, 6), pixels)
    assert report.figures[str(path)]["spacing_mm"] == [0.2, 0.2]


def test_names_in_any_script_reach_the_segments_and_the_patient_s_stays(tmp_path: Path) -> None:
    other = pydicom.Dataset()
    other.PatientID, other.IssuerOfPatientID = "7", "Zürich"
    tags = {"PatientName": "Müller^Jörg", "OtherPatientIDsSequence": [other]}
    folder = write_series(tmp_path / "ct", marked_volume(), SpecificCharacterSet="ISO_IR 100", **tags)
    names = ("Läsion", "肝臓")
    report = predict_files(ValueSegmenter("background", *names), [folder], tmp_path / "out")
    assert report.failed == {}
    found = pydicom.dcmread(tmp_path / "out" / "ct.dcm")
    assert found.SpecificCharacterSet == "ISO_IR 192"
    assert [item.SegmentLabel for item in found.SegmentSequence] == list(names)
    assert found.PatientName == "Müller^Jörg"
    assert found.OtherPatientIDsSequence[0].IssuerOfPatientID == "Zürich"


def test_a_sloppy_patient_module_is_no_obstacle(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "ct", marked_volume(), PatientComments="x")
    for path in folder.iterdir():
        image = pydicom.dcmread(path)
        for keyword in ("PatientID", "StudyTime", "PatientSex", "StudyID", "SeriesNumber", "SliceThickness"):
            delattr(image, keyword)
        with pydicom.config.disable_value_validation():
            image.PatientBirthDate = "around 1980"
            image.save_as(path)
    report = predict_files(ValueSegmenter("background", "liver", "lesion"), [folder], tmp_path / "out")
    assert report.failed == {}
    found = highdicom.seg.segread(tmp_path / "out" / "ct.dcm")
    np.testing.assert_allclose(place_of_mark(found, 2), MARK, atol=1e-4)
    assert found.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SliceThickness == pytest.approx(SLICE_MM)


@pytest.mark.parametrize("missing", ["StudyInstanceUID", "FrameOfReferenceUID"])
def test_a_header_that_lacks_its_study_or_frame_is_one_sentence_without_the_patient(
    tmp_path: Path, missing: str
) -> None:
    folder = write_series(tmp_path / "ct", marked_volume())
    for path in folder.iterdir():
        image = pydicom.dcmread(path)
        delattr(image, missing)
        image.save_as(path)
    report = predict_files(ValueSegmenter("background", "liver", "lesion"), [folder], tmp_path / "out")
    (reason,) = report.failed.values()
    assert reason.startswith(f"{folder}: no DICOM segmentation can be made for it")
    assert f"({missing} is missing)" in reason
    assert "SECRET" not in reason
    assert "Meier" not in reason
    assert not (tmp_path / "out" / "ct.dcm").exists()


# --- coded names ------------------------------------------------------------------------------------------------------


def test_codes_of_a_file_are_written_into_the_segments(tmp_path: Path) -> None:
    neoplasm = {"value": "108369006", "scheme": "SCT", "meaning": "Neoplasm"}
    abnormal = {"value": "49755003", "scheme": "SCT", "meaning": "Morphologically Abnormal Structure"}
    content = {"thing": {"category": abnormal, "type": neoplasm, "algorithm": "our model"}}
    (tmp_path / "segments.json").write_text(json.dumps(content))
    codes = read_segment_codes(tmp_path / "segments.json", ["thing", "liver"])
    assert codes["thing"].type == CodedName("108369006", "SCT", "Neoplasm")
    folder = write_series(tmp_path / "ct", marked_volume())
    predict_files(ValueSegmenter("background", "thing", "liver"), [folder], tmp_path / "out", segment_codes=codes)
    first, second = pydicom.dcmread(tmp_path / "out" / "ct.dcm").SegmentSequence
    assert first.SegmentedPropertyTypeCodeSequence[0].CodeValue == "108369006"
    assert first.SegmentedPropertyCategoryCodeSequence[0].CodeValue == "49755003"
    assert first.SegmentAlgorithmName == "our model"
    assert second.SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "Liver"


@pytest.mark.parametrize(
    ("name", "category", "kind"),
    [
        ("liver", "Anatomical Structure", "Liver"),
        ("White_Matter", "Anatomical Structure", "White Matter"),
        ("grey matter", "Anatomical Structure", "Gray Matter"),
        ("lesion", "Morphologically Abnormal Structure", "Lesion"),
        ("foreground", "Tissue", "Tissue"),
    ],
)
def test_a_label_is_coded_by_its_name_where_the_standard_knows_it(name: str, category: str, kind: str) -> None:
    codes = default_codes(name)
    assert codes.category.meaning == category
    assert codes.type.meaning.lower() == kind.lower()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"spleen": {}}, "which is no label of the model; it has liver"),
        ({"liver": "Liver"}, "'liver' must hold type"),
        ({"liver": {"type": {"value": "1"}}}, r"liver\.type must hold the texts value, scheme, meaning"),
        ({"liver": {"type": {"value": "1" * 17, "scheme": "SCT", "meaning": "x"}}}, "at most 16"),
        ({"liver": {"type": {}, "colour": "red"}}, "not known is colour"),
    ],
)
def test_wrong_codes_are_one_sentence(tmp_path: Path, content: Any, message: str) -> None:
    (tmp_path / "segments.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=message):
        read_segment_codes(tmp_path / "segments.json", ["liver"])
    with pytest.raises(DataError, match="cannot be read as JSON"):
        read_segment_codes(tmp_path / "none.json", ["liver"])


def test_each_series_of_a_folder_is_an_input_and_so_is_every_single_image_beside_them(tmp_path: Path) -> None:
    folder = tmp_path / "scans"
    write_series(folder, marked_volume(), SeriesNumber=7)
    for index, pixels in enumerate(marked_volume()[:2]):
        image = dataset(CT, pixels, number=20 + index, ImagePositionPatient=slice_position(index), SeriesNumber=9)
        image.ImageOrientationPatient, image.PixelSpacing = ORIENTATION, [ROW_MM, COLUMN_MM]
        image.SeriesInstanceUID, image.SliceThickness, image.FrameOfReferenceUID = f"{ROOT}9", 3.0, f"{ROOT}5"
        image.PositionReferenceIndicator = ""
        save(folder / f"b{index}.dcm", image)
    flat = dataset("1.2.840.10008.5.1.4.1.1.3.1", marked_volume()[1], number=40, Modality="US", NumberOfFrames=1)
    flat.SeriesInstanceUID = f"{ROOT}8"
    save(folder / "flat.dcm", flat)
    write_png(folder / "photo.png", np.ones((4, 5), np.uint8))
    report = predict_files(ValueSegmenter("background", "liver", "lesion"), [folder], tmp_path / "out")
    assert report.failed == {}
    assert report.written == {
        f"{folder} (series 7)": ["scans_series7.dcm"],
        f"{folder} (series 9)": ["scans_series9.dcm"],
        str(folder / "flat.dcm"): ["flat.dcm"],
        str(folder / "photo.png"): ["photo.png"],
    }
    assert [report.figures[f"{folder} (series {n})"]["shape"][0] for n in (7, 9)] == [4, 2]
    made = pydicom.dcmread(tmp_path / "out" / "scans_series9.dcm")
    assert made.ReferencedSeriesSequence[0].SeriesInstanceUID == f"{ROOT}9"


def test_an_error_in_one_of_several_series_names_the_users_own_folder(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "scans", marked_volume(), SeriesNumber=7)
    (folder / "003.dcm").unlink()  # a gap
    image = dataset(CT, marked_volume()[0], number=20, ImagePositionPatient=slice_position(0), SeriesNumber=9)
    image.ImageOrientationPatient, image.PixelSpacing = ORIENTATION, [ROW_MM, COLUMN_MM]
    image.SeriesInstanceUID, image.SliceThickness, image.FrameOfReferenceUID = f"{ROOT}9", 3.0, f"{ROOT}5"
    save(folder / "b.dcm", image)
    report = predict_files(ValueSegmenter("background", "liver", "lesion"), [folder], tmp_path / "out")
    (reason,) = report.failed.values()
    assert reason.startswith(f"{folder}: the slices' distances run from 3 to 6 mm")
    assert list(report.written) == [f"{folder} (series 9)"]


def test_a_single_slice_without_thickness_has_no_volume_in_ml(tmp_path: Path) -> None:
    volumes = []
    for name, thickness in (("a", None), ("b", SLICE_MM)):
        folder = write_series(tmp_path / name, marked_volume()[2:3])
        image = pydicom.dcmread(folder / "001.dcm")
        image.SliceThickness = thickness
        save(folder / "001.dcm", image)
        report = predict_files(ValueSegmenter("background", "liver", "lesion"), [folder], tmp_path / "out" / name)
        volumes.append(report.figures[str(folder)].get("volume_ml"))
        assert report.figures[str(folder)]["spacing_mm"][-2:] == [ROW_MM, COLUMN_MM]
    assert volumes == [None, {"liver": pytest.approx(8 * 0.75 * 0.5 * 3 / 1000), "lesion": pytest.approx(0.001125)}]


@pytest.mark.parametrize(("label", "value"), [("Tumour", "108369006"), ("tumor", "108369006"), ("lesions", "52988006")])
def test_usual_names_of_lesions_have_codes_of_the_standard(label: str, value: str) -> None:
    code = default_codes(label)
    assert (code.type.value, code.category.value) == (value, "49755003")


def test_every_alias_names_an_entry_of_the_standards_lists() -> None:
    assert [name for name in _ALIASES if default_codes(name) == GENERIC] == []
