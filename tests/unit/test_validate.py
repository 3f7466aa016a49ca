"""The data check: every kind of finding from a data set that was spoilt on purpose, and none from one that was not."""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from PIL import Image

from leafseg.config import DataSettings
from leafseg.data.check_page import write_check_page
from leafseg.data.images import write_png
from leafseg.data.manifest import PARTS, Look, load_manifest, scan_rows
from leafseg.data.validate import DataCheck, Finding, check_data
from leafseg.errors import DataError

SHARED = Path(os.environ.get("LEAFSEG_SHARED", Path(__file__).parents[3] / "shared")) / "data"
SETTINGS = DataSettings()


@pytest.fixture
def data(tiny_data: Callable[..., Path]) -> Path:
    """Forty good images or a few more; the test owns them."""
    return tiny_data()


def check(data: Path, **options: object) -> DataCheck:
    """A check that keeps its promises whatever the data hold."""
    done = check_data(data, settings=options.pop("settings", SETTINGS), **options)  # type: ignore[arg-type]
    order = ["error", "warning", "note"]
    assert [order.index(finding.severity) for finding in done.findings] == sorted(
        order.index(finding.severity) for finding in done.findings
    )
    assert done.ok == (done.manifest is not None) or not done.images
    for finding in done.findings:
        assert "\n" not in finding.message
        assert len(finding.message) < 1000
    json.dumps(done.as_json(), allow_nan=False)
    return done


def only(done: DataCheck, identity: str) -> Finding:
    found = [finding for finding in done.findings if finding.id == identity]
    assert len(found) == 1, [(finding.id, finding.message) for finding in done.findings]
    return found[0]


def files_of(finding: Finding) -> list[tuple[str, ...]]:
    return [item.files for item in finding.items]


def image(data: Path, number: int) -> Path:
    return data / "images" / f"{number:03d}.png"


def mask(data: Path, number: int) -> Path:
    return data / "masks" / f"{number:03d}.png"


def pixels(path: Path) -> np.ndarray:
    return np.array(Image.open(path))


def as_csv(data: Path, rows: list[dict[str, object]]) -> Path:
    path = data / "list.csv"
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return path


# --- good data ---


def test_good_data_give_no_finding_and_the_manifest_of_a_training(data: Path) -> None:
    done = check(data)
    assert done.findings == ()
    assert done.ok
    assert done.manifest == load_manifest(data, settings=SETTINGS)
    assert done.images == len(list((data / "images").iterdir()))
    assert done.files == 2 * done.images
    assert sum(done.parts.values()) == done.images
    assert done.summary().endswith("nothing found")


def test_class_figures_and_fingerprint_are_what_the_files_hold(tmp_path: Path) -> None:
    generator = np.random.Generator(np.random.Philox(1))
    for number in range(30):
        write_png(tmp_path / "images" / f"{number:03d}.png", generator.integers(0, 256, (20, 10), np.uint8))
        labels = np.zeros((20, 10), np.uint8)
        labels[:5] = 1  # 50 of 200 pixels
        if number < 3:
            labels[10:11] = 2  # 10 pixels in three images: 30 of 6000
        write_png(tmp_path / "masks" / f"{number:03d}.png", labels)
    done = check(tmp_path)
    background, first, second = done.classes
    assert (background.pixel_share, first.pixel_share, second.pixel_share) == (0.745, 0.25, 0.005)
    assert sum(first.images.values()) == 30
    assert sum(second.images.values()) == 3
    assert done.fingerprint.kinds == {"grey, 8 bits": 30}
    assert done.fingerprint.sizes == {(10, 20): 30}
    assert sum(done.fingerprint.pixel_counts) == 30 * 200
    whole = [pixels(tmp_path / "images" / f"{number:03d}.png") for number in range(30)]
    np.testing.assert_allclose(done.fingerprint.mean, [values.mean() for values in whole], rtol=1e-6)
    np.testing.assert_allclose(done.fingerprint.spread, [values.std() for values in whole], rtol=1e-5)


