"""Fast mode: the arrangement that `leafseg benchmark` found to be the fastest on this machine; models loaded in it.

The file ``fast_mode.json`` lies in the run, or in the pipeline folder of a model without one. It says how to compute,
and holds no code. It counts on the processor, the versions and the model that it was measured with, nowhere else.
"""

from __future__ import annotations

import ctypes
import hashlib
import inspect
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from leafseg.config import TimestepSpacing
from leafseg.errors import CheckpointError, DataError
from leafseg.files import read_json, write_json_atomic
from leafseg.hardware import library_versions, processor
from leafseg.model.autoencoder import MaskDecoder
from leafseg.model.compact import CompactImageEncoder, CompactMaskDecoder
from leafseg.model.folded import Kernels, fold_compact, fold_decoder, fold_encoder, fold_unet, winograd_is_available
from leafseg.model.image_encoder import ImageEncoder
from leafseg.model.unet import MaskUNet
from leafseg.pipeline import LeafPipeline, check_folder
from leafseg.runs import FAST_MODE_FILE, resolve_model, run_of
from leafseg.sampler import inference_timesteps

FORMAT_VERSION = 1
log = logging.getLogger(__name__)

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_STORED_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Parts of a weight's name that stay fp32 until they are folded away: norms, and what makes their scale and shift.
_EXACT = ("norm", "time_emb")


@dataclass(frozen=True)
class Arrangement:
    """How the folded model computes; see :class:`leafseg.model.folded.Kernels`.

    Attributes:
        dtype: of weights and activations.
        channels_last, prepacked, winograd_channels: of the kernels.
        compiled: through ``torch.compile``, which needs a C++ compiler and a minute at each start.
        threads: of torch; None leaves them.
        compact: which parts are the light ones of ``leafseg compact``; the full ones are then not read.
    """

    dtype: Literal["fp32", "bf16"] = "fp32"
    channels_last: bool = True
    prepacked: bool = False
    winograd_channels: int | None = None
    compiled: bool = False
    threads: int | None = None
    compact: Literal["none", "decoder", "encoder", "both"] = "none"

    def kernels(self) -> Kernels:
        return Kernels(_DTYPES[self.dtype], self.channels_last, self.prepacked, self.winograd_channels)


def load_folded(
    model: str,
    arrangement: Arrangement,
    *,
    num_inference_steps: int | None = None,
    timesteps: TimestepSpacing | None = None,
) -> LeafPipeline:
    """A pipeline for this number of steps alone, on the CPU, that never holds the model in another format.

    Weights are read one by one and converted; the autoencoder's encoder is not read.

    Args:
        model: a run, or a pipeline folder.
        arrangement: how it computes.
        num_inference_steps, timesteps: default: the model's recommendation.

    Raises:
        CheckpointError: if the model cannot be loaded, or has parts that fast mode does not know.
    """
    folder = Path(resolve_model(model))
    check_folder(folder)
    index = json.loads((folder / "model_index.json").read_text())
    if arrangement.winograd_channels is not None and not winograd_is_available():
        raise CheckpointError("NNPACK is not in this torch, or not for this processor; choose another arrangement")
    if arrangement.threads is not None:
        torch.set_num_threads(arrangement.threads)
    kernels = arrangement.kernels()
    names = ("preprocessing", "mask_code", "num_inference_steps", "timesteps", "noise", "presence", "format_version")
    options = {name: index[name] for name in names if name in index}
    try:
        scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
        # The largest part first: its temporaries then fall together with the least that stays.
        plain = _read_part(folder / "unet", MaskUNet.from_config, kernels.dtype)
        visited = visited_timesteps(options, scheduler, num_inference_steps, timesteps)
        unet = fold_unet(plain, kernels, timesteps=visited)
        parts = {"unet": unet, **_decoders(folder, arrangement), **_encoders(folder, arrangement)}
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{model}: cannot be loaded for fast mode ({reason}); copy or train it again") from error
    if arrangement.compiled:
        for part in parts.values():
            if not any(weight.is_meta for weight in part.parameters()):
                part.forward = torch.compile(part.forward, dynamic=False)
    _give_back_free_memory()
    pipeline = LeafPipeline(**cast(dict[str, Any], parts), scheduler=scheduler, **options)
    pipeline.decoder = "compact" if "compact_decoder" in parts else "full"
    pipeline.encoder = "compact" if "compact_encoder" in parts else "full"
    return pipeline


