"""What a source is, and its parts as state dicts with their origin; nothing is converted here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from leafseg.convert.ldm import State
from leafseg.convert.pickles import WEIGHT_SUFFIXES, load_tensors
from leafseg.errors import CheckpointError
from leafseg.runs import resolve_model

# What CompVis' checkpoints hold beside the weights: losses, running averages, other stages, and the noise schedule.
_UNUSED_PREFIXES = ("loss", "model_ema", "cond_stage_model", "first_stage_model")
_UNUSED_BUFFERS = {
    *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
    *("log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "lvlb_weights"),
    *("posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"),
    *("logvar", "scale_factor"),
}
_UNET_PREFIX = "model.diffusion_model."
_FIRST_STAGE = "first_stage_model."
_AUTOENCODER_PARTS = ("encoder", "decoder", "quant_conv", "post_quant_conv")


@dataclass
class LdmCheckpoint:
    """A CompVis checkpoint file, its keys sorted by what they are.

    Attributes:
        unet: the U-Net's weights, without their prefix; empty if there are none.
        autoencoder: the same for an autoencoder checkpoint.
        first_stage: the autoencoder inside a U-Net's checkpoint, without its prefix; empty unless it has all parts.
        unused: full names of weights that are of no use here.
        other_entries: what stands beside the state dict.
    """

    path: Path
    unet: State
    autoencoder: State
    first_stage: State
    unused: list[str]
    other_entries: tuple[str, ...]

    @property
    def first_stage_keys(self) -> list[str]:
        return [_FIRST_STAGE + key for key in self.first_stage]


@dataclass(frozen=True)
class Component:
    """A folder with config.json and weights."""

    folder: Path
    config: dict[str, Any]
    state: State


@dataclass
class Released:
    """A checkpoint in the released layout; ``vae`` and ``scheduler`` are missing in one that its training wrote."""

    folder: Path
    unet: Path
    latent_encoder: Path
    vae: Path | None
    scheduler: Path | None
    unused: list[str] = field(default_factory=list)


def read_ldm(path: Path) -> LdmCheckpoint:
    """Read and sort a CompVis checkpoint.

    Raises:
        CheckpointError: if it is no such checkpoint, or holds weights that nothing explains.
    """
    file = load_tensors(path)
    tensors = file.tensors
    prefix = _UNET_PREFIX
    if "input_blocks.0.0.weight" in tensors and not any(key.startswith(_UNET_PREFIX) for key in tensors):
        prefix = ""  # a U-Net saved alone
    unet: State = {}
    autoencoder: State = {}
    first_stage: State = {}
    unused: list[str] = []
    if prefix and any(key.startswith(prefix) for key in tensors):
        for key, tensor in tensors.items():
            if key.startswith(prefix):
                unet[key.removeprefix(prefix)] = tensor
            elif key.startswith(_FIRST_STAGE) and key.split(".")[1] in _AUTOENCODER_PARTS:
                first_stage[key.removeprefix(_FIRST_STAGE)] = tensor
            else:
                unused.append(key)
        if {key.split(".")[0] for key in first_stage} != set(_AUTOENCODER_PARTS):
            unused += [_FIRST_STAGE + key for key in first_stage]
            first_stage = {}
    elif "input_blocks.0.0.weight" in tensors:
        unet = tensors
    elif "encoder.conv_in.weight" in tensors and "decoder.conv_in.weight" in tensors:
        for key, tensor in tensors.items():
            known_unused = key.split(".")[0] in _UNUSED_PREFIXES or key in _UNUSED_BUFFERS
            if known_unused:
                unused.append(key)
            else:
                autoencoder[key] = tensor
    else:
        raise CheckpointError(
            f"{path}: neither an LDM U-Net ({_UNET_PREFIX}*) nor an LDM autoencoder (encoder.*, decoder.*); its first "
            f"keys are {', '.join(list(tensors)[:3])}; give lsun_churches, kl-f8, or a released LEAF folder"
        )
    unknown = [key for key in unused if key.split(".")[0] not in _UNUSED_PREFIXES and key not in _UNUSED_BUFFERS]
    if unknown:
        raise CheckpointError(
            f"{path}: {len(unknown)} unknown weights ({', '.join(unknown[:3])}); give lsun_churches, kl-f8, or a "
            "released LEAF folder"
        )
    return LdmCheckpoint(path, unet, autoencoder, first_stage, unused, file.other_entries)


def weight_files(folder: Path) -> list[Path]:
    """Weight files of a folder and of its direct subfolders, sorted."""
    return sorted(p for pattern in ("*", "*/*") for p in folder.glob(pattern) if p.suffix in WEIGHT_SUFFIXES)


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """Raises CheckpointError if the file is missing or is no JSON object."""
    path = folder / name
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error).splitlines()[0]
        raise CheckpointError(f"{path}: not a readable config ({reason}); copy or download the folder again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}; a config is a JSON object")
    return content


def read_component(folder: Path) -> Component:
    """Config and weights of a component's folder; safetensors if there are any, in one file or several.

    Raises:
        CheckpointError: if the folder is incomplete, damaged, or holds several files to choose from.
    """
    config = read_config(folder)
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if indexes:
        weight_map = read_config(folder, indexes[0].name).get("weight_map")
        names = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, Mapping) else []
        if not names or any(Path(name).name != name for name in names):
            raise CheckpointError(f"{indexes[0]}: not a list of weight files; copy or download the folder again")
        state: State = {}
        for name in names:
            state.update(load_tensors(folder / name).tensors)
        return Component(folder, config, state)
    for group in (WEIGHT_SUFFIXES[:1], WEIGHT_SUFFIXES[1:]):
        found = sorted(p for p in folder.iterdir() if p.suffix in group)
        usual = [p for p in found if p.stem == "diffusion_pytorch_model"]
        if len(usual or found) > 1:
            raise CheckpointError(f"{folder}: holds {', '.join(p.name for p in found)}; leave only one of them")
        if found:
            return Component(folder, config, load_tensors((usual or found)[0]).tensors)
    raise CheckpointError(f"{folder}: no weights; a component has config.json and diffusion_pytorch_model.safetensors")


def released_parts(folder: Path) -> Released | None:
    """The parts of a checkpoint in the released layout; None if the folder is something else.

    Raises:
        CheckpointError: if it has an image encoder but no U-Net.
    """
    latent_encoder = folder / "latent_encoder"
    if not latent_encoder.is_dir():
        return None
    nets = [folder / name for name in ("unet_ema", "unet") if (folder / name).is_dir()]
    if not nets:
        raise CheckpointError(f"{folder}: neither unet_ema nor unet beside latent_encoder; copy or download it again")
    vae, scheduler = folder / "vae", folder / "scheduler"
    used = {latent_encoder.name, nets[0].name, vae.name, scheduler.name, "model_index.json"}
    return Released(
        folder=folder,
        unet=nets[0],
        latent_encoder=latent_encoder,
        vae=vae if vae.is_dir() else None,
        scheduler=scheduler if scheduler.is_dir() else None,
        unused=sorted(p.name for p in folder.iterdir() if p.name not in used and not p.name.startswith(".")),
    )


def pipeline_folder(source: str) -> Path | None:
    """The folder of our own pipeline that a name means (a run, a checkpoint, a pipeline); None for anything else."""
    folder = Path(resolve_model(source))
    return folder if (folder / "image_encoder").is_dir() and (folder / "model_index.json").is_file() else None


def local_source(source: str) -> Path:
    """``source`` as a path; a hub id's files (safetensors and JSON only) are fetched into the local cache.

    Raises:
        CheckpointError: if there is neither such a path nor such a reachable id.
    """
    path = Path(source)
    if path.exists():
        return path
    if source.count("/") != 1 or source.startswith((".", "/", "~")) or path.suffix in WEIGHT_SUFFIXES:
        raise CheckpointError(
            f"{source}: no such file or folder; give a checkpoint, a folder, or a hub id (owner/name)"
        )
    try:
        return Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # the hub library's errors, and those of whatever it speaks HTTP with, share no base
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{source}: neither a path here nor a reachable hub id ({reason}); check the name, or copy the folder here"
        ) from error
