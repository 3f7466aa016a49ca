"""Tables and a plot of an ablation, made from the records of its runs; what was not run says so.

Intervals resample test images and training seeds together. Differences are paired: the same images, the same seed.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leafseg.evaluation.intervals import Interval, bootstrap_seeds_and_images
from leafseg.files import atomic_path, write_text_atomic

NOT_RUN = "not run"
_COLOURS = ("#0f766e", "#b45309", "#4338ca", "#be123c", "#4d7c0f", "#7e22ce")

Cell = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class CellScore:
    """Dice of one cell on one data set, over all seeds that were run.

    Attributes:
        dice: mean over seeds and images; None if nothing was run.
        by_seed: mean Dice of each seed that was run.
        seeds: how many were asked for.
    """

    data: str
    cell: Cell
    dice: Interval | None
    by_seed: Mapping[int, float]
    seeds: int


@dataclass(frozen=True)
class Difference:
    """Dice of ``value`` minus Dice of ``baseline`` of one setting, all else equal, on the same images and seeds."""

    data: str
    setting: str
    value: Any
    baseline: Any
    others: Cell
    dice: Interval | None
    seeds: int


class Ablation:
    """The records of a grid.

    Args:
        records: as :mod:`leafseg.ablate` writes them.
        axes: (setting, values); the first value is the baseline.
        data: names of the data sets, in the tables' order.
        seeds: all that were asked for.
        steps: reverse steps whose evaluation is shown.
    """

    def __init__(
        self,
        records: Sequence[Mapping[str, Any]],
        *,
        axes: Sequence[tuple[str, Sequence[Any]]],
        data: Sequence[str],
        seeds: Sequence[int],
        steps: int = 1,
    ) -> None:
        self.axes, self.data, self.seeds, self.steps = list(axes), list(data), list(seeds), steps
        self.records = list(records)
        self._dice: dict[tuple[str, str, int], Mapping[str, float | None]] = {
            (row["data"], _key(tuple(row["cell"].items())), row["seed"]): row["evaluations"][str(steps)]["dice"]
            for row in records
            if str(steps) in row["evaluations"]
        }

    @property
    def cells(self) -> list[Cell]:
        cells: list[Cell] = [()]
        for setting, values in self.axes:
            cells = [(*cell, (setting, value)) for cell in cells for value in values]
        return cells

    def scores(self) -> list[CellScore]:
        return [self._score(name, cell) for cell in self.cells for name in self.data]

    def _score(self, data: str, cell: Cell) -> CellScore:
        runs = self._runs(data, cell)
        matrix = _matrix(list(runs.values()))
        return CellScore(
            data=data,
            cell=cell,
            dice=bootstrap_seeds_and_images(matrix) if runs else None,
            by_seed={seed: float(row.mean()) for seed, row in zip(runs, matrix, strict=True)},
            seeds=len(self.seeds),
        )

    def differences(self) -> list[Difference]:
        """Every other value of every setting against its first, for each combination of the remaining settings."""
        found = []
        for setting, values in self.axes:
            others = [cell for cell in self.cells if dict(cell)[setting] == values[0]]
            for value in values[1:]:
                for cell in others:
                    changed = tuple((name, value if name == setting else old) for name, old in cell)
                    rest = tuple(item for item in cell if item[0] != setting)
                    found += [self._difference(name, setting, cell, changed, rest) for name in self.data]
        return found

    def _difference(self, data: str, setting: str, base: Cell, changed: Cell, rest: Cell) -> Difference:
        before, after = self._runs(data, base), self._runs(data, changed)
        shared = [seed for seed in self.seeds if seed in before and seed in after]
        interval = None
        if shared:
            names = before[shared[0]].keys() & after[shared[0]].keys()
            pairs = [({n: before[s][n] for n in names}, {n: after[s][n] for n in names}) for s in shared]
            matrix = _matrix([pair[1] for pair in pairs]) - _matrix([pair[0] for pair in pairs])
            interval = bootstrap_seeds_and_images(matrix)
        return Difference(data, setting, dict(changed)[setting], dict(base)[setting], rest, interval, len(shared))

    def _runs(self, data: str, cell: Cell) -> dict[int, Mapping[str, float | None]]:
        keys = ((seed, (data, _key(cell), seed)) for seed in self.seeds)
        return {seed: self._dice[key] for seed, key in keys if key in self._dice}


def normalised(value: Any) -> Any:
    """A setting's value in the one form that it is compared and named by: 0.0 is 0, also inside a list.

    Booleans stay what they are.
    """
    if isinstance(value, list | tuple):
        return [normalised(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _key(cell: Cell) -> str:
    return json.dumps(sorted((name, normalised(value)) for name, value in cell))


def _matrix(runs: Sequence[Mapping[str, float | None]]) -> NDArray[np.float64]:
    """``[seeds, images]`` without the images whose truth is empty, which are the same in every run."""
    if not runs:
        return np.zeros((0, 0))
    names = sorted(name for name, dice in runs[0].items() if dice is not None)
    return np.array([[run[name] for name in names] for run in runs], dtype=np.float64)


def short(setting: str) -> str:
    return setting.rsplit(".", 1)[-1]


def interval_text(interval: Interval | None, *, signed: bool = False) -> str:
    if interval is None:
        return NOT_RUN
    sign = "+" if signed else ""
    bounds = "" if interval.low is None else f" [{interval.low:{sign}.3f}, {interval.high:{sign}.3f}]"
    return f"{interval.mean:{sign}.3f}{bounds}"


def _score_text(score: CellScore) -> str:
    text = interval_text(score.dice)
    return text if len(score.by_seed) in (0, score.seeds) else f"{text} ({len(score.by_seed)} of {score.seeds} seeds)"


def markdown(ablation: Ablation) -> str:
    """The grid and the paired differences as Markdown tables."""
    names = [short(setting) for setting, _ in ablation.axes]
    done = len(ablation.records)
    total = len(ablation.cells) * len(ablation.data) * len(ablation.seeds)
    lines = [
        f"{done} of {total} runs are recorded{_training(ablation.records)}. Mean Dice over images with a non-empty "
        f"mask, at original resolution, {ablation.steps} reverse step{'s' if ablation.steps > 1 else ''}; 95 % "
        f"bootstrap intervals over {_parts(ablation.records)} images and seeds "
        f"({', '.join(map(str, ablation.seeds))}).{_selection(ablation.records)}",
        "",
        *_table([*names, *ablation.data], _score_rows(ablation)),
        "Paired differences (same images, same seed): the value's Dice minus the baseline's.",
        "",
        *_table(["setting", "value", "baseline", "with", *ablation.data], _difference_rows(ablation)),
    ]
    return "\n".join(lines)


def _training(records: Sequence[Mapping[str, Any]]) -> str:
    """`` (leaf-tiny, 330 optimizer steps)``, as far as the records say so."""
    presets = sorted({str(row["preset"]) for row in records if row.get("preset") is not None})
    steps = sorted({int(row["steps"]) for row in records if row.get("steps") is not None})
    found = [" and ".join(presets)] if presets else []
    if steps:
        found.append(f"{' and '.join(map(str, steps))} optimizer step{'' if steps == [1] else 's'}")
    return f" ({', '.join(found)})" if found else ""


def _parts(records: Sequence[Mapping[str, Any]]) -> str:
    return " and ".join(sorted({_part(row) for row in records})) or "test"


def _part(row: Mapping[str, Any]) -> str:
    return str(row.get("part", "test"))


def _selection(records: Sequence[Mapping[str, Any]]) -> str:
    """A sentence where the shown images chose checkpoints; nothing elsewhere."""
    chosen = sum(bool(row.get("selected_on_test")) and _part(row) in ("test", "all") for row in records)
    if not chosen:
        return ""
    which = "" if chosen == len(records) else f" of {chosen} of the runs"
    return (
        f" The checkpoints{which} were chosen on the test part, which is shown here (training.selection_part): their "
        "figures are optimistic."
    )


def _score_rows(ablation: Ablation) -> Iterator[list[str]]:
    scores = {(score.data, score.cell): score for score in ablation.scores()}
    for cell in ablation.cells:
        yield [*(str(value) for _, value in cell), *(_score_text(scores[name, cell]) for name in ablation.data)]


def _difference_rows(ablation: Ablation) -> Iterator[list[str]]:
    rows: dict[tuple[str, ...], list[str]] = {}
    for item in ablation.differences():
        others = ", ".join(f"{short(name)} {value}" for name, value in item.others)
        head = (short(item.setting), str(item.value), str(item.baseline), others or "-")
        text = interval_text(item.dice, signed=True)
        missing = len(ablation.seeds) - item.seeds
        if item.dice is not None and missing:
            text += f" ({item.seeds} of {len(ablation.seeds)} seeds)"
        rows.setdefault(head, []).append(text)
    for names, texts in rows.items():
        yield [*names, *texts]


def _table(head: list[str], rows: Iterator[list[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)] + [""]


def csv_table(ablation: Ablation) -> str:
    """One line a cell, data set and statistic kind (score or difference)."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["kind", "data", *(setting for setting, _ in ablation.axes), "minus", "dice", "low", "high", "images", "seeds"]
    )
    for score in ablation.scores():
        values = [value for _, value in score.cell]
        writer.writerow(["score", score.data, *values, "", *_numbers(score.dice), len(score.by_seed)])
    for item in ablation.differences():
        cell = {**dict(item.others), item.setting: item.value}
        values = [cell[setting] for setting, _ in ablation.axes]
        minus = f"{item.setting}={item.baseline}"
        writer.writerow(["difference", item.data, *values, minus, *_numbers(item.dice), item.seeds])
    return text.getvalue()


