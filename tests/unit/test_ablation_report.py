"""Tables of an ablation: figures by hand, missing runs, three formats."""

from __future__ import annotations

import csv
import io
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from leafseg.evaluation.ablation_report import (
    NOT_RUN,
    Ablation,
    csv_table,
    latex,
    markdown,
    normalised,
    write_report,
)
from leafseg.evaluation.intervals import bootstrap_seeds_and_images

AXES = [("objective.prediction_type", ("sample", "epsilon")), ("objective.alignment_weight", (0, 0.25))]
SEEDS = (1, 2)


def record(data: str, kind: str, weight: float, seed: int, dice: list[float | None]) -> dict:
    names = {f"image{i}/foreground": value for i, value in enumerate(dice)}
    cell = {"objective.prediction_type": kind, "objective.alignment_weight": weight}
    return {"data": data, "cell": cell, "seed": seed, "evaluations": {"1": {"dice": names}}}


def dice(kind: str, weight: float, seed: int) -> list[float | None]:
    """Three images, one of them empty; alignment adds 0.1, epsilon takes 0.3, the second seed adds 0.04."""
    base = (0.1 if weight else 0.0) - (0.3 if kind == "epsilon" else 0.0) + (0.04 if seed == 2 else 0.0)
    return [0.5 + base, None, 0.7 + base]


@pytest.fixture
def complete() -> Ablation:
    rows = [record("busi", k, w, s, dice(k, w, s)) for k, w, s in product(*(v for _, v in AXES), SEEDS)]
    return Ablation(rows, axes=AXES, data=["busi"], seeds=SEEDS)


def test_a_cells_dice_is_the_mean_over_seeds_and_images_with_a_mask(complete: Ablation) -> None:
    score = complete.scores()[1]
    assert dict(score.cell) == {"objective.prediction_type": "sample", "objective.alignment_weight": 0.25}
    assert score.dice is not None
    assert score.dice.mean == pytest.approx(0.72)  # (0.6 + 0.8 + 0.64 + 0.84) / 4
    assert score.dice.n == 2
    assert score.by_seed == {1: pytest.approx(0.7), 2: pytest.approx(0.74)}


def test_differences_are_paired_so_that_equal_gains_have_no_spread(complete: Ablation) -> None:
    found = {(d.setting, d.value, d.others): d.dice for d in complete.differences()}
    assert len(found) == 4
    gain = found["objective.alignment_weight", 0.25, (("objective.prediction_type", "epsilon"),)]
    loss = found["objective.prediction_type", "epsilon", (("objective.alignment_weight", 0),)]
    assert gain is not None
    assert loss is not None
    assert (gain.mean, gain.low, gain.high) == pytest.approx((0.1, 0.1, 0.1))
    assert (loss.mean, loss.low, loss.high) == pytest.approx((-0.3, -0.3, -0.3))


def test_a_difference_only_uses_seeds_that_both_sides_have() -> None:
    rows = [record("busi", "sample", 0, s, dice("sample", 0, s)) for s in SEEDS]
    rows.append(record("busi", "sample", 0.25, 2, dice("sample", 0.25, 2)))
    grid = Ablation(rows, axes=AXES, data=["busi"], seeds=SEEDS)
    gain = next(d for d in grid.differences() if d.setting == "objective.alignment_weight")
    assert gain.seeds == 1
    assert gain.dice is not None
    assert gain.dice.mean == pytest.approx(0.1)


def test_what_was_not_run_says_so() -> None:
    grid = Ablation([record("busi", "sample", 0, 1, dice("sample", 0, 1))], axes=AXES, data=["busi"], seeds=SEEDS)
    text = markdown(grid)
    assert "1 of 8 runs are recorded" in text
    assert "(1 of 2 seeds)" in text
    assert text.count(NOT_RUN) == 3 + 4  # three cells and all four differences
    assert latex(grid).count("--") == 3


def test_the_page_says_which_part_and_which_training_the_records_name(complete: Ablation) -> None:
    assert "over test images" in markdown(complete)
    assert "runs are recorded. Mean" in markdown(complete)  # records without a preset and steps claim none
    rows = [{**row, "part": "validation", "preset": "leaf-tiny", "steps": 330} for row in complete.records]
    text = markdown(Ablation(rows, axes=AXES, data=["busi"], seeds=SEEDS))
    assert "over validation images" in text
    assert "8 of 8 runs are recorded (leaf-tiny, 330 optimizer steps)." in text
    mixed = [*rows[:4], *({**row, "part": "test", "preset": "mine", "steps": 5} for row in rows[4:])]
    text = markdown(Ablation(mixed, axes=AXES, data=["busi"], seeds=SEEDS))
    assert "over test and validation images" in text
    assert "(leaf-tiny and mine, 5 and 330 optimizer steps)" in text