def test_overlapping_labels_are_counted_one_by_one(tmp_path: Path) -> None:
    for number in range(30):
        noise = np.random.Generator(np.random.Philox(number)).integers(0, 256, (10, 10), np.uint8)
        write_png(tmp_path / "images" / f"{number:03d}.png", noise)
        for label, rows in (("gland", 5), ("lesion", 2 if number % 2 else 0)):
            drawn = np.zeros((10, 10), np.uint8)
            drawn[:rows] = 255
            write_png(tmp_path / "masks" / label / f"{number:03d}.png", drawn)
    done = check(tmp_path)
    assert {figures.name: figures.pixel_share for figures in done.classes} == {"gland": 0.5, "lesion": 0.1}
    assert sum(done.classes[1].images.values()) == 15
    assert not any(finding.id == "empty-mask" for finding in done.findings)


# --- files and pairs ---


def test_all_problems_of_all_kinds_are_reported_at_once(data: Path) -> None:
    mask(data, 1).unlink()
    image(data, 2).unlink()
    image(data, 3).write_bytes(image(data, 3).read_bytes()[:90])
    mask(data, 4).write_text("no image")
    write_png(mask(data, 5), np.zeros((7, 9), np.uint8))
    (data / "images" / "extra.webp").write_bytes(b"")
    write_png(image(data, 6), np.full((40, 36), 9, np.uint8))
    done = check(data)
    assert not done.ok
    assert files_of(only(done, "missing-mask")) == [("001.png",)]
    assert files_of(only(done, "missing-image")) == [("002.png",)]
    assert files_of(only(done, "unreadable")) == [("images/003.png",), ("images/004.png",)]
    assert "masks/004.png" in only(done, "unreadable").items[1].text
    assert files_of(only(done, "size-mismatch")) == [("images/005.png",)]
    assert "masks/005.png is 9x7, its image is 36x40" in only(done, "size-mismatch").message
    assert files_of(only(done, "unknown-type")) == [("extra.webp",)]
    constant = only(done, "constant-image")
    assert (files_of(constant), constant.severity, constant.items[0].text) == (
        [("images/006.png",)], "warning", "every pixel is 9",
    )  # fmt: skip


def test_a_single_unreadable_file_hides_no_mask_of_another_size(data: Path) -> None:
    image(data, 3).write_bytes(b"no image")
    write_png(mask(data, 5), np.zeros((7, 9), np.uint8))
    done = check(data)
    assert files_of(only(done, "unreadable")) == [("images/003.png",)]
    (item,) = only(done, "size-mismatch").items
    assert (item.files, item.text) == (("images/005.png",), "the image is 36x40, the mask 9x7")
    with pytest.raises(DataError, match=r"003\.png.*masks/005\.png is 9x7"):
        load_manifest(data, settings=SETTINGS)


def test_the_check_says_what_a_training_would_say(data: Path) -> None:
    mask(data, 1).unlink()
    image(data, 2).unlink()
    with pytest.raises(DataError) as refused:
        load_manifest(data, settings=SETTINGS)
    for finding in check(data).findings:
        assert finding.message in str(refused.value)


@pytest.mark.parametrize("name", ["nothing", "file.txt"])
def test_what_is_no_data_set_is_one_finding(tmp_path: Path, name: str) -> None:
    (tmp_path / "file.txt").write_text("x")
    (finding,) = check(tmp_path / name).findings
    assert finding.severity == "error"
    assert name in finding.message


def test_images_alone_can_be_checked_for_prediction(data: Path) -> None:
    for path in (data / "masks").iterdir():
        path.unlink()
    (data / "masks").rmdir()
    assert check(data, require_masks=False).findings == ()
    assert "masks/ missing" in check(data).findings[0].message


def test_an_error_that_no_reader_foresaw_is_a_finding(data: Path) -> None:
    class Spoiler:
        def image(self, frame: object, values: object) -> None:
            raise ZeroDivisionError("nobody expected this\nat all")

        def mask(self, path: object, frame: object, counts: object) -> None:
            raise NotImplementedError

    from leafseg.data.manifest import list_rows

    _, rows, _ = list_rows(data, require_masks=True)

    def new_look(files: tuple[Path, ...]) -> Look:
        return Spoiler()

    for scan in scan_rows(rows, new_look=new_look).values():
        assert scan.problem is not None
        assert "nobody expected this" in scan.problem
        assert "\n" not in scan.problem


# --- pixels ---


