"""How much of a mask survives the autoencoder: the ceiling of every model that stands on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from leafseg.config import DataSettings, PreprocessingSettings
from leafseg.data.dataset import SegmentationDataset
from leafseg.data.manifest import load_manifest
from leafseg.data.transforms import Preprocessor
from leafseg.errors import DataError
from leafseg.evaluation.intervals import bootstrap_mean
from leafseg.evaluation.metrics import dice_and_iou
from leafseg.mask_code import BinaryMaskCode
from leafseg.model.autoencoder import load_autoencoder, packaged_autoencoder
from leafseg.progress import progress_bar
from leafseg.runs import best_checkpoint, is_run

AUTOENCODER_FOLDER = "autoencoder"


def mask_round_trip_dice(autoencoder: AutoencoderKL, labels: torch.Tensor) -> float:
    """Dice of binary labels ``[1, H, W]`` with themselves after encoding and decoding."""
    code = BinaryMaskCode()
    with torch.no_grad():
        decoded = autoencoder.decode(autoencoder.encode(code.encode(labels)).latent_dist.mode()).sample
    dice, _ = dice_and_iou(code.mask(code.probability(decoded.float())), labels[:, None] > 0)
    return float(dice[0, 0])


def evaluate_round_trip(folders: Sequence[Path], *, autoencoder: str, part: str, size: int) -> dict[str, Any]:
    """Mean round-trip Dice of each data set's non-empty masks, with a bootstrap interval.

    Args:
        folders: data folders.
        autoencoder: ``packaged:NAME``, a run of ``train-autoencoder``, or an autoencoder folder.
        part: ``train``, ``validation``, ``test`` or ``all``.
        size: masks are resized (nearest) to this many pixels a side.

    Raises:
        DataError, CheckpointError, ConfigError: for data or an autoencoder that cannot be read.
    """
    if size % 8:
        raise DataError(f"--size is {size}; it must be a multiple of 8")
    name = autoencoder
    if autoencoder.startswith("packaged:"):
        folder = packaged_autoencoder(autoencoder)
    elif is_run(Path(autoencoder)):
        folder = best_checkpoint(Path(autoencoder)) / AUTOENCODER_FOLDER
    else:
        folder = Path(autoencoder)
    model = load_autoencoder(folder).eval()
    figures: dict[str, Any] = {"autoencoder": name, "part": part, "size": size, "sets": {}}
    for data in folders:
        manifest = load_manifest(data, settings=DataSettings())
        chosen = manifest if part == "all" else manifest.part(part)
        if not len(chosen):
            raise DataError(f"{data}: the {part} part has no samples; choose another --split")
        preprocessor = Preprocessor(PreprocessingSettings(size=(size, size)))
        dataset = SegmentationDataset(chosen, preprocessor, augmentation=None, seed=0, cache_mb=0)
        values = []
        with progress_bar(f"round trip {data.name}", total=len(dataset)) as bar:
            for index in range(len(dataset)):
                labels = dataset[0, index]["labels"][None]
                if labels.any():
                    values.append(mask_round_trip_dice(model, labels))
                bar.advance()
        interval = bootstrap_mean(values)
        if interval is None:
            raise DataError(f"{data}: every mask of the {part} part is empty; there is no overlap to measure")
        figures["sets"][data.name] = {**asdict(interval), "worst": min(values), "split_sha256": manifest.split_sha256}
    return figures
