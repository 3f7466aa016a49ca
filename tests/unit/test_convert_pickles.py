"""Checkpoint files are read without running what came with them."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from leafseg.convert.pickles import load_tensors
from leafseg.errors import CheckpointError


@contextmanager
def pretended_class(name: str) -> Iterator[type]:
    """A class that pickles under ``name`` without its package being installed."""
    module, _, leaf = name.rpartition(".")
    parents = [".".join(module.split(".")[: i + 1]) for i in range(module.count(".") + 1)]
    made = {parent: ModuleType(parent) for parent in parents}
    kind = type(leaf, (), {"__module__": module})
    setattr(made[module], leaf, kind)
    assert not set(made) & set(sys.modules)
    sys.modules.update(made)
    try:
        yield kind
    finally:
        for parent in made:
            del sys.modules[parent]


class Command:
    """Runs a command where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize(
    "name",
    ["pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint", "pytorch_lightning.callbacks.ModelCheckpoint"],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_an_old_lightning_file_with_a_callback_as_a_key_is_read(tmp_path: Path, name: str, zipped: bool) -> None:
    weight, path = torch.arange(6.0), tmp_path / "model.ckpt"
    with pretended_class(name) as callback:
        content = {"epoch": 3, "callbacks": {callback: {"best": 0.5}}, "state_dict": {"a.weight": weight}}
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert "pytorch_lightning" not in sys.modules
    file = load_tensors(path)
    assert list(file.tensors) == ["a.weight"]
    assert torch.equal(file.tensors["a.weight"], weight)
    assert file.other_entries == ("epoch", "callbacks")
    assert "pytorch_lightning" not in sys.modules


def test_an_instance_of_an_allowed_callback_runs_nothing_and_keeps_nothing(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    with pretended_class("pytorch_lightning.callbacks.ModelCheckpoint") as callback:
        instance = callback()
        instance.__dict__["dirpath"] = "somewhere"
        torch.save({"callbacks": [instance], "state_dict": {"w": torch.ones(1)}}, path)
    assert list(load_tensors(path).tensors) == ["w"]


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_would_run_a_command_is_refused_by_its_name_and_not_run(tmp_path: Path, zipped: bool) -> None:
    path, marker = tmp_path / "model.ckpt", tmp_path / "ran"
    content = {"state_dict": {"w": torch.ones(1)}, "hook": Command(marker)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        CheckpointError, match=rf"model\.ckpt: refused, because it names {os.system.__module__}\.system"
    ):
        load_tensors(path)
    assert not marker.exists()


def test_a_class_that_is_not_in_the_list_is_refused_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    with pretended_class("somebody.models.Network") as network:
        torch.save({"state_dict": {"w": torch.ones(1)}, "net": network}, path)
    with pytest.raises(CheckpointError, match=r"refused, because it names somebody\.models\.Network, and"):
        load_tensors(path)


def test_the_allowance_ends_with_the_call(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    with pretended_class("pytorch_lightning.callbacks.ModelCheckpoint") as callback:
        torch.save({"callbacks": {callback: 1}, "state_dict": {"w": torch.ones(1)}}, path)
    load_tensors(path)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not an archive", b"\x80\x02}", b"\xff\x00nothing"])
def test_a_damaged_file_is_one_sentence(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"not a readable .* copy or download it again"):
        load_tensors(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([1, 2], "holds a list"),
        ({"state_dict": [1]}, "its state_dict is a list"),
        ({"state_dict": {}}, "it is empty"),
        ({"w": torch.ones(1), "step": 3}, "1 entries are no tensors, step"),
    ],
)
def test_a_file_without_a_state_dict_is_one_sentence(tmp_path: Path, content: object, said: str) -> None:
    path = tmp_path / "model.pt"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=said):
        load_tensors(path)


def test_a_safetensors_file_is_read_as_it_is(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    file = load_tensors(tmp_path / "model.safetensors")
    assert file.tensors["w"].dtype == torch.bfloat16
    assert file.other_entries == ()