def volume(path: Path, voxels: np.ndarray, **grid: tuple[float, ...]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = SimpleITK.GetImageFromArray(voxels)
    for name, value in grid.items():
        getattr(stored, f"Set{name}")(value)
    SimpleITK.WriteImage(stored, str(path))


@pytest.fixture
def volumes(tmp_path: Path) -> Path:
    """Six volumes of three slices."""
    generator = np.random.Generator(np.random.Philox(5))
    for number in range(6):
        volume(tmp_path / "images" / f"v{number}.nii.gz", generator.normal(size=(3, 8, 9)).astype(np.float32))
        volume(tmp_path / "masks" / f"v{number}.nii.gz", (generator.random((3, 8, 9)) > 0.5).astype(np.uint8))
    return tmp_path


def test_volumes_are_counted_by_file_and_by_slice(volumes: Path) -> None:
    done = check(volumes)
    assert (done.images, done.files) == (6, 12)
    assert sum(done.parts.values()) == 18
    assert sum(done.groups.values()) == 6
    assert done.fingerprint.spacings_mm == {(1.0, 1.0, 1.0): 6}
    assert not any("duplicate" in finding.id for finding in done.findings)


@pytest.mark.parametrize(
    ("grid", "severity", "said"),
    [
        ({"Direction": (-1, 0, 0, 0, 1, 0, 0, 0, 1)}, "error", "axes point elsewhere"),
        ({"Spacing": (1, 1, 2)}, "warning", "spacing 1 x 1 x 1 and 1 x 1 x 2 mm"),
        ({"Origin": (3, 4, 0)}, "warning", "5.00 mm apart"),
    ],
)
def test_a_mask_on_another_grid_is_found(
    volumes: Path, grid: dict[str, tuple[float, ...]], severity: str, said: str
) -> None:
    spoilt = volumes / "masks" / "v2.nii.gz"
    volume(spoilt, SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(spoilt))), **grid)
    finding = only(check(volumes), "geometry-mismatch")
    assert finding.severity == severity
    assert files_of(finding) == [("images/v2.nii.gz", "masks/v2.nii.gz")]
    assert said in finding.items[0].text


def test_rounding_in_a_header_is_no_mismatch(volumes: Path) -> None:
    spoilt = volumes / "masks" / "v2.nii.gz"
    voxels = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(spoilt)))
    volume(spoilt, voxels, Spacing=(1.00001, 1, 1), Origin=(0.01, 0, 0))
    assert not any(finding.id == "geometry-mismatch" for finding in check(volumes).findings)


def test_a_volume_with_other_slices_than_its_mask_is_a_mismatch_of_size(volumes: Path) -> None:
    volume(volumes / "masks" / "v2.nii.gz", np.zeros((2, 8, 9), np.uint8))
    assert "2 frames" in only(check(volumes), "size-mismatch").message


def test_nan_is_a_warning_and_nothing_but_nan_an_error(volumes: Path) -> None:
    generator = np.random.Generator(np.random.Philox(6))
    some = generator.normal(size=(3, 8, 9)).astype(np.float32)
    some[1, 2, 3:6] = np.nan
    some[0, 0, 0] = np.inf
    (volumes / "images" / "v0.nii.gz").unlink()  # ITK's NIfTI reader turns NaN into 0 itself
    volume(volumes / "images" / "v0.nrrd", some)
    warned = only(check(volumes), "not-finite")
    assert (warned.severity, warned.items[0].text) == ("warning", "4 pixels")
    some[1] = np.nan
    volume(volumes / "images" / "v0.nrrd", some)
    stopped = only(check(volumes), "not-finite")
    assert (stopped.severity, stopped.items[0].text) == ("error", "frame 1")


def test_real_numbers_beyond_the_stated_range_would_stop_a_training(volumes: Path) -> None:
    ranged = DataSettings.model_validate({"preprocessing": {"intensity": "range"}})
    finding = only(check(volumes, settings=ranged), "intensity-range")
    assert finding.severity == "error"
    assert len(finding.items) == 6


def test_a_constant_slice_of_a_volume_is_nothing_to_report(volumes: Path) -> None:
    voxels = np.random.Generator(np.random.Philox(7)).normal(size=(3, 8, 9)).astype(np.float32)
    voxels[0] = 0
    volume(volumes / "images" / "v0.nii.gz", voxels)
    assert not any(finding.id == "constant-image" for finding in check(volumes).findings)


