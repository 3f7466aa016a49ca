"""Trainings that spare memory and disk, and those that do as the released code does; and how they resume."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from leafseg.config import Settings, override_settings
from leafseg.data.images import read_image, read_mask
from leafseg.data.manifest import Manifest, load_manifest, save_split
from leafseg.errors import CheckpointError, ConfigError, DataError
from leafseg.model_folder import WEIGHTS_FILE, slim_model
from leafseg.pipeline import LeafPipeline
from leafseg.runs import best_checkpoint, checkpoint_folder, checkpoint_steps
from leafseg.training.leaf_task import LeafTask
from leafseg.training.session import Session
from leafseg.training.tracking import read_metrics
from leafseg.training.trainer import TrainingResult, train

Cli = Callable[..., Any]
Train = Callable[..., TrainingResult]
SameCheckpoint = Callable[[Path, Path, int], None]

FOUR = ("training.steps=4", "training.validations=0")


def trainer_weights(run: Path, step: int, name: str = "weights") -> dict[str, torch.Tensor]:
    return load_file(checkpoint_folder(run, step) / "trainer" / f"{name}.safetensors")


def cut_and_whole(train_tiny: Train, data: Path, place: Path, *overrides: str, **options: object) -> tuple[Path, Path]:
    """A run in one go, and one that was stopped after step 3 and resumed."""
    train_tiny(data, place / "whole", *overrides, **options)
    train_tiny(data, place / "cut", *overrides, stop_after=3, **options)
    train_tiny(data, place / "cut", *overrides, resume=True, **options)
    return place / "whole", place / "cut"


@pytest.fixture(scope="module")
def plain(train_tiny: Train, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps with nothing special, and no validation."""
    run = tmp_path_factory.mktemp("plain") / "run"
    train_tiny(data, run, *FOUR)
    return run


# --- memory ---


def test_gradient_checkpointing_changes_no_bit_and_may_be_switched_when_a_run_goes_on(
    train_tiny: Train, data: Path, tmp_path: Path, plain: Path, same_checkpoint: SameCheckpoint
) -> None:
    train_tiny(data, tmp_path, *FOUR, "training.gradient_checkpointing=true", stop_after=3)
    train_tiny(data, tmp_path, *FOUR, resume=True)
    same_checkpoint(plain, tmp_path, 4)


def test_gradient_checkpointing_reaches_every_trained_part_and_the_decoder_of_the_pixel_loss(
    tiny_settings: Settings, data: Path
) -> None:
    settings = override_settings(tiny_settings, ["training.gradient_checkpointing=true"])
    task = LeafTask(settings, load_manifest(data, settings=settings.data))
    for part in (task.parts.unet, task.parts.image_encoder):
        assert part.is_gradient_checkpointing
    assert any("forward" in module.__dict__ for module in task.parts.autoencoder.decoder.modules())


def test_frozen_parts_have_no_gradient_no_optimizer_state_no_average_and_are_in_no_trainer_state(
    tiny_settings: Settings, data: Path, teacher: Path, tmp_path: Path
) -> None:
    settings = override_settings(
        tiny_settings,
        [f"teacher.name={teacher}", "objective.alignment_weight=0.5", "objective.pixel_weight=1", "training.steps=1"],
    )
    task = LeafTask(settings, load_manifest(data, settings=settings.data))
    assert task.teacher is not None
    frozen = {id(p) for module in (task.parts.autoencoder, task.teacher.model) for p in module.parameters()}
    session = Session(task, settings.training, tmp_path)
    for parts in session.batches(0, 1):
        session.backward(parts, 0)
        for module in (task.parts.autoencoder, task.teacher.model):
            assert all(p.grad is None and not p.requires_grad for p in module.parameters())
        session.update(1e-3)
    trained = list(task.module.parameters())
    assert not frozen & {id(p) for p in trained}
    held = {id(p) for group in session.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in trained}
    assert sum(p.numel() for p in session.ema.shadow_params) == sum(p.numel() for p in trained)

    train(task, settings.training, tmp_path / "run", record=task.record())
    names = trainer_weights(tmp_path / "run", 1)
    assert {name.split(".")[0] for name in names} == {"unet", "image_encoder", "projector"}


