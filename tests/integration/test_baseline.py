"""A plain U-Net goes through what LEAF goes through: training, resuming, evaluation, prediction, ensembles."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.losses import DiceCELoss
from monai.networks.nets import BasicUNet
from PIL import Image

from leafseg.baseline import BaselineSegmenter, build_network, load_baseline, output_channels
from leafseg.config import BaselineSettings, PreprocessingSettings, Settings, override_settings
from leafseg.data.manifest import load_manifest
from leafseg.ensemble import load_ensemble, load_model
from leafseg.errors import CheckpointError, ConfigError
from leafseg.objective import pixel_loss
from leafseg.pipeline import LeafPipeline
from leafseg.runs import best_checkpoint, is_baseline, model_sha256
from leafseg.training.trainer import TrainingResult
from leafseg.training.unet_task import UNetTask

Train = Callable[..., TrainingResult]

UNET = ("model.kind=unet", "model.baseline.channels=[4,4,8,8,16,4]", "model.baseline.dropout=0.1")


@pytest.fixture(scope="module")
def run(train_tiny: Train, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained baseline; not to be changed."""
    out = tmp_path_factory.mktemp("unet") / "run"
    assert train_tiny(data, out, *UNET).status == "finished"
    return out


def test_a_stopped_baseline_resumes_exactly(
    run: Path, train_tiny: Train, data: Path, tmp_path: Path, same_checkpoint: Callable[[Path, Path, int], None]
) -> None:
    train_tiny(data, tmp_path / "run", *UNET, stop_after=2)
    train_tiny(data, tmp_path / "run", *UNET, resume=True)
    same_checkpoint(run, tmp_path / "run", 4)


def test_its_folder_loads_to_the_network_that_was_validated(run: Path, data: Path) -> None:
    assert is_baseline(str(run))
    segmenter = load_model(str(run), num_samples=3, noise="gaussian")  # options of a pipeline mean nothing to it
    assert isinstance(segmenter, BaselineSegmenter)
    assert not segmenter.network.training
    image = segmenter.read(data / "images" / "000.png")
    (found,) = segmenter.segment([image])
    prepared, placement = segmenter.preprocessor.apply(image)
    with torch.no_grad():
        logits = segmenter.network(prepared[None] * 2 - 1)
    expected = segmenter.preprocessor.restore(logits.sigmoid()[0], placement).numpy()
    np.testing.assert_allclose(found.probability, expected, atol=1e-6)
    np.testing.assert_array_equal(found.labels, expected[0] > 0.5)
    assert model_sha256(str(run)) is not None


def test_the_command_trains_evaluates_predicts_and_compares(
    cli: Callable[..., object], data: Path, tiny_config: Path, run: Path, train_tiny: Train, tmp_path: Path
) -> None:
    shared = ("--data", data, "--config", tiny_config, "--steps", 2, "--set", UNET[1])
    ended = cli("train", "--model", "unet", *shared, "--out", tmp_path / "run")
    assert ended.code == 0, ended.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["kind"] == "unet"
    tried = cli("train", "--model", "unet", *shared, "--dry-run")
    assert tried.code == 0, tried.stderr
    assert "basic_unet" in tried.stdout
    assert "projector" not in tried.stdout
    for model in (run, tmp_path / "run"):
        ended = cli("evaluate", model, "--data", data, "--out", tmp_path / model.parent.name, "--no-report")
        assert ended.code == 0, ended.stderr
    ended = cli("predict", run, data / "images" / "000.png", "--out", tmp_path / "masks")
    assert ended.code == 0, ended.stderr
    with Image.open(tmp_path / "masks" / "000.png") as mask, Image.open(data / "images" / "000.png") as image:
        assert mask.size == image.size
    train_tiny(data, tmp_path / "leaf")
    assert cli("evaluate", tmp_path / "leaf", "--data", data, "--no-report").code == 0
    ended = cli(
        "compare", tmp_path / run.parent.name, tmp_path / "leaf" / "evaluation-test", "--out", tmp_path / "compared"
    )
    assert ended.code == 0, ended.stderr


def test_baselines_make_an_ensemble(run: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "ensemble.json").write_text(json.dumps({"models": [str(run), str(run)]}))
    ensemble, alone = load_ensemble(tmp_path), load_model(str(run))
    image = alone.read(data / "images" / "001.png")
    np.testing.assert_allclose(
        ensemble.segment([image])[0].probability, alone.segment([image])[0].probability, atol=1e-6
    )


def test_images_beyond_its_size_are_tiled_and_several_classes_share_a_softmax() -> None:
    settings = PreprocessingSettings(size=(32, 32), fit="tile", stride=16)
    names = ("background", "a", "b")
    torch.manual_seed(0)
    network = build_network(BaselineSettings(channels=(4, 4, 8, 8, 16, 4)), out_channels=3).eval()
    segmenter = BaselineSegmenter(network, preprocessing=settings, label_names=names, overlapping=False)
    (found,) = segmenter.segment([np.random.default_rng(0).integers(0, 255, (70, 45, 3), dtype=np.uint8)])
    assert found.probability.shape == (3, 70, 45)
    np.testing.assert_allclose(found.probability.sum(0), 1, atol=1e-5)
    np.testing.assert_array_equal(found.labels, found.probability.argmax(0))


