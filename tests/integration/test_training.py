"""What the training loop promises besides resuming: what it updates, what it reads, and what it says when it cannot."""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from leafseg.config import AugmentationSettings, Settings, TrainingSettings, override_settings
from leafseg.data.manifest import Manifest, load_manifest
from leafseg.data.transforms import augment, draw_augmentation
from leafseg.errors import CheckpointError, ConfigError, DataError
from leafseg.pipeline import LeafPipeline
from leafseg.runs import best_checkpoint, checkpoint_folder, checkpoint_steps
from leafseg.training import loading
from leafseg.training.leaf_task import LeafTask
from leafseg.training.tracking import read_metrics
from leafseg.training.trainer import TrainingResult, learning_rate, train

Train = Callable[..., TrainingResult]


def trained_task(settings: Settings, data: Path, run: Path, *, manifest: Manifest | None = None) -> LeafTask:
    """A task after its training."""
    task = LeafTask(settings, manifest or load_manifest(data, settings=settings.data))
    train(task, settings.training, run, record=task.record())
    return task


def trainer_tensors(run: Path, step: int, name: str = "weights") -> dict[str, torch.Tensor]:
    return load_file(checkpoint_folder(run, step) / "trainer" / f"{name}.safetensors")


# --- the schedule ---


def test_the_rate_warms_up_linearly_and_stays_constant() -> None:
    settings = TrainingSettings(learning_rate=0.5, warmup_steps=4, schedule="constant")
    rates = [learning_rate(settings, step, 20, 4) for step in range(20)]
    assert rates == [0.125, 0.25, 0.375, *([0.5] * 17)]


def test_the_cosine_falls_from_the_full_rate_to_almost_nothing() -> None:
    settings = TrainingSettings(learning_rate=2.0, warmup_steps=10, schedule="cosine")
    rates = [learning_rate(settings, step, 110, 10) for step in range(110)]
    assert rates[9] == rates[10] == 2.0  # the warm-up ends where the cosine begins
    assert rates[60] == pytest.approx(1.0)  # half way: cos(pi / 2) = 0
    assert rates[-1] == pytest.approx(1 + math.cos(math.pi * 99 / 100))
    assert rates[-1] < 2.0 * 3e-4
    assert all(a >= b for a, b in itertools.pairwise(rates[9:]))


def test_a_schedule_without_warm_up_and_one_of_a_single_step_are_defined() -> None:
    settings = TrainingSettings(learning_rate=1.0, warmup_steps=0, schedule="cosine")
    assert learning_rate(settings, 0, 1, 0) == 1.0


def test_the_logged_rate_is_that_of_the_step_before(train_tiny: Train, data: Path, tmp_path: Path) -> None:
    # Step 20 (1-based) is update 19: warm-up is at most a tenth of the run, two steps, so 17 of 18 steps are behind it.
    train_tiny(
        data, tmp_path, "training.steps=20", "training.validations=0",
        "training.schedule=cosine", "training.warmup_steps=1000",
    )  # fmt: skip
    logged = {line["step"]: line["train/learning_rate"] for line in read_metrics(tmp_path)}
    assert logged[20] == pytest.approx(1e-3 * 0.5 * (1 + math.cos(math.pi * 17 / 18)), abs=1e-6)
    assert logged[10] == pytest.approx(1e-3 * 0.5 * (1 + math.cos(math.pi * 7 / 18)), abs=1e-6)


def test_minutes_become_steps_once_and_a_resumed_run_keeps_them(train_tiny: Train, data: Path, tmp_path: Path) -> None:
    first = train_tiny(data, tmp_path / "run", "training.minutes=0.3", stop_after=2)
    stored = json.loads((tmp_path / "run" / "run.json").read_text())
    calibration = stored["record"]["calibration"]
    assert first.total_steps == stored["total_steps"] == calibration["steps"] > 2
    assert calibration["minutes"] == 0.3
    # The plan fits: steps and two validations within the minutes less what was used before.
    planned = calibration["steps"] * calibration["seconds_per_step"] + 2 * calibration["seconds_per_validation"]
    assert planned < 0.3 * 60 - calibration["seconds_before_training"] + 0.1

    second = train_tiny(data, tmp_path / "run", "training.minutes=0.6", resume=True, stop_after=3)
    assert second.total_steps == first.total_steps
    assert json.loads((tmp_path / "run" / "run.json").read_text())["record"]["calibration"] == calibration


