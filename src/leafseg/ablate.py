"""A grid of settings, several seeds, one stored split: which change helps, and by how much.

Every cell of the grid is trained with each seed on each data set for the same number of steps, and evaluated on the
same part. A finished run appends one line to the records, so that an interrupted ablation continues where it stopped
and a table can be made at any time; what was not run says so.
"""

from __future__ import annotations

import itertools
import json
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leafseg.config import Settings, override_settings
from leafseg.data.manifest import Manifest, load_manifest, save_split
from leafseg.ensemble import load_single
from leafseg.errors import ConfigError, LeafsegError
from leafseg.evaluation.ablation_report import normalised, write_report
from leafseg.evaluation.evaluate import evaluate
from leafseg.files import append_line, read_json, write_json_atomic
from leafseg.predict import out_is_usable
from leafseg.runs import RUN_FILE, SPLIT_FILE

log = logging.getLogger(__name__)

RECORDS_FILE = "runs.jsonl"
BUDGET_FILE = "budget.json"


@dataclass(frozen=True)
class Axis:
    """One setting that is varied; the first value is what the others are compared with."""

    setting: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Unit:
    """One training: a cell of the grid, a data set, a seed."""

    data: Path
    cell: tuple[tuple[str, Any], ...]
    seed: int

    @property
    def name(self) -> str:
        """Folder name; readable, and different for different units of one data set."""
        values = "-".join(_plain(value) for _, value in self.cell)
        return f"{values}-seed{self.seed}"


@dataclass(frozen=True)
class AblationResult:
    """How far it came, and where the tables are."""

    finished: int
    total: int
    failed: dict[str, str]
    interrupted: bool
    report: Path


def parse_axis(text: str) -> Axis:
    """``SETTING=V1,V2,...``; values are YAML (``[[128,128],[256,256]]`` for a list of lists).

    Raises:
        ConfigError: if the text has another form, or fewer than two different values.
    """
    from omegaconf import OmegaConf

    setting, equals, listed = text.partition("=")
    try:
        read = OmegaConf.create(listed if listed.lstrip().startswith("[[") else f"[{listed}]")
        values: Any = OmegaConf.to_container(read, resolve=False)
    except Exception as error:  # PyYAML's and OmegaConf's errors share no public base
        raise ConfigError(f"--vary is {text!r}; its values cannot be read, write SETTING=VALUE,VALUE") from error
    if not setting or not equals or len(values) < 2 or len({_plain(v) for v in values}) < len(values):
        raise ConfigError(f"--vary is {text!r}; write SETTING=VALUE,VALUE with at least two different values")
    return Axis(setting.strip(), tuple(values))


def paper_grid(settings: Settings) -> tuple[Settings, list[Axis]]:
    """What the paper varies: prediction type by alignment, off and on (with the settings' own weight).

    Epsilon allows neither terminal samples nor a loss on the decoded mask, and the cells must differ in nothing else:
    both are set to 0 for all of them, and with them go a start from zeros and a trained mask decoder.

    Raises:
        ConfigError: if the settings train without alignment.
    """
    weight = settings.objective.alignment_weight
    if weight == 0:
        raise ConfigError("objective.alignment_weight is 0, so that there is no alignment to switch off; set --vary")
    if settings.objective.terminal_fraction > 0 or settings.objective.pixel_weight > 0:
        log.info(
            "ablation: objective.terminal_fraction and objective.pixel_weight are 0, objective.terminal_noise is "
            "gaussian and model.mask_decoder frozen in all cells, for epsilon"
        )
    settings = override_settings(
        settings,
        [
            "objective.terminal_fraction=0",
            "objective.terminal_noise=gaussian",
            "objective.pixel_weight=0",
            "model.mask_decoder=frozen",
        ],
    )
    kinds = Axis("objective.prediction_type", ("sample", "v_prediction", "epsilon"))
    return settings, [kinds, Axis("objective.alignment_weight", (0, weight))]


def grid(axes: Sequence[Axis]) -> list[tuple[tuple[str, Any], ...]]:
    """All cells, each a tuple of (setting, value) in the order of the axes.

    Raises:
        ConfigError: if a setting is varied twice.
    """
    names = [axis.setting for axis in axes]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"--vary names {', '.join(twice)} twice; list all its values once")
    return [tuple(zip(names, values, strict=True)) for values in itertools.product(*(axis.values for axis in axes))]


def cell_settings(settings: Settings, cell: Sequence[tuple[str, Any]], seed: int) -> Settings:
    """The settings of one unit.

    Raises:
        ConfigError: if a cell names an unknown setting or values that do not go together.
    """
    overrides = [f"{name}={json.dumps(value)}" for name, value in cell]
    try:
        return override_settings(settings, [*overrides, f"training.seed={seed}"])
    except ConfigError as error:
        cell_text = ", ".join(f"{name}={_plain(value)}" for name, value in cell)
        raise ConfigError(f"the cell {cell_text} cannot be trained: {error}") from error