def test_kinds_and_sizes_that_mix_are_said(data: Path) -> None:
    for number in (3, 4):
        write_png(image(data, number), np.repeat(pixels(image(data, number))[..., None], 3, 2))
    grown = np.kron(pixels(image(data, 5)), np.ones((2, 2), np.uint8))
    write_png(image(data, 5), grown)
    write_png(mask(data, 5), np.kron(pixels(mask(data, 5)), np.ones((2, 2), np.uint8)))
    done = check(data)
    assert files_of(only(done, "mixed-kinds")) == [("images/003.png",), ("images/004.png",)]
    assert "2 sizes, from 36x40 to 72x80" in only(done, "mixed-sizes").message


def test_an_unusually_bright_image_is_noted(data: Path) -> None:
    bright = pixels(image(data, 7)) // 8 + 220
    write_png(image(data, 7), bright)
    finding = only(check(data), "intensity-outlier")
    assert files_of(finding) == [("images/007.png",)]
    assert finding.severity == "note"


# --- labels and parts ---


def test_empty_masks_are_counted_and_become_a_warning_beyond_half(data: Path) -> None:
    paths = sorted((data / "masks").iterdir())
    for path in paths[:4]:
        write_png(path, np.zeros((40, 36), np.uint8))
    finding = only(check(data), "empty-mask")
    assert (finding.severity, len(finding.items)) == ("note", 4)
    assert f"{4 / len(paths):.0%} of all" in finding.message
    for path in paths[:-10]:
        write_png(path, np.zeros((40, 36), np.uint8))
    assert only(check(data), "empty-mask").severity == "warning"


def test_values_that_could_mean_anything_are_an_error_and_the_rest_is_still_checked(data: Path) -> None:
    write_png(mask(data, 3), np.arange(40 * 36).reshape(40, 36).astype(np.uint8))
    write_png(image(data, 6), np.full((40, 36), 9, np.uint8))
    done = check(data)
    assert "data.mask_threshold=127" in only(done, "label-values").message
    assert only(done, "constant-image")
    assert sum(done.parts.values()) == done.images


