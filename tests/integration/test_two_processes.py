"""Two processes train what one trains: the global batch decides, not who computes which part of it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from leafseg.runs import checkpoint_folder, checkpoint_steps
from leafseg.training.tracking import read_metrics
from leafseg.training.trainer import TrainingResult

Train = Callable[..., TrainingResult]

# Everything that has a part in more than one process: accumulation, all losses, cached features, mixed samples,
# validation, EMA.
# Without dropout, whose masks are drawn per process.
SETTINGS = (
    "training.steps=4", "training.validations=2", "training.batch_size=4", "training.micro_batch_size=1",
    "model.unet.dropout=0", "model.image_encoder_dropout=0",
    "objective.alignment_weight=0.5", "teacher.features=cached",
    "objective.terminal_fraction=0.5", "objective.pixel_weight=1.0", "data.augmentation.mix=0.5",
)  # fmt: skip


@pytest.fixture(scope="module")
def settings(teacher: Path) -> tuple[str, ...]:
    return (*SETTINGS, f"teacher.name={teacher}")


@pytest.fixture(scope="module")
def one(train_tiny: Train, data: Path, settings: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps in this process."""
    run = tmp_path_factory.mktemp("one") / "run"
    train_tiny(data, run, *settings)
    return run


@pytest.fixture(scope="module")
def two(
    train_tiny: Train,
    data: Path,
    settings: tuple[str, ...],
    tiny_config: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, str]:
    """Two steps in two processes, then two more in this one; and what the two processes printed."""
    run = tmp_path_factory.mktemp("two") / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "leafseg", "train", "--config", str(tiny_config), "--data", str(data), "--out", str(run)]
    command += ["--stop-after", "2", *(part for change in settings for part in ("--set", change))]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    assert checkpoint_steps(run) == [2]
    train_tiny(data, run, *settings, resume=True)
    return run, ended.stdout


def test_two_processes_compute_the_losses_and_gradients_of_one(one: Path, two: tuple[Path, str]) -> None:
    expected, got = read_metrics(one), read_metrics(two[0])
    assert [line["step"] for line in expected] == [line["step"] for line in got] == [2, 2, 4, 4]
    for line, other in zip(expected, got, strict=True):
        assert line.keys() == other.keys()
        for name, value in line.items():
            if name != "train/samples_per_second":
                assert other[name] == pytest.approx(value, rel=2e-3, abs=2e-4), (line["step"], name)


def test_weights_of_one_and_two_processes_agree_to_rounding(one: Path, two: tuple[Path, str]) -> None:
    weights = [load_file(checkpoint_folder(run, 4) / "trainer" / "weights.safetensors") for run in (one, two[0])]
    assert weights[0].keys() == weights[1].keys()  # no "module." of the wrapper
    differences = torch.cat([(weights[0][name] - weights[1][name]).abs().flatten() for name in weights[0]])
    # AdamW's first steps are about the gradient's sign, which rounding may turn where the gradient is almost zero: such
    # a weight is off by at most two rates (0.001) a step, and there are few.
    assert differences.max() < 8e-3
    assert (differences < 1e-5).double().mean() > 0.98


def test_only_one_of_the_processes_prints_and_writes(two: tuple[Path, str]) -> None:
    run, stdout = two
    assert stdout.count("stopped at step 2 of 4") == 1
    assert sorted(p.name for p in run.iterdir()) == [
        "checkpoints", "data_check.json", "features", "metrics.jsonl", "pipeline", "run.json", "split.csv",
        "tensorboard",
    ]  # fmt: skip
    assert list(run.rglob(".tmp-*")) == []
    assert list(run.rglob("*.partial")) == []
