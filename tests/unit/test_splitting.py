"""New splits: nothing is torn, everything lies in one part, strata are spread, and ids lead back to nobody."""

from __future__ import annotations

import csv
import hashlib
import hmac
import random
import shutil
import stat
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from leafseg.config import DataSettings, PreprocessingSettings
from leafseg.data.images import write_png
from leafseg.data.manifest import PARTS, LabelMap, Manifest, Sample, load_manifest, save_split
from leafseg.data.splitting import (
    hashed_group,
    make_split,
    read_groups,
    read_strata,
    split_hash,
    split_table,
    stored_salt,
    write_split,
)
from leafseg.errors import ConfigError, DataError

SETTINGS = DataSettings()


def sha(text: object) -> str:
    return hashlib.sha256(str(text).encode()).hexdigest()


def manifest_of(groups: list[str | None], contents: list[object] | None = None) -> Manifest:
    """Samples s000, s001, ... of these groups, whose contents differ unless they are given."""
    samples = [
        Sample(f"s{i:03d}", Path(f"/d/images/s{i:03d}.png"), None, None, None, group, sha(content), "train")
        for i, (group, content) in enumerate(zip(groups, contents or range(len(groups)), strict=True))
    ]
    return Manifest(Path("/d"), tuple(samples), LabelMap(((0, 0), (1, 1))))


def place(sample: Sample) -> str:
    return sample.part if sample.fold is None else f"fold {sample.fold}"


# Few groups and contents, so that they meet in chains: a shares a group with b, and b its content with c.
SAMPLES = st.lists(
    st.tuples(st.one_of(st.none(), st.integers(0, 12)), st.integers(0, 60), st.sampled_from("xyz")),
    min_size=8,
    max_size=60,
)


@given(SAMPLES, st.sampled_from([None, 2, 3]), st.integers(0, 5))
@settings(deadline=None, max_examples=60)
def test_groups_and_equal_images_are_never_torn_and_every_sample_has_one_place(
    drawn: list[tuple[int | None, int, str]], folds: int | None, seed: int
) -> None:
    manifest = manifest_of([None if g is None else f"p{g}" for g, _, _ in drawn], [c for _, c, _ in drawn])
    strata = [word for _, _, word in drawn]
    try:
        split = make_split(manifest, strata=strata, folds=folds, seed=seed)
    except DataError:
        assume(False)  # too few blocks
    assert [s.name for s in split.samples] == [s.name for s in manifest.samples]
    assert [(s.group, s.sha256) for s in split.samples] == [(s.group, s.sha256) for s in manifest.samples]
    places = defaultdict(set)
    for sample in split.samples:
        assert sample.part in PARTS
        assert (sample.fold is not None) == (folds is not None and sample.part == "train")
        places["content", sample.sha256].add(place(sample))
        places["group", sample.group].add(place(sample))
    assert all(len(found) == 1 for (_, key), found in places.items() if key is not None)
    wanted = {f"fold {k}" for k in range(folds)} if folds else {"train", "validation"}
    assert {place(sample) for sample in split.samples} == {*wanted, "test"}  # none is left empty


@given(SAMPLES, st.randoms(use_true_random=False), st.sampled_from([None, 2]))
@settings(deadline=None, max_examples=40)
def test_a_split_depends_neither_on_names_nor_on_order_nor_on_what_groups_are_called(
    drawn: list[tuple[int | None, int, str]], shuffler: random.Random, folds: int | None
) -> None:
    # Equal contents belong to one stratum and one group here: which of two equal files is which cannot be told.
    drawn = [(g, i, word) for i, (g, _, word) in enumerate(drawn)]
    other = list(drawn)
    shuffler.shuffle(other)
    results = []
    for rows, name in ((drawn, "p{}"), (other, "patient {}!")):
        manifest = manifest_of([None if g is None else name.format(g) for g, _, _ in rows], [c for _, c, _ in rows])
        try:
            split = make_split(manifest, strata=[word for _, _, word in rows], folds=folds)
        except DataError:
            results.append(None)
            continue
        results.append({s.sha256: place(s) for s in split.samples})
    assert results[0] == results[1]


