"""Write docs/results/recipe.md from recipe.jsonl and the plans; a cell that was not run says so.

.venv/bin/python experiments/recipe_tables.py
"""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

import numpy as np
from recipe import PLANS, RECORDS, read_records, record_of, units_of

from leafseg.evaluation.intervals import Interval, bootstrap_seeds_and_images

PAGE = RECORDS.parent / "recipe.md"
IDEAS = PLANS.parent / "recipe_ideas.md"
NOT_RUN = "not run"
METRICS = {"Dice": 2, "IoU": 3, "surface Dice at 2 px": 4}  # column of a record's rows


def images_of(record: dict[str, Any], *, steps: int | str = 1, column: int = 2) -> dict[str, float]:
    """Each image's figure, the mean over its classes; images where none can be measured are left out."""
    found = defaultdict(list)
    for row in record["evaluations"][str(steps)]["rows"]:
        if row[column] is not None:
            found[row[0]].append(row[column])
    return {name: float(np.mean(values)) for name, values in found.items()}


def matrix(records: list[dict[str, Any]], **options: Any) -> np.ndarray:
    """``[seeds, images]``; every record measured the same images."""
    runs = [images_of(record, **options) for record in records]
    names = sorted(set.intersection(*(set(run) for run in runs))) if runs else []
    return np.array([[run[name] for name in names] for run in runs])


def text(interval: Interval | None, *, signed: bool = False) -> str:
    if interval is None:
        return NOT_RUN
    sign = "+" if signed else ""
    bounds = "" if interval.low is None else f" [{interval.low:{sign}.3f}, {interval.high:{sign}.3f}]"
    return f"{interval.mean:{sign}.3f}{bounds}"


def paired(these: list[dict[str, Any]], those: list[dict[str, Any]], **options: Any) -> np.ndarray | None:
    """These minus those, ``[seeds, images]``, of the seeds that both have; None where no seed has both."""
    pairs = [(one, other) for one in these for other in those if one["seed"] == other["seed"]]
    if not pairs:
        return None
    one, other = (matrix([pair[k] for pair in pairs], **options) for k in (0, 1))
    return np.asarray(one - other)


def difference(these: list[dict[str, Any]], those: list[dict[str, Any]], **options: Any) -> Interval | None:
    """Of :func:`paired`."""
    gain = paired(these, those, **options)
    return None if gain is None else bootstrap_seeds_and_images(gain)


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)] + [""]


def empty_text(records: list[dict[str, Any]]) -> str:
    figures = [record["evaluations"]["1"] for record in records]
    empty = sum(figure["empty"] for figure in figures)
    return f"{sum(figure['false_positives'] for figure in figures)} of {empty}" if empty else ""


def _seeds_note(cells: list[list[dict[str, Any]]]) -> str:
    """What the intervals hold besides the images, by the seeds that each recorded cell has."""
    counts = {len(records) for records in cells}
    if not counts or counts == {1}:
        return " (one seed: the spread of trainings is not in them)"
    return " and seeds" + (" (cells of one seed: over images alone)" if 1 in counts else "")


def section(plan: dict[str, Any], records: list[dict[str, Any]]) -> list[str]:
    units = units_of(plan)
    mine: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for unit in units:
        record = record_of(unit, records)
        if record is not None:
            mine[unit["variant"], unit["data"]].append(record)
    done = sum(map(len, mine.values()))
    steps = json.dumps(plan["steps"]).strip('"')
    seeds = ", ".join(map(str, plan["seeds"]))
    lines = [f"## {plan['title']}", "", plan["text"], ""]
    if "base" in plan:
        shared = [*plan["base"], *plan.get("common", [])]
        lines += [f"All variants stand on `leaf-tiny` with `{' '.join(shared)}`.", ""]
    lines += [
        f"{done} of {len(units)} trainings are recorded; {steps} optimizer steps, seeds {seeds}; figures on the "
        f"{plan['part']} part at original resolution, with 95 % bootstrap intervals over images"
        f"{_seeds_note(list(mine.values()))}.",
        "",
    ]
    if computers := sorted({record["hardware"] for records_ in mine.values() for record in records_}):
        lines[-2] = lines[-2].removesuffix(".") + f"; computed on {'; '.join(computers)}."
    rows = []
    for name in plan["order"]:
        cells = [name, "; ".join(plan["variants"][name]).replace("objective.", "").replace("training.", "") or "-"]
        reference = plan.get("references", {}).get(name, plan["reference"])
        for data in plan["data"]:
            got = mine[name, data]
            cells.append(text(bootstrap_seeds_and_images(matrix(got)) if got else None))
            gain = difference(got, mine[reference, data]) if name != reference else None
            cells.append("reference" if name == reference else text(gain, signed=True))
        cells.append(", ".join(t for data in plan["data"] if (t := empty_text(mine[name, data]))))
        speeds = [record["samples_per_second"] for data in plan["data"] for record in mine[name, data]]
        cells += [f"{np.median(speeds):.1f}" if speeds else NOT_RUN, plan.get("verdict", {}).get(name, "")]
        rows.append(cells)
    head = ["variant", "settings", *(h for data in plan["data"] for h in (f"{data}: Dice", "against the reference"))]
    lines += table([*head, "found in empty", "samples/s", "verdict"], rows)
    for metric in plan.get("metrics", []):
        rows = [
            [name, *(text(bootstrap_seeds_and_images(matrix(mine[name, data], column=METRICS[metric])))
                     if mine[name, data] else NOT_RUN for data in plan["data"])]
            for name in plan["order"]
        ]  # fmt: skip
        lines += [f"{metric}:", "", *table(["variant", *plan["data"]], rows)]
    for name, counts in plan.get("inference_steps", {}).items():
        for steps_here in counts[1:]:
            rows = [
                [data, text(bootstrap_seeds_and_images(matrix(mine[name, data], steps=steps_here)))]
                for data in plan["data"] if mine[name, data]
            ]  # fmt: skip
            lines += [f"{name}, {steps_here} reverse steps:", "", *table(["data", "Dice"], rows or [["all", NOT_RUN]])]
    for name, flips in plan.get("flips", {}).items():
        rows = []
        for data in plan["data"]:
            got = [record for record in mine[name, data] if "flips" in record["evaluations"]]
            if got:
                gain = matrix(got, steps="flips") - matrix(got)
                rows.append([data, text(bootstrap_seeds_and_images(gain), signed=True)])
        lines += [f"{name}, averaged over mirrored images ({flips}) against the plain image:", ""]
        lines += table(["data", "Dice gained"], rows or [["all", NOT_RUN]])
    if plan.get("presence"):
        lines += ["With the thresholds, and with `--keep-unsure`:", "", *presence_table(plan, mine)]
    for one, other in plan.get("pooled", []):
        gains = [gain for d in plan["data"] if (gain := paired(mine[one, d], mine[other, d])) is not None]
        fewest = min((len(gain) for gain in gains), default=0)
        shared = f" ({fewest} seed{'s' if fewest > 1 else ''})" if 0 < fewest < len(plan["seeds"]) else ""
        lines += [f"Over the sets, {one} minus {other}{shared}: {pooled(gains, len(plan['data']))}.", ""]
    return lines