def test_the_calibration_changes_no_weight(train_tiny: Train, data: Path, tmp_path: Path) -> None:
    train_tiny(data, tmp_path / "minutes", "training.minutes=0.3", "training.warmup_steps=0", stop_after=2)
    train_tiny(data, tmp_path / "steps", "training.steps=2", "training.warmup_steps=0")
    timed, counted = trainer_tensors(tmp_path / "minutes", 2), trainer_tensors(tmp_path / "steps", 2)
    assert all(torch.equal(timed[name], counted[name]) for name in counted)


# --- what is updated ---


def test_weight_decay_is_for_matrices_and_kernels_only(train_tiny: Train, data: Path, tmp_path: Path) -> None:
    train_tiny(data, tmp_path, "training.steps=1", "training.weight_decay=0.07")
    stored = torch.load(checkpoint_folder(tmp_path, 1) / "trainer" / "optimizer.pt", weights_only=True)["optimizer"]
    dimensions = {
        group["weight_decay"]: {stored["state"][index]["exp_avg"].ndim for index in group["params"]}
        for group in stored["param_groups"]
    }
    assert dimensions.keys() == {0.07, 0.0}
    assert dimensions[0.0] == {1}
    assert 1 not in dimensions[0.07]
    every = [index for group in stored["param_groups"] for index in group["params"]]
    assert len(every) == len(set(every)) == len(trainer_tensors(tmp_path, 1))


def test_training_leaves_the_autoencoder_alone_and_trains_everything_else(
    tiny_settings: Settings, data: Path, tmp_path: Path
) -> None:
    settings = override_settings(tiny_settings, ["objective.terminal_fraction=0.5", "objective.pixel_weight=1"])
    manifest = load_manifest(data, settings=settings.data)
    task = LeafTask(settings, manifest)
    frozen = {name: value.clone() for name, value in task.parts.autoencoder.state_dict().items()}
    start = {name: value.clone() for name, value in task.module.state_dict().items()}

    train(task, settings.training, tmp_path, record=task.record())

    after = task.parts.autoencoder.state_dict()
    assert all(torch.equal(after[name], value) for name, value in frozen.items())
    assert all(p.grad is None and not p.requires_grad for p in task.parts.autoencoder.parameters())
    unchanged = [name for name, value in task.module.state_dict().items() if torch.equal(value, start[name])]
    # The encoder's last layer also gives the log-variance, which nothing reads: only weight decay moves those rows.
    assert unchanged == []


def test_validation_and_saving_leave_train_mode_and_the_raw_weights_behind(
    tiny_settings: Settings, data: Path, tmp_path: Path
) -> None:
    task = trained_task(tiny_settings, data, tmp_path)
    assert all(module.training for module in task.module.modules())
    assert not any(module.training for module in task.parts.autoencoder.modules())
    raw = trainer_tensors(tmp_path, 4)
    assert all(torch.equal(value, raw[name]) for name, value in task.module.state_dict().items())


def test_the_saved_model_holds_the_averaged_weights(train_tiny: Train, data: Path, tmp_path: Path) -> None:
    train_tiny(data, tmp_path)
    average = list(trainer_tensors(tmp_path, 4, "ema").values())
    names = list(trainer_tensors(tmp_path, 4))
    pipeline = LeafPipeline.from_pretrained(checkpoint_folder(tmp_path, 4) / "pipeline")
    saved = {f"unet.{k}": v for k, v in pipeline.unet.state_dict().items()}
    saved |= {f"image_encoder.{k}": v for k, v in pipeline.image_encoder.state_dict().items()}
    raw = trainer_tensors(tmp_path, 4)
    assert set(saved) == set(names)
    assert not all(torch.equal(saved[name], raw[name]) for name in names)
    shapes = sorted((tuple(t.shape), float(t.double().sum())) for t in average)
    assert sorted((tuple(t.shape), float(t.double().sum())) for t in saved.values()) == shapes


def test_an_average_with_decay_zero_is_the_raw_weights(train_tiny: Train, data: Path, tmp_path: Path) -> None:
    train_tiny(data, tmp_path, "training.ema_decay=0", "training.steps=2", "training.validations=0")
    raw = trainer_tensors(tmp_path, 2)
    unet = LeafPipeline.from_pretrained(checkpoint_folder(tmp_path, 2) / "pipeline").unet.state_dict()
    for name, value in unet.items():
        torch.testing.assert_close(value, raw[f"unet.{name}"], rtol=0, atol=1e-6)


