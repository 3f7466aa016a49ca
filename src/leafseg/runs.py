"""Where things lie in a run folder, and which model a name means. No torch."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

from leafseg.errors import CheckpointError

RUN_FILE = "run.json"
SPLIT_FILE = "split.csv"
ENSEMBLE_FILE = "ensemble.json"
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
    """Hash of the names and contents of a model's files; None for what is no pipeline's folder here (a hub id)."""
    folder = Path(resolve_model(model))
    if not (folder / "model_index.json").is_file():
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
