"""What an export costs: probability differences, mask agreement, Dice against the truth, and latency."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from leafseg import rng
from leafseg.config import PartChoice, PreprocessingSettings
from leafseg.data.manifest import Manifest
from leafseg.evaluation.evaluate import EvaluationRow, evaluate_samples
from leafseg.evaluation.intervals import bootstrap_mean
from leafseg.pipeline import LeafPipeline
from leafseg.predict import Segmentation, Segmenter, foreground_names
from leafseg.progress import progress_bar
from leafseg.runtime import Runtime


@dataclass(frozen=True)
class Agreement:
    """How alike the masks of two segmenters are.

    Attributes:
        images: compared.
        pairs: (image, class) with a pixel in either mask; the means are over them.
        both_empty: (image, class) that are left out, since two empty masks agree whatever the model is.
        mean_dice, worst_dice: None without any pair; the worst is that of one image, a mean over its classes.
        worst_image: its name; not for the card, file names may name patients.
        equal_pixels: share of pixels whose labels are equal.
    """

    images: int
    pairs: int
    both_empty: int
    mean_dice: float | None
    worst_dice: float | None
    worst_image: str | None
    equal_pixels: float

    def without_names(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "worst_image"}


class Recorded:
    """A segmenter that keeps the foreground masks of what it segments, a bit a pixel, in order."""

    def __init__(self, segmenter: Segmenter) -> None:
        self._segmenter = segmenter
        self._classes = len(foreground_names(segmenter))
        self._masks: list[tuple[tuple[int, ...], NDArray[np.uint8]]] = []

    @property
    def label_names(self) -> tuple[str, ...]:
        return self._segmenter.label_names

    @property
    def overlapping(self) -> bool:
        return self._segmenter.overlapping

    @property
    def preprocessing(self) -> PreprocessingSettings:
        return self._segmenter.preprocessing

    def read(self, path: Path, frame: int | None = None) -> NDArray[Any] | Tensor:
        return self._segmenter.read(path, frame)

    def segment(self, images: Sequence[NDArray[Any] | Tensor]) -> list[Segmentation]:
        results = self._segmenter.segment(images)
        for result in results:
            mask = result.mask[-self._classes :]  # without the background's channel, where there is one
            self._masks.append((mask.shape, np.packbits(mask)))
        return results

    def masks(self) -> Iterable[NDArray[np.bool_]]:
        """Bool ``[L, H, W]`` an image, in the order in which they were segmented."""
        for shape, bits in self._masks:
            yield np.unpackbits(bits, count=int(np.prod(shape))).reshape(shape).astype(bool)


def mask_agreement(first: Recorded, second: Recorded, names: Sequence[str]) -> Agreement:
    """Dice of the masks of two segmenters that have segmented the same images in the same order."""
    dice: list[float] = []
    by_image: list[tuple[float, str]] = []
    both_empty = equal = pixels = 0
    for one, other, name in zip(first.masks(), second.masks(), names, strict=True):
        areas = one.sum((1, 2)) + other.sum((1, 2))
        common = (one & other).sum((1, 2))
        mine = [float(2 * c / a) for c, a in zip(common, areas, strict=True) if a]
        both_empty += len(areas) - len(mine)
        dice += mine
        if mine:
            by_image.append((statistics.fmean(mine), name))
        equal += int((one == other).all(0).sum())
        pixels += one.shape[1] * one.shape[2]
    worst = min(by_image, default=(None, None))
    return Agreement(
        images=len(names),
        pairs=len(dice),
        both_empty=both_empty,
        mean_dice=statistics.fmean(dice) if dice else None,
        worst_dice=worst[0],
        worst_image=worst[1],
        equal_pixels=equal / max(pixels, 1),
    )


def segment_frames(segmenters: Sequence[Segmenter], frames: Sequence[tuple[Path, int | None]]) -> list[str]:
    """Have all segment the same frames of image files; returns the frames' names."""
    names = []
    with progress_bar("comparison", total=len(frames)) as bar:
        for path, frame in frames:
            image = segmenters[0].read(path, frame)
            for segmenter in segmenters:
                segmenter.segment([image])
            names.append(path.name if frame is None else f"{path.name}, frame {frame}")
            bar.advance()
    return names


