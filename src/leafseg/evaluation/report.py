"""One self-contained HTML page about an evaluation, for a clinician and for a reviewer.

It opens with plain sentences; then come the figures with their intervals, how they spread, calibration, pictures, what
went wrong, groups, and how to repeat it. Everything is inside the file (pictures as base64, styles inline, no
scripts), so that it can be mailed and archived.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from leafseg.config import override_settings, overrides_of, parse_settings
from leafseg.data.images import Reading, read_image
from leafseg.data.manifest import IGNORE, Manifest, read_labels
from leafseg.errors import ConfigError, DataError, MissingExtraError
from leafseg.evaluation.calibration import Reliability
from leafseg.evaluation.evaluate import DISTANCES, METRICS, VOLUME_METRICS, Evaluation, EvaluationRow
from leafseg.files import write_text_atomic
from leafseg.predict import LABEL_COLOURS, Segmenter, display_pixels, draw_overlay

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rank = Literal["best", "median", "worst"]

_NOT_LOSSES = ("learning_rate", "gradient_norm", "samples_per_second")
_SHARPEST, _SMALLEST = 900, 400  # long side in pixels that pictures are shrunk or enlarged to
_BINS = 12
_SHOWN_GROUPS = 25
_GOOD_DICE = 0.8
_FEW_IMAGES, _FEW_GROUPS = 30, 10
_TRUTH_COLOUR, _PREDICTION_COLOUR = (45, 115, 255), (255, 150, 30)  # told apart by every eye
# Colours of text, grid and lines on a light and on a dark page.
_THEMES = {
    "light": {"text": "#4b5563", "grid": "#e5e7eb", "line": "#0f766e", "faint": "#99d5cd", "panel": "#ffffff"},
    "dark": {"text": "#b6bdc8", "grid": "#374151", "line": "#5eead4", "faint": "#2f6f68", "panel": "#1b1f26"},
}


@dataclass(frozen=True)
class Example:
    """One image of the report.

    Attributes:
        rank: its place among all images by Dice.
        name: of the sample.
        dice: mean over its classes.
        image: pixels ``[H, W]`` or ``[H, W, 3]`` of any type.
        truth, predicted: class ids ``[H, W]``; of overlapping labels bool ``[C, H, W]``. Ignored pixels are 0 in both.
    """

    rank: Rank
    name: str
    dice: float
    image: NDArray[Any]
    truth: NDArray[np.uint8] | NDArray[np.bool_]
    predicted: NDArray[np.uint8] | NDArray[np.bool_]


@dataclass(frozen=True)
class _Picture:
    """A picture's PNG as base64, for a light and a dark page (equal for photographs), and its size in CSS pixels."""

    light: str
    dark: str
    width: int
    height: int
    alt: str


