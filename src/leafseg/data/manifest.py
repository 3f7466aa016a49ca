"""Which image belongs to which mask, to which group, and to which part: the one list that every run reads.

A sample's part follows from its group, else from its content, so that every run (the autoencoder's too) agrees on the
test part with no file stored. A stored split file overrides it.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import shlex
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from leafseg.data.dicom import is_dicom
from leafseg.data.images import (
    DICOM_SUFFIXES,
    IMAGE_SUFFIXES,
    LPS,
    VOLUME_SUFFIXES,
    Reading,
    check_image,
    count_frames,
    image_stem,
    image_suffix,
    read_image,
    read_mask,
)
from leafseg.errors import ConfigError, DataError, LeafsegError
from leafseg.files import write_text_atomic

if TYPE_CHECKING:
    from leafseg.config import DataSettings

log = logging.getLogger(__name__)

PARTS = ("train", "validation", "test")
UNUSED = "unused"
CLASS_NAMES = ("background", "foreground")
IGNORE = 255  # class id of pixels that nobody labelled: no loss and no figure sees them
MAX_LABEL_IDS = 32

_ACCEPTED = " ".join(IMAGE_SUFFIXES + VOLUME_SUFFIXES + DICOM_SUFFIXES)
_LABEL_COLUMN = "mask."
_LABELS_FILE = "labels.json"
_THREADS = 4
_SHOWN = 5  # names listed of each kind of problem
_LONGEST_PATH, _LONGEST_NUMBER, _LONGEST_WORD = 1000, 10, 60  # characters
_FULL_SCALE = (128, 254, 255)  # beside ids 1, 2, ...: ignore label, or soft edge?
# Files that somebody meant as data; a README.txt in the folder is nobody's mistake.
_UNSUPPORTED = (
    *(".webp", ".gif", ".jp2", ".j2k", ".jfif", ".avif", ".heic", ".ppm", ".pgm", ".pbm", ".svg", ".psd", ".tga"),
    *(".mhd", ".hdr", ".img", ".nhdr", ".svs", ".czi", ".ndpi", ".npy", ".npz", ".mat", ".h5"),
)


def default_part(group: str | None, content_sha256: str) -> str:
    """The part a sample belongs to when nothing else says so: 80 % train, 10 % validation, 10 % test in expectation.

    Args:
        group: what must not be torn apart (a patient); None if unknown.
        content_sha256: hex SHA-256 of the image file's bytes; used when there is no group.
    """
    digest = bytes.fromhex(content_sha256) if group is None else hashlib.sha256(group.encode()).digest()
    u = int.from_bytes(digest[:8], "big") / 2**64
    return "train" if u < 0.8 else "validation" if u < 0.9 else "test"


@dataclass(frozen=True)
class Sample:
    """One image, or one frame of a file, with its mask.

    Attributes:
        name: unique in the manifest; the image's stem, ``stem_0042`` for a frame.
        frame: page or slice of the image file; None for a plain image.
        mask: None if there is none, or if the labels overlap.
        group: what must stay in one part; the frames of one file are a group named by the file's SHA-256.
        sha256: of the image file's bytes; for a frame, of the file's digest and the frame number.
        part: one of ``PARTS``.
        label_masks: overlapping labels only: (label, mask file) of every label, in the label map's order.
        fold: of a split file with folds, the one that this sample validates; None for all others (test samples).
    """

    name: str
    image: Path
    frame: int | None
    mask: Path | None
    mask_frame: int | None
    group: str | None
    sha256: str
    part: str
    label_masks: tuple[tuple[str, Path], ...] = ()
    fold: int | None = None

    @property
    def has_labels(self) -> bool:
        """Whether there is a truth to read."""
        return self.mask is not None or bool(self.label_masks)


@dataclass(frozen=True)
class LabelMap:
    """From the raw values of mask files to class ids.

    Attributes:
        values: (raw value, class id) pairs; unused with a threshold.
        names: one a class id, the first is the background; with overlapping labels one a label.
        threshold: if set, a raw value above it is class 1 and any other class 0.
        ignore: raw value of pixels that nobody labelled; they get the class id ``IGNORE``.
        overlapping: whether every label has a mask file of its own, so that a pixel may have several.
    """

    values: tuple[tuple[int, int], ...]
    names: tuple[str, ...] = CLASS_NAMES
    threshold: int | None = None
    ignore: int | None = None
    overlapping: bool = False

    def apply(self, raw: NDArray[np.int64], *, source: str = "mask") -> NDArray[np.uint8]:
        """Class ids ``[H, W]`` of raw values ``[H, W]``; ``source`` is named in the error.

        With overlapping labels, ``raw`` is the mask of one label, and the ids are 1 where it is and 0 elsewhere.

        Raises:
            DataError: for a raw value that the map does not hold.
        """
        if self.threshold is not None:
            above = (raw > self.threshold).astype(np.uint8)
            return above if self.ignore is None else np.where(raw == self.ignore, np.uint8(IGNORE), above)
        pairs = self.values if self.ignore is None else (*self.values, (self.ignore, IGNORE))
        known = np.array(sorted(pairs), dtype=np.int64).reshape(-1, 2)
        low, high = int(known[0, 0]), int(known[-1, 0])
        if high - low < 2**16:  # a table lookup: ten times faster than a search, and masks are read often
            table = np.full(high - low + 1, -1, dtype=np.int16)
            table[known[:, 0] - low] = known[:, 1]
            inside = (raw >= low) & (raw <= high)
            classes = np.where(inside, table[np.where(inside, raw - low, 0)], np.int16(-1))
        else:
            nearest = np.searchsorted(known[:, 0], raw).clip(max=len(known) - 1)
            classes = np.where(known[nearest, 0] == raw, known[nearest, 1], -1).astype(np.int16)
        if (classes < 0).any():
            unknown = np.unique(raw[classes < 0]).tolist()
            raise DataError(
                f"{source}: the mask holds {_listed(map(str, unknown))}; known are "
                f"{_listed((str(value) for value, _ in pairs), shown=MAX_LABEL_IDS + 1)}, correct the mask or set "
                "data.foreground_labels"
            )
        return classes.astype(np.uint8)


def read_labels(
    sample: Sample, label_map: LabelMap, *, reading: Reading = LPS
) -> NDArray[np.uint8] | NDArray[np.bool_]:
    """The truth of one sample, on the image's grid.

    Args:
        sample: one that has labels.
        label_map: of the manifest.
        reading: how the image is read; a volume's mask is turned and sliced as its image is.

    Returns:
        uint8 ``[H, W]``, class ids, ``IGNORE`` where nobody labelled; or bool ``[C, H, W]`` for overlapping labels.

    Raises:
        DataError: if there is no mask, it cannot be read or holds an unknown value, or label masks differ in size.
    """
    if label_map.overlapping and sample.label_masks:
        stack = [
            label_map.apply(read_mask(path, sample.mask_frame, reading=reading), source=str(path))
            for _, path in sample.label_masks
        ]
        if len({layer.shape for layer in stack}) > 1:
            raise DataError(f"{sample.image}: its label masks differ in size; all must have the image's")
        return np.stack(stack) > 0  # [C, H, W]
    if sample.mask is None:
        raise DataError(f"{sample.image}: the sample has no mask; add the mask")
    return label_map.apply(read_mask(sample.mask, sample.mask_frame, reading=reading), source=str(sample.mask))


@dataclass(frozen=True)
class Manifest:
    """Samples sorted by name, and what their masks' values mean. ``root`` is the data folder, or the CSV's folder.

    ``reading`` says how volumes were cut into the samples' frames: images and masks are read with it.
    """

    root: Path
    samples: tuple[Sample, ...]
    label_map: LabelMap
    reading: Reading = LPS

    def __len__(self) -> int:
        return len(self.samples)

    def part(self, name: str) -> Manifest:
        """The samples of one part; there may be none.

        Raises:
            DataError: for a name that is not a part.
        """
        if name not in PARTS:
            raise DataError(f"{self.root}: part is {name!r}; parts are {', '.join(PARTS)}")
        return replace(self, samples=tuple(sample for sample in self.samples if sample.part == name))

    @property
    def split_sha256(self) -> str:
        """Hash of contents and their parts: equal for equal data wherever it lies and however it is named."""
        lines = sorted(f"{sample.sha256} {sample.part}\n" for sample in self.samples)
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def load_manifest(
    data: Path,
    *,
    settings: DataSettings,
    split_file: Path | None = None,
    fold: int | None = None,
    run_split: Path | None = None,
    require_masks: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Pair images with masks, check every file, find out what the mask values mean, and decide the parts.

    Args:
        data: a folder with ``images/`` and ``masks/`` (same stem, any accepted suffix; overlapping labels lie in
            ``masks/LABEL/``), or a CSV file with the column ``image`` and optionally ``mask`` (or one ``mask.LABEL`` a
            label), ``frame``, ``mask_frame``, ``group``, ``part``; its paths are relative to its folder. A file
            of several frames without a chosen frame becomes one sample a frame. A folder that ``leafseg data prepare``
            wrote stands for its ``manifest.csv``.
        settings: ``mask_threshold``, ``foreground_labels``, ``label_names`` and ``ignore_label`` decide what mask
            values mean; names that are not set are read from ``labels.json`` beside ``images/`` or the CSV.
        split_file: a file of ``save_split``; overrides groups and the CSV's parts, and must cover every sample.
        fold: of a split file with folds, the one that validates; the others train, and the test part stays.
        run_split: the split that a run stored. Samples that it holds (by content) keep their parts and others are left
            out; if it holds none of them, this is another data set and the default rule applies.
        require_masks: False accepts images without a mask, and a folder that holds the images themselves.
        progress: called with (files done, files in all).

    Raises:
        DataError: one sentence a kind of problem, each with a count and the first few names.
        ConfigError: for a fold without a split file.
    """
    _check_fold(fold, split_file)
    data = Path(data)
    root, rows, problems = list_rows(data, require_masks=require_masks)
    _refuse(data, problems)
    scans = scan_rows(rows, progress, reading=Reading.of(settings.preprocessing))
    _refuse(data, _scan_problems(rows, scans, root))
    return build_manifest(
        data, root, rows, scans, settings=settings, split_file=split_file, fold=fold, run_split=run_split
    )


