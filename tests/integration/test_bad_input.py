"""Whatever a user gets wrong: exit code 2, one line that says what and how to mend it, and nothing half written."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from leafseg.data.images import read_image, write_png
from leafseg.runs import checkpoint_folder, checkpoint_steps
from leafseg.training.trainer import TrainingResult

Cli = Callable[..., Any]
Train = Callable[..., TrainingResult]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def own_data(data: Path, tmp_path: Path) -> Path:
    """A copy of the data that a test may spoil."""
    return shutil.copytree(data, tmp_path / "data")


@pytest.fixture(scope="module")
def trained(train_tiny: Train, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with checkpoints of steps 1 (best or not) and 4; not to be changed."""
    run = tmp_path_factory.mktemp("trained") / "run"
    train_tiny(data, run)
    return run


def written(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file()] if folder.exists() else []


# --- data ---


def missing_mask(data: Path) -> None:
    (data / "masks" / "003.png").unlink()


def missing_image(data: Path) -> None:
    (data / "images" / "003.png").unlink()


def other_size(data: Path) -> None:
    write_png(data / "masks" / "003.png", np.zeros((20, 30), np.uint8))


def truncated(data: Path) -> None:
    path = data / "images" / "003.png"
    path.write_bytes(path.read_bytes()[:200])


def no_image(data: Path) -> None:
    (data / "images" / "003.png").write_text("this is text")


def empty_file(data: Path) -> None:
    (data / "masks" / "003.png").write_bytes(b"")


def soft_mask(data: Path) -> None:
    write_png(data / "masks" / "003.png", np.arange(40 * 36).reshape(40, 36).astype(np.uint8))


def ignore_label(data: Path) -> None:
    mask = np.zeros((40, 36), np.uint8)
    mask[:3], mask[3:5] = 1, 255
    write_png(data / "masks" / "003.png", mask)


def no_images_folder(data: Path) -> None:
    (data / "images").rename(data / "pictures")


def empty_folder(data: Path) -> None:
    for name in ("images", "masks"):
        shutil.rmtree(data / name)
        (data / name).mkdir()


def no_folder(data: Path) -> None:
    shutil.rmtree(data)


def one_image_only(data: Path) -> None:
    for name in ("images", "masks"):
        for path in sorted((data / name).iterdir())[1:]:
            path.unlink()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (missing_mask, "1 image has no mask (003.png)"),
        (missing_image, "1 mask has no image (003.png)"),
        (other_size, "masks/003.png is 30x20, its image is 36x40"),
        (truncated, "images/003.png"),
        (no_image, "images/003.png"),
        (empty_file, "masks/003.png"),
        (soft_mask, "data.mask_threshold=127"),
        (ignore_label, "data.foreground_labels"),
        (no_images_folder, "images/ missing"),
        (empty_folder, "no images in the folder"),
        (no_folder, "no such folder or CSV file"),
        (one_image_only, "no sample falls into the"),
    ],
)
def test_training_on_bad_data_ends_in_one_sentence(
    cli: Cli, tiny_config: Path, own_data: Path, tmp_path: Path, spoil: Callable[[Path], None], said: str
) -> None:
    spoil(own_data)
    out = tmp_path / "run"
    ended = cli("train", "--config", tiny_config, "--data", own_data, "--out", out)
    assert said in ended.error
    assert written(out) == []


def test_prediction_names_each_bad_file_and_does_the_others(
    cli: Cli, trained: Path, own_data: Path, tmp_path: Path
) -> None:
    truncated(own_data)
    (own_data / "images" / "004.png").write_text("this is text")
    out = tmp_path / "masks"
    ended = cli("predict", trained, own_data / "images", "--out", out)
    assert ended.code == 2
    lines = ended.stderr.splitlines()
    assert len(lines) == 2
    assert all(
        line.startswith("error: ") and name in line for line, name in zip(lines, ("003.png", "004.png"), strict=True)
    )
    names = {p.stem for p in (own_data / "images").iterdir()}
    assert {p.stem for p in out.glob("*.png")} == names - {"003", "004"}
    report = json.loads((out / "report.json").read_text())
    assert {Path(name).stem for name in report["failed"]} == {"003", "004"}


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_a_model_is_not_run_on_data_that_is_not_there(cli: Cli, trained: Path, tmp_path: Path, command: str) -> None:
    nowhere = tmp_path / "nowhere"
    where = ("--data", nowhere) if command == "evaluate" else (nowhere,)
    ended = cli(command, trained, *where, "--out", tmp_path / "out")
    assert f"{nowhere}: no such" in ended.error
    assert written(tmp_path / "out") == []


