"""Pairing, checking and splitting of data folders and CSV manifests."""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from leafseg.config import DataSettings
from leafseg.data.images import write_png
from leafseg.data.manifest import PARTS, LabelMap, Manifest, default_part, load_manifest, save_split
from leafseg.errors import DataError

SETTINGS = DataSettings()
BINARY = [[0, 255, 255], [0, 0, 255]]


def image_pixels(index: int) -> np.ndarray:
    return np.full((2, 3), index, np.uint8)


def folder(root: Path, masks: list[list[list[int]]]) -> Path:
    """Images s00.png, s01.png, ... of 2x3 pixels with these masks."""
    for index, mask in enumerate(masks):
        write_png(root / "images" / f"s{index:02d}.png", image_pixels(index))
        write_png(root / "masks" / f"s{index:02d}.png", np.array(mask, np.uint16))
    return root


def load(data: Path, **options: object) -> Manifest:
    return load_manifest(data, settings=options.pop("settings", SETTINGS), **options)


def complaint(data: Path, **options: object) -> str:
    with pytest.raises(DataError) as caught:
        load(data, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_images_and_masks_pair_by_stem_whatever_their_suffix(tmp_path: Path) -> None:
    folder(tmp_path, [BINARY] * 3)
    (tmp_path / "masks" / "s01.png").unlink()
    tifffile.imwrite(tmp_path / "masks" / "s01.TIF", np.array(BINARY, np.uint8))
    (tmp_path / "images" / ".DS_Store").write_text("no data")
    (tmp_path / "images" / "README.txt").write_text("no data")
    manifest = load(tmp_path)
    assert [sample.name for sample in manifest.samples] == ["s00", "s01", "s02"]
    assert [sample.mask.name for sample in manifest.samples] == ["s00.png", "s01.TIF", "s02.png"]
    assert len(manifest) == 3
    assert manifest.root == tmp_path
    for sample in manifest.samples:
        assert sample.sha256 == hashlib.sha256(sample.image.read_bytes()).hexdigest()
        assert (sample.frame, sample.mask_frame, sample.group) == (None, None, None)


def test_parts_follow_from_content_and_not_from_names_or_places(tmp_path: Path) -> None:
    first = load(folder(tmp_path / "a", [BINARY] * 40))
    renamed = tmp_path / "b"
    for kind in ("images", "masks"):
        (renamed / kind).mkdir(parents=True)
        for index in range(40):
            shutil.copy(tmp_path / "a" / kind / f"s{index:02d}.png", renamed / kind / f"x{39 - index}.png")
    second = load(renamed)
    assert first.split_sha256 == second.split_sha256
    assert {s.sha256: s.part for s in first.samples} == {s.sha256: s.part for s in second.samples}
    assert sum(len(first.part(part)) for part in PARTS) == 40
    smaller = load(folder(tmp_path / "c", [BINARY] * 39))
    assert smaller.split_sha256 != first.split_sha256


def test_the_default_part_is_the_documented_arithmetic() -> None:
    # The first byte decides: 0xCC = 204/256 = 0.797, 0xCD = 0.801, 0xE6 = 0.898, 0xE7 = 0.902.
    expected = {"00": "train", "cc": "train", "cd": "validation", "e6": "validation", "e7": "test", "ff": "test"}
    for first_byte, part in expected.items():
        assert default_part(None, first_byte + "00" * 31) == part
    group_digest = hashlib.sha256(b"patient 7").hexdigest()
    assert default_part("patient 7", "00" * 32) == default_part(None, group_digest)


def test_parts_come_out_as_80_10_10_over_many_groups() -> None:
    counts = Counter(default_part(f"group {index}", "00" * 32) for index in range(5000))
    # Four standard deviations of a binomial: sqrt(5000 * 0.8 * 0.2) = 28, sqrt(5000 * 0.1 * 0.9) = 21.
    assert abs(counts["train"] - 4000) < 4 * 28
    assert abs(counts["validation"] - 500) < 4 * 21
    assert abs(counts["test"] - 500) < 4 * 21


@given(st.text(min_size=1), st.binary(min_size=32, max_size=32), st.binary(min_size=32, max_size=32))
@settings(deadline=None)
def test_a_group_stays_together_whatever_its_images_hold(group: str, first: bytes, second: bytes) -> None:
    assert default_part(group, first.hex()) == default_part(group, second.hex())


@pytest.mark.parametrize("value", [1, 128, 255, 1000])
def test_the_only_value_beside_0_is_the_foreground(tmp_path: Path, value: int) -> None:
    manifest = load(folder(tmp_path, [[[0, value, 0], [0, 0, value]], [[0, 0, 0], [0, 0, 0]]]))
    assert manifest.label_map.names == ("background", "foreground")
    assert manifest.label_map.apply(np.array([[0, value]])).tolist() == [[0, 1]]


def test_a_few_label_ids_become_classes_in_ascending_order(tmp_path: Path) -> None:
    label_map = load(folder(tmp_path, [[[0, 7, 3], [0, 0, 0]], [[3, 3, 3], [0, 9, 9]]])).label_map
    assert label_map.values == ((0, 0), (3, 1), (7, 2), (9, 3))
    assert label_map.names == ("background", "class 3", "class 7", "class 9")
    classes = label_map.apply(np.array([[9, 0, 3, 7]]))
    assert classes.dtype == np.uint8
    assert classes.tolist() == [[3, 0, 1, 2]]


def test_foreground_labels_make_a_multi_class_mask_binary(tmp_path: Path) -> None:
    data = folder(tmp_path, [[[0, 1, 2], [3, 255, 0]]])
    label_map = load(data, settings=DataSettings(foreground_labels=(1, 3))).label_map
    assert label_map.names == ("background", "foreground")
    assert label_map.apply(np.array([[0, 1, 2, 3, 255]])).tolist() == [[0, 1, 0, 1, 0]]
    message = complaint(data, settings=DataSettings(foreground_labels=(1, 8)))
    assert "names 8, which no mask holds" in message


def test_a_threshold_makes_soft_edges_hard(tmp_path: Path) -> None:
    soft = [[[0, 3, 127], [128, 250, 255]]]
    label_map = load(folder(tmp_path, soft), settings=DataSettings(mask_threshold=127)).label_map
    assert label_map.apply(np.array(soft[0])).tolist() == [[0, 0, 0], [1, 1, 1]]
    assert "no mask value is above" in complaint(tmp_path, settings=DataSettings(mask_threshold=255))
    both = DataSettings(mask_threshold=1, foreground_labels=(3,))
    assert "are both set" in complaint(tmp_path, settings=both)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        ([[0, 0, 0], [0, 0, 0]], "all masks are empty"),
        ([[0, 1, 255], [0, 0, 0]], "mixture"),
        ([[0, 1, 128], [2, 0, 0]], "mixture"),
        ([[0, 2, 254], [2, 0, 0]], "mixture"),
        ([[255, 255, 255], [255, 255, 255]], "no 0"),
        ([[1, 2, 2], [1, 1, 1]], "no 0"),
        ([[1, 2, 3], [1, 1, 1]], "no 0"),
    ],
)
def test_doubtful_mask_values_are_refused_with_the_way_out(tmp_path: Path, mask: list[list[int]], words: str) -> None:
    message = complaint(folder(tmp_path, [mask]))
    assert str(tmp_path) in message
    assert words in message
    if mask[0][0] or mask[0][1]:
        assert "--set data.foreground_labels=[" in message


