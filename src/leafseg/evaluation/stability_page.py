"""A Markdown page with pictures about a stability measurement; every file stands beside the others in one folder."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from leafseg.evaluation.calibration import Reliability
from leafseg.evaluation.report import require_report_packages
from leafseg.evaluation.stability import METRICS, ComparedModel, Disagreement, Stability
from leafseg.files import atomic_path, write_text_atomic
from leafseg.predict import display_pixels, draw_overlay

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

PAGE = "stability.md"

# Okabe and Ito's palette, which colour-blind readers can tell apart; the markers say the same without colour.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_TEXT, _GRID = "#374151", "#e5e7eb"
_OUTLINE = "#ff2d55"
_DENSITY = 110  # dots an inch
_LONGEST = 700  # side in pixels that maps are shrunk to
_PANELS_A_ROW = 4

# What the page shows of the figures: (metric, heading), in tables of a bearable width.
_NOISE_COLUMNS = (
    ("dice_mean", "Dice"),
    ("dice_std", "Dice, sd over seeds"),
    ("dice_spread", "Dice, max − min"),
    ("disagreement", "disagreement"),
    ("vote_entropy", "vote entropy"),
    ("probability_std", "probability, sd"),
)
_DIFFERENCE_COLUMNS = (
    ("dice_mean", "Dice"),
    ("dice_std", "Dice, sd over seeds"),
    ("disagreement", "disagreement"),
    ("ece_draw", "ECE, single draw"),
    ("ece_mean", "ECE, mean over seeds"),
)
_STEP_PANELS = ("dice_mean", "dice_std", "dice_spread", "disagreement")
_ALL_PAIRS = 3  # up to three models; of more, the page compares each with the first, and the JSON file all of them

_RULES = """\
- **Dice**: of each seed's mask with the truth at the image's original resolution; its mean, sample standard deviation
  (sd) and largest minus smallest value over the seeds of one image, then the mean over images. Images with an empty
  truth have no Dice and are left out of these three.
- **Disagreement**: 1 minus the mean Dice between every two seeds' masks; no truth is needed. Two empty masks agree
  (Dice 1), an empty and a filled one do not (Dice 0). 0: the noise changes nothing.
- **Vote entropy**: of the share of seeds that say foreground, in bits, mean over the pixels; it grows with the
  object's size, the disagreement does not.
- **Probability, sd**: sample standard deviation of the probability over the seeds, mean over the pixels.
- Square brackets: 95 % percentile bootstrap over images. They tell what other images would change, not what another
  training of the same model would.

A model that always draws the same wrong mask is perfectly stable: read the spread beside the Dice."""

_CALIBRATION = """\
Of the pixels that were given a probability of 0.8, are 80 % foreground? The expected calibration error (ECE) is the
mean distance over pixels, in 15 equally wide bins; the average one (ACE) weighs each filled bin the same. Most pixels
are background that every model is sure of, which makes the ECE small: read it together with the ACE and the plots.
*Per image* is the mean of the images' own ECE with its interval; *pooled* puts all images' pixels together. *Single
draw* is one noise seed (all seeds are used, each by itself), *mean* the probability averaged over the seeds.

