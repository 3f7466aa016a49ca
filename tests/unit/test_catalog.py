"""Known data sets: recognising what was downloaded, pairing, uniting and cropping masks, and the parts."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from leafseg.cli import app
from leafseg.config import DataSettings
from leafseg.data.catalog import KNOWN_SETS, known_set, prepare, recognise
from leafseg.data.catalog.layouts import natural_key
from leafseg.data.catalog.preparation import disc_box, refuge_regions
from leafseg.data.catalog.protocols import Assignment, Item, clean_parts, paper_parts
from leafseg.data.catalog.sets import CVC_SEQUENCES
from leafseg.data.images import read_image, read_mask
from leafseg.data.manifest import PARTS, UNUSED, Manifest, default_part, load_manifest
from leafseg.errors import DataError

SIZE = (8, 8)
IDS = [f"{n:x}" * 64 for n in range(1, 5)]


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def picture(path: Path, seed: int, *, size: tuple[int, int] = SIZE) -> Path:
    """An RGB image that no other seed makes."""
    return save(path, np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def mask(path: Path, rows: slice = slice(2, 5), *, value: int = 255, size: tuple[int, int] = SIZE) -> Path:
    pixels = np.zeros(size, np.uint8)
    pixels[rows] = value
    return save(path, pixels)


def load(data: Path) -> Manifest:
    return load_manifest(data, settings=DataSettings())


def rows_of(out: Path) -> list[dict[str, str]]:
    with (out / "manifest.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def complaint(source: Path, out: Path, **options: object) -> str:
    with pytest.raises(DataError) as caught:
        prepare(source, out, **options)
    assert "\n" not in str(caught.value)
    assert not (out / "manifest.csv").exists()
    return str(caught.value)


# --- tiny archives in the layouts of the real ones


def cvc(root: Path, frames: range = range(1, 613), suffix: str = ".png") -> Path:
    """CVC-ClinicDB; an image's pixels are its frame number."""
    for folder in ("Original", "Ground Truth"):
        (root / folder).mkdir(parents=True)
    truth = np.zeros(SIZE, np.uint8)
    truth[2:5] = 255
    for frame in frames:
        pixels = np.full((*SIZE, 3), (frame // 256, frame % 256, 0), np.uint8)
        Image.fromarray(pixels).save(root / "Original" / f"{frame}{suffix}")
        Image.fromarray(truth).save(root / "Ground Truth" / f"{frame}{suffix}")
    return root


def refuge_mask(path: Path, size: tuple[int, int] = (40, 50)) -> Path:
    """Disc: rows 10..19, columns 20..27; cup: rows 12..15, columns 22..25."""
    pixels = np.full(size, 255, np.uint8)
    pixels[10:20, 20:28] = 128
    pixels[12:16, 22:26] = 0
    return save(path, pixels)


def refuge_folders(root: Path) -> Path:
    for part, stems in (("train", ("g0001", "n0001", "n0002")), ("val", ("V0001",)), ("test", ("T0001", "T0002"))):
        for n, stem in enumerate(stems):
            picture(root / "REFUGE2" / part / "images" / f"{stem}.jpg", len(part) * 10 + n, size=(40, 50))
            refuge_mask(root / "REFUGE2" / part / "mask" / f"{stem}.bmp")
    (root / "__MACOSX" / "REFUGE2").mkdir(parents=True)
    return root


def refuge_archives(root: Path) -> Path:
    """The challenge's archives, each unpacked into a folder of its own name."""
    names = [
        ("REFUGE-Training400/Training400/Glaucoma/g0001", "Annotation-Training400/Disc_Cup_Masks/Glaucoma/g0001"),
        (
            "REFUGE-Training400/Training400/Non-Glaucoma/n0001",
            "Annotation-Training400/Disc_Cup_Masks/Non-Glaucoma/n0001",
        ),
        ("REFUGE-Validation400/V0001", "REFUGE-Validation400-GT/Disc_Cup_Masks/V0001"),
        ("REFUGE-Test400/T0001", "REFUGE-Test-GT/Disc_Cup_Masks/N/T0001"),
    ]
    for seed, (image, truth) in enumerate(names):
        picture(root / f"{image}.jpg", seed, size=(40, 50))
        refuge_mask(root / f"{truth}.bmp")
    return root


def qata(root: Path) -> Path:
    names = {
        "Train Set": ["covid_1", "covid_2", "sub-S01_ses-E1_run-1_bp-chest_vp-ap_dx", "sub-S02_ses-E1_run-1_vp-ap_dx"],
        "Test Set": ["covid_9", "sub-S01_ses-E2_run-1_bp-chest_vp-pa_cr"],
    }
    seed = 0
    for part, stems in names.items():
        for stem in stems:
            seed += 1
            picture(root / part / "Images" / f"{stem}.png", seed)
            mask(root / part / "Ground-truths" / f"mask_{stem}.png")
    return root


def isic(root: Path, *, parts: tuple[str, ...] = ("Training", "Validation", "Test"), count: int = 4) -> Path:
    """Every archive nests a folder of its own name, as some unpacking programs do."""
    for offset, part in enumerate(parts):
        images, truths = f"ISIC2018_Task1-2_{part}_Input", f"ISIC2018_Task1_{part}_GroundTruth"
        for n in range(count):
            stem = f"ISIC_{offset * 100 + n:07d}"
            picture(root / images / images / f"{stem}.jpg", offset * 100 + n)
            mask(root / truths / truths / f"{stem}_segmentation.png")
        (root / images / images / "LICENSE.txt").write_text("terms")
        (root / truths / truths / "ATTRIBUTION.txt").write_text("names")
    return root


def busi(root: Path) -> Path:
    """Two tumours in ``benign (2)``; ``malignant (1)`` is ``benign (1)`` again; alpha; a mask without an image."""
    picture(root / "benign" / "benign (1).png", 1)
    mask(root / "benign" / "benign (1)_mask.png")
    picture(root / "benign" / "benign (2).png", 2)
    mask(root / "benign" / "benign (2)_mask.png", slice(0, 2))
    mask(root / "benign" / "benign (2)_mask_1.png", slice(6, 8))
    picture(root / "malignant" / "malignant (1).png", 1)
    mask(root / "malignant" / "malignant (1)_mask.png")
    picture(root / "malignant" / "malignant (2).PNG", 3)
    alpha = np.zeros((*SIZE, 4), np.uint8)
    alpha[..., 3] = 255
    alpha[2:5, :, :3] = 255
    save(root / "malignant" / "malignant (2)_mask.png", alpha)
    mask(root / "malignant" / "malignant (7)_mask.png")
    picture(root / "normal" / "normal (1).png", 4)
    mask(root / "normal" / "normal (1)_mask.png", slice(0, 0))
    picture(root / "normal" / "normal (2).png", 5)
    return root


def kvasir(root: Path) -> Path:
    for n in range(4):
        stem = f"cju{n:022d}"
        picture(root / "images" / f"{stem}.jpg", n, size=(16, 16))
        mask(root / "masks" / f"{stem}.jpg", slice(4, 12), size=(16, 16))
    (root / "kavsir_bboxes.json").write_text("{}")
    return root


def dsb(root: Path) -> Path:
    for n, cell in enumerate(IDS):
        picture(root / cell / "images" / f"{cell}.png", n)
        mask(root / cell / "masks" / f"{n:064x}.png", slice(0, 1))
        mask(root / cell / "masks" / f"{n + 99:064x}.png", slice(5, 7))
    return root


def ph2(root: Path) -> Path:
    for n, case in enumerate(("IMD002", "IMD003", "IMD004")):
        folder = root / "PH2 Dataset images" / case
        picture(folder / f"{case}_Dermoscopic_Image" / f"{case}.bmp", n)
        mask(folder / f"{case}_lesion" / f"{case}_lesion.bmp")
        mask(folder / f"{case}_roi" / f"{case}_R1_Label3.bmp")
    (root / "PH2_dataset.xlsx").write_bytes(b"a table")
    return root


def montgomery(root: Path) -> Path:
    for n in (1, 2, 3, 4):
        stem = f"MCUCXR_{n:04d}_0"
        picture(root / "CXR_png" / f"{stem}.png", n)
        mask(root / "ManualMask" / "leftMask" / f"{stem}.png", slice(0, 3))
        if n < 4:
            mask(root / "ManualMask" / "rightMask" / f"{stem}.png", slice(5, 8))
    (root / "CXR_png" / "Thumbs.db").write_bytes(b"foreign")
    return root


def shenzhen(root: Path) -> Path:
    for n in (1, 2, 3, 4):
        stem = f"CHNCXR_{n:04d}_{n % 2}"
        picture(root / "ChinaSet_AllFiles" / "CXR_png" / f"{stem}.png", n)
        if n != 3:
            mask(root / "mask" / "mask" / f"{stem}_mask.png")
    return root


def few_cvc(root: Path) -> Path:
    return cvc(root / "CVC-ClinicDB", range(20, 32))


BUILDERS: dict[str, Callable[[Path], Path]] = {
    "refuge2": refuge_folders,
    "cvc_clinicdb": few_cvc,
    "qata_cov19": qata,
    "isic2018": isic,
    "busi": busi,
    "kvasir_seg": kvasir,
    "dsb2018": dsb,
    "ph2": ph2,
    "montgomery": montgomery,
    "shenzhen": shenzhen,
}
PAIRS = {
    "refuge2": 6, "cvc_clinicdb": 12, "qata_cov19": 6, "isic2018": 12, "busi": 6, "kvasir_seg": 4, "dsb2018": 4,
    "ph2": 3, "montgomery": 3, "shenzhen": 3,
}  # fmt: skip


@pytest.mark.parametrize("name", [known.name for known in KNOWN_SETS])
def test_every_known_set_is_recognised_prepared_and_read_by_training(name: str, tmp_path: Path) -> None:
    source = BUILDERS[name](tmp_path / "download")
    done = prepare(source, tmp_path / "out")
    assert done.known.name == name
    assert sum(done.counts.values()) == PAIRS[name]
    unused = done.counts[UNUSED]
    from_folder, from_file = load(tmp_path / "out"), load(tmp_path / "out" / "manifest.csv")
    assert from_folder == from_file
    assert len(from_folder) == PAIRS[name] - unused
    assert Counter(sample.part for sample in from_folder.samples) == {
        part: count for part, count in done.counts.items() if count and part != UNUSED
    }
    for sample in from_folder.samples:
        assert set(np.unique(read_mask(sample.mask))) <= {0, 255}
    record = json.loads((tmp_path / "out" / "catalog.json").read_text())
    text = (tmp_path / "out" / "manifest.csv").read_bytes()
    assert record["manifest_sha256"] == hashlib.sha256(text).hexdigest()
    assert record["images"]["found"] == PAIRS[name]
    assert record["images"]["expected"] == known_set(name).total
    assert (record["name"], record["protocol"]) == (name, "clean")


@pytest.mark.parametrize("name", [known.name for known in KNOWN_SETS])
def test_preparing_again_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    source = BUILDERS[name](tmp_path / "download")

    def files() -> dict[str, bytes]:
        out = tmp_path / "out"
        return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}

    prepare(source, tmp_path / "out")
    first = files()
    prepare(source, tmp_path / "out")
    assert files() == first


@pytest.mark.parametrize("name", [known.name for known in KNOWN_SETS])
def test_a_set_one_folder_deeper_is_found_and_another_set_is_not_mistaken_for_it(name: str, tmp_path: Path) -> None:
    BUILDERS[name](tmp_path / "downloads" / "inner")
    assert recognise(tmp_path / "downloads").known.name == name
    for other in KNOWN_SETS:
        if other.name != name:
            with pytest.raises(DataError, match=r"is not here; expected is|is incomplete"):
                recognise(tmp_path / "downloads", name=other.name)


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        ("cvc_clinicdb", "CVC-ClinicDB/Original"),
        ("isic2018", "ISIC2018_Task1-2_Training_Input"),
        ("qata_cov19", "Train Set"),
        ("busi", "benign"),
        ("montgomery", "CXR_png"),
    ],
)
def test_a_folder_inside_the_set_is_enough(name: str, inside: str, tmp_path: Path) -> None:
    source = BUILDERS[name](tmp_path / "download")
    assert recognise(tmp_path / "download" / inside).known.name == name
    assert recognise(source).known.name == name