@given(st.lists(st.sampled_from("abc"), min_size=30, max_size=150), st.integers(0, 3))
@settings(deadline=None, max_examples=50)
def test_strata_of_single_images_are_within_one_of_their_share_in_every_part(words: list[str], seed: int) -> None:
    shares = {"train": 0.7, "validation": 0.1, "test": 0.2}
    split = make_split(manifest_of([None] * len(words)), strata=words, validation=0.1, test=0.2, seed=seed)
    counts = Counter((s.part, word) for s, word in zip(split.samples, words, strict=True))
    for word, total in Counter(words).items():
        for part, share in shares.items():
            assert abs(counts[part, word] - share * total) < 1
    sizes = Counter(s.part for s in split.samples)
    for part, share in shares.items():  # three strata: what rounding moves does not add up
        assert abs(sizes[part] - share * len(words)) < 2


@given(st.lists(st.sampled_from("abc"), min_size=12, max_size=90), st.integers(2, 4))
@settings(deadline=None, max_examples=30)
def test_strata_of_single_images_are_within_one_of_their_share_in_every_fold(words: list[str], folds: int) -> None:
    split = make_split(manifest_of([None] * len(words)), strata=words, test=0, folds=folds)
    counts = Counter((s.fold, word) for s, word in zip(split.samples, words, strict=True))
    for word, total in Counter(words).items():
        assert all(abs(counts[fold, word] - total / folds) < 1 for fold in range(folds))


def test_folds_of_equal_groups_are_equal() -> None:
    # Ten patients of three images in five folds: two patients, six images each.
    split = make_split(manifest_of([f"p{i // 3}" for i in range(30)]), test=0, folds=5)
    assert Counter(s.fold for s in split.samples) == dict.fromkeys(range(5), 6)