The probability is the grey value of a decoded picture, 0 for black and 1 for white. Training draws that picture towards
the mask; it never asks that a grey of 0.8 be right four times in five. What a value means is what these plots show."""


def write_page(
    folder: Path,
    result: Stability,
    examples: Sequence[Disagreement] = (),
    *,
    part: str = "",
    command: str = "",
) -> Path:
    """Write ``stability.md`` and its pictures; the page comes last, when all it shows is there.

    Args:
        folder: where they go.
        result: what was measured.
        examples: see :func:`leafseg.evaluation.stability.find_disagreements`.
        part: of the data, for the heading.
        command: what repeats all this.

    Raises:
        MissingExtraError: if matplotlib is not installed.
        DataError: if a file cannot be written.
    """
    require_report_packages()
    _save(_steps_figure(result), folder / "steps.png")
    for number, example in enumerate(examples, start=1):
        _save(_votes_figure(example, result), folder / f"disagreement-{number}.png")
    shown = sorted({result.steps[0], result.steps[-1]})
    for steps in shown:
        _save(_reliability_figure(result, steps), folder / f"reliability-{steps}.png")
    write_text_atomic(folder / PAGE, "\n".join(_page(result, examples, shown, part, command)) + "\n")
    return folder / PAGE


# --- text -------------------------------------------------------------------------------------------------------------


def _page(
    result: Stability, examples: Sequence[Disagreement], shown: Sequence[int], part: str, command: str
) -> Iterator[str]:
    summary = result.summary
    yield "# Stability: how much the starting noise changes the mask"
    yield "\nResearch software, not a medical device.\n"
    of_part = f" of the {part} part" if part and part != "all" else ""
    empty = f", {summary['empty']} of them with an empty mask" if summary["empty"] else ""
    yield (
        f"{summary['images']} images{of_part}{empty}; {len(result.noise_seeds)} noise seeds; every model and number of "
        "steps got the same images and the same noise."
    )
    if summary.get("selected_on_test"):
        names = ", ".join(_cell(name) for name in summary["selected_on_test"])
        yield (
            f"\n**The test part, which is measured here, chose the checkpoint of {names}** "
            "(`training.selection_part`): its figures are optimistic."
        )
    if command:
        yield f"\n```\n{command}\n```"
    yield ""
    yield from _table(
        ["model", "predicts", "timesteps", "input", "folder"],
        (
            [_cell(m.name), m.prediction_type, m.timesteps, "{}x{}".format(*m.input_size), _cell(m.source)]
            for m in result.models
        ),
    )
    if len({model.input_size for model in result.models}) > 1:
        yield "\nModels of other input sizes have other latents: their noise comes from the same keys, but differs."

    yield "\n## Noise and steps\n\n![Dice and disagreement against the number of steps](steps.png)\n"
    yield from _table(
        ["model", "steps", *(heading for _, heading in _NOISE_COLUMNS)],
        (
            [_cell(m.name), steps, *(_figure(result.figure(m.name, steps, key)) for key, _ in _NOISE_COLUMNS)]
            for m in result.models
            for steps in result.steps
        ),
    )
    if summary["empty"]:
        yield "\nShare of seeds that find something in an image whose truth is empty:\n"
        yield from _table(
            ["model", *(_steps(steps) for steps in result.steps)],
            (
                [_cell(m.name), *(_figure(result.figure(m.name, s, "false_positive_share")) for s in result.steps)]
                for m in result.models
            ),
        )
    yield f"\n{_RULES}"

    if summary["differences"]:
        yield "\n## Differences between models\n"
        yield (
            "Second minus first, paired by image and noise seeds; an interval without 0 is a difference that other "
            "images of this kind would show too."
        )
        first = result.models[0].name
        rows = summary["differences"]
        if len(result.models) > _ALL_PAIRS:
            rows = [row for row in rows if row["first"] == first]
            yield f"Each model against {_cell(first)}; `stability.json` holds every pair."
        yield ""
        yield from _table(
            ["first", "second", "steps", *(heading for _, heading in _DIFFERENCE_COLUMNS)],
            (
                [
                    _cell(row["first"]),
                    _cell(row["second"]),
                    row["steps"],
                    *(_figure(row[key], signed=True) for key, _ in _DIFFERENCE_COLUMNS),
                ]
                for row in rows
            ),
        )

    if examples:
        yield "\n## Where the seeds disagree\n"
        yield "Colour: share of the seeds that say foreground. Red: the truth's outline."
        for number, example in enumerate(examples, start=1):
            yield f"\n{example.rank.capitalize()}: `{_cell(example.name)}`, {example.disagreement:.3f}\n"
            yield f"![votes of the seeds for {_cell(example.name)}](disagreement-{number}.png)"

    yield f"\n## Calibration\n\n{_CALIBRATION}\n"
    yield from _table(
        [
            "model",
            "steps",
            *(f"{kind}: {what}" for kind in ("single draw", "mean") for what in ("ECE per image", "ECE pooled", "ACE")),
        ],
        (_calibration_row(result, model, steps) for model in result.models for steps in result.steps),
    )
    yield "\nAbove: share of foreground against probability (dashed: calibrated). Below: share of pixels in each bin."
    for steps in shown:
        yield f"\n![reliability with {_steps(steps)}](reliability-{steps}.png)"


def _calibration_row(result: Stability, model: ComparedModel, steps: int) -> list[Any]:
    cells: list[Any] = [_cell(model.name), steps]
    for key, part in zip(("ece_draw", "ece_mean"), result.calibration[model.name, steps], strict=True):
        errors = (f"{part.expected_error:.4f}", f"{part.average_error:.3f}")
        cells += [_figure(result.figure(model.name, steps, key)), *errors]
    return cells


def _table(heading: Sequence[str], rows: Iterator[list[Any]]) -> Iterator[str]:
    yield f"| {' | '.join(heading)} |"
    yield f"|{' --- |' * len(heading)}"
    for row in rows:
        yield f"| {' | '.join(map(str, row))} |"


def _figure(interval: Mapping[str, Any] | None, *, signed: bool = False) -> str:
    if interval is None:
        return "–"
    sign = "+" if signed else ""
    bounds = "" if interval["low"] is None else f" [{interval['low']:{sign}.4f}, {interval['high']:{sign}.4f}]"
    return f"{interval['mean']:{sign}.4f}{bounds}"


def _steps(count: int) -> str:
    return f"{count} step" if count == 1 else f"{count} steps"


def _cell(text: str) -> str:
    """Text that ends neither a table's cell nor its row."""
    return " ".join(text.replace("|", "\\|").replace("`", "'").replace("<", "&lt;").split())


