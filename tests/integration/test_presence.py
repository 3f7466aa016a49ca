"""Thresholds of presence from a training to masks: chosen by validations, stored, obeyed, and left out on demand."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from leafseg.baseline import load_baseline
from leafseg.config import DataSettings, Settings, override_settings
from leafseg.crossval import run_crossval, store_new_split
from leafseg.data.images import write_png
from leafseg.data.manifest import load_manifest
from leafseg.pipeline import LeafPipeline
from leafseg.predict import load_segmenter
from leafseg.runs import checkpoint_folder, checkpoint_steps
from leafseg.training.leaf_task import LeafTask
from leafseg.training.unet_task import UNetTask

Cli = Callable[..., Any]
ROWS = 3 * [
    {"label": "foreground", "empty": True, "dice": None, "predicted_pixels": 9, "peak": 0.62},
    {"label": "foreground", "empty": False, "dice": 0.9, "predicted_pixels": 9, "peak": 0.98},
]


@pytest.mark.parametrize("kind", ["leaf", "unet"])
def test_a_validation_chooses_them_and_the_next_step_forgets_them(
    kind: str, tiny_settings: Settings, data: Path, tmp_path: Path
) -> None:
    settings = override_settings(tiny_settings, [f"model.kind={kind}", "inference.presence=tuned"])
    made = LeafTask if kind == "leaf" else UNetTask
    task = made(settings, load_manifest(data, settings=settings.data))
    load = LeafPipeline.from_pretrained if kind == "leaf" else load_baseline
    task.summarise(ROWS)
    task.save_inference(tmp_path / "tuned")
    assert load(str(tmp_path / "tuned")).presence == (0.65,)
    assert task.segmenter().presence == (), "a validation draws without thresholds"

    sample = task.dataset[0, 0]
    batch = {name: torch.as_tensor(np.array(value))[None] for name, value in sample.items()}
    task.prepare(torch.device("cpu"), nullcontext, tmp_path)
    task.loss(task.module, batch, 0)
    task.save_inference(tmp_path / "later")
    assert load(str(tmp_path / "later")).presence == ()


@pytest.mark.parametrize(
    "setting", ["inference.presence=none", "data.preprocessing.fit=tile", "training.validation_resolution=input"]
)
def test_there_are_none_if_they_are_off_or_peaks_are_not_those_of_whole_images(
    setting: str, tiny_settings: Settings, data: Path
) -> None:
    settings = override_settings(tiny_settings, ["inference.presence=tuned", setting])
    task = LeafTask(settings, load_manifest(data, settings=settings.data))
    task.summarise(ROWS)
    assert task.pipeline().presence == ()


def test_a_training_on_images_with_and_without_findings_stores_what_its_validation_found(
    train_tiny: Callable[..., Any], tiny_data: Callable[..., Path], tmp_path: Path, cli: Cli
) -> None:
    data = tiny_data()
    for index in range(40, 80):  # noise alone
        noise = np.random.default_rng(index).uniform(0, 80, (40, 36)).astype(np.uint8)
        write_png(data / "images" / f"{index:03d}.png", noise)
        write_png(data / "masks" / f"{index:03d}.png", np.zeros((40, 36), np.uint8))
    run = tmp_path / "run"
    train_tiny(data, run, "training.validation_samples=100", "inference.presence=tuned")
    for name, options in (("with", ()), ("without", ("--keep-unsure",))):
        ended = cli("evaluate", run, "--data", data, "--split", "validation", "--out", tmp_path / name, *options)
        assert ended.code == 0, ended.stderr
    summaries = [json.loads((tmp_path / n / "summary.json").read_text()) for n in ("with", "without")]
    presence = LeafPipeline.from_pretrained(str(run)).presence
    assert [summary["presence"] for summary in summaries] == [list(presence), []]
    rows = [list(csv.DictReader((tmp_path / n / "per_image.csv").open())) for n in ("with", "without")]
    threshold = np.float32(presence[0]) if presence else 0.0
    for obeyed, plain in zip(*rows, strict=True):
        assert obeyed["peak"] == plain["peak"]
        sure = float(plain["peak"]) >= threshold
        assert obeyed["predicted_pixels"] == (plain["predicted_pixels"] if sure else "0")

    # Four steps teach little: whatever they chose, a threshold that nothing reaches must empty every mask.
    index = run / "pipeline" / "model_index.json"
    content = json.loads(index.read_text())
    index.write_text(json.dumps({**content, "presence": [1.0], "format_version": 3}))
    shown = load_segmenter(str(run)).segment([np.array(Image.open(data / "images" / "000.png"))])[0]
    assert shown.probability.max() > 0.5
    for name, options, any_pixel in (("masks", (), False), ("all", ("--keep-unsure",), True)):
        ended = cli("predict", run, data / "images" / "000.png", "--out", tmp_path / name, *options)
        assert ended.code == 0, ended.stderr
        assert np.array(Image.open(tmp_path / name / "000.png")).any() == any_pixel


def test_the_best_and_the_last_checkpoint_store_their_own_and_a_run_resumes_with_or_without(
    train_tiny: Callable[..., Any], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    thresholds = iter([(0.55,), (0.65,)])
    monkeypatch.setattr("leafseg.training.segmentation_task.tuned_presence", lambda rows: next(thresholds))

    def stored() -> dict[int, tuple[float, ...]]:
        return {
            step: LeafPipeline.from_pretrained(str(checkpoint_folder(tmp_path, step) / "pipeline")).presence
            for step in checkpoint_steps(tmp_path)
        }

    tuned = ("training.save_every=1", "inference.presence=tuned")
    train_tiny(data, tmp_path, *tuned, stop_after=3)
    assert stored() == {2: (0.55,), 3: ()}, "validated after 2 and 4 steps"
    assert LeafPipeline.from_pretrained(str(tmp_path)).presence == (0.55,)
    train_tiny(data, tmp_path, *tuned, resume=True)
    assert stored()[4] == (0.65,)
    train_tiny(data, tmp_path, "training.save_every=1", "training.steps=5", resume=True)
    assert stored()[5] == (), "none are asked for now"


def test_cross_validation_draws_held_out_images_without(
    tiny_settings: Settings, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("leafseg.training.segmentation_task.tuned_presence", lambda rows: (0.95,))
    store_new_split(data, tmp_path, settings=DataSettings(), folds=2, test=0.25)
    settings = override_settings(
        tiny_settings, ["training.steps=1", "training.validations=1", "inference.presence=tuned"]
    )
    found = run_crossval(settings, data, tmp_path)
    for fold in found.folds:
        assert LeafPipeline.from_pretrained(str(fold.checkpoint)).presence == (0.95,)
        unsure = [row for row in fold.rows if 0.5 < row.peak < 0.95]
        assert unsure
        assert all(row.predicted_pixels > 0 for row in unsure)


def test_masks_come_with_the_thresholds_they_were_drawn_by(
    tiny_pipeline: LeafPipeline, data: Path, tmp_path: Path, cli: Cli
) -> None:
    tiny_pipeline.presence = (0.55,)
    tiny_pipeline.save_pretrained(tmp_path / "model")
    for name, options, used in (("with", (), [0.55]), ("without", ("--keep-unsure",), [])):
        ended = cli("predict", tmp_path / "model", data / "images" / "000.png", "--out", tmp_path / name, *options)
        assert ended.code == 0, ended.stderr
        assert json.loads((tmp_path / name / "report.json").read_text())["presence"] == used
        ended = cli("evaluate", tmp_path / "model", "--data", data, "--out", tmp_path / f"e-{name}", *options)
        assert ended.code == 0, ended.stderr
    ended = cli("compare", tmp_path / "e-with", tmp_path / "e-without", "--out", tmp_path / "compared")
    assert ended.code == 0, ended.stderr
    assert "does not draw what it is nowhere sure of (thresholds of presence)" in ended.stdout


def test_an_export_obeys_them(tiny_pipeline: LeafPipeline, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (leafseg[onnx])")
    from leafseg import runtime
    from leafseg.export.run import export_model

    pixels = np.random.default_rng(0).integers(0, 256, (40, 36, 3), dtype=np.uint8)
    config = {name: tiny_pipeline.config[name] for name in ("preprocessing", "mask_code")}
    peak = float(tiny_pipeline(pixels).probability.max())
    model = tmp_path / "model"
    LeafPipeline(**tiny_pipeline.components, **config, presence=[peak + 0.01]).save_pretrained(model)
    export_model(load_segmenter(str(model), device="cpu"), tmp_path / "onnx", to="onnx", repeats=1, model_name="model")
    content = json.loads((tmp_path / "onnx" / "export.json").read_text())
    assert content["format_version"] == 2
    assert content["labels"]["presence"] == [pytest.approx(peak + 0.01)]
    assert "only in images where its probability reaches" in (tmp_path / "onnx" / "README.md").read_text()
    loaded = runtime.load(tmp_path / "onnx")
    result = loaded(pixels)
    assert result.probability.max() == pytest.approx(peak, abs=1e-3)
    assert not result.mask.any()
    assert not result.labels.any()
    loaded.presence = ()
    assert loaded(pixels).mask.any()
    content["labels"]["presence"] = [2.0]
    (tmp_path / "onnx" / "export.json").write_text(json.dumps(content))
    with pytest.raises(Exception, match=r"presence is \[2\.0\]"):
        runtime.load(tmp_path / "onnx")
