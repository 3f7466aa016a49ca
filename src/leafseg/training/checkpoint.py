"""Checkpoints on disk: written beside, fsynced, renamed. A kill at any moment leaves the previous one whole.

``RUN/checkpoints/step-000500/`` holds the inference folder (EMA weights) and ``trainer/`` (raw weights, EMA, optimizer,
state: the trained parts alone). A folder under its final name is complete by construction; anything else is a leftover
and is removed. Only the last checkpoint keeps what a continued training needs; an older one that is kept as the best
keeps its inference folder and ``trainer/state.json``.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from leafseg.errors import CheckpointError
from leafseg.runs import (
    PIPELINE_FOLDER,
    TRAINER_FILES,
    best_checkpoint,
    checkpoint_folder,
    has_trainer_state,
    step_of,
)

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
_PARTIAL = ".partial"


@dataclass(frozen=True)
class TrainerState:
    """Everything besides weights that a continued training needs; the data position follows from the step."""

    step: int
    total_steps: int
    best_step: int | None
    best_score: float | None
    ema_step: int
    format_version: int = FORMAT_VERSION


def save_checkpoint(
    run: Path,
    *,
    state: TrainerState,
    weights: dict[str, Tensor],
    ema: list[Tensor],
    optimizer: dict[str, Any],
    scaler: dict[str, Any] | None,
    write_inference: Callable[[Path], None],
) -> Path:
    """Write one checkpoint; on any failure nothing of it remains.

    Raises:
        CheckpointError: if the disk is full or the folder cannot be written.
    """
    final = checkpoint_folder(run, state.step)
    partial = final.with_name(final.name + _PARTIAL)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        trainer = partial / "trainer"
        trainer.mkdir(parents=True)
        write_inference(partial)
        save_file({k: v.detach().cpu().contiguous() for k, v in weights.items()}, trainer / "weights.safetensors")
        names = list(weights)
        save_file({f"{i:05d}": v.detach().cpu().contiguous() for i, v in enumerate(ema)}, trainer / "ema.safetensors")
        torch.save({"optimizer": optimizer, "scaler": scaler, "names": names}, trainer / "optimizer.pt")
        (trainer / "state.json").write_text(json.dumps(asdict(state), indent=1))
        mode = (trainer / "state.json").stat().st_mode
        for path in sorted(partial.rglob("*"), reverse=True):
            if path.is_file():
                path.chmod(mode)  # safetensors writes files that only their owner may read
            _fsync(path)
        _fsync(partial)
        aside = final.with_name(f"{final.name}.before{_PARTIAL}")
        if final.exists():  # a resumed run that saves the same step again
            os.replace(final, aside)
        os.replace(partial, final)
        _fsync(final.parent)
        shutil.rmtree(aside, ignore_errors=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"{final}: the checkpoint cannot be written ({_reason(error)}); free space or choose another --out, then "
            "continue with --resume auto"
        ) from error
    except CheckpointError:  # a weight that the inference folder's number format cannot hold
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


@dataclass(frozen=True)
class StoredCheckpoint:
    """A checkpoint whose parts are read one at a time: together they would need as much memory again as the training.

    Every method raises CheckpointError if its file is missing or damaged. Nothing is unpickled but tensors and plain
    values.
    """

    folder: Path
    state: TrainerState

    def weights(self) -> dict[str, Tensor]:
        """The trained parts' own weights."""
        with _damage_explained(self.folder):
            return load_file(self.folder / "trainer" / "weights.safetensors")

    def ema(self) -> list[Tensor]:
        """The averaged weights, in the module's order."""
        with _damage_explained(self.folder):
            stored = load_file(self.folder / "trainer" / "ema.safetensors")
            return [stored[name] for name in sorted(stored)]

    def optimizer(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """States of the optimizer and of the loss scaler."""
        with _damage_explained(self.folder):
            other = torch.load(self.folder / "trainer" / "optimizer.pt", map_location="cpu", weights_only=True)
            return other["optimizer"], other["scaler"]


def open_checkpoint(folder: Path) -> StoredCheckpoint:
    """A training checkpoint's state, and access to its parts.

    Raises:
        CheckpointError: if the state is missing, damaged or of a newer format.
    """
    with _damage_explained(folder):
        values = json.loads((folder / "trainer" / "state.json").read_text())
        if values.get("format_version", 0) > FORMAT_VERSION:
            raise CheckpointError(
                f"{folder}: checkpoint format {values['format_version']}; this leafseg reads up to {FORMAT_VERSION}: "
                "upgrade it"
            )
        return StoredCheckpoint(folder, TrainerState(**values))


@contextmanager
def _damage_explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # torch.load raises many kinds on a damaged file; all mean the same to the user
        raise CheckpointError(
            f"{folder}: the checkpoint is damaged ({_reason(error)}); {_what_to_do_instead(folder)}"
        ) from error


def _what_to_do_instead(folder: Path) -> str:
    """What a user can do who cannot continue from this checkpoint."""
    others = [other for other in folder.parent.iterdir() if other != folder and step_of(other) is not None]
    if any(has_trainer_state(other) for other in others):
        return "remove this folder to continue from the one before"
    models = [other for other in (folder, *others) if (other / PIPELINE_FOLDER).is_dir()]
    if models:
        return (
            "only the last checkpoint keeps the trainer's state, so this training cannot go on: start another from its "
            f"weights with --init-from {models[0] / PIPELINE_FOLDER} and another --out"
        )
    return "only the last checkpoint keeps the trainer's state: train again with another --out"


def link_best(run: Path, folder: str) -> None:
    """Let ``RUN/FOLDER`` point to the best checkpoint's inference folder, for people and scripts that open it by hand.

    A convenience: where links cannot be made, leafseg's own commands find the folder all the same.
    """
    link, temporary = run / folder, run / f".{folder}{_PARTIAL}"
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(Path(best_checkpoint(run) / folder).relative_to(run), target_is_directory=True)
        os.replace(temporary, link)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        log.debug("%s: no link to the best checkpoint (%s)", link, _reason(error))


def prune_checkpoints(run: Path, *, last: int, best: int | None) -> None:
    """Keep the last checkpoint whole and the best one's model; remove all others, and leftovers of interrupted saves.

    Called when the last one is complete under its final name: a kill at any moment leaves at worst files too many.
    """
    folder = run / "checkpoints"
    for path in folder.iterdir() if folder.is_dir() else ():
        step = step_of(path)
        if (step is not None and step not in (last, best)) or path.name.endswith(_PARTIAL):
            shutil.rmtree(path, ignore_errors=True)
        elif step is not None and step != last:
            for name in TRAINER_FILES:
                (path / "trainer" / name).unlink(missing_ok=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error) or type(error).__name__).splitlines()[0]
