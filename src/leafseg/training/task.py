"""What the trainer needs to know of a task, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

Autocast = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Validation:
    """Figures of one validation; ``score`` (higher is better) chooses the best checkpoint."""

    score: float
    metrics: Mapping[str, float]


class TrainingTask(Protocol):
    """Modules, loss, validation and what to save. LEAF, autoencoders and baselines are tasks; the loop is one.

    Attributes:
        kind: short name, stored in the run.
        module: one nn.Module that holds everything trained, and only that; the trainer prepares it.
        dataset: maps (global sample position, index) to a sample dict of tensors.
        pipeline_folder: name of the inference folder inside a checkpoint.
    """

    kind: str
    module: nn.Module
    pipeline_folder: str

    @property
    def dataset(self) -> Dataset[Any]:
        """See above; any Dataset subclass."""

    def prepare(self, device: torch.device, autocast: Autocast, run: Path) -> None:
        """Move frozen parts to the device; do work that is done once (feature caches). Called on every process."""

    def loss(self, forward: nn.Module, batch: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
        """Loss parts of a micro-batch: ``loss`` is minimised, the rest logged. ``forward`` is the prepared module."""

    def validate(self, limit: int, rank: int, world_size: int) -> list[Mapping[str, Any]]:
        """Rows of this process's share of the validation samples, computed with ``module`` as it is now."""

    def summarise(self, rows: list[Mapping[str, Any]]) -> Validation:
        """Figures of all processes' rows."""

    def save_inference(self, folder: Path, *, earlier: Path | None = None) -> None:
        """Write the inference model with ``module`` as it is now.

        ``earlier`` is such a folder of the same run: frozen parts may be linked to its files instead of written again.
        """
