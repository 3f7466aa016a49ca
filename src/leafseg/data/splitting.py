"""New splits: by file or by group, stratified, in shares or in folds; and group ids that lead back to nobody.

Samples that share a group, a file or their content are one block, and a block is never torn. Blocks are ordered by
content and then shuffled by the seed: neither file names, nor their order, nor the groups' names change a split.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from leafseg import rng
from leafseg.data.manifest import IGNORE, PARTS, Manifest, Sample, read_csv, read_labels, save_split
from leafseg.errors import ConfigError, DataError
from leafseg.files import atomic_path
from leafseg.progress import progress_bar

DicomLevel = Literal["patient", "study", "series"]
_Item = TypeVar("_Item")

_THREADS = 4
_SHOWN = 5
_SALT_LENGTH = 16  # characters that a salt must have at least
_HASH = re.compile(r"g-[0-9a-f]{16}|[0-9a-f]{64}")  # an id of ours, or the SHA-256 of a file


# --- group ids ------------------------------------------------------------------------------------------------------


def hashed_group(group: str, salt: str) -> str:
    """An id that is equal for equal groups under one salt, and tells nothing about them without it.

    The keyed hash matters: patient numbers are few, so that a plain hash could be undone by trying them all.

    Returns:
        ``g-`` and the first 16 hex digits of HMAC-SHA-256.
    """
    return f"g-{hmac.new(salt.encode(), group.encode('utf-8', 'surrogatepass'), hashlib.sha256).hexdigest()[:16]}"


def hashed_groups(manifest: Manifest, salt: str | None = None) -> Manifest:
    """The manifest with hashed groups; a group that is a hash already stays as it is.

    Args:
        manifest: the samples.
        salt: default: a random one that nobody keeps.
    """
    salt = secrets.token_hex(16) if salt is None else salt
    return replace(
        manifest,
        samples=tuple(
            sample
            if sample.group is None or _HASH.fullmatch(sample.group)
            else replace(sample, group=hashed_group(sample.group, salt))
            for sample in manifest.samples
        ),
    )


def stored_salt(path: Path) -> str:
    """The salt in a file; if there is none, a random one is written there, which only its owner can read.

    Raises:
        DataError: if the file cannot be read or written, or holds less than 16 characters.
    """
    if not path.exists():
        with atomic_path(path) as temporary:
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "w") as stream:
                stream.write(secrets.token_hex(32) + "\n")
    try:
        salt = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the salt cannot be read ({error}); restore the file or name another one") from error
    if len(salt) < _SALT_LENGTH:
        raise DataError(
            f"{path}: the salt has {len(salt)} characters; at least {_SALT_LENGTH} are needed, remove the file and a "
            "new one is made"
        )
    return salt


# --- what groups and strata a sample has ----------------------------------------------------------------------------


def read_groups(
    manifest: Manifest,
    *,
    regex: str | None = None,
    column: str | None = None,
    table: Path | None = None,
    dicom: DicomLevel | None = None,
) -> list[str] | None:
    """The group of each sample, raw, from one source; None if no source is named.

    Args:
        manifest: the samples.
        regex: searched in the image's path below ``images/``, or below the CSV's folder; its groups, else the whole
            match, are the value.
        column: of ``table``, a CSV with a row for each sample, found by sha256, name or image.
        dicom: from the image's DICOM header: PatientID, StudyInstanceUID or SeriesInstanceUID.

    Raises:
        ConfigError: if two sources are named, or one is incomplete.
        DataError: if a sample has no value.
    """
    sources = {"--group-regex": regex, "--group-column": column, "--group-dicom": dicom}
    _one_source(sources)
    if regex is not None:
        return _by_regex(manifest, regex, option="--group-regex")
    if column is not None:
        return _by_column(manifest, column, table, option="--group-column")
    return None if dicom is None else _by_dicom(manifest, dicom)


def read_strata(
    manifest: Manifest,
    *,
    labels: bool = False,
    regex: str | None = None,
    column: str | None = None,
    table: Path | None = None,
) -> list[str] | None:
    """What is to be spread evenly, one word a sample, from one source; None if no source is named.

    Args:
        manifest: the samples.
        labels: the classes that the mask holds, ``a+b``; ``empty`` for a mask without any.
        regex, column, table: as for groups.

    Raises:
        ConfigError, DataError: as :func:`read_groups`; DataError if a mask cannot be read.
    """
    _one_source({"--stratify-labels": labels or None, "--stratify-regex": regex, "--stratify-column": column})
    if regex is not None:
        return _by_regex(manifest, regex, option="--stratify-regex")
    if column is not None:
        return _by_column(manifest, column, table, option="--stratify-column")
    return _by_labels(manifest) if labels else None


def _one_source(sources: Mapping[str, object]) -> None:
    named = [option for option, value in sources.items() if value is not None]
    if len(named) > 1:
        raise ConfigError(f"{' and '.join(named)} are both given; give one of them")


def _by_regex(manifest: Manifest, regex: str, *, option: str) -> list[str]:
    try:
        pattern = re.compile(regex)
    except re.error as error:
        raise ConfigError(f"{option} is {regex!r}, which is no regular expression ({error}); correct it") from error
    values, unmatched = [], []
    for sample in manifest.samples:
        path = _path_below(manifest.root, sample.image)
        match = pattern.search(path)
        value = "-".join(part or "" for part in match.groups()) if match and pattern.groups else match and match[0]
        if value is None or not value.strip("-"):
            unmatched.append(path)
        values.append(value or "")
    _refuse_missing(manifest, unmatched, f"not matched by {option} {regex!r}")
    return values


def _path_below(root: Path, image: Path) -> str:
    """The image's path as a regex sees it, with forward slashes."""
    for folder in (root / "images", root):
        if image.is_relative_to(folder):
            return image.relative_to(folder).as_posix()
    return image.as_posix()


