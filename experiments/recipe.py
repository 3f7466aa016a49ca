"""One line of the recipe page: a training with some settings, evaluated, recorded in docs/results/recipe.jsonl.

    .venv/bin/python experiments/recipe.py DATA --plan screening --out SCRATCH    # ideas, on validation parts
    .venv/bin/python experiments/recipe.py DATA --plan final --out SCRATCH        # the final table, on test parts

DATA holds the data sets. Every unit is resumable: called again, the script continues the unit that was cut short and
leaves recorded ones out. Units of a plan (experiments/recipe_plans.json) run in its order; ``--list`` shows them.
``--jobs 14`` runs so many at once, each in a process of its own: for a GPU that one small model leaves idle.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "docs" / "results" / "recipe.jsonl"
PLANS = ROOT / "experiments" / "recipe_plans.json"


def read_records(*more: Path) -> list[dict[str, Any]]:
    """All recorded rows, those of other files too."""
    files = [path for path in dict.fromkeys((RECORDS, *more)) if path.is_file()]
    return [json.loads(line) for path in files for line in path.read_text().splitlines()]


def units_of(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """The plan's trainings in order: variant by variant within a seed, or with ``data_first`` set by set.

    A variant ``taken_from`` another plan is that plan's training: the same settings are not trained twice.
    """
    units = []
    for seed in plan["seeds"]:
        pairs = [(name, data) for name in plan["order"] for data in plan["data"]]
        if plan.get("data_first"):
            pairs.sort(key=lambda pair: (pair[0] in plan.get("last", []), plan["data"].index(pair[1])))
        for name, data in pairs:
            wanted = seed in plan.get("seeds_of", {}).get(name, plan["seeds"])
            if wanted and data in plan.get("only", {}).get(name, plan["data"]):
                units.append(
                    {
                        "plan": plan.get("taken_from", {}).get(name, plan["name"]),
                        "variant": name,
                        "data": data,
                        "seed": seed,
                        "part": plan["part"],
                        "steps": _steps(plan, name, data),
                        "set": [
                            *plan.get("common", []),
                            *plan.get("data_settings", {}).get(data, []),
                            *plan["variants"][name],
                        ],
                        "inference_steps": plan.get("inference_steps", {}).get(name, [1]),
                    }
                )
    return units


def _steps(plan: dict[str, Any], variant: str, data: str) -> int:
    """Optimizer steps: the plan's, of a data set where it names some, unless the variant has its own."""
    usual = plan["steps"][data] if isinstance(plan["steps"], dict) else plan["steps"]
    return int(plan.get("steps_of", {}).get(variant, usual))