def test_more_than_32_values_are_no_label_ids(tmp_path: Path) -> None:
    for count, accepted in ((31, True), (32, False)):  # 0 is one more
        data = tmp_path / str(count)
        write_png(data / "images" / "a.png", np.zeros((1, 70), np.uint8))
        row = np.zeros((1, 70), np.uint8)
        row[0, :count] = np.arange(40, 40 + count)
        write_png(data / "masks" / "a.png", row)
        if accepted:
            assert len(load(data).label_map.names) == 32
        else:
            message = complaint(data)
            assert "33 different values" in message
            assert "--set data.mask_threshold=127" in message


def test_a_label_map_refuses_values_it_does_not_know() -> None:
    for label_map in (LabelMap(((0, 0), (255, 1))), LabelMap(((-5, 0), (10**9, 1)))):
        known = label_map.values[1][0]
        assert label_map.apply(np.array([[label_map.values[0][0], known]])).tolist() == [[0, 1]]
        for unknown in (known - 1, known + 1, label_map.values[0][0] - 1):
            with pytest.raises(DataError, match=rf"masks/7\.png: the mask holds {unknown};"):
                label_map.apply(np.array([[unknown]]), source="masks/7.png")


@given(st.sets(st.integers(-1000, 100_000), min_size=1, max_size=32), st.integers(0, 99))
@settings(deadline=None)
def test_a_label_map_is_a_lookup_pixel_by_pixel(values: set[int], seed: int) -> None:
    pairs = tuple((value, index) for index, value in enumerate(sorted(values)))
    raw = np.random.default_rng(seed).choice(sorted(values), (4, 5))
    expected = [[dict(pairs)[int(value)] for value in row] for row in raw]
    assert LabelMap(pairs).apply(raw).tolist() == expected


