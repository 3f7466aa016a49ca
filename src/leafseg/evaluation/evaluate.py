"""Any segmenter against any manifest, at the images' original resolution.

Rules for empty masks, per image and class:

- The truth is empty: nothing can be measured but false positives. Every other metric is None, and means are taken over
  the other images; beside them stand the share of empty images with any predicted pixel (false-positive rate) and the
  predicted share of those images' area (false-positive area).
- Only the prediction is empty (the image is missed): Dice, IoU, recall and surface Dice are 0. Precision and both
  distances cannot be measured and are None; the missed images are counted, since a mean distance hides them.

Every figure states the number of images that it is a mean of. Pixels that nobody labelled (``IGNORE``) are taken out of
truth and prediction before anything is measured.
"""

from __future__ import annotations

import csv
import hashlib
import io
import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from leafseg.data.images import Reading, count_frames, is_volume, pixel_spacing, read_oriented
from leafseg.data.manifest import IGNORE, LabelMap, Manifest, Sample, read_labels
from leafseg.data.transforms import Preprocessor
from leafseg.errors import DataError
from leafseg.evaluation.calibration import Reliability, pooled, reliability
from leafseg.evaluation.intervals import bootstrap_mean
from leafseg.evaluation.metrics import dice_and_iou, precision_and_recall, surface_metrics
from leafseg.files import write_json_atomic, write_text_atomic
from leafseg.pipeline import LeafPipeline
from leafseg.predict import Segmentation, Segmenter
from leafseg.progress import Bar, progress_bar

log = logging.getLogger(__name__)

TOLERANCE = 2.0
# Figures of an image and class that are averaged, by field name, in words; the distances have the evaluation's unit.
METRICS: Mapping[str, str] = {
    "dice": "Dice",
    "iou": "IoU",
    "precision": "precision",
    "recall": "recall",
    "hd95": "HD95",
    "assd": "ASSD",
    "nsd": "surface Dice",
}
DISTANCES = ("hd95", "assd")
VOLUME_METRICS = ("dice", "hd95", "assd", "nsd")

_BATCH = 8
_LOW_DICE = 0.5
_FAR_BELOW = 0.1  # under the median, for a Dice that stands out but is above _LOW_DICE
_LISTED_FAILURES = 20
MISSED, FALSE_POSITIVE, LOW_DICE, FAR = "missed", "false positive", "low Dice", "outline far off"


@dataclass(frozen=True)
class EvaluationRow:
    """One image and class; a figure is None where it cannot be measured (see the module's rules) or was not.

    Attributes:
        name, sha256: of the sample.
        empty: whether the truth is.
        truth_pixels, predicted_pixels, common_pixels: areas, without ignored pixels.
        peak: the highest probability of the class in the image, in 0..1.
        pixels: of the image, without ignored ones.
        group: names the sample's group by a short hash of the group's contents; empty if it has none.
        volume: the file whose frame this is; empty for a flat image.
        precision, recall, nsd: in 0..1.
        hd95, assd: in ``unit``.
        unit: ``mm``, or ``px`` where the pixels' size is unknown; empty if no distances were measured.
    """

    name: str
    label: str
    sha256: str
    empty: bool
    dice: float | None
    iou: float | None
    truth_pixels: int
    predicted_pixels: int
    common_pixels: int = 0
    pixels: int = 0
    group: str = ""
    volume: str = ""
    precision: float | None = None
    recall: float | None = None
    hd95: float | None = None
    assd: float | None = None
    nsd: float | None = None
    unit: str = ""
    peak: float | None = None

    @property
    def missed(self) -> bool:
        """Whether there was something to find, and nothing was found."""
        return not self.empty and self.predicted_pixels == 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class VolumeRow:
    """One file of several frames, and one class: all its evaluated frames together.

    Attributes:
        dice: as for an image.
        hd95, assd, nsd: in 3-D and mm, measured where every slice of a volume was evaluated and its voxels' size is
            known.
    """

    volume: str
    label: str
    group: str
    frames: int
    empty: bool
    dice: float | None
    truth_pixels: int
    predicted_pixels: int
    hd95: float | None = None
    assd: float | None = None
    nsd: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """Rows of all images, and the figures that follow from them.

    Attributes:
        calibration: by class, of all pixels of all images.
        volumes: files of several frames.
    """

    rows: tuple[EvaluationRow, ...]
    summary: dict[str, Any]
    calibration: Mapping[str, Reliability] = field(default_factory=dict)
    volumes: tuple[VolumeRow, ...] = ()

    def save(self, folder: Path) -> None:
        """Write ``per_image.csv``, ``per_volume.csv`` if there are volumes, and ``summary.json``.

        Raises:
            DataError: if the folder cannot be written.
        """
        write_text_atomic(folder / "per_image.csv", _table(self.rows, EvaluationRow))
        if self.volumes:
            write_text_atomic(folder / "per_volume.csv", _table(self.volumes, VolumeRow))
        write_json_atomic(folder / "summary.json", self.summary)