# --- settings ---


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--set", "training.learning_rat=1"), "did you mean 'training.learning_rate'?"),
        (("--set", "learning_rate=1"), "did you mean 'training.learning_rate'?"),
        (("--set", "training.batch_size=0"), "training.batch_size"),
        (("--set", "training.batch_size=many"), "training.batch_size"),
        (("--set", "data.preprocessing.size=[30,30]"), "multiples of 16"),
        (("--set", "training"), "write it as NAME=VALUE"),
        (("--set", "training.seed=[1"), "cannot be read"),
        (("--set", "training.micro_batch_size=3", "--set", "training.batch_size=4"), "multiple of"),
        (("--set", "model.mask_code=striped"), "striped"),
        (("--set", "teacher.name=./nowhere", "--set", "objective.alignment_weight=1"), "no such folder"),
        (("--set", "model.autoencoder.weights=./nowhere"), "no config.json"),
        (("--set", "model.autoencoder.weights=packaged:nothing"), "the package ships"),
        (("--preset", "leaf-huge"), "known are leaf-base, leaf-reference, leaf-tiny"),
        (("--preset", "leaf-tinny"), "did you mean 'leaf-tiny'?"),
        (("--steps", "3", "--minutes", "1"), "give one of them"),
        (("--split-file", "nowhere.csv"), "nowhere.csv"),
        (("--init-from", "./nowhere"), "no such folder"),
        (("--init-from", "a/b/c"), "no such folder"),
    ],
)
def test_a_wrong_setting_ends_in_one_sentence(
    cli: Cli, tiny_config: Path, data: Path, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    out = tmp_path / "run"
    ended = cli("train", "--config", tiny_config, "--data", data, "--out", out, *arguments)
    assert said in ended.error
    assert {p.name for p in written(out)} <= {"split.csv", "data_check.json"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("training: [1, 2", "not a readable YAML file"),
        ("- a\n- b\n", "settings are a mapping"),
        ("training:\n  sedd: 3\n", "did you mean 'training.seed'?"),
        ("training: 3\n", "training"),
        ("training:\n\tseed: 3\n", "not a readable YAML file"),
        ("training:\n  seed: ${nowhere}\n", "not a readable YAML file"),
    ],
)
def test_a_bad_settings_file_is_named_with_its_fault(
    cli: Cli, data: Path, tmp_path: Path, text: str, said: str
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    ended = cli("train", "--config", path, "--data", data, "--out", tmp_path / "run")
    assert said in ended.error
    assert str(path) in ended.error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "--data", "d", "--out", "o", "--steps", "0"),
        ("train", "--data", "d", "--out", "o", "--steps", "-3"),
        ("train", "--data", "d", "--out", "o", "--minutes", "0"),
        ("train", "--data", "d", "--out", "o", "--stop-after", "0"),
        ("train", "--data", "d", "--out", "o", "--resume", "maybe"),
        ("train", "--out", "o"),
        ("predict", "model", "image", "--out", "o", "--steps", "0"),
        ("predict", "model", "image", "--out", "o", "--samples", "-1"),
        ("evaluate", "model", "--data", "d", "--noise", "loud"),
        ("unknown",),
    ],
)
def test_a_wrong_option_is_a_usage_error(cli: Cli, arguments: tuple[str, ...]) -> None:
    ended = cli(*arguments)
    assert ended.code == 2
    assert "Traceback" not in ended.stdout + ended.stderr