def _decoders(folder: Path, arrangement: Arrangement) -> dict[str, nn.Module]:
    """The mask decoder, or the compact one; the full one then tells its config alone, with no memory behind it."""
    kernels = arrangement.kernels()
    if arrangement.compact not in ("decoder", "both"):
        plain = _read_part(folder / "vae", _decoder, kernels.dtype, only=_of_decoder)
        return {"vae": fold_decoder(plain, kernels)}
    with torch.device("meta"):
        told = _decoder(json.loads((folder / "vae" / "config.json").read_text()))
    place = folder / "compact_decoder"
    compact = _read_part(place, CompactMaskDecoder.from_config, kernels.dtype)
    return {"vae": told, "compact_decoder": fold_compact(compact, kernels)}


def _encoders(folder: Path, arrangement: Arrangement) -> dict[str, nn.Module]:
    kernels = arrangement.kernels()
    place = folder / "image_encoder"
    if arrangement.compact not in ("encoder", "both"):
        return {"image_encoder": fold_encoder(_read_part(place, ImageEncoder.from_config, kernels.dtype), kernels)}
    with torch.device("meta"):
        told = ImageEncoder.from_config(json.loads((place / "config.json").read_text()))
    compact = _read_part(folder / "compact_encoder", CompactImageEncoder.from_config, kernels.dtype)
    return {"image_encoder": told, "compact_encoder": fold_compact(compact, kernels)}


def visited_timesteps(
    options: Mapping[str, Any], scheduler: DDIMScheduler, steps: int | None, timesteps: TimestepSpacing | None
) -> list[int]:
    """The timesteps of a call with these arguments to a pipeline with these options."""
    count = int(options.get("num_inference_steps", 1)) if steps is None else steps
    spacing = cast(TimestepSpacing, timesteps or options.get("timesteps", "trailing"))
    return inference_timesteps(int(scheduler.config["num_train_timesteps"]), count, spacing)


def fast_mode_file(model: str) -> Path:
    """Where a model's fast mode is stored.

    Raises:
        CheckpointError: for a hub id, which has no folder here.
    """
    folder = Path(resolve_model(model))
    if not folder.is_dir():
        raise CheckpointError(f"{model}: no such folder; fast mode is stored beside a model, download it into a folder")
    return (run_of(folder) or folder) / FAST_MODE_FILE


def write_fast_mode(model: str, arrangement: Arrangement, figures: Mapping[str, Any]) -> Path:
    """Store an arrangement for this model on this machine, with the figures that spoke for it."""
    path = fast_mode_file(model)
    content = {"format_version": FORMAT_VERSION, "arrangement": asdict(arrangement), **_valid_for(model)}
    write_json_atomic(path, {**content, "figures": dict(figures)})
    return path