def test_stratified_folds_of_patients_share_out_the_sick_ones() -> None:
    # Twelve patients of two images, four of them sick: two folds get two sick and four healthy ones each.
    groups = [f"p{i // 2}" for i in range(24)]
    words = ["sick" if i // 2 < 4 else "healthy" for i in range(24)]
    split = make_split(manifest_of(groups), strata=words, test=0, folds=2)
    counts = Counter((s.fold, word) for s, word in zip(split.samples, words, strict=True))
    assert counts == {(0, "sick"): 4, (1, "sick"): 4, (0, "healthy"): 8, (1, "healthy"): 8}


def test_five_patients_fill_three_parts() -> None:
    # 0.8, 0.1 and 0.1 of five patients: no part is empty, so three train.
    split = make_split(manifest_of([f"p{i // 20}" for i in range(100)]))
    assert Counter(s.part for s in split.samples) == {"train": 60, "validation": 20, "test": 20}


def test_another_seed_is_another_split_of_the_same_sizes() -> None:
    manifest = manifest_of([None] * 50)
    first, second, third = (make_split(manifest, seed=seed) for seed in (1, 1, 2))
    assert first == second
    assert [s.part for s in first.samples] != [s.part for s in third.samples]
    assert Counter(s.part for s in first.samples) == Counter(s.part for s in third.samples) == {
        "train": 40,
        "validation": 5,
        "test": 5,
    }  # fmt: skip


def test_the_test_part_may_stay_what_it_is() -> None:
    manifest = manifest_of([f"p{i // 2}" for i in range(40)])
    fixed = replace(
        manifest, samples=tuple(replace(s, part="test" if i < 6 else "train") for i, s in enumerate(manifest.samples))
    )
    split = make_split(fixed, keep_test=True, folds=2)
    assert [i for i, s in enumerate(split.samples) if s.part == "test"] == list(range(6))
    folds = Counter(s.fold for s in split.samples if s.part == "train")
    assert sorted(folds.values()) == [16, 18]  # seventeen patients of two images
    torn = replace(
        fixed, samples=tuple(replace(s, part="test" if i < 5 else "train") for i, s in enumerate(fixed.samples))
    )
    with pytest.raises(DataError, match="test part and outside"):
        make_split(torn, keep_test=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"validation": 0.5, "test": 0.5}, "together below 1"),
        ({"test": -0.1}, "0 or more"),
        ({"folds": 1}, "at least 2"),
    ],
)
def test_senseless_shares_are_one_sentence(options: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_split(manifest_of([None] * 9), **options)


def test_more_folds_than_groups_are_refused() -> None:
    with pytest.raises(DataError, match="5 folds are asked for, and 3 groups"):
        make_split(manifest_of(["a", "b", "c"] * 4), test=0, folds=5)


# --- groups and strata from the data ---------------------------------------------------------------------------------


def folder(root: Path, names: list[str], *, empty: tuple[str, ...] = ()) -> Path:
    for index, name in enumerate(names):
        write_png(root / "images" / f"{name}.png", np.full((2, 3), index, np.uint8))
        mask = [[0, 0 if name in empty else 255, 0], [0, 0, 0]]
        write_png(root / "masks" / f"{name}.png", np.array(mask, np.uint8))
    return root


def load(data: Path, **options: object) -> Manifest:
    return load_manifest(data, settings=SETTINGS, **options)


PATIENTS = [f"p{i:02d}_{k}" for i in range(12) for k in range(2)]


def test_a_regex_finds_groups_by_its_own_groups_or_as_a_whole(tmp_path: Path) -> None:
    manifest = load(folder(tmp_path, ["p01_left_a", "p01_right_b", "p02_left_c"]))
    assert read_groups(manifest, regex="^([^_]+)_") == ["p01", "p01", "p02"]
    assert read_groups(manifest, regex=r"^p\d+_[a-z]+") == ["p01_left", "p01_right", "p02_left"]
    assert read_groups(manifest, regex=r"^(p\d+)_(\w)") == ["p01-l", "p01-r", "p02-l"]
    assert read_groups(manifest) is None
    with pytest.raises(DataError, match=r"1 of 3 images are not matched .*\(p01_right_b\.png\)"):
        read_groups(manifest, regex="left")
    with pytest.raises(ConfigError, match="no regular expression"):
        read_groups(manifest, regex="(")
    with pytest.raises(ConfigError, match="--group-regex and --group-column are both given"):
        read_groups(manifest, regex="p", column="patient")


def test_a_column_finds_groups_by_name_image_or_content(tmp_path: Path) -> None:
    manifest = load(folder(tmp_path / "data", ["a", "b", "c"]))
    table = tmp_path / "table.csv"
    for key, values in {
        "name": ["a", "b", "c"],
        "image": ["images/a.png", "b.png", "c"],
        "sha256": [s.sha256 for s in manifest.samples],
    }.items():
        rows = zip(values, ["7", "8", "7"], strict=True)
        table.write_text(f"{key},Patient\n" + "".join(f"{value},{patient}\n" for value, patient in rows))
        assert read_groups(manifest, column="Patient", table=table) == ["7", "8", "7"]
    with pytest.raises(DataError, match="no column 'age'; its columns are sha256, patient"):
        read_groups(manifest, column="age", table=table)
    with pytest.raises(ConfigError, match="--table"):
        read_groups(manifest, column="patient")
    table.write_text("name,patient\na,7\nb,\n")
    with pytest.raises(DataError, match=r"2 of 3 images are without a value .*\(b, c\)"):
        read_groups(manifest, column="patient", table=table)
    table.write_text("name,patient\na,7\na,8\nb,7\nc,7\n")
    with pytest.raises(DataError, match="a has two values"):
        read_groups(manifest, column="patient", table=table)


def test_dicom_headers_name_patients_and_series_that_no_file_shows(tmp_path: Path) -> None:
    pytest.importorskip("pydicom")
    ids = {"a": ("DOE JANE", "1.2.1"), "b": ("DOE JANE", "1.2.2"), "c": ("ROE", "1.2.3")}
    for index, (name, (patient, series)) in enumerate(ids.items()):
        image = SimpleITK.GetImageFromArray(np.full((2, 3), index, np.uint16))
        image.SetMetaData("0010|0020", patient)
        image.SetMetaData("0020|000e", series)
        path = tmp_path / "data" / "images" / f"{name}.dcm"
        path.parent.mkdir(parents=True, exist_ok=True)
        writer = SimpleITK.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(str(path))
        writer.Execute(image)
        write_png(tmp_path / "data" / "masks" / f"{name}.png", np.array([[0, 255, 0], [0, 0, 0]], np.uint8))
    manifest = load(tmp_path / "data")
    assert read_groups(manifest, dicom="patient") == ["DOE JANE", "DOE JANE", "ROE"]
    assert read_groups(manifest, dicom="series") == ["1.2.1", "1.2.2", "1.2.3"]
    lines = write_split(manifest, tmp_path / "split.csv", group_dicom="patient", folds=2, test=0)
    stored = (tmp_path / "split.csv").read_text()
    assert len({row["group"] for row in csv.DictReader(stored.splitlines())}) == 2
    assert "DOE" not in stored + "".join(lines)
    with pytest.raises(DataError, match=r"2 of 2 images are without a patient id"):
        read_groups(load(folder(tmp_path / "png", ["a", "b"])), dicom="patient")


def test_strata_are_the_classes_in_the_mask(tmp_path: Path) -> None:
    manifest = load(folder(tmp_path / "one", ["a", "b", "c"], empty=("b",)))
    assert read_strata(manifest, labels=True) == ["foreground", "empty", "foreground"]
    data = tmp_path / "two"
    for name, mask in {"a": [0, 1, 2], "b": [2, 2, 0], "c": [0, 0, 0]}.items():
        write_png(data / "images" / f"{name}.png", np.full((1, 3), ord(name), np.uint8))
        write_png(data / "masks" / f"{name}.png", np.array([mask], np.uint8))
    assert read_strata(load(data), labels=True) == ["class 1+class 2", "class 2", "empty"]
    shutil.rmtree(data / "masks")
    with pytest.raises(DataError, match="without a mask"):
        read_strata(load(data, require_masks=False), labels=True)


def test_a_split_of_axial_slices_says_why_it_does_not_fit_coronal_ones(tmp_path: Path) -> None:
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
        voxels = np.random.default_rng(1).integers(0, 2, (3, 4, 5), np.uint8)
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(voxels), str(tmp_path / name / "a.nii.gz"))
    save_split(load(tmp_path), tmp_path / "split.csv")
    coronal = DataSettings(preprocessing=PreprocessingSettings(slice_axis="y"))
    with pytest.raises(DataError, match=r"1 sample is not .* \(a_0003\), .*--set data\.preprocessing\.slice_axis"):
        load_manifest(tmp_path, settings=coronal, split_file=tmp_path / "split.csv")


