"""`leafseg compact` from images to a model with light parts, in four steps a part."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from leafseg.compact import run_compact
from leafseg.config import DataSettings, Settings, load_compact_settings
from leafseg.data.images import write_png
from leafseg.data.manifest import default_part, load_manifest
from leafseg.model.build import build_components
from leafseg.pipeline import LeafPipeline
from leafseg.runs import checkpoint_folder

Cli = Callable[..., object]
SETTINGS = [
    *(f"{part}.training.{name}" for part in ("decoder", "tuning", "encoder") for name in
      ("steps=4", "seed=3", "batch_size=2", "validations=1", "validation_samples=2")),
    *("decoder.width=16", "decoder.blocks=1", "encoder.width=32", "encoder.blocks=1", "held_out=2"),
]  # fmt: skip
QUICK = [part for setting in SETTINGS for part in ("--set", setting)]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def model(tiny_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder whose random weights find something in every image; not to be changed."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        parts = build_components(tiny_settings)
        parts.autoencoder.decoder.conv_out.weight.mul_(30)
    pipeline = LeafPipeline(
        unet=parts.unet,
        vae=parts.autoencoder,
        image_encoder=parts.image_encoder,
        scheduler=parts.scheduler,
        preprocessing=tiny_settings.data.preprocessing.model_dump(mode="json"),
    )
    folder = tmp_path_factory.mktemp("model")
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def compacted(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``run_compact`` writes when any agreement will do; not to be changed."""
    out = tmp_path_factory.mktemp("compacted")
    settings = load_compact_settings(overrides=SETTINGS)
    result = run_compact(str(model), data / "images", out, settings=settings, bar=1e-9)
    assert result.model == out / "pipeline"
    return out


def test_the_full_parts_are_copied_byte_for_byte_and_the_compact_ones_stand_beside_them(
    compacted: Path, model: Path
) -> None:
    before, after = files_of(model), files_of(compacted / "pipeline")
    index = json.loads(after.pop("model_index.json"))
    assert json.loads(before.pop("model_index.json"))["format_version"] == 1
    assert index["format_version"] == 2
    assert index["compact_decoder"] == ["leafseg", "CompactMaskDecoder"]
    assert index["compact_encoder"] == ["leafseg", "CompactImageEncoder"]
    assert before.items() <= after.items()
    new = {name.split("/")[0] for name in after.keys() - before.keys()}
    assert new == {"compact_decoder", "compact_encoder", "agreement.json"}


def test_the_reported_agreement_is_that_of_the_masks(compacted: Path, data: Path) -> None:
    stored = json.loads((compacted / "agreement.json").read_text())
    assert stored["part"] == "test"
    figures = stored["agreement"]["decoder+encoder"]
    pipeline = LeafPipeline.from_pretrained(compacted)
    name, worst = figures["worst"]
    pixels = pipeline.preprocessor.read(data / "images" / f"{name}.png")[None]
    one = pipeline(pixels).mask
    two = pipeline(pixels, decoder="compact", encoder="compact").mask
    assert float(2 * (one & two).sum() / (one.sum() + two.sum())) == pytest.approx(worst, abs=1e-6)
    assert figures["dice"]["mean"] >= worst
    assert figures["images"] == 2


def test_each_part_is_chosen_when_loading_or_when_calling_and_the_full_ones_are_the_model_s(
    compacted: Path, model: Path
) -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 36, 3), dtype=np.uint8)
    pipeline = LeafPipeline.from_pretrained(compacted)
    assert torch.equal(pipeline(image).probability, LeafPipeline.from_pretrained(model)(image).probability)
    results = []
    for parts in ({}, {"decoder": "compact"}, {"encoder": "compact"}, {"decoder": "compact", "encoder": "compact"}):
        called = pipeline(image, **parts).probability
        loaded = LeafPipeline.from_pretrained(compacted, **parts)
        assert torch.equal(called, loaded(image).probability)
        assert torch.equal(loaded(image, decoder="full", encoder="full").probability, pipeline(image).probability)
        results.append(called)
    assert all(not torch.equal(one, two) for i, one in enumerate(results) for two in results[:i])


