"""A training that was cut, by whatever, ends in the same bits as one that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from leafseg.config import AutoencoderTrainingSettings, DataSettings, Settings, load_autoencoder_settings
from leafseg.data.manifest import load_manifest
from leafseg.errors import ConfigError
from leafseg.runs import checkpoint_folder, checkpoint_steps
from leafseg.training.autoencoder_task import AutoencoderTask
from leafseg.training.tracking import read_metrics
from leafseg.training.trainer import TrainingResult, train

SameCheckpoint = Callable[[Path, Path, int], None]
Train = Callable[..., TrainingResult]

# Validations after steps 2, 4 and 6: a cut after step 3 lies between two.
SIX_STEPS = ("training.steps=6", "training.validations=3")
PIXELS = ("objective.terminal_fraction=0.5", "objective.pixel_weight=1.0", "training.batch_size=4")


@pytest.fixture(scope="module")
def whole_run(train_tiny: Train, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps in one go."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert train_tiny(data, run, *SIX_STEPS).status == "finished"
    return run


def weights(run: Path, step: int) -> dict[str, object]:
    return load_file(checkpoint_folder(run, step) / "trainer" / "weights.safetensors")


def same_weights(run: Path, other: Path, step: int) -> bool:
    one, two = weights(run, step), weights(other, step)
    return one.keys() == two.keys() and all(bool((one[name] == two[name]).all()) for name in one)


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param((), id="dropout, flips, validation and EMA"),
        pytest.param(
            ("training.batch_size=4", "training.micro_batch_size=2", "objective.prediction_type=v_prediction"),
            id="gradient accumulation, velocity",
        ),
        pytest.param(PIXELS, id="terminal samples and pixel loss"),
        pytest.param(("training.precision=bf16", *PIXELS), id="bf16"),
        pytest.param(
            (
                "data.augmentation.rotation_degrees=20",
                "data.augmentation.scale=[0.8,1.2]",
                "data.augmentation.translation=0.1",
                "data.augmentation.contrast=0.2",
                "data.augmentation.gamma=0.2",
                "training.schedule=cosine",
            ),
            id="every augmentation, cosine",
        ),
    ],
)
def test_three_steps_and_three_more_are_six_steps(
    train_tiny: Train, data: Path, tmp_path: Path, same_checkpoint: SameCheckpoint, overrides: tuple[str, ...]
) -> None:
    train_tiny(data, tmp_path / "whole", *SIX_STEPS, *overrides)

    first = train_tiny(data, tmp_path / "cut", *SIX_STEPS, *overrides, stop_after=3)
    second = train_tiny(data, tmp_path / "cut", *SIX_STEPS, *overrides, resume=True)

    assert (first.status, first.step, first.total_steps) == ("stopped", 3, 6)
    assert (second.status, second.step) == ("finished", 6)
    same_checkpoint(tmp_path / "whole", tmp_path / "cut", 6)


def test_the_log_of_a_resumed_run_has_each_validation_once_and_in_order(
    train_tiny: Train, data: Path, tmp_path: Path, whole_run: Path
) -> None:
    run = tmp_path / "run"
    train_tiny(data, run, *SIX_STEPS, stop_after=3)
    with (run / "metrics.jsonl").open(
        "a"
    ) as log:  # a kill after step 4, before its checkpoint, in the middle of a line
        log.write('{"step": 4, "validation/score": 0.9}\n{"step": 5, "train/lo')
    train_tiny(data, run, *SIX_STEPS, resume=True)

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines == read_metrics(run)
    assert [line["step"] for line in lines if "train/loss" in line] == [2, 3, 4, 6]
    scores = {line["step"]: line["validation/score"] for line in lines if "validation/score" in line}
    expected = {
        line["step"]: line["validation/score"] for line in read_metrics(whole_run) if "validation/score" in line
    }
    assert scores == expected
    assert len([line for line in lines if "validation/score" in line]) == 3


def test_stopping_where_the_run_already_stands_trains_nothing(train_tiny: Train, data: Path, tmp_path: Path) -> None:
    train_tiny(data, tmp_path / "run", *SIX_STEPS, stop_after=3)
    before = weights(tmp_path / "run", 3)
    for stop_after in (3, 2):
        result = train_tiny(data, tmp_path / "run", *SIX_STEPS, resume=True, stop_after=stop_after)
        assert (result.status, result.step) == ("stopped", 3)
    assert checkpoint_steps(tmp_path / "run")[-1] == 3
    assert all(bool((before[name] == value).all()) for name, value in weights(tmp_path / "run", 3).items())


def test_the_same_settings_give_the_same_weights_and_another_seed_others(
    train_tiny: Train, data: Path, tmp_path: Path, whole_run: Path, same_checkpoint: SameCheckpoint
) -> None:
    train_tiny(data, tmp_path / "again", *SIX_STEPS)
    same_checkpoint(whole_run, tmp_path / "again", 6)

    train_tiny(data, tmp_path / "other", *SIX_STEPS, "training.seed=4")
    assert not same_weights(whole_run, tmp_path / "other", 6)


def test_loading_processes_change_no_bit_and_resume_exactly(
    train_tiny: Train, data: Path, tmp_path: Path, whole_run: Path, same_checkpoint: SameCheckpoint
) -> None:
    train_tiny(data, tmp_path / "run", *SIX_STEPS, "data.workers=2", stop_after=3)
    train_tiny(data, tmp_path / "run", *SIX_STEPS, "data.workers=1", resume=True)
    same_checkpoint(whole_run, tmp_path / "run", 6)


def test_accumulated_micro_batches_give_the_gradients_of_the_whole_batch(
    train_tiny: Train, data: Path, tmp_path: Path
) -> None:
    # Without dropout, whose masks are drawn per micro-batch. Gradients are compared, not weights: AdamW's first step is
    # the sign of the gradient, which rounding may turn where the gradient is almost zero.
    still = (
        "model.unet.dropout=0",
        "model.image_encoder_dropout=0",
        "training.batch_size=4",
        "training.steps=1",
        *PIXELS,
    )
    norms = []
    for micro in (1, 2, 4):
        train_tiny(data, tmp_path / str(micro), *still, f"training.micro_batch_size={micro}")
        norms.append(read_metrics(tmp_path / str(micro))[0])
    for line in norms[1:]:
        for name in ("train/loss", "train/prediction", "train/pixel", "train/gradient_norm"):
            assert line[name] == pytest.approx(norms[0][name], rel=1e-4, abs=2e-6)


# --- the autoencoder --------------------------------------------------------------------------------------------------

TINY_AUTOENCODER = (
    "model.block_out_channels=[8,8,16]",
    "model.norm_num_groups=4",
    "preprocessing.size=[32,32]",
    "crop=16",
    "training.batch_size=4",
    "training.steps=6",
    "training.validations=2",
    "training.precision=fp32",
)


def autoencoder_settings(*overrides: str) -> AutoencoderTrainingSettings:
    return load_autoencoder_settings(overrides=(*TINY_AUTOENCODER, *overrides))


def train_autoencoder(data: Path, run: Path, *overrides: str, **options: object) -> TrainingResult:
    settings = autoencoder_settings(*overrides)
    manifest = load_manifest(data, settings=DataSettings())
    task = AutoencoderTask([manifest], settings.model, settings)
    return train(task, settings.training, run, record={"settings": settings.model_dump(mode="json")}, **options)


def test_an_autoencoder_of_before_coarse_masks_is_continued_without_them(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_autoencoder(data, run, "coarse_share=0", stop_after=3)
    record = json.loads((run / "run.json").read_text())
    del record["record"]["settings"]["coarse_share"]
    (run / "run.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=r"settings.coarse_share: 0.0 then, 0.5 now"):
        train_autoencoder(data, run, resume=True)
    assert train_autoencoder(data, run, "coarse_share=0", resume=True).status == "finished"


def test_an_autoencoder_resumes_exactly(data: Path, tmp_path: Path, same_checkpoint: SameCheckpoint) -> None:
    train_autoencoder(data, tmp_path / "whole")
    train_autoencoder(data, tmp_path / "cut", stop_after=4)
    result = train_autoencoder(data, tmp_path / "cut", resume=True, workers=1)
    assert result.status == "finished"
    same_checkpoint(tmp_path / "whole", tmp_path / "cut", 6)
    assert (checkpoint_folder(tmp_path / "cut", 6) / "autoencoder" / "config.json").is_file()


# --- killed in the middle of a save -----------------------------------------------------------------------------------

# One process imports everything and forks a training for each moment; a fork before any thread was started is safe.
KILLER = """
import os, signal, sys
from pathlib import Path
import shutil
import torch
import torch.utils.tensorboard
from leafseg.config import parse_settings
import json
import leafseg.training.checkpoint as checkpoint
import leafseg.training.run as run