def calibrated_steps(
    settings: Settings, data: Path, out: Path, *, axes: Sequence[Axis], seed: int, minutes: float
) -> int:
    """The steps that every cell can take within ``minutes`` on this machine: those of the slowest cell.

    Each cell is tried for a few steps on one data set. The number is stored in ``out``, so that an ablation that
    continues, perhaps on a busier machine, keeps it.

    Raises:
        ConfigError: if a cell cannot be trained, or ``out`` holds the number for other minutes.
    """
    from leafseg.training.dry_run import dry_run

    for cell in grid(axes):
        cell_settings(settings, cell, seed)  # a grid with a hole is refused before any cell is tried
    path = out / BUDGET_FILE
    if path.is_file():
        stored = read_json(path)
        if stored.get("minutes") != minutes or not isinstance(stored.get("steps"), int):
            raise ConfigError(
                f"{path}: the ablation began with --minutes {stored.get('minutes')}, which gave {stored.get('steps')} "
                f"steps, and --minutes {minutes} is asked for; give the same, or choose another --out"
            )
        return int(stored["steps"])
    out_is_usable(out)
    steps: dict[str, int] = {}
    for cell in grid(axes):
        mine = override_settings(cell_settings(settings, cell, seed), [f"training.minutes={minutes}"])
        name = ", ".join(f"{setting}={_plain(value)}" for setting, value in cell)
        steps[name] = dry_run(mine, data).steps
        log.info("calibration: %s takes %d steps in %g minutes", name, steps[name], minutes)
    write_json_atomic(path, {"minutes": minutes, "steps": min(steps.values()), "cells": steps})
    return min(steps.values())


def run_ablation(
    settings: Settings,
    data: Sequence[Path],
    out: Path,
    *,
    axes: Sequence[Axis],
    seeds: Sequence[int],
    part: str = "test",
    inference_steps: Sequence[int] = (1,),
    records: Path | None = None,
    keep_runs: bool = True,
) -> AblationResult:
    """Train and evaluate what is missing, seed by seed, then write the tables.

    Args:
        settings: what all cells share; ``training.steps`` is every unit's budget.
        data: data sets; each has its own stored split, shared by all cells and seeds.
        out: run folders, splits, records and tables.
        axes: what is varied.
        seeds: of everything random in training.
        part: which part is evaluated; checkpoints are chosen on the validation part.
        inference_steps: reverse steps to evaluate with; the first is the one that the tables show.
        records: JSON lines that a finished unit is appended to; default: inside ``out``.
        keep_runs: False removes a unit's folder when its record is written.

    Raises:
        ConfigError: before anything is trained, if a cell cannot be.
        DataError: if data cannot be read or ``out`` cannot be written.
    """
    if settings.training.steps is None:
        raise ConfigError("an ablation compares equal steps: give --steps, or --minutes to calibrate them")
    if len({path.name for path in data}) < len(data):
        raise ConfigError(f"two data sets share a name ({', '.join(p.name for p in data)}); rename a folder")
    cells = grid(axes)
    for cell, seed in itertools.product(cells, seeds):
        cell_settings(settings, cell, seed)  # a grid with a hole is refused before hours of work
    out_is_usable(out)
    records = records or out / RECORDS_FILE
    manifests = {path: _manifest(path, settings, out) for path in data}
    units = [Unit(path, cell, seed) for seed in seeds for path in data for cell in cells]
    failed: dict[str, str] = {}
    interrupted = False

    def recorded(unit: Unit) -> dict[str, Any] | None:
        return _recorded(records, unit, settings, manifests[unit.data], part, inference_steps)

    # Lines, not a bar: each training shows its own.
    missing = [unit for unit in units if recorded(unit) is None]
    log.info("ablation: %d of %d runs are recorded in %s", len(units) - len(missing), len(units), records)
    started = time.monotonic()
    for index, unit in enumerate(missing):
        label = f"{unit.data.name} {unit.name}"
        left = (
            f", about {(time.monotonic() - started) / index * (len(missing) - index) / 60:.0f} min left"
            if index
            else ""
        )
        log.info("run %d of %d: %s%s", len(units) - len(missing) + index + 1, len(units), label, left)
        try:
            row = _train_and_evaluate(
                unit, settings, manifests[unit.data], out, part=part, inference_steps=inference_steps
            )
        except LeafsegError as error:  # one bad cell must not cost the others
            failed[label] = str(error)
            log.error("%s: %s", label, error)
            continue
        if row is None:
            interrupted = True
            break
        append_line(records, json.dumps(row))
        if not keep_runs:
            shutil.rmtree(_folder(out, unit), ignore_errors=True)
    done = [row for unit in units if (row := recorded(unit)) is not None]
    report = write_report(
        out,
        done,
        axes=[(axis.setting, axis.values) for axis in axes],
        data=[path.name for path in data],
        seeds=list(seeds),
        inference_steps=list(inference_steps),
    )
    return AblationResult(len(done), len(units), failed, interrupted, report)