def _table(rows: Sequence[Any], kind: type) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [column.name for column in fields(kind)]
    writer.writerow(names)
    for row in rows:
        values = (getattr(row, name) for name in names)
        writer.writerow(["" if v is None else f"{v:.6f}" if isinstance(v, float) else v for v in values])
    return text.getvalue()


def evaluate(
    segmenter: Segmenter,
    manifest: Manifest,
    *,
    seed: int = 0,
    grid: Preprocessor | None = None,
    tolerance: float = TOLERANCE,
) -> Evaluation:
    """Evaluate every sample of a manifest (normally one part).

    Args:
        segmenter: the model.
        manifest: listed as the model reads images, see ``Manifest.reading``.
        seed: of the bootstrap.
        grid: as in :func:`evaluate_samples`.
        tolerance: of the normalised surface Dice: in mm where every image states its pixels' size, else in pixels.

    Raises:
        DataError: if there are no samples, or the model's classes are not the data's.
    """
    if not len(manifest):
        raise DataError(f"{manifest.root}: the part has no samples; choose another --split or add images")
    check_classes(segmenter, manifest)
    reading = _shared_reading(segmenter, manifest)
    spacings = None if grid is not None else _spacings(manifest.samples, reading)
    stacks = _Stacks(manifest.samples, reading, tolerance=tolerance) if spacings is not None else None
    rows: list[EvaluationRow] = []
    binned: dict[str, list[Reliability]] = {}
    with progress_bar("evaluation", total=len(manifest)) as bar:
        for compared in _compare(segmenter, manifest.samples, manifest.label_map, bar=bar, grid=grid):
            spacing = spacings[compared.sample.image] if spacings is not None else None
            rows += _rows(compared, unit="px" if spacing is None else "mm", spacing=spacing, tolerance=tolerance)
            for label, part in compared.calibration().items():
                binned.setdefault(label, []).append(part)
            if stacks is not None:
                stacks.add(compared)
    calibration = {label: pooled(parts) for label, parts in binned.items()}
    volumes = volume_rows(rows, stacks.measured if stacks is not None else None)
    summary = summarise(rows, seed=seed, tolerance=tolerance, volumes=volumes)
    for label, found in calibration.items():
        summary["classes"][label]["calibration"] = found.as_dict()
    return Evaluation(tuple(rows), {**summary, "split_sha256": manifest.split_sha256}, calibration, tuple(volumes))


def evaluate_samples(
    segmenter: Segmenter,
    samples: Sequence[Sample],
    label_map: LabelMap,
    *,
    bar: Bar | None = None,
    grid: Preprocessor | None = None,
) -> Iterator[EvaluationRow]:
    """Rows of samples, one an image and foreground class, without distances: what a validation needs, and fast.

    Args:
        segmenter: the model.
        samples: images with masks.
        label_map: mask values to class ids.
        bar: advanced after each sample.
        grid: measure on the network's grid instead of the image's own: image and truth (nearest) are resized by this
            preprocessor first. The segmenter must take floats in 0..1 as they are (:func:`input_grid_pipeline`).
    """
    for compared in _compare(segmenter, samples, label_map, bar=bar, grid=grid):
        yield from _rows(compared)


def input_grid_pipeline(pipeline: LeafPipeline) -> LeafPipeline:
    """The pipeline for images that were brought to the network's grid before: floats in 0..1 are taken as they are.

    Its modules are the given pipeline's own.
    """
    config = {k: v for k, v in pipeline.config.items() if k not in pipeline.components and not k.startswith("_")}
    config["preprocessing"] = {**config["preprocessing"], "intensity": "range"}
    return LeafPipeline(**pipeline.components, **config)


