"""What every task that learns masks shares: parts of the data, samples, validation."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from leafseg.config import Settings
from leafseg.data.dataset import SegmentationDataset
from leafseg.data.manifest import IGNORE, Manifest
from leafseg.data.transforms import Preprocessor
from leafseg.errors import DataError
from leafseg.evaluation.evaluate import evaluate_samples, selection_score
from leafseg.predict import Segmenter
from leafseg.presence import tuned_presence
from leafseg.runs import PIPELINE_FOLDER
from leafseg.training.task import Autocast, Validation

log = logging.getLogger(__name__)


class SegmentationTask(ABC):
    """A task over a manifest: the train part is learned, the validation part chooses the checkpoint.

    The test part is never touched, unless ``training.selection_part`` is test.

    Args:
        settings: the whole run's settings.
        manifest: all samples.

    Raises:
        DataError: if a part that is needed has no samples.
    """

    kind: str
    module: nn.Module
    pipeline_folder = PIPELINE_FOLDER

    def __init__(self, settings: Settings, manifest: Manifest) -> None:
        self.settings = settings
        selection = settings.training.selection_part
        self._train, self._validation = self._chosen(manifest.part("train")), manifest.part(selection)
        folds = any(sample.fold is not None for sample in manifest.samples)
        remedy = (
            "choose one of its folds with --fold" if folds else "add images, or give a split file with --split-file"
        )
        for name in settings.training.needed_parts:
            if not len(manifest.part(name)):
                raise DataError(
                    f"{manifest.root}: no sample falls into the {name} part ({len(manifest)} in all); {remedy}"
                )
        if selection == "test":
            log.warning(
                "training.selection_part is test: the TEST part chooses the checkpoint, so every figure on it will be "
                "optimistic and none of them can be published as a test result"
            )
        self.label_map = manifest.label_map
        self.preprocessor = Preprocessor(settings.data.preprocessing)
        self.dataset = SegmentationDataset(
            self._train,
            self.preprocessor,
            augmentation=settings.data.augmentation,
            seed=settings.training.seed,
            cache_mb=settings.data.cache_mb,
            foreground_tiles=settings.data.foreground_tiles,
            soft_labels=settings.data.soft_labels,
        )
        self._autocast: Autocast | None = None
        self._device = torch.device("cpu")
        self._presence: tuple[float, ...] = ()  # of the weights as they are, once validated

    def _chosen(self, train: Manifest) -> Manifest:
        """At most ``data.train_samples`` of the samples, in their order; the same images whatever they are called."""
        most = self.settings.data.train_samples
        if most is None or most >= len(train):
            return train
        kept = sorted(range(len(train)), key=lambda i: (train.samples[i].sha256, train.samples[i].frame or 0))[:most]
        return replace(train, samples=tuple(train.samples[i] for i in sorted(kept)))

    @property
    @abstractmethod
    def trained_parts(self) -> dict[str, nn.Module]:
        """What is trained and saved for inference, by name."""

    @property
    def frozen_parts(self) -> dict[str, nn.Module]:
        """What is saved with the model, but not trained."""
        return {}

    @property
    def training_only_parts(self) -> dict[str, nn.Module]:
        """What no saved model holds."""
        return {}

    def record(self) -> dict[str, Any]:
        """Plain values that say what this training is made of."""
        return {
            "settings": self.settings.model_dump(mode="json"),
            "teacher": None,
            "label_names": list(self.label_map.names),
        }

    def prepare(self, device: torch.device, autocast: Autocast, run: Path) -> None:
        self._device, self._autocast = device, autocast

    def fill_cache(self, indices: Iterable[int]) -> int:
        """Do what is done once for each of these training samples; returns for how many it was still to do."""
        return 0

    def loss(self, forward: nn.Module, batch: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
        """See :class:`leafseg.training.task.TrainingTask`."""
        self._presence = ()  # the weights change after it
        return self._loss(forward, batch, seed)

    @abstractmethod
    def _loss(self, forward: nn.Module, batch: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
        """What ``loss`` gives."""

    @abstractmethod
    def save_inference(self, folder: Path, *, earlier: Path | None = None) -> None:
        """See :class:`leafseg.training.task.TrainingTask`."""

    @abstractmethod
    def segmenter(self) -> Segmenter:
        """The model as it is now; nothing is copied."""

    def _known_labels(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Labels, and which pixels have one (None: all); the others are given as background, and are to be left out."""
        labels = batch["labels"]
        if self.label_map.ignore is None:
            return labels, None
        known = labels != IGNORE
        return labels.where(known, 0), known

    def validate(self, limit: int, rank: int, world_size: int) -> list[Mapping[str, Any]]:
        """Dice and IoU at original resolution, of the same evenly spaced samples every time."""
        count = min(limit, len(self._validation))
        chosen = [self._validation.samples[i * len(self._validation) // count] for i in range(count)][rank::world_size]
        grid = self.preprocessor if self.settings.training.validation_resolution == "input" else None
        rows = evaluate_samples(self.segmenter(), chosen, self._validation.label_map, grid=grid)
        return [row.as_dict() for row in rows]

    def summarise(self, rows: list[Mapping[str, Any]]) -> Validation:
        # With tiles a label's highest probability is known after the last tile of an image that fits no memory; and on
        # another grid than the one that is drawn on it is another.
        whole = self.settings.data.preprocessing.fit != "tile"
        original = self.settings.training.validation_resolution == "original"
        if self.settings.inference.presence == "tuned" and whole and original:
            self._presence = tuned_presence(rows)
        dice = [row["dice"] for row in rows if row["dice"] is not None]
        empty = [float(row["predicted_pixels"] > 0) for row in rows if row["empty"]]
        metrics = {"dice": float(np.mean(dice)) if dice else 0.0}
        if empty:
            metrics["false_positive_rate"] = float(np.mean(empty))
        return Validation(score=selection_score(rows), metrics=metrics)

    def _autocasting(self) -> Any:
        if self._autocast is None:
            raise RuntimeError("prepare() was not called")
        return self._autocast()
