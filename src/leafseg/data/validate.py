"""What is wrong with a data set, all of it at once: ``leafseg data check``, and the first seconds of a training.

Every file is opened once, by the same code that a training opens it with; what can be noted of the pixels is noted on
the way. Nothing here raises for what the data hold: whatever is found is a ``Finding``.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from leafseg.data.dicom import dicom_group
from leafseg.data.duplicates import Pair, near_duplicates, thumbnail
from leafseg.data.geometry import Geometry, Reading
from leafseg.data.images import DICOM_SUFFIXES, image_suffix, is_volume, pixel_spacing, read_mask, read_volume
from leafseg.data.manifest import IGNORE, PARTS, Collected, LabelMap, Manifest, Sample, collect
from leafseg.errors import DataError

if TYPE_CHECKING:
    from leafseg.config import DataSettings

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")

_SHOWN = 3  # cases named in a sentence
_SPREAD_PIXELS = 16_384  # of an image, on a regular grid, that its mean and spread are taken from
_KEPT_PIXELS = 256  # of these, kept for the data set's histogram
_FEW_SAMPLES = 20
_RARE_CLASS = 0.005  # share of all labelled pixels
_RARE_IN_IMAGES = 0.05  # share of images
_STRAY_VALUE = 0.001  # share of all foreground pixels
_OUTLIER = 6.0  # robust standard deviations
_ENOUGH_FOR_OUTLIERS = 20  # images
_SAME_SPACING = 1e-3  # relative: headers hold single precision
_SAME_PLACE = 0.5  # of a voxel
_COMPARED_MASKS = 20  # duplicate images whose masks are read again and compared
_OUT_OF_RANGE = 1e-6


@dataclass(frozen=True)
class Item:
    """One case of a finding: the files it is about, and what is special about them."""

    files: tuple[str, ...]
    text: str = ""


@dataclass(frozen=True)
class Finding:
    """One kind of problem and all its cases.

    Attributes:
        severity: error: a training would stop or learn something wrong; warning: it can go on, and figures may mislead;
            note: good to know.
        id: stable name of the kind, such as ``missing-mask``.
        message: one sentence with the remedy.
        items: the cases; empty for what concerns the whole set.
    """

    severity: Severity
    id: str
    message: str
    items: tuple[Item, ...] = ()


@dataclass(frozen=True)
class ClassFigures:
    """How often a class occurs.

    Attributes:
        images: how many images hold it, by part.
        pixel_share: its share of all pixels that are labelled.
    """

    name: str
    images: Mapping[str, int]
    pixel_share: float


@dataclass(frozen=True)
class Fingerprint:
    """What the images are like, for comparing this set with another one.

    Attributes:
        kinds: how many files are of each kind, such as ``colour, 8 bits``; the most frequent first.
        sizes: how many files have each (width, height).
        spacings_mm: how many volumes have each spacing (x, y, z), rounded to a hundredth.
        pixel_edges, pixel_counts: histogram of pixel values of the most frequent kind; a sample of each file counts.
        mean, spread: of every file's pixels, of the most frequent kind.
    """

    kinds: Mapping[str, int]
    sizes: Mapping[tuple[int, int], int]
    spacings_mm: Mapping[tuple[float, ...], int]
    pixel_edges: tuple[float, ...]
    pixel_counts: tuple[int, ...]
    mean: tuple[float, ...]
    spread: tuple[float, ...]


@dataclass(frozen=True)
class DataCheck:
    """The outcome of a check.

    Attributes:
        data: what was checked.
        findings: errors first.
        images: image files that were opened, with their masks; a folder of DICOM slices is one.
        files: all files that were opened, masks included.
        seconds: it took so long.
        samples: of the images that can be used, in their parts.
        label_map: None if the mask values are in doubt.
        reading: how files were cut into samples.
        classes: background first; empty without a label map.
        manifest: what ``load_manifest`` would give; None if there are errors.
    """

    data: Path
    root: Path
    findings: tuple[Finding, ...]
    images: int
    files: int
    seconds: float
    samples: tuple[Sample, ...]
    label_map: LabelMap | None
    reading: Reading
    classes: tuple[ClassFigures, ...]
    fingerprint: Fingerprint
    manifest: Manifest | None

    @property
    def ok(self) -> bool:
        """Whether a training may go on."""
        return not any(finding.severity == "error" for finding in self.findings)

    def count(self, severity: Severity) -> int:
        """How many findings are of this severity."""
        return sum(finding.severity == severity for finding in self.findings)

    @property
    def foreground_classes(self) -> tuple[ClassFigures, ...]:
        """The classes without the background; overlapping labels have none."""
        return self.classes if self.label_map is not None and self.label_map.overlapping else self.classes[1:]

    @property
    def parts(self) -> dict[str, int]:
        """Images in each part."""
        counts = Counter(sample.part for sample in self.samples)
        return {part: counts[part] for part in PARTS}

    @property
    def groups(self) -> dict[str, int]:
        """Known groups in each part; frames of one file are one."""
        return {
            part: len({sample.group for sample in self.samples if sample.part == part and sample.group is not None})
            for part in PARTS
        }

    def summary(self) -> str:
        """One line: how many files, and how many findings of each severity."""
        found = ", ".join(f"{n} {name}{'s' if n != 1 else ''}" for name in SEVERITIES if (n := self.count(name)))
        masks = f" and {self.files - self.images} masks" if self.files > self.images else ""
        return f"data check: {self.images} images{masks} opened in {self.seconds:.1f} s; {found or 'nothing found'}"

    def as_json(self) -> dict[str, Any]:
        """The whole outcome as plain values; files are named relative to ``root``, groups not at all."""
        sizes = self.fingerprint.sizes
        return {
            "format": 1,
            "data": str(self.data),
            "ok": self.ok,
            "counts": {name: self.count(name) for name in SEVERITIES},
            "images": self.images,
            "files": self.files,
            "seconds": round(self.seconds, 3),
            "files_per_second": round(self.files / self.seconds, 1) if self.seconds else None,
            "split_sha256": self.manifest.split_sha256 if self.manifest else None,
            "parts": self.parts,
            "groups": self.groups,
            "classes": [
                {"name": figures.name, "images": dict(figures.images), "pixel_share": figures.pixel_share}
                for figures in self.classes
            ],
            "fingerprint": {
                "kinds": dict(self.fingerprint.kinds),
                "sizes": [{"width": w, "height": h, "files": n} for (w, h), n in sizes.items()],
                "spacings_mm": [{"mm": list(mm), "files": n} for mm, n in self.fingerprint.spacings_mm.items()],
                "pixels": {
                    "edges": list(self.fingerprint.pixel_edges),
                    "counts": list(self.fingerprint.pixel_counts),
                },
                "mean": _quantiles(self.fingerprint.mean),
                "spread": _quantiles(self.fingerprint.spread),
            },
            "findings": [
                {
                    "severity": finding.severity,
                    "id": finding.id,
                    "message": finding.message,
                    "items": [{"files": list(item.files), "text": item.text} for item in finding.items],
                }
                for finding in self.findings
            ],
        }


def check_data(
    data: Path,
    *,
    settings: DataSettings,
    split_file: Path | None = None,
    fold: int | None = None,
    require_masks: bool = True,
    needed: Collection[str] = ("train", "validation"),
    threads: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> DataCheck:
    """Open every file and say all that is wrong; nothing about the data raises.

    Args:
        data: as for ``load_manifest``.
        settings: how files are read and what mask values mean, as for the training.
        split_file, fold: a stored split instead of the default one.
        require_masks: False accepts images without a mask.
        needed: parts that must not be empty: without them a training does not start.
        threads: files opened at a time; decoders release the interpreter lock.
        progress: called with (files done, files in all).
    """
    started = time.monotonic()
    looks: dict[tuple[Path, ...], _FileLook] = {}

    def new_look(files: tuple[Path, ...]) -> _FileLook:
        return looks.setdefault(files, _FileLook(files))

    collected = collect(
        Path(data),
        settings=settings,
        split_file=split_file,
        fold=fold,
        require_masks=require_masks,
        threads=threads,
        new_look=new_look,
        progress=progress,
    )
    seen = {files[0]: look for files, look in looks.items() if files[0] not in collected.unusable}
    samples = _Samples(collected, seen)
    duplicates = [*_duplicate_findings(samples)]
    findings = [*_problem_findings(collected, known={"duplicate-across-parts"} & {f.id for f in duplicates})]
    findings += _geometry_findings(samples)
    findings += _pixel_findings(samples, settings)
    findings += _label_findings(samples)
    findings += _part_findings(samples, needed)
    findings += _patient_findings(samples)
    findings += duplicates
    findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    good = not any(finding.severity == "error" for finding in findings)
    return DataCheck(
        data=Path(data),
        root=collected.root,
        findings=tuple(findings),
        images=len(looks),
        files=sum(map(len, looks)),
        seconds=time.monotonic() - started,
        samples=collected.samples,
        label_map=collected.label_map,
        reading=Reading.of(settings.preprocessing),
        classes=samples.classes,
        fingerprint=_fingerprint(seen),
        manifest=collected.manifest if good else None,
    )


class _FileLook:
    """What is noted of one image file and its masks while they are opened; one thread fills it."""

    def __init__(self, files: tuple[Path, ...]) -> None:
        self.files = files
        self.kinds: set[str] = set()
        self.sizes: set[tuple[int, int]] = set()  # (width, height)
        self.means: list[float] = []
        self.spreads: list[float] = []
        self.lows: list[float] = []
        self.highs: list[float] = []
        self.constant: list[int | None] = []
        self.empty: list[int | None] = []  # frames without any finite pixel
        self.not_finite = 0  # pixels
        self.real = False
        self.thumbnail: NDArray[np.uint8] | None = None  # of the frame with the most contrast
        self.values: NDArray[np.float32] = np.zeros(0, np.float32)  # of that frame
        self._most_contrast = -1.0
        self.pixels_of: dict[tuple[Path, int | None], Mapping[int, int]] = {}
        self.geometries: dict[Path, Geometry] = {}
        self.patient: bytes | None = None  # hash of what a DICOM file states, for comparison alone
        self._placed: set[Path] = set()
        self._content = hashlib.sha256()

    @property
    def content(self) -> str:
        """Equal for equal pixels, whatever the files' format and compression."""
        return self._content.hexdigest()

    @property
    def mean(self) -> float:
        return float(np.mean(self.means)) if self.means else math.nan

    @property
    def spread(self) -> float:
        return float(np.sqrt(np.mean(np.square(self.spreads)) + np.var(self.means))) if self.means else math.nan

    def image(self, frame: int | None, pixels: NDArray[Any]) -> None:
        if self.files[0] not in self._placed:
            self.patient = _patient(self.files[0])
        self._note_geometry(self.files[0])
        self._content.update(f"{pixels.dtype} {pixels.shape}".encode())
        self._content.update(np.ascontiguousarray(pixels).data)
        kind = {"f": "real numbers", "b": "1 bit"}.get(pixels.dtype.kind, f"{8 * pixels.dtype.itemsize} bits")
        self.kinds.add(f"{'colour' if pixels.ndim == 3 else 'grey'}, {kind}")
        self.sizes.add((pixels.shape[1], pixels.shape[0]))
        step = max(1, math.isqrt(pixels.shape[0] * pixels.shape[1] // _SPREAD_PIXELS))
        sparse = pixels[::step, ::step].astype(np.float32).ravel()
        values = pixels
        if pixels.dtype.kind == "f":
            self.real = True
            finite = np.isfinite(pixels)
            self.not_finite += pixels.size - int(finite.sum())
            values, sparse = pixels[finite], sparse[np.isfinite(sparse)]
            if not values.size:
                self.empty.append(frame)
                return
        low, high = float(values.min()), float(values.max())
        self.lows.append(low)
        self.highs.append(high)
        if low == high:
            self.constant.append(frame)
        if not sparse.size:
            return
        self.means.append(float(sparse.mean(dtype=np.float64)))
        self.spreads.append(float(sparse.std(dtype=np.float64)))
        if self.spreads[-1] > self._most_contrast:
            self._most_contrast = self.spreads[-1]
            self.thumbnail = thumbnail(pixels)
            self.values = sparse[:: max(1, sparse.size // _KEPT_PIXELS)].copy()

    def mask(self, path: Path, frame: int | None, pixels_of: Mapping[int, int]) -> None:
        self._note_geometry(path)
        self.pixels_of[path, frame] = pixels_of

    def _note_geometry(self, path: Path) -> None:
        if path in self._placed:
            return
        self._placed.add(path)
        if is_volume(path):
            self.geometries[path] = read_volume(path)[1]  # was read just now, so that it comes from the cache
        else:
            pixel_spacing(path)  # raises for a spacing that an evaluation would stumble over


class _Samples:
    """The usable samples with what was noted of their files."""

    def __init__(self, collected: Collected, looks: Mapping[Path, _FileLook]) -> None:
        self.root = collected.root
        self.samples = collected.samples
        self.label_map = collected.label_map
        self.looks = looks
        self.parts_of: dict[Path, set[str]] = defaultdict(set)
        for sample in self.samples:
            self.parts_of[sample.image].add(sample.part)
        self.labelled: list[Sample] = []
        self.pixels: list[Mapping[int, int]] = []  # of every labelled sample, by class id
        self.areas: list[int] = []  # of every labelled sample, in pixels
        if self.label_map is not None:
            for sample in self.samples:
                if sample.has_labels:
                    pixels, area = self._pixels_of(sample, self.label_map)
                    self.labelled.append(sample)
                    self.pixels.append(pixels)
                    self.areas.append(area)
        self.classes = tuple(self._class_figures())

    def name(self, path: Path) -> str:
        """A file as findings name it."""
        return _name(path, self.root)

    @property
    def foreground_classes(self) -> tuple[ClassFigures, ...]:
        """The classes without the background; overlapping labels have none."""
        return self.classes if self.label_map is not None and self.label_map.overlapping else self.classes[1:]

    @cached_property
    def stray(self) -> dict[str, list[Item]]:
        """By class: the masks with a value that nobody named, in few masks and few pixels."""
        label_map = self.label_map
        if label_map is None or label_map.overlapping or label_map.threshold is not None or len(label_map.names) < 3:
            return {}
        everything = sum(map(self.foreground, self.pixels))
        stray: dict[str, list[Item]] = {}
        for value, identity in label_map.values:
            name = label_map.names[identity]
            if identity == 0 or name != f"class {value}":  # somebody expects it
                continue
            pairs = zip(self.labelled, self.pixels, strict=True)
            holders = [(sample, n) for sample, pixels in pairs if (n := pixels.get(identity, 0))]
            few = len(holders) <= max(1, _RARE_IN_IMAGES * len(self.labelled))
            if few and sum(n for _, n in holders) < _STRAY_VALUE * everything:
                stray[name] = [
                    Item((self.name(sample.image),), f"{value} in {n} pixel{'s' if n > 1 else ''}")
                    for sample, n in holders
                ]
        return stray

    def foreground(self, pixels_of: Mapping[int, int]) -> int:
        overlapping = self.label_map is not None and self.label_map.overlapping
        return sum(n for value, n in pixels_of.items() if value != IGNORE and (overlapping or value != 0))

    def _pixels_of(self, sample: Sample, label_map: LabelMap) -> tuple[Mapping[int, int], int]:
        """Pixels by class id (overlapping labels: by the label's place), and how many pixels are labelled."""
        look = self.looks[sample.image]
        counts: Counter[int] = Counter()
        masks = [path for _, path in sample.label_masks] if label_map.overlapping else [sample.mask]
        area = 0
        for place, path in enumerate(masks):
            raw = look.pixels_of[path, sample.mask_frame] if path is not None else {}
            identities = label_map.apply(np.array([*raw], dtype=np.int64))
            for identity, n in zip(identities.tolist(), raw.values(), strict=True):
                if not label_map.overlapping:
                    counts[identity] += n
                elif identity == 1:
                    counts[place] += n
            area = sum(raw.values())
        return counts, area - counts[IGNORE]

    def _class_figures(self) -> Iterator[ClassFigures]:
        if self.label_map is None or not self.labelled:
            return
        for identity, name in enumerate(self.label_map.names):
            images = Counter(
                sample.part for sample, pixels in zip(self.labelled, self.pixels, strict=True) if pixels.get(identity)
            )
            share = sum(pixels.get(identity, 0) for pixels in self.pixels) / max(1, sum(self.areas))
            yield ClassFigures(name, {part: images[part] for part in PARTS}, round(share, 6))


# --- what the listing and the opening found -------------------------------------------------------------------------


def _problem_findings(collected: Collected, *, known: set[str]) -> Iterator[Finding]:
    """What stands against the data already; ``known`` kinds were found in more detail."""
    for problem in collected.problems:
        if problem.kind in known:
            continue
        names: Sequence[Item] = [Item((name,)) for name in problem.names]
        if problem.kind in ("unreadable", "size-mismatch"):
            names = [
                Item((_name(path, collected.root),), text)
                for path, (kind, text) in collected.unusable.items()
                if kind == problem.kind
            ]
        message = problem.text
        if len(names) > 1 and problem.kind == "unreadable":
            texts = [Item((), item.text) for item in names]
            message = _sentence(texts, "file is unusable", "files are unusable", "replace or remove them")
        if problem.kind == "group-across-parts":  # groups may be patients' names: the files say which are meant
            names = [*_torn_groups(collected)]
            message = _sentence(
                names, "group lies in two parts", "groups lie in two parts", "give all of a group one part"
            )
        yield Finding("error", problem.kind, message, tuple(names))


def _torn_groups(collected: Collected) -> Iterator[Item]:
    members: dict[str, list[Sample]] = defaultdict(list)
    for sample in collected.samples:
        if sample.group is not None:
            members[sample.group].append(sample)
    for samples in members.values():
        if len({sample.part for sample in samples}) > 1:
            parts = {sample.part: sample for sample in samples}  # one file of each part shows it
            names = tuple(_name(sample.image, collected.root) for sample in parts.values())
            yield Item(names, f"{len(samples)} images in {' and '.join(parts)}")


def _geometry_findings(samples: _Samples) -> Iterator[Finding]:
    turned, moved = [], []
    for look in samples.looks.values():
        image, *masks = look.files
        grid = look.geometries.get(image)
        for mask in masks:
            other = look.geometries.get(mask)
            if grid is None or other is None or len(grid.size) != len(other.size):
                continue
            names = (samples.name(image), samples.name(mask))
            if not np.allclose(grid.direction, other.direction, atol=1e-3):
                turned.append(Item(names, "the axes point elsewhere"))
            elif not np.allclose(grid.spacing_mm, other.spacing_mm, rtol=_SAME_SPACING):
                moved.append(Item(names, f"spacing {_mm(grid.spacing_mm)} and {_mm(other.spacing_mm)} mm"))
            elif (distance := math.dist(grid.origin, other.origin)) > _SAME_PLACE * min(grid.spacing_mm):
                moved.append(Item(names, f"the first voxels are {distance:.2f} mm apart"))
    yield from _finding(
        "error", "geometry-mismatch", turned,
        "mask's axes differ from its image's", "masks' axes differ from their images'",
        "they would be turned differently; export them on the image's grid, or set --set "
        "data.preprocessing.orientation=stored if the voxels agree as they lie in the files",
    )  # fmt: skip
    yield from _finding(
        "warning", "geometry-mismatch", moved,
        "mask lies elsewhere than its image", "masks lie elsewhere than their images",
        "their voxels are used as if they agreed; see that they do, or export the masks on the image's grid",
    )  # fmt: skip


# --- pixels ---------------------------------------------------------------------------------------------------------


def _pixel_findings(samples: _Samples, settings: DataSettings) -> Iterator[Finding]:
    nothing, some, constant, outside = [], [], [], []
    for path, look in samples.looks.items():
        name = (samples.name(path),)
        if look.empty:
            nothing.append(Item(name, _frames(look.empty)))
        elif look.not_finite:
            some.append(Item(name, f"{look.not_finite} pixels"))
        if len(look.constant) == len(look.lows) and look.lows:
            constant.append(Item(name, f"every pixel is {look.lows[0]:g}"))
        if settings.preprocessing.intensity == "range" and look.real and look.lows:
            low, high = min(look.lows), max(look.highs)
            if low < -_OUT_OF_RANGE or high > 1 + _OUT_OF_RANGE:
                outside.append(Item(name, f"{low:g} to {high:g}"))
    yield from _finding(
        "error", "not-finite", nothing, "image has no finite pixel", "images have no finite pixel", "export them again"
    )
    yield from _finding(
        "warning", "not-finite", some, "image holds NaN or infinity", "images hold NaN or infinity",
        "such pixels become 0; export them again if they are no background",
    )  # fmt: skip
    yield from _finding(
        "error", "intensity-range", outside, "image's real numbers leave 0..1", "images' real numbers leave 0..1",
        "data.preprocessing.intensity is 'range'; use 'percentile'",
    )  # fmt: skip
    yield from _finding(
        "warning", "constant-image", constant, "image shows nothing", "images show nothing", "replace or remove them"
    )
    yield from _mixture_findings(samples)
    yield from _outlier_findings(samples)


def _mixture_findings(samples: _Samples) -> Iterator[Finding]:
    kinds: dict[str, list[str]] = defaultdict(list)
    sizes: dict[tuple[int, int], list[str]] = defaultdict(list)
    for path, look in samples.looks.items():
        for kind in look.kinds:
            kinds[kind].append(samples.name(path))
        for size in look.sizes:
            sizes[size].append(samples.name(path))
    if len(kinds) > 1:
        ranked = sorted(kinds.items(), key=lambda pair: -len(pair[1]))
        listed = ", ".join(f"{len(files)} {kind}" for kind, files in ranked)
        yield Finding(
            "warning",
            "mixed-kinds",
            f"the images are of {len(kinds)} kinds ({listed}); see that they show the same thing and that the kind "
            "does not give the answer away, or train on one kind",
            tuple(Item((file,), kind) for kind, files in ranked[1:] for file in files),
        )
    if len(sizes) > 1:
        areas = sorted(sizes, key=lambda size: size[0] * size[1])
        (w, h), (w1, h1) = areas[0], areas[-1]
        yield Finding(
            "note",
            "mixed-sizes",
            f"the images have {len(sizes)} sizes, from {w}x{h} to {w1}x{h1}; all are brought to the network's size, "
            "data.preprocessing.fit says how",
        )


def _outlier_findings(samples: _Samples) -> Iterator[Finding]:
    looks = {path: look for path, look in samples.looks.items() if look.means}
    kind = _usual_kind(looks.values())
    looks = {path: look for path, look in looks.items() if kind in look.kinds}
    if len(looks) < _ENOUGH_FOR_OUTLIERS:
        return
    means = np.array([look.mean for look in looks.values()])
    spreads = np.log(np.maximum([look.spread for look in looks.values()], 1e-6))
    items = []
    for path, look, at_mean, at_spread in zip(looks, looks.values(), _robust(means), _robust(spreads), strict=True):
        if look.lows == look.highs:
            continue  # said already
        if abs(at_mean) > _OUTLIER:
            items.append(Item((samples.name(path),), f"mean {look.mean:.4g}, others {np.median(means):.4g}"))
        elif abs(at_spread) > _OUTLIER:
            usual = float(np.exp(np.median(spreads)))
            items.append(Item((samples.name(path),), f"standard deviation {look.spread:.4g}, others {usual:.4g}"))
    yield from _finding(
        "note", "intensity-outlier", items, "image is unusually bright, dark or flat",
        "images are unusually bright, dark or flat",
        "look at them: another device, stain or exposure, or a mistake",
    )  # fmt: skip


def _robust(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distances from the median in standard deviations, estimated from the median absolute deviation."""
    deviation = values - np.median(values)
    scale = 1.4826 * np.median(np.abs(deviation))
    return deviation / scale if scale > 0 else np.zeros_like(values)


# --- labels and parts -----------------------------------------------------------------------------------------------


def _label_findings(samples: _Samples) -> Iterator[Finding]:
    if samples.label_map is None or not samples.labelled:
        return
    empty: list[Item] = []
    emptied: list[Item] = []
    unlabelled: list[Item] = []
    for sample, pixels, area in zip(samples.labelled, samples.pixels, samples.areas, strict=True):
        item = Item((samples.name(sample.image),), _frames([sample.frame]))
        if not area:
            unlabelled.append(item)
        elif not samples.foreground(pixels):
            raw = _raw_values(samples.looks[sample.image], sample) - {0, samples.label_map.ignore}
            (emptied if raw and samples.label_map.threshold is not None else empty).append(item)
    share = len(empty) / len(samples.labelled)
    yield from _finding(
        "warning" if share > 0.5 else "note", "empty-mask", empty, "mask is empty", "masks are empty",
        f"{share:.0%} of all; they count as images without the finding, and overlap cannot be measured on them",
    )  # fmt: skip
    yield from _finding(
        "warning", "emptied-mask", emptied, "mask has values, but none above the threshold",
        "masks have values, but none above the threshold",
        "lower data.mask_threshold, or write all masks with the same values",
    )  # fmt: skip
    yield from _finding(
        "warning", "unlabelled", unlabelled, "mask holds the ignore label alone", "masks hold the ignore label alone",
        "nothing is learnt from them; remove them",
    )  # fmt: skip
    total = len(samples.labelled)
    yield from _finding(
        "warning", "unexpected-label-value", [item for items in samples.stray.values() for item in items],
        "mask holds a value that hardly any other holds", "masks hold values that hardly any others hold",
        "each is learnt as a class of its own; correct the masks, or say what is meant with data.label_names, "
        "data.foreground_labels, data.mask_threshold or data.ignore_label",
    )  # fmt: skip
    for figures in samples.foreground_classes:
        present = sum(figures.images.values())
        if not present or figures.name in samples.stray:
            continue
        if figures.pixel_share < _RARE_CLASS or present < _RARE_IN_IMAGES * total:
            yield Finding(
                "note",
                "class-imbalance",
                f"class {figures.name!r} is rare: {figures.pixel_share:.2%} of all labelled pixels, {present} of "
                f"{total} images; its figures will be uncertain, more images with it help most",
            )


def _part_findings(samples: _Samples, needed: Collection[str]) -> Iterator[Finding]:
    if not samples.samples:
        return
    counts = Counter(sample.part for sample in samples.samples)
    said = {
        "train": "nothing can be learnt",
        "validation": "no checkpoint can be chosen",
        "test": "nothing is left to measure on",
    }
    folds = any(sample.fold is not None for sample in samples.samples)
    remedy = "choose one of the split's folds with --fold" if folds else "add images or give a split file"
    for part in PARTS:
        if not counts[part]:
            yield Finding(
                "error" if part in needed else "warning",
                "empty-part",
                f"no sample falls into the {part} part ({len(samples.samples)} in all), {said[part]}; {remedy}",
            )
    if 0 < counts["train"] < _FEW_SAMPLES:
        yield Finding(
            "warning",
            "few-samples",
            f"{counts['train']} images to train on; a hundred are a beginning, fine-tuning (--init-from) needs fewer",
        )
    for figures in samples.foreground_classes:
        absent = [part for part in PARTS if counts[part] and not figures.images[part]]
        if absent and figures.name not in samples.stray:
            yield Finding(
                "warning",
                "class-absent-in-part",
                f"class {figures.name!r} occurs in no image of the {' and '.join(absent)} part; nothing is learnt or "
                "measured of it there, make a stratified split",
            )


def _patient_findings(samples: _Samples) -> Iterator[Finding]:
    """One patient in two parts, by DICOM headers: nobody stated such a group, or stated others."""
    files: dict[bytes, list[Path]] = defaultdict(list)
    for path, look in samples.looks.items():
        if look.patient is not None:
            files[look.patient].append(path)
    if len(files) < 2:  # one id for all is what anonymisers write
        return
    torn = []
    for paths in files.values():
        parts = {part: path for path in paths for part in samples.parts_of[path]}  # one file of each part shows it
        if len(parts) > 1:
            ordered = [part for part in PARTS if part in parts]
            names = tuple(samples.name(parts[part]) for part in ordered)
            torn.append(Item(names, f"{len(paths)} files in {' and '.join(ordered)}"))
    yield from _finding(
        "warning", "patient-across-parts", torn, "patient has images in several parts",
        "patients have images in several parts",
        "by the PatientID of their DICOM files; what is measured on them is too good, split them with `leafseg data "
        "split --group-dicom patient`",
    )  # fmt: skip


# --- duplicates -----------------------------------------------------------------------------------------------------


def _duplicate_findings(samples: _Samples) -> Iterator[Finding]:
    alike: dict[str, list[Path]] = defaultdict(list)
    for path, look in samples.looks.items():
        if len(look.constant) < len(look.lows):  # constant images are all alike, and are found above
            alike[look.content].append(path)
    groups = [sorted(paths) for paths in alike.values() if len(paths) > 1]
    torn: list[Item] = []
    same: list[Item] = []
    for number, paths in enumerate(groups):
        masks = _mask_agreement(samples, paths) if number < _COMPARED_MASKS else ""
        (torn if _parts_of(samples, paths) > 1 else same).append(Item(tuple(map(samples.name, paths)), masks))
    yield from _finding(
        "error", "duplicate-across-parts", torn, "image lies in two parts under two names",
        "images lie in two parts under two names", "give equal images one part, or keep one of them",
    )  # fmt: skip
    yield from _finding(
        "warning", "duplicate", same, "image is there twice", "images are there twice or more often",
        "keep one, with the better mask",
    )  # fmt: skip
    yield from _near_duplicate_findings(samples, [paths[0] for paths in alike.values()])


def _near_duplicate_findings(samples: _Samples, paths: Sequence[Path]) -> Iterator[Finding]:
    thumbnails = {path: picture for path in paths if (picture := samples.looks[path].thumbnail) is not None}
    if len(thumbnails) < 2:
        return
    pairs, radius = near_duplicates(np.stack([*thumbnails.values()]))
    names = [*thumbnails]
    torn: list[Item] = []
    same: list[Item] = []
    for group in _connected(pairs):
        files = sorted({names[place] for pair in group for place in (pair.first, pair.second)})
        closest = max(group, key=lambda pair: pair.similarity)
        text = f"similarity {closest.similarity:.2f}" + (f", {closest.turn}" if closest.turn else "")
        item = Item(tuple(map(samples.name, files)), text)
        (torn if _parts_of(samples, files) > 1 else same).append(item)
    remedy = "probably one patient or one exam; give them one group in a CSV manifest, so that they stay in one part"
    yield from _finding(
        "warning", "near-duplicate-across-parts", torn, "group of images looks alike and lies in several parts",
        "groups of images look alike and lie in several parts", remedy,
    )  # fmt: skip
    yield from _finding(
        "note", "near-duplicate", same, "group of images looks alike", "groups of images look alike", remedy
    )
    if radius < 10:
        yield Finding(
            "note",
            "near-duplicate-search",
            f"so many images look alike at a glance that only those within a hash distance of {radius} of 64 were "
            "compared; shifted copies may be missing from the list, check the set in portions",
        )


def _connected(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """Pairs in groups that share pictures; the group with the closest pair first."""
    root: dict[int, int] = {}

    def find(place: int) -> int:
        while root.setdefault(place, place) != place:
            root[place] = root[root[place]]
            place = root[place]
        return place

    for pair in pairs:
        root[find(pair.first)] = find(pair.second)
    groups: dict[int, list[Pair]] = defaultdict(list)
    for pair in pairs:
        groups[find(pair.first)].append(pair)
    return list(groups.values())


def _parts_of(samples: _Samples, paths: Iterable[Path]) -> int:
    return len(set().union(*(samples.parts_of[path] for path in paths)))


def _mask_agreement(samples: _Samples, paths: Sequence[Path]) -> str:
    """Whether images that are equal have equal masks, in words; compares the first two."""
    one, two = (samples.looks[path].files[1:] for path in paths[:2])
    if not one or len(one) != len(two):
        return ""
    shares = []
    for first, second in zip(one, two, strict=True):
        try:
            raw = [read_mask(path) for path in (first, second)]
        except DataError:
            return ""  # a volume, of which one slice cannot speak for all
        if raw[0].shape != raw[1].shape:
            return "their masks differ in size"
        either = int(((raw[0] != 0) | (raw[1] != 0)).sum())
        shares.append(1.0 if not either else int(((raw[0] == raw[1]) & (raw[0] != 0)).sum()) / either)
    if min(shares) == 1.0:
        return "their masks are equal"
    return f"their masks differ, IoU {min(shares):.2f}"


# --- small things ---------------------------------------------------------------------------------------------------


def _fingerprint(looks: Mapping[Path, _FileLook]) -> Fingerprint:
    kind = _usual_kind(looks.values())
    usual = [look for look in looks.values() if kind in look.kinds and look.means]
    values = np.concatenate([look.values for look in usual]) if usual else np.zeros(0, np.float32)
    counts, edges = np.histogram(values, bins=32) if values.size else (np.zeros(0, int), np.zeros(0))
    spacings = Counter(
        tuple(round(side, 2) for side in grid.spacing_mm)
        for path, look in looks.items()
        if (grid := look.geometries.get(path))
    )
    return Fingerprint(
        kinds=dict(Counter(kind for look in looks.values() for kind in sorted(look.kinds)).most_common()),
        sizes=dict(Counter(size for look in looks.values() for size in sorted(look.sizes)).most_common()),
        spacings_mm=dict(spacings.most_common()),
        pixel_edges=tuple(round(float(edge), 6) for edge in edges),
        pixel_counts=tuple(int(n) for n in counts),
        mean=tuple(look.mean for look in usual),
        spread=tuple(look.spread for look in usual),
    )


def _usual_kind(looks: Iterable[_FileLook]) -> str:
    counts = Counter(kind for look in looks for kind in sorted(look.kinds))
    return counts.most_common(1)[0][0] if counts else ""


def _finding(
    severity: Severity, identity: str, items: Sequence[Item], singular: str, plural: str, remedy: str
) -> Iterator[Finding]:
    """Nothing without cases, else one finding about all of them."""
    if items:
        yield Finding(severity, identity, _sentence(items, singular, plural, remedy), tuple(items))


def _sentence(items: Sequence[Item], singular: str, plural: str, remedy: str) -> str:
    shown = "; ".join(_case(item) for item in items[:_SHOWN])
    rest = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return f"{len(items)} {singular if len(items) == 1 else plural} ({shown}{rest}), {remedy}"


def _case(item: Item) -> str:
    names = " = ".join(item.files[:2]) + (f" and {len(item.files) - 2} more" if len(item.files) > 2 else "")
    return ": ".join(part for part in (names, item.text) if part)


def _raw_values(look: _FileLook, sample: Sample) -> set[int]:
    return {
        value
        for (_, frame), raw in look.pixels_of.items()
        if frame == sample.mask_frame
        for value, n in raw.items()
        if n
    }


def _patient(path: Path) -> bytes | None:
    """Hash of the patient's id in a DICOM file or folder; None without one."""
    if image_suffix(path) not in DICOM_SUFFIXES:
        return None
    try:
        stated = dicom_group(path)
    except DataError:  # the pixels could be read, and a strange header is no reason to refuse them
        return None
    return hashlib.sha256(stated.encode()).digest() if stated else None


def _frames(frames: Sequence[int | None]) -> str:
    listed = [str(frame) for frame in frames if frame is not None]
    if not listed:
        return ""
    rest = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return f"frame {', '.join(listed[:_SHOWN])}{rest}"


def _quantiles(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    points = (0, 5, 25, 50, 75, 95, 100)
    return {
        f"p{point}": round(float(value), 6) for point, value in zip(points, np.percentile(values, points), strict=True)
    }


def _name(path: Path, root: Path) -> str:
    return str(path.relative_to(root) if path.is_relative_to(root) else path)


def _mm(spacing: Sequence[float]) -> str:
    return " x ".join(f"{side:g}" for side in spacing)
