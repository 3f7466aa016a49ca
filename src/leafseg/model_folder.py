"""Writing a model's folder: in any number format, with frozen weights linked to an earlier folder's, or slimmed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from leafseg.config import WeightsDtype
from leafseg.errors import CheckpointError
from leafseg.files import check_new_folder, new_folder
from leafseg.model.autoencoder import MaskDecoder
from leafseg.pipeline import COMPACT_PARTS, LeafPipeline

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def save_model_folder(
    pipeline: LeafPipeline, folder: Path, *, dtype: WeightsDtype = "fp32", earlier: Path | None = None
) -> None:
    """What ``pipeline.save_pretrained`` writes, in another number format; the modules stay as they are.

    Args:
        pipeline: the model.
        folder: where to; made if missing.
        dtype: of the stored weights. One part at a time is converted.
        earlier: a folder of the same training. Where its frozen autoencoder holds the same weights, the new folder gets
            a hard link to that file (a copy where links cannot be made).

    Raises:
        CheckpointError: if a weight is too large for the number format.
        OSError, SafetensorError: if the folder cannot be written.
    """
    compact = [name for name in COMPACT_PARTS if getattr(pipeline, name) is not None]
    for name in ("unet", "vae", "image_encoder", *compact):
        part = getattr(pipeline, name)
        place = folder / name
        place.mkdir(parents=True, exist_ok=True)
        _save_config(part, place)
        weights = converted_weights(part, name, dtype)
        if name == "vae" and earlier is not None and _same_weights(earlier / name / WEIGHTS_FILE, weights):
            _link(earlier / name / WEIGHTS_FILE, place / WEIGHTS_FILE)
        else:
            save_file(weights, place / WEIGHTS_FILE, metadata={"format": "pt"})
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    _save_config(pipeline, folder)


def round_weights(module: nn.Module, dtype: WeightsDtype) -> None:
    """Round a module's weights to what ``dtype`` can hold; they keep their own type."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(_DTYPES[dtype]).to(tensor.dtype)


def slim_model(model: str, out: Path, *, dtype: WeightsDtype = "fp16", decoder_only: bool = False) -> Path:
    """Write a model for inference alone, smaller.

    Args:
        model: a run (its best checkpoint is taken), a pipeline folder, or a hub id.
        out: the new folder; must not exist, or be empty and not the folder that the process works in.
        dtype: number format of the weights.
        decoder_only: leave out the autoencoder's encoder, which inference never calls; such a model cannot be trained
            further.

    Returns:
        ``out``.

    Raises:
        DataError: if ``out`` is taken or cannot be written.
        CheckpointError: if the model cannot be loaded, or a weight is too large for ``dtype``.
    """
    check_new_folder(out)
    pipeline = LeafPipeline.from_pretrained(model)
    if decoder_only and not isinstance(pipeline.vae, MaskDecoder):
        pipeline.register_modules(vae=MaskDecoder.from_autoencoder(pipeline.vae))
    with new_folder(out) as partial:
        save_model_folder(pipeline, partial, dtype=dtype)
    return out


def add_compact_parts(source: Path, pipeline: LeafPipeline, folder: Path) -> None:
    """A model's folder with compact parts beside its full ones, which are copied byte for byte.

    Args:
        source: the folder that ``pipeline`` was loaded from; only read.
        pipeline: it, with the compact parts to store.
        folder: where to; made if missing.

    Raises:
        OSError, SafetensorError: if the folder cannot be written.
    """
    for name in ("unet", "vae", "image_encoder", "scheduler"):
        shutil.copytree(source / name, folder / name)
    for name in COMPACT_PARTS:
        part = getattr(pipeline, name)
        if part is not None:
            place = folder / name
            place.mkdir(parents=True)
            _save_config(part, place)
            save_file(converted_weights(part, name, "fp32"), place / WEIGHTS_FILE, metadata={"format": "pt"})
    _save_config(pipeline, folder)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _save_config(owner: Any, folder: Path) -> None:
    """The config as diffusers writes it, without the place that the weights were loaded from."""
    owner.save_config(folder)
    file = folder / owner.config_name
    content = json.loads(file.read_text())
    if content.pop("_name_or_path", None) is not None:
        file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def converted_weights(part: nn.Module, name: str, dtype: WeightsDtype) -> dict[str, Tensor]:
    """A module's weights on the CPU, in the number format of a saved model.

    Raises:
        CheckpointError: if one is too large for it.
    """
    weights = {}
    for key, value in part.state_dict().items():
        kind = _DTYPES[dtype] if value.is_floating_point() else value.dtype
        weights[key] = value.detach().to("cpu", kind).contiguous()
        if kind == torch.float16 and not weights[key].isfinite().all() and value.isfinite().all():
            raise CheckpointError(f"{name}: weight {key} is too large for fp16; use bf16 or fp32")
    return weights


def _same_weights(file: Path, weights: dict[str, Tensor]) -> bool:
    try:
        with safe_open(file, "pt") as stored:
            if set(stored.keys()) != set(weights):
                return False
            return all(
                (old := stored.get_tensor(key)).dtype == value.dtype and torch.equal(old, value)
                for key, value in weights.items()
            )
    except (OSError, SafetensorError):
        return False


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links, or with too many
        shutil.copyfile(source, target)