def test_lonely_files_are_counted_and_named_together(tmp_path: Path) -> None:
    folder(tmp_path, [BINARY] * 9)
    for index in range(7):
        (tmp_path / "masks" / f"s{index:02d}.png").unlink()
    (tmp_path / "images" / "s08.png").unlink()
    message = complaint(tmp_path)
    assert "7 images have no mask (s00.png, s01.png, s02.png, s03.png, s04.png and 2 more)" in message
    assert "1 mask has no image (s08.png)" in message


def test_masks_with_a_common_ending_are_explained(tmp_path: Path) -> None:
    folder(tmp_path, [BINARY] * 3)
    for path in (tmp_path / "masks").iterdir():
        path.rename(path.with_name(f"{path.stem}_mask.png"))
    assert "stems end with '_mask'" in complaint(tmp_path)


def test_masks_are_optional_where_they_are_not_needed(tmp_path: Path) -> None:
    folder(tmp_path, [BINARY] * 2)
    (tmp_path / "masks" / "s00.png").unlink()
    assert [s.mask is None for s in load(tmp_path, require_masks=False).samples] == [True, False]
    shutil.rmtree(tmp_path / "masks")
    assert "masks/ missing" in complaint(tmp_path)
    manifest = load(tmp_path, require_masks=False)
    assert [sample.mask for sample in manifest.samples] == [None, None]
    assert manifest.label_map.names == ("background", "foreground")


