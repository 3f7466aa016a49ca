"""Which model a name means."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from leafseg.errors import CheckpointError
from leafseg.runs import best_checkpoint, checkpoint_folder, checkpoint_steps, resolve_model


def make_run(root: Path, *steps: int, best: int | None = None) -> Path:
    root.mkdir(exist_ok=True)
    (root / "run.json").write_text("{}")
    for step in steps:
        (checkpoint_folder(root, step) / "trainer").mkdir(parents=True)
        (checkpoint_folder(root, step) / "pipeline").mkdir()
        (checkpoint_folder(root, step) / "trainer" / "state.json").write_text(json.dumps({"best_step": best}))
    return root


def test_steps_are_listed_in_order_and_unfinished_folders_are_not(tmp_path: Path) -> None:
    run = make_run(tmp_path, 1_000_000, 20, 3)
    for name in (".tmp-step-000004", "step-000005.part", "step-12", "notes"):
        (run / "checkpoints" / name).mkdir()
    assert checkpoint_steps(run) == [3, 20, 1_000_000]
    assert checkpoint_folder(run, 3).name == "step-000003"


def test_a_run_means_its_best_checkpoint_as_the_last_one_remembers_it(tmp_path: Path) -> None:
    assert best_checkpoint(make_run(tmp_path / "a", 10, 20, 30, best=20)).name == "step-000020"
    assert best_checkpoint(make_run(tmp_path / "b", 10, 20)).name == "step-000020"
    assert best_checkpoint(make_run(tmp_path / "c", 20, 30, best=10)).name == "step-000030"  # removed since


def test_a_name_is_resolved_to_a_pipeline_folder_or_left_as_a_hub_id(tmp_path: Path) -> None:
    run = make_run(tmp_path, 10, 20, best=10)
    chosen = checkpoint_folder(run, 10)
    assert resolve_model(str(run)) == str(chosen / "pipeline")
    assert resolve_model(str(chosen)) == str(chosen / "pipeline")
    assert resolve_model(str(chosen / "pipeline")) == str(chosen / "pipeline")
    assert resolve_model("owner/name") == "owner/name"


def test_a_run_without_a_checkpoint_or_with_a_damaged_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        resolve_model(str(make_run(tmp_path / "a")))
    run = make_run(tmp_path / "b", 5)
    for text in ("{", "[]", None):
        state = checkpoint_folder(run, 5) / "trainer" / "state.json"
        state.unlink() if text is None else state.write_text(text)
        with pytest.raises(CheckpointError, match=r"state\.json is damaged"):
            resolve_model(str(run))