def _check_fold(fold: int | None, split_file: Path | None) -> None:
    if fold is not None and split_file is None:
        raise ConfigError(f"--fold is {fold}, and folds are those of a split file; name it with --split-file")


def list_rows(data: Path, *, require_masks: bool) -> tuple[Path, list[_Row], list[Problem]]:
    """The root folder, the rows before any file is opened, and what is wrong with the listing.

    Raises:
        DataError: if there is nothing to list.
    """
    if data.is_dir() and _is_prepared(data):
        return (data, *_csv_rows(data / "manifest.csv", require_masks=require_masks))
    if data.is_dir():
        return (data, *_folder_rows(data, require_masks=require_masks))
    if data.is_file():
        return (data.parent, *_csv_rows(data, require_masks=require_masks))
    raise DataError(f"{data}: no such folder or CSV file; check the path")


def build_manifest(
    data: Path,
    root: Path,
    rows: Sequence[_Row],
    scans: Mapping[_Files, _Scan],
    *,
    settings: DataSettings,
    split_file: Path | None = None,
    fold: int | None = None,
    run_split: Path | None = None,
) -> Manifest:
    """Listed and opened files to samples with labels and parts; the arguments are those of ``load_manifest``.

    Raises:
        DataError: for doubtful mask values, or parts that do not fit the samples.
    """
    samples = _samples(data, root, rows, scans)
    label_map = _label_map_of(data, root, rows, scans, settings)
    _warn_of_emptied_masks(data, scans, settings.mask_threshold)
    placed = _placed(data, samples, split_file=split_file, fold=fold, run_split=run_split)
    return Manifest(root, placed, label_map, Reading.of(settings.preprocessing))


@dataclass(frozen=True)
class Collected:
    """A data set as far as it can be made out, and everything that stands against it.

    Attributes:
        problems: all of them; none means that ``load_manifest`` accepts the data.
        unusable: (kind, sentence) of images that could not be opened, or whose masks could not or do not fit.
        samples: of the other images, in their parts; sorted by name.
        label_map: None if it is in doubt.
        manifest: None if there are problems.
    """

    root: Path
    problems: tuple[Problem, ...]
    unusable: Mapping[Path, tuple[str, str]]
    samples: tuple[Sample, ...] = ()
    label_map: LabelMap | None = None
    manifest: Manifest | None = None