def test_folders_that_are_no_data_folders_are_refused(tmp_path: Path) -> None:
    assert "no such folder" in complaint(tmp_path / "none")
    assert "images/ and masks/ missing" in complaint(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    assert "no images in the folder" in complaint(tmp_path)
    (tmp_path / "images" / "a.webp").write_bytes(b"RIFF")
    assert "1 file in images/ is of no accepted type (a.webp)" in complaint(tmp_path)


def test_two_files_of_one_stem_are_refused(tmp_path: Path) -> None:
    folder(tmp_path, [BINARY])
    tifffile.imwrite(tmp_path / "images" / "s00.tif", image_pixels(0))
    assert "1 stem in images/ has two files (s00.png and s00.tif)" in complaint(tmp_path)


def test_sizes_that_differ_are_counted_and_named(tmp_path: Path) -> None:
    folder(tmp_path, [BINARY] * 3)
    for name in ("s00", "s02"):
        write_png(tmp_path / "masks" / f"{name}.png", np.zeros((5, 4), np.uint8))
    message = complaint(tmp_path)
    assert "2 masks differ from their images in size (masks/s00.png is 4x5, its image is 3x2" in message


def test_damaged_files_are_counted_and_named(tmp_path: Path) -> None:
    folder(tmp_path, [BINARY] * 3)
    (tmp_path / "images" / "s00.png").write_bytes(b"")
    (tmp_path / "masks" / "s01.png").write_bytes(b"nothing")
    message = complaint(tmp_path)
    assert "2 files are unusable" in message
    assert "images/s00.png" in message
    assert "masks/s01.png" in message


def test_progress_counts_every_file_once(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    load(folder(tmp_path, [BINARY] * 5), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]


def test_equal_images_land_in_one_part(tmp_path: Path) -> None:
    folder(tmp_path, [BINARY] * 2)
    shutil.copy(tmp_path / "images" / "s00.png", tmp_path / "images" / "s01.png")
    first, second = load(tmp_path).samples
    assert (first.sha256, first.part) == (second.sha256, second.part)


def frames_folder(root: Path) -> Path:
    """One TIFF of three pages with its mask, and one plain image."""
    folder(root, [BINARY])
    pages = np.arange(18, dtype=np.uint8).reshape(3, 2, 3)
    mask = np.stack([np.full((2, 3), value, np.uint8) for value in (0, 255, 0)])
    for kind, array in (("images", pages), ("masks", mask)):
        tifffile.imwrite(root / kind / "scan.tif", array, photometric="minisblack")
    return root


def test_frames_of_a_file_are_samples_of_one_group_and_part(tmp_path: Path) -> None:
    manifest = load(frames_folder(tmp_path))
    frames = [sample for sample in manifest.samples if sample.frame is not None]
    assert [sample.name for sample in frames] == ["scan_0000", "scan_0001", "scan_0002"]
    assert [(sample.frame, sample.mask_frame) for sample in frames] == [(0, 0), (1, 1), (2, 2)]
    digest = hashlib.sha256((tmp_path / "images" / "scan.tif").read_bytes()).hexdigest()
    assert {sample.group for sample in frames} == {digest}
    assert {sample.part for sample in frames} == {default_part(None, digest)}
    assert len({sample.sha256 for sample in manifest.samples}) == 4


def test_a_mask_with_another_count_of_frames_is_refused(tmp_path: Path) -> None:
    frames_folder(tmp_path)
    tifffile.imwrite(tmp_path / "masks" / "scan.tif", np.zeros((2, 2, 3), np.uint8), photometric="minisblack")
    assert "scan.tif: the mask has 2 frames, its image has 3" in complaint(tmp_path)


def write_csv(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_a_csv_names_files_groups_and_parts(tmp_path: Path) -> None:
    folder(tmp_path, [BINARY] * 3)
    path = write_csv(
        tmp_path / "list.csv",
        "image,mask,group,part,age",
        "images/s00.png,masks/s00.png,p1,,40",
        "images/s01.png,masks/s01.png,p1,,40",
        "images/s02.png,masks/s02.png,,test,41",
    )
    first, second, third = load(path).samples
    assert first.group == second.group == "p1"
    assert first.part == second.part == default_part("p1", first.sha256)
    assert (third.group, third.part) == (None, "test")
    assert third.image == tmp_path / "images" / "s02.png"


def test_a_csv_of_a_spreadsheet_with_semicolons_and_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    folder(tmp_path, [BINARY])
    path = tmp_path / "list.csv"
    path.write_text("\ufeffImage;Mask\r\nimages/s00.png;masks/s00.png\r\n", encoding="utf-8")
    assert [sample.name for sample in load(path).samples] == ["s00"]


def test_a_csv_chooses_frames(tmp_path: Path) -> None:
    frames_folder(tmp_path)
    path = write_csv(
        tmp_path / "list.csv",
        "image,frame,mask,mask_frame",
        "images/scan.tif,2,masks/scan.tif,1",
        "images/scan.tif,0,masks/scan.tif,",
    )
    samples = load(path).samples
    assert [(s.name, s.frame, s.mask_frame) for s in samples] == [("scan_0000", 0, 0), ("scan_0002", 2, 1)]
    write_csv(path, "image,frame,mask", "images/scan.tif,3,masks/scan.tif")
    assert "scan.tif: frame is 3, the file holds 3" in complaint(path)


def test_equal_stems_in_two_folders_of_a_csv_get_names_of_their_own(tmp_path: Path) -> None:
    folder(tmp_path / "a", [BINARY])
    folder(tmp_path / "b", [BINARY])
    lines = [f"{site}/images/s00.png,{site}/masks/s00.png" for site in "ab"]
    names = [sample.name for sample in load(write_csv(tmp_path / "list.csv", "image,mask", *lines)).samples]
    assert names == ["a__images__s00", "b__images__s00"]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["file,mask", "a,b"], "no column 'image'"),
        (["image,mask"], "no rows"),
        (["image,mask", "images/s00.png,"], "1 row has no mask (line 2"),
        (["image,mask", ",masks/s00.png"], "1 row has no image (line 2)"),
        (["image,mask,frame", "images/s00.png,masks/s00.png,-1"], "1 frame is no number (line 2: '-1')"),
        (["image,mask,part", "images/s00.png,masks/s00.png,training"], "1 part is unknown (line 2: 'training')"),
        (["image,mask", *["images/s00.png,masks/s00.png"] * 3], "1 image is listed twice (s00.png)"),
        (["image,mask", "images/none.png,masks/s00.png"], "none.png: no such file"),
    ],
)
def test_a_broken_csv_is_refused_with_the_line(tmp_path: Path, lines: list[str], words: str) -> None:
    folder(tmp_path, [BINARY])
    message = complaint(write_csv(tmp_path / "list.csv", *lines))
    assert str(tmp_path) in message
    assert words in message