@pytest.mark.parametrize(
    ("names", "overlapping", "count"),
    [(("background", "x"), False, 1), (("background", "x", "y"), False, 3), (("x", "y"), True, 2), (("x",), True, 1)],
)
def test_binary_masks_take_one_channel_and_others_one_each(
    names: tuple[str, ...], overlapping: bool, count: int
) -> None:
    assert output_channels(names, overlapping=overlapping) == count


def test_the_network_is_monais_with_the_seeds_weights(tiny_settings: Settings, data: Path) -> None:
    settings = override_settings(tiny_settings, UNET)
    manifest = load_manifest(data, settings=settings.data)
    one, two = UNetTask(settings, manifest), UNetTask(settings, manifest)
    assert isinstance(one.module, BasicUNet)
    assert all(torch.equal(a, b) for a, b in zip(one.module.parameters(), two.module.parameters(), strict=True))
    other = UNetTask(override_settings(settings, ["training.seed=4"]), manifest)
    assert not all(torch.equal(a, b) for a, b in zip(one.module.parameters(), other.module.parameters(), strict=True))


@pytest.mark.parametrize("channels", [1, 3])
def test_its_loss_is_monais_dice_and_cross_entropy(channels: int) -> None:
    draws = torch.Generator().manual_seed(0)
    logits = torch.randn(2, channels, 8, 8, generator=draws)
    target = torch.randint(0, max(channels, 2), (2, 8, 8), generator=draws)
    smooth = {"smooth_nr": 1.0, "smooth_dr": 1.0}
    if channels == 1:
        theirs = DiceCELoss(sigmoid=True, **smooth)(logits, target[:, None].float())
    else:
        theirs = DiceCELoss(softmax=True, to_onehot_y=True, **smooth)(logits, target[:, None])
    torch.testing.assert_close(pixel_loss(logits, target), theirs)


@pytest.mark.parametrize(
    "settings",
    [BaselineSettings(network="dyn_unet", channels=(4, 8, 8)), BaselineSettings(network="seg_resnet", channels=(8,))],
)
def test_other_networks_of_monai_keep_the_images_size(settings: BaselineSettings) -> None:
    side = settings.stride * 2
    assert build_network(settings, out_channels=2).eval()(torch.zeros(1, 3, side, side)).shape == (1, 2, side, side)


def test_a_wrong_layout_or_start_is_one_sentence(train_tiny: Train, run: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"channels has 2 numbers; basic_unet takes 6"):
        train_tiny(data, tmp_path, "model.kind=unet", "model.baseline.channels=[4,8]")
    with pytest.raises(ConfigError, match="starts from random weights"):
        train_tiny(data, tmp_path, *UNET, init_from=str(run))
    with pytest.raises(CheckpointError, match="a baseline has no reverse steps"):
        load_model(str(run), num_inference_steps=5)
    with pytest.raises(CheckpointError, match="a baseline has no fast mode"):
        load_model(str(run), fast=True)
    with pytest.raises(CheckpointError, match="is a baseline network, and a LEAF model is needed"):
        LeafPipeline.from_pretrained(str(run))


@pytest.mark.parametrize("damage", ["no weights", "torn weights", "no number", "newer", "unknown network", "no json"])
def test_a_damaged_baseline_is_refused_in_one_sentence(run: Path, tmp_path: Path, damage: str) -> None:
    source = best_checkpoint(run) / "pipeline"
    for name in ("baseline.json", "model.safetensors"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    weights, index = tmp_path / "model.safetensors", tmp_path / "baseline.json"
    content = json.loads(index.read_text())
    if damage == "no weights":
        weights.unlink()
    elif damage == "torn weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "no number":
        data = bytearray(weights.read_bytes())
        data[-4:] = np.float32("nan").tobytes()
        weights.write_bytes(bytes(data))
    elif damage == "newer":
        index.write_text(json.dumps({**content, "format_version": 99}))
    elif damage == "unknown network":
        index.write_text(json.dumps({**content, "baseline": {"network": "exec"}}))
    else:
        index.write_text("{")
    with pytest.raises(Exception) as refused:  # noqa: PT011  # the class differs, the sentence is checked
        load_baseline(str(tmp_path))
    assert type(refused.value).__module__ == "leafseg.errors"
    assert str(tmp_path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_leaf_alone_does_not_load_the_baselines_library() -> None:
    code = "import sys, leafseg.ensemble; print('monai.networks.nets' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert ended.stdout.strip() == "False", ended.stderr
