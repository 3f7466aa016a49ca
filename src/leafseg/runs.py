"""Where things lie in a run folder, and which model a name means. No torch."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from leafseg.errors import CheckpointError
from leafseg.files import read_json

RUN_FILE = "run.json"
SPLIT_FILE = "split.csv"
ENSEMBLE_FILE = "ensemble.json"
BASELINE_FILE = "baseline.json"
EXPORT_FILE = "export.json"
FAST_MODE_FILE = "fast_mode.json"
PIPELINE_FOLDER = "pipeline"
TRAINER_FILES = ("weights.safetensors", "ema.safetensors", "optimizer.pt")
_NAME = re.compile(r"step-(\d{6,})")


def checkpoint_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:06d}"


def step_of(path: Path) -> int | None:
    """The step of a complete checkpoint's folder; None for anything else."""
    match = _NAME.fullmatch(path.name)
    return int(match.group(1)) if match else None


def checkpoint_steps(run: Path) -> list[int]:
    """Steps of the complete checkpoints of a run, ascending."""
    folder = run / "checkpoints"
    steps = [step_of(path) for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(step for step in steps if step is not None)


def has_trainer_state(checkpoint: Path) -> bool:
    """Whether a training can continue from this checkpoint; an older one, kept as the best, holds a model only."""
    return all((checkpoint / "trainer" / name).is_file() for name in TRAINER_FILES)


def run_of(model: Path) -> Path | None:
    """The run that a model belongs to: itself, or the run whose checkpoint or pipeline folder it is; None elsewhere."""
    if not model.exists():
        return None  # a hub id, whatever folder the command runs in
    here = model.resolve()  # RUN/pipeline is a link into the checkpoints
    return next((folder for folder in (here, *list(here.parents)[:3]) if is_run(folder)), None)


def selected_on_test(model: Path) -> bool:
    """Whether the test part chose this model's checkpoint, as its run's record says."""
    run = run_of(model)
    if is_export(model):
        return _exported_content(model).get("selected_on_test") is True
    try:
        record = json.loads((run / RUN_FILE).read_text())["record"] if run is not None else {}
        return bool(record["settings"]["training"]["selection_part"] == "test")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def best_checkpoint(run: Path) -> Path:
    """The checkpoint with the best validation score, as the last one remembers it; without one, the last.

    Raises:
        CheckpointError: if the run has no complete checkpoint.
    """
    steps = checkpoint_steps(run)
    if not steps:
        raise CheckpointError(f"{run}: the run has no checkpoint yet; train it first")
    last = checkpoint_folder(run, steps[-1])
    try:
        best = json.loads((last / "trainer" / "state.json").read_text()).get("best_step")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{last}: the checkpoint's state.json is damaged; remove this folder") from error
    return checkpoint_folder(run, best) if best in steps else last


def model_sha256(model: str) -> str | None:
    """Hash of the names and contents of a model's files; None for what is no model's folder here (a hub id).

    That of an ensemble is made of its models' hashes in their order.
    """
    if is_ensemble(Path(model)):
        parts = [model_sha256(part) for part in ensemble_models(Path(model))]
        known = [part for part in parts if part is not None]
        return hashlib.sha256("\n".join(known).encode()).hexdigest() if len(known) == len(parts) else None
    folder = Path(resolve_model(model))
    if not any((folder / name).is_file() for name in ("model_index.json", BASELINE_FILE, EXPORT_FILE)):
        return None
    digest = hashlib.sha256()
    # How the model is computed on one machine is no part of it.
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != FAST_MODE_FILE):
        with path.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(f"{content} {path.relative_to(folder).as_posix()}\n".encode())
    return digest.hexdigest()


def is_main_process() -> bool:
    """Whether this process writes and prints: of those that a launcher (torchrun, accelerate) started, the first."""
    return os.environ.get("RANK", "0") == "0"


def is_run(folder: Path) -> bool:
    return (folder / RUN_FILE).is_file()


def is_ensemble(folder: Path) -> bool:
    return (folder / ENSEMBLE_FILE).is_file()


def is_baseline(model: str) -> bool:
    """Whether a run or folder holds a baseline network instead of a pipeline."""
    try:
        return (Path(resolve_model(model)) / BASELINE_FILE).is_file()
    except CheckpointError:
        return False  # a run without a checkpoint: the loader says so


def ensemble_models(folder: Path) -> list[str]:
    """The models of an ensemble's folder, as names to load.

    Raises:
        DataError: if its file cannot be read.
        CheckpointError: if it lists no models.
    """
    path = folder / ENSEMBLE_FILE
    models = read_json(path).get("models")
    if not isinstance(models, list) or not models or not all(isinstance(model, str) and model for model in models):
        raise CheckpointError(f"{path}: lists no models; it holds {{'models': [PATH, ...]}} as JSON, correct it")
    return [str(folder / model) if (folder / model).exists() else model for model in models]


def is_export(folder: Path) -> bool:
    return (folder / EXPORT_FILE).is_file()


def _exported_content(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / EXPORT_FILE).read_text())
    except (OSError, ValueError):  # loading the model says so
        return {}
    return content if isinstance(content, dict) else {}


def resolve_model(model: str) -> str:
    """The pipeline folder (or hub id, unchanged) that a name means.

    Args:
        model: a run (its best checkpoint is taken), a checkpoint folder, a pipeline folder, or a hub id.

    Raises:
        CheckpointError: if a folder is none of these.
    """
    folder = Path(model)
    if not folder.exists():
        return model  # a hub id, or a typing error that the loader explains
    if is_run(folder):
        return str(best_checkpoint(folder) / PIPELINE_FOLDER)
    if (folder / PIPELINE_FOLDER).is_dir():
        return str(folder / PIPELINE_FOLDER)
    return model
