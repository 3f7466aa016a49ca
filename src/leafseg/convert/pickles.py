"""Tensors out of a checkpoint file, without running anything that came with it."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from leafseg.errors import CheckpointError

WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")

# Old Lightning files use a callback's class as a dictionary key. An empty class takes its place, by name: nothing of
# Lightning is imported or run. Whatever is not in this list (and not in torch's own) is refused.
_INERT_NAMES = (
    "pytorch_lightning.callbacks.ModelCheckpoint",
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "pytorch_lightning.callbacks.lr_monitor.LearningRateMonitor",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
)


def _inert_class(name: str) -> type:
    def ignore(self: object, *_arguments: object, **_named: object) -> None:
        """Takes whatever the file would build it from, and keeps none of it."""

    return type("Inert" + name.rpartition(".")[2], (), {"__init__": ignore, "__setstate__": ignore})


_INERT_CLASSES: list[Any] = [(_inert_class(name), name) for name in _INERT_NAMES]


@dataclass(frozen=True)
class TensorFile:
    """What a weight file holds.

    Attributes:
        tensors: by their stored names, in their stored types.
        other_entries: names of what stands beside the state dict (epoch, callbacks, optimizer states).
    """

    path: Path
    tensors: dict[str, Tensor]
    other_entries: tuple[str, ...] = ()


def load_tensors(path: Path) -> TensorFile:
    """Read a safetensors file, or a torch file through the unpickler that builds tensors and plain values only.

    Raises:
        CheckpointError: if the file is missing, damaged, holds no state dict, or names a global that is not allowed.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; check the path")
    if path.suffix == ".safetensors":
        try:
            return TensorFile(path, load_file(path))
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"{path}: not a readable safetensors file ({_first_line(error)}); copy or download it again"
            ) from error
    content = _load_pickle(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}; a checkpoint is a dictionary of tensors")
    state = content.get("state_dict", content)
    others = [] if state is content else [_entry_name(key) for key in content if key != "state_dict"]
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path}: its state_dict is a {type(state).__name__}; it must be a dictionary of tensors")
    wrong = [str(key) for key, value in state.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if wrong or not state:
        detail = f"{len(wrong)} entries are no tensors, {', '.join(wrong[:3])}" if wrong else "it is empty"
        raise CheckpointError(
            f"{path}: not a state dict ({detail}); give a file with the weights under 'state_dict', or only weights"
        )
    return TensorFile(path, dict(state), tuple(others))


def _load_pickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_INERT_CLASSES):
            # Mapped, so that a file with optimizer states costs only the memory of what is converted.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except MemoryError:
        raise
    except Exception as error:  # damaged or hostile bytes make the unpickler fail in any way
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named:
            raise CheckpointError(
                f"{path}: refused, because it names {named.group(1)}, and loading it could run code; take the tensors "
                "out where you trust the file (torch.save of its state_dict alone), and convert that"
            ) from error
        raise CheckpointError(
            f"{path}: not a readable checkpoint ({_first_line(error)}); copy or download it again"
        ) from error


def _entry_name(key: Any) -> str:
    return key if isinstance(key, str) else repr(key)


def _first_line(error: BaseException) -> str:
    # torch's own text goes on about how to switch the protection off.
    return (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0].rstrip(".")