settings, data, out, moments = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]
settings = parse_settings(json.loads(settings), source="test")

def die_at(owner, name, when):
    real = getattr(owner, name)
    def deadly(*arguments, **options):
        if when(*arguments):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)
    setattr(owner, name, deadly)

def about_step_4(*arguments):
    return any("step-000004" in str(a) for a in arguments)

MOMENTS = {
    "the weights are written": lambda: die_at(checkpoint, "save_file", about_step_4),
    "the optimizer is written": lambda: die_at(checkpoint.torch, "save", about_step_4),
    "the folder is renamed": lambda: die_at(checkpoint.os, "replace", about_step_4),
    "the old one is removed": lambda: die_at(checkpoint.shutil, "rmtree", lambda p, *a: str(p).endswith("step-000003")),
}
for moment in moments:
    child = os.fork()
    if child == 0:
        MOMENTS[moment]()
        run.run_training(settings, data, out / moment.replace(" ", "-"))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(moment, os.WIFSIGNALED(status) and os.WTERMSIG(status))
"""
MOMENTS = ("the weights are written", "the optimizer is written", "the folder is renamed", "the old one is removed")
# A checkpoint after each step, and no validation that would keep an older one as the best.
SAVING = ("training.steps=6", "training.validations=0", "training.save_every=1")


@pytest.fixture(scope="module")
def killed_runs(
    data: Path, tiny_settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Callable[[str], Path]]:
    """Runs that were killed while the checkpoint of step 4 was saved."""
    from leafseg.config import override_settings

    out = tmp_path_factory.mktemp("killed")
    settings = override_settings(tiny_settings, SAVING).model_dump_json()
    ended = subprocess.run(
        [sys.executable, "-c", KILLER, settings, str(data), str(out), *MOMENTS],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.stdout.splitlines() == [f"{moment} {int(signal.SIGKILL)}" for moment in MOMENTS], ended.stderr
    return lambda moment: out / moment.replace(" ", "-")


@pytest.fixture(scope="module")
def unkilled_run(train_tiny: Train, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("unkilled") / "run"
    train_tiny(data, run, *SAVING)
    return run


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_during_a_save_costs_at_most_that_checkpoint(
    killed_runs: Callable[[str], Path],
    unkilled_run: Path,
    train_tiny: Train,
    data: Path,
    same_checkpoint: SameCheckpoint,
    moment: str,
) -> None:
    run = killed_runs(moment)
    steps = [3, 4] if moment == "the old one is removed" else [3]
    assert checkpoint_steps(run) == steps
    leftovers = [p.name for p in (run / "checkpoints").iterdir() if p.name.endswith(".partial")]
    assert leftovers == ([] if moment == "the old one is removed" else ["step-000004.partial"])

    result = train_tiny(data, run, *SAVING, resume=True)

    assert result.status == "finished"
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-000006"]
    same_checkpoint(unkilled_run, run, 6)


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "workers"),
    [
        pytest.param(signal.SIGTERM, 1, id="SIGTERM with a loading process"),
        pytest.param(signal.SIGINT, 0, id="SIGINT", marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_ends_well_and_the_run_resumes_exactly(
    train_tiny: Train,
    data: Path,
    tiny_config: Path,
    tmp_path: Path,
    same_checkpoint: SameCheckpoint,
    number: signal.Signals,
    workers: int,
) -> None:
    run = tmp_path / "run"
    budget = ("training.steps=60", "training.validations=0")
    command = [sys.executable, "-m", "leafseg", "train", "--config", str(tiny_config), "--data", str(data)]
    command += ["--out", str(run), *(part for item in budget for part in ("--set", item))]
    command += ["--set", f"data.workers={workers}"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        log = run / "metrics.jsonl"
        until = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < until and not (log.is_file() and log.stat().st_size):
            time.sleep(0.01)
        os.killpg(process.pid, number)  # as a terminal does: the loading processes get it too
        stdout, stderr = process.communicate(timeout=60)

    assert process.returncode == 0, stderr
    assert "interrupted at step" in stdout
    assert "--resume auto" in stdout
    assert "Traceback" not in stderr
    stopped_at = checkpoint_steps(run)[-1]
    assert 10 <= stopped_at < 60

    assert train_tiny(data, run, *budget, resume=True).status == "finished"
    train_tiny(data, tmp_path / "whole", *budget)
    same_checkpoint(tmp_path / "whole", run, 60)