def test_the_page_says_that_the_test_part_chose_the_checkpoints_where_it_is_shown(complete: Ablation) -> None:
    def page(*marks: dict) -> str:
        rows = [{**row, **mark} for row, mark in zip(complete.records, [*marks, *[{}] * 8], strict=False)]
        return markdown(Ablation(rows, axes=AXES, data=["busi"], seeds=SEEDS))

    mark = {"selected_on_test": True}
    assert "chosen on the test part" not in page({"selected_on_test": False})
    assert "chosen on the test part" not in page(*[{**mark, "part": "validation"}] * 8)
    assert "The checkpoints were chosen on the test part" in page(*[mark] * 8)
    assert "The checkpoints of 1 of the runs were chosen on the test part" in page({**mark, "part": "all"})


def test_a_whole_number_is_the_same_cell_with_and_without_a_point() -> None:
    rows = [record("busi", "sample", 0.0, s, dice("sample", 0, s)) for s in SEEDS]
    grid = Ablation(rows, axes=AXES, data=["busi"], seeds=SEEDS)
    score = next(s for s in grid.scores() if dict(s.cell) == {**rows[0]["cell"], "objective.alignment_weight": 0})
    assert set(score.by_seed) == set(SEEDS)
    assert [normalised(v) for v in (0.0, True, 0.25, [128.0, [1]], "1.0")] == [0, True, 0.25, [128, [1]], "1.0"]
    assert [type(normalised(v)) for v in (2.0, True)] == [int, bool]
    switched = Ablation([{**rows[0], "cell": {"a": True}}], axes=[("a", (1, True))], data=["busi"], seeds=[1])
    assert [bool(s.by_seed) for s in switched.scores()] == [False, True]


def test_the_csv_holds_every_cell_and_difference(complete: Ablation) -> None:
    rows = list(csv.DictReader(io.StringIO(csv_table(complete))))
    assert [row["kind"] for row in rows] == ["score"] * 4 + ["difference"] * 4
    assert float(rows[0]["dice"]) == pytest.approx(0.62)
    assert {row["minus"] for row in rows[4:]} == {
        "objective.prediction_type=sample",
        "objective.alignment_weight=0",
    }


def test_the_latex_table_escapes_names_and_gives_percent(complete: Ablation) -> None:
    text = latex(complete)
    assert r"prediction\_type" in text
    assert "$62.0_{[" in text
    assert text.count(r"\\") == 1 + 4


def test_the_report_is_three_tables_and_a_picture(complete: Ablation, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page = write_report(tmp_path, complete.records, axes=AXES, data=["busi"], seeds=SEEDS, inference_steps=[1])
    assert {p.name for p in tmp_path.iterdir()} == {"ablation.md", "ablation.csv", "ablation.tex", "ablation.png"}
    assert "ablation.png" in page.read_text()


def test_the_two_way_bootstrap_of_one_seed_is_the_bootstrap_over_images() -> None:
    values = np.random.default_rng(0).normal(size=(1, 400))
    found = bootstrap_seeds_and_images(values)
    assert found is not None
    error = 1.96 * values.std() / 20  # normal theory: the mean of 400
    assert found.low == pytest.approx(values.mean() - error, abs=0.15 * error)
    assert found.high == pytest.approx(values.mean() + error, abs=0.15 * error)


def test_the_two_way_bootstrap_sees_the_spread_between_seeds() -> None:
    values = np.array([[0.4] * 50, [0.6] * 50])  # no spread between images at all
    found = bootstrap_seeds_and_images(values)
    assert found is not None
    assert (found.mean, found.low, found.high) == pytest.approx((0.5, 0.4, 0.6))


def test_a_bootstrap_of_nothing_is_none_and_of_one_image_has_no_bounds() -> None:
    assert bootstrap_seeds_and_images(np.zeros((0, 0))) is None
    single = bootstrap_seeds_and_images(np.array([[0.3], [0.5]]))
    assert single is not None
    assert (single.mean, single.low, single.high) == (pytest.approx(0.4), None, None)
