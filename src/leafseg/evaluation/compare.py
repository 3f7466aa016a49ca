"""Two evaluations of the same images against each other: paired differences, image by image.

For each class and metric: the mean of second minus first over the images where both are measured, its bootstrap
interval (over groups where they are known), and a Wilcoxon signed-rank test. The test takes its values for independent,
so that with groups it is given one value a group, the mean of its images' differences. Its p-values are corrected after
Holm (1979) for all classes and metrics of the comparison together.
"""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leafseg.errors import DataError
from leafseg.evaluation.evaluate import DISTANCES, METRICS
from leafseg.evaluation.intervals import Interval, bootstrap_mean
from leafseg.files import atomic_path, read_json, write_json_atomic

# 1 where anything was found in an image whose truth is empty; averaged, it is the false-positive rate.
FALSE_POSITIVE = "false_positive_rate"
COMPARED: Mapping[str, str] = {**METRICS, FALSE_POSITIVE: "false-positive rate"}
LOWER_IS_BETTER = (*DISTANCES, FALSE_POSITIVE)

_NEEDED = ("name", "label", "sha256", "empty", "truth_pixels", "predicted_pixels")
_TIE = 1e-6  # the tables hold six digits
_SHOWN = 5

Key = tuple[str, str]  # content and, where that is not unique, name


@dataclass(frozen=True)
class Measured:
    """One image and class as the table holds it; figures that could not be measured are missing."""

    name: str
    group: str
    values: Mapping[str, float]
    missed: bool
    truth_pixels: int


@dataclass(frozen=True)
class StoredEvaluation:
    """An evaluation's folder, read back: rows by class and image."""

    folder: Path
    summary: Mapping[str, Any]
    rows: Mapping[str, Mapping[Key, Measured]]


@dataclass(frozen=True)
class PairedDifference:
    """Second minus first, for one class and metric.

    Attributes:
        n: images where both are measured.
        unit: of a distance.
        first, second: means over these images.
        difference: mean with interval.
        p, p_holm: of the Wilcoxon test, as it is and corrected; None if there is no difference in any image.
        wins, ties, losses: images where the second is better, equal, worse.
    """

    label: str
    metric: str
    n: int
    unit: str | None
    first: float
    second: float
    difference: Interval
    p: float | None
    p_holm: float | None
    wins: int
    ties: int
    losses: int


@dataclass(frozen=True)
class Comparison:
    """What two evaluations share and where they differ.

    Attributes:
        names: of the first and the second.
        summary: everything, as it is stored; also the images that only one of them has (``only_first``,
            ``only_second``), how many each misses (``missed``), and what could not be compared (``notes``).
        dice: by class, of both for each image.
    """

    names: tuple[str, str]
    differences: tuple[PairedDifference, ...]
    summary: dict[str, Any]
    dice: Mapping[str, Sequence[tuple[float, float]]]

    def save(self, folder: Path) -> None:
        """Write ``compare.json``, and ``compare.png`` (Dice of both, image by image) where matplotlib is installed.

        Raises:
            DataError: if the folder cannot be written.
        """
        write_json_atomic(folder / "compare.json", self.summary)
        if self.dice and find_spec("matplotlib") is not None:
            _draw(folder / "compare.png", self.names, self.dice)


def is_evaluation(folder: Path) -> bool:
    """Whether an evaluation was saved there."""
    return (folder / "per_image.csv").is_file() and (folder / "summary.json").is_file()


def read_evaluation(folder: Path) -> StoredEvaluation:
    """What ``leafseg evaluate`` wrote.

    Raises:
        DataError: if the tables are missing or damaged.
    """
    path = folder / "per_image.csv"
    summary = read_json(folder / "summary.json")
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            table = list(csv.DictReader(stream))
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({error}); evaluate again") from error
    if not table:
        raise DataError(f"{path}: holds no image; evaluate again")
    missing = [name for name in _NEEDED if name not in table[0]]
    if missing:
        raise DataError(f"{path}: has no column {missing[0]!r}; evaluate again")
    rows: dict[str, dict[Key, Measured]] = {}
    for label in dict.fromkeys(row["label"] for row in table):
        mine = [row for row in table if row["label"] == label]
        twins = Counter(row["sha256"] for row in mine)
        rows[label] = {}
        for row in mine:
            # The content decides, so that renamed files find each other; of equal images the name does.
            key = (row["sha256"], row["name"] if twins[row["sha256"]] > 1 or not row["sha256"] else "")
            try:
                rows[label][key] = _measured(row)
            except (TypeError, ValueError) as error:
                raise DataError(f"{path}: the line of {row['name']!r} is damaged ({error}); evaluate again") from error
    return StoredEvaluation(folder, summary, rows)