def test_a_set_beside_the_given_folder_is_not_taken(tmp_path: Path) -> None:
    cvc(tmp_path, range(1, 4))
    (tmp_path / "mine").mkdir()
    with pytest.raises(DataError, match="no known data set is here, found are nothing"):
        recognise(tmp_path / "mine")


# --- pairs and masks, set by set


def test_masks_that_are_final_stay_where_they_are_and_images_are_never_copied(tmp_path: Path) -> None:
    source = qata(tmp_path / "download")
    prepare(source, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["catalog.json", "manifest.csv"]
    (row,) = [row for row in rows_of(tmp_path / "out") if "covid_9" in row["image"]]
    assert row["image"] == "../download/Test Set/Images/covid_9.png"
    assert row["mask"] == "../download/Test Set/Ground-truths/mask_covid_9.png"


def test_masks_of_one_image_are_united(tmp_path: Path) -> None:
    prepare(busi(tmp_path / "busi"), tmp_path / "out")
    expected = np.zeros(SIZE, np.uint8)
    expected[0:2] = expected[6:8] = 255
    assert (read_mask(tmp_path / "out" / "masks" / "benign (2).png") == expected).all()
    prepare(dsb(tmp_path / "dsb"), tmp_path / "nuclei")
    assert read_mask(tmp_path / "nuclei" / "masks" / f"{IDS[0]}.png").any(axis=1).tolist() == [
        True, False, False, False, False, True, True, False,
    ]  # fmt: skip
    prepare(montgomery(tmp_path / "cxr"), tmp_path / "lungs")
    united = read_mask(tmp_path / "lungs" / "masks" / "MCUCXR_0001_0.png")
    assert united[:, 0].tolist() == [255, 255, 255, 0, 0, 255, 255, 255]


def test_half_a_pair_of_lungs_is_left_out_with_a_warning(tmp_path: Path) -> None:
    done = prepare(montgomery(tmp_path / "MontgomerySet"), tmp_path / "out")
    assert "images without a mask, left out: 1 (MCUCXR_0004_0.png)" in done.warnings
    assert "images: 3 pairs were found, the published set has 138" in done.warnings


def test_busi_normal_images_have_empty_masks_and_foreign_masks_are_named(tmp_path: Path) -> None:
    done = prepare(busi(tmp_path / "busi"), tmp_path / "out")
    assert not read_mask(tmp_path / "out" / "masks" / "normal (2).png").any()  # it had no file
    by_name = {Path(row["image"]).stem: row for row in rows_of(tmp_path / "out")}
    assert by_name["normal (1)"]["mask"].startswith("../busi/normal/")  # its empty mask is final
    assert "masks without an image, left out: 1 (malignant (7)_mask.png)" in done.warnings
    assert Path(by_name["malignant (2)"]["image"]).suffix == ".PNG"


def test_a_mask_with_alpha_keeps_its_shape(tmp_path: Path) -> None:
    prepare(busi(tmp_path / "busi"), tmp_path / "out")
    by_name = {sample.name: sample for sample in load(tmp_path / "out").samples}
    assert (read_mask(by_name["malignant (2)"].mask) > 0).any(axis=1).tolist() == [False] * 2 + [True] * 3 + [False] * 3


def test_equal_pictures_share_a_part_even_in_another_file_format(tmp_path: Path) -> None:
    source = busi(tmp_path / "busi")
    Image.open(source / "benign" / "benign (1).png").save(source / "normal" / "normal (3).bmp")
    prepare(source, tmp_path / "out")
    by_name = {Path(row["image"]).stem: row for row in rows_of(tmp_path / "out")}
    copies = [by_name[name] for name in ("benign (1)", "malignant (1)", "normal (3)")]
    assert len({row["part"] for row in copies}) == 1
    assert len({row["group"] for row in copies}) == 1
    assert copies[0]["group"].startswith("copies-")
    assert by_name["benign (2)"]["group"] == ""


def test_jpeg_masks_become_crisp_png_masks(tmp_path: Path) -> None:
    prepare(kvasir(tmp_path / "Kvasir-SEG"), tmp_path / "out")
    raw = np.asarray(Image.open(tmp_path / "Kvasir-SEG" / "masks" / f"cju{0:022d}.jpg"))
    written = read_mask(tmp_path / "out" / "masks" / f"cju{0:022d}.png")
    assert set(np.unique(written)) == {0, 255}
    assert ((written == 255) == (raw > 127)).all()


def test_zero_one_masks_and_palette_masks_are_rewritten_not_lost(tmp_path: Path) -> None:
    source = cvc(tmp_path / "CVC-ClinicDB", range(1, 4))
    mask(source / "Ground Truth" / "1.png", value=1)
    palette = Image.fromarray(np.repeat([0, 1], 32).astype(np.uint8).reshape(SIZE), mode="P")
    palette.putpalette([0, 0, 0, 255, 255, 255])
    palette.save(source / "Ground Truth" / "2.png")
    prepare(source, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out" / "masks").iterdir()) == ["1.png", "2.png"]
    assert read_mask(tmp_path / "out" / "masks" / "1.png").sum() == 3 * 8 * 255
    assert read_mask(tmp_path / "out" / "masks" / "2.png").sum() == 4 * 8 * 255


@pytest.mark.parametrize("top", [40, 100, 127, 200])
def test_a_dark_jpeg_mask_is_cut_at_half_of_its_own_maximum(top: int, tmp_path: Path) -> None:
    source = kvasir(tmp_path / "Kvasir-SEG")
    name = f"cju{0:022d}"
    mask(source / "masks" / f"{name}.jpg", slice(0, 8), value=top, size=(16, 16))  # whole blocks of 8: no noise
    prepare(source, tmp_path / "out")
    expected = np.zeros((16, 16), np.int64)
    expected[:8] = 255
    assert (read_mask(tmp_path / "out" / "masks" / f"{name}.png") == expected).all()


def test_a_jpeg_mask_as_dark_as_noise_is_refused(tmp_path: Path) -> None:
    source = kvasir(tmp_path / "Kvasir-SEG")
    path = mask(source / "masks" / f"cju{0:022d}.jpg", slice(0, 8), value=8, size=(16, 16))
    top = int(np.asarray(Image.open(path)).max())
    assert 0 < top <= 16
    assert f"{path.name}: the mask's highest value is {top}, which in a JPEG" in complaint(source, tmp_path / "out")


@pytest.mark.parametrize("top", [200, 255, 1000, 32767, 65535])
def test_a_16_bit_mask_is_cut_at_half_of_its_own_maximum(top: int, tmp_path: Path) -> None:
    source = cvc(tmp_path / "CVC-ClinicDB", range(1, 4))
    pixels = np.zeros(SIZE, np.uint16)
    pixels[2:5] = top
    save(source / "Ground Truth" / "1.png", pixels)
    done = prepare(source, tmp_path / "out")
    by_name = {sample.name: sample for sample in load(tmp_path / "out").samples}
    assert (read_mask(by_name["1"].mask) == (pixels > 0) * 255).all()
    assert not any("grey levels" in warning for warning in done.warnings)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_grey_levels_of_a_lossless_mask_that_become_background_are_reported(kind: type, tmp_path: Path) -> None:
    source = cvc(tmp_path / "CVC-ClinicDB", range(1, 4))
    pixels = np.zeros(SIZE, kind)
    pixels[2:5], pixels[5] = 200, 100  # a quarter of what is set lies at or below half
    save(source / "Ground Truth" / "1.png", pixels)
    done = prepare(source, tmp_path / "out")
    assert (read_mask(tmp_path / "out" / "masks" / "1.png") == (pixels == 200) * 255).all()
    said = (
        "masks with several grey levels, whose darker half became background: 1 (up to 25% of a mask's non-zero "
        "pixels; 1.png)"
    )
    assert said in done.warnings
    assert said in json.loads((tmp_path / "out" / "catalog.json").read_text())["warnings"]


def test_doubtful_masks_and_damaged_files_are_errors(tmp_path: Path) -> None:
    source = cvc(tmp_path / "CVC-ClinicDB", range(1, 4))
    mask(source / "Ground Truth" / "1.png", value=38)
    assert "1.png: the mask's highest value is 38" in complaint(source, tmp_path / "out")
    mask(source / "Ground Truth" / "1.png")
    (source / "Original" / "2.png").write_bytes(b"no image")
    assert "2.png: is not an image that can be read" in complaint(source, tmp_path / "out")
    colours = np.zeros((*SIZE, 3), np.uint8)
    colours[2:5, :, 0] = 255
    save(source / "Ground Truth" / "1.png", colours)
    assert "and 1 more files are unusable" in complaint(source, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))  # nothing half done is left


def test_a_mask_of_another_size_is_left_out_with_a_warning(tmp_path: Path) -> None:
    source = cvc(tmp_path / "CVC-ClinicDB", range(1, 4))
    mask(source / "Ground Truth" / "2.png", size=(9, 8))
    done = prepare(source, tmp_path / "out")
    assert "images left out: 1 (2.png is 8x9, its image 8x8)" in done.warnings
    assert len(rows_of(tmp_path / "out")) == 2


def test_cvc_is_found_as_png_or_tif_and_png_wins(tmp_path: Path) -> None:
    cvc(tmp_path / "CVC" / "TIF", range(1, 4), suffix=".tif")
    assert {pair.image.suffix for pair in recognise(tmp_path).pairs} == {".tif"}
    cvc(tmp_path / "CVC" / "PNG", range(1, 4))
    found = recognise(tmp_path / "CVC")
    assert {pair.image.suffix for pair in found.pairs} == {".png"}
    assert found.layout == "PNG/Original + PNG/Ground Truth"


def test_cvc_is_found_in_any_case_of_its_folders(tmp_path: Path) -> None:
    source = cvc(tmp_path / "cvc", range(9, 12))
    (source / "Original").rename(source / "original")
    (source / "Ground Truth").rename(source / "ground_truth")
    assert [pair.name for pair in recognise(source).pairs] == ["9", "10", "11"]


def test_names_are_sorted_by_the_value_of_their_numbers() -> None:
    assert sorted(["10", "9", "a2", "a10", "a"], key=natural_key) == ["9", "10", "a", "a2", "a10"]


def test_only_the_training_masks_of_isic_are_needed(tmp_path: Path) -> None:
    source = isic(tmp_path, parts=("Training", "Validation"))
    shutil.rmtree(source / "ISIC2018_Task1_Validation_GroundTruth")
    found = recognise(source)
    assert found.counts == {"train": 4}
    assert all(pair.masks[0].name == f"{pair.name}_segmentation.png" for pair in found.pairs)


def test_shenzhen_masks_beside_the_set_are_found_and_the_rest_reported(tmp_path: Path) -> None:
    source = shenzhen(tmp_path / "download")
    for start in (source, source / "ChinaSet_AllFiles"):
        found = recognise(start)
        assert found.lonely_images == ("CHNCXR_0003_1.png",)
        assert len(found.pairs) == 3


def test_ph2_takes_the_lesion_and_not_the_other_regions(tmp_path: Path) -> None:
    found = recognise(ph2(tmp_path / "PH2Dataset"))
    assert [pair.masks[0].name for pair in found.pairs] == [f"IMD00{n}_lesion.bmp" for n in (2, 3, 4)]


def test_qata_patients_are_read_from_the_names(tmp_path: Path) -> None:
    groups = {pair.name: pair.group for pair in recognise(qata(tmp_path)).pairs}
    assert groups["sub-S01_ses-E1_run-1_bp-chest_vp-ap_dx"] == "sub-s01"
    assert groups["sub-S01_ses-E2_run-1_bp-chest_vp-pa_cr"] == "sub-s01"
    assert groups["covid_1"] is None


# --- REFUGE2's crop


def test_the_crop_is_the_square_around_the_disc_with_half_its_side_around_it() -> None:
    disc = np.zeros((40, 50), bool)
    disc[10:20, 20:28] = True
    # The longer side is 10; with 5 on each side the square is 20: rows 10-5.., columns centred on (20+28)/2 = 24.
    assert disc_box(disc) == (slice(5, 25), slice(14, 34))


def test_the_crop_moves_inside_at_the_border_and_is_cut_in_a_small_image() -> None:
    disc = np.zeros((40, 50), bool)
    disc[0:10, 42:50] = True
    assert disc_box(disc) == (slice(0, 20), slice(30, 50))
    flat = np.zeros((12, 50), bool)
    flat[1:11, 20:28] = True
    assert disc_box(flat) == (slice(0, 12), slice(14, 34))


def test_refuge_crops_hold_the_pixels_and_the_cup_or_the_disc(tmp_path: Path) -> None:
    source = refuge_folders(tmp_path / "download")
    prepare(source, tmp_path / "cup")
    image = read_image(source / "REFUGE2" / "val" / "images" / "V0001.jpg")
    assert (read_image(tmp_path / "cup" / "images" / "V0001.png") == image[5:25, 14:34]).all()
    cup = np.zeros((20, 20), np.int64)
    cup[12 - 5 : 16 - 5, 22 - 14 : 26 - 14] = 255
    assert (read_mask(tmp_path / "cup" / "masks" / "V0001.png") == cup).all()
    prepare(source, tmp_path / "disc", target="disc")
    disc = np.zeros((20, 20), np.int64)
    disc[10 - 5 : 20 - 5, 20 - 14 : 28 - 14] = 255  # the cup is part of the disc
    assert (read_mask(tmp_path / "disc" / "masks" / "V0001.png") == disc).all()
    assert json.loads((tmp_path / "disc" / "catalog.json").read_text())["target"] == "disc"


def test_refuge_as_the_challenge_published_it_gives_the_same_parts(tmp_path: Path) -> None:
    prepare(refuge_archives(tmp_path / "download"), tmp_path / "out")
    assert {Path(row["image"]).stem: row["part"] for row in rows_of(tmp_path / "out")} == {
        "g0001": "train", "n0001": "train", "V0001": "validation", "T0001": "test",
    }  # fmt: skip


def test_refuge_masks_with_other_values_are_refused() -> None:
    with pytest.raises(DataError, match="corners are not white"):
        refuge_regions(np.array([[0, 0, 0], [0, 2, 0], [0, 1, 0]]), source=Path("m.bmp"))


def test_a_photograph_without_a_disc_is_left_out(tmp_path: Path) -> None:
    source = refuge_folders(tmp_path / "download")
    save(source / "REFUGE2" / "train" / "mask" / "g0001.bmp", np.full((40, 50), 255, np.uint8))
    done = prepare(source, tmp_path / "out")
    assert "images left out: 1 (g0001.bmp holds no disc to crop around)" in done.warnings


# --- parts


@pytest.fixture(scope="module")
def full_cvc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All 612 frames, 8x8 pixels each."""
    return cvc(tmp_path_factory.mktemp("download") / "CVC-ClinicDB")


def test_the_sequences_cover_every_frame_once() -> None:
    assert len(CVC_SEQUENCES) == 29
    assert [frame for first, last in CVC_SEQUENCES for frame in range(first, last + 1)] == [*range(1, 613)]


def test_the_clean_protocol_tears_no_sequence_and_comes_near_80_10_10(full_cvc: Path, tmp_path: Path) -> None:
    done = prepare(full_cvc, tmp_path / "out")
    assert not done.warnings
    parts_of = defaultdict(set)
    for row in rows_of(tmp_path / "out"):
        frame = int(Path(row["image"]).stem)
        (sequence,) = [n for n, (first, last) in enumerate(CVC_SEQUENCES, start=1) if first <= frame <= last]
        assert row["group"] == f"sequence-{sequence:02d}"
        parts_of[sequence].add(row["part"])
    assert len(parts_of) == 29
    assert all(len(parts) == 1 for parts in parts_of.values())
    # A part stops where the next sequence (of at most 26 frames) would lead away from its tenth.
    assert abs(done.counts["test"] - 61.2) <= 13
    assert abs(done.counts["validation"] - 61.2) <= 13
    assert sum(done.counts.values()) == 612
    assert Counter(sample.part for sample in load(tmp_path / "out").samples)["test"] == done.counts["test"]


def test_the_paper_protocol_has_the_papers_sizes_and_says_what_is_wrong_with_them(
    full_cvc: Path, tmp_path: Path
) -> None:
    done = prepare(full_cvc, tmp_path / "out", protocol="paper")
    assert done.counts == {"train": 490, "validation": 62, "test": 60, UNUSED: 0}
    (warning,) = done.warnings
    assert "of 29 groups lie in several parts" in warning
    assert any("chose its checkpoint on the test part" in note for note in done.notes)
    assert load(tmp_path / "out").part("test").samples  # torn groups are not stored, so that the list can be read
    first = (tmp_path / "out" / "manifest.csv").read_bytes()
    prepare(full_cvc, tmp_path / "out", protocol="paper", seed=7)
    assert (tmp_path / "out" / "manifest.csv").read_bytes() != first
    assert json.loads((tmp_path / "out" / "catalog.json").read_text())["seed"] == 7


def items_of(count: int, *, folder: str = "", group: Callable[[int], str | None] = lambda n: None) -> list[Item]:
    digests = [hashlib.sha256(f"{folder}{n}".encode()).hexdigest() for n in range(count)]
    return [Item(f"{folder}{n}", group(n), folder, digest, digest) for n, digest in enumerate(digests)]


def test_isic_has_1815_and_779_of_its_training_images() -> None:
    items = items_of(2594, folder="train") + items_of(100, folder="validation") + items_of(1000, folder="test")
    assigned = paper_parts(items, known_set("isic2018"), seed=1, validation_share=0)
    assert Counter(assigned.parts) == {"train": 1815, "test": 779, UNUSED: 1100}
    assert not assigned.warnings
    carved = paper_parts(items, known_set("isic2018"), seed=1, validation_share=0.2)
    assert Counter(carved.parts) == {"train": 1452, "validation": 363, "test": 779, UNUSED: 1100}
    pairs = list(zip(assigned.parts, carved.parts, strict=True))
    assert all(before == "train" for before, after in pairs if before != after)


def test_with_fewer_images_the_papers_sizes_are_scaled_and_both_numbers_named() -> None:
    assigned = paper_parts(items_of(102), known_set("cvc_clinicdb"), seed=1, validation_share=0)
    # 612 / 6: 62/6 = 10.3, 60/6 = 10
    assert Counter(assigned.parts) == {"train": 82, "validation": 10, "test": 10}
    assert assigned.warnings == ("the paper's parts are 490/62/60 of 612 images, 102 are here: the parts are 82/10/10",)


def test_the_papers_qata_parts_are_the_sets_own_folders(tmp_path: Path) -> None:
    done = prepare(qata(tmp_path / "download"), tmp_path / "out", protocol="paper")
    for row in rows_of(tmp_path / "out"):
        assert row["part"] == ("train" if "/Train Set/" in row["image"] else "test")
        assert not row["group"]
    assert any("1 of 2 groups lie in several parts" in warning for warning in done.warnings)
    assert any("--set training.validations=0" in note for note in done.notes)
    assert len(load(tmp_path / "out")) == 6


def test_a_validation_share_is_carved_out_of_train_by_group() -> None:
    items = items_of(400, folder="train", group=lambda n: f"patient {n // 4}") + items_of(50, folder="test")
    assigned = paper_parts(items, known_set("qata_cov19"), seed=1, validation_share=0.1)
    assert Counter(assigned.parts) == {"train": 360, "validation": 40, "test": 50}
    parts = defaultdict(set)
    for item, part in zip(items, assigned.parts, strict=True):
        parts[item.group or item.name].add(part)
    assert all(len(found) == 1 for found in parts.values())


def test_a_patient_of_the_official_test_folder_leaves_training(tmp_path: Path) -> None:
    done = prepare(qata(tmp_path / "download"), tmp_path / "out")
    parts = {Path(row["image"]).stem: row["part"] for row in rows_of(tmp_path / "out")}
    assert parts["sub-S01_ses-E2_run-1_bp-chest_vp-pa_cr"] == parts["covid_9"] == "test"
    assert parts["sub-S01_ses-E1_run-1_bp-chest_vp-ap_dx"] == UNUSED
    assert done.counts["test"] == 2
    assert done.counts["validation"] == 1
    assert any("because their group" in warning and warning.endswith(": 1") for warning in done.warnings)


def test_many_ungrouped_images_fall_where_a_run_without_a_manifest_would_put_them() -> None:
    items = items_of(500)
    assigned = clean_parts(items)
    assert list(assigned.parts) == [default_part(None, item.sha256) for item in items]


def test_a_file_that_lies_in_two_folders_stays_in_the_later_part_only() -> None:
    train, test = items_of(5, folder="train"), items_of(3, folder="test")
    copy = Item("copy", None, "train", test[0].sha256, test[0].pixels_sha256)
    assigned = paper_parts([*train, copy, *test], known_set("qata_cov19"), seed=1, validation_share=0)
    assert assigned.parts == ("train",) * 5 + (UNUSED,) + ("test",) * 3
    assert assigned.warnings == ("images left out because the same file lies in the validation or test part: 1",)


@st.composite
def _items(draw: st.DrawFn) -> list[Item]:
    count = draw(st.integers(1, 140))
    pictures = draw(st.lists(st.integers(0, 100), min_size=count, max_size=count))
    groups = draw(st.lists(st.none() | st.integers(0, 30), min_size=count, max_size=count))
    folders = draw(st.lists(st.sampled_from(["train", "validation", "test", "train"]), min_size=count, max_size=count))
    official = draw(st.booleans())
    return [
        Item(str(n), None if g is None else f"g{g}", f if official else "", f"{p:064x}", f"{p:064x}")
        for n, (p, g, f) in enumerate(zip(pictures, groups, folders, strict=True))
    ]


@given(_items())
@settings(max_examples=60, deadline=None)
def test_clean_parts_never_tear_a_group_or_a_picture_and_respect_official_folders(items: list[Item]) -> None:
    assigned = clean_parts(items)
    _check_whole(items, assigned)
    for item, part in zip(items, assigned.parts, strict=True):
        if item.folder == "test":
            assert part == "test"
        if item.folder == "train" and any(other.folder == "test" for other in items):
            assert part != "test"


def _check_whole(items: list[Item], assigned: Assignment) -> None:
    for key in (lambda n: items[n].group, lambda n: items[n].pixels_sha256, lambda n: assigned.groups[n]):
        found = defaultdict(set)
        for n, part in enumerate(assigned.parts):
            if key(n) is not None and part != UNUSED:
                found[key(n)].add(part)
        assert all(len(parts) == 1 for parts in found.values())
    assert set(assigned.parts) <= {*PARTS, UNUSED}


@pytest.mark.parametrize("count", [4, 30, 99])
def test_few_groups_still_give_every_part_its_share(count: int) -> None:
    counts = Counter(clean_parts(items_of(count)).parts)
    held_out = max(1, round(count / 10))
    assert counts["test"] == counts["validation"] == held_out
    assert counts["train"] == count - 2 * held_out


# --- folders and errors


def test_both_folders_can_be_moved_together(tmp_path: Path) -> None:
    prepare(busi(tmp_path / "old" / "deep" / "busi"), tmp_path / "old" / "prepared")
    before = load(tmp_path / "old" / "prepared").split_sha256
    (tmp_path / "old").rename(tmp_path / "new")
    assert load(tmp_path / "new" / "prepared").split_sha256 == before


def test_paths_hold_when_the_output_folder_is_a_symbolic_link(tmp_path: Path) -> None:
    (tmp_path / "disk" / "far").mkdir(parents=True)
    os.symlink(tmp_path / "disk" / "far", tmp_path / "out")
    prepare(few_cvc(tmp_path / "download"), tmp_path / "out")
    assert len(load(tmp_path / "out")) == len(load(tmp_path / "disk" / "far")) == 12


def test_changing_the_target_leaves_nothing_of_the_old_one(tmp_path: Path) -> None:
    source = refuge_folders(tmp_path / "download")
    prepare(source, tmp_path / "out")
    (source / "REFUGE2" / "train" / "images" / "g0001.jpg").unlink()
    prepare(source, tmp_path / "out", target="disc")
    assert not (tmp_path / "out" / "images" / "g0001.png").exists()
    assert len(load(tmp_path / "out")) == 5


def test_an_interrupted_preparation_does_not_look_done(tmp_path: Path) -> None:
    source, out = refuge_folders(tmp_path / "download"), tmp_path / "out"
    prepare(source, out)
    (out / "manifest.csv").unlink()  # the last file to be written
    with pytest.raises(DataError, match="was interrupted here"):
        load(out)  # although images/ and masks/ are there
    prepare(source, out)
    assert len(load(out)) == 6


def test_a_preparation_that_fails_leaves_the_previous_one_whole(tmp_path: Path) -> None:
    source, out = refuge_folders(tmp_path / "download"), tmp_path / "out"
    prepare(source, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    (source / "REFUGE2" / "train" / "mask" / "n0002.bmp").write_bytes(b"cut off")
    with pytest.raises(DataError, match=r"n0002.bmp: is not an image"):
        prepare(source, out, target="disc")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_leftovers_of_a_killed_preparation_are_cleared(tmp_path: Path) -> None:
    source, out = few_cvc(tmp_path / "download"), tmp_path / "out"
    mask(out / ".tmp-0123456789ab" / "masks" / "1.png")
    prepare(source, out)
    assert sorted(path.name for path in out.iterdir()) == ["catalog.json", "manifest.csv"]


def test_a_folder_with_somebody_elses_data_is_not_overwritten(tmp_path: Path) -> None:
    source = kvasir(tmp_path / "Kvasir-SEG")
    with pytest.raises(DataError, match="is the download itself"):
        prepare(source, source)
    mine = mask(tmp_path / "mine" / "masks" / "1.png")
    with pytest.raises(DataError, match="holds masks that `leafseg data prepare` did not write"):
        prepare(source, tmp_path / "mine")
    assert mine.is_file()
    assert len(list((source / "masks").iterdir())) == 4


@pytest.mark.parametrize("content", ['{"mine": 1}', "[1]", "no JSON"])
def test_somebody_elses_catalog_file_is_not_overwritten(content: str, tmp_path: Path) -> None:
    source, out = few_cvc(tmp_path / "download"), tmp_path / "out"
    out.mkdir()
    (out / "catalog.json").write_text(content)
    with pytest.raises(DataError, match=r"holds catalog\.json that `leafseg data prepare` did not write"):
        prepare(source, out)
    assert [path.name for path in out.iterdir()] == ["catalog.json"]
    assert (out / "catalog.json").read_text() == content


def test_a_hidden_folder_that_is_no_leftover_of_a_preparation_stays(tmp_path: Path) -> None:
    mine = mask(tmp_path / "out" / ".tmp-mine" / "1.png")
    prepare(few_cvc(tmp_path / "download"), tmp_path / "out")
    assert mine.is_file()


def test_what_is_missing_is_said_with_the_archives_to_download(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "no such folder" in complaint(tmp_path / "nowhere", tmp_path / "out")
    text = complaint(tmp_path / "empty", tmp_path / "out")
    assert "no known data set is here, found are nothing; known are refuge2, cvc_clinicdb" in text
    (tmp_path / "empty" / "CVC-ClinicDB.zip").write_bytes(b"PK")
    text = complaint(tmp_path / "empty", tmp_path / "out", name="cvc_clinicdb")
    assert "CVC-ClinicDB is not here; expected is CVC-ClinicDB/Original and CVC-ClinicDB/Ground Truth" in text
    assert "found are CVC-ClinicDB.zip (archives must be unpacked); download CVC-ClinicDB from" in text
    assert "is an archive; unpack it" in complaint(tmp_path / "empty" / "CVC-ClinicDB.zip", tmp_path / "out")
    assert "data set is 'cvc'; known are" in complaint(tmp_path / "empty", tmp_path / "out", name="cvc")


def incomplete_sets() -> Iterator[tuple[str, str, str]]:
    yield "cvc_clinicdb", "CVC-ClinicDB/Ground Truth", "Ground Truth/ is missing"
    yield "qata_cov19", "Test Set", "Test Set/Images/ is missing"
    yield "isic2018", "ISIC2018_Task1_Training_GroundTruth", "ISIC2018_Task1_Training_GroundTruth/ is missing"
    yield "refuge2", "REFUGE2/test/mask", "the masks of test are missing"
    yield "busi", "normal", "normal/ missing"
    yield "kvasir_seg", "masks", "masks/ is missing"
    yield "montgomery", "ManualMask/rightMask", "ManualMask/rightMask/ missing"
    yield "shenzhen", "mask", "the lung masks are missing"


@pytest.mark.parametrize(("name", "gone", "said"), incomplete_sets())
def test_an_incomplete_set_names_what_is_missing(name: str, gone: str, said: str, tmp_path: Path) -> None:
    source = BUILDERS[name](tmp_path / "download")
    shutil.rmtree(source.parent / gone if name == "cvc_clinicdb" else tmp_path / "download" / gone)
    text = complaint(source, tmp_path / "out")
    assert f"{known_set(name).title} is incomplete, {said}" in text
    assert text.endswith(f"download {known_set(name).archives}")


def test_options_that_a_set_does_not_have_are_refused(tmp_path: Path) -> None:
    source, out = busi(tmp_path / "busi"), tmp_path / "out"
    assert "the paper did not use this set" in complaint(source, out, protocol="paper")
    assert "the set has one target only" in complaint(source, out, target="cup")
    assert "always holds out validation images" in complaint(source, out, validation_share=0.1)
    share = {"protocol": "paper", "validation_share": 0.1}
    assert "has a validation part" in complaint(few_cvc(tmp_path / "cvc"), out, **share)
    source = refuge_folders(tmp_path / "refuge")
    shutil.rmtree(source / "REFUGE2" / "test")
    assert "without images are test" in complaint(source, out, protocol="paper")


def test_several_sets_in_one_folder_have_to_be_told_apart(tmp_path: Path) -> None:
    busi(tmp_path / "all" / "busi")
    cvc(tmp_path / "all" / "cvc", range(1, 4))
    assert "2 known data sets are here (busi in" in complaint(tmp_path / "all", tmp_path / "out")
    assert prepare(tmp_path / "all", tmp_path / "out", name="cvc_clinicdb").known.name == "cvc_clinicdb"
    assert "was written by `leafseg data prepare`" in complaint(tmp_path / "out", tmp_path / "again")


def test_training_on_a_downloaded_folder_names_the_command(tmp_path: Path) -> None:
    source = busi(tmp_path / "my data" / "Dataset_BUSI_with_GT")
    with pytest.raises(DataError) as caught:
        load(source)
    assert f"run `leafseg data prepare '{source}' --out Dataset_BUSI_with_GT-prepared`" in str(caught.value)


def test_the_commands_list_and_prepare(tmp_path: Path) -> None:
    runner = CliRunner()
    listed = runner.invoke(app, ["data", "catalog"])
    assert listed.exit_code == 0
    assert all(f"{known.name}: {known.title}" in listed.output for known in KNOWN_SETS)
    table = json.loads(runner.invoke(app, ["data", "catalog", "qata_cov19", "--json"]).output)
    assert table["qata_cov19"]["images"] == {"train": 7145, "test": 2113}
    source, out = qata(tmp_path / "download"), tmp_path / "out"
    done = runner.invoke(app, ["data", "prepare", str(source), "--out", str(out), "--protocol", "paper"])
    assert done.exit_code == 0
    assert "protocol paper: train 4, validation 0, test 2\n" in done.output
    assert "warning: train: 4 pairs were found, the published set has 7145" in done.output
    assert f"train with --data {out}" in done.output