# --- comparing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Compared:
    """One image's masks; ``[C, H, W]`` each, foreground classes alone, ignored pixels cleared."""

    sample: Sample
    group: str
    labels: Sequence[str]
    truth: Tensor
    found: Tensor
    probability: Tensor
    kept: Tensor  # bool [H, W]: not ignored

    @property
    def volume(self) -> str:
        """What the names of a file's frames begin with; empty for a flat image."""
        sample = self.sample
        return "" if sample.frame is None else sample.name.removesuffix(f"_{sample.frame:04d}")

    def calibration(self) -> dict[str, Reliability]:
        """Of each class, over the pixels that are not ignored."""
        if not self.kept.any():
            return {}
        return {
            label: reliability(probability[self.kept], truth[self.kept])
            for label, probability, truth in zip(self.labels, self.probability, self.truth, strict=True)
        }


def _compare(
    segmenter: Segmenter,
    samples: Sequence[Sample],
    label_map: LabelMap,
    *,
    bar: Bar | None,
    grid: Preprocessor | None,
) -> Iterator[_Compared]:
    reading = Reading.of(segmenter.preprocessing)
    groups = _group_names(samples)
    at_once = 1 if segmenter.preprocessing.fit == "tile" else _BATCH  # tiled images may be large
    for start in range(0, len(samples), at_once):
        chunk = samples[start : start + at_once]
        unlabelled = next((sample for sample in chunk if not sample.has_labels), None)
        if unlabelled is not None:
            raise DataError(f"{unlabelled.image}: no mask; evaluation needs one for every image")
        if grid is None:
            images = [segmenter.read(sample.image, sample.frame) for sample in chunk]
        else:
            images = [grid.apply(grid.read(sample.image, sample.frame))[0] for sample in chunk]
        for sample, result in zip(chunk, _segment(segmenter, chunk, images), strict=True):
            truth = read_labels(sample, label_map, reading=reading)
            if grid is not None:
                size = (truth.shape[-2], truth.shape[-1])
                truth = grid.apply_labels(truth, grid.placement(size)).numpy()
            if truth.shape[-2:] != result.mask.shape[-2:]:
                raise DataError(
                    f"{sample.mask or sample.image}: mask is {truth.shape[-1]}x{truth.shape[-2]}, image is "
                    f"{result.mask.shape[-1]}x{result.mask.shape[-2]}; both must share one grid"
                )
            yield _masks(sample, groups.get(sample.group or "", ""), truth, result, segmenter)
            if bar is not None:
                bar.advance()


def _group_names(samples: Sequence[Sample]) -> dict[str, str]:
    """A name for each group that follows from its images' contents.

    A group may be a patient's number, which a plain hash would not hide: trying all numbers would find it.
    """
    contents: dict[str, list[str]] = {}
    for sample in samples:
        if sample.group:
            contents.setdefault(sample.group, []).append(sample.sha256)
    return {
        group: hashlib.sha256("".join(sorted(hashes)).encode()).hexdigest()[:12] for group, hashes in contents.items()
    }


def _masks(sample: Sample, group: str, truth: NDArray[Any], result: Segmentation, segmenter: Segmenter) -> _Compared:
    """Foreground classes as planes: of exclusive classes all but the background, of overlapping labels all."""
    labels = segmenter.label_names if segmenter.overlapping else segmenter.label_names[1:]
    if truth.ndim == 3:
        kept = np.ones(truth.shape[1:], bool)
        wanted = truth.astype(bool)
    else:
        kept = truth != IGNORE
        wanted = truth[None] == np.arange(1, len(labels) + 1)[:, None, None]  # [C, H, W]
    found, probability = result.mask, result.probability
    if len(probability) > len(labels):  # several exclusive classes have a plane for the background too
        found, probability = found[1:], probability[1:]
    return _Compared(
        sample,
        group,
        labels,
        torch.from_numpy(wanted),
        torch.from_numpy(found & kept),
        torch.from_numpy(probability),
        torch.from_numpy(kept),
    )


def _segment(
    segmenter: Segmenter, samples: Sequence[Sample], images: Sequence[NDArray[Any] | Tensor]
) -> list[Segmentation]:
    try:
        return segmenter.segment(images)
    except DataError:
        for sample, image in zip(samples, images, strict=True):  # which one was it?
            try:
                segmenter.segment([image])
            except DataError as error:
                raise DataError(f"{sample.image}: {error}") from error
        raise