def read_fast_mode(model: str) -> Arrangement | None:
    """The stored arrangement; None, with a warning, where it was measured with something else than what is here.

    Raises:
        CheckpointError: if there is none, or it is damaged.
    """
    path = fast_mode_file(model)
    if not path.is_file():
        raise CheckpointError(
            f"{model}: has no {FAST_MODE_FILE} yet; `leafseg benchmark {model}` measures and writes it"
        )
    again = f"`leafseg benchmark {model}` measures again"
    try:
        content = read_json(path)
        arrangement = _arrangement(**content["arrangement"])
        measured_with = {name: content[name] for name in ("processor", "versions", "model")}
    except (DataError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: is no stored fast mode ({error}); {again}") from error
    changed = [name for name, here in _valid_for(model).items() if measured_with[name] != here]
    if changed:
        log.warning("%s: was measured with another %s and is ignored; %s", path, " and other ".join(changed), again)
        return None
    return arrangement


def _arrangement(**stored: Any) -> Arrangement:
    """An arrangement from a file, whose values may be of any type."""
    made = Arrangement(**stored)
    numbers = [number for number in (made.winograd_channels, made.threads) if number is not None]
    switches = (made.channels_last, made.prepacked, made.compiled)
    if (
        made.dtype not in _DTYPES
        or made.compact not in ("none", "decoder", "encoder", "both")
        or not all(type(number) is int and number > 0 for number in numbers)
        or not all(type(switch) is bool for switch in switches)
    ):
        raise ValueError(f"its arrangement is {stored}")
    return made


def _valid_for(model: str) -> dict[str, Any]:
    return {"processor": processor(), "versions": library_versions(), "model": _signature(Path(resolve_model(model)))}


def _signature(folder: Path) -> str:
    """Of a model: its checkpoint's name, its configs, and its weights' sizes (reading them all would take seconds)."""
    step = folder.parent.name if folder.name == "pipeline" else ""
    lines = [step]
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".json" and path.name != FAST_MODE_FILE:
            lines.append(f"{path.relative_to(folder).as_posix()} {hashlib.sha256(path.read_bytes()).hexdigest()}")
        elif path.suffix == ".safetensors":
            lines.append(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _give_back_free_memory() -> None:
    """Of what conversion freed, the C library keeps pages that activations do not fill; glibc can hand them back."""
    with suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _decoder(config: Mapping[str, Any]) -> MaskDecoder:
    """The decoder that an AutoencoderKL's config, or a MaskDecoder's own, describes."""
    names = list(inspect.signature(MaskDecoder.__init__).parameters)[1:]
    return MaskDecoder(**{name: config[name] for name in names if name in config})


def _of_decoder(name: str) -> bool:
    return name.startswith(("decoder.", "post_quant_conv."))


def _read_part(
    folder: Path,
    build: Callable[[dict[str, Any]], Any],
    dtype: torch.dtype,
    *,
    only: Callable[[str], bool] = lambda _: True,
) -> Any:
    """A component with its stored weights, converted one by one; norms and time embeddings in fp32."""
    with torch.device("meta"):
        module: nn.Module = build(json.loads((folder / "config.json").read_text()))
    wanted = module.state_dict()
    for name, tensor in stored_tensors(folder, only=only):
        if name not in wanted or tensor.shape != wanted[name].shape:
            raise CheckpointError(f"{folder}: weight {name} is unknown or of another shape; copy the model again")
        del wanted[name]
        owner, _, leaf = name.rpartition(".")
        kind = torch.float32 if any(part in name for part in _EXACT) else dtype
        module.get_submodule(owner)._parameters[leaf] = nn.Parameter(tensor.to(kind, copy=True), requires_grad=False)
    if wanted:
        raise CheckpointError(
            f"{folder}: {len(wanted)} weights are missing ({', '.join([*wanted][:3])}); copy it again"
        )
    return module.eval()


def stored_tensors(folder: Path, *, only: Callable[[str], bool] = lambda _: True) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a folder's safetensors files; a tensor's memory is taken back when the next is asked for.

    The library maps a file into memory, where all that was read of it stays until it is closed: as much again as the
    weights. Reading needs the largest tensor alone, and frees nothing that would leave gaps. The format is eight bytes
    with the length of a JSON header, that header, and the data at its offsets
    (https://github.com/huggingface/safetensors).

    Raises:
        CheckpointError: if a file is damaged.
    """
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with path.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                if length > path.stat().st_size:
                    raise ValueError("its header is longer than the file")
                header = json.loads(stream.read(length))
                header.pop("__metadata__", None)
                chosen = {name: entry for name, entry in header.items() if only(name)}
                sizes = [entry["data_offsets"][1] - entry["data_offsets"][0] for entry in chosen.values()]
                if max(sizes, default=0) > path.stat().st_size:
                    raise ValueError("a weight is larger than the file")
                memory = torch.empty(max(sizes, default=0), dtype=torch.uint8)
                for (name, entry), size in zip(chosen.items(), sizes, strict=True):
                    stream.seek(8 + length + entry["data_offsets"][0])
                    if stream.readinto(memory[:size].numpy().data) != size:
                        raise ValueError(f"weight {name} is cut off")
                    yield name, memory[:size].view(_STORED_DTYPES[entry["dtype"]]).view(entry["shape"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise CheckpointError(f"{path}: is damaged ({reason}); copy or download it again") from error