def test_a_model_with_compact_parts_loads_in_a_fresh_process(compacted: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 36, 3), dtype=np.uint8)
    expected = LeafPipeline.from_pretrained(compacted)(image, decoder="compact", encoder="compact").probability
    code = (
        "import numpy, leafseg\n"
        f"pipe = leafseg.LeafPipeline.from_pretrained({str(compacted)!r}, decoder='compact', encoder='compact')\n"
        "image = numpy.random.default_rng(0).integers(0, 256, (40, 36, 3), dtype=numpy.uint8)\n"
        "print(repr(float(pipe(image).probability.double().sum())))\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    assert float(ended.stdout) == pytest.approx(float(expected.double().sum()), rel=1e-6)


def test_predict_and_evaluate_take_the_compact_parts(compacted: Path, cli: Cli, data: Path, tmp_path: Path) -> None:
    image = sorted((data / "images").iterdir())[0]
    options = ("--decoder", "compact", "--encoder", "compact")
    assert cli("predict", compacted, image, "--out", tmp_path / "masks", *options).code == 0
    assert (tmp_path / "masks" / f"{image.stem}.png").is_file()
    ended = cli("evaluate", compacted, "--data", data, "--out", tmp_path / "figures", "--no-report", *options)
    assert ended.code == 0, ended.stderr
    assert json.loads((tmp_path / "figures" / "summary.json").read_text())["decoder"] == "compact"


def test_slimming_keeps_the_compact_parts(compacted: Path, cli: Cli, tmp_path: Path) -> None:
    assert cli("slim", compacted, "--out", tmp_path / "slim", "--dtype", "fp32", "--decoder-only").code == 0
    image = np.random.default_rng(0).integers(0, 256, (40, 36, 3), dtype=np.uint8)
    one, two = (
        LeafPipeline.from_pretrained(folder, decoder="compact", encoder="compact")(image).probability
        for folder in (compacted, tmp_path / "slim")
    )
    assert torch.equal(one, two)


def test_below_the_bar_no_model_is_written_and_a_lower_bar_needs_no_new_training(
    cli: Cli, model: Path, data: Path, tmp_path: Path
) -> None:
    before = files_of(model)
    arguments = ("compact", model, "--images", data / "images", "--out", tmp_path / "out", *QUICK)
    error = cli(*arguments, "--bar", 0.9999).error
    assert "below --bar 0.9999; no model is written" in error
    assert "worst image" in error
    assert files_of(model) == before
    assert not (tmp_path / "out" / "pipeline").exists()
    stored = json.loads((tmp_path / "out" / "agreement.json").read_text())
    assert "already holds a distillation" in cli(*arguments, "--bar", 1e-9).error
    ended = cli(*arguments, "--bar", 1e-9, "--resume", "auto")
    assert ended.code == 0, ended.stderr
    assert json.loads((tmp_path / "out" / "agreement.json").read_text())["agreement"] == stored["agreement"]
    assert "compact decoder+encoder: mask Dice with the full model" in ended.stdout
    assert f"model: {tmp_path / 'out' / 'pipeline'}" in ended.stdout
    assert "was written with --bar 1e-09" in cli(*arguments, "--bar", 0.9999, "--resume", "auto").error
    again = cli(*arguments, "--bar", 1e-9, "--resume", "auto")
    assert again.stdout.splitlines() == ended.stdout.splitlines()[-4:]


def test_a_stopped_distillation_continues_bit_for_bit(
    cli: Cli, model: Path, data: Path, tmp_path: Path, same_checkpoint: Callable[[Path, Path, int], None]
) -> None:
    arguments = ("compact", model, "--images", data / "images", "--data", data, "--bar", "1e-9", *QUICK)
    ended = cli(*arguments, "--out", tmp_path / "parts", "--stop-after", 2)
    assert "continue with --resume auto" in ended.stdout
    for stop in (("--stop-after", 3), ()):
        assert cli(*arguments, "--out", tmp_path / "parts", "--resume", "auto", *stop).code == 0
    assert cli(*arguments, "--out", tmp_path / "whole").code == 0
    for part in ("decoder", "tuning", "encoder"):
        same_checkpoint(tmp_path / "parts" / part, tmp_path / "whole" / part, 4)


def test_the_parts_can_be_distilled_one_after_the_other(cli: Cli, model: Path, data: Path, tmp_path: Path) -> None:
    shared = ("--images", data, "--bar", "1e-9", *QUICK)
    assert cli("compact", model, *shared, "--parts", "decoder", "--out", tmp_path / "one").code == 0
    pipeline = LeafPipeline.from_pretrained(tmp_path / "one")
    assert pipeline.compact_decoder is not None
    assert pipeline.compact_encoder is None
    image = sorted((data / "images").iterdir())[0]
    error = cli("predict", tmp_path / "one", image, "--out", tmp_path / "masks", "--encoder", "compact").error
    assert "the model has no compact encoder; run leafseg compact MODEL" in error
    assert cli("compact", tmp_path / "one", *shared, "--parts", "encoder", "--out", tmp_path / "two").code == 0
    files = files_of(tmp_path / "two" / "pipeline")
    assert {"compact_decoder/config.json", "compact_encoder/config.json"} <= files.keys()
    decoder = "compact_decoder/diffusion_pytorch_model.safetensors"
    assert files[decoder] == files_of(tmp_path / "one" / "pipeline")[decoder]


def test_other_test_images_change_neither_part_and_only_they_are_compared(
    cli: Cli, model: Path, data: Path, tmp_path: Path, same_checkpoint: Callable[[Path, Path, int], None]
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    shutil.copytree(data / "images", one)
    shutil.copytree(data / "images", two)
    generator = np.random.default_rng(0)
    tested = load_manifest(one, settings=DataSettings(), require_masks=False).part("test").samples
    for sample in tested:
        path = two / sample.image.name
        while path.read_bytes() == sample.image.read_bytes() or part_of(path) != "test":
            write_png(path, generator.integers(0, 256, (40, 36), dtype=np.uint8))
    agreement = []
    for images in (one, two):
        out = tmp_path / f"out-{images.name}"
        assert (
            cli("compact", model, "--images", images, "--data", data, "--out", out, "--bar", "1e-9", *QUICK).code == 0
        )
        agreement.append(json.loads((out / "agreement.json").read_text())["agreement"])
    for part in ("decoder", "tuning", "encoder"):
        same_checkpoint(tmp_path / "out-one" / part, tmp_path / "out-two" / part, 4)
    assert agreement[0] != agreement[1]
    assert {figures["worst"][0] for found in agreement for figures in found.values()} <= {s.name for s in tested}


def part_of(path: Path) -> str:
    return default_part(None, hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: {"images": f / "empty"}, "no images in the folder|images/ missing"),
        (lambda f: {"images": f / "nowhere"}, "nowhere: no such folder"),
        (lambda f: {"model": f / "nowhere"}, "nowhere: no such folder"),
        (lambda f: {"images": f / "few"}, r"no image falls into the (test|validation|train) part \(1 in all\)"),
        (lambda f: {"options": ["--bar", "2"]}, "--bar is 2"),
        (lambda f: {"options": ["--set", "decoder.crop=12"]}, "decoder.crop is 12; it must be a multiple of 8"),
        (lambda f: {"options": ["--set", "decoder.with=12"]}, "unknown setting 'decoder.with'; did you mean"),
        (lambda f: {"options": ["--steps", "2", "--minutes", "1"]}, "--steps and --minutes"),
        (lambda f: {"options": ["--data", f / "empty"]}, "images/ and masks/ missing"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_the_model_alone(
    cli: Cli, model: Path, data: Path, tmp_path: Path, change: Callable, message: str
) -> None:
    (tmp_path / "empty").mkdir()
    write_png(tmp_path / "few" / "one.png", np.zeros((32, 32), np.uint8))
    given = {"images": data, "model": model, "options": [], **change(tmp_path)}
    before = files_of(model)
    arguments = ["compact", given["model"], "--images", given["images"], "--out", tmp_path / "out", *QUICK]
    error = cli(*arguments, *given["options"]).error
    assert re.search(message, error), error
    assert files_of(model) == before
    assert not (tmp_path / "out" / "pipeline").exists()


def test_too_few_images_are_told_of_before_anything_is_trained(
    cli: Cli, model: Path, data: Path, tmp_path: Path
) -> None:
    listed = load_manifest(data / "images", settings=DataSettings(), require_masks=False)
    (tmp_path / "tested").mkdir()
    for sample in listed.part("test").samples:
        shutil.copy(sample.image, tmp_path / "tested")
    arguments = ("compact", model, "--images", tmp_path / "tested", "--out", tmp_path / "out", "--bar", "1e-9", *QUICK)
    for parts in ("decoder", "encoder"):
        assert "no image falls into the train part" in cli(*arguments, "--parts", parts).error
        assert not any((tmp_path / "out").iterdir())
    # Masks alone teach a decoder without images to learn from.
    assert cli(*arguments, "--parts", "decoder", "--set", "tuning.enabled=false").code == 0
    assert not (tmp_path / "out" / "tuning").exists()


def test_a_model_that_never_finds_anything_cannot_be_judged(
    cli: Cli, tiny_pipeline: LeafPipeline, data: Path, tmp_path: Path
) -> None:
    with torch.no_grad():
        tiny_pipeline.vae.decoder.conv_out.weight.zero_()
        tiny_pipeline.vae.decoder.conv_out.bias.fill_(-1)
    tiny_pipeline.save_pretrained(tmp_path / "model")
    arguments = ("compact", tmp_path / "model", "--images", data, "--out", tmp_path / "out", "--parts", "encoder")
    assert "empty masks agree with anything" in cli(*arguments, *QUICK).error


def test_a_decoder_only_model_can_have_its_encoder_distilled_alone(
    cli: Cli, model: Path, data: Path, tmp_path: Path
) -> None:
    assert cli("slim", model, "--out", tmp_path / "slim", "--decoder-only").code == 0
    arguments = ("compact", tmp_path / "slim", "--images", data, "--bar", "1e-9", *QUICK)
    assert "decoder of its autoencoder only" in cli(*arguments, "--out", tmp_path / "no").error
    assert cli(*arguments, "--out", tmp_path / "out", "--parts", "encoder").code == 0
    assert checkpoint_folder(tmp_path / "out" / "encoder", 4).is_dir()