def _rows(
    compared: _Compared,
    *,
    unit: str = "",
    spacing: tuple[float, float] | None = None,
    tolerance: float = TOLERANCE,
) -> Iterator[EvaluationRow]:
    """One row a class, none where every pixel is ignored; with a unit, distances are measured too."""
    if not compared.kept.any():
        return
    sample, truth, found = compared.sample, compared.truth[None], compared.found[None]  # [1, C, H, W]
    figures = dict(zip(("dice", "iou"), dice_and_iou(found, truth), strict=True))
    figures |= zip(("precision", "recall"), precision_and_recall(found, truth), strict=True)
    if unit:
        surface = surface_metrics(found, truth, spacing=spacing, tolerance=tolerance)
        figures |= {"hd95": surface.hd95, "assd": surface.assd, "nsd": surface.nsd}
    common = truth & found
    for index, label in enumerate(compared.labels):
        pixels = int(truth[0, index].sum())
        # MONAI calls a precision of a false positive 0; where there is nothing to find, only the rate says something.
        values = {name: float(v) for name, of in figures.items() if pixels and not (v := of[0, index]).isnan()}
        yield EvaluationRow(
            name=sample.name,
            label=label,
            sha256=sample.sha256,
            empty=pixels == 0,
            dice=values.get("dice"),
            iou=values.get("iou"),
            truth_pixels=pixels,
            predicted_pixels=int(found[0, index].sum()),
            common_pixels=int(common[0, index].sum()),
            pixels=int(compared.kept.sum()),
            group=compared.group,
            volume=compared.volume,
            precision=values.get("precision"),
            recall=values.get("recall"),
            hd95=values.get("hd95"),
            assd=values.get("assd"),
            nsd=values.get("nsd"),
            unit=unit,
            peak=float(compared.probability[index].max()),
        )


def check_classes(segmenter: Segmenter, manifest: Manifest) -> None:
    """
    Raises:
        DataError: if the model's classes are not the data's.
    """
    names, known = manifest.label_map.names, segmenter.label_names
    if segmenter.overlapping != manifest.label_map.overlapping:
        kinds = ("exclude each other", "may overlap")
        raise DataError(
            f"{manifest.root}: the masks' classes {kinds[manifest.label_map.overlapping]}, the model's "
            f"{kinds[segmenter.overlapping]}; evaluate on data of the model's kind"
        )
    if len(known) != len(names):
        raise DataError(
            f"{manifest.root}: the masks hold {len(names)} classes, the model knows "
            f"{len(known)} ({', '.join(known)}); evaluate on data of the same classes, "
            "or choose the foreground with --set data.foreground_labels=[1]"
        )
    # Classes are matched by place, so that unnamed data can be evaluated; names that moved would swap the figures.
    moved = [name for place, name in enumerate(names) if name in known and known[place] != name]
    if moved:
        raise DataError(
            f"{manifest.root}: the masks' classes are {', '.join(names)}, the model's are {', '.join(known)}; "
            f"{moved[0]} has another place, give the data's classes in the model's order"
        )


def _shared_reading(segmenter: Segmenter, manifest: Manifest) -> Reading:
    """The model's reading; where volumes are cut into samples, the manifest must have been listed with it."""
    reading = Reading.of(segmenter.preprocessing)
    listed = manifest.reading
    if (listed.orientation, listed.slice_axis) != (reading.orientation, reading.slice_axis) and any(
        sample.frame is not None for sample in manifest.samples
    ):
        raise DataError(
            f"{manifest.root}: its volumes were cut across {listed.slice_axis} of {listed.orientation}, the model "
            f"takes {reading.slice_axis} of {reading.orientation}; list the data with the model's preprocessing"
        )
    return reading


def _spacings(samples: Sequence[Sample], reading: Reading) -> dict[Path, tuple[float, float]] | None:
    """Pixel sizes of all files in mm; None (pixels for all) if any file states none, since no mean may mix units."""
    found = {path: pixel_spacing(path, reading=reading) for path in dict.fromkeys(s.image for s in samples)}
    known = {path: spacing for path, spacing in found.items() if spacing is not None}
    if len(known) == len(found):
        return known
    if known:
        log.warning(
            "%d of %d image files do not state the size of their pixels: all distances are in pixels",
            len(found) - len(known), len(found),
        )  # fmt: skip
    return None