# --- the stored split ------------------------------------------------------------------------------------------------


def test_a_group_id_is_a_keyed_hash_that_only_the_salt_connects_to_the_patient() -> None:
    digest = hmac.new(b"a salt of sixteen", b"patient 7", hashlib.sha256).hexdigest()
    assert hashed_group("patient 7", "a salt of sixteen") == f"g-{digest[:16]}"
    assert hashed_group("patient 7", "another salt, too") != hashed_group("patient 7", "a salt of sixteen")


def test_the_salt_is_made_once_and_readable_by_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "split.salt"
    salt = stored_salt(path)
    assert stored_salt(path) == salt
    assert len(salt) == 64
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stored_salt(tmp_path / "other.salt") != salt
    path.write_text("short\n")
    with pytest.raises(DataError, match="5 characters"):
        stored_salt(path)


def test_a_written_split_holds_ids_that_repeat_under_the_same_salt_and_no_patient(tmp_path: Path) -> None:
    manifest = load(folder(tmp_path / "data", PATIENTS))
    one, two, three = (tmp_path / name for name in ("one.csv", "two.csv", "three.csv"))
    write_split(manifest, one, group_regex="^(p..)_")
    write_split(manifest, two, group_regex="^(p..)_", salt_file=tmp_path / "one.salt", names=False)
    write_split(manifest, three, group_regex="^(p..)_")
    groups = {path: [row["group"] for row in csv.DictReader(path.open())] for path in (one, two, three)}
    assert len(set(groups[one])) == 12
    assert groups[one] == groups[two]
    assert not set(groups[one]) & set(groups[three])
    assert "p00" not in two.read_text()
    assert load(tmp_path / "data", split_file=two).split_sha256 == load(tmp_path / "data", split_file=one).split_sha256
    with pytest.raises(DataError, match=r"one\.csv: exists already"):
        write_split(manifest, one)


def test_groups_of_a_csv_manifest_are_hashed_in_every_stored_split(tmp_path: Path) -> None:
    folder(tmp_path, ["a", "b", "c"])
    rows = "".join(f"images/{n}.png,masks/{n}.png,{g}\n" for n, g in (("a", "Doe"), ("b", "Doe"), ("c", "Roe")))
    (tmp_path / "list.csv").write_text(f"image,mask,group\n{rows}")
    manifest = load(tmp_path / "list.csv")
    assert [s.group for s in manifest.samples] == ["Doe", "Doe", "Roe"]
    save_split(manifest, tmp_path / "split.csv")
    first, second, third = (row["group"] for row in csv.DictReader((tmp_path / "split.csv").open()))
    assert first == second != third
    assert first.startswith("g-")
    # A run that continues reads the ids back and writes the same ones.
    again = load(tmp_path / "list.csv", run_split=tmp_path / "split.csv")
    assert [s.group for s in again.samples] == [first, second, third]
    before = (tmp_path / "split.csv").read_text()
    save_split(again, tmp_path / "split.csv")
    assert (tmp_path / "split.csv").read_text() == before


