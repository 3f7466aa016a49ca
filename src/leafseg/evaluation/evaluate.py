"""Any segmenter against any manifest, at the images' original resolution.

Rules for empty masks: where the truth is empty no overlap can be measured, so that Dice and IoU are means over the
other images, and the share of empty images with any predicted pixel (false-positive rate) stands beside them.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from leafseg.data.images import read_image, read_mask
from leafseg.data.manifest import LabelMap, Manifest, Sample
from leafseg.data.transforms import Preprocessor
from leafseg.errors import DataError
from leafseg.evaluation.intervals import bootstrap_mean
from leafseg.evaluation.metrics import dice_and_iou
from leafseg.files import write_json_atomic, write_text_atomic
from leafseg.pipeline import LeafPipeline
from leafseg.predict import Segmentation, Segmenter
from leafseg.progress import Bar, progress_bar

_BATCH = 8


@dataclass(frozen=True)
class EvaluationRow:
    """One image and class. ``dice`` and ``iou`` are None where the truth is empty."""

    name: str
    label: str
    sha256: str
    empty: bool
    dice: float | None
    iou: float | None
    truth_pixels: int
    predicted_pixels: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Evaluation:
    """Rows of all images, and the figures that follow from them."""

    rows: tuple[EvaluationRow, ...]
    summary: dict[str, Any]

    def save(self, folder: Path) -> None:
        """Write ``per_image.csv`` and ``summary.json``.

        Raises:
            DataError: if the folder cannot be written.
        """
        text = io.StringIO()
        names = list(EvaluationRow.__dataclass_fields__)
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        for row in self.rows:
            values = row.as_dict()
            writer.writerow({**values, **{k: "" if values[k] is None else f"{values[k]:.6f}" for k in ("dice", "iou")}})
        write_text_atomic(folder / "per_image.csv", text.getvalue())
        write_json_atomic(folder / "summary.json", self.summary)


def evaluate(
    segmenter: Segmenter, manifest: Manifest, *, seed: int = 0, grid: Preprocessor | None = None
) -> Evaluation:
    """Evaluate every sample of a manifest (normally one part); ``grid`` as in :func:`evaluate_samples`.

    Raises:
        DataError: if there are no samples, or the model's classes are not the data's.
    """
    if not len(manifest):
        raise DataError(f"{manifest.root}: the part has no samples; choose another --split or add images")
    if len(segmenter.label_names) != len(manifest.label_map.names):
        raise DataError(
            f"{manifest.root}: the masks hold {len(manifest.label_map.names)} classes, the model knows "
            f"{len(segmenter.label_names)} ({', '.join(segmenter.label_names)}); evaluate on data of the same classes, "
            "or choose the foreground with --set data.foreground_labels=[1]"
        )
    with progress_bar("evaluation", total=len(manifest)) as bar:
        rows = tuple(evaluate_samples(segmenter, manifest.samples, manifest.label_map, bar=bar, grid=grid))
    return Evaluation(rows=rows, summary={**summarise(rows, seed=seed), "split_sha256": manifest.split_sha256})


def evaluate_samples(
    segmenter: Segmenter,
    samples: Sequence[Sample],
    label_map: LabelMap,
    *,
    bar: Bar | None = None,
    grid: Preprocessor | None = None,
) -> Iterator[EvaluationRow]:
    """Rows of samples, one an image and foreground class.

    Args:
        segmenter: the model.
        samples: images with masks.
        label_map: mask values to class ids.
        bar: advanced after each sample.
        grid: measure on the network's grid instead of the image's own: image and truth (nearest) are resized by this
            preprocessor first. The segmenter must take floats in 0..1 as they are (:func:`input_grid_pipeline`).
    """
    for start in range(0, len(samples), _BATCH):
        chunk = samples[start : start + _BATCH]
        images = [read_image(sample.image, sample.frame) for sample in chunk]
        if grid is not None:
            images = [grid.apply(image)[0].permute(1, 2, 0).numpy() for image in images]
        for sample, result in zip(chunk, _segment(segmenter, chunk, images), strict=True):
            if sample.mask is None:
                raise DataError(f"{sample.image}: no mask; evaluation needs one for every image")
            truth = label_map.apply(read_mask(sample.mask, sample.mask_frame), source=str(sample.mask))
            if grid is not None:
                size = (truth.shape[0], truth.shape[1])
                truth = grid.apply_labels(truth, grid.placement(size)).numpy().astype(np.uint8)
            if truth.shape != result.labels.shape:
                raise DataError(
                    f"{sample.mask}: mask is {truth.shape[1]}x{truth.shape[0]}, image is "
                    f"{result.labels.shape[1]}x{result.labels.shape[0]}; both must share one grid"
                )
            yield from _rows(sample, truth, result.labels, segmenter.label_names)
            if bar is not None:
                bar.advance()


def input_grid_pipeline(pipeline: LeafPipeline) -> LeafPipeline:
    """The pipeline for images that were brought to the network's grid before: floats in 0..1 are taken as they are.

    Its modules are the given pipeline's own.
    """
    config = {k: v for k, v in pipeline.config.items() if k not in pipeline.components and not k.startswith("_")}
    config["preprocessing"] = {**config["preprocessing"], "intensity": "range"}
    return LeafPipeline(**pipeline.components, **config)


def _segment(
    segmenter: Segmenter, samples: Sequence[Sample], images: Sequence[np.ndarray[Any, Any]]
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
    sample: Sample, truth: np.ndarray[Any, Any], predicted: np.ndarray[Any, Any], names: Sequence[str]
) -> Iterator[EvaluationRow]:
    classes = np.arange(1, len(names))[:, None, None]
    wanted = torch.from_numpy(truth[None] == classes)[None]  # [1, C, H, W]
    found = torch.from_numpy(predicted[None] == classes)[None]
    dice, iou = dice_and_iou(found, wanted)
    for index, name in enumerate(names[1:]):
        pixels = int(wanted[0, index].sum())
        yield EvaluationRow(
            name=sample.name,
            label=name,
            sha256=sample.sha256,
            empty=pixels == 0,
            dice=float(dice[0, index]) if pixels else None,
            iou=float(iou[0, index]) if pixels else None,
            truth_pixels=pixels,
            predicted_pixels=int(found[0, index].sum()),
        )


def summarise(rows: Sequence[EvaluationRow], *, seed: int = 0) -> dict[str, Any]:
    """Means with bootstrap intervals per class; the false-positive rate where there are empty masks."""
    classes: dict[str, Any] = {}
    for label in dict.fromkeys(row.label for row in rows):
        mine = [row for row in rows if row.label == label]
        figures: dict[str, Any] = {"images": len(mine), "empty": sum(row.empty for row in mine)}
        for metric in ("dice", "iou"):
            values = [value for row in mine if (value := getattr(row, metric)) is not None]
            interval = bootstrap_mean(values, seed=seed)
            figures[metric] = asdict(interval) if interval else None
        false = bootstrap_mean([float(row.predicted_pixels > 0) for row in mine if row.empty], seed=seed)
        figures["false_positive_rate"] = asdict(false) if false else None
        classes[label] = figures
    return {
        "classes": classes,
        "interval": "95 % percentile bootstrap over images, 9999 resamples",
        "bootstrap_seed": seed,
    }


def selection_score(rows: Sequence[Mapping[str, Any]]) -> float:
    """The figure that chooses a checkpoint, in 0..1: mean Dice, where an empty truth counts 1 if nothing was predicted.

    Unlike the reported Dice it includes empty images: a model must not be chosen for finding something everywhere.
    """
    values = [float(row["predicted_pixels"] == 0) if row["empty"] else float(row["dice"]) for row in rows]
    return float(np.mean(values)) if values else 0.0