def test_a_run_with_the_8_bit_optimizer_resumes_exactly(
    train_tiny: Train, data: Path, tmp_path: Path, plain: Path, same_checkpoint: SameCheckpoint
) -> None:
    pytest.importorskip("bitsandbytes", reason="needs the extra leafseg[optim8]")
    whole, cut = cut_and_whole(train_tiny, data, tmp_path, *FOUR, "training.optimizer=adamw_8bit")
    same_checkpoint(whole, cut, 4)
    state = torch.load(checkpoint_folder(whole, 4) / "trainer" / "optimizer.pt", weights_only=True)
    quantised = [s["__bnb_optimizer_quant_state__"] for s in state["optimizer"]["state"].values()]
    assert {q["state1"].dtype for q in quantised} == {torch.uint8, torch.float32}  # small ones stay in 32 bits
    sizes = [(checkpoint_folder(run, 4) / "trainer" / "optimizer.pt").stat().st_size for run in (whole, plain)]
    assert sizes[0] < 0.7 * sizes[1]
    # Without dropout, whose masks are drawn in the order of memory, which differs.
    still = ("model.unet.dropout=0", "model.image_encoder_dropout=0", "training.steps=10", "training.validations=0")
    for kind in ("adamw", "adamw_8bit"):
        train_tiny(data, tmp_path / kind, *still, f"training.optimizer={kind}")
    losses = [read_metrics(tmp_path / kind)[-1]["train/loss"] for kind in ("adamw", "adamw_8bit")]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


# --- disk ---

# The first of equal scores stays the best one. Validations after steps 2, 4 and 6.
THREE = ("training.steps=6", "training.validations=3")


@pytest.fixture
def equal_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    real = LeafTask.summarise
    monkeypatch.setattr(LeafTask, "summarise", lambda self, rows: replace(real(self, rows), score=0.5))