def test_four_images_are_learned_by_heart(tiny_settings: Settings, data: Path, tmp_path: Path) -> None:
    settings = override_settings(
        tiny_settings,
        (
            "training.steps=60", "training.batch_size=4", "training.validations=0", "training.learning_rate=3e-3",
            "model.unet.dropout=0", "model.image_encoder_dropout=0", "data.augmentation.horizontal_flip=false",
            "objective.terminal_fraction=0.5", "objective.pixel_weight=0.1",
        ),
    )  # fmt: skip
    whole = load_manifest(data, settings=settings.data)
    four = [replace(sample, part="train") for sample in whole.samples[:4]]
    task = trained_task(settings, data, tmp_path / "run", manifest=replace(whole, samples=tuple(four)))

    batch = torch.utils.data.default_collate([task.dataset[1000 + i, i] for i in range(4)])
    with torch.no_grad():
        after = task.loss(task.module.eval(), batch, seed=99)
    fresh = LeafTask(settings, task.dataset.manifest)
    fresh.prepare(torch.device("cpu"), torch.no_grad, tmp_path)
    with torch.no_grad():
        before = fresh.loss(fresh.module.eval(), batch, seed=99)
    assert after["prediction"] < 0.5 * before["prediction"]
    assert after["pixel"] < before["pixel"]


# --- what is read, what is kept ---


def test_the_test_part_is_never_read_and_validation_chooses_the_best(
    tiny_settings: Settings, data: Path, tmp_path: Path
) -> None:
    settings = override_settings(tiny_settings, ["training.steps=6", "training.validations=6"])
    shutil.copytree(data, tmp_path / "data")
    manifest = load_manifest(tmp_path / "data", settings=settings.data)
    for sample in manifest.part("test").samples:
        sample.image.unlink()
        assert sample.mask is not None
        sample.mask.unlink()
    run = tmp_path / "run"

    trained_task(settings, data, run, manifest=manifest)

    scores = {line["step"]: line["validation/score"] for line in read_metrics(run) if "validation/score" in line}
    assert sorted(scores) == [1, 2, 3, 4, 5, 6]
    best = max(scores, key=lambda step: (scores[step], -step))  # the first of equals
    assert checkpoint_steps(run) == sorted({best, 6})
    assert best_checkpoint(run) == checkpoint_folder(run, best)


def test_intermediate_saves_keep_the_best_and_the_last_only(train_tiny: Train, data: Path, tmp_path: Path) -> None:
    result = train_tiny(
        data, tmp_path, "training.steps=7", "training.validations=2", "training.save_every=1", stop_after=6
    )
    # Validations are due after steps 4 and 7 (rounding half to even: 3.5 is 4).
    assert result.best_step == 4
    assert checkpoint_steps(tmp_path) == [4, 6]


def test_the_files_of_a_checkpoint_are_readable_to_whoever_may_read_its_folder(
    train_tiny: Train, data: Path, tmp_path: Path
) -> None:
    train_tiny(data, tmp_path / "run", "training.steps=1", "training.validations=0")
    (tmp_path / "plain").write_text("")
    expected = (tmp_path / "plain").stat().st_mode
    files = [p for p in checkpoint_folder(tmp_path / "run", 1).rglob("*") if p.is_file()]
    assert {p.stat().st_mode for p in files} == {expected}


def test_a_sample_does_not_depend_on_the_threads_of_the_process_that_loads_it() -> None:
    # Large enough that torch cuts an image among its threads; a loading process has one, the training process several.
    every = AugmentationSettings(
        rotation_degrees=20, scale=(0.8, 1.2), translation=0.1, brightness=0.1, contrast=0.3, gamma=0.3
    )
    image = torch.rand(3, 256, 256, generator=torch.Generator().manual_seed(0))
    labels = (image[0] > 0.5).long()
    changes = [draw_augmentation(every, np.random.default_rng(seed)) for seed in range(10)]
    before = torch.get_num_threads()
    results = {}
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results[threads] = [augment(image, labels, change) for change in changes]
    finally:
        torch.set_num_threads(before)
    for threads in (2, 3, 5):
        for (image_one, labels_one), (image_other, labels_other) in zip(results[1], results[threads], strict=True):
            assert torch.equal(image_one, image_other)
            assert torch.equal(labels_one, labels_other)


