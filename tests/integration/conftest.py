"""Runs of the tiny model: trained through the library, or through the command line inside this process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from leafseg.cli import main
from leafseg.config import Settings, override_settings
from leafseg.runs import checkpoint_folder
from leafseg.training.run import run_training
from leafseg.training.trainer import TrainingResult

Train = Callable[..., TrainingResult]


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def error(self) -> str:
        """The one line on standard error that a failed command leaves."""
        assert self.code == 2, (self.code, self.stdout, self.stderr)
        lines = self.stderr.splitlines()
        assert len(lines) == 1, self.stderr
        assert lines[0].startswith("error: ")
        assert "Traceback" not in self.stdout
        return lines[0]


Cli = Callable[..., Ended]


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # for processes that a test starts; this one has read it already
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def data(tiny_data: Callable[..., Path]) -> Path:
    """Forty small images with masks; not to be changed."""
    return tiny_data()


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random DINOv2 in a folder, 16 wide; not to be changed."""
    folder = tmp_path_factory.mktemp("teacher")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.Dinov2Config(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
        )
        transformers.Dinov2Model(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def train_tiny(tiny_settings: Settings) -> Train:
    """``train_tiny(data, out, *overrides, **options of run_training)``."""

    def train(data: Path, out: Path, *overrides: str, **options: object) -> TrainingResult:
        return run_training(override_settings(tiny_settings, overrides), data, out, **options)

    return train


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """``cli("train", "--out", path, ...)`` as the shell would call it, without the seconds that imports take."""

    def run(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["leafseg", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return Ended(int(stop.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def tiny_config(tiny_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny settings as a file for ``--config``; JSON is YAML too."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(tiny_settings.model_dump_json(indent=1))
    return path


@pytest.fixture(scope="session")
def same_checkpoint() -> Callable[[Path, Path, int], None]:
    """``same_checkpoint(run, other, step)`` fails unless both hold the same checkpoint bit for bit."""

    def check(run: Path, other: Path, step: int) -> None:
        one, two = checkpoint_folder(run, step), checkpoint_folder(other, step)
        files = sorted(str(p.relative_to(one)) for p in one.rglob("*") if p.is_file())
        assert files == sorted(str(p.relative_to(two)) for p in two.rglob("*") if p.is_file())
        assert {"trainer/weights.safetensors", "trainer/ema.safetensors", "trainer/optimizer.pt"} <= set(files)
        for name in files:
            if name.endswith(".pt"):  # an archive, whose bytes may differ where its content does not
                optimizers = [torch.load(folder / name, weights_only=True) for folder in (one, two)]
                assert_equal(optimizers[0], optimizers[1], name)
            elif name.endswith(".safetensors"):
                assert_equal(load_file(one / name), load_file(two / name), name)
            else:
                assert (one / name).read_text() == (two / name).read_text(), name

    return check


def assert_equal(one: object, two: object, where: str) -> None:
    """Nested dictionaries and lists of tensors and plain values are equal, tensors bit for bit."""
    assert type(one) is type(two), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two), where
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for name in one:
            assert_equal(one[name], two[name], f"{where} {name}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(two), where
        for index, (a, b) in enumerate(zip(one, two, strict=True)):
            assert_equal(a, b, f"{where} {index}")
    else:
        assert one == two, where