def collect(
    data: Path,
    *,
    settings: DataSettings,
    split_file: Path | None = None,
    fold: int | None = None,
    require_masks: bool = True,
    threads: int = _THREADS,
    new_look: Callable[[_Files], Look] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Collected:
    """What ``load_manifest`` does, but past the first problem; the arguments are its own and those of ``scan_rows``."""
    _check_fold(fold, split_file)
    data = Path(data)
    problems: list[Problem] = []

    def note(error: DataError, kind: str) -> None:
        problems.extend(error.problems if isinstance(error, ManifestError) else [Problem(str(error), kind)])

    try:
        root, rows, problems[:] = list_rows(data, require_masks=require_masks)
    except (DataError, OSError) as error:
        note(error if isinstance(error, DataError) else DataError(f"{data}: cannot be read ({error})"), "layout")
        return Collected(data, tuple(problems), {})
    scans = scan_rows(rows, progress, threads=threads, new_look=new_look, reading=Reading.of(settings.preprocessing))
    problems += _scan_problems(rows, scans, root)
    unusable = {
        files[0]: (scan.kind, scan.problem)
        if scan.problem
        else ("size-mismatch", f"the image is {_sides(scan.size)}, the mask {_sides(other[0])}")
        for files, scan in scans.items()
        if (other := [size for size in scan.mask_sizes if size != scan.size]) or scan.problem
    }
    good = [row for row in rows if row.image not in unusable]
    used = {row.files: scans[row.files] for row in good}
    samples: list[Sample] = []
    label_map = None
    try:
        samples = _samples(data, root, good, used)
    except DataError as error:
        note(error, "layout")
    try:
        label_map = _label_map_of(data, root, good, used, settings) if good else None
    except DataError as error:
        note(error, "label-values")
    try:
        placed = _placed(data, samples, split_file=split_file, fold=fold, run_split=None) if samples else ()
    except DataError as error:
        note(error, "split")
        placed = tuple(sorted(samples, key=lambda sample: sample.name))
    manifest = None
    if not problems and label_map is not None:
        manifest = Manifest(root, placed, label_map, Reading.of(settings.preprocessing))
        _warn_of_emptied_masks(data, used, settings.mask_threshold)
    return Collected(root, tuple(problems), unusable, placed, label_map, manifest)


def save_split(manifest: Manifest, path: Path, *, names: bool = True) -> None:
    """Write the parts as CSV (name, sha256, group, part, fold if there are folds), to be given back as ``split_file``.

    Groups may be patient ids. Those that are not hashed yet are hashed here with a salt that nobody keeps: the file
    says which samples belong together, and no more.

    Args:
        manifest: the samples.
        path: the file.
        names: False leaves the names out, which may hold patient ids too; the content finds the samples.

    Raises:
        DataError: if the system refuses to write.
    """
    from leafseg.data.splitting import hashed_groups  # which imports this module

    folds = any(sample.fold is not None for sample in manifest.samples)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("name", "sha256", "group", "part", *(("fold",) if folds else ())))
    for sample in hashed_groups(manifest).samples:
        fold = ("" if sample.fold is None else sample.fold,) if folds else ()
        writer.writerow((sample.name if names else "", sample.sha256, sample.group or "", sample.part, *fold))
    write_text_atomic(path, text.getvalue())


_Files = tuple[Path, ...]


@dataclass(frozen=True)
class _Row:
    """A pair of files as listed, before any is opened; ``frame`` None means all there are."""

    image: Path
    mask: Path | None
    frame: int | None = None
    mask_frame: int | None = None
    group: str | None = None
    part: str | None = None
    label_masks: tuple[tuple[str, Path], ...] = ()

    @property
    def masks(self) -> tuple[Path, ...]:
        """Every file that holds labels: none, the mask, or one a label."""
        return tuple(path for _, path in self.label_masks) or ((self.mask,) if self.mask is not None else ())

    @property
    def files(self) -> _Files:
        """The image and its masks; rows of one file's frames share it."""
        return (self.image, *self.masks)


@dataclass(frozen=True)
class _Scan:
    """What opening the files of one row told; ``problem`` is the DataError's text, ``kind`` its sort."""

    sha256: str = ""
    frames: int | None = None
    mask_frames: int | None = None
    size: tuple[int, int] = (0, 0)
    mask_sizes: tuple[tuple[int, int], ...] = ()  # one a mask file, as the values
    values: tuple[frozenset[int], ...] = ()
    problem: str | None = None
    kind: str = "unreadable"


@dataclass(frozen=True)
class Problem:
    """One clause about problems of one kind, and all the names that it is about."""

    text: str
    kind: str = "layout"
    names: tuple[str, ...] = ()


class ManifestError(DataError):
    """A DataError that still knows the single problems."""

    def __init__(self, message: str, problems: Sequence[Problem]) -> None:
        super().__init__(message)
        self.problems = tuple(problems)


class Look(Protocol):
    """What a caller wants to see of the pixels while the files of a row are opened anyway."""

    def image(self, frame: int | None, pixels: NDArray[Any]) -> None:
        """Pixels as ``read_image`` gives them."""

    def mask(self, path: Path, frame: int | None, pixels_of: Mapping[int, int]) -> None:
        """How many pixels each raw value has."""