# --- pictures ---------------------------------------------------------------------------------------------------------


def _steps_figure(result: Stability) -> Figure:
    """Four panels against the number of steps, one line a model with its intervals."""
    figure = _new_figure(9.6, 6.6)
    places = np.arange(len(result.steps))
    lines: list[Any] = []
    for panel, metric in enumerate(_STEP_PANELS):
        axes = figure.add_subplot(2, 2, panel + 1)
        for index, model in enumerate(result.models):
            points = [result.figure(model.name, steps, metric) for steps in result.steps]
            measured = [(place, point) for place, point in zip(places, points, strict=True) if point is not None]
            if not measured:
                continue
            shift = min(0.08, 0.6 / len(result.models)) * (
                index - (len(result.models) - 1) / 2
            )  # beside each other, else the intervals overlap
            mean = np.array([point["mean"] for _, point in measured])
            low = np.array([point["mean"] if point["low"] is None else point["low"] for _, point in measured])
            high = np.array([point["mean"] if point["high"] is None else point["high"] for _, point in measured])
            drawn = axes.errorbar(
                [place + shift for place, _ in measured],
                mean,
                yerr=np.stack([mean - low, high - mean]).clip(min=0),
                color=_COLOURS[index % len(_COLOURS)],
                marker=_MARKERS[index % len(_MARKERS)],
                linestyle="-" if index < len(_COLOURS) else "--",
                markersize=5,
                linewidth=1.6,
                elinewidth=1.1,
                capsize=2.5,
                clip_on=False,  # a spread of 0 is seen whole
            )
            if panel == len(_STEP_PANELS) - 1:
                lines.append((drawn, f"{model.name} ({model.prediction_type})"))
        axes.set_xticks(places, [str(steps) for steps in result.steps])
        axes.set_xlim(-0.5, len(places) - 0.5)
        if metric != "dice_mean":
            axes.set_ylim(bottom=0)
        axes.set_xlabel("reverse steps")
        _style(axes, METRICS[metric])
    legend = figure.legend(
        [line for line, _ in lines], [name for _, name in lines], loc="outside lower center", ncols=min(3, len(lines)),
        frameon=False, fontsize=9.5,
    )  # fmt: skip
    for text in legend.get_texts():
        _plain(text)
    return figure


def _votes_figure(example: Disagreement, result: Stability) -> Figure:
    """A row for the smallest and the largest number of steps: the image (then the truth), and each model's votes."""
    shown = sorted({result.steps[0], result.steps[-1]})
    columns = [*(model.name for model in result.models)]
    size = _shown_size(example.truth.shape)
    picture = np.asarray(Image.fromarray(display_pixels(example.image)).resize(size, Image.Resampling.BICUBIC))
    truth = np.asarray(Image.fromarray(example.truth.astype(np.uint8)).resize(size, Image.Resampling.NEAREST))
    photographs = [("image", picture), ("truth", draw_overlay(picture, truth))]
    side = 2.3
    aspect = min(max(size[1] / size[0], 0.4), 2.5)
    extra = 1 if len(shown) == 1 else 0  # one row only: image and truth stand side by side
    width, height = side * (len(columns) + 1 + extra) + 1.0, side * aspect * len(shown) + 0.35 * len(shown) + 0.5
    figure = _new_figure(width, height)
    grid = figure.subplots(len(shown), len(columns) + 1 + extra, squeeze=False)
    for place, (caption, pixels) in enumerate(photographs):
        axes = grid[0, place] if extra else grid[place, 0]
        axes.imshow(pixels)
        axes.set_title(caption, fontsize=10, color=_TEXT)
    drawn = None
    for row, steps in enumerate(shown):
        for column, name in enumerate(columns):
            axes = grid[row, column + 1 + extra]
            votes = example.votes[name, steps]
            shrunk = np.asarray(Image.fromarray(votes).resize(size, Image.Resampling.BOX))
            drawn = axes.imshow(shrunk, cmap="viridis", vmin=0, vmax=1)
            if truth.any() and not truth.all():
                axes.contour(truth, levels=[0.5], colors=[_OUTLINE], linewidths=1.1)
            title = axes.set_title(f"{_shortened(name)}\n{_steps(steps)}", fontsize=10, color=_TEXT)
            _plain(title)
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_visible(False)
    if drawn is not None:
        bar = figure.colorbar(drawn, ax=grid, shrink=0.9, pad=0.015, ticks=[0, 0.25, 0.5, 0.75, 1])
        bar.set_label("share of seeds that say foreground", fontsize=9.5, color=_TEXT)
        bar.ax.tick_params(labelsize=9, colors=_TEXT)
    heading = figure.suptitle(
        f"{example.name}: {example.rank}, {example.disagreement:.3f}", fontsize=11, color=_TEXT, x=0.01, ha="left"
    )
    _plain(heading)
    return figure


