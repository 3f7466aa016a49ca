"""Commands as a user types them, one after another."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from leafseg.config import Settings
from leafseg.data.images import read_image
from leafseg.data.manifest import load_manifest
from leafseg.fast_mode import Arrangement, write_fast_mode
from leafseg.pipeline import LeafPipeline
from leafseg.runs import checkpoint_folder, resolve_model
from leafseg.training.trainer import TrainingResult

Cli = Callable[..., Any]
Train = Callable[..., TrainingResult]


@pytest.fixture(scope="module")
def trained(train_tiny: Train, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    train_tiny(data, run)
    return run


def test_a_model_is_trained_evaluated_and_used(
    cli: Cli, tiny_config: Path, tiny_settings: Settings, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train = ("train", "--config", tiny_config, "--data", data, "--out", run, "--steps", 2, "--seed", 5)
    train = (*train, "--set", "training.validations=1", "--set", "training.batch_size=1")

    ended = cli(*train)
    assert ended.code == 0
    assert "finished at step 2 of 2, best validation score" in ended.stdout
    assert str(checkpoint_folder(run, 2)) in ended.stdout
    record = json.loads((run / "run.json").read_text())["record"]
    chosen = record["settings"]["training"]
    assert (chosen["steps"], chosen["seed"], chosen["batch_size"], chosen["validations"]) == (2, 5, 1, 1)
    manifest = load_manifest(data, settings=tiny_settings.data)
    assert record["samples"] == {name: len(manifest.part(name)) for name in ("train", "validation", "test")}

    again = cli(*train)
    assert "already holds a training; continue it with --resume auto" in again.error

    before = {p: p.stat().st_mtime_ns for p in (run / "checkpoints").rglob("*")}
    resumed = cli(*train, "--resume", "auto")
    assert resumed.code == 0
    assert "finished at step 2 of 2" in resumed.stdout
    assert {p: p.stat().st_mtime_ns for p in (run / "checkpoints").rglob("*")} == before

    evaluated = cli("evaluate", run, "--data", data, "--split", "test")
    assert evaluated.code == 0
    rows = (run / "evaluation-test" / "per_image.csv").read_text().splitlines()
    assert len(rows) == 1 + len(manifest.part("test"))
    figures = json.loads((run / "evaluation-test" / "summary.json").read_text())["classes"]["foreground"]
    assert f"foreground: Dice {figures['dice']['mean']:.4f}" in evaluated.stdout

    compared = cli("compare", run / "evaluation-test", run, "--data", data, "--out", tmp_path / "cmp", "--name", "a",
                   "--name", "b")  # fmt: skip
    assert compared.code == 0  # a model with itself: the second is evaluated now
    differences = json.loads((tmp_path / "cmp" / "compare.json").read_text())["differences"]
    assert {item["difference"]["mean"] for item in differences} == {0.0}
    refused = cli("compare", run, run)
    assert "is no evaluation (per_image.csv and summary.json); name the folder of one, or evaluate" in refused.error

    predicted = cli("predict", run, data, "--out", tmp_path / "masks")
    assert predicted.code == 0
    names = sorted(p.name for p in (data / "images").iterdir())
    assert f"{len(names)} of {len(names)} files" in predicted.stdout
    for name in names:
        mask = read_image(tmp_path / "masks" / name)
        assert mask.shape == (40, 36)
        assert set(np.unique(mask)) <= {0, 255}
    # Evaluation and prediction are one path: the same pixels are found.
    found = {row["name"]: int(row["predicted_pixels"]) for row in csv.DictReader(rows)}
    for name, pixels in found.items():
        assert np.count_nonzero(read_image(tmp_path / "masks" / f"{name}.png")) == pixels


def test_a_stopped_run_says_how_to_go_on_and_does(cli: Cli, tiny_config: Path, data: Path, tmp_path: Path) -> None:
    train = ("train", "--config", tiny_config, "--data", data, "--out", tmp_path / "run", "--set", "training.steps=3")
    stopped = cli(*train, "--stop-after", 1)
    assert stopped.code == 0
    assert "stopped at step 1 of 3" in stopped.stdout
    assert "continue with --resume auto" in stopped.stdout
    finished = cli(*train, "--resume", "auto")
    assert "finished at step 3 of 3" in finished.stdout
    assert "continue with" not in finished.stdout


def test_a_run_goes_on_with_the_split_it_began_with(cli: Cli, train_tiny: Train, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_tiny(data, run, stop_after=1)
    lines = (run / "split.csv").read_text().splitlines()
    assert len(lines) == 1 + len(list((data / "images").iterdir()))
    train_tiny(data, run, resume=True)
    assert (run / "split.csv").read_text().splitlines() == lines


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("training.learning_rate=0.5", "settings.training.learning_rate: 0.001 then, 0.5 now"),
        ("training.seed=4", "settings.training.seed: 3 then, 4 now"),
        ("training.batch_size=1", "settings.training.batch_size: 2 then, 1 now"),
        ("data.augmentation.gamma=0.1", "settings.data.augmentation.gamma: 0.0 then, 0.1 now"),
        (
            "model.unet.block_out_channels=[32,32]",
            "settings.model.unet.block_out_channels: [32, 64] then, [32, 32] now",
        ),
    ],
)
def test_a_run_is_not_continued_with_other_settings(
    cli: Cli, trained: Path, tiny_config: Path, data: Path, change: str, named: str
) -> None:
    before = (trained / "run.json").read_bytes()
    ended = cli("train", "--config", tiny_config, "--data", data, "--out", trained, "--resume", "auto", "--set", change)
    assert named in ended.error
    assert (trained / "run.json").read_bytes() == before


def test_what_changes_no_number_may_change_between_the_parts_of_a_run(
    cli: Cli, trained: Path, tiny_config: Path, data: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    resume = ("train", "--config", tiny_config, "--data", data, "--out", run, "--resume", "auto")
    changes = ("data.workers=1", "data.cache_mb=0", "training.micro_batch_size=1", "training.save_every=1")
    ended = cli(*resume, *(part for change in changes for part in ("--set", change)))
    assert ended.code == 0
    assert "finished at step 4 of 4" in ended.stdout


def test_an_upgraded_library_does_not_cost_a_run(
    cli: Cli, trained: Path, tiny_config: Path, data: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    stored = json.loads((run / "run.json").read_text())
    stored["record"]["versions"]["torch"] = "2.0.0"
    (run / "run.json").write_text(json.dumps(stored))
    assert cli("train", "--config", tiny_config, "--data", data, "--out", run, "--resume", "auto").code == 0


def test_a_training_starts_from_another_runs_weights(
    cli: Cli, trained: Path, tiny_config: Path, data: Path, tmp_path: Path
) -> None:
    # The steps are so small that the weights stay; without --init-from they would be those of seed 9.
    start = ("--init-from", trained, "--seed", 9, "--steps", 1, "--set", "training.learning_rate=1e-12")
    ended = cli("train", "--config", tiny_config, "--data", data, "--out", tmp_path / "run", *start)
    assert ended.code == 0
    source, tuned = (LeafPipeline.from_pretrained(resolve_model(str(run))) for run in (trained, tmp_path / "run"))
    for part in ("unet", "image_encoder", "vae"):
        theirs = getattr(source, part).state_dict()
        for name, value in getattr(tuned, part).state_dict().items():
            torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-7)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["record"]["init_from"] == str(trained)


def test_a_training_does_not_start_from_a_model_of_another_shape(
    cli: Cli, trained: Path, tiny_config: Path, data: Path, tmp_path: Path
) -> None:
    other = ("--set", "model.unet.block_out_channels=[32,32]", "--init-from", trained)
    ended = cli("train", "--config", tiny_config, "--data", data, "--out", tmp_path / "run", *other)
    assert "its U-Net has another shape" in ended.error
    assert not [p for p in (tmp_path / "run").rglob("*") if p.is_file()]


def test_an_autoencoder_is_trained_evaluated_and_carries_a_model(
    cli: Cli, tiny_config: Path, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "autoencoder"
    train = ["train-autoencoder", "--data", data, "--out", run, "--steps", 2]
    for change in (
        "model.block_out_channels=[8,8,16,16]", "model.latent_channels=4", "model.norm_num_groups=4",
        "preprocessing.size=[32,32]", "crop=16", "training.batch_size=2", "training.validations=1",
        "training.precision=fp32",
    ):  # fmt: skip
        train += ["--set", change]
    ended = cli(*train)
    assert ended.code == 0
    assert "finished at step 2 of 2" in ended.stdout

    measured = cli(
        "evaluate-autoencoder", "--data", data, "--autoencoder", run, "--size", 32, "--out", tmp_path / "f.json"
    )
    assert measured.code == 0
    assert "round-trip Dice" in measured.stdout
    assert json.loads((tmp_path / "f.json").read_text())["part"] == "test"

    folder = checkpoint_folder(run, 2) / "autoencoder"
    model = ("--set", f"model.autoencoder.weights={folder}", "--steps", 1)
    leaf = cli("train", "--config", tiny_config, "--data", data, "--out", tmp_path / "leaf", *model)
    assert leaf.code == 0
    vae = LeafPipeline.from_pretrained(resolve_model(str(tmp_path / "leaf"))).vae
    assert vae.config["latents_std"] == json.loads((folder / "config.json").read_text())["latents_std"]

    assert "no such folder" in cli("predict", run, data, "--out", tmp_path / "masks").error


def test_presets_are_listed_with_their_sizes(cli: Cli) -> None:
    listed = json.loads(cli("presets", "--json").stdout)
    assert set(listed) == {"leaf-base", "leaf-reference", "leaf-tiny"}
    assert all(entry["parameters"]["unet"] > 0 for entry in listed.values())
    assert "leaf-tiny: 128x128 input" in cli("presets").stdout


def test_a_benchmark_stores_what_fast_uses(cli: Cli, trained: Path, data: Path, tmp_path: Path) -> None:
    image = data / "images" / "000.png"
    early = cli("predict", trained, image, "--out", tmp_path / "early", "--fast")
    assert early.code == 2
    assert "has no fast_mode.json yet" in early.error

    strict = cli("benchmark", trained, "--repeats", 1, "--max-error", 0)
    assert strict.code == 2
    assert "no arrangement is faster than the plain model within the bars" in strict.error
    assert not (trained / "fast_mode.json").exists()

    # Which one is the fastest, and whether any is, is the machine's: the arrangement is stored by hand.
    write_fast_mode(str(trained), Arrangement(), {})
    plain = cli("predict", trained, image, "--out", tmp_path / "plain")
    fast = cli("predict", trained, image, "--out", tmp_path / "fast", "--fast")
    assert (plain.code, fast.code) == (0, 0)
    np.testing.assert_array_equal(read_image(tmp_path / "fast" / "000.png"), read_image(tmp_path / "plain" / "000.png"))

    evaluated = cli("evaluate", trained, "--data", data, "--fast", "--out", tmp_path / "tables", "--no-report")
    assert evaluated.code == 0
    assert json.loads((tmp_path / "tables" / "summary.json").read_text())["fast"][0]["dtype"] == "fp32"
    both = cli("predict", trained, image, "--out", tmp_path / "both", "--fast", "--precision", "bf16")
    assert both.code == 2
    assert "leave out --precision" in both.error
    for wrong in (tmp_path / "nowhere", "owner/name"):
        refused = cli("benchmark", wrong)
        assert refused.code == 2
        assert "fast mode is stored beside a model" in refused.error