def _folder_rows(data: Path, *, require_masks: bool) -> tuple[list[_Row], list[Problem]]:
    folders = {"images": data / "images", "masks": data / "masks"}
    plain = not require_masks and not any(folder.is_dir() for folder in folders.values())
    if plain and any(image_suffix(path) for path in data.iterdir()):
        folders["images"] = data
    required = ("images", "masks") if require_masks else ("images",)
    missing = [f"{name}/" for name in required if not folders[name].is_dir()]
    if missing:
        if not any(folder.is_dir() for folder in folders.values()):
            _refuse(data, _known_set_problem(data))
        raise DataError(
            f"{data}: {' and '.join(missing)} missing; a data folder holds images/ and masks/ with files of the same "
            "stem, or give a CSV manifest"
        )
    labels = _label_folders(folders["masks"])
    folders |= {f"masks/{label}": folders["masks"] / label for label in labels}
    problems: list[Problem] = []
    found: dict[str, dict[str, Path]] = {name: {} for name in folders}
    for name, folder in folders.items():
        if not folder.is_dir():
            continue
        by_stem: dict[str, list[Path]] = defaultdict(list)
        files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
        for path in files:
            if image_suffix(path):  # a folder of DICOM slices is one volume
                by_stem[image_stem(path)].append(path)
        twins = [" and ".join(path.name for path in paths) for paths in by_stem.values() if len(paths) > 1]
        problems += _problem(
            twins, f"stem in {name}/ has two files", f"stems in {name}/ have two files", "keep one", kind="two-files"
        )
        foreign = [path.name for path in files if path.suffix.lower() in _UNSUPPORTED and not image_suffix(path)]
        problems += _problem(
            foreign, f"file in {name}/ is of no accepted type", f"files in {name}/ are of no accepted type",
            f"convert them to one of {_ACCEPTED}", kind="unknown-type",
        )  # fmt: skip
        found[name] = {stem: paths[0] for stem, paths in by_stem.items()}
    images, masks = found["images"], found["masks"]
    if not images and not problems:
        raise DataError(
            f"{folders['images']}: no images in the folder; accepted are {_ACCEPTED} and folders of DICOM slices, "
            "put them there without subfolders or give a CSV manifest"
        )
    if labels and masks:
        problems.append(Problem(
            f"masks/ holds {len(masks)} files beside a folder a label ({_listed(labels)}); one file an image is for "
            "labels that exclude each other, one folder a label for overlapping ones, keep one of the two"
        ))  # fmt: skip
    for label in labels or [""]:
        here = found[f"masks/{label}" if label else "masks"]
        where = f" in masks/{label}/" if label else ""
        # Which images have no labels at all is their own business; one that has some has all, empty where need be.
        wanted = set(images) if require_masks else {stem for other in labels for stem in found[f"masks/{other}"]}
        lonely = [images[stem].name for stem in sorted((wanted & images.keys()) - here.keys())]
        problems += _problem(
            lonely, f"image has no mask{where}", f"images have no mask{where}",
            "an image without the label needs an empty mask" if label else "a mask has its image's stem",
            kind="missing-mask",
        )  # fmt: skip
        lonely = [here[stem].name for stem in sorted(here.keys() - images.keys())]
        problems += _problem(
            lonely, f"mask{where} has no image", f"masks{where} have no image", "remove them or add the images",
            kind="missing-image",
        )  # fmt: skip
        ending = _common_ending(images, here)
        if ending:
            said = f"the masks' stems{where} end with {ending!r}; rename them or give a CSV manifest"
            problems.append(Problem(said, "missing-mask"))
    if not labels:
        return [_Row(images[stem], masks.get(stem)) for stem in sorted(images)], problems
    return [
        _Row(
            images[stem],
            None,
            label_masks=tuple(
                (label, found[f"masks/{label}"][stem]) for label in labels if stem in found[f"masks/{label}"]
            ),
        )
        for stem in sorted(images)
    ], problems


def _label_folders(masks: Path) -> list[str]:
    """Folders below ``masks/`` with masks in them: each is a label, and labels may overlap."""
    if not masks.is_dir():
        return []
    folders = (path for path in masks.iterdir() if path.is_dir() and not path.name.startswith("."))
    flat = IMAGE_SUFFIXES + VOLUME_SUFFIXES  # a folder of DICOM files is one mask, not a label
    return sorted(folder.name for folder in folders if any(image_suffix(path) in flat for path in folder.iterdir()))


def _is_prepared(data: Path) -> bool:
    from leafseg.data.catalog import is_prepared  # which imports this module

    return is_prepared(data)


def _known_set_problem(data: Path) -> list[Problem]:
    """A known data set as it was downloaded is one command away from a manifest."""
    from leafseg.data.catalog import recognise

    try:
        known = recognise(data).known
    except DataError:
        return []
    out = shlex.quote(f"{data.resolve().name}-prepared")
    command = f"leafseg data prepare {shlex.quote(str(data))} --out {out}"
    return [Problem(f"this is {known.title} as it is downloaded; run `{command}` and give --data {out}")]


def _common_ending(images: dict[str, Path], masks: dict[str, Path]) -> str | None:
    """The ending that turns image stems into mask stems (``_mask``), if one explains why nothing pairs."""
    if not images or not masks or images.keys() & masks.keys():
        return None
    first = next(iter(sorted(masks)))
    owner = max((stem for stem in images if first.startswith(stem)), key=len, default=None)
    if owner is None:
        return None
    ending = first[len(owner) :]
    return ending if sum(stem + ending in masks for stem in images) * 2 > len(images) else None


def _csv_rows(path: Path, *, require_masks: bool) -> tuple[list[_Row], list[Problem]]:
    table = read_csv(path)
    if table and "image" not in table[0]:
        raise DataError(
            f"{path}: no column 'image' among {_listed(map(_cut, table[0]))}; columns are image, mask (or one "
            "mask.LABEL each), frame, mask_frame, group, part"
        )
    if not table:
        raise DataError(f"{path}: no rows; a manifest has a header with the column 'image' and one line a sample")
    labels = [column.removeprefix(_LABEL_COLUMN) for column in table[0] if column.startswith(_LABEL_COLUMN)]
    if "" in labels or (labels and "mask" in table[0]):
        raise DataError(
            f"{path}: has the columns {_listed(map(_cut, table[0]), shown=12)}; give one column 'mask', or for "
            "overlapping labels one 'mask.LABEL' for each and no 'mask'"
        )
    rows: list[_Row] = []
    missing_mask: list[str] = []
    bad_frame: list[str] = []
    bad_part: list[str] = []
    no_image: list[str] = []
    too_long: list[str] = []
    for line, cells in enumerate(table, start=2):
        if not cells["image"]:
            no_image.append(f"line {line}")
            continue
        if any(len(text) > _LONGEST_PATH for text in cells.values()):
            too_long.append(f"line {line}")
            continue
        frames: list[int | None] = []
        for column in ("frame", "mask_frame"):
            text = cells.get(column, "")
            number = text.isascii() and text.isdigit() and len(text) < _LONGEST_NUMBER
            if text and not number:
                bad_frame.append(f"line {line}: {_cut(text)!r}")
            frames.append(int(text) if number else None)
        mask = cells.get("mask", "")
        stated = [label for label in labels if cells.get(_LABEL_COLUMN + label)]
        if (stated or require_masks) if len(stated) < len(labels) else require_masks and not mask and not labels:
            missing_mask.append(f"line {line}: {cells['image']}")
        part = cells.get("part", "")
        if part and part not in (*PARTS, UNUSED):
            bad_part.append(f"line {line}: {_cut(part)!r}")
        rows.append(
            _Row(
                image=path.parent / cells["image"],
                mask=path.parent / mask if mask else None,
                frame=frames[0],
                mask_frame=frames[1],
                group=cells.get("group") or None,
                part=part or None,
                label_masks=tuple((label, path.parent / cells[_LABEL_COLUMN + label]) for label in stated),
            )
        )
    seen: dict[tuple[Path, int | None], int] = {}
    twice: list[str] = []
    for row in rows:
        key = (row.image, row.frame)
        seen[key] = seen.get(key, 0) + 1
        if seen[key] == 2:
            twice.append(row.image.name if row.frame is None else f"{row.image.name} frame {row.frame}")
    # A row without a frame stands for all of them, so a row that names one of them repeats it.
    whole = {row.image for row in rows if row.frame is None}
    twice += [f"{row.image.name} frame {row.frame}" for row in rows if row.frame is not None and row.image in whole]
    return rows, [
        *_problem(
            no_image, "row has no image", "rows have no image", "fill in the column or remove the rows",
            kind="missing-image",
        ),
        *_problem(
            missing_mask, "row has no mask", "rows have no mask", f"fill in {_mask_columns(labels)}",
            kind="missing-mask",
        ),
        *_problem(
            too_long, "row has a cell beyond 1,000 characters", "rows have cells beyond 1,000 characters",
            "cells hold paths and short names",
        ),
        *_problem(bad_frame, "frame is no number", "frames are no numbers", "frames are counted from 0"),
        *_problem(bad_part, "part is unknown", "parts are unknown", f"parts are {', '.join(PARTS)} and {UNUSED}"),
        *_problem(twice, "image is listed twice", "images are listed twice", "list each image or frame once"),
    ]  # fmt: skip


