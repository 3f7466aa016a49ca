"""RUN/pipeline opens the best checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

from leafseg.training.checkpoint import link_best


def make_checkpoint(run: Path, step: int, best: int) -> None:
    folder = run / "checkpoints" / f"step-{step:06d}"
    (folder / "pipeline").mkdir(parents=True)
    (folder / "pipeline" / "name.txt").write_text(str(step))
    (folder / "trainer").mkdir()
    (folder / "trainer" / "state.json").write_text(json.dumps({"best_step": best}))


def test_the_link_follows_the_best_checkpoint(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 1, best=1)
    link_best(tmp_path, "pipeline")
    make_checkpoint(tmp_path, 2, best=1)
    link_best(tmp_path, "pipeline")
    assert (tmp_path / "pipeline" / "name.txt").read_text() == "1"
    make_checkpoint(tmp_path, 3, best=3)
    link_best(tmp_path, "pipeline")
    assert (tmp_path / "pipeline" / "name.txt").read_text() == "3"
    assert not (tmp_path / "pipeline").readlink().is_absolute(), "a run folder can be moved"


def test_a_folder_in_the_links_place_is_left_alone(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 1, best=1)
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "mine.txt").write_text("kept")
    link_best(tmp_path, "pipeline")
    assert (tmp_path / "pipeline" / "mine.txt").read_text() == "kept"
