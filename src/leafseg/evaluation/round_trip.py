"""How much of a mask survives the autoencoder: the ceiling of every model that stands on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from leafseg.config import DataSettings, PreprocessingSettings
from leafseg.data.dataset import SegmentationDataset
from leafseg.data.manifest import IGNORE, load_manifest
from leafseg.data.transforms import Preprocessor
from leafseg.errors import DataError
from leafseg.evaluation.intervals import bootstrap_mean
from leafseg.evaluation.metrics import dice_and_iou
from leafseg.mask_code import AUTO, BinaryMaskCode, MaskCode, make_mask_code
from leafseg.model.autoencoder import decode_pictures, encode_pictures, load_autoencoder, packaged_autoencoder
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


def code_round_trip(autoencoder: AutoencoderKL, code: MaskCode, labels: Tensor) -> Tensor:
    """Probabilities ``[B, C, H, W]`` of labels that were drawn, encoded and decoded; labels as the code takes them."""
    with torch.no_grad():
        decoded = decode_pictures(autoencoder, encode_pictures(autoencoder, code.encode(labels)))
    return code.probability(decoded.float())


def label_dice(code: MaskCode, probability: Tensor, labels: Tensor) -> dict[str, list[float]]:
    """Dice of each label but the background, where it is present.

    Args:
        code: what the probabilities are of.
        probability: ``[B, C, H, W]``.
        labels: ``[B, H, W]``, or bool ``[B, C, H, W]`` for overlapping labels, on the same grid.
    """
    mask = code.mask(probability)
    if code.exclusive:
        names = code.label_names[1:]
        mask = mask[:, -len(names) :]  # without the background's channel, where it has one
        labels = labels[:, None] == torch.arange(1, len(names) + 1, device=labels.device)[:, None, None]
    else:
        names = code.label_names
    dice, _ = dice_and_iou(mask, labels)
    present = labels.flatten(2).any(2)
    return {name: dice[present[:, index], index].tolist() for index, name in enumerate(names)}


def evaluate_round_trip(folders: Sequence[Path], *, autoencoder: str, part: str, size: int) -> dict[str, Any]:
    """Mean round-trip Dice of each data set's non-empty masks, with a bootstrap interval.

    Labels are drawn by the code that a training on the set would use; where there are several, each has a figure.

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
    if autoencoder.startswith("packaged:"):
        folder = packaged_autoencoder(autoencoder)
    elif is_run(Path(autoencoder)):
        folder = best_checkpoint(Path(autoencoder)) / AUTOENCODER_FOLDER
    else:
        folder = Path(autoencoder)
    model = load_autoencoder(folder).eval()
    figures: dict[str, Any] = {"autoencoder": autoencoder, "part": part, "size": size, "sets": {}}
    for data in folders:
        manifest = load_manifest(data, settings=DataSettings())
        chosen = manifest if part == "all" else manifest.part(part)
        if not len(chosen):
            raise DataError(f"{data}: the {part} part has no samples; choose another --split")
        preprocessor = Preprocessor(PreprocessingSettings(size=(size, size)))
        dataset = SegmentationDataset(chosen, preprocessor, augmentation=None, seed=0, cache_mb=0)
        known = manifest.label_map
        code = make_mask_code(AUTO, known.names, overlapping=known.overlapping)
        values: dict[str, list[float]] = {}
        with progress_bar(f"round trip {data.name}", total=len(dataset)) as bar:
            for index in range(len(dataset)):
                labels = dataset[0, index]["labels"][None]
                labels = labels.where(labels != IGNORE, 0)
                for label, dice in label_dice(code, code_round_trip(model, code, labels), labels).items():
                    values.setdefault(label, []).extend(dice)
                bar.advance()
        if not any(values.values()):
            raise DataError(f"{data}: every mask of the {part} part is empty; there is no overlap to measure")
        for label, dice in values.items():
            if interval := bootstrap_mean(dice):
                name = data.name if code.n_outputs == 1 else f"{data.name} {label}"
                figures["sets"][name] = {
                    **asdict(interval),
                    "worst": min(dice),
                    "split_sha256": manifest.split_sha256,
                }
    return figures