def require_report_packages() -> None:
    """Find out before hours of work, not after.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise MissingExtraError('a report needs matplotlib; run: pip install "leafseg[report]"')


def rank_images(rows: Sequence[EvaluationRow]) -> list[tuple[Rank, str, float]]:
    """The best, the median and the worst image by Dice (mean over an image's classes), as (rank, name, Dice).

    Images without a measurable Dice are left out; of an even number the lower middle one is the median. Fewer than
    three images give fewer ranks, never one image twice.
    """
    by_name: dict[str, list[float]] = {}
    for row in rows:
        if row.dice is not None:
            by_name.setdefault(row.name, []).append(row.dice)
    order = sorted((math.fsum(values) / len(values), name) for name, values in by_name.items())
    if not order:
        return []
    places: dict[int, Rank] = {}
    for rank, place in (("best", len(order) - 1), ("worst", 0), ("median", (len(order) - 1) // 2)):
        places.setdefault(place, rank)  # type: ignore[arg-type]  # the literals above are ranks
    return [(places[place], order[place][1], order[place][0]) for place in sorted(places, reverse=True)]


def find_examples(segmenter: Segmenter, manifest: Manifest, evaluation: Evaluation) -> list[Example]:
    """The best, the median and the worst image of an evaluation, segmented again.

    Raises:
        DataError: if the evaluation names an image that the manifest lacks, or a file cannot be read.
    """
    samples = {sample.name: sample for sample in manifest.samples}
    reading = Reading.of(segmenter.preprocessing)
    examples = []
    for rank, name, dice in rank_images(evaluation.rows):
        sample = samples.get(name)
        if sample is None or not sample.has_labels:
            raise DataError(
                f"{manifest.root}: no image with a mask is named {name!r}; give the data that was evaluated"
            )
        image = read_image(sample.image, sample.frame, reading=dataclasses.replace(reading, neighbouring_slices=False))
        truth = read_labels(sample, manifest.label_map, reading=reading)
        result = segmenter.segment([segmenter.read(sample.image, sample.frame)])[0]
        predicted = result.mask if result.labels is None else result.labels
        if truth.ndim == 2:
            predicted = np.where(truth == IGNORE, 0, predicted).astype(np.uint8)
            truth = np.where(truth == IGNORE, 0, truth).astype(np.uint8)
        examples.append(Example(rank, name, dice, image, truth, predicted))
    return examples


def write_report(
    path: Path,
    *,
    title: str,
    evaluation: Evaluation,
    notice: str = "",
    metrics: Sequence[Mapping[str, float]] = (),
    record: Mapping[str, Any] | None = None,
    examples: Sequence[Example] = (),
    examples_note: str = "",
    facts: Mapping[str, str] | None = None,
    command: str = "",
) -> None:
    """Write the page.

    Args:
        path: the HTML file.
        title: the page's heading.
        evaluation: whose rows, calibration and summary are shown.
        notice: what a reader must know before the figures; stands above them.
        metrics: the logged lines of the training (``read_metrics``); none leaves out the curves.
        record: the training's record in ``run.json``: settings, samples, split, versions, teacher.
        examples: see :func:`find_examples`.
        examples_note: one sentence below the pictures' heading.
        facts: further lines of the table "How it was made", name to value.
        command: what repeats all this.

    Raises:
        MissingExtraError: if matplotlib is not installed.
        DataError: if the file cannot be written.
    """
    require_report_packages()
    from jinja2 import Environment, StrictUndefined

    record = record or {}
    settings = record.get("settings")
    template = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(files("leafseg.evaluation").joinpath("report.html").read_text(encoding="utf-8"))
    page = template.render(
        title=title,
        notice=notice,
        in_short=in_short(evaluation),
        labels=list(evaluation.summary["classes"]),
        figures=list(_figures(evaluation.summary)),
        interval=evaluation.summary["interval"],
        caveats=list(_caveats(evaluation)),
        unit=_UNITS.get(str(evaluation.summary.get("distance_unit"))),
        histograms=[*_histograms(evaluation.rows), *_distance_histograms(evaluation)],
        calibration=list(_calibration(evaluation)),
        examples=[_pictures(example) for example in examples],
        examples_note=examples_note,
        legend=_legend(list(evaluation.summary["classes"])),
        outlines=(_hex(_TRUTH_COLOUR), _hex(_PREDICTION_COLOUR)),
        failures=_failures(evaluation.summary),
        groups=_groups(evaluation.rows),
        curves=list(_curves(metrics)),
        facts=[*_facts(evaluation, record, metrics), *(facts or {}).items()],
        versions=_versions(record.get("versions", {})),
        own_versions=_versions(evaluation.summary.get("versions", {})),
        settings="\n".join(_dotted(settings)) if isinstance(settings, Mapping) else "",
        command=command,
        training_command=_training_command(record),
    )
    write_text_atomic(path, page)


# --- words and figures ------------------------------------------------------------------------------------------------

_UNITS = {"mm": "millimetres", "px": "pixels"}


def in_short(evaluation: Evaluation) -> list[str]:
    """What the figures say, in sentences that need no statistics; everything in them is counted, not estimated."""
    lines = []
    labels = list(evaluation.summary["classes"])
    for label, figures in evaluation.summary["classes"].items():
        mine = [row for row in evaluation.rows if row.label == label]
        dice = [row.dice for row in mine if row.dice is not None]
        prefix = f"{label}: " if len(labels) > 1 else ""
        if dice:
            good, missed = sum(value >= _GOOD_DICE for value in dice), figures["missed"]
            lines.append(
                f"{prefix}in {good} of {len(dice)} images that show it, the found area agrees well with the reference "
                f"(Dice of {_GOOD_DICE} or more); {missed or 'none'} of them {'was' if missed == 1 else 'were'} missed "
                "altogether."
            )
            interval = figures["dice"]
            text = f"{prefix}the mean Dice is {interval['mean']:.2f} (1 is perfect agreement, 0 is none)"
            if interval["low"] is not None:
                text += (
                    f"; over all images like these, it plausibly lies between {interval['low']:.2f} and "
                    f"{interval['high']:.2f}"
                )
            lines.append(f"{text}.")
        distances = [row.assd for row in mine if row.assd is not None]
        if distances:
            unit = _UNITS[str(evaluation.summary["distance_unit"])]
            lines.append(
                f"{prefix}where something was found, the two outlines typically lie {float(np.median(distances)):.1f} "
                f"{unit} apart (mean distance, in the middle one of the images)."
            )
        empty = [row for row in mine if row.empty]
        if empty:
            false = sum(row.predicted_pixels > 0 for row in empty)
            lines.append(
                f"{prefix}in {false} of {len(empty)} images that do not show it, something was marked nevertheless "
                "(a false positive)."
            )
    return lines


def _caveats(evaluation: Evaluation) -> Iterator[str]:
    """What keeps the figures from meaning more than they do."""
    summary = evaluation.summary
    images = len({row.name for row in evaluation.rows})
    if summary.get("selected_on_test"):
        yield "The evaluated part also chose the checkpoint of the model: these figures are optimistic."
    if summary.get("part") == "validation":
        yield "The validation part usually chose the checkpoint of the model, which makes figures on it optimistic."
    if summary.get("part") in ("train", "all"):
        yield "The evaluated images may include some that the model was trained on, which makes figures optimistic."
    groups = summary.get("groups")
    if groups is None:
        yield (
            "No groups (patients, volumes) are known. If several images come from one patient, the intervals are "
            "narrower than they should be."
        )
    elif groups < _FEW_GROUPS:
        yield f"All images come from {groups} group{'s' if groups > 1 else ''}: how others would do is hardly known."
    if images < _FEW_IMAGES:
        yield f"Only {images} image{'s were' if images > 1 else ' was'} evaluated."
    if any(row.volume for row in evaluation.rows) and summary.get("distance_unit"):
        yield "Slices are measured one by one, so that their distances lie in the plane of the slice."


def _figures(summary: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows of the table: a name, and for each class a mean with interval and n; without those that nobody measured."""
    classes = list(summary["classes"].values())
    unit, tolerance = summary.get("distance_unit"), summary.get("surface_dice_tolerance")

    def words(metric: str) -> str:
        if metric in DISTANCES:
            return f"{METRICS[metric]}, {unit}"
        return f"{METRICS[metric]} at {tolerance:g} {unit}" if metric == "nsd" else METRICS[metric]

    rows = [(words(m), m, 2 if m in DISTANCES else 3) for m in METRICS if m in ("dice", "iou") or _known(classes, m)]
    rows += [
        ("false-positive rate", "false_positive_rate", 3),
        ("false-positive area, share of the image", "false_positive_area", 4),
    ]
    if any("volumes" in figures for figures in classes):
        rows += [
            (f"whole volumes: {words(m)}", f"volume_{m}", 2 if m in DISTANCES else 3)
            for m in VOLUME_METRICS
            if _known(classes, f"volume_{m}")
        ]
    for name, key, digits in rows:
        name = name[0].upper() + name[1:]
        yield {"name": name, "cells": [_with_interval(figures.get(key), digits) for figures in classes]}
    counts = (("Images", "images"), ("of these, with an empty reference", "empty"), ("of these, missed", "missed"))
    for name, key in counts:
        yield {"name": name, "cells": [{"mean": str(f[key]), "bounds": "", "n": ""} for f in classes]}


def _known(classes: Sequence[Mapping[str, Any]], key: str) -> bool:
    return any(figures.get(key) for figures in classes)


def _with_interval(interval: Mapping[str, Any] | None, digits: int) -> dict[str, str] | None:
    if interval is None:
        return None
    bounds = "" if interval["low"] is None else f"{interval['low']:.{digits}f} – {interval['high']:.{digits}f}"
    return {"mean": f"{interval['mean']:.{digits}f}", "bounds": bounds, "n": str(interval["n"])}


def _failures(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The lists of the summary with their figures as text; classes without failures are left out."""
    return [
        {
            "label": label,
            "total": found["total"],
            "reasons": ", ".join(f"{reason} {count}" for reason, count in found["reasons"].items()),
            "worst": [
                {
                    **entry,
                    "reasons": ", ".join(entry["reasons"]),
                    "dice": "–" if entry["dice"] is None else f"{entry['dice']:.3f}",
                    "hd95": "–" if entry["hd95"] is None else f"{entry['hd95']:.1f}",
                }
                for entry in found["worst"]
            ],
        }
        for label, found in summary.get("failures", {}).items()
        if found["total"]
    ]


def _facts(
    evaluation: Evaluation, record: Mapping[str, Any], metrics: Sequence[Mapping[str, float]]
) -> Iterator[tuple[str, str]]:
    summary = evaluation.summary
    if "data" in summary:
        yield "Data", str(summary["data"])
    if "part" in summary:
        yield "Evaluated part", str(summary["part"])
    if summary.get("split_sha256"):
        yield "Evaluated images and their part (SHA-256)", str(summary["split_sha256"])
    if summary.get("groups") is not None:
        yield "Groups (patients, volumes)", str(summary["groups"])
    if "model" in summary:
        yield "Model", str(summary["model"])
    if summary.get("model_sha256"):
        yield "Files of the model (SHA-256)", str(summary["model_sha256"])
    if "steps" in summary:
        yield "Reverse steps", f"{summary['steps']} ({summary['timesteps']} timesteps)"
    if "noise" in summary:
        draws = summary.get("samples", 1)
        yield "Starting noise", f"{summary['noise']}, {draws} draw{'s, averaged' if draws > 1 else ''}"
    if "precision" in summary:
        yield "Precision", str(summary["precision"])
    if "hardware" in summary:
        yield "Hardware, evaluation", str(summary["hardware"])
    if "preprocessing" in summary:
        yield "Preprocessing", ", ".join(_dotted(summary["preprocessing"]))
    if "bootstrap_seed" in summary:
        yield "Seed of the bootstrap", str(summary["bootstrap_seed"])
    settings = record.get("settings")
    if isinstance(settings, Mapping) and "preset" in settings:
        yield "Preset", str(settings["preset"])
    if "samples" in record:
        yield "Images in the split of the training", ", ".join(f"{n} {part}" for part, n in record["samples"].items())
    if "split_sha256" in record:
        yield "Split of the training (SHA-256)", str(record["split_sha256"])
    if record:
        yield "Teacher while training", str(record.get("teacher") or "none")
    if record.get("init_from"):
        yield "Started from", str(record["init_from"])
    steps = max((line["step"] for line in metrics), default=0)
    if steps:
        yield "Optimizer steps", f"{steps:.0f}"
    seconds = _loop_seconds(metrics, record)
    if seconds:
        yield "Time in these steps", f"{seconds / 60:.1f} minutes" if seconds >= 60 else f"{seconds:.0f} s"


def _training_command(record: Mapping[str, Any]) -> str:
    """What trains such a model again, on the parts that the run stored; empty for settings that this version lacks."""
    try:
        settings = parse_settings(record["settings"], source="run")
        if steps := (record.get("calibration") or {}).get("steps"):  # minutes give other steps on another machine
            settings = override_settings(settings, [f"training.steps={steps}"])
        changes = overrides_of(settings)
    except (KeyError, ConfigError):
        return ""
    words = ["leafseg", "train", "--data", "DATA", "--split-file", "RUN/split.csv", "--preset", settings.preset]
    if record.get("init_from"):
        words += ["--init-from", str(record["init_from"])]
    for change in changes:
        words += ["--set", change]
    return shlex.join([*words, "--out", "NEW"])


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items())


def _loop_seconds(metrics: Sequence[Mapping[str, float]], record: Mapping[str, Any]) -> float:
    """Time in optimizer steps, from the logged rates: right for resumed trainings too, where no clock ran through."""
    try:
        batch = int(record["settings"]["training"]["batch_size"])
    except (KeyError, TypeError, ValueError):
        return 0.0
    seconds, before = 0.0, 0.0
    for line in metrics:
        rate = line.get("train/samples_per_second")
        if rate:
            seconds += (line["step"] - before) * batch / rate
            before = line["step"]
    return seconds


def _dotted(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Settings as ``--set`` takes them, one a line."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}={value if isinstance(value, str) else json.dumps(value)}"


# --- pictures ---------------------------------------------------------------------------------------------------------


def _pictures(example: Example) -> dict[str, Any]:
    height, width = example.truth.shape[-2:]
    long = max(height, width)
    scale = math.ceil(_SMALLEST / long) if long < _SMALLEST else min(1.0, _SHARPEST / long)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    picture = np.asarray(Image.fromarray(display_pixels(example.image)).resize(size, Image.Resampling.BICUBIC))
    truth, predicted = _enlarged(example.truth, size), _enlarged(example.predicted, size)
    panels = {
        "image": picture,
        "reference": draw_overlay(picture, truth),
        "prediction": draw_overlay(picture, predicted),
        "both outlines": _outlines(picture, truth, predicted),
    }
    return {
        "rank": example.rank,
        "name": example.name,
        "dice": f"{example.dice:.3f}",
        "panels": [(caption, _photograph(panel, f"{example.name}: {caption}")) for caption, panel in panels.items()],
    }


def _enlarged(labels: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    if labels.ndim == 3:
        return np.stack([_enlarged(layer, size) for layer in labels])
    return np.asarray(Image.fromarray(labels.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)).astype(
        labels.dtype
    )


def _outlines(picture: NDArray[np.uint8], truth: NDArray[Any], predicted: NDArray[Any]) -> NDArray[np.uint8]:
    """The picture with the outlines of all classes: of the reference wide, of the prediction narrow upon it."""
    from scipy.ndimage import binary_dilation, binary_erosion

    result = picture.copy()
    for labels, colour, outside, within in ((truth, _TRUTH_COLOUR, 1, 3), (predicted, _PREDICTION_COLOUR, 0, 2)):
        masks = labels if labels.ndim == 3 else [labels == value for value in np.unique(labels[labels > 0])]
        for mask in masks:
            inside = mask.astype(bool)
            reach = binary_dilation(inside, iterations=outside) if outside else inside
            result[reach & ~binary_erosion(inside, iterations=within, border_value=1)] = colour
    return result


def _legend(labels: Sequence[str]) -> list[tuple[str, str]]:
    """Colour and name of each class, as the pictures show them."""
    return [(_hex(LABEL_COLOURS[index % len(LABEL_COLOURS)]), label) for index, label in enumerate(labels)]


def _hex(colour: Sequence[int] | NDArray[np.uint8]) -> str:
    return "#" + "".join(f"{int(part):02x}" for part in colour)


def _photograph(pixels: NDArray[np.uint8], alt: str) -> _Picture:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG", optimize=True)
    data = _base64(stream)
    return _Picture(data, data, pixels.shape[1], pixels.shape[0], alt)


def _curves(metrics: Sequence[Mapping[str, float]]) -> Iterator[_Picture]:
    """One small chart for the validation Dice and each part of the loss; each has its own scale."""
    names = list(dict.fromkeys(name for line in metrics for name in line))
    parts = [n for n in names if n.startswith("train/") and n.removeprefix("train/") not in _NOT_LOSSES]
    for name in [n for n in names if n == "validation/dice"] + parts:
        points = [(line["step"], line[name]) for line in metrics if name in line]
        steps, values = zip(*points, strict=True)
        validation = name == "validation/dice"
        kind, _, what = name.partition("/")
        label = "validation Dice" if validation else what if what == "loss" else f"{what} loss"

        def draw(
            axes: Axes,
            theme: Mapping[str, str],
            steps: tuple[float, ...] = steps,
            values: tuple[float, ...] = values,
            dots: bool = validation,
        ) -> None:
            if dots:
                axes.plot(steps, values, color=theme["line"], marker="o", markersize=4, linewidth=1.6)
            else:
                axes.plot(steps, values, color=theme["faint"], linewidth=1)
                axes.plot(steps, _smooth(values), color=theme["line"], linewidth=1.8)
            axes.set_xlabel("step")

        yield _chart(label, draw, f"{kind}: {what} over steps, last value {values[-1]:.3f}")


def _smooth(values: Sequence[float]) -> list[float]:
    """Running mean over about a tenth of the points, shrinking towards the ends."""
    reach = len(values) // 20
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [math.fsum(window) / len(window) for window in windows]


def _histograms(rows: Sequence[EvaluationRow]) -> Iterator[_Picture]:
    """How Dice spreads over the images, a chart a class."""
    from matplotlib.ticker import MaxNLocator

    labels = list(dict.fromkeys(row.label for row in rows))
    for label in labels:
        dice = [row.dice for row in rows if row.label == label and row.dice is not None]
        if not dice:
            continue
        low, high = min(dice), max(dice)
        width = next((w for w in (0.005, 0.01, 0.02, 0.05) if (high - low) / w <= _BINS), 0.1)
        # Whole bins, so that their edges are round numbers; a hair of room keeps floats such as 0.3 / 0.1 in their bin.
        first = math.floor(low / width + 1e-9)
        last = max(math.ceil(high / width - 1e-9), first + 1)
        edges = np.arange(first, last + 1) * width

        def draw(axes: Axes, theme: Mapping[str, str], dice: list[float] = dice, edges: NDArray[Any] = edges) -> None:
            axes.hist(np.clip(dice, edges[0], edges[-1]), bins=list(edges), color=theme["line"], rwidth=0.92)
            mean = math.fsum(dice) / len(dice)
            axes.axvline(mean, color=theme["panel"], linewidth=3.5)  # else the dashes drown in a bar
            axes.axvline(mean, color=theme["text"], linewidth=1.4, linestyle=(0, (4, 3)))
            axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
            axes.set_xlabel("Dice (dashed: mean)")
            axes.set_ylabel("images")

        name = f"Dice of {len(dice)} images" + (f", {label}" if len(labels) > 1 else "")
        yield _chart(name, draw, f"{name}: from {low:.3f} to {high:.3f}", wide=True)


def _distance_histograms(evaluation: Evaluation) -> Iterator[_Picture]:
    """How HD95 spreads over the images, a chart a class."""
    from matplotlib.ticker import MaxNLocator

    labels = list(evaluation.summary["classes"])
    for label in labels:
        found = [row.hd95 for row in evaluation.rows if row.label == label and row.hd95 is not None]
        if not found:
            continue
        unit = evaluation.summary["distance_unit"]

        def draw(axes: Axes, theme: Mapping[str, str], found: list[float] = found, unit: str = unit) -> None:
            axes.hist(found, bins=_BINS, range=(0, max(*found, 1e-6)), color=theme["line"], rwidth=0.92)
            axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
            axes.set_xlabel(f"HD95, {unit}")
            axes.set_ylabel("images")

        name = f"HD95 of {len(found)} images" + (f", {label}" if len(labels) > 1 else "")
        yield _chart(name, draw, f"{name}: from {min(found):.1f} to {max(found):.1f} {unit}", wide=True)


def _calibration(evaluation: Evaluation) -> Iterator[dict[str, Any]]:
    """A reliability diagram a class, and the sentence below it."""
    for label, part in evaluation.calibration.items():

        def draw(axes: Axes, theme: Mapping[str, str], part: Reliability = part) -> None:
            filled = part.counts > 0
            stated, share = (
                part.probability[filled] / part.counts[filled],
                part.foreground[filled] / part.counts[filled],
            )
            axes.plot((0, 1), (0, 1), color=theme["grid"], linewidth=1.4)
            axes.plot(stated, share, color=theme["line"], marker="o", markersize=4, linewidth=1.6)
            axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel="stated probability", ylabel="share that is true")

        error = part.expected_error
        yield {
            "picture": _chart(f"Calibration, {label}", draw, f"calibration of {label}: ECE {error:.3f}", height=3.0),
            "label": label,
            "ece": f"{error:.4f}",
            "ace": f"{part.average_error:.4f}",
        }


def _groups(rows: Sequence[EvaluationRow]) -> dict[str, Any] | None:
    """Dice by group, worst first; None without groups to tell apart."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row.group and row.dice is not None:
            found.setdefault(row.group, {}).setdefault(row.name, []).append(row.dice)
    if len(found) < 2:
        return None
    images = {group: [math.fsum(v) / len(v) for v in by_name.values()] for group, by_name in found.items()}
    order = sorted(images, key=lambda group: (math.fsum(images[group]) / len(images[group]), group))[:_SHOWN_GROUPS]

    def draw(axes: Axes, theme: Mapping[str, str]) -> None:
        for place, group in enumerate(order):
            values = images[group]
            axes.scatter(values, [place] * len(values), s=14, color=theme["faint"], linewidths=0, zorder=2)
            axes.scatter(math.fsum(values) / len(values), place, s=42, color=theme["line"], linewidths=0, zorder=3)
        axes.set_yticks(range(len(order)), order, family="monospace")
        axes.set_ylim(len(order) - 0.5, -0.5)
        axes.set_xlabel("Dice (pale: images; dark: mean of the group)")

    return {
        "picture": _chart(
            "Dice by group", draw, f"Dice of {len(order)} groups", wide=True, height=1.0 + 0.2 * len(order)
        ),
        "total": len(found),
        "shown": len(order),
        "rows": [
            {
                "group": group,
                "images": len(images[group]),
                "dice": f"{math.fsum(images[group]) / len(images[group]):.3f}",
                "worst": f"{min(images[group]):.3f}",
                "missed": len({row.name for row in rows if row.group == group and row.missed}),
            }
            for group in order
        ],
    }


def _chart(
    title: str,
    draw: Callable[[Axes, Mapping[str, str]], None],
    alt: str,
    *,
    wide: bool = False,
    height: float = 2.3,
) -> _Picture:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width, density = (4.8 if wide else 3.2), 100
    images = {}
    for name, theme in _THEMES.items():
        figure = Figure(figsize=(width, height), layout="constrained")  # no pyplot: no global state, no display
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        draw(axes, theme)
        axes.set_title(_plain(title), loc="left", fontsize=10.5, color=theme["text"])
        axes.tick_params(colors=theme["text"], labelsize=9, length=0)
        axes.grid(axis="y", color=theme["grid"], linewidth=0.8)
        axes.set_axisbelow(True)
        for label in (axes.xaxis.label, axes.yaxis.label):
            label.set(color=theme["text"], fontsize=9)
        for side, spine in axes.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(theme["grid"])
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=2 * density, transparent=True)
        images[name] = _base64(stream)
    return _Picture(images["light"], images["dark"], round(width * density), round(height * density), alt)


def _plain(text: str) -> str:
    """Text that matplotlib does not take for a formula."""
    return text.replace("$", r"\$")


def _base64(stream: io.BytesIO) -> str:
    return base64.b64encode(stream.getvalue()).decode("ascii")
