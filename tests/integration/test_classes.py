"""Several classes, overlapping labels and ignored pixels through training, resuming, evaluation and prediction."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from leafseg.config import Settings, override_settings
from leafseg.data.images import read_image, write_png
from leafseg.data.manifest import IGNORE, load_manifest
from leafseg.data.transforms import Augmentation, pack_augmentation
from leafseg.model.autoencoder import encode_pictures
from leafseg.pipeline import LeafPipeline
from leafseg.runs import checkpoint_folder
from leafseg.training.leaf_task import LeafTask
from leafseg.training.run import run_training
from leafseg.training.trainer import TrainingResult

Train = Callable[..., TrainingResult]
PIXEL = "objective.pixel_weight=1.0"


def cells(data: Path, root: Path) -> Path:
    """The ellipses with a nucleus: ids 1 and 2, and a strip that nobody labelled."""
    for path in sorted((data / "images").iterdir()):
        mask = (read_image(data / "masks" / path.name) > 0).astype(np.uint8)
        rows, columns = np.nonzero(mask)
        mask[int(rows.mean()) - 2 : int(rows.mean()) + 2, int(columns.mean()) - 2 : int(columns.mean()) + 2] = 2
        mask[-3:] = 9
        write_png(root / "masks" / path.name, mask)
        write_png(root / "images" / path.name, read_image(path))
    (root / "labels.json").write_text('{"1": "cytoplasm", "2": "nucleus"}')
    return root


def overlapping(data: Path, root: Path) -> Path:
    """The ellipses, and the image's left half, as labels of their own."""
    for path in sorted((data / "images").iterdir()):
        mask = (read_image(data / "masks" / path.name) > 0).astype(np.uint8)
        left = np.zeros_like(mask)
        left[:, : mask.shape[1] // 2] = 1
        write_png(root / "masks" / "ellipse" / path.name, mask * 255)
        write_png(root / "masks" / "left" / path.name, left)
        write_png(root / "images" / path.name, read_image(path))
    return root


KINDS = {
    "classes": (cells, ("data.ignore_label=9",), ("background", "cytoplasm", "nucleus"), "planes", 3),
    "overlapping": (overlapping, (), ("ellipse", "left"), "overlapping", 2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_with_several_labels_resumes_evaluates_and_predicts(
    kind: str, data: Path, tiny_settings: Settings, tmp_path: Path, same_checkpoint: Callable, cli: Callable
) -> None:
    make, overrides, names, code, channels = KINDS[kind]
    folder = make(data, tmp_path / "data")
    settings = override_settings(tiny_settings, [PIXEL, "training.steps=2", "training.validations=1", *overrides])
    run_training(settings, folder, tmp_path / "whole")
    run_training(settings, folder, tmp_path / "parted", stop_after=1)
    run_training(settings, folder, tmp_path / "parted", resume=True)
    same_checkpoint(tmp_path / "whole", tmp_path / "parted", 2)

    pipeline = LeafPipeline.from_pretrained(tmp_path / "whole")
    assert pipeline.config["mask_code"] == {"name": code, "label_names": list(names)}
    assert pipeline.unet.config["out_channels"] == 2 * 4  # two pictures of four latent channels
    assert pipeline(np.zeros((20, 30), np.uint8)).probability.shape == (1, channels, 20, 30)

    ended = cli("evaluate", tmp_path / "whole", "--data", folder, "--no-report", "--out", tmp_path / "evaluation")
    assert ended.code == 0, ended.stderr
    summary = json.loads((tmp_path / "evaluation" / "summary.json").read_text())
    assert list(summary["classes"]) == [name for name in names if name != "background"]

    image = sorted((folder / "images").iterdir())[0]
    ended = cli("predict", tmp_path / "whole", image, "--out", tmp_path / "masks")
    assert ended.code == 0, ended.stderr
    report = json.loads((tmp_path / "masks" / "report.json").read_text())
    assert report["label_names"] == list(names)
    written = report["written"][str(image)]
    assert len(written) == (1 if kind == "classes" else 2)
    assert all(read_image(tmp_path / "masks" / name).shape == (40, 36) for name in written)


def test_what_ignored_pixels_hold_reaches_no_loss(data: Path, tiny_settings: Settings, tmp_path: Path) -> None:
    settings = override_settings(tiny_settings, [PIXEL, "data.ignore_label=9"])
    task = LeafTask(settings, load_manifest(cells(data, tmp_path), settings=settings.data))
    task.prepare(torch.device("cpu"), torch.no_grad, tmp_path)
    task.module.eval()
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(2, 32, 32, dtype=torch.int64)
    labels[:, 8:16, 8:24] = 1
    turned = pack_augmentation(Augmentation(angle=5.0))  # latents of moved masks are not kept from one call to the next
    batch = {
        "image": image,
        "labels": labels,
        "augmentation": torch.stack([turned, turned]),
        "position": torch.arange(2),
        "index": torch.arange(2),
    }

    def losses(changed: torch.Tensor) -> dict[str, float]:
        return {name: value.item() for name, value in task.loss(task.module, {**batch, "labels": changed}, 0).items()}

    ignored = labels.clone()
    ignored[:, 24:] = IGNORE  # drawn as background, which these pixels are: the mask latent is the same
    with_and_without = losses(ignored), losses(labels)
    assert all(value > 0 for found in with_and_without for value in found.values())
    assert with_and_without[0] != with_and_without[1]

    # The loss without the last row of latent cells and their pixels, computed from the parts.
    captured: dict[str, torch.Tensor] = {}

    def forward(images: torch.Tensor, noisy: torch.Tensor, timesteps: torch.Tensor) -> tuple[torch.Tensor, None]:
        captured["prediction"] = task.module(images, noisy, timesteps)[0]
        return captured["prediction"], None

    found = task.loss(forward, {**batch, "labels": ignored}, 0)["prediction"]
    latent = encode_pictures(task.parts.autoencoder, task.parts.mask_code.encode(labels))
    expected = (captured["prediction"] - latent)[:, :, :3].abs().mean()
    torch.testing.assert_close(found, expected)


def test_data_without_ignored_pixels_trains_as_without_the_setting(
    data: Path, train_tiny: Train, tmp_path: Path
) -> None:
    overrides = (PIXEL, "training.steps=1", "training.validations=0", "training.validation_samples=1")
    train_tiny(data, tmp_path / "plain", *overrides)
    train_tiny(data, tmp_path / "ignoring", *overrides, "data.ignore_label=9")
    plain, ignoring = (
        load_file(checkpoint_folder(tmp_path / name, 1) / "trainer" / "weights.safetensors")
        for name in ("plain", "ignoring")
    )
    assert all(torch.equal(plain[name], ignoring[name]) for name in plain)