def evaluate_both(model: Segmenter, exported: Segmenter, part: Manifest) -> tuple[list[str], dict[str, Any]]:
    """Have both segment every sample; returns the samples' names, and each class's Dice and its change.

    The change is exported minus model, over the images with a non-empty truth, with a 95 % bootstrap interval over
    groups, or over images without groups.
    """
    rows: list[list[EvaluationRow]] = []
    for segmenter in (model, exported):
        with progress_bar("evaluation", total=len(part)) as bar:
            rows.append(list(evaluate_samples(segmenter, part.samples, part.label_map, bar=bar)))
    classes: dict[str, Any] = {}
    for label in dict.fromkeys(row.label for row in rows[0]):
        pairs = [
            (before.dice, after.dice, before.group or before.sha256)
            for before, after in zip(*rows, strict=True)
            if before.label == label and before.dice is not None and after.dice is not None
        ]
        changes = [after - before for before, after, _ in pairs]
        change = bootstrap_mean(changes, groups=[group for *_, group in pairs])
        classes[label] = {
            "images": len(pairs),
            "dice_model": statistics.fmean(before for before, *_ in pairs) if pairs else None,
            "dice_exported": statistics.fmean(after for _, after, _ in pairs) if pairs else None,
            "change": None if change is None else asdict(change),
            "worst_change": min(changes, default=None),
        }
    return [sample.name for sample in part.samples], classes


def probability_difference(
    pipeline: LeafPipeline,
    runtime: Runtime,
    *,
    decoder: PartChoice = "full",
    encoder: PartChoice = "full",
    images: int = 4,
) -> float:
    """Largest difference of probabilities for random images and the same noise, on the network's grid.

    Random images say nothing about masks, but they find a graph that computes something else.
    """
    batch = _random_images(runtime, images)
    noise = np.concatenate([runtime.draw_noise(image) for image in batch])
    expected = pipeline(
        torch.from_numpy(batch), latents=torch.from_numpy(noise), decoder=decoder, encoder=encoder
    ).probability
    return float(np.abs(runtime.run(batch, noise) - expected.numpy()).max())


def latency(pipeline: LeafPipeline, runtime: Runtime, *, repeats: int) -> dict[str, Any]:
    """Milliseconds of one image of the network's size, alternately in both: median, 10th and 90th percentile.

    The pipeline runs in fp32 as ``leafseg predict`` runs it. Both have torch's number of threads.
    """
    (image,) = _random_images(runtime, 1)
    tensor = torch.from_numpy(image)[None]
    calls: dict[str, Callable[[], Any]] = {
        "model": lambda: pipeline(tensor),
        "exported": lambda: runtime.segment(image),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 2):  # the first two warm up
        for name, call in calls.items():
            spent = _milliseconds(call)
            if turn >= 2:
                times[name].append(spent)
    figures: dict[str, Any] = {}
    for name, spent_by_turn in times.items():
        low, median, high = np.percentile(spent_by_turn, (10, 50, 90)).tolist()
        figures[name] = {"median_ms": round(median, 2), "p10_ms": round(low, 2), "p90_ms": round(high, 2)}
    ratio = figures["model"]["median_ms"] / figures["exported"]["median_ms"]
    return {**figures, "times_as_fast": round(ratio, 2), "threads": torch.get_num_threads(), "repeats": repeats}


def _milliseconds(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1000


def _random_images(runtime: Runtime, count: int) -> NDArray[np.float32]:
    height, width = runtime.preprocessing.size
    return rng.generator(0, "export-check").random((count, 3, height, width), dtype=np.float32)