@pytest.mark.usefixtures("equal_scores")
def test_an_older_best_checkpoint_keeps_its_model_only_and_shares_the_frozen_weights(
    train_tiny: Train, cli: Cli, data: Path, tiny_config: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train_tiny(data, run, *THREE)
    assert checkpoint_steps(run) == [2, 6]
    assert best_checkpoint(run) == checkpoint_folder(run, 2)
    best, last = checkpoint_folder(run, 2), checkpoint_folder(run, 6)
    assert [p.name for p in (best / "trainer").iterdir()] == ["state.json"]
    assert sorted(p.name for p in (last / "trainer").iterdir()) == [
        "ema.safetensors", "optimizer.pt", "state.json", "weights.safetensors",
    ]  # fmt: skip
    frozen = [folder / "pipeline" / "vae" / WEIGHTS_FILE for folder in (best, last)]
    assert frozen[0].stat().st_ino == frozen[1].stat().st_ino
    assert frozen[0].stat().st_nlink == 2
    copied = shutil.copytree(best / "pipeline", tmp_path / "alone")  # a complete model by itself
    shutil.rmtree(last)
    LeafPipeline.from_pretrained(copied)

    # Now nothing is left to continue from: one sentence, whose remedy works.
    resume = ("train", "--config", tiny_config, "--data", data, "--set", "training.steps=6")
    ended = cli(*resume, "--out", run, "--resume", "auto", "--set", "training.validations=3")
    assert "only the last checkpoint keeps the trainer's state" in ended.error
    assert f"--init-from {best / 'pipeline'}" in ended.error
    again = cli(*resume, "--out", tmp_path / "new", "--init-from", best / "pipeline")
    assert "finished at step 6 of 6" in again.stdout


@pytest.mark.usefixtures("equal_scores")
def test_pruning_that_was_cut_short_is_made_up_for_and_the_newest_whole_checkpoint_goes_on(
    train_tiny: Train, data: Path, tmp_path: Path, same_checkpoint: SameCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:  # a kill after the new checkpoint has its name and before anything is removed
        patch.setattr("leafseg.training.trainer.prune_checkpoints", lambda *_, **__: None)
        train_tiny(data, run, *THREE, stop_after=4)
    assert checkpoint_steps(run) == [2, 4]
    for step in (2, 4):
        assert (checkpoint_folder(run, step) / "trainer" / "optimizer.pt").is_file()

    # The newest one cannot be used: the one before still can.
    broken = shutil.copytree(run, tmp_path / "broken")
    (checkpoint_folder(broken, 4) / "trainer" / "weights.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"damaged .* remove this folder to continue from the one before"):
        train_tiny(data, broken, *THREE, resume=True)
    shutil.rmtree(checkpoint_folder(broken, 4))
    train_tiny(data, broken, *THREE, resume=True)

    train_tiny(data, run, *THREE, resume=True)
    same_checkpoint(broken, run, 6)
    assert checkpoint_steps(run) == [2, 6]
    assert [p.name for p in (checkpoint_folder(run, 2) / "trainer").iterdir()] == ["state.json"]


def test_a_half_precision_run_resumes_exactly_also_from_another_model(
    train_tiny: Train, data: Path, tmp_path: Path, plain: Path, same_checkpoint: SameCheckpoint
) -> None:
    half = ("training.inference_dtype=fp16", "training.steps=4", "training.validations=0")
    start = tmp_path / "start"
    shutil.copytree(checkpoint_folder(plain, 4) / "pipeline", start)
    options = {"init_from": str(start)}
    whole, cut = cut_and_whole(train_tiny, data, tmp_path, *half, **options)
    same_checkpoint(whole, cut, 4)
    pipeline = checkpoint_folder(whole, 4) / "pipeline"
    for part in ("unet", "vae", "image_encoder"):
        assert {v.dtype for v in load_file(pipeline / part / WEIGHTS_FILE).values()} == {torch.float16}
    average = list(trainer_weights(whole, 4, "ema").values())
    assert {v.dtype for v in average} == {torch.float32}
    saved = load_file(pipeline / "image_encoder" / WEIGHTS_FILE)
    assert sum(v.numel() for v in saved.values()) < sum(v.numel() for v in average)
    assert any(torch.equal(saved["quant_conv.weight"], v.half()) for v in average if v.ndim == 4)


def test_training_goes_on_from_no_decoder_alone(train_tiny: Train, data: Path, tmp_path: Path, plain: Path) -> None:
    slim = slim_model(str(plain), tmp_path / "slim", decoder_only=True)
    with pytest.raises(CheckpointError, match=r"--init-from: the model holds the decoder of its autoencoder only"):
        train_tiny(data, tmp_path / "run", *FOUR, init_from=str(slim))


def test_the_command_writes_a_slim_model_that_predicts(cli: Cli, data: Path, tmp_path: Path, plain: Path) -> None:
    ended = cli("slim", plain, "--out", tmp_path / "slim", "--decoder-only")
    assert f"{tmp_path / 'slim'}: " in ended.stdout
    assert "MB in fp16, decoder only" in ended.stdout
    image = sorted((data / "images").iterdir())[0]
    assert cli("predict", tmp_path / "slim", image, "--out", tmp_path / "masks").code == 0
    assert (tmp_path / "masks" / image.name).is_file()
    assert "exists already" in cli("slim", plain, "--out", tmp_path / "slim").error


# --- as the released code does it ---


def test_averaging_the_unet_alone_leaves_the_encoder_raw_and_resumes_exactly(
    train_tiny: Train, data: Path, tmp_path: Path, plain: Path, same_checkpoint: SameCheckpoint
) -> None:
    whole, cut = cut_and_whole(train_tiny, data, tmp_path, *FOUR, "training.ema_parts=unet")
    same_checkpoint(whole, cut, 4)
    raw = trainer_weights(whole, 4)
    for run, is_raw in ((whole, True), (plain, False)):
        saved = load_file(checkpoint_folder(run, 4) / "pipeline" / "image_encoder" / WEIGHTS_FILE)
        assert all(torch.equal(saved[n], raw[f"image_encoder.{n}"]) for n in saved) is is_raw
    saved = load_file(checkpoint_folder(whole, 4) / "pipeline" / "unet" / WEIGHTS_FILE)
    assert not all(torch.equal(saved[n], raw[f"unet.{n}"]) for n in saved)
    assert len(trainer_weights(whole, 4, "ema")) == len([n for n in raw if n.startswith("unet.")])


def test_dropout_that_returns_with_the_next_pass_resumes_exactly(
    train_tiny: Train, data: Path, tmp_path: Path, same_checkpoint: SameCheckpoint
) -> None:
    every = ("training.steps=4", "training.validate_every=2")
    late = (*every, "training.train_mode_after_validation=next_epoch")
    whole, cut = cut_and_whole(train_tiny, data, tmp_path, *late)  # cut after step 3, with dropout off since step 2
    same_checkpoint(whole, cut, 4)
    train_tiny(data, tmp_path / "at once", *every)
    (a, b), (c, d) = (
        [line["train/loss"] for line in read_metrics(run) if line["step"] in (2, 4) and "train/loss" in line]
        for run in (whole, tmp_path / "at once")
    )
    assert a == c  # the first two steps
    assert b != d  # the fourth: without dropout, and with it
    with pytest.raises(ConfigError, match=r"training\.validate_every"):
        train_tiny(data, cut, *late, "training.validate_every=3", resume=True)


@pytest.fixture
def without_validation_part(data: Path, tiny_settings: Settings, tmp_path: Path) -> Path:
    """A split file with train and test only."""
    manifest = load_manifest(data, settings=tiny_settings.data)
    moved = [replace(s, part="train" if s.part == "validation" else s.part) for s in manifest.samples]
    save_split(replace(manifest, samples=tuple(moved)), tmp_path / "split.csv")
    return tmp_path / "split.csv"


def test_a_run_that_the_test_part_chooses_says_so_wherever_it_is_evaluated(
    cli: Cli,
    data: Path,
    tiny_config: Path,
    tmp_path: Path,
    without_validation_part: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = tmp_path / "run"
    command = ("train", "--config", tiny_config, "--data", data, "--split-file", without_validation_part, "--steps", 2)
    assert "no sample falls into the validation part" in cli(*command, "--out", run).error
    assert cli(*command, "--out", run, "--set", "training.selection_part=test").code == 0
    assert "the TEST part chooses the checkpoint" in caplog.text
    record = json.loads((run / "run.json").read_text())["record"]
    assert record["settings"]["training"]["selection_part"] == "test"

    for model in (run, run / "pipeline", best_checkpoint(run)):
        ended = cli("evaluate", model, "--data", data, "--split-file", without_validation_part, "--out", tmp_path / "e")
        assert "the test part chose this checkpoint" in ended.stdout
        assert json.loads((tmp_path / "e" / "summary.json").read_text())["selected_on_test"] is True
    cli("evaluate", run, "--data", data, "--split", "train", "--out", tmp_path / "t")
    assert "selected_on_test" not in json.loads((tmp_path / "t" / "summary.json").read_text())


def test_the_test_part_scores_the_checkpoints_when_it_is_asked_to(
    tiny_settings: Settings, data: Path, tmp_path: Path
) -> None:
    settings = override_settings(tiny_settings, ["training.selection_part=test", "training.validation_samples=100"])
    manifest = load_manifest(data, settings=settings.data)
    task = LeafTask(settings, manifest)
    task.prepare(torch.device("cpu"), torch.no_grad, tmp_path)
    names = [row["name"] for row in task.validate(100, 0, 1)]
    assert names == [sample.name for sample in manifest.part("test").samples]
    empty = Manifest(**{**vars(manifest), "samples": manifest.part("train").samples})
    with pytest.raises(DataError, match="no sample falls into the test part"):
        LeafTask(settings, empty)


def test_validation_on_the_input_grid_resizes_image_and_truth_and_no_prediction(
    tiny_settings: Settings, data: Path, tmp_path: Path
) -> None:
    settings = override_settings(tiny_settings, ["training.validation_resolution=input"])
    manifest = load_manifest(data, settings=settings.data)
    task = LeafTask(settings, manifest)
    task.prepare(torch.device("cpu"), torch.no_grad, tmp_path)
    task.module.eval()
    rows = {row["name"]: row for row in task.validate(100, 0, 1)}
    original = LeafTask(tiny_settings, manifest)
    original.prepare(torch.device("cpu"), torch.no_grad, tmp_path)
    original.module.eval()
    others = {row["name"]: row for row in original.validate(100, 0, 1)}
    assert rows.keys() == others.keys()
    assert any(rows[name]["predicted_pixels"] != others[name]["predicted_pixels"] for name in rows)
    for sample in manifest.part("validation").samples:
        assert sample.mask is not None
        image = task.preprocessor.apply(read_image(sample.image, None))[0][
            None
        ]  # the same to the bit: it keys the noise
        truth = torch.from_numpy(read_mask(sample.mask, None) > 0)[None, None].float()
        truth = F.interpolate(truth, (32, 32), mode="nearest-exact")[0, 0] > 0
        assert rows[sample.name]["truth_pixels"] == int(truth.sum())
        mask = task.pipeline()(image).mask[0, 0]
        overlap = 2 * int((mask & truth).sum()) / max(int(mask.sum()) + int(truth.sum()), 1)
        assert rows[sample.name]["dice"] == pytest.approx(overlap, abs=0.02)


def test_weight_decay_on_all_reaches_norms_and_biases(train_tiny: Train, data: Path, tmp_path: Path) -> None:
    one = ("training.steps=1", "training.validations=0", "training.weight_decay=0.07")
    train_tiny(data, tmp_path, *one, "training.weight_decay_on=all")
    stored = torch.load(checkpoint_folder(tmp_path, 1) / "trainer" / "optimizer.pt", weights_only=True)["optimizer"]
    assert [group["weight_decay"] for group in stored["param_groups"]] == [0.07]
    assert {stored["state"][index]["exp_avg"].ndim for index in stored["param_groups"][0]["params"]} == {1, 2, 4}


# --- going on ---


def test_other_minutes_on_resume_are_answered_with_a_warning(
    train_tiny: Train, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train_tiny(data, tmp_path, "training.minutes=0.2", "training.validations=0", stop_after=1)
    with caplog.at_level(logging.WARNING, "leafseg"):
        train_tiny(data, tmp_path, "training.minutes=0.2", "training.validations=0", stop_after=1, resume=True)
        assert "minutes" not in caplog.text
        train_tiny(data, tmp_path, "training.minutes=9", "training.validations=0", stop_after=1, resume=True)
    total = json.loads((tmp_path / "run.json").read_text())["total_steps"]
    assert f"minutes was 0.2 when the run began and is 9 now; the {total} steps" in caplog.text


def test_a_run_from_before_a_setting_existed_goes_on_with_its_default_alone(
    train_tiny: Train, data: Path, tmp_path: Path
) -> None:
    train_tiny(data, tmp_path, *FOUR, stop_after=1)
    stored = json.loads((tmp_path / "run.json").read_text())
    for name in ("optimizer", "ema_parts", "inference_dtype"):
        del stored["record"]["settings"]["training"][name]
    (tmp_path / "run.json").write_text(json.dumps(stored))
    with pytest.raises(ConfigError, match=r"ema_parts: 'all' then, 'unet' now"):
        train_tiny(data, tmp_path, *FOUR, "training.ema_parts=unet", stop_after=2, resume=True)
    assert train_tiny(data, tmp_path, *FOUR, stop_after=2, resume=True).step == 2