def test_a_csv_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_bytes("image,mask\nbläschen.png,b.png\n".encode("latin-1"))
    assert "list.csv: cannot be read as a CSV table in UTF-8" in complaint(tmp_path / "list.csv")


def test_a_group_or_an_image_in_two_parts_is_refused(tmp_path: Path) -> None:
    folder(tmp_path, [BINARY] * 2)
    rows = ["images/s00.png,masks/s00.png,p1,train", "images/s01.png,masks/s01.png,p1,test"]
    path = write_csv(tmp_path / "list.csv", "image,mask,group,part", *rows)
    assert "1 group lies in two parts (s00 and s01)" in complaint(path)
    shutil.copy(tmp_path / "images" / "s00.png", tmp_path / "images" / "s01.png")
    write_csv(path, "image,mask,group,part", *[row.replace("p1", "") for row in rows])
    assert "1 image lies in two parts under two names (s00 = s01)" in complaint(path)


def test_a_stored_split_gives_the_same_parts_back(tmp_path: Path) -> None:
    manifest = load(frames_folder(tmp_path / "data"))
    save_split(manifest, tmp_path / "split.csv")
    again = load(tmp_path / "data", split_file=tmp_path / "split.csv")
    assert again == manifest
    assert again.split_sha256 == manifest.split_sha256


def split_file(path: Path, manifest: Manifest, parts: list[str]) -> Path:
    rows = [f"{s.name},{s.sha256},,{part}" for s, part in zip(manifest.samples, parts, strict=True)]
    return write_csv(path, "name,sha256,group,part", *rows)


def test_a_split_file_decides_the_parts_and_may_leave_samples_out(tmp_path: Path) -> None:
    manifest = load(folder(tmp_path / "data", [BINARY] * 4))
    stored = split_file(tmp_path / "split.csv", manifest, ["test", "unused", "train", "validation"])
    again = load(tmp_path / "data", split_file=stored)
    assert [(s.name, s.part) for s in again.samples] == [("s00", "test"), ("s02", "train"), ("s03", "validation")]


def test_a_split_file_knows_a_renamed_image_by_its_content(tmp_path: Path) -> None:
    manifest = load(folder(tmp_path / "data", [BINARY] * 2))
    stored = split_file(tmp_path / "split.csv", manifest, ["test", "train"])
    for kind in ("images", "masks"):
        (tmp_path / "data" / kind / "s00.png").rename(tmp_path / "data" / kind / "z.png")
    assert {s.name: s.part for s in load(tmp_path / "data", split_file=stored).samples} == {"s01": "train", "z": "test"}


def test_a_split_file_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    manifest = load(folder(tmp_path / "data", [BINARY] * 2))
    path = tmp_path / "split.csv"

    def message() -> str:
        text = complaint(tmp_path / "data", split_file=path)
        assert str(path) in text
        return text

    assert "no such CSV file" in message()
    split_file(path, manifest, ["train", "tset"])
    assert "'tset' is no part" in message()
    write_csv(path, "name,part", "s00,train")
    assert "1 sample is not in the split file (s01)" in message()
    write_csv(path, "name,part", "s00,train", "s00,test", "s01,test")
    assert "1 sample is in two parts (s00)" in message()
    write_csv(path, "stem,fold", "s00,train")
    assert "is not a split file" in message()
    split_file(path, manifest, ["unused", "unused"])
    assert "every sample is marked 'unused'" in message()


def test_an_unknown_part_is_refused(tmp_path: Path) -> None:
    manifest = load(folder(tmp_path, [BINARY]))
    with pytest.raises(DataError, match="part is 'val'; parts are train, validation, test"):
        manifest.part("val")


def test_a_mask_that_the_threshold_empties_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder(tmp_path, [BINARY, [[0, 1, 1], [0, 0, 1]], [[0, 0, 0], [0, 0, 0]]])
    load(tmp_path, settings=DataSettings(mask_threshold=128))
    assert "no value of 1 mask(s) is above data.mask_threshold=128" in caplog.text
    assert "s01.png" in caplog.text