def _by_column(manifest: Manifest, column: str, table: Path | None, *, option: str) -> list[str]:
    if table is None:
        raise ConfigError(f"{option} {column!r} needs the CSV file that has this column; name it with --table")
    rows = read_csv(table)
    name = column.strip().lower()
    if not rows or name not in rows[0]:
        known = ", ".join(rows[0]) if rows else "none"
        raise DataError(f"{table}: no column {column!r}; its columns are {known}")
    by_key: dict[str, str] = {}
    for row in rows:
        for key in {row.get(kind, "") for kind in ("sha256", "name", "image")} - {""}:
            if by_key.setdefault(key, row[name]) != row[name]:
                raise DataError(f"{table}: {key} has two values in column {column!r}; keep one")
    values = []
    for sample in manifest.samples:
        path = sample.image
        keys = (
            sample.sha256,
            sample.name,
            _path_below(manifest.root, path),
            f"images/{path.name}",
            path.name,
            path.stem,
        )
        values.append(next((by_key[key] for key in keys if by_key.get(key)), ""))
    missing = [sample.name for sample, value in zip(manifest.samples, values, strict=True) if not value]
    _refuse_missing(
        manifest, missing, f"without a value in column {column!r} of {table} (rows are found by sha256, name or image)"
    )
    return values


def _by_dicom(manifest: Manifest, level: DicomLevel) -> list[str]:
    from leafseg.data.dicom import dicom_group

    images = list(dict.fromkeys(sample.image for sample in manifest.samples))  # the slices of a volume share one
    ids = dict(
        zip(images, _mapped(images, lambda image: dicom_group(image, level), "reading DICOM headers"), strict=True)
    )
    missing = [sample.name for sample in manifest.samples if not ids[sample.image]]
    _refuse_missing(manifest, missing, f"without a {level} id in a DICOM header")
    return [ids[sample.image] or "" for sample in manifest.samples]


def _by_labels(manifest: Manifest) -> list[str]:
    names = manifest.label_map.names

    def stratum(sample: Sample) -> str | None:
        if not sample.has_labels:
            return None
        truth = read_labels(sample, manifest.label_map, reading=manifest.reading)
        if manifest.label_map.overlapping:
            present = [name for name, layer in zip(names, truth, strict=True) if layer.any()]
        else:
            present = [names[value] for value in np.unique(truth).tolist() if value not in (0, IGNORE)]
        return "+".join(present) or "empty"

    found = _mapped(manifest.samples, stratum, "reading masks")
    missing = [sample.name for sample, value in zip(manifest.samples, found, strict=True) if value is None]
    _refuse_missing(manifest, missing, "without a mask, which --stratify-labels needs")
    return [value or "" for value in found]


