"""Which image belongs to which mask, to which group, and to which part: the one list that every run reads.

A sample's part follows from its group, else from its content, so that every run (the autoencoder's too) agrees on the
test part with no file stored. A stored split file overrides it.
"""

from __future__ import annotations

import csv
import hashlib
import io
import logging
import shlex
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from leafseg.data.images import (
    IMAGE_SUFFIXES,
    VOLUME_SUFFIXES,
    check_image,
    count_frames,
    image_stem,
    image_suffix,
    read_mask,
)
from leafseg.errors import DataError
from leafseg.files import write_text_atomic

if TYPE_CHECKING:
    from leafseg.config import DataSettings

log = logging.getLogger(__name__)

PARTS = ("train", "validation", "test")
UNUSED = "unused"
CLASS_NAMES = ("background", "foreground")
MAX_LABEL_IDS = 32

_THREADS = 4
_SHOWN = 5  # names listed of each kind of problem
_FULL_SCALE = (128, 254, 255)  # beside ids 1, 2, ...: ignore label, or soft edge?
# Files that somebody meant as data; a README.txt in the folder is nobody's mistake.
_UNSUPPORTED = (
    *(".webp", ".gif", ".jp2", ".j2k", ".jfif", ".avif", ".heic", ".ppm", ".pgm", ".pbm", ".svg", ".psd", ".tga"),
    *(".dcm", ".dicom", ".mhd", ".hdr", ".img", ".nhdr", ".svs", ".czi", ".ndpi", ".npy", ".npz", ".mat", ".h5"),
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
        mask: None if there is none.
        group: what must stay in one part; the frames of one file are a group named by the file's SHA-256.
        sha256: of the image file's bytes; for a frame, of the file's digest and the frame number.
        part: one of ``PARTS``.
    """

    name: str
    image: Path
    frame: int | None
    mask: Path | None
    mask_frame: int | None
    group: str | None
    sha256: str
    part: str


@dataclass(frozen=True)
class LabelMap:
    """From the raw values of mask files to class ids.

    Attributes:
        values: (raw value, class id) pairs; unused with a threshold.
        names: one a class id; the first is the background.
        threshold: if set, a raw value above it is class 1 and any other class 0.
    """

    values: tuple[tuple[int, int], ...]
    names: tuple[str, ...] = CLASS_NAMES
    threshold: int | None = None

    def apply(self, raw: NDArray[np.int64], *, source: str = "mask") -> NDArray[np.uint8]:
        """Class ids ``[H, W]`` of raw values ``[H, W]``; ``source`` is named in the error.

        Raises:
            DataError: for a raw value that the map does not hold.
        """
        if self.threshold is not None:
            return (raw > self.threshold).astype(np.uint8)
        known = np.array(sorted(self.values), dtype=np.int64).reshape(-1, 2)
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
                f"{_listed((str(value) for value, _ in self.values), shown=MAX_LABEL_IDS)}, correct the mask or set "
                "data.foreground_labels"
            )
        return classes.astype(np.uint8)


@dataclass(frozen=True)
class Manifest:
    """Samples sorted by name, and what their masks' values mean. ``root`` is the data folder, or the CSV's folder."""

    root: Path
    samples: tuple[Sample, ...]
    label_map: LabelMap

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
    run_split: Path | None = None,
    require_masks: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Pair images with masks, check every file, find out what the mask values mean, and decide the parts.

    Args:
        data: a folder with ``images/`` and ``masks/`` (same stem, any accepted suffix), or a CSV file with the column
            ``image`` and optionally ``mask``, ``frame``, ``mask_frame``, ``group``, ``part``; its paths are relative to
            its folder. A file of several frames without a chosen frame becomes one sample a frame. A folder that
            ``leafseg data prepare`` wrote stands for its ``manifest.csv``.
        settings: ``mask_threshold`` and ``foreground_labels`` decide what is foreground.
        split_file: a file of ``save_split``; overrides groups and the CSV's parts, and must cover every sample.
        run_split: the split that a run stored. Samples that it holds (by content) keep their parts and others are left
            out; if it holds none of them, this is another data set and the default rule applies.
        require_masks: False accepts images without a mask.
        progress: called with (files done, files in all).

    Raises:
        DataError: one sentence a kind of problem, each with a count and the first few names.
    """
    data = Path(data)
    if data.is_dir() and _is_prepared(data):
        root, rows = data, _csv_rows(data / "manifest.csv", require_masks=require_masks)
    elif data.is_dir():
        root, rows = data, _folder_rows(data, require_masks=require_masks)
    elif data.is_file():
        root, rows = data.parent, _csv_rows(data, require_masks=require_masks)
    else:
        raise DataError(f"{data}: no such folder or CSV file; check the path")

    scans = _scan_all(rows, progress)
    _refuse(data, _scan_problems(rows, scans, root))
    samples = _samples(data, root, rows, scans)
    present = set().union(*(scan.values for scan in scans.values()))
    label_map = _label_map(data, present, settings) if present else LabelMap(((0, 0), (1, 1)))
    _warn_of_emptied_masks(data, scans, settings.mask_threshold)
    if split_file is not None:
        samples = _stored_parts(split_file, samples)
    elif run_split is not None:
        samples = _run_parts(run_split, samples)
    _check_parts(split_file or data, samples)
    kept = tuple(sorted((sample for sample in samples if sample.part != UNUSED), key=lambda sample: sample.name))
    if not kept:
        raise DataError(f"{split_file or data}: every sample is marked {UNUSED!r}; at least one must belong to a part")
    return Manifest(root, kept, label_map)


def save_split(manifest: Manifest, path: Path) -> None:
    """Write the parts as CSV (name, sha256, group, part), to be given back as ``split_file``.

    Raises:
        DataError: if the system refuses to write.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("name", "sha256", "group", "part"))
    for sample in manifest.samples:
        writer.writerow((sample.name, sample.sha256, sample.group or "", sample.part))
    write_text_atomic(path, text.getvalue())


@dataclass(frozen=True)
class _Row:
    """A pair of files as listed, before any is opened; ``frame`` None means all there are."""

    image: Path
    mask: Path | None
    frame: int | None = None
    mask_frame: int | None = None
    group: str | None = None
    part: str | None = None


@dataclass(frozen=True)
class _Scan:
    """What opening the files of one row told; ``problem`` is the DataError's text."""

    sha256: str = ""
    frames: int | None = None
    mask_frames: int | None = None
    size: tuple[int, int] = (0, 0)
    mask_size: tuple[int, int] | None = None
    values: frozenset[int] = frozenset()
    problem: str | None = None


def _folder_rows(data: Path, *, require_masks: bool) -> list[_Row]:
    folders = {"images": data / "images", "masks": data / "masks"}
    required = ("images", "masks") if require_masks else ("images",)
    missing = [f"{name}/" for name in required if not folders[name].is_dir()]
    if missing:
        if not any(folder.is_dir() for folder in folders.values()):
            _refuse(data, _known_set_problem(data))
        raise DataError(
            f"{data}: {' and '.join(missing)} missing; a data folder holds images/ and masks/ with files of the same "
            "stem, or give a CSV manifest"
        )
    problems: list[str] = []
    found: dict[str, dict[str, Path]] = {"images": {}, "masks": {}}
    for name, folder in folders.items():
        if not folder.is_dir():
            continue
        by_stem: dict[str, list[Path]] = defaultdict(list)
        files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
        for path in files:
            if image_suffix(path):
                by_stem[image_stem(path)].append(path)
        twins = [" and ".join(path.name for path in paths) for paths in by_stem.values() if len(paths) > 1]
        problems += _problem(twins, f"stem in {name}/ has two files", f"stems in {name}/ have two files", "keep one")
        foreign = [path.name for path in files if path.suffix.lower() in _UNSUPPORTED]
        accepted = " ".join(IMAGE_SUFFIXES + VOLUME_SUFFIXES)
        problems += _problem(
            foreign, f"file in {name}/ is of no accepted type", f"files in {name}/ are of no accepted type",
            f"convert them to one of {accepted}",
        )  # fmt: skip
        found[name] = {stem: paths[0] for stem, paths in by_stem.items()}
    images, masks = found["images"], found["masks"]
    if not images and not problems:
        raise DataError(
            f"{folders['images']}: no images in the folder; accepted are {' '.join(IMAGE_SUFFIXES + VOLUME_SUFFIXES)}, "
            "put them there without subfolders or give a CSV manifest"
        )
    if require_masks:
        lonely = [images[stem].name for stem in sorted(images.keys() - masks.keys())]
        problems += _problem(lonely, "image has no mask", "images have no mask", "a mask has its image's stem")
    lonely = [masks[stem].name for stem in sorted(masks.keys() - images.keys())]
    problems += _problem(lonely, "mask has no image", "masks have no image", "remove them or add the images")
    ending = _common_ending(images, masks)
    if ending:
        problems.append(f"the masks' stems end with {ending!r}; rename them or give a CSV manifest")
    _refuse(data, problems)
    return [_Row(images[stem], masks.get(stem)) for stem in sorted(images)]


def _is_prepared(data: Path) -> bool:
    from leafseg.data.catalog import is_prepared  # which imports this module

    return is_prepared(data)


def _known_set_problem(data: Path) -> list[str]:
    """A known data set as it was downloaded is one command away from a manifest."""
    from leafseg.data.catalog import recognise

    try:
        known = recognise(data).known
    except DataError:
        return []
    out = shlex.quote(f"{data.resolve().name}-prepared")
    command = f"leafseg data prepare {shlex.quote(str(data))} --out {out}"
    return [f"this is {known.title} as it is downloaded; run `{command}` and give --data {out}"]


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


def _csv_rows(path: Path, *, require_masks: bool) -> list[_Row]:
    table = _read_csv(path)
    if table and "image" not in table[0]:
        raise DataError(
            f"{path}: no column 'image' among {', '.join(table[0])}; columns are image, mask, frame, mask_frame, "
            "group, part"
        )
    if not table:
        raise DataError(f"{path}: no rows; a manifest has a header with the column 'image' and one line a sample")
    rows: list[_Row] = []
    missing_mask: list[str] = []
    bad_frame: list[str] = []
    bad_part: list[str] = []
    no_image: list[str] = []
    for line, cells in enumerate(table, start=2):
        if not cells["image"]:
            no_image.append(f"line {line}")
            continue
        frames: list[int | None] = []
        for column in ("frame", "mask_frame"):
            text = cells.get(column, "")
            if text and not (text.isascii() and text.isdigit()):
                bad_frame.append(f"line {line}: {text!r}")
            frames.append(int(text) if text.isascii() and text.isdigit() else None)
        mask = cells.get("mask", "")
        if not mask and require_masks:
            missing_mask.append(f"line {line}: {cells['image']}")
        part = cells.get("part", "")
        if part and part not in (*PARTS, UNUSED):
            bad_part.append(f"line {line}: {part!r}")
        rows.append(
            _Row(
                image=path.parent / cells["image"],
                mask=path.parent / mask if mask else None,
                frame=frames[0],
                mask_frame=frames[1],
                group=cells.get("group") or None,
                part=part or None,
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
    _refuse(
        path,
        [
            *_problem(no_image, "row has no image", "rows have no image", "fill in the column or remove the rows"),
            *_problem(missing_mask, "row has no mask", "rows have no mask", "fill in the column 'mask'"),
            *_problem(bad_frame, "frame is no number", "frames are no numbers", "frames are counted from 0"),
            *_problem(bad_part, "part is unknown", "parts are unknown", f"parts are {', '.join(PARTS)} and {UNUSED}"),
            *_problem(twice, "image is listed twice", "images are listed twice", "list each image or frame once"),
        ],
    )
    return rows


def _read_csv(path: Path) -> list[dict[str, str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        header = text.partition("\n")[0]
        # Spreadsheets of many countries write semicolons.
        delimiter = ";" if ";" in header and "," not in header else ","
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, restkey="", strict=True)
        table = [
            {
                (key or "").strip().lower(): (value or "").strip()
                for key, value in row.items()
                if isinstance(value, str | None)
            }
            for row in reader
        ]
        return [cells for cells in table if any(cells.values())]
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such CSV file; check the path") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as a CSV table in UTF-8 ({error}); save it as one") from error


def _scan_all(
    rows: Sequence[_Row], progress: Callable[[int, int], None] | None
) -> dict[tuple[Path, Path | None], _Scan]:
    """Open every pair of files once, in threads (decoders release the interpreter lock)."""
    frames: dict[tuple[Path, Path | None], list[_Row]] = defaultdict(list)
    for row in rows:
        frames[row.image, row.mask].append(row)
    scans = {}
    with ThreadPoolExecutor(_THREADS) as pool:
        for done, (key, scan) in enumerate(zip(frames, pool.map(_scan, frames.values()), strict=True), start=1):
            scans[key] = scan
            if progress is not None:
                progress(done, len(frames))
    return scans


def _scan(rows: Sequence[_Row]) -> _Scan:
    image, mask = rows[0].image, rows[0].mask
    try:
        frames = count_frames(image)
        with image.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        wanted = [row.frame for row in rows if row.frame is not None]
        # Decoding one page of a TIFF does not vouch for the next one; a volume is read whole at the first slice.
        pages: list[int | None] = [*wanted] or ([None] if frames is None else [*range(frames)])
        sizes = {check_image(image, page) for page in pages}
        if len(sizes) > 1:
            raise DataError(f"{image}: its frames have {len(sizes)} different sizes; split it into one file a size")
        size = sizes.pop()
        if mask is None:
            return _Scan(sha256, frames, size=size)
        mask_frames = count_frames(mask)
        if all(row.frame is None and row.mask_frame is None for row in rows) and frames != mask_frames:
            raise DataError(
                f"{mask}: the mask has {mask_frames or 1} frames, its image has {frames or 1}; both must be equal, or "
                "name the frames in a CSV manifest"
            )
        mask_pages = {_mask_page(row, page, mask_frames) for row in rows for page in ([row.frame] if wanted else pages)}
        values: set[int] = set()
        mask_size = size
        for mask_page in mask_pages:
            raw = read_mask(mask, mask_page)
            values.update(_distinct(raw))
            if raw.shape != size:
                mask_size = raw.shape
        return _Scan(sha256, frames, mask_frames, size, mask_size, frozenset(values))
    except DataError as error:
        return _Scan(problem=str(error))
    except OSError as error:
        return _Scan(problem=f"{image}: cannot be read ({error.strerror or error})")


def _mask_page(row: _Row, frame: int | None, mask_frames: int | None) -> int | None:
    if row.mask_frame is not None:
        return row.mask_frame
    return frame if mask_frames is not None else None


def _distinct(raw: NDArray[np.int64]) -> list[int]:
    if raw.size and raw.min() >= 0 and raw.max() < 2**16:
        return np.flatnonzero(np.bincount(raw.ravel())).tolist()
    return np.unique(raw).tolist()


def _scan_problems(rows: Iterable[_Row], scans: dict[tuple[Path, Path | None], _Scan], root: Path) -> list[str]:
    unreadable = [scan.problem for scan in scans.values() if scan.problem]
    if len(unreadable) == 1:
        return unreadable
    differing = []
    for (_, mask), scan in scans.items():
        if mask is not None and scan.mask_size is not None and scan.mask_size != scan.size:
            differing.append(
                f"{_relative(mask, root)} is {scan.mask_size[1]}x{scan.mask_size[0]}, its image is "
                f"{scan.size[1]}x{scan.size[0]}"
            )
    return [
        *_problem(unreadable, "file is unusable", "files are unusable", "replace or remove them"),
        *_problem(
            differing, "mask differs from its image in size", "masks differ from their images in size",
            "both must share one grid",
        ),
    ]  # fmt: skip


def _samples(
    data: Path, root: Path, rows: Sequence[_Row], scans: dict[tuple[Path, Path | None], _Scan]
) -> list[Sample]:
    images = {row.image for row in rows}
    by_stem: dict[str, set[Path]] = defaultdict(set)
    for image in images:
        by_stem[image_stem(image)].add(image)
    samples = []
    for row in rows:
        scan = scans[row.image, row.mask]
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
                    mask_frame=None if row.mask is None else _mask_page(row, frame, scan.mask_frames),
                    group=row.group or (scan.sha256 if several else None),
                    sha256=sha256,
                    part=part,
                )
            )
    counts: dict[str, int] = defaultdict(int)
    for sample in samples:
        counts[sample.name] += 1
    twins = [name for name, count in counts.items() if count > 1]
    _refuse(data, _problem(twins, "sample name occurs twice", "sample names occur twice", "rename one of the files"))
    return samples


def _warn_of_emptied_masks(data: Path, scans: Mapping[tuple[Path, Path | None], _Scan], threshold: int | None) -> None:
    """A mask of 0 and 1 among masks of 0 and 255: the threshold that suits these empties that one."""
    if threshold is None:
        return
    emptied = [
        mask.name for (_, mask), scan in scans.items() if mask and scan.values and 0 < max(scan.values) <= threshold
    ]
    if emptied:
        log.warning(
            "%s: no value of %d mask(s) is above data.mask_threshold=%d, though they are not empty: %s",
            data, len(emptied), threshold, _listed(sorted(emptied)),
        )  # fmt: skip


def _label_map(data: Path, present: set[int], settings: DataSettings) -> LabelMap:
    """What the raw values of all masks together mean; every doubtful case is an error that names the way out."""
    values = sorted(present)
    listed = _listed(map(str, values), shown=12)
    labels, threshold = settings.foreground_labels, settings.mask_threshold
    if threshold is not None:
        if labels is not None:
            raise DataError(f"{data}: data.mask_threshold and data.foreground_labels are both set; give one of them")
        if values[-1] <= threshold:
            raise DataError(
                f"{data}: no mask value is above data.mask_threshold={threshold}, the values are {listed}; lower it"
            )
        return LabelMap((), threshold=threshold)
    if labels is not None:
        absent = sorted(set(labels) - present)
        if absent or not labels:
            raise DataError(
                f"{data}: data.foreground_labels names {_listed(map(str, absent)) or 'nothing'}, which no mask holds; "
                f"the values are {listed}"
            )
        return LabelMap(tuple((value, int(value in labels)) for value in values))
    if values == [0]:
        raise DataError(f"{data}: all masks are empty (every pixel is 0); at least one must hold foreground")
    way_out = "set --set data.mask_threshold=127 for soft edges or --set data.foreground_labels=[1,2] for label ids"
    if len(values) == 1 or (len(values) == 2 and values[0] != 0):
        raise DataError(
            f"{data}: the masks hold {listed} but no 0, so nothing says which value is the background; set --set "
            f"data.foreground_labels=[{values[-1]}] or whichever is meant"
        )
    if len(values) == 2:
        return LabelMap(((0, 0), (values[1], 1)))
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
    names = tuple("background" if value == 0 else f"class {value}" for value in values)
    return LabelMap(tuple((value, index) for index, value in enumerate(values)), names)


def _stored_parts(path: Path, samples: Sequence[Sample]) -> list[Sample]:
    table = _read_csv(path)
    columns = set(table[0]) if table else set()
    if "part" not in columns or not columns & {"sha256", "name"}:
        raise DataError(f"{path}: is not a split file; it needs the column part, and sha256 or name")
    unknown = sorted({cells["part"] for cells in table} - {*PARTS, UNUSED})
    if unknown:
        raise DataError(f"{path}: {_listed(map(repr, unknown))} is no part; parts are {', '.join(PARTS)} and {UNUSED}")
    by_key: dict[tuple[str, str], str] = {}
    conflicts = []
    for cells in table:
        for column in ("sha256", "name"):
            key = cells.get(column, "")
            if column == "name" and cells.get("sha256"):
                continue  # the content decides: another data set may use the same names
            if key and by_key.setdefault((column, key), cells["part"]) != cells["part"]:
                conflicts.append(cells.get("name") or key)
    _refuse(path, _problem(conflicts, "sample is in two parts", "samples are in two parts", "list each once"))
    placed, uncovered = [], []
    for sample in samples:
        # Content first: a renamed file keeps its part, and a name that was reused does not inherit one.
        part = by_key.get(("sha256", sample.sha256)) or by_key.get(("name", sample.name))
        if part is None:
            uncovered.append(sample.name)
        else:
            placed.append(replace(sample, part=part))
    _refuse(
        path,
        _problem(
            uncovered, "sample is not in the split file", "samples are not in the split file",
            f"add them, with part {UNUSED!r} to leave them out",
        ),
    )  # fmt: skip
    return placed


def _run_parts(path: Path, samples: list[Sample]) -> list[Sample]:
    """The parts that a run used; what it did not know is left out, unless it knew nothing of this data at all."""
    parts = {cells.get("sha256", ""): cells.get("part", "") for cells in _read_csv(path)}
    known = [replace(sample, part=parts[sample.sha256]) for sample in samples if parts.get(sample.sha256) in PARTS]
    if not known:
        return samples
    if len(known) < len(samples):
        log.warning("%d of %d samples are not in %s and left out", len(samples) - len(known), len(samples), path)
    return known


def _check_parts(source: Path, samples: Sequence[Sample]) -> None:
    """No group and no content may lie in two parts: the test part would leak."""
    parts: dict[tuple[str, str], set[str]] = defaultdict(set)
    names: dict[tuple[str, str], list[str]] = defaultdict(list)
    for sample in samples:
        if sample.part == UNUSED:
            continue
        keys = [("sha256", sample.sha256)]
        if sample.group is not None:
            keys.append(("group", sample.group))
        for key in keys:
            parts[key].add(sample.part)
            names[key].append(sample.name)
    torn = [key[1] for key, found in parts.items() if key[0] == "group" and len(found) > 1]
    same = [" = ".join(names[key][:2]) for key, found in parts.items() if key[0] == "sha256" and len(found) > 1]
    _refuse(
        source,
        [
            *_problem(torn, "group lies in two parts", "groups lie in two parts", "give all of a group one part"),
            *_problem(
                same, "image lies in two parts under two names", "images lie in two parts under two names",
                "give equal images one group or one part",
            ),
        ],
    )  # fmt: skip


def _problem(names: Sequence[str], singular: str, plural: str, remedy: str) -> list[str]:
    """Nothing if no name is affected, else one clause: how many, which, and what to do."""
    if not names:
        return []
    return [f"{len(names)} {singular if len(names) == 1 else plural} ({_listed(names)}), {remedy}"]


def _refuse(source: Path, problems: Sequence[str]) -> None:
    if problems:
        raise DataError(f"{source}: {'; '.join(problems)}")


def _listed(names: Iterable[str], shown: int = _SHOWN) -> str:
    everything = list(names)
    rest = len(everything) - shown
    return ", ".join(everything[:shown]) + (f" and {rest} more" if rest > 0 else "")


def _relative(path: Path, root: Path) -> Path:
    return path.relative_to(root) if path.is_relative_to(root) else path
