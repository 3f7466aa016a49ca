"""Training of a baseline: a plain segmentation network, on what LEAF is trained on, by Dice and cross-entropy."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from leafseg import rng
from leafseg.baseline import BaselineSegmenter, build_network, output_channels, save_baseline
from leafseg.config import Settings
from leafseg.data.manifest import Manifest
from leafseg.objective import pixel_loss
from leafseg.training.segmentation_task import SegmentationTask


class UNetTask(SegmentationTask):
    """The network of ``model.baseline`` as the trainer sees it: data, augmentation, budget, averages as for LEAF.

    Raises:
        DataError: if a part that is needed has no samples.
        ConfigError: if the network cannot be built.
    """

    kind = "unet"

    def __init__(self, settings: Settings, manifest: Manifest) -> None:
        super().__init__(settings, manifest)
        channels = output_channels(self.label_map.names, overlapping=self.label_map.overlapping)
        torch.manual_seed(rng.torch_seed(settings.training.seed, "initial-weights", 0))
        self.module = build_network(settings.model.baseline, out_channels=channels)

    @property
    def trained_parts(self) -> dict[str, nn.Module]:
        return {self.settings.model.baseline.network: self.module}

    def _loss(self, forward: nn.Module, batch: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
        images = (batch["image"] * 2 - 1).to(memory_format=torch.channels_last)
        labels, known = self._known_labels(batch)
        logits = forward(images).float()
        boundary = self.settings.objective.boundary_weight
        exclusive = not self.label_map.overlapping
        loss = pixel_loss(logits, labels, exclusive=exclusive, known=known, boundary_weight=boundary)
        return {"loss": loss}

    def segmenter(self) -> BaselineSegmenter:
        return BaselineSegmenter(
            self.module,
            preprocessing=self.settings.data.preprocessing,
            label_names=self.label_map.names,
            overlapping=self.label_map.overlapping,
            autocast=self._autocast,
        )

    def save_inference(self, folder: Path, *, earlier: Path | None = None) -> None:
        save_baseline(
            self.module,
            folder,
            settings=self.settings.model.baseline,
            preprocessing=self.settings.data.preprocessing,
            label_names=self.label_map.names,
            overlapping=self.label_map.overlapping,
            presence=self._presence,
            dtype=self.settings.training.inference_dtype,
        )