def _mapped(items: Sequence[_Item], function: Callable[[_Item], str | None], name: str) -> list[str | None]:
    values = []
    with ThreadPoolExecutor(_THREADS) as pool, progress_bar(name, total=len(items)) as bar:
        for value in pool.map(function, items):
            values.append(value)
            bar.advance()
    return values


def _refuse_missing(manifest: Manifest, names: Sequence[str], what: str) -> None:
    if names:
        rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        shown = ", ".join(names[:_SHOWN])
        raise DataError(
            f"{manifest.root}: {len(names)} of {len(manifest)} images are {what} ({shown}{rest}); every image needs "
            "a value"
        )


# --- parts and folds ------------------------------------------------------------------------------------------------


def make_split(
    manifest: Manifest,
    *,
    groups: Sequence[str] | None = None,
    strata: Sequence[str] | None = None,
    validation: float = 0.1,
    test: float = 0.1,
    folds: int | None = None,
    keep_test: bool = False,
    seed: int = 1337,
) -> Manifest:
    """The manifest with new parts, groups and folds.

    Args:
        manifest: the samples.
        groups: one a sample, raw; default: the samples' own.
        strata: one word a sample; each part and fold gets its share of every word, as far as groups allow.
        validation, test: shares of the images, 0 to below 1. With folds, ``validation`` is not used.
        folds: cut what is not test into so many folds; all of it has the part train until a fold is chosen.
        keep_test: the test part stays what it is.
        seed: of the shuffling.

    Raises:
        ConfigError: if the shares or the number of folds make no sense.
        DataError: if there are too few groups, or ``keep_test`` would tear one.
    """
    validation = 0.0 if folds is not None else validation
    test = 0.0 if keep_test else test
    if min(validation, test) < 0 or validation + test >= 1:
        raise ConfigError(
            f"the shares are validation {validation:g} and test {test:g}; they are 0 or more and together below 1"
        )
    if folds is not None and folds < 2:
        raise ConfigError(f"--folds is {folds}; at least 2 are needed")
    if groups is not None:
        samples = [replace(sample, group=group) for sample, group in zip(manifest.samples, groups, strict=True)]
    else:
        samples = list(manifest.samples)
    words = list(strata) if strata is not None else ["all"] * len(samples)
    blocks = _blocks(samples, words, seed)

    parts = ["train"] * len(samples)
    rest = blocks
    if keep_test:
        rest = [block for block in blocks if not _is_test(manifest, samples, block)]
        for index, sample in enumerate(samples):
            parts[index] = "test" if sample.part == "test" else "train"
    wanted = {"train": 1 - validation - test, "validation": validation, "test": test}
    wanted = {part: share for part, share in wanted.items() if share > 0}
    if len(rest) < len(wanted):
        raise DataError(f"{manifest.root}: {len(rest)} groups of images cannot fill {len(wanted)} parts; ask for fewer")
    for part, block in zip(_by_shares(rest, words, list(wanted.values())), rest, strict=True):
        for index in block:
            parts[index] = list(wanted)[part]
    numbers: dict[int, int] = {}
    if folds is not None:
        development = [block for block in rest if parts[block[0]] == "train"]
        numbers = _by_folds(manifest, development, samples, words, folds)
    return replace(
        manifest,
        samples=tuple(
            replace(sample, part=part, fold=numbers.get(index))
            for index, (sample, part) in enumerate(zip(samples, parts, strict=True))
        ),
    )