def record_of(unit: dict[str, Any], records: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The first record of this very unit; None if it was not run."""
    return next((row for row in records if all(row.get(key) == value for key, value in unit.items())), None)


def run(
    unit: dict[str, Any],
    data: Path,
    out: Path,
    *,
    base: Sequence[str] = (),
    flips: str | None = None,
    teacher: Path | None = None,
) -> dict[str, Any] | None:
    """Train and evaluate in this process, as `leafseg train` and `leafseg evaluate` do; None if a signal stopped it.

    Args:
        unit: of :func:`units_of`.
        data, out: the data set's folder, and where runs and cached features go.
        base: settings below the unit's: what the preset said when the plan began.
        flips: asks for a second evaluation, averaged over mirrored images.
        teacher: the preset's teacher, as a folder, where its package is not installed.
    """
    from leafseg.config import load_settings
    from leafseg.data.manifest import load_manifest
    from leafseg.ensemble import FlippedSegmenter, load_single
    from leafseg.evaluation.evaluate import evaluate
    from leafseg.training.run import hardware, library_versions, run_training

    cache = f"teacher.cache_dir={out / 'features'}"
    extra = [f"training.seed={unit['seed']}", f"training.steps={unit['steps']}", cache]
    named = [f"teacher.name={teacher}"] if teacher else []
    settings = load_settings("leaf-tiny", overrides=[*base, *named, *unit["set"], *extra])
    folder = out / f"{unit['plan']}-{unit['data']}-{unit['variant']}-{unit['seed']}"
    began = time.time()
    result = run_training(settings, data, folder, resume=True)
    if result.status != "finished":
        return None
    seconds = time.time() - began
    began = time.time()
    part = load_manifest(data, settings=settings.data, run_split=folder / "split.csv").part(unit["part"])
    evaluations = {}
    first = unit["inference_steps"][0]
    presence = load_single(str(folder)).presence
    wanted = [(str(steps), steps, None, presence) for steps in unit["inference_steps"]]
    wanted += [("flips", first, flips, presence)] if flips else []
    wanted += [("keep unsure", first, None, ())] if presence else []
    for name, steps, mirrored, thresholds in wanted:
        segmenter = load_single(str(folder), num_inference_steps=steps)
        segmenter.presence = thresholds
        found = evaluate(FlippedSegmenter(segmenter, mirrored) if mirrored else segmenter, part)
        evaluations[name] = {
            "classes": found.summary["classes"],
            "rows": [
                [row.name, row.label, *(None if v is None else round(v, 5) for v in (row.dice, row.iou, row.nsd))]
                for row in found.rows
            ],
            "false_positives": sum(row.predicted_pixels > 0 for row in found.rows if row.empty),
            "empty": sum(row.empty for row in found.rows),
        }
    record = json.loads((folder / "run.json").read_text())["record"]
    row = {
        "experiment": "recipe",
        **unit,
        "split_sha256": record["split_sha256"],
        "samples": record["samples"],
        "best_step": result.best_step,
        "validation_score": result.best_score,
        "seconds": round(seconds, 1),
        "evaluation_seconds": round(time.time() - began, 1),
        "samples_per_second": round(result.samples_per_second, 2),
        "teacher": teacher.name if teacher and record.get("teacher") == str(teacher) else record.get("teacher"),
        "commit": _commit(),
        "versions": library_versions(),
        "hardware": f"{hardware()}, {os.cpu_count()} cores",
        "presence": list(presence),
        "evaluations": evaluations,
    }
    shutil.rmtree(folder)
    return row


def _commit() -> str:
    """Of this checkout; a copy without git is told in RECIPE_COMMIT."""
    if "RECIPE_COMMIT" in os.environ:
        return os.environ["RECIPE_COMMIT"]
    return subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()


def _store(row: dict[str, Any], records: Path) -> None:
    records.parent.mkdir(parents=True, exist_ok=True)
    with records.open("a") as stream:
        stream.write(json.dumps(row) + "\n")
    first = row["evaluations"][str(row["inference_steps"][0])]["classes"]
    dice = {name: round(figures["dice"]["mean"], 4) for name, figures in first.items() if figures["dice"]}
    took = f"{row['seconds']} s and {row['evaluation_seconds']} s"
    print("DONE", row["data"], row["variant"], row["seed"], dice, took, flush=True)


def _arguments_of(unit: dict[str, Any], plan: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "unit": unit,
        "data": arguments.data / unit["data"],
        "out": arguments.out,
        "base": plan.get("base", []),
        "flips": plan.get("flips", {}).get(unit["variant"]),
        "teacher": arguments.teacher,
    }


def _start_worker() -> None:
    import torch

    torch.set_num_threads(1)  # the processes fill the cores
    logging_to_stderr()


def at_once(units: list[dict[str, Any]], plans: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Run units in ``--jobs`` processes; their rows are stored as they come."""
    deadline = None if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
    waiting, running = list(units), dict[Future[dict[str, Any] | None], dict[str, Any]]()
    with ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("spawn"), _start_worker) as pool:
        while waiting or running:
            while waiting and len(running) < arguments.jobs and (deadline is None or time.monotonic() < deadline):
                try:
                    future = pool.submit(run, **_arguments_of(waiting[0], plans[waiting[0]["plan"]], arguments))
                except BrokenProcessPool as error:  # a killed process ends the pool; what is recorded stays
                    print(f"FAILED: a training process was killed ({error})", flush=True)
                    deadline = 0.0
                    break
                running[future] = waiting.pop(0)
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                unit = running.pop(future)
                try:
                    row = future.result()
                except Exception as error:  # one idea that cannot be trained must not cost the others
                    print(f"FAILED {unit['data']} {unit['variant']} {unit['seed']}: {error!r}", flush=True)
                    continue
                if row is not None:
                    _store(row, arguments.records)
    print(f"{len(waiting)} units were not begun")


def main() -> None:
    """Train what the plans name and what is not recorded yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of data sets")
    parser.add_argument(
        "--plan", required=True, nargs="+", help="plans in experiments/recipe_plans.json, in this order"
    )
    parser.add_argument("--out", type=Path, required=True, help="runs and cached features")
    parser.add_argument("--list", action="store_true", help="what is done and what is missing")
    parser.add_argument("--minutes", type=float, help="begin no unit after so many minutes")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at once")
    parser.add_argument("--teacher", type=Path, help="folder of the teacher, where its package is not installed")
    parser.add_argument("--records", type=Path, default=RECORDS, help="where rows are appended")
    arguments = parser.parse_args()
    logging_to_stderr()
    began, failed = time.monotonic(), set()
    while True:
        # Read anew each time, so that a plan may grow while it runs.
        plans = {plan["name"]: plan for plan in json.loads(PLANS.read_text())}
        if unknown := set(arguments.plan) - set(plans):
            sys.exit(f"--plan is {', '.join(unknown)}; known are {', '.join(plans)}")
        units = [unit for name in arguments.plan for unit in units_of(plans[name])]
        units = [unit for place, unit in enumerate(units) if unit not in units[:place]]
        records = read_records(arguments.records)
        missing = [unit for unit in units if record_of(unit, records) is None]
        if arguments.list:
            for unit in units:
                print("missing" if unit in missing else "done   ", unit["data"], unit["variant"], unit["seed"])
            return
        if arguments.jobs > 1:
            at_once(missing, plans, arguments)
            return
        missing = [unit for unit in missing if json.dumps(unit) not in failed]
        late = arguments.minutes is not None and time.monotonic() - began > 60 * arguments.minutes
        if not missing or late:
            print(f"{len(units) - len(missing)} of {len(units)} units are recorded; {len(failed)} failed")
            return
        unit = missing[0]
        print(f"{len(missing)} left: {unit['data']} {unit['variant']} seed {unit['seed']}", flush=True)
        try:
            row = run(**_arguments_of(unit, plans[unit["plan"]], arguments))
        except Exception as error:  # one idea that cannot be trained must not cost the others
            failed.add(json.dumps(unit))
            print(f"FAILED {unit['variant']}: {error}", flush=True)
            continue
        if row is None:
            return
        _store(row, arguments.records)


def logging_to_stderr() -> None:
    """Warnings alone."""
    import logging

    logging.basicConfig(level=logging.WARNING)


if __name__ == "__main__":
    main()