# --- models and checkpoints ---


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere/model", "runs/a/b", "~/nowhere", "nowhere"])
def test_a_model_path_that_does_not_exist_is_not_looked_up_on_a_hub(
    cli: Cli, data: Path, tmp_path: Path, model: str
) -> None:
    ended = cli("predict", model, data, "--out", tmp_path / "masks")
    assert f"{model}: no such folder" in ended.error
    assert not (tmp_path / "masks").exists()


def test_an_unreachable_hub_id_ends_in_one_sentence(cli: Cli, data: Path, tmp_path: Path) -> None:
    assert "error: owner/name: " in cli("predict", "owner/name", data, "--out", tmp_path / "masks").error
    assert not (tmp_path / "masks").exists()


def cut_weights(pipeline: Path) -> None:
    path = pipeline / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def no_weights(pipeline: Path) -> None:
    (pipeline / "vae" / "diffusion_pytorch_model.safetensors").unlink()


def no_index(pipeline: Path) -> None:
    (pipeline / "model_index.json").unlink()


def cut_index(pipeline: Path) -> None:
    path = pipeline / "model_index.json"
    path.write_text(path.read_text()[:-20])


def cut_config(pipeline: Path) -> None:
    path = pipeline / "unet" / "config.json"
    path.write_text(path.read_text()[:-20])


def other_shape(pipeline: Path) -> None:
    path = pipeline / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "block_out_channels": [32, 32]}))


def bad_preprocessing(pipeline: Path) -> None:
    path = pipeline / "model_index.json"
    content = json.loads(path.read_text())
    content["preprocessing"]["size"] = [30, 30]
    path.write_text(json.dumps(content))


def foreign_class(pipeline: Path) -> None:
    path = pipeline / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "unet": ["os", "system"]}))