def _manifest(path: Path, settings: Settings, out: Path) -> Manifest:
    """The data set with the split that the first call stored."""
    folder = out / path.name
    folder.mkdir(parents=True, exist_ok=True)
    stored = folder / SPLIT_FILE
    manifest = load_manifest(path, settings=settings.data, run_split=stored if stored.is_file() else None)
    if not stored.is_file():
        save_split(manifest, stored)
    return manifest


def _folder(out: Path, unit: Unit) -> Path:
    return out / unit.data.name / unit.name


def _train_and_evaluate(
    unit: Unit, settings: Settings, manifest: Manifest, out: Path, *, part: str, inference_steps: Sequence[int]
) -> dict[str, Any] | None:
    """The record of a finished unit; None if a signal stopped it."""
    from leafseg.training.run import library_versions, run_training

    folder = _folder(out, unit)
    mine = cell_settings(settings, unit.cell, unit.seed)
    if mine.teacher.cache_dir is None:  # features do not depend on the cell: every unit reads one cache
        mine = override_settings(mine, [f"teacher.cache_dir={out / 'features'}"])
    result = run_training(mine, unit.data, folder, split_file=out / unit.data.name / SPLIT_FILE, resume=True)
    if result.status != "finished":
        return None
    evaluations = {}
    for steps in inference_steps:
        segmenter = load_single(str(folder), num_inference_steps=steps)
        evaluation = evaluate(segmenter, manifest.part(part))
        evaluation.save(folder / f"evaluation-{part}-{steps}")
        evaluations[str(steps)] = {
            "classes": evaluation.summary["classes"],
            "dice": {
                f"{row.name}/{row.label}": None if row.dice is None else round(row.dice, 5) for row in evaluation.rows
            },
            "false_positives": sum(row.predicted_pixels > 0 for row in evaluation.rows if row.empty),
        }
    run = json.loads((folder / RUN_FILE).read_text())
    return {
        **_identity(unit, settings, manifest, part, inference_steps),
        "best_step": result.best_step,
        "validation_score": result.best_score,
        "selected_on_test": mine.training.selection_part == "test",
        "seconds": round(result.seconds, 1),
        "samples_per_second": round(result.samples_per_second, 2),
        "samples": run["record"]["samples"],
        "teacher": run["record"]["teacher"],
        "versions": library_versions(),
        "settings": mine.model_dump(mode="json", exclude={"teacher": {"cache_dir"}}),
        "evaluations": evaluations,
    }


def _identity(
    unit: Unit, settings: Settings, manifest: Manifest, part: str, inference_steps: Sequence[int]
) -> dict[str, Any]:
    """What makes two records the same measurement."""
    return {
        "experiment": "ablation",
        "preset": settings.preset,
        "data": unit.data.name,
        "split_sha256": manifest.split_sha256,
        "part": part,
        "cell": dict(unit.cell),
        "seed": unit.seed,
        "steps": settings.training.steps,
        "inference_steps": list(inference_steps),
    }


def _recorded(
    records: Path, unit: Unit, settings: Settings, manifest: Manifest, part: str, inference_steps: Sequence[int]
) -> dict[str, Any] | None:
    wanted = json.loads(json.dumps(_identity(unit, settings, manifest, part, inference_steps)))
    mine = _flat(cell_settings(settings, unit.cell, unit.seed).model_dump(mode="json"))
    for row in read_records(records):
        if all(row.get(name) == value for name, value in wanted.items()):
            # A setting that only a newer version knows stood at its own default in effect, not at a preset's value.
            theirs = {**_flat(Settings().model_dump(mode="json")), **_flat(row["settings"])}
            if all(theirs.get(name) == value for name, value in mine.items() if name not in _FREE):
                return row
    return None


# Change no number that a unit gives.
_FREE = (
    "teacher.cache_dir",
    "teacher.cache_mb",
    "data.workers",
    "data.cache_mb",
    "training.save_every",
    "training.latent_cache_mb",
)


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(values, dict):
        return {k: v for name, value in values.items() for k, v in _flat(value, f"{prefix}{name}.").items()}
    return {prefix.removesuffix("."): values}


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a record file; none if there is no file. A torn line (a full disk) is skipped with a warning."""
    if not path.is_file():
        return
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError:
            log.warning("%s: line %d is not JSON and is skipped", path, number)
            continue
        if isinstance(row, dict):
            yield row


def _plain(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(normalised(value))
    return "".join(c if c.isalnum() or c in "._+" else "_" for c in text).strip("_")
