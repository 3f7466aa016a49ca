"""What a frozen teacher made of some samples, kept: computed once, it is learned from again and again.

Where the teacher is the larger network by far, a training that asks it anew in every step spends nearly all of its time
on answers that it hears once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from leafseg.config import TrainingSettings
from leafseg.data.dataset import PositionSampler
from leafseg.errors import DataError
from leafseg.files import atomic_path
from leafseg.progress import progress_bar
from leafseg.runs import RUN_FILE, is_main_process

log = logging.getLogger(__name__)

PAIRS_FILE = "pairs.safetensors"
_ASKED = "asked"
_MOST_MB = 1000
_BATCH = 8
_SHARE_OF_BUDGET = 1 / 3

Teach = Callable[[Mapping[str, Any], int], dict[str, Tensor]]


class TeacherPairs(Dataset[dict[str, Tensor]]):
    """Samples of half precision, by index; see :func:`teacher_pairs`."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        self._values = values

    def __len__(self) -> int:
        return len(next(iter(self._values.values())))

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        return {name: value[key[1]].float() for name, value in self._values.items()}


def teacher_pairs(
    source: Dataset[Any], teach: Teach, run: Path, training: TrainingSettings, *, most: int
) -> TeacherPairs:
    """Ask a teacher about the first samples of a training's stream, and keep what it says, in memory and in ``run``.

    A run that is continued takes what its folder holds, so that it goes on with the very same samples. Of several
    processes the first one asks, and the others wait for its file.

    Args:
        source: maps (global sample position, index) to a sample, as trainings see it.
        teach: of a batch of samples and the run's seed, tensors ``[B, ...]`` by name.
        run: the training's folder.
        training: its budget: no more samples than its steps take, and no more time than a third of its minutes.
        most: samples at most; 1 GB is the limit too.

    Raises:
        DataError: if the file cannot be written.
    """
    path = run / PAIRS_FILE
    if training.steps is not None:
        most = min(most, training.steps * training.batch_size)
    stored = None
    if (run / RUN_FILE).is_file():  # without it nothing was trained yet: what lies there may be of other settings
        # Only a larger number of steps asks for more than there is; a run that began with one may go on without.
        stored = _read(path, most if training.steps is not None else 0)
    if is_main_process() and stored is None:
        stored = _ask(source, teach, training, most)
        try:
            with atomic_path(path) as temporary:
                save_file(stored, temporary, metadata={_ASKED: str(most)})
        except SafetensorError as error:  # what it makes of a full disk
            raise DataError(
                f"{path}: cannot be written ({str(error).splitlines()[0]}); free some space, at most 1 GB is needed"
            ) from error
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
    return TeacherPairs(load_file(path) if stored is None else stored)


def _read(path: Path, most: int) -> dict[str, Tensor] | None:
    """What is stored, unless it is damaged, or more is asked for by now (a continued run with more steps)."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            if int((file.metadata() or {}).get(_ASKED, 0)) < most:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
    except (OSError, SafetensorError, ValueError) as error:
        log.warning(
            "%s: is damaged (%s); the full model is asked again, and the training goes on, but not bit for bit if it "
            "has a budget in minutes",
            path,
            error,
        )
        return None


def _ask(source: Dataset[Any], teach: Teach, training: TrainingSettings, most: int) -> dict[str, Tensor]:
    minutes = training.minutes if training.steps is None else None
    end = None if minutes is None else time.monotonic() + 60 * minutes * _SHARE_OF_BUDGET
    size = len(source)  # type: ignore[arg-type]
    at_once = min(_BATCH, training.micro_batch_size or _BATCH)  # what changes no sample, only memory
    stream = iter(PositionSampler(n=size, seed=training.seed, batch_size_global=at_once))
    kept: dict[str, Tensor] = {}
    done = 0
    with progress_bar("answers of the full model", total=most) as bar:
        while done < most and not (done and end is not None and time.monotonic() > end):
            keys = next(stream)[: most - done]
            answer = teach(default_collate([source[key] for key in keys]), training.seed)
            if not kept:
                a_sample = sum(2 * value[0].numel() for value in answer.values())  # bytes
                most = min(most, max(len(keys), int(_MOST_MB * 2**20) // a_sample))
                kept = {name: value.new_empty(most, *value.shape[1:], dtype=torch.half, device="cpu")
                        for name, value in answer.items()}  # fmt: skip
            for name, value in answer.items():
                kept[name][done : done + len(keys)] = value[: most - done]
            done += len(keys)
            bar.reach(done, most)
    return {name: value if done == most else value[:done].clone() for name, value in kept.items()}