@pytest.mark.parametrize(
    "spoil",
    [cut_weights, no_weights, no_index, cut_index, cut_config, other_shape, bad_preprocessing, foreign_class],
)
def test_a_damaged_model_ends_in_one_sentence(
    cli: Cli, trained: Path, data: Path, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    pipeline = shutil.copytree(checkpoint_folder(trained, 4) / "pipeline", tmp_path / "model")
    spoil(pipeline)
    ended = cli("predict", pipeline, data, "--out", tmp_path / "masks")
    assert str(pipeline) in ended.error
    assert not (tmp_path / "masks").exists()


@pytest.mark.parametrize("name", ["weights.safetensors", "ema.safetensors", "optimizer.pt", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_a_damaged_checkpoint_is_not_resumed_from_and_its_model_can_be_started_from(
    cli: Cli, trained: Path, tiny_config: Path, data: Path, tmp_path: Path, name: str, damage: str
) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    last = checkpoint_folder(run, checkpoint_steps(run)[-1])
    path = last / "trainer" / name
    if damage == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.unlink()
    command = ("train", "--config", tiny_config, "--data", data)
    ended = cli(*command, "--out", run, "--resume", "auto")
    assert f"{last}: the checkpoint is damaged" in ended.error
    advice = f"--init-from {last / 'pipeline'}"
    assert advice in ended.error
    if name == "weights.safetensors" and damage == "cut":  # the advice works
        assert "finished at step 4 of 4" in cli(*command, *advice.split(), "--out", tmp_path / "new").stdout


def test_a_checkpoint_of_another_model_is_not_resumed_from(
    cli: Cli, train_tiny: Train, trained: Path, tiny_config: Path, data: Path, tmp_path: Path
) -> None:
    train_tiny(data, tmp_path / "other", "model.unet.block_out_channels=[32,32]")
    run = shutil.copytree(trained, tmp_path / "run")
    for step in checkpoint_steps(run):
        shutil.rmtree(checkpoint_folder(run, step))
    shutil.copytree(checkpoint_folder(tmp_path / "other", 4), checkpoint_folder(run, 4))
    ended = cli("train", "--config", tiny_config, "--data", data, "--out", run, "--resume", "auto")
    assert "other weights than these settings build" in ended.error


@pytest.mark.parametrize("text", ["{", "[]", '{"record": {}}', ""])
def test_a_damaged_run_record_ends_in_one_sentence(
    cli: Cli, trained: Path, tiny_config: Path, data: Path, tmp_path: Path, text: str
) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    (run / "run.json").write_text(text)
    ended = cli("train", "--config", tiny_config, "--data", data, "--out", run, "--resume", "auto")
    assert "not a readable run record" in ended.error
    assert checkpoint_steps(run) == checkpoint_steps(trained)


def test_a_run_without_a_checkpoint_cannot_be_used_yet(cli: Cli, trained: Path, data: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    assert "has no checkpoint yet; train it first" in cli("predict", run, data, "--out", tmp_path / "masks").error


# --- where results go ---


@pytest.mark.parametrize("command", ["train", "train-autoencoder", "predict", "evaluate"])
def test_an_output_that_cannot_be_a_folder_is_refused_at_once(
    cli: Cli, trained: Path, tiny_config: Path, data: Path, tmp_path: Path, command: str
) -> None:
    (tmp_path / "file").write_text("mine")
    arguments = {
        "train": ("train", "--config", tiny_config, "--data", data),
        "train-autoencoder": ("train-autoencoder", "--data", data, "--steps", 1),
        "predict": ("predict", trained, data),
        "evaluate": ("evaluate", trained, "--data", data),
    }[command]
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert f"{out}: cannot be written" in cli(*arguments, "--out", out).error
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_rights_is_refused_at_once(cli: Cli, tiny_config: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    ended = cli("train", "--config", tiny_config, "--data", data, "--out", tmp_path / "closed" / "run")
    assert "cannot be written (Permission denied)" in ended.error


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system of 20 MB: room for one checkpoint of the tiny model, not for two."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(folder)]
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("only root may mount a small disk")
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)  # lazily: a mapped file may still be referred to


def fill(folder: Path) -> Path:
    """A file that takes all the room there is."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as stream, suppress(OSError):
        while True:
            stream.write(b"0" * 4096)
    return filler


def test_a_full_disk_ends_in_one_sentence_and_the_training_goes_on_when_there_is_room(
    cli: Cli,
    tiny_config: Path,
    train_tiny: Train,
    data: Path,
    small_disk: Path,
    tmp_path: Path,
    same_checkpoint: Callable[[Path, Path, int], None],
) -> None:
    budget = ("training.validations=0", "training.steps=6")
    run = small_disk / "run"
    train = ["train", "--config", tiny_config, "--data", data, "--out", run]
    train += [part for change in budget for part in ("--set", change)]
    assert cli(*train, "--stop-after", 3).code == 0

    ended = cli(*train, "--resume", "auto")
    assert "step-000006: the checkpoint cannot be written" in ended.error
    assert "No space left on device" in ended.error
    assert "--resume auto" in ended.error
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-000003"]

    # Not even room for a line of the log: the checkpoint is still refused in one sentence.
    filler = fill(small_disk)
    assert "No space left on device" in cli(*train, "--resume", "auto").error
    filler.unlink()
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-000003"]

    moved = shutil.copytree(run, tmp_path / "moved")
    train_tiny(data, moved, *budget, resume=True)
    train_tiny(data, tmp_path / "whole", *budget)
    same_checkpoint(tmp_path / "whole", moved, 6)


def test_prediction_onto_a_full_disk_leaves_no_half_written_mask(
    cli: Cli, trained: Path, data: Path, small_disk: Path
) -> None:
    fill(small_disk)
    out = small_disk / "masks"
    ended = cli("predict", trained, data, "--out", out)
    assert ended.code == 2
    assert "No space left on device" in ended.stderr
    assert "Traceback" not in ended.stderr
    for path in out.glob("*.png"):
        assert read_image(path).shape == (40, 36)


def test_a_real_process_prints_one_line_and_returns_two(tmp_path: Path, tiny_config: Path) -> None:
    command = [sys.executable, "-m", "leafseg", "train", "--config", str(tiny_config)]
    command += ["--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "run")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 2
    assert ended.stderr == f"error: {tmp_path / 'nowhere'}: no such folder or CSV file; check the path\n"
    assert ended.stdout == ""