def _reliability_figure(result: Stability, steps: int) -> Figure:
    """A cell a model: share of foreground against the probability, and below it how many pixels each bin holds."""
    across = min(_PANELS_A_ROW, len(result.models))
    down = math.ceil(len(result.models) / across)
    figure = _new_figure(3.3 * across + 0.3, 4.4 * down + 0.4)
    grid = figure.subplots(2 * down, across, squeeze=False, sharex=True, gridspec_kw={"height_ratios": [3, 1.1] * down})
    for axes in grid.flat:
        axes.set_visible(False)
    for index, model in enumerate(result.models):
        row, column = divmod(index, across)
        draws, mean = result.calibration[model.name, steps]
        upper, lower = grid[2 * row, column], grid[2 * row + 1, column]
        for axes in (upper, lower):
            axes.set_visible(True)
        upper.plot([0, 1], [0, 1], color="#9ca3af", linewidth=1.1, linestyle=(0, (4, 3)))
        for part, name, colour, marker in (
            (draws, "single draw", _COLOURS[0], "o"),
            (mean, "mean over seeds", _COLOURS[1], "s"),
        ):
            probability, share, count = _curve(part)
            upper.plot(probability, share, color=colour, marker=marker, markersize=4.5, linewidth=1.5, label=name)
            edges = np.linspace(0, 1, len(count) + 1)
            lower.stairs(count / count.sum(), edges, color=colour, linewidth=1.4)
        upper.set_xlim(-0.03, 1.03)
        upper.set_ylim(-0.03, 1.03)
        lower.set_yscale("log")
        lower.set_ylim(1e-5, 1.5)
        lower.set_yticks([1e-4, 1e-2, 1], ["0.01 %", "1 %", "100 %"])
        lower.minorticks_off()
        lower.set_xlabel("probability")
        if column == 0:
            upper.set_ylabel("share that is foreground")
            lower.set_ylabel("pixels")
        errors = f"ECE {draws.expected_error:.3f} single draw, {mean.expected_error:.3f} mean"
        _style(upper, f"{_shortened(model.name)} ({model.prediction_type})\n{errors}")
        _style(lower, "")
        upper.tick_params(labelbottom=False)
        lower.tick_params(labelbottom=True)
    lines, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9.5)
    figure.suptitle(_steps(steps), fontsize=11, color=_TEXT, x=0.01, ha="left")
    return figure


def _curve(part: Reliability) -> tuple[Any, Any, Any]:
    filled = part.counts > 0
    count = part.counts[filled]
    return part.probability[filled] / count, part.foreground[filled] / count, part.counts


def _new_figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")  # no pyplot: no global state, no display
    FigureCanvasAgg(figure)
    return figure


def _style(axes: Axes, title: str) -> None:
    _plain(axes.set_title(title, loc="left", fontsize=10.5, color=_TEXT))
    axes.tick_params(colors=_TEXT, labelsize=9, length=0, pad=6)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=_TEXT, fontsize=9.5)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("bottom", "left"))
        spine.set_color(_GRID)


def _plain(text: Text) -> None:
    """A file's name is no formula, whatever dollar signs it holds."""
    text.set_parse_math(False)


def _shortened(name: str, length: int = 26) -> str:
    """Both ends are kept: names of runs often differ in their last word."""
    return name if len(name) <= length else f"{name[: length // 2]}…{name[1 - length // 2 :]}"


def _shown_size(shape: Sequence[int]) -> tuple[int, int]:
    """(width, height) that fits the page; small images are enlarged by a whole factor so that outlines stay thin."""
    height, width = shape
    long = max(height, width)
    scale = min(1.0, _LONGEST / long) if long > _LONGEST // 2 else _LONGEST // long
    return max(1, round(width * scale)), max(1, round(height * scale))


def _save(figure: Figure, path: Path) -> None:
    with atomic_path(path) as temporary:
        # No software version in the file: equal figures make equal files.
        figure.savefig(temporary, format="png", dpi=_DENSITY, facecolor="white", metadata={"Software": None})