def _numbers(interval: Interval | None) -> list[str]:
    if interval is None:
        return ["", "", "", "0"]
    values = asdict(interval)
    return [*("" if values[k] is None else f"{values[k]:.5f}" for k in ("mean", "low", "high")), str(interval.n)]


def latex(ablation: Ablation) -> str:
    """The grid as a LaTeX table (booktabs): Dice in percent with the half-width of its interval."""
    head = " & ".join(_escaped(text) for text in [*(short(s) for s, _ in ablation.axes), *ablation.data])
    lines = [
        f"% Dice in percent, mean over seeds {', '.join(map(str, ablation.seeds))}; below: 95 % bootstrap interval.",
        rf"\begin{{tabular}}{{{'l' * len(ablation.axes)}{'c' * len(ablation.data)}}}",
        r"\toprule",
        head + r" \\",
        r"\midrule",
    ]
    scores = {(score.data, score.cell): score for score in ablation.scores()}
    for cell in ablation.cells:
        texts = [_escaped(str(value)) for _, value in cell]
        for name in ablation.data:
            dice = scores[name, cell].dice
            bounds = ""
            if dice is not None and dice.low is not None and dice.high is not None:
                bounds = f"_{{[{100 * dice.low:.1f}, {100 * dice.high:.1f}]}}"
            texts.append("--" if dice is None else f"${100 * dice.mean:.1f}{bounds}$")
        lines.append(" & ".join(texts) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _escaped(text: str) -> str:
    for character in "\\&%$#_{}":
        text = text.replace(character, {"\\": r"\textbackslash "}.get(character, "\\" + character))
    return text


def plot(ablation: Ablation, path: Path) -> None:
    """Left: Dice of every cell, a small dot a seed. Right: paired differences. One row a data set."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    scores, differences = ablation.scores(), ablation.differences()
    rows = len(ablation.data)
    height = max(len(ablation.cells), len(differences) // max(rows, 1))
    figure, axes = plt.subplots(
        rows, 2, figsize=(13, rows * (0.34 * height + 1.1)), squeeze=False, layout="constrained"
    )
    first, values = ablation.axes[0]
    colours = {json.dumps(value): _COLOURS[i % len(_COLOURS)] for i, value in enumerate(values)}
    for row, name in enumerate(ablation.data):
        left, right = axes[row]
        mine = [score for score in scores if score.data == name]
        for y, score in enumerate(mine):
            colour = colours[json.dumps(dict(score.cell)[first])]
            left.scatter(list(score.by_seed.values()), [y] * len(score.by_seed), s=14, color=colour, alpha=0.5)
            _bar(left, score.dice, y, colour)
        _label(left, [", ".join(f"{short(s)} {v}" for s, v in score.cell) for score in mine])
        left.set_title(f"{name}: Dice", loc="left")
        paired = [item for item in differences if item.data == name]
        for y, item in enumerate(paired):
            cell = {**dict(item.others), item.setting: item.value}
            _bar(right, item.dice, y, colours[json.dumps(cell[first])])
        _label(
            right,
            [
                f"{short(i.setting)} {i.value} - {i.baseline}" + "".join(f", {short(s)} {v}" for s, v in i.others)
                for i in paired
            ],
        )
        if right.lines:
            right.axvline(0, color="#6b7280", linewidth=1, zorder=0)
        right.set_title(f"{name}: paired difference in Dice", loc="left")
    figure.suptitle(
        f"{ablation.steps} reverse step(s); 95 % bootstrap intervals over images and seeds",
        fontsize=10,
        color="#4b5563",
    )
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)
    plt.close(figure)


def _bar(axes: Any, interval: Interval | None, y: int, colour: str) -> None:
    if interval is None:
        axes.annotate(NOT_RUN, (0.5, y), xycoords=("axes fraction", "data"), va="center", ha="center", color="#9ca3af")
        return
    if interval.low is not None and interval.high is not None:
        axes.plot([interval.low, interval.high], [y, y], color=colour, linewidth=2, solid_capstyle="round")
    axes.plot([interval.mean], [y], "o", color=colour, markersize=7, markeredgecolor="white")


def _label(axes: Any, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.set_ylim(max(len(names), 1) - 0.5, -0.5)
    if not axes.lines:  # nothing was run: any scale would be made up
        axes.set_xticks([])
    axes.grid(axis="x", color="#e5e7eb")
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)


def write_report(
    out: Path,
    records: Sequence[Mapping[str, Any]],
    *,
    axes: Sequence[tuple[str, Sequence[Any]]],
    data: Sequence[str],
    seeds: Sequence[int],
    inference_steps: Sequence[int],
) -> Path:
    """Write ``ablation.md``, ``.csv``, ``.tex`` and, where matplotlib is installed, ``.png`` into ``out``.

    Raises:
        DataError: if ``out`` cannot be written.
    """
    parts = [Ablation(records, axes=axes, data=data, seeds=seeds, steps=steps) for steps in inference_steps]
    text = ["# Ablation", "", "Research software, not a medical device.", ""]
    for part in parts:
        text += [f"## {part.steps} reverse step{'s' if part.steps > 1 else ''}", "", markdown(part)]
    write_text_atomic(out / "ablation.csv", csv_table(parts[0]))
    write_text_atomic(out / "ablation.tex", latex(parts[0]))
    if find_spec("matplotlib") is not None:
        plot(parts[0], out / "ablation.png")
        text += ["![Dice and paired differences](ablation.png)", ""]
    else:
        text += ['No plot: matplotlib is not installed (pip install "leafseg[report]").', ""]
    write_text_atomic(out / "ablation.md", "\n".join(text))
    return out / "ablation.md"