def test_the_leak_check_sees_the_groups_of_the_split_file(tmp_path: Path) -> None:
    manifest = load(folder(tmp_path / "data", ["a", "b"]))
    rows = [
        f"{s.name},{s.sha256},g-0123456789abcdef,{part}\n" for s, part in zip(manifest.samples, PARTS, strict=False)
    ]
    (tmp_path / "split.csv").write_text("name,sha256,group,part\n" + "".join(rows))
    with pytest.raises(DataError, match=r"1 group lies in two parts \(a and b\)"):
        load(tmp_path / "data", split_file=tmp_path / "split.csv")


def test_a_chosen_fold_validates_and_the_test_part_stays(tmp_path: Path) -> None:
    data, path = folder(tmp_path / "data", PATIENTS), tmp_path / "split.csv"
    lines = write_split(load(data), path, group_regex="^(p..)_", folds=3, test=0.25)
    whole = load(data, split_file=path)
    assert lines[-1] == f"split {split_hash(whole)}" != f"split {whole.split_sha256}"
    assert Counter(map(place, whole.samples)) == {"fold 0": 6, "fold 1": 6, "fold 2": 6, "test": 6}
    seen = Counter()
    for fold in range(3):
        chosen = load(data, split_file=path, fold=fold)
        validating = {s.name for s in chosen.part("validation").samples}
        assert validating == {s.name for s in whole.samples if s.fold == fold}
        assert [s.name for s in chosen.part("test").samples] == [s.name for s in whole.part("test").samples]
        assert len(chosen.part("train")) == 12
        seen.update(validating)
    assert set(seen.values()) == {1}
    with pytest.raises(DataError, match="holds no fold 3; its folds are 0, 1, 2"):
        load(data, split_file=path, fold=3)


def test_a_fold_of_a_split_without_folds_is_refused(tmp_path: Path) -> None:
    data, path = folder(tmp_path / "data", PATIENTS), tmp_path / "split.csv"
    lines = write_split(load(data), path, stratify_labels=True)
    assert lines[-1] == f"split {load(data, split_file=path).split_sha256}"
    with pytest.raises(DataError, match="holds no folds"):
        load(data, split_file=path, fold=0)
    path.write_text(path.read_text().replace("part\n", "part,fold\n").replace(",train\n", ",train,one\n"))
    with pytest.raises(DataError, match="'one' is no fold"):
        load(data, split_file=path)


def test_the_table_counts_images_groups_and_strata_of_every_part() -> None:
    manifest = manifest_of(["a", "a", "b", "c"])
    folded = replace(
        manifest,
        samples=tuple(
            replace(s, part=part, fold=fold)
            for s, part, fold in zip(
                manifest.samples, ["train", "train", "train", "test"], [0, 0, 1, None], strict=True
            )
        ),
    )
    assert list(split_table(folded, ["x", "y", "x", "x"])) == [
        "part    images  groups  x  y",
        "fold 0       2       1  1  1",
        "fold 1       1       1  1  0",
        "test         1       1  1  0",
    ]


def test_slices_of_one_file_stay_together_whatever_groups_a_table_gives_them() -> None:
    single = manifest_of([None] * 24)
    samples = tuple(replace(s, image=Path(f"v{k // 4}.tif"), frame=k % 4) for k, s in enumerate(single.samples))
    made = make_split(replace(single, samples=samples), groups=[f"g{k}" for k in range(24)], validation=0.3, test=0.3)
    parts = defaultdict(set)
    for sample in made.samples:
        parts[sample.image].add(sample.part)
    assert [len(found) for found in parts.values()] == [1] * 6


def test_a_new_split_need_not_name_what_the_data_leave_out(tmp_path: Path) -> None:
    lines = ["image,mask,part"]
    for k in range(8):
        write_png(tmp_path / f"i{k}.png", np.full((4, 4), k, np.uint8))
        write_png(tmp_path / f"m{k}.png", np.eye(4, dtype=np.uint8))
        lines.append(f"i{k}.png,m{k}.png,{'unused' if k == 0 else ''}")
    (tmp_path / "d.csv").write_text("\n".join(lines))
    save_split(make_split(load(tmp_path / "d.csv")), tmp_path / "split.csv")
    again = load(tmp_path / "d.csv", split_file=tmp_path / "split.csv")
    assert {sample.name for sample in again.samples} == {f"i{k}" for k in range(1, 8)}