# --- what can go wrong on the way ---


def test_a_loss_that_is_no_number_ends_the_training_and_keeps_the_checkpoint(
    train_tiny: Train, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.raises(ConfigError, match=r"the loss became nan at step \d.*lower training\.learning_rate"):
        train_tiny(
            data, run, "training.steps=9", "training.learning_rate=1e30", "training.validations=0",
            "training.save_every=1",
        )  # fmt: skip
    assert checkpoint_steps(run)
    LeafPipeline.from_pretrained(checkpoint_folder(run, checkpoint_steps(run)[-1]) / "pipeline")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_after_the_check_ends_in_one_sentence(
    tiny_settings: Settings, data: Path, tmp_path: Path, workers: int
) -> None:
    settings = override_settings(tiny_settings, ["training.validations=0", "training.steps=40"])
    shutil.copytree(data, tmp_path / "data")
    manifest = load_manifest(tmp_path / "data", settings=settings.data)
    for sample in manifest.part("train").samples:
        sample.image.write_bytes(sample.image.read_bytes()[:60])
    task = LeafTask(settings, manifest)
    others = {child.pid for child in multiprocessing.active_children()}
    with pytest.raises(DataError) as caught:
        train(task, settings.training, tmp_path / "run", record=task.record(), workers=workers)
    assert str(caught.value).startswith(str(tmp_path / "data" / "images"))
    assert "\n" not in str(caught.value)
    # The traceback in hand keeps the loader alive, but not its process, for which Python would wait at exit.
    assert {child.pid for child in multiprocessing.active_children()} <= others


def test_a_process_that_no_longer_listens_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_PATIENCE", 0.1)
    spawn = multiprocessing.get_context("spawn")
    before = spawn.Process(target=time.sleep, args=(600,))
    before.start()
    with loading.none_left_behind(), loading.signals_held_back():  # and nothing in this one takes them
        spawn.Process(target=time.sleep, args=(600,)).start()
    assert before in multiprocessing.active_children()
    before.kill()
    before.join(30)
    assert not multiprocessing.active_children()


def test_a_loading_process_that_dies_ends_in_one_sentence(train_tiny: Train, data: Path, tmp_path: Path) -> None:
    others = {child.pid for child in multiprocessing.active_children()}

    def kill_the_first() -> None:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            for child in multiprocessing.active_children():
                if child.pid is not None and child.pid not in others:
                    os.kill(child.pid, signal.SIGKILL)
                    return
            time.sleep(0.01)

    killer = threading.Thread(target=kill_the_first)
    killer.start()
    with pytest.raises(DataError, match=r"a data loading process ended.*lower data\.workers") as caught:
        train_tiny(data, tmp_path, "data.workers=1")
    killer.join()
    assert "\n" not in str(caught.value)


def test_a_batch_that_cannot_be_cut_is_refused_before_anything_is_written(
    tiny_settings: Settings, data: Path, tmp_path: Path
) -> None:
    settings = override_settings(tiny_settings, ["training.batch_size=4", "training.micro_batch_size=3"])
    task = LeafTask(settings, load_manifest(data, settings=settings.data))
    with pytest.raises(
        ConfigError, match=r"training\.batch_size is 4; it must be a multiple of .* training\.micro_batch_size 3"
    ):
        train(task, settings.training, tmp_path / "run", record={})
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_does_not_fit_on_the_disk_leaves_the_one_before_whole(
    train_tiny: Train, data: Path, tmp_path: Path, same_checkpoint: Callable[[Path, Path, int], None]
) -> None:
    resource = pytest.importorskip("resource")
    budget = ("training.steps=6", "training.validations=0")
    train_tiny(data, tmp_path / "whole", *budget)
    run = tmp_path / "run"
    train_tiny(data, run, *budget, stop_after=3)
    before = trainer_tensors(run, 3)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))  # a file that grows beyond it: "File too large"
    try:
        with pytest.raises(CheckpointError) as caught:
            train_tiny(data, run, *budget, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "step-000006: the checkpoint cannot be written" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-000003"]
    assert all(torch.equal(before[name], value) for name, value in trainer_tensors(run, 3).items())

    train_tiny(data, run, *budget, resume=True)
    same_checkpoint(tmp_path / "whole", run, 6)
