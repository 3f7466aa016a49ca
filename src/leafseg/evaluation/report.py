"""One self-contained HTML page about an evaluation: figures with intervals, curves, pictures, settings.

Everything is inside the file (pictures as base64, styles inline, no scripts), so that it can be mailed and archived.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from leafseg.data.images import read_image, read_mask
from leafseg.data.manifest import Manifest
from leafseg.errors import DataError, MissingExtraError
from leafseg.evaluation.evaluate import Evaluation, EvaluationRow
from leafseg.files import write_text_atomic
from leafseg.predict import Segmenter, display_pixels, draw_overlay

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rank = Literal["best", "median", "worst"]

_NOT_LOSSES = ("learning_rate", "gradient_norm", "samples_per_second")
_SHARPEST, _SMALLEST = 900, 400  # long side in pixels that pictures are shrunk or enlarged to
_BINS = 12
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
        truth, predicted: class ids ``[H, W]``.
    """

    rank: Rank
    name: str
    dice: float
    image: NDArray[Any]
    truth: NDArray[np.uint8]
    predicted: NDArray[np.uint8]


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
    examples = []
    for rank, name, dice in rank_images(evaluation.rows):
        sample = samples.get(name)
        if sample is None or sample.mask is None:
            raise DataError(
                f"{manifest.root}: no image with a mask is named {name!r}; give the data that was evaluated"
            )
        image = read_image(sample.image, sample.frame)
        truth = manifest.label_map.apply(read_mask(sample.mask, sample.mask_frame), source=str(sample.mask))
        examples.append(Example(rank, name, dice, image, truth, segmenter.segment([image])[0].labels))
    return examples


def write_report(
    path: Path,
    *,
    title: str,
    notice: str,
    evaluation: Evaluation,
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
        notice: what a reader must know before the figures; stands above them.
        evaluation: whose rows and summary are shown.
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
        classes=[_class_figures(name, values) for name, values in evaluation.summary["classes"].items()],
        interval=evaluation.summary["interval"],
        histograms=list(_histograms(evaluation.rows)),
        examples=[_pictures(example) for example in examples],
        examples_note=examples_note,
        curves=list(_curves(metrics)),
        facts=[*_facts(evaluation, record, metrics), *(facts or {}).items()],
        versions=", ".join(f"{name} {number}" for name, number in record.get("versions", {}).items()),
        settings="\n".join(_dotted(settings)) if isinstance(settings, Mapping) else "",
        command=command,
    )
    write_text_atomic(path, page)


def _class_figures(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "images": values["images"],
        "empty": values["empty"],
        **{metric: _with_interval(values[metric]) for metric in ("dice", "iou", "false_positive_rate")},
    }


def _with_interval(interval: Mapping[str, Any] | None) -> dict[str, str] | None:
    if interval is None:
        return None
    bounds = "" if interval["low"] is None else f"{interval['low']:.3f} – {interval['high']:.3f}"
    return {"mean": f"{interval['mean']:.3f}", "bounds": bounds}


def _facts(
    evaluation: Evaluation, record: Mapping[str, Any], metrics: Sequence[Mapping[str, float]]
) -> Iterator[tuple[str, str]]:
    summary = evaluation.summary
    if "model" in summary:
        yield "Model", str(summary["model"])
    if "part" in summary:
        yield "Evaluated part", str(summary["part"])
    if "samples" in record:
        yield "Images", ", ".join(f"{count} {part}" for part, count in record["samples"].items())
    if "split_sha256" in record:
        yield "Split (SHA-256)", str(record["split_sha256"])
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
    height, width = example.truth.shape
    long = max(height, width)
    scale = math.ceil(_SMALLEST / long) if long < _SMALLEST else min(1.0, _SHARPEST / long)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    picture = np.asarray(Image.fromarray(display_pixels(example.image)).resize(size, Image.Resampling.BICUBIC))
    panels = [_photograph(picture, f"{example.name}: image")]
    for kind, labels in (("truth", example.truth), ("prediction", example.predicted)):
        enlarged = np.asarray(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST))
        panels.append(_photograph(draw_overlay(picture, enlarged), f"{example.name}: {kind}"))
    captions = ("image", "truth", "prediction")
    return {
        "rank": example.rank,
        "name": example.name,
        "dice": f"{example.dice:.3f}",
        "panels": list(zip(captions, panels, strict=True)),
    }


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


def _chart(title: str, draw: Callable[[Axes, Mapping[str, str]], None], alt: str, *, wide: bool = False) -> _Picture:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width, height, density = (4.8 if wide else 3.2), 2.3, 100
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