def _mask_columns(labels: Sequence[str]) -> str:
    return "every column 'mask.LABEL', an empty mask where the label is absent" if labels else "the column 'mask'"


def _column(header: str) -> str:
    """Names of columns know no case; the name of a label does."""
    name = header.strip()
    start = len(_LABEL_COLUMN)
    return _LABEL_COLUMN + name[start:].strip() if name[:start].lower() == _LABEL_COLUMN else name.lower()


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a table with lower-case column names, cells stripped, empty rows left out.

    Raises:
        DataError: if the file cannot be read as CSV.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        header = text.partition("\n")[0]
        # Spreadsheets of many countries write semicolons.
        delimiter = ";" if ";" in header and "," not in header else ","
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, restkey="", strict=True)
        table = [
            {_column(key or ""): (value or "").strip() for key, value in row.items() if isinstance(value, str | None)}
            for row in reader
        ]
        return [cells for cells in table if any(cells.values())]
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such CSV file; check the path") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as a CSV table in UTF-8 ({error}); save it as one") from error


def scan_rows(
    rows: Sequence[_Row],
    progress: Callable[[int, int], None] | None = None,
    *,
    threads: int = _THREADS,
    new_look: Callable[[_Files], Look] | None = None,
    reading: Reading = LPS,
) -> dict[_Files, _Scan]:
    """Open the files of every row once, in threads (decoders release the interpreter lock).

    Args:
        reading: how volumes are cut into frames.
        new_look: makes what sees the pixels of one image and its masks; only one thread calls it at a time.
    """
    frames: dict[_Files, list[_Row]] = defaultdict(list)
    for row in rows:
        frames[row.files].append(row)
    scans = {}
    looks = [None if new_look is None else new_look(files) for files in frames]
    with ThreadPoolExecutor(threads) as pool:
        results = pool.map(partial(_scan, reading=reading), frames.values(), looks)
        for done, (key, scan) in enumerate(zip(frames, results, strict=True), start=1):
            scans[key] = scan
            if progress is not None:
                progress(done, len(frames))
    return scans


def _scan(rows: Sequence[_Row], look: Look | None = None, *, reading: Reading) -> _Scan:
    image, masks = rows[0].image, rows[0].masks
    try:
        frames = count_frames(image, reading=reading)
        sha256 = _content_sha256(image)
        wanted = [row.frame for row in rows if row.frame is not None]
        # Decoding one page of a TIFF does not vouch for the next one; a volume is read whole at the first slice.
        pages: list[int | None] = [*wanted] or ([None] if frames is None else [*range(frames)])
        sizes = {_looked_at(image, page, look, reading) for page in pages}
        if len(sizes) > 1:
            raise DataError(f"{image}: its frames have {len(sizes)} different sizes; split it into one file a size")
        size = sizes.pop()
        mask_frames: int | None = None
        mask_sizes, values = [], []
        for number, mask in enumerate(masks):
            here = count_frames(mask, reading=reading)
            if all(row.frame is None and row.mask_frame is None for row in rows) and frames != here:
                said = (
                    f"{mask}: the mask has {here or 1} frames, its image has {frames or 1}; both must be equal, or "
                    "name the frames in a CSV manifest"
                )
                return _Scan(problem=said, kind="size-mismatch")
            if number and here != mask_frames:
                raise DataError(f"{mask}: the mask has {here or 1} frames, {masks[0]} has {mask_frames or 1}")
            mask_frames = here
            found: set[int] = set()
            mask_size = size
            for mask_page in {
                _mask_page(row, page, here) for row in rows for page in ([row.frame] if wanted else pages)
            }:
                raw = read_mask(mask, mask_page, reading=reading)
                pixels_of = _pixels_of(raw)
                found.update(pixels_of)
                if look is not None:
                    look.mask(mask, mask_page, pixels_of)
                if raw.shape != size:
                    mask_size = raw.shape
            mask_sizes.append(mask_size)
            values.append(frozenset(found))
        return _Scan(sha256, frames, mask_frames, size, tuple(mask_sizes), tuple(values))
    except LeafsegError as error:
        return _Scan(problem=str(error))
    except OSError as error:
        return _Scan(problem=f"{image}: cannot be read ({error.strerror or error})")
    except Exception as error:
        if look is None:
            raise
        # A check never stops: what no reader foresaw is one more finding.
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return _Scan(problem=f"{image}: cannot be used ({reason}); replace or remove it, and report this message")


def _content_sha256(path: Path) -> str:
    """Of a file's bytes; of a folder, whatever its files are called, of what they hold."""
    files = sorted(file for file in path.iterdir() if is_dicom(file)) if path.is_dir() else [path]
    digests = []
    for file in files:
        with file.open("rb") as stream:
            digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest() if path.is_dir() else digests[0]


def _looked_at(image: Path, frame: int | None, look: Look | None, reading: Reading) -> tuple[int, int]:
    """The (height, width) of an image that was decoded, as cheaply as possible where nobody looks at it."""
    if look is None:
        return check_image(image, frame, reading=reading)
    pixels = read_image(image, frame, reading=reading)
    look.image(frame, pixels)
    return pixels.shape[0], pixels.shape[1]


def _mask_page(row: _Row, frame: int | None, mask_frames: int | None) -> int | None:
    if row.mask_frame is not None:
        return row.mask_frame
    return frame if mask_frames is not None else None