def test_masks_that_the_threshold_empties_are_found(data: Path) -> None:
    write_png(mask(data, 3), pixels(mask(data, 3)) // 255)
    finding = only(check(data, settings=DataSettings(mask_threshold=127)), "emptied-mask")
    assert files_of(finding) == [("images/003.png",)]


def test_a_mask_of_the_ignore_label_alone_teaches_nothing(data: Path) -> None:
    write_png(mask(data, 3), np.full((40, 36), 7, np.uint8))
    finding = only(check(data, settings=DataSettings(ignore_label=7)), "unlabelled")
    assert files_of(finding) == [("images/003.png",)]


def test_a_slip_of_the_pen_is_not_silently_a_class_of_its_own(data: Path) -> None:
    drawn = pixels(mask(data, 5))
    drawn[0, :2] = 77
    write_png(mask(data, 5), drawn)
    (finding,) = check(data).findings
    assert (finding.id, finding.severity) == ("unexpected-label-value", "warning")
    (item,) = finding.items
    assert (item.files, item.text) == (("images/005.png",), "77 in 2 pixels")
    named = DataSettings(label_names={77: "vessel", 255: "lesion"})  # now it is expected, and rare
    assert [f.id for f in check(data, settings=named).findings if "class" in f.id] == [
        "class-absent-in-part",
        "class-imbalance",
    ]
    meant = DataSettings(foreground_labels=(77, 255))
    assert not check(data, settings=meant).findings


def test_a_rare_class_and_one_that_a_part_lacks_are_said(data: Path) -> None:
    samples = load_manifest(data, settings=SETTINGS).samples
    first = next(sample for sample in samples if sample.part == "train")
    for sample in samples:
        assert sample.mask is not None
        labels = pixels(sample.mask) // 255
        if sample is first:
            labels[0, 0] = 2
        write_png(sample.mask, labels)
    done = check(data, settings=DataSettings(label_names={1: "organ", 2: "lesion"}))
    assert "lesion" in only(done, "class-imbalance").message
    assert "validation and test part" in only(done, "class-absent-in-part").message


def test_an_empty_part_and_few_images_are_said(data: Path) -> None:
    rows = [
        {"image": f"images/{n:03d}.png", "mask": f"masks/{n:03d}.png", "part": "train" if n < 9 else "validation"}
        for n in range(12)
    ]
    done = check(as_csv(data, rows))
    assert "9 images to train on" in only(done, "few-samples").message
    assert only(done, "empty-part").severity == "warning"
    for row in rows:
        row["part"] = "train"
    severity = {finding.message.split()[5]: finding.severity for finding in check(as_csv(data, rows)).findings}
    assert (severity["validation"], severity["test"]) == ("error", "warning")  # a training would refuse, too
    assert check(as_csv(data, rows), needed=("train",)).ok
    for row in rows:
        row["part"] = "test"
    done = check(as_csv(data, rows))
    assert "no sample falls into the train part" in done.findings[0].message
    assert not done.ok


def test_a_torn_group_is_an_error_that_names_files_and_not_the_group(data: Path) -> None:
    rows = [
        {
            "image": f"images/{n:03d}.png",
            "mask": f"masks/{n:03d}.png",
            "group": "Jane Roe" if n < 3 else f"Patient {n}",
            "part": "test" if n in (0, 5) else "validation" if n == 6 else "train",
        }
        for n in range(30)
    ]
    done = check(as_csv(data, rows))
    finding = only(done, "group-across-parts")
    assert finding.severity == "error"
    assert finding.items[0].text == "3 images in test and train"
    assert files_of(finding) == [("images/000.png", "images/002.png")]
    write_check_page(data / "page.html", done)
    for text in (json.dumps(done.as_json()), (data / "page.html").read_text()):
        assert "Roe" not in text
        assert "Patient" not in text


def test_a_split_file_that_does_not_fit_is_an_error(data: Path) -> None:
    (data / "split.csv").write_text("name,part\n000,train\n")
    finding = next(f for f in check(data, split_file=data / "split.csv").findings if f.severity == "error")
    assert "not in the split file" in finding.message


# --- duplicates ---


def test_equal_images_are_found_whatever_their_compression_and_their_masks_are_compared(data: Path) -> None:
    Image.fromarray(pixels(image(data, 3))).save(data / "images" / "a.png", compress_level=0)
    write_png(data / "masks" / "a.png", pixels(mask(data, 3)))
    Image.fromarray(pixels(image(data, 4))).save(data / "images" / "b.bmp")
    half = pixels(mask(data, 4))
    half[np.cumsum(half > 0).reshape(half.shape) > (half > 0).sum() // 2] = 0
    write_png(data / "masks" / "b.png", half)
    done = check(data)
    found = {item.files: item.text for f in done.findings if f.id.startswith("duplicate") for item in f.items}
    assert set(found) == {("images/003.png", "images/a.png"), ("images/004.png", "images/b.bmp")}
    assert found["images/003.png", "images/a.png"] == "their masks are equal"
    share = (half > 0).sum() / (pixels(mask(data, 4)) > 0).sum()
    assert found["images/004.png", "images/b.bmp"] == f"their masks differ, IoU {share:.2f}"


def test_duplicates_across_parts_are_an_error_and_within_one_a_warning(data: Path) -> None:
    write_png(data / "images" / "a.png", pixels(image(data, 3)))
    write_png(data / "masks" / "a.png", pixels(mask(data, 3)))
    rows = [{"image": f"images/{n:03d}.png", "mask": f"masks/{n:03d}.png", "part": PARTS[n % 3]} for n in range(30)]
    rows.append({"image": "images/a.png", "mask": "masks/a.png", "part": "train"})  # as 003
    done = check(as_csv(data, rows))
    assert only(done, "duplicate").severity == "warning"
    rows[-1]["part"] = "test"
    done = check(as_csv(data, rows))
    finding = only(done, "duplicate-across-parts")
    assert finding.severity == "error"
    assert files_of(finding) == [("images/003.png", "images/a.png")]


def test_a_dicom_patient_in_two_parts_is_a_warning_that_names_files_and_not_the_patient(tmp_path: Path) -> None:
    pytest.importorskip("pydicom")
    generator = np.random.Generator(np.random.Philox(3))

    def write(number: int, patient: str) -> None:
        stored = SimpleITK.GetImageFromArray(generator.integers(0, 999, (9, 8), np.uint16))
        stored.SetMetaData("0010|0020", patient)
        path = tmp_path / "images" / f"{number:03d}.dcm"
        path.parent.mkdir(exist_ok=True)
        SimpleITK.WriteImage(stored, str(path))
        write_png(tmp_path / "masks" / f"{number:03d}.png", generator.integers(0, 2, (9, 8), np.uint8) * 255)

    rows = []
    for number in range(30):
        write(number, f"DOE {number // 2}")  # two images each; PARTS by number, so that only 10 and 11 are torn
        part = PARTS[number // 2 % 3] if number != 11 else "train"
        rows.append({"image": f"images/{number:03d}.dcm", "mask": f"masks/{number:03d}.png", "part": part})
    done = check(as_csv(tmp_path, rows))
    finding = only(done, "patient-across-parts")
    assert finding.severity == "warning"
    (item,) = finding.items
    assert item.files == ("images/011.dcm", "images/010.dcm")
    assert item.text == "2 files in train and test"
    assert "DOE" not in json.dumps(done.as_json())
    rows[11]["part"] = "test"
    assert not any(f.id == "patient-across-parts" for f in check(as_csv(tmp_path, rows)).findings)
    for number in range(30):
        write(number, "ANONYMOUS")  # says nothing about who is who
    assert not any(f.id == "patient-across-parts" for f in check(as_csv(tmp_path, rows)).findings)


def test_a_mirrored_copy_in_another_part_is_a_warning(data: Path) -> None:
    write_png(data / "images" / "a.png", pixels(image(data, 3))[:, ::-1])
    write_png(data / "masks" / "a.png", pixels(mask(data, 3))[:, ::-1])
    rows = [{"image": f"images/{n:03d}.png", "mask": f"masks/{n:03d}.png", "part": PARTS[n % 3]} for n in range(30)]
    rows.append({"image": "images/a.png", "mask": "masks/a.png", "part": "test"})
    done = check(as_csv(data, rows))
    finding = only(done, "near-duplicate-across-parts")
    assert finding.severity == "warning"
    assert files_of(finding) == [("images/003.png", "images/a.png")]
    assert "mirrored" in finding.items[0].text
    assert done.ok


def test_black_images_are_constant_and_not_duplicates(data: Path) -> None:
    for number in (3, 4, 5):
        write_png(image(data, number), np.zeros((40, 36), np.uint8))
    done = check(data)
    assert len(only(done, "constant-image").items) == 3
    assert not any("duplicate" in finding.id for finding in done.findings)
    parts = {3: "train", 4: "test"}
    rows = [
        {"image": f"images/{n:03d}.png", "mask": f"masks/{n:03d}.png", "part": parts.get(n, PARTS[n % 3])}
        for n in range(30)
    ]
    assert not check(as_csv(data, rows)).ok  # equal files in two parts, which no training accepts


@pytest.mark.skipif(not (SHARED / "busi").is_dir(), reason="needs the public sample data (LEAFSEG_SHARED/data)")
def test_the_known_duplicate_of_busi_is_found() -> None:
    finding = only(check(SHARED / "busi"), "duplicate")
    assert files_of(finding) == [("images/benign_433.png", "images/malignant_145.png")]
    assert "their masks differ" in finding.items[0].text


# --- the page and the JSON ---


def test_the_page_is_self_contained_shows_pictures_and_escapes_names(data: Path) -> None:
    bad = "<script>alert(1)</script>.png".replace("/", "_")
    write_png(data / "images" / bad, np.full((40, 36), 9, np.uint8))
    write_png(data / "masks" / bad, np.zeros((40, 36), np.uint8))
    done = check(data)
    write_check_page(data / "page.html", done)
    page = (data / "page.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert page.count("data:image/jpeg;base64,") >= 12
    assert "constant-image" in page
    assert "prefers-color-scheme: dark" in page


def test_the_page_of_hopeless_data_can_be_written_too(tmp_path: Path) -> None:
    write_check_page(tmp_path / "page.html", check(tmp_path / "nothing"))
    assert "mend the errors first" in (tmp_path / "page.html").read_text()


def test_the_json_holds_every_case(data: Path) -> None:
    for number in range(12):
        write_png(mask(data, number), np.zeros((40, 36), np.uint8))
    written = check(data).as_json()
    (finding,) = written["findings"]
    assert [item["files"] for item in finding["items"]] == [[f"images/{n:03d}.png"] for n in range(12)]
    assert len(finding["message"]) < 300
    assert written["ok"] is True
    assert written["counts"] == {"error": 0, "warning": 0, "note": 1}
    assert math.isclose(written["files"] / written["seconds"], written["files_per_second"], rel_tol=0.2)
