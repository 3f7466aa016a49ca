"""A model of tiles from training to files: images keep their own resolution, and a resumed run sees the same tiles."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from leafseg.pipeline import LeafPipeline
from leafseg.runs import checkpoint_folder

TILES = ("data.preprocessing.fit=tile", "data.preprocessing.size=[16,32]", "data.augmentation.mix=0.5")


def test_a_model_of_tiles_trains_resumes_evaluates_and_predicts(
    train_tiny: Callable[..., object],
    data: Path,
    tmp_path: Path,
    same_checkpoint: Callable[[Path, Path, int], None],
    cli: Callable[..., object],
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_tiny(data, whole, *TILES, "training.save_every=2")
    train_tiny(data, parts, *TILES, "training.save_every=2", stop_after=2)
    train_tiny(data, parts, *TILES, "training.save_every=2", resume=True)
    same_checkpoint(whole, parts, 4)
    model = LeafPipeline.from_pretrained(str(checkpoint_folder(whole, 4) / "pipeline"))
    assert model.latent_shape((40, 36)) == (4, 5, 5)  # 40 / 8, and 36 continued to 40

    ended = cli("evaluate", whole, "--data", data, "--split", "test", "--out", tmp_path / "evaluation")
    assert ended.code == 0, ended.stderr
    summary = json.loads((tmp_path / "evaluation" / "summary.json").read_text())
    assert summary["classes"]["foreground"]["images"] >= 2

    ended = cli("predict", whole, data / "images" / "000.png", "--out", tmp_path / "masks")
    assert ended.code == 0, ended.stderr
    pixels = np.array(Image.open(data / "images" / "000.png"))
    expected = LeafPipeline.from_pretrained(str(whole))(pixels).mask[0, 0].numpy()
    assert expected.shape == (40, 36)
    assert np.array_equal(np.array(Image.open(tmp_path / "masks" / "000.png")) == 255, expected)