def _pixels_of(raw: NDArray[np.int64]) -> dict[int, int]:
    if raw.size and raw.min() >= 0 and raw.max() < 2**16:
        counts = np.bincount(raw.ravel())
        values = np.flatnonzero(counts)
        return dict(zip(values.tolist(), counts[values].tolist(), strict=True))
    values, counts = np.unique(raw, return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


def _scan_problems(rows: Iterable[_Row], scans: Mapping[_Files, _Scan], root: Path) -> list[Problem]:
    broken = [scan for scan in scans.values() if scan.problem]
    unreadable = [scan.problem for scan in broken if scan.problem and scan.kind == "unreadable"]
    differing = [scan.problem for scan in broken if scan.problem and scan.kind == "size-mismatch"]
    sentence = len(differing) == 1  # with its own remedy, unlike what follows
    for (_, *masks), scan in scans.items():
        for mask, size in zip(masks, scan.mask_sizes, strict=not scan.problem):
            if size != scan.size:
                sentence = False
                differing.append(f"{_relative(mask, root)} is {_sides(size)}, its image is {_sides(scan.size)}")
    return [
        *(
            [Problem(unreadable[0], "unreadable")]  # a single sentence speaks for itself
            if len(unreadable) == 1
            else _problem(
                unreadable, "file is unusable", "files are unusable", "replace or remove them", kind="unreadable"
            )
        ),
        *(
            [Problem(differing[0], "size-mismatch")]
            if sentence
            else _problem(
                differing, "mask differs from its image in size", "masks differ from their images in size",
                "both must share one grid", kind="size-mismatch",
            )
        ),
    ]  # fmt: skip


def _sides(size: tuple[int, int]) -> str:
    """(height, width) as people say it."""
    return f"{size[1]}x{size[0]}"


def _samples(data: Path, root: Path, rows: Sequence[_Row], scans: Mapping[_Files, _Scan]) -> list[Sample]:
    images = {row.image for row in rows}
    by_stem: dict[str, set[Path]] = defaultdict(set)
    for image in images:
        by_stem[image_stem(image)].add(image)
    samples = []
    for row in rows:
        scan = scans[row.files]
        name = image_stem(row.image)
        if len(by_stem[name]) > 1:  # a/001.png and b/001.png in one CSV
            name = "__".join((*_relative(row.image, root).parts[:-1], name)).strip("/_")
        chosen: Iterable[int | None] = (
            [row.frame] if row.frame is not None else [None] if scan.frames is None else range(scan.frames)
        )
        for frame in chosen:
            # One volume is one group from the start; its part follows from its content like any file's.
            several = scan.frames is not None
            part = row.part or default_part(row.group, scan.sha256)
            sha256 = scan.sha256
            if frame is not None and several:
                sha256 = hashlib.sha256(f"{scan.sha256} {frame}".encode()).hexdigest()
            samples.append(
                Sample(
                    name=f"{name}_{frame:04d}" if frame is not None and several else name,
                    image=row.image,
                    frame=frame if several else None,
                    mask=row.mask,
                    mask_frame=_mask_page(row, frame, scan.mask_frames) if row.masks else None,
                    group=row.group or (scan.sha256 if several else None),
                    sha256=sha256,
                    part=part,
                    label_masks=row.label_masks,
                )
            )
    counts: dict[str, int] = defaultdict(int)
    for sample in samples:
        counts[sample.name] += 1
    twins = [name for name, count in counts.items() if count > 1]
    _refuse(data, _problem(twins, "sample name occurs twice", "sample names occur twice", "rename one of the files"))
    return samples


def _warn_of_emptied_masks(data: Path, scans: Mapping[_Files, _Scan], threshold: int | None) -> None:
    """A mask of 0 and 1 among masks of 0 and 255: the threshold that suits these empties that one."""
    if threshold is None:
        return
    emptied = [
        mask.name
        for (_, *masks), scan in scans.items()
        for mask, values in zip(masks, scan.values, strict=True)
        if values and 0 < max(values) <= threshold
    ]
    if emptied:
        log.warning(
            "%s: no value of %d mask(s) is above data.mask_threshold=%d, though they are not empty: %s",
            data, len(emptied), threshold, _listed(sorted(emptied)),
        )  # fmt: skip


def _label_map_of(
    data: Path, root: Path, rows: Sequence[_Row], scans: Mapping[_Files, _Scan], settings: DataSettings
) -> LabelMap:
    names = settings.label_names if settings.label_names is not None else _stored_names(root / _LABELS_FILE)
    if any(row.label_masks for row in rows):
        found: dict[str, set[int]] = {}
        for row in rows:
            # A scan that failed has no values; its problem is told elsewhere.
            for (label, _), values in zip(row.label_masks, scans[row.files].values, strict=False):
                found.setdefault(label, set()).update(values)
        return _overlapping_map(data, found, names, settings)
    present = set[int]().union(*(values for scan in scans.values() for values in scan.values))
    return _label_map(data, present, names, settings) if present else _unseen_map(names)


def _stored_names(path: Path) -> dict[int, str] | None:
    if not path.is_file():
        return None
    try:
        stored = {int(value): name for value, name in json.loads(path.read_text(encoding="utf-8")).items()}
        if not all(isinstance(name, str) for name in stored.values()):
            raise ValueError("a name is no text")
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(
            f"{path}: not a readable table of mask values and names ({str(error).splitlines()[0]}); write it as "
            '{"1": "cytoplasm", "2": "nucleus"}'
        ) from error
    return stored


def _unseen_map(names: Mapping[int, str] | None) -> LabelMap:
    """Without any mask: the classes that the names state, else foreground and background."""
    return _declared_map(names) if names else LabelMap(((0, 0), (1, 1)))


def _overlapping_map(
    data: Path, present: Mapping[str, set[int]], names: Mapping[int, str] | None, settings: DataSettings
) -> LabelMap:
    """One mask file a label: 0 is its absence, one other value its presence."""
    out_of_place = {
        "data.foreground_labels": settings.foreground_labels,
        "data.ignore_label": settings.ignore_label,
        f"data.label_names (or {_LABELS_FILE})": names,
    }
    if meant := [name for name, value in out_of_place.items() if value is not None]:
        raise DataError(
            f"{data}: the masks are one file a label ({_listed(present)}), which {_listed(meant)} cannot apply to; the "
            "labels' names are those of their folders or columns, remove the setting"
        )
    if len(present) > MAX_LABEL_IDS:
        raise DataError(f"{data}: there are {len(present)} overlapping labels; at most {MAX_LABEL_IDS} are accepted")
    if not any(value != 0 for values in present.values() for value in values):
        raise DataError(f"{data}: all masks are empty (every pixel is 0); at least one must hold foreground")
    if settings.mask_threshold is not None:
        return LabelMap((), tuple(present), threshold=settings.mask_threshold, overlapping=True)
    mixed = {label: values - {0} for label, values in present.items() if len(values - {0}) > 1}
    if mixed:
        label, values = next(iter(mixed.items()))
        raise DataError(
            f"{data}: the masks of label {label} hold {_listed(map(str, sorted(values)))} beside 0; the mask of an "
            "overlapping label has one value beside 0, set --set data.mask_threshold=127 for soft edges"
        )
    known = sorted({0}.union(*present.values()))
    return LabelMap(tuple((value, int(value != 0)) for value in known), tuple(present), overlapping=True)


def _declared_map(names: Mapping[int, str], *, ignore: int | None = None) -> LabelMap:
    """Classes as the names state them, in ascending order of their values; 0 is the background."""
    stated = {0: "background", **names}
    ids = tuple((value, index) for index, value in enumerate(sorted(stated)))
    return LabelMap(ids, tuple(stated[value] for value, _ in ids), ignore=ignore)


def _check_names(data: Path, names: Mapping[int, str], ignore: int | None) -> None:
    listed = list(names.values())
    problems = []
    if not [value for value in names if value != 0]:
        problems.append("name no value beside 0, which is the background")
    if any(value < 0 for value in names):
        problems.append("name values below 0, which are no label ids")
    if ignore in names:
        problems.append(f"name {ignore}, which data.ignore_label leaves out")
    if len(names) > MAX_LABEL_IDS:
        problems.append(f"name {len(names)} values, of which at most {MAX_LABEL_IDS} are accepted")
    if any(not name.strip() for name in listed) or len(set(listed)) < len(listed):
        problems.append("are empty or twice the same")
    _refuse(data, [f"the label names ({_listed(listed)}) {'; they '.join(problems)}; correct data.label_names or "
                   f"{_LABELS_FILE}"] if problems else [])  # fmt: skip


def _label_map(data: Path, present: set[int], names: Mapping[int, str] | None, settings: DataSettings) -> LabelMap:
    """What the raw values of all masks together mean; every doubtful case is an error that names the way out."""
    labels, threshold, ignore = settings.foreground_labels, settings.mask_threshold, settings.ignore_label
    values = sorted(present - {ignore})
    listed = _listed(map(str, values), shown=12)
    if names is not None:
        _check_names(data, names, ignore)
    if not values:
        raise DataError(
            f"{data}: every pixel of every mask is {ignore}, which data.ignore_label leaves out; correct it"
        )
    if threshold is not None:
        if labels is not None:
            raise DataError(f"{data}: data.mask_threshold and data.foreground_labels are both set; give one of them")
        if values[-1] <= threshold:
            raise DataError(
                f"{data}: no mask value is above data.mask_threshold={threshold}, the values are {listed}; lower it"
            )
        above = [value for value in names or () if value > threshold]
        return LabelMap((), _binary_names(names, above), threshold=threshold, ignore=ignore)
    if labels is not None:
        absent = sorted(set(labels) - set(values))
        if absent or not labels:
            raise DataError(
                f"{data}: data.foreground_labels names {_listed(map(str, absent)) or 'nothing'}, which no mask holds; "
                f"the values are {listed}"
            )
        ids = tuple((value, int(value in labels)) for value in values)
        return LabelMap(ids, _binary_names(names, labels), ignore=ignore)
    if values == [0]:
        raise DataError(f"{data}: all masks are empty (every pixel is 0); at least one must hold foreground")
    if names is not None:
        undeclared = [value for value in values if value != 0 and value not in names]
        if undeclared:
            raise DataError(
                f"{data}: the masks hold {_listed(map(str, undeclared), shown=12)}, which the label names do not list; "
                f"name every value in data.label_names or {_LABELS_FILE}, or leave one out with data.ignore_label"
            )
        return _declared_map(names, ignore=ignore)
    way_out = (
        "set --set data.mask_threshold=127 for soft edges, --set data.foreground_labels=[1,2] for label ids, or --set "
        "data.ignore_label=255 for pixels that nobody labelled"
    )
    if len(values) == 1 or (len(values) == 2 and values[0] != 0):
        raise DataError(
            f"{data}: the masks hold {listed} but no 0, so nothing says which value is the background; set --set "
            f"data.foreground_labels=[{values[-1]}] or whichever is meant"
        )
    if len(values) == 2:
        return LabelMap(((0, 0), (values[1], 1)), ignore=ignore)
    if len(values) > MAX_LABEL_IDS:
        raise DataError(
            f"{data}: the masks hold {len(values)} different values ({listed}), at most {MAX_LABEL_IDS} label ids are "
            f"accepted; {way_out}"
        )
    small = any(1 <= value <= MAX_LABEL_IDS for value in values)
    if values[0] < 0 or (small and any(value in _FULL_SCALE for value in values)):
        raise DataError(
            f"{data}: the masks hold {listed}, a mixture of label ids and special values that can be read in "
            f"more than one way; {way_out}, or rewrite the masks with ids 0, 1, 2"
        )
    if 0 not in values:
        raise DataError(
            f"{data}: the masks hold {listed} but no 0, so nothing says which value is the background; name the "
            "classes with data.label_names (0 is then the background), or set "
            f"--set data.foreground_labels=[{values[-1]}] or whichever are meant"
        )
    found = tuple("background" if value == 0 else f"class {value}" for value in values)
    return LabelMap(tuple((value, index) for index, value in enumerate(values)), found, ignore=ignore)


def _binary_names(names: Mapping[int, str] | None, foreground: Iterable[int]) -> tuple[str, str]:
    """The foreground's name is that of its values, where they are one value or share one."""
    given = {name for value, name in (names or {}).items() if value in set(foreground)}
    return "background", given.pop() if len(given) == 1 else CLASS_NAMES[1]


def _stored_parts(path: Path, samples: Sequence[Sample], fold: int | None) -> list[Sample]:
    table = read_csv(path)
    columns = set(table[0]) if table else set()
    if "part" not in columns or not columns & {"sha256", "name"}:
        raise DataError(f"{path}: is not a split file; it needs the column part, and sha256 or name")
    unknown = sorted({cells["part"] for cells in table} - {*PARTS, UNUSED})
    if unknown:
        raise DataError(f"{path}: {_listed(map(repr, unknown))} is no part; parts are {', '.join(PARTS)} and {UNUSED}")
    _check_folds(path, table, fold)
    by_key: dict[tuple[str, str], dict[str, str]] = {}
    conflicts = []
    for cells in table:
        for column in ("sha256", "name"):
            key = cells.get(column, "")
            if column == "name" and cells.get("sha256"):
                continue  # the content decides: another data set may use the same names
            if key and _place(by_key.setdefault((column, key), cells), fold) != _place(cells, fold):
                conflicts.append(cells.get("name") or key)
    _refuse(path, _problem(conflicts, "sample is in two parts", "samples are in two parts", "list each once"))
    placed: list[Sample] = []
    uncovered: list[Sample] = []
    for sample in samples:
        # Content first: a renamed file keeps its part, and a name that was reused does not inherit one.
        row = by_key.get(("sha256", sample.sha256)) or by_key.get(("name", sample.name))
        if row is None and sample.part == UNUSED:  # the data leave it out already, and so did who made the split
            placed.append(sample)
        elif row is None:
            uncovered.append(sample)
        else:
            part, its_fold = _place(row, fold)
            placed.append(replace(sample, part=part, fold=its_fold, group=row.get("group") or sample.group))
    remedy = f"add them, with part {UNUSED!r} to leave them out"
    if any(sample.frame is not None for sample in uncovered):  # a volume has other slices along another axis
        remedy += "; slices need a split made with the same --set data.preprocessing.slice_axis and orientation"
    names = [sample.name for sample in uncovered]
    _refuse(path, _problem(names, "sample is not in the split file", "samples are not in the split file", remedy))
    return placed


def _check_folds(path: Path, table: Sequence[Mapping[str, str]], fold: int | None) -> None:
    """The column fold holds numbers, and the wanted one among them."""
    cells = {row.get("fold", "") for row in table} - {""}
    bad = sorted(cell for cell in cells if not (cell.isascii() and cell.isdigit()))
    if bad:
        raise DataError(f"{path}: {_listed(map(repr, bad))} is no fold; folds are numbers from 0")
    if fold is not None and not cells:
        raise DataError(f"{path}: holds no folds; make them with `leafseg data split --folds 5`")
    if fold is not None and fold not in map(int, cells):
        raise DataError(f"{path}: holds no fold {fold}; its folds are {_listed(sorted(cells, key=int), shown=20)}")


def _place(row: Mapping[str, str], fold: int | None) -> tuple[str, int | None]:
    """The part of a row of a split file, given the fold that validates, and the row's own fold."""
    part = row["part"]
    if part in ("test", UNUSED) or not row.get("fold"):
        return part, None
    own = int(row["fold"])
    if fold is None:
        return part, own
    return "validation" if own == fold else "train", own


def _run_parts(path: Path, samples: list[Sample]) -> list[Sample]:
    """The parts that a run used; what it did not know is left out, unless it knew nothing of this data at all.

    Groups come from there too: those of a split file are not in the data.
    """
    rows = {cells.get("sha256", ""): cells for cells in read_csv(path) if cells.get("part") in PARTS}
    known = [
        replace(sample, part=row["part"], group=row.get("group") or sample.group)
        for sample in samples
        if (row := rows.get(sample.sha256)) is not None
    ]
    if not known:
        return samples
    if len(known) < len(samples):
        log.warning("%d of %d samples are not in %s and left out", len(samples) - len(known), len(samples), path)
    return known


def _placed(
    data: Path, samples: list[Sample], *, split_file: Path | None, fold: int | None, run_split: Path | None
) -> tuple[Sample, ...]:
    """The samples in the parts that a stored split gives them, sorted by name, without the unused ones."""
    if split_file is not None:
        samples = _stored_parts(split_file, samples, fold)
    elif run_split is not None:
        samples = _run_parts(run_split, samples)
    _check_parts(split_file or data, samples)
    kept = tuple(sorted((sample for sample in samples if sample.part != UNUSED), key=lambda sample: sample.name))
    if not kept:
        raise DataError(f"{split_file or data}: every sample is marked {UNUSED!r}; at least one must belong to a part")
    return kept


def _check_parts(source: Path, samples: Sequence[Sample]) -> None:
    """No group and no content may lie in two parts: the test part would leak.

    A group may be a patient's name: the message names an image of each part instead.
    """
    parts: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)  # by key: an image's name of each part
    names: dict[tuple[str, str], list[str]] = defaultdict(list)
    for sample in samples:
        if sample.part == UNUSED:
            continue
        keys = [("sha256", sample.sha256)]
        if sample.group is not None:
            keys.append(("group", sample.group))
        for key in keys:
            parts[key].setdefault(sample.part, sample.name)
            names[key].append(sample.name)
    torn = [" and ".join(found.values()) for key, found in parts.items() if key[0] == "group" and len(found) > 1]
    same = [" = ".join(names[key][:2]) for key, found in parts.items() if key[0] == "sha256" and len(found) > 1]
    _refuse(
        source,
        [
            *_problem(
                torn, "group lies in two parts", "groups lie in two parts", "give all of a group one part",
                kind="group-across-parts",
            ),
            *_problem(
                same, "image lies in two parts under two names", "images lie in two parts under two names",
                "give equal images one group or one part", kind="duplicate-across-parts",
            ),
        ],
    )  # fmt: skip


def _problem(names: Sequence[str], singular: str, plural: str, remedy: str, *, kind: str = "layout") -> list[Problem]:
    """Nothing if no name is affected, else one clause: how many, which, and what to do."""
    if not names:
        return []
    text = f"{len(names)} {singular if len(names) == 1 else plural} ({_listed(names)}), {remedy}"
    return [Problem(text, kind, tuple(names))]


def _refuse(source: Path, problems: Sequence[Problem | str]) -> None:
    known = [Problem(problem) if isinstance(problem, str) else problem for problem in problems]
    if known:
        raise ManifestError(f"{source}: {'; '.join(problem.text for problem in known)}", known)


def _cut(word: str) -> str:
    """A word of the user's as it fits into a sentence."""
    return word if len(word) <= _LONGEST_WORD else f"{word[:_LONGEST_WORD]}..."


def _listed(names: Iterable[str], shown: int = _SHOWN) -> str:
    everything = list(names)
    rest = len(everything) - shown
    return ", ".join(everything[:shown]) + (f" and {rest} more" if rest > 0 else "")


def _relative(path: Path, root: Path) -> Path:
    return path.relative_to(root) if path.is_relative_to(root) else path