class _Stacks:
    """Puts the slices of each volume together again, and measures distances in 3-D once it is whole.

    The masks of unfinished volumes are kept: normally one, since samples are sorted by name.
    """

    def __init__(self, samples: Sequence[Sample], reading: Reading, *, tolerance: float) -> None:
        self._reading, self._tolerance = reading, tolerance
        self._missing: Counter[Path] = Counter()
        slices: dict[Path, set[int]] = {}
        for sample in samples:
            if sample.frame is not None:
                slices.setdefault(sample.image, set()).add(sample.frame)
        for path, frames in slices.items():
            # A part of a volume has outlines where it was cut; those of a clip in time are none.
            if is_volume(path) and frames == set(range(count_frames(path, reading=reading) or 0)):
                self._missing[path] = len(frames)
        self._slices: dict[Path, list[_Compared]] = {}
        self.measured: dict[tuple[str, str], dict[str, float]] = {}

    def add(self, compared: _Compared) -> None:
        path = compared.sample.image
        if path not in self._missing:
            return
        # The probabilities are not needed again, and are most of the memory; a slice of them would keep them all.
        self._slices.setdefault(path, []).append(replace(compared, probability=torch.empty(0)))
        self._missing[path] -= 1
        if self._missing[path] == 0:
            self._measure(path, self._slices.pop(path))

    def _measure(self, path: Path, slices: list[_Compared]) -> None:
        volume = read_oriented(path, self._reading)
        if not volume.in_space:
            return
        spacing = tuple(float(length) for length in np.linalg.norm(volume.affine[:3, [2, 1, 0]], axis=0))
        slices.sort(key=lambda compared: compared.sample.frame or 0)
        found, truth = (torch.stack([getattr(c, name) for c in slices], 1)[None] for name in ("found", "truth"))
        surface = surface_metrics(found, truth, spacing=spacing, tolerance=self._tolerance)  # of [1, C, D, H, W]
        for index, label in enumerate(slices[0].labels):
            figures = ((name, float(getattr(surface, name)[0, index])) for name in ("hd95", "assd", "nsd"))
            self.measured[slices[0].volume, label] = {name: v for name, v in figures if not math.isnan(v)}


# --- summary ----------------------------------------------------------------------------------------------------------


def summarise(
    rows: Sequence[EvaluationRow],
    *,
    seed: int = 0,
    tolerance: float = TOLERANCE,
    volumes: Sequence[VolumeRow] = (),
) -> dict[str, Any]:
    """Means with bootstrap intervals per class, false positives where there are empty masks, and the failures."""
    grouped = any(row.group for row in rows)

    def interval(mine: Sequence[EvaluationRow | VolumeRow], values: Sequence[float | None]) -> dict[str, Any] | None:
        chosen = [(row, value) for row, value in zip(mine, values, strict=True) if value is not None]
        # An image without a group is one of its own.
        groups = [row.group or row for row, _ in chosen] if grouped else None
        found = bootstrap_mean([value for _, value in chosen], groups=groups, seed=seed)
        return asdict(found) if found else None

    classes: dict[str, Any] = {}
    for label in dict.fromkeys(row.label for row in rows):
        mine = [row for row in rows if row.label == label]
        empty = [row for row in mine if row.empty]
        figures: dict[str, Any] = {
            "images": len(mine),
            "empty": len(empty),
            "missed": sum(row.missed for row in mine),
            **{metric: interval(mine, [getattr(row, metric) for row in mine]) for metric in METRICS},
            "false_positive_rate": interval(empty, [float(row.predicted_pixels > 0) for row in empty]),
            "false_positive_area": interval(empty, [row.predicted_pixels / max(row.pixels, 1) for row in empty]),
        }
        whole = [row for row in volumes if row.label == label]
        if whole:
            figures["volumes"] = len(whole)
            figures |= {
                f"volume_{name}": interval(whole, [getattr(row, name) for row in whole]) for name in VOLUME_METRICS
            }
        classes[label] = figures
    unit = next((row.unit for row in rows), "")
    groups = len({row.group or row.name for row in rows}) if grouped else None
    if groups == 1:
        method = "no interval: all images are of one group, and nothing says how groups differ"
    else:
        over = "images" if groups is None else f"{groups} groups, each with all its images"
        method = f"95 % percentile bootstrap over {over}, 9999 resamples"
    return {
        "classes": classes,
        "distance_unit": unit or None,
        "surface_dice_tolerance": tolerance if unit else None,
        "groups": groups,
        "interval": method,
        "bootstrap_seed": seed,
        "failures": failures(rows, tolerance=tolerance),
    }


