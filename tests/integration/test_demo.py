"""The whole demo, with a model too small and a training too short to learn anything."""

from __future__ import annotations

import csv
import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from leafseg.data.images import read_image
from leafseg.demo import run_demo
from leafseg.errors import ConfigError
from leafseg.runs import checkpoint_steps

TINY = (
    "model.autoencoder.weights=null",
    "teacher.name=none",
    "training.steps=3",
    "training.batch_size=2",
    "training.validations=1",
    "training.validation_samples=2",
    "data.preprocessing.size=[64,64]",
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("nilearn") is None or find_spec("matplotlib") is None, reason="needs the demo's extra"
    ),
]


def test_the_demo_trains_evaluates_reports_and_can_be_repeated(tmp_path: Path) -> None:
    out = tmp_path / "demo"

    page = run_demo(out, seed=5, overrides=TINY)

    assert page == out / "report.html"
    text = page.read_text(encoding="utf-8")
    assert "This is a demonstration, not a benchmark" in text
    assert "not a medical device" in text
    assert "60 train, 20 validation, 20 test" in text
    summary = json.loads((out / "evaluation" / "summary.json").read_text())
    assert {label: figures["images"] for label, figures in summary["classes"].items()} == {
        "grey matter": 20,
        "white matter": 20,
    }
    predicted: dict[str, list[int]] = {}
    with (out / "evaluation" / "per_image.csv").open() as stream:
        for row in csv.DictReader(stream):
            predicted.setdefault(row["name"], []).append(int(row["predicted_pixels"]))
    masks = {p.stem: p for p in (out / "masks").glob("*.png") if not p.stem.endswith("_overlay")}
    assert masks.keys() == predicted.keys()
    for name, path in masks.items():
        mask = read_image(path)
        assert mask.shape == (233, 197)
        # A mask depends on its image alone; grey matter is grey, white matter white.
        assert [np.count_nonzero(mask == value) for value in (127, 254)] == predicted[name]

    page.unlink()
    trained = (out / "run" / "run.json").read_bytes()
    assert run_demo(out, seed=5, overrides=TINY).is_file()
    assert checkpoint_steps(out / "run") == [3]
    assert (out / "run" / "run.json").read_bytes() == trained
    assert json.loads((out / "evaluation" / "summary.json").read_text()) == summary

    with pytest.raises(ConfigError, match="its seed is 5"):
        run_demo(out, seed=6, overrides=TINY)
