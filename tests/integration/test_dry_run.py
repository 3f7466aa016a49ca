"""``leafseg train --dry-run``: everything is built and tried, and nothing is left behind."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from leafseg.config import Settings, override_settings
from leafseg.model_folder import folder_bytes
from leafseg.runs import checkpoint_folder
from leafseg.training.dry_run import DryRun, describe, dry_run
from leafseg.training.trainer import TrainingResult

Cli = Callable[..., Any]
Train = Callable[..., TrainingResult]


def content(*folders: Path) -> dict[str, str]:
    """Every file below, with a hash of what it holds."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def number(text: str) -> float:
    """A printed size in bytes."""
    value, unit = text.split()
    return float(value) * {"MB": 1e6, "GB": 1e9}[unit]


def test_the_command_prints_what_to_expect_and_writes_nothing(
    cli: Cli, train_tiny: Train, data: Path, teacher: Path, tiny_config: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    places = [tmp_path / name for name in ("here", "temporary", "features")]
    for place in places:
        place.mkdir()
    monkeypatch.chdir(places[0])
    monkeypatch.setattr(tempfile, "tempdir", str(places[1]))
    before = content(data, *places)
    changes = (
        f"teacher.name={teacher}", "teacher.features=cached", f"teacher.cache_dir={places[2]}",
        "objective.alignment_weight=0.5", "training.inference_dtype=fp16",
    )  # fmt: skip
    sets = [part for change in changes for part in ("--set", change)]
    command = ("train", "--config", tiny_config, "--data", data, *sets)
    ended = cli(*command, "--dry-run", "--out", tmp_path / "run")

    assert ended.code == 0
    assert content(data, *places) == before
    assert not (tmp_path / "run").exists()
    lines = dict(re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in ended.stdout.splitlines()[1:])

    # What it announces is what a training then leaves.
    train_tiny(data, tmp_path / "run", *changes, "training.steps=1", "training.validations=0")
    checkpoint = checkpoint_folder(tmp_path / "run", 1)
    announced = re.fullmatch(r"trainer state ([\d.]+ [MG]B) .*, model ([\d.]+ [MG]B) .*", lines["on disk"])
    assert announced is not None
    for text, folder in zip(announced.groups(), ("trainer", "pipeline"), strict=True):
        assert number(text) == pytest.approx(folder_bytes(checkpoint / folder), rel=0.15, abs=1e5)
    assert lines["device"].startswith(f"cpu ({torch.get_num_threads()} thread")
    assert lines["device"].endswith("), fp32, 1 process")
    assert lines["steps"].startswith("4 of 2 samples; a pass over the training set is ")
    assert lines["validations"].startswith("2, ")
    assert set(lines) == {
        "trained", "frozen", "training only", "device", "memory", "on disk", "data", "steps", "one step",
        "validations", "features", "expected time",
    }  # fmt: skip


@pytest.fixture(scope="module")
def found(tiny_settings: Settings, data: Path, teacher: Path) -> DryRun:
    changes = ["objective.alignment_weight=0.5", f"teacher.name={teacher}", "training.ema_parts=unet"]
    return dry_run(override_settings(tiny_settings, changes), data)


def test_parameters_are_counted_by_what_becomes_of_them(found: DryRun, tiny_components: Any, teacher: Path) -> None:
    def count(module: torch.nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    assert found.trained == {
        "unet": count(tiny_components.unet),
        "image encoder": count(tiny_components.image_encoder),
    }
    assert found.frozen == {"autoencoder": count(tiny_components.autoencoder)}
    # 32 tapped channels -> 16 -> 16 -> 16 of the teacher, each with a bias.
    assert found.training_only["projector"] == 32 * 16 + 16 + 2 * (16 * 16 + 16)
    assert found.training_only["teacher"] == count(transformers.Dinov2Model.from_pretrained(teacher))
    assert found.averaged == found.trained["unet"]
    trained = sum(found.trained.values()) + found.training_only["projector"]
    # Weights, two moments (and a step count a tensor), and the average of the U-Net, in 4 bytes each.
    assert found.trainer_bytes == pytest.approx(4 * (3 * trained + found.averaged), rel=0.01)
    assert found.inference_bytes == 4 * (sum(found.trained.values()) + found.frozen["autoencoder"])


def test_the_expected_time_is_that_of_its_parts(found: DryRun) -> None:
    assert found.steps == 4
    assert found.validations == 2
    assert 0 < found.step_seconds < 60
    assert 0 < found.validation_seconds < 60
    assert found.preparation_seconds == 0  # a live teacher prepares nothing
    expected = 4 * found.step_seconds + 2 * found.validation_seconds
    assert found.total_seconds == pytest.approx(expected)
    assert found.peak_bytes > 5e7  # torch alone takes more
    assert "training only projector" in " ".join(" ".join(describe(found)).split())


def test_minutes_are_turned_into_steps_that_fit_them(tiny_settings: Settings, data: Path) -> None:
    found = dry_run(override_settings(tiny_settings, ["training.minutes=0.4", "training.validations=0"]), data)
    assert found.steps > 4
    assert found.validations == found.validation_seconds == 0
    assert found.total_seconds < 0.4 * 60


def test_a_dry_run_without_budget_or_teacher_ends_as_the_training_would(
    cli: Cli, data: Path, tiny_config: Path, tmp_path: Path
) -> None:
    command = ("train", "--config", tiny_config, "--data", data, "--set", "teacher.name=owner/name")
    command += ("--set", "objective.alignment_weight=0.5")
    dry = cli(*command, "--dry-run").error
    assert "owner/name" in dry
    assert dry == cli(*command, "--out", tmp_path / "run").error
    nothing = ("--set", "training.steps=null")
    assert "no budget: set --steps or --minutes" in cli(*command[:-4], *nothing, "--dry-run").error


def test_a_training_without_out_is_told_of_the_dry_run(cli: Cli, data: Path, tiny_config: Path) -> None:
    assert "no --out: name the run's folder" in cli("train", "--config", tiny_config, "--data", data).error
    assert os.path.isdir(data)
