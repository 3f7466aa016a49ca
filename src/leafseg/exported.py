"""An exported folder as a segmenter: evaluation and prediction take it like any model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from leafseg.config import DataSettings, Noise, PreprocessingSettings, TimestepSpacing, load_settings, override_settings
from leafseg.errors import CheckpointError
from leafseg.predict import Precision, Segmentation, refuse_equal_draws
from leafseg.runtime import Runtime, load, read_folder


class ExportedSegmenter:
    """A runtime as a segmenter; images are segmented one by one, so that none depends on its batch."""

    def __init__(self, runtime: Runtime, *, noise: Noise | None = None, num_samples: int = 1) -> None:
        self.runtime = runtime
        self.preprocessing = PreprocessingSettings.model_validate(vars(runtime.preprocessing))
        self._noise = noise
        self._num_samples = num_samples

    @property
    def label_names(self) -> tuple[str, ...]:
        return self.runtime.label_names

    @property
    def overlapping(self) -> bool:
        return self.runtime.overlapping

    @property
    def presence(self) -> tuple[float, ...]:
        return self.runtime.presence

    @presence.setter
    def presence(self, thresholds: tuple[float, ...]) -> None:
        self.runtime.presence = thresholds

    @property
    def precision(self) -> str:
        """That of the export: fp32, fp16, bf16 or int8."""
        return self.runtime.folder.precision

    def read(self, path: Path, frame: int | None = None) -> Tensor:
        """The image as float32 ``[3, H, W]`` in 0..1."""
        return torch.from_numpy(self.runtime.read(path, frame))

    def segment(self, images: Sequence[NDArray[Any] | Tensor]) -> list[Segmentation]:
        return [self._segment(image) for image in images]

    def _segment(self, image: NDArray[Any] | Tensor) -> Segmentation:
        if isinstance(image, Tensor):
            unit = image.float().numpy()
        else:
            unit = self.runtime.preprocessor.intensity_to_unit(np.asarray(image))
        result = self.runtime.segment(unit, noise=self._noise, num_samples=self._num_samples)
        return Segmentation(result.probability, result.labels, result.spread, result.mask)


def load_exported(
    folder: Path,
    *,
    num_inference_steps: int | None = None,
    timesteps: TimestepSpacing | None = None,
    noise: Noise | None = None,
    num_samples: int = 1,
    precision: Precision = "fp32",
    device: str | None = None,
    threads: int | None = None,
) -> ExportedSegmenter:
    """An exported folder, ready to segment.

    Args:
        folder: what ``leafseg export`` wrote.
        num_inference_steps: 1 or None.
        timesteps: of no effect: one step starts at the last timestep either way.
        noise, num_samples: as :func:`leafseg.predict.load_segmenter` takes them.
        precision: fp32 and auto take the export's own; another is refused if it is not the export's.
        device: ``cpu`` or None.
        threads: see :func:`leafseg.runtime.load`.

    Raises:
        CheckpointError: if the folder is damaged, or the export has no such steps or precision.
        MissingExtraError: if its back end is not installed.
    """
    runtime = load(folder, threads=threads)
    if num_inference_steps not in (None, 1):
        raise CheckpointError(
            f"{folder}: --steps is {num_inference_steps}, and an exported model takes one reverse step; use the model "
            "that it was made from"
        )
    if precision not in ("auto", "fp32", runtime.folder.precision):
        raise CheckpointError(
            f"{folder}: --precision is {precision}, and the model was exported in {runtime.folder.precision}; export "
            "it again, or leave the option out"
        )
    if device not in (None, "cpu"):
        raise CheckpointError(f"{folder}: the device is {device}, and exported models run on the CPU; leave it out")
    refuse_equal_draws(str(folder), num_samples, noise or runtime.folder.noise)
    return ExportedSegmenter(runtime, noise=noise, num_samples=num_samples)


def stored_data_settings(folder: Path, overrides: Sequence[str] = ()) -> DataSettings:
    """What mask values mean to the model that was exported, with overrides on top.

    Raises:
        CheckpointError: if the folder is damaged.
        ConfigError: for an unknown override.
    """
    content = read_folder(folder).content
    settings = load_settings()
    try:
        data = DataSettings.model_validate({**settings.data.model_dump(), **content.get("data", {})})
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{folder}: the exported folder is damaged (data settings); export it again") from error
    return override_settings(settings.model_copy(update={"data": data}), overrides).data