def volume_rows(
    rows: Sequence[EvaluationRow], distances: Mapping[tuple[str, str], Mapping[str, float]] | None = None
) -> list[VolumeRow]:
    """Files of several frames, with the Dice of all their evaluated frames as one mask.

    Args:
        rows: of single frames; those of flat images are passed over.
        distances: by (volume, label): what was measured in 3-D.
    """
    found: dict[tuple[str, str], list[EvaluationRow]] = {}
    for row in rows:
        if row.volume:
            found.setdefault((row.volume, row.label), []).append(row)
    result = []
    for (volume, label), mine in found.items():
        truth = sum(row.truth_pixels for row in mine)
        predicted = sum(row.predicted_pixels for row in mine)
        dice = 2 * sum(row.common_pixels for row in mine) / (truth + predicted) if truth else None
        measured = (distances or {}).get((volume, label), {})
        result.append(
            VolumeRow(volume, label, mine[0].group, len(mine), truth == 0, dice, truth, predicted, **measured)
        )
    return result


def failures(rows: Sequence[EvaluationRow], *, tolerance: float = TOLERANCE) -> dict[str, Any]:
    """The images that went wrong, per class: how many for each reason, and the worst of them.

    Reasons: missed; false positive (the truth is empty, the prediction is not); low Dice (below 0.5, or an outlier:
    below the first quartile by 1.5 interquartile ranges, and 0.1 below the median); outline far off (HD95 above the
    third quartile by 1.5 interquartile ranges, and above the tolerance).
    """
    result: dict[str, Any] = {}
    for label in dict.fromkeys(row.label for row in rows):
        mine = [row for row in rows if row.label == label]
        low = _low_dice([row.dice for row in mine if row.dice is not None])
        far = max(_fence([row.hd95 for row in mine if row.hd95 is not None], +1), tolerance)
        listed = []
        for row in mine:
            reasons = [
                reason
                for reason, holds in (
                    (MISSED, row.missed),
                    (FALSE_POSITIVE, row.empty and row.predicted_pixels > 0),
                    (LOW_DICE, not row.missed and row.dice is not None and row.dice < low),
                    (FAR, row.hd95 is not None and row.hd95 > far),
                )
                if holds
            ]
            if reasons:
                listed.append((row, reasons))
        order = (MISSED, FALSE_POSITIVE, LOW_DICE, FAR)
        # Within missed the largest first, within false positives too, then by Dice.
        listed.sort(
            key=lambda item: (
                order.index(item[1][0]),
                -item[0].truth_pixels if item[0].missed else -item[0].predicted_pixels if item[0].empty else 0,
                item[0].dice or 0.0,
                item[0].name,
            )
        )
        result[label] = {
            "total": len(listed),
            "reasons": {reason: count for reason in order if (count := sum(reason in r for _, r in listed))},
            "low_dice_below": low,
            "worst": [
                {
                    "name": row.name,
                    "reasons": reasons,
                    **{name: getattr(row, name) for name in ("dice", "hd95", "truth_pixels", "predicted_pixels")},
                }
                for row, reasons in listed[:_LISTED_FAILURES]
            ],
        }
    return result


def _low_dice(dice: Sequence[float]) -> float:
    if not dice:
        return _LOW_DICE
    return max(_LOW_DICE, min(_fence(dice, -1), float(np.median(dice)) - _FAR_BELOW))


def _fence(values: Sequence[float], side: int) -> float:
    """Tukey's fence: 1.5 interquartile ranges below the first quartile (side -1) or above the third (+1)."""
    if not values:
        return 0.0
    first, third = np.percentile(values, (25, 75))
    return float((third if side > 0 else first) + side * 1.5 * (third - first))


def selection_score(rows: Sequence[Mapping[str, Any]]) -> float:
    """The figure that chooses a checkpoint, in 0..1: mean Dice, where an empty truth counts 1 if nothing was predicted.

    Unlike the reported Dice it includes empty images: a model must not be chosen for finding something everywhere.
    """
    values = [float(row["predicted_pixels"] == 0) if row["empty"] else float(row["dice"]) for row in rows]
    return float(np.mean(values)) if values else 0.0