def _blocks(samples: Sequence[Sample], words: Sequence[str], seed: int) -> list[list[int]]:
    """Indices that must stay together, in an order that follows from contents and seed alone."""
    parent = list(range(len(samples)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = index = parent[parent[index]]
        return index

    first: dict[tuple[str, str], int] = {}
    for index, sample in enumerate(samples):
        # A table may give the slices of one volume different groups; they are still one body.
        file = "" if sample.frame is None else str(sample.image)
        for key in (("content", sample.sha256), ("group", sample.group or ""), ("file", file)):
            if key[1]:
                parent[root(index)] = root(first.setdefault(key, index))
    members: dict[int, list[int]] = defaultdict(list)
    for index in range(len(samples)):
        members[root(index)].append(index)
    contents = lambda index: (samples[index].sha256, words[index])  # noqa: E731
    blocks = sorted((sorted(block, key=contents) for block in members.values()), key=lambda b: contents(b[0]))
    return [blocks[i] for i in rng.permutation(seed, "split", 0, len(blocks))]


def _is_test(manifest: Manifest, samples: Sequence[Sample], block: Sequence[int]) -> bool:
    inside = {samples[index].part == "test" for index in block}
    if len(inside) > 1:
        raise DataError(
            f"{manifest.root}: a group of {len(block)} images lies in the test part and outside of it (among them "
            f"{samples[block[0]].name}); choose groups that the test part respects, or leave out --keep-test"
        )
    return inside.pop()


def _counts(blocks: Sequence[Sequence[int]], words: Sequence[str]) -> NDArray[np.float64]:
    """Samples of each stratum in each block, ``[blocks, strata]``."""
    columns = {word: column for column, word in enumerate(sorted(set(words)))}
    counts = np.zeros((len(blocks), len(columns)))
    for row, block in enumerate(blocks):
        for index in block:
            counts[row, columns[words[index]]] += 1
    return counts


def _by_shares(blocks: Sequence[Sequence[int]], words: Sequence[str], shares: Sequence[float]) -> list[int]:
    """A part for each block, so that each part gets its share of every stratum.

    Where no block has several samples, each count is within one of its ideal: first every part gets the whole number
    below its ideal, then what is left goes one by one to parts that are still below, the emptiest of all first. Larger
    blocks come first, to where they fit. A part that was asked for is not left empty.
    """
    counts = _counts(blocks, words)
    ideal = np.outer(shares, counts.sum(0))  # [parts, strata]
    have = np.zeros_like(ideal)
    chosen = [0] * len(blocks)
    sizes = counts.sum(1)
    for row in np.argsort(-sizes, kind="stable").tolist():
        mine, missing = counts[row], (ideal - have).sum(1)
        whole = np.clip(np.floor(ideal + 1e-9) - have, 0, None) / np.maximum(ideal, 1e-9)
        below = ideal - have > 1e-9
        chosen[row] = max(
            range(len(shares)),
            key=lambda part: (
                sizes[row] == 1 or sizes[row] <= missing[part] + 1e-9,
                float(whole[part] @ mine),
                float(below[part] @ mine),
                missing[part],
            ),
        )
        have[chosen[row]] += mine
    for part in range(len(shares)):
        if part not in chosen:
            crowded = [row for row in range(len(blocks)) if chosen.count(chosen[row]) > 1]
            chosen[min(crowded, key=lambda row: (sizes[row], chosen[row]))] = part
    return chosen


def _by_folds(
    manifest: Manifest, blocks: Sequence[Sequence[int]], samples: Sequence[Sample], words: Sequence[str], folds: int
) -> dict[int, int]:
    """The fold of each sample, by scikit-learn; for single images each stratum is within one of its ideal."""
    from sklearn.model_selection import GroupKFold, StratifiedGroupKFold, StratifiedKFold

    if len(blocks) < folds:
        raise DataError(
            f"{manifest.root}: {folds} folds are asked for, and {len(blocks)} groups of images are there; ask for fewer"
        )
    several = len({words[index] for block in blocks for index in block}) > 1
    if several and all(len({samples[index].sha256 for index in block}) == 1 for block in blocks):
        # Equal images count as one: a few of them must not cost the even spread.
        units = [(number, words[block[0]]) for number, block in enumerate(blocks)]
        splitter = StratifiedKFold(folds)
    else:
        units = [(number, words[index]) for number, block in enumerate(blocks) for index in block]
        splitter = StratifiedGroupKFold(folds) if several else GroupKFold(folds)
    numbers = np.array([number for number, _ in units])
    fold_of_block = np.full(len(blocks), -1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a stratum with fewer samples than folds: the table shows it
        try:
            held_out = [rows for _, rows in splitter.split(numbers, [word for _, word in units], numbers)]
        except ValueError as error:
            raise DataError(f"{manifest.root}: {folds} folds cannot be made ({error}); ask for fewer") from error
    for fold, rows in enumerate(held_out):
        if not len(rows):
            raise DataError(f"{manifest.root}: of {folds} folds one would be empty; ask for fewer")
        fold_of_block[numbers[rows]] = fold
    return {index: int(fold_of_block[number]) for number, block in enumerate(blocks) for index in block}


def write_split(
    manifest: Manifest,
    path: Path,
    *,
    group_regex: str | None = None,
    group_column: str | None = None,
    group_dicom: DicomLevel | None = None,
    stratify_labels: bool = False,
    stratify_regex: str | None = None,
    stratify_column: str | None = None,
    table: Path | None = None,
    validation: float = 0.1,
    test: float = 0.1,
    folds: int | None = None,
    keep_test: bool = False,
    seed: int = 1337,
    salt_file: Path | None = None,
    names: bool = True,
) -> list[str]:
    """Make a split and store it with hashed groups; what ``leafseg data split`` does.

    Args:
        path: a new file.
        salt_file: default: beside ``path``, with the suffix ``.salt``; made if groups need one and it does not exist.
        names: as :func:`leafseg.data.manifest.save_split` takes it.
        others: as :func:`read_groups`, :func:`read_strata` and :func:`make_split` take them.

    Returns:
        Lines for the user: a table, and the split's hash.

    Raises:
        ConfigError, DataError: as those functions; DataError if ``path`` exists or cannot be written.
    """
    if path.exists():
        raise DataError(f"{path}: exists already; a stored split is not replaced, remove it or choose another name")
    groups = read_groups(manifest, regex=group_regex, column=group_column, table=table, dicom=group_dicom)
    strata = read_strata(manifest, labels=stratify_labels, regex=stratify_regex, column=stratify_column, table=table)
    split = make_split(
        manifest,
        groups=groups,
        strata=strata,
        validation=validation,
        test=test,
        folds=folds,
        keep_test=keep_test,
        seed=seed,
    )
    if any(sample.group is not None and not _HASH.fullmatch(sample.group) for sample in split.samples):
        split = hashed_groups(split, stored_salt(salt_file or path.with_suffix(".salt")))
    save_split(split, path, names=names)
    return [*split_table(split, strata), f"split {split_hash(split)}"]


# --- what came out --------------------------------------------------------------------------------------------------


def split_hash(manifest: Manifest) -> str:
    """Hash of contents, parts and folds; without folds the manifest's own ``split_sha256``."""
    if all(sample.fold is None for sample in manifest.samples):
        return manifest.split_sha256
    lines = sorted(f"{sample.sha256} {sample.part} {sample.fold}\n" for sample in manifest.samples)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def split_table(manifest: Manifest, strata: Sequence[str] | None = None) -> Iterator[str]:
    """Lines of a table: images, groups, and images of each stratum, for every part or fold."""
    words = list(strata) if strata is not None else []
    columns = sorted(set(words))
    rows: dict[str, list[int]] = defaultdict(list)
    for index, sample in enumerate(manifest.samples):
        rows[sample.part if sample.fold is None else f"fold {sample.fold}"].append(index)
    order = [*sorted((name for name in rows if name not in PARTS), key=lambda n: int(n.split()[1]))]
    order = [*order, *(part for part in PARTS if part in rows)]
    cells = [["part", "images", "groups", *columns]]
    for name in order:
        mine = [manifest.samples[index] for index in rows[name]]
        groups = len({sample.group for sample in mine} - {None})
        counts = Counter(words[index] for index in rows[name]) if words else Counter()
        cells.append([name, str(len(mine)), str(groups or "-"), *(str(counts[word]) for word in columns)])
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    for row in cells:
        first, *others = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join((first, *others))
