"""Comparing two evaluations: constructed tables whose differences are known."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import wilcoxon

from leafseg.errors import DataError
from leafseg.evaluation.compare import Comparison, PairedDifference, compare, holm, read_evaluation, table
from leafseg.evaluation.evaluate import Evaluation, EvaluationRow, summarise

HEAD = "name,label,sha256,empty,truth_pixels,predicted_pixels,dice"


def row(name: str, dice: float | None, *, found: int = 10, hd95: float | None = None, group: str = "") -> EvaluationRow:
    """An image with this Dice; None for one whose truth is empty."""
    truth = 0 if dice is None else 10
    return EvaluationRow(
        name, "lesion", f"sha of {name}", truth == 0, dice, None, truth, found, hd95=hd95, group=group, unit="px"
    )


def saved(folder: Path, rows: list[EvaluationRow], *, split: str = "s" * 64, tolerance: float = 2.0) -> Path:
    summary = {**summarise(rows, tolerance=tolerance), "split_sha256": split, "part": "test"}
    Evaluation(tuple(rows), summary).save(folder)
    return folder


def compared(root: Path, first: list[EvaluationRow], second: list[EvaluationRow]) -> Comparison:
    sides = [saved(root / name, rows) for name, rows in (("a", first), ("b", second))]
    return compare(*(read_evaluation(side) for side in sides), names=("a", "b"))


def metric(comparison: Comparison, name: str) -> PairedDifference:
    (found,) = [item for item in comparison.differences if item.metric == name]
    return found


def test_a_constant_gain_is_found_with_its_size_and_wins(tmp_path: Path) -> None:
    first = [row(f"{k}", 0.5 + k / 100) for k in range(12)]
    second = [row(f"{k}", 0.6 + k / 100) for k in range(12)]
    found = metric(compared(tmp_path, first, second), "dice")
    assert (found.n, found.wins, found.ties, found.losses) == (12, 12, 0, 0)
    assert (found.first, found.second) == (pytest.approx(0.555), pytest.approx(0.655))
    assert found.difference.mean == pytest.approx(0.1)
    assert (found.difference.low, found.difference.high) == pytest.approx((0.1, 0.1))
    # All twelve signs agree: two-sided, 2 of the 2**12 equally likely sign patterns are as extreme.
    assert found.p == pytest.approx(2 / 2**12)
    assert found.p_holm == found.p  # the only test


def test_swapping_the_two_turns_the_signs_and_keeps_the_p_value(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((2, 15)).round(3)
    rows = [[row(f"{k}", float(v)) for k, v in enumerate(side)] for side in values]
    one, two = (metric(compared(tmp_path / n, *pair), "dice") for n, pair in (("1", rows), ("2", rows[::-1])))
    assert one.difference.mean == pytest.approx(-two.difference.mean)
    assert (one.wins, one.losses) == (two.losses, two.wins)
    assert one.p == pytest.approx(two.p) == pytest.approx(wilcoxon(values[1] - values[0]).pvalue)


def test_a_smaller_distance_is_a_win_and_missed_images_leave_distances_out(tmp_path: Path) -> None:
    first = [row("x", 0.5, hd95=9.0), row("y", 0.5, hd95=4.0), row("z", 0.0, found=0)]
    second = [row("x", 0.5, hd95=3.0), row("y", 0.5, hd95=5.0), row("z", 0.5, hd95=1.0)]
    result = compared(tmp_path, first, second)
    found = metric(result, "hd95")
    assert (found.n, found.unit, found.wins, found.losses) == (2, "px", 1, 1)
    assert found.difference.mean == pytest.approx((-6 + 1) / 2)
    assert metric(result, "dice").ties == 2
    assert result.summary["missed"] == {"lesion": [1, 0]}
    assert "lesion: a misses 1 images altogether, b 0" in "\n".join(table(result))


def test_empty_images_compare_by_false_positives_alone(tmp_path: Path) -> None:
    first = [row("x", None, found=5), row("y", None, found=5), row("z", 0.5)]
    second = [row("x", None, found=0), row("y", None, found=5), row("z", 0.5)]
    result = compared(tmp_path, first, second)
    found = metric(result, "false_positive_rate")
    assert (found.n, found.first, found.second, found.wins, found.ties) == (2, 1.0, 0.5, 1, 1)
    assert metric(result, "dice").p is None  # no difference anywhere: nothing to test


def test_images_are_paired_by_content_and_equal_ones_by_name(tmp_path: Path) -> None:
    first = [row("x", 0.5), row("twin 1", 0.2), row("twin 2", 0.8), row("lost", 0.1)]
    second = [row("x", 0.6), row("twin 1", 0.3), row("twin 2", 0.9), row("new", 0.1)]
    twins = [
        [dataclasses.replace(r, sha256="same") if "twin" in r.name else r for r in rows] for rows in (first, second)
    ]
    twins[1][0] = dataclasses.replace(twins[1][0], name="renamed")
    result = compared(tmp_path, *twins)
    found = metric(result, "dice")
    assert (found.n, found.wins) == (3, 3)
    assert found.difference.mean == pytest.approx(0.1)
    assert (result.summary["only_first"], result.summary["only_second"]) == (["lost"], ["new"])
    assert "only in a: 1 images (lost)" in "\n".join(table(result))


def test_groups_widen_the_interval_and_weaken_the_test(tmp_path: Path) -> None:
    draws = np.random.default_rng(3)
    gain = np.repeat(draws.normal(0.05, 0.1, 8), 10) + draws.normal(0, 0.01, 80)
    sides = {}
    for kind in ("", "patient "):
        first = [row(f"{k}", 0.5, group=kind and f"{kind}{k // 10}") for k in range(80)]
        second = [row(f"{k}", 0.5 + gain[k], group=kind and f"{kind}{k // 10}") for k in range(80)]
        sides[kind] = metric(compared(tmp_path / (kind or "none"), first, second), "dice")
    plain, grouped = sides[""], sides["patient "]
    assert (plain.difference.groups, grouped.difference.groups) == (None, 8)
    assert grouped.difference.high - grouped.difference.low > 2 * (plain.difference.high - plain.difference.low)
    assert grouped.p == pytest.approx(wilcoxon(gain.round(6).reshape(8, 10).mean(1)).pvalue, rel=1e-6)
    assert grouped.p > plain.p


def test_holm_multiplies_the_smallest_by_all_and_never_descends() -> None:
    # Sorted: 0.01 x 4, 0.02 x 3, 0.03 x 2, 0.04 x 1, each at least the one before.
    assert holm([0.04, 0.01, None, 0.03, 0.02]) == pytest.approx([0.06, 0.04, None, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_corrected_values_keep_their_order_and_lie_between_raw_and_bonferroni(p_values: list[float]) -> None:
    corrected = holm(p_values)
    for p, after in zip(p_values, corrected, strict=True):
        assert p <= after <= min(1, p * len(p_values)) + 1e-12
    order = np.argsort(p_values, kind="stable")
    assert np.all(np.diff(np.array(corrected)[order]) >= 0)


def test_another_split_is_refused_in_one_sentence(tmp_path: Path) -> None:
    first, second = saved(tmp_path / "a", [row("x", 0.5)]), saved(tmp_path / "b", [row("x", 0.5)], split="t" * 64)
    with pytest.raises(DataError, match=r"its split is tttttttttttt, that of .*a is ssssssssssss; only") as caught:
        compare(read_evaluation(first), read_evaluation(second), names=("a", "b"))
    assert "\n" not in str(caught.value)


def test_other_classes_are_refused(tmp_path: Path) -> None:
    other = [dataclasses.replace(row("x", 0.5), label="organ")]
    with pytest.raises(DataError, match=r"its classes are organ, those of .* are lesion"):
        compared(tmp_path, [row("x", 0.5)], other)


def test_distances_of_different_units_or_tolerances_are_left_out_and_named(tmp_path: Path) -> None:
    def with_distance(unit: str) -> list[EvaluationRow]:
        return [dataclasses.replace(row("x", 0.5, hd95=1.0), nsd=0.5, unit=unit)]

    result = compared(tmp_path / "1", with_distance("px"), with_distance("mm"))
    assert [item.metric for item in result.differences] == ["dice"]
    assert "distances are not compared: their units are px and mm" in "\n".join(table(result))
    first = saved(tmp_path / "2" / "a", with_distance("px"))
    second = saved(tmp_path / "2" / "b", with_distance("px"), tolerance=3.0)
    result = compare(read_evaluation(first), read_evaluation(second), names=("a", "b"))
    assert [item.metric for item in result.differences] == ["dice", "hd95"]
    assert result.summary["notes"] == ["surface Dice is not compared: its tolerances are 2.0 and 3.0"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("name,label\nx,lesion\n", "has no column 'sha256'"),
        (f"{HEAD}\n", "holds no image"),
        (f"{HEAD}\nx,lesion,s,False,4,4,much\n", "the line of 'x' is damaged"),
        (f"{HEAD}\nx,lesion,s,False,4,4,nan\n", "a figure is not finite"),
    ],
)
def test_a_damaged_table_is_named(tmp_path: Path, damage: str, message: str) -> None:
    folder = saved(tmp_path, [row("x", 0.5)])
    (folder / "per_image.csv").write_text(damage)
    with pytest.raises(DataError, match=message):
        read_evaluation(folder)


def test_an_evaluation_without_summary_is_refused(tmp_path: Path) -> None:
    (saved(tmp_path, [row("x", 0.5)]) / "summary.json").unlink()
    with pytest.raises(DataError, match=r"summary\.json: cannot be read"):
        read_evaluation(tmp_path)


def test_tables_of_an_older_version_are_compared_by_what_they_hold(tmp_path: Path) -> None:
    for name, dice in (("a", 0.5), ("b", 0.75)):
        folder = saved(tmp_path / name, [row("x", dice)])
        (folder / "per_image.csv").write_text(
            f"name,label,sha256,empty,dice,iou,truth_pixels,predicted_pixels\nx,lesion,s,False,{dice},{dice},10,10\n"
        )
    result = compare(read_evaluation(tmp_path / "a"), read_evaluation(tmp_path / "b"), names=("a", "b"))
    assert [(item.metric, item.difference.mean) for item in result.differences] == [("dice", 0.25), ("iou", 0.25)]


def test_what_is_stored_is_what_was_found(tmp_path: Path) -> None:
    result = compared(tmp_path, [row("x", 0.5), row("y", 0.7)], [row("x", 0.6), row("y", 0.8)])
    result.save(tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert stored["differences"][0]["difference"]["mean"] == pytest.approx(0.1)
    assert stored["correction"] == "Holm, for 1 tests (classes and metrics)"
    pytest.importorskip("matplotlib")
    with Image.open(tmp_path / "out" / "compare.png") as picture:
        assert picture.width > 300


def test_evaluations_against_different_masks_are_refused(tmp_path: Path) -> None:
    other = [dataclasses.replace(row("x", 0.5), truth_pixels=11)]
    with pytest.raises(DataError, match=r"its truth of 'x' \(lesion\) is not that of"):
        compared(tmp_path, [row("x", 0.5)], other)