def compare(first: StoredEvaluation, second: StoredEvaluation, *, names: tuple[str, str], seed: int = 0) -> Comparison:
    """Paired differences of two evaluations of the same split.

    Args:
        first, second: what is compared; differences are second minus first.
        names: what to call them.
        seed: of the bootstrap.

    Raises:
        DataError: if they evaluated other data, another split or other classes.
    """
    _check_same_data(first, second)
    left_out, notes = _left_out(first.summary, second.summary)
    obeying = [bool(side.summary.get("presence")) for side in (first, second)]
    if obeying[0] != obeying[1]:
        careful, careless = names if obeying[0] else names[::-1]
        notes.append(
            f"{careful} does not draw what it is nowhere sure of (thresholds of presence), {careless} has no thresholds"
        )
    found: list[PairedDifference] = []
    dice: dict[str, list[tuple[float, float]]] = {}
    missed: dict[str, list[int]] = {}
    only: tuple[set[str], set[str]] = (set(), set())
    for label, one in first.rows.items():
        two = second.rows[label]
        shared = [key for key in one if key in two]
        if not shared:
            raise DataError(f"{second.folder}: shares no image with {first.folder}; evaluate both on the same data")
        differing = next((one[key].name for key in shared if one[key].truth_pixels != two[key].truth_pixels), None)
        if differing is not None:
            raise DataError(
                f"{second.folder}: its truth of {differing!r} ({label}) is not that of {first.folder}; masks or their "
                "reading changed in between, evaluate both again with equal data settings"
            )
        for names_of, mine, other in ((only[0], one, two), (only[1], two, one)):
            names_of |= {measured.name for key, measured in mine.items() if key not in other}
        missed[label] = [sum(side[key].missed for key in shared) for side in (one, two)]
        for metric in COMPARED:
            pairs = [(one[key], two[key]) for key in shared]
            pairs = [(a, b) for a, b in pairs if metric in a.values and metric in b.values]
            if not pairs or metric in left_out:
                continue
            unit = first.summary.get("distance_unit") if metric in DISTANCES else None
            found.append(_paired(label, metric, pairs, unit=unit, seed=seed))
            if metric == "dice":
                dice[label] = [(a.values[metric], b.values[metric]) for a, b in pairs]
    corrected = holm([item.p for item in found])
    differences = tuple(replace(item, p_holm=p) for item, p in zip(found, corrected, strict=True))
    grouped = any(item.difference.groups is not None for item in differences)
    summary = {
        "first": {"name": names[0], "folder": str(first.folder)},
        "second": {"name": names[1], "folder": str(second.folder)},
        "split_sha256": first.summary.get("split_sha256"),
        "part": first.summary.get("part"),
        "differences": [asdict(item) for item in differences],
        "missed": missed,
        "only_first": sorted(only[0]),
        "only_second": sorted(only[1]),
        "notes": notes,
        "interval": f"95 % percentile bootstrap over {'groups' if grouped else 'images'}, 9999 resamples",
        "test": f"Wilcoxon signed-rank over {'means of groups' if grouped else 'images'}, two-sided",
        "correction": f"Holm, for {sum(p is not None for p in corrected)} tests (classes and metrics)",
        "bootstrap_seed": seed,
    }
    return Comparison(names, differences, summary, dice)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction; None stays None and does not count as a test."""
    order = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(order):
        largest = max(largest, min(1.0, p * (len(order) - rank)))
        corrected[index] = largest
    return corrected


def table(comparison: Comparison) -> Iterator[str]:
    """The comparison as lines of text."""
    first, second = comparison.names
    head = ("class", "metric", "n", first, second, "difference", "p (Holm)", "better/equal/worse")
    rows = [head]
    for item in comparison.differences:
        low, high = item.difference.low, item.difference.high
        bounds = "" if low is None or high is None else f" [{low:+.4f}, {high:+.4f}]"
        rows.append(
            (
                item.label,
                COMPARED[item.metric] + (f" ({item.unit})" if item.unit else ""),
                str(item.n),
                f"{item.first:.4f}",
                f"{item.second:.4f}",
                f"{item.difference.mean:+.4f}{bounds}",
                "-" if item.p_holm is None else f"{item.p_holm:.2g}",
                f"{item.wins}/{item.ties}/{item.losses}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    yield f"difference: {second} minus {first}; better, equal, worse: images where {second} is"
    yield "; ".join(str(comparison.summary[key]) for key in ("interval", "test", "correction"))
    for label, (one, two) in comparison.summary["missed"].items():
        if one or two:
            yield f"{label}: {first} misses {one} images altogether, {second} {two}; distances leave these out"
    for name, only in zip(comparison.names, ("only_first", "only_second"), strict=True):
        images = comparison.summary[only]
        if images:
            more = " ..." if len(images) > _SHOWN else ""
            yield f"only in {name}: {len(images)} images ({', '.join(images[:_SHOWN])}{more})"
    yield from comparison.summary["notes"]


def _measured(row: Mapping[str, str]) -> Measured:
    empty, found = row["empty"] == "True", int(row["predicted_pixels"]) > 0
    values = {name: float(row[name]) for name in METRICS if row.get(name)}
    if not all(math.isfinite(value) for value in values.values()):
        raise ValueError("a figure is not finite")
    if empty:
        values[FALSE_POSITIVE] = float(found)
    return Measured(row["name"], row.get("group") or "", values, not empty and not found, int(row["truth_pixels"]))


def _check_same_data(first: StoredEvaluation, second: StoredEvaluation) -> None:
    one, two = (side.summary.get("split_sha256") for side in (first, second))
    if one != two:
        raise DataError(
            f"{second.folder}: its split is {str(two)[:12]}, that of {first.folder} is {str(one)[:12]}; only "
            "evaluations of the same part of the same split can be compared, evaluate both with one --split-file"
        )
    if list(first.rows) != list(second.rows):
        raise DataError(
            f"{second.folder}: its classes are {', '.join(second.rows)}, those of {first.folder} are "
            f"{', '.join(first.rows)}; only models of the same classes can be compared"
        )


def _left_out(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[tuple[str, ...], list[str]]:
    """Metrics that were measured in two ways, and a sentence that says so."""
    units = [side.get("distance_unit") or "none" for side in (first, second)]
    if units[0] != units[1]:
        return (*DISTANCES, "nsd"), [f"distances are not compared: their units are {units[0]} and {units[1]}"]
    tolerances = [side.get("surface_dice_tolerance") for side in (first, second)]
    if tolerances[0] != tolerances[1]:
        return ("nsd",), [f"surface Dice is not compared: its tolerances are {tolerances[0]} and {tolerances[1]}"]
    return (), []


def _paired(
    label: str, metric: str, pairs: Sequence[tuple[Measured, Measured]], *, unit: str | None, seed: int
) -> PairedDifference:
    one, two = (np.array([side.values[metric] for side in sides]) for sides in zip(*pairs, strict=True))
    change = two - one
    change[np.abs(change) <= _TIE] = 0.0  # else a tie would be settled by the tables' last digit
    grouped = any(a.group for a, _ in pairs)
    groups = [a.group or a.name for a, _ in pairs] if grouped else None
    difference = bootstrap_mean(change.tolist(), groups=groups, seed=seed)
    if difference is None:
        raise ValueError("there are no pairs")
    better = -change if metric in LOWER_IS_BETTER else change
    return PairedDifference(
        label=label,
        metric=metric,
        n=len(pairs),
        unit=unit,
        first=float(one.mean()),
        second=float(two.mean()),
        difference=difference,
        p=_wilcoxon(change, groups),
        p_holm=None,
        wins=int((better > 0).sum()),
        ties=int((better == 0).sum()),
        losses=int((better < 0).sum()),
    )


def _wilcoxon(change: NDArray[np.float64], groups: Sequence[str] | None) -> float | None:
    from scipy.stats import wilcoxon

    if groups is not None:
        by_group: dict[str, list[float]] = {}
        for group, value in zip(groups, change.tolist(), strict=True):
            by_group.setdefault(group, []).append(value)
        change = np.array([math.fsum(values) / len(values) for values in by_group.values()])
    return float(wilcoxon(change).pvalue) if change.any() else None


def _draw(path: Path, names: tuple[str, str], dice: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """A panel a class and a dot an image: above the diagonal the second is better."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(dice), 3.9), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)  # no pyplot: no global state, no display
    panels = figure.subplots(1, len(dice), squeeze=False)[0]
    for axes, (label, pairs) in zip(panels, dice.items(), strict=True):
        one, two = zip(*pairs, strict=True)
        low = min(0.9, math.floor(10 * min(*one, *two)) / 10) - 0.02
        axes.plot((low, 1.02), (low, 1.02), color="#9ca3af", linewidth=1, zorder=1)
        axes.scatter(one, two, s=16, color="#0f766e", alpha=0.6, linewidths=0, zorder=2)
        axes.set(xlim=(low, 1.02), ylim=(low, 1.02), aspect="equal")
        axes.set_title(_plain(label), fontsize=10.5)
        axes.set_xlabel(_plain(f"Dice, {names[0]}"))
        axes.set_ylabel(_plain(f"Dice, {names[1]}"))
        axes.spines[["top", "right"]].set_visible(False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def _plain(text: str) -> str:
    """Text that matplotlib does not take for a formula."""
    return text.replace("$", r"\$")