def presence_table(plan: dict[str, Any], mine: dict[tuple[str, str], list[dict[str, Any]]]) -> list[str]:
    """Each training's thresholds and what they change; a training without any is a row of its own."""
    rows = []
    for name in plan["order"]:
        for data in plan["data"]:
            for record in mine[name, data]:
                used, plain = (record["evaluations"].get(k, record["evaluations"]["1"]) for k in ("1", "keep unsure"))
                dice = [float(np.mean(list(images_of({"evaluations": {"1": one}}).values()))) for one in (used, plain)]
                missed = [sum(c["missed"] for c in one["classes"].values()) for one in (used, plain)]
                empty = used["empty"]
                rows.append([
                    name, data, str(record["seed"]), ", ".join(f"{t:g}" for t in record["presence"]) or "none",
                    *(f"{one['false_positives']} of {empty}" for one in (used, plain)),
                    *map(str, missed), *(f"{d:.4f}" for d in dice),
                ])  # fmt: skip
    head = ["variant", "data", "seed", "threshold", "found in empty", "kept", "missed", "kept", "Dice", "kept"]
    return table(head, rows or [["all", *[NOT_RUN] * (len(head) - 1)]])


def pooled(gains: list[np.ndarray], wanted: int) -> str:
    """Mean over data sets of the mean paired difference; images are drawn anew within each set, and seeds."""
    if not gains:
        return NOT_RUN
    generator = np.random.default_rng(0)
    draws = []
    for _ in range(9999):
        means = []
        for gain in gains:
            seeds = generator.integers(0, gain.shape[0], gain.shape[0])
            images = generator.integers(0, gain.shape[1], gain.shape[1])
            means.append(gain[seeds][:, images].mean())
        draws.append(np.mean(means))
    low, high = np.percentile(draws, (2.5, 97.5))
    sets = "" if len(gains) == wanted else f" ({len(gains)} of {wanted} sets)"
    return f"{np.mean([gain.mean() for gain in gains]):+.3f} [{low:+.3f}, {high:+.3f}]{sets}"


def main() -> None:
    records = read_records()
    plans = json.loads(PLANS.read_text())
    splits = sorted({(row["data"], row["split_sha256"][:12]) for row in records})
    lines = [
        "# The recipe: what helps, measured",
        "",
        "Written by `experiments/recipe_tables.py` from `recipe.jsonl` and `experiments/recipe_plans.json`; do not",
        "edit by hand. Research software, not a medical device.",
        "",
        "All trainings are of `leaf-tiny` at 128 px and batch 16 unless a variant says otherwise, with the data,",
        "split, augmentation, schedule, averaged weights and evaluation of one harness; a variant changes the settings",
        "beside it and no others. What was chosen was chosen on validation parts (how strides 4 and 2 came",
        "about: below). Made by",
        "",
        "```",
        *(f".venv/bin/python experiments/recipe.py DATA --plan {plan['name']} --out RUNS" for plan in plans),
        "```",
        "",
        f"Splits: {'; '.join(f'{name} {sha}' for name, sha in splits)}. Other work shared the machines (on the GPU",
        "up to 15 other trainings: `--jobs 16`), so that samples/s are no measure of cost.",
        "",
    ]
    for plan in plans:
        lines += section(plan, records)
    lines.append(IDEAS.read_text())
    PAGE.write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
