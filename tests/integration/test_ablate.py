"""`leafseg ablate`: the grid is trained once, resumes, and says what is missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from leafseg.ablate import (
    Axis,
    Unit,
    calibrated_steps,
    cell_settings,
    grid,
    paper_grid,
    parse_axis,
    read_records,
    run_ablation,
)
from leafseg.config import Settings, load_settings, override_settings
from leafseg.errors import ConfigError

AXES = ["objective.prediction_type=sample,epsilon", "training.weight_decay=0,0.01"]


@pytest.fixture
def settings(tiny_settings: Settings) -> Settings:
    return override_settings(tiny_settings, ["training.steps=2", "training.validations=1"])


def test_an_axis_reads_numbers_names_and_lists() -> None:
    assert parse_axis("objective.prediction_type=sample,epsilon").values == ("sample", "epsilon")
    assert parse_axis("training.learning_rate=1.0e-4,0.001").values == (1e-4, 1e-3)
    assert parse_axis("data.preprocessing.size=[[128,128],[256,256]]").values == ([128, 128], [256, 256])


@pytest.mark.parametrize("text", ["", "a", "a=", "a=1", "a=1,1", "a=0,0.0", "=1,2", "a=[1,2"])
def test_an_axis_of_another_form_is_one_sentence(text: str) -> None:
    with pytest.raises(ConfigError, match="SETTING=VALUE"):
        parse_axis(text)


def test_the_grid_holds_every_combination_once() -> None:
    cells = grid([parse_axis("a=1,2"), parse_axis("b=x,y,z")])
    assert len(cells) == len(set(cells)) == 6
    assert cells[0] == (("a", 1), ("b", "x"))
    with pytest.raises(ConfigError, match="twice"):
        grid([parse_axis("a=1,2"), parse_axis("a=3,4")])


def test_a_cell_that_cannot_be_trained_is_refused_before_anything_is_trained(
    settings: Settings, tiny_data: Callable[..., Path], tmp_path: Path
) -> None:
    terminal = override_settings(settings, ["objective.terminal_fraction=0.5"])
    with pytest.raises(ConfigError, match=r"prediction_type=epsilon.*terminal_fraction"):
        run_ablation(terminal, [tiny_data(12)], tmp_path / "out", axes=[parse_axis(AXES[0])], seeds=[1])
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="did you mean"):
        cell_settings(settings, (("objective.prediction_typ", "sample"),), 1)


def test_the_papers_grid_can_be_trained_on_top_of_any_preset() -> None:
    shared, axes = paper_grid(load_settings("leaf-tiny"))
    cells = grid(axes)
    assert len(cells) == 6
    kinds = {
        (cell_settings(shared, cell, 1).objective.prediction_type, dict(cell)["objective.alignment_weight"])
        for cell in cells
    }
    assert kinds == {(kind, weight) for kind in ("sample", "v_prediction", "epsilon") for weight in (0, 0.25)}
    with pytest.raises(ConfigError, match="no alignment to switch off"):
        paper_grid(load_settings("leaf-tiny", overrides=["objective.alignment_weight=0"]))


def test_a_hole_in_the_grid_is_found_before_any_cell_is_tried(settings: Settings, tmp_path: Path) -> None:
    terminal = override_settings(settings, ["objective.terminal_fraction=0.5"])
    with pytest.raises(ConfigError, match="terminal_fraction"):  # not that there is no such data
        calibrated_steps(terminal, tmp_path / "none", tmp_path / "out", axes=[parse_axis(AXES[0])], seed=1, minutes=1.0)


def test_a_grid_is_run_once_and_continues_where_records_are_missing(
    settings: Settings, tiny_data: Callable[..., Path], tmp_path: Path
) -> None:
    data, out = tiny_data(12), tmp_path / "out"
    axes = [parse_axis(text) for text in AXES]
    first = run_ablation(settings, [data], out, axes=axes, seeds=[1], inference_steps=[1, 2])
    assert (first.finished, first.total, first.failed, first.interrupted) == (4, 4, {}, False)
    rows = list(read_records(out / "runs.jsonl"))
    assert len({json.dumps(row["cell"]) for row in rows}) == 4
    assert len({row["split_sha256"] for row in rows}) == 1
    assert set(rows[0]["evaluations"]) == {"1", "2"}

    # A second seed, and one record lost: five units in all are new, the other three are not touched.
    (out / "runs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:3]) + '{"torn')
    before = {p: p.stat().st_mtime_ns for p in (out / data.name).glob("*seed1/run.json")}
    second = run_ablation(settings, [data], out, axes=axes, seeds=[1, 2], inference_steps=[1, 2])
    assert second.finished == second.total == 8
    again = list(read_records(out / "runs.jsonl"))
    assert again[:3] == rows[:3]
    evaluated = [{k: row[k] for k in ("cell", "seed", "evaluations")} for row in (rows[3], again[3])]
    assert evaluated[0] == evaluated[1]  # the finished run was evaluated again, not trained differently
    unchanged = [p for p in before if p.stat().st_mtime_ns == before[p]]
    assert len(unchanged) >= 3
    assert "8 of 8 runs" in second.report.read_text()


def test_a_value_written_with_a_point_is_the_run_that_is_there(
    settings: Settings, tiny_data: Callable[..., Path], tmp_path: Path
) -> None:
    data, out = tiny_data(12), tmp_path / "out"
    chosen = override_settings(settings, ["training.selection_part=test", "training.steps=1"])
    run_ablation(chosen, [data], out, axes=[Axis("training.weight_decay", (0,))], seeds=[1])
    (row,) = read_records(out / "runs.jsonl")
    assert row["selected_on_test"] is True
    assert Unit(data, (("a", 0.0), ("b", True)), 1).name == "0-true-seed1"
    again = run_ablation(chosen, [data], out, axes=[Axis("training.weight_decay", (0.0,))], seeds=[1])
    assert list(read_records(out / "runs.jsonl")) == [row]
    page = again.report.read_text()
    assert "not run" not in page
    assert "(tests, 1 optimizer step)" in page
    assert "chosen on the test part" in page


def test_another_shared_setting_is_another_measurement(
    settings: Settings, tiny_data: Callable[..., Path], tmp_path: Path
) -> None:
    data, axes = tiny_data(12), [parse_axis(AXES[1])]
    records = tmp_path / "all.jsonl"
    run_ablation(settings, [data], tmp_path / "a", axes=axes, seeds=[1], records=records, keep_runs=False)
    assert not any((tmp_path / "a" / data.name).glob("*seed1"))
    warmer = override_settings(settings, ["training.learning_rate=0.002"])
    result = run_ablation(warmer, [data], tmp_path / "b", axes=axes, seeds=[1], records=records)
    assert result.finished == 2
    # Records of a version without a setting had its default in effect, whatever a preset says of it now.
    rows = list(read_records(records))
    assert len(rows) == 4
    for row in rows:
        del row["settings"]["data"]["soft_labels"]
    records.write_text("".join(json.dumps(row) + "\n" for row in rows))
    softer = override_settings(settings, ["data.soft_labels=true"])
    run_ablation(softer, [data], tmp_path / "c", axes=axes, seeds=[1], records=records)
    assert len(list(read_records(records))) == len(rows) + 2
    run_ablation(settings, [data], tmp_path / "d", axes=axes, seeds=[1], records=records)
    assert len(list(read_records(records))) == len(rows) + 2


def test_a_budget_in_minutes_becomes_one_number_of_steps_that_stays(
    settings: Settings, tiny_data: Callable[..., Path], tmp_path: Path
) -> None:
    data, axes = tiny_data(12), [parse_axis(AXES[1])]
    steps = calibrated_steps(settings, data, tmp_path / "out", axes=axes, seed=1, minutes=0.2)
    stored = json.loads((tmp_path / "out" / "budget.json").read_text())
    assert steps == stored["steps"] == min(stored["cells"].values()) >= 1
    assert len(stored["cells"]) == 2
    (tmp_path / "out" / "budget.json").write_text(json.dumps({**stored, "steps": 7}))
    assert calibrated_steps(settings, data, tmp_path / "out", axes=axes, seed=1, minutes=0.2) == 7
    with pytest.raises(ConfigError, match=r"began with --minutes 0\.2"):
        calibrated_steps(settings, data, tmp_path / "out", axes=axes, seed=1, minutes=0.3)
