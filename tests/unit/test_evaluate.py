"""Metrics, intervals and evaluation: against hand-computed figures and independent formulas."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from leafseg.config import DataSettings
from leafseg.data.images import read_image, read_mask, write_png
from leafseg.data.manifest import Manifest, load_manifest
from leafseg.errors import DataError
from leafseg.evaluation.evaluate import EvaluationRow, evaluate, evaluate_samples, selection_score, summarise
from leafseg.evaluation.intervals import bootstrap_mean
from leafseg.evaluation.metrics import dice_and_iou
from leafseg.pipeline import LeafPipeline
from leafseg.predict import PipelineSegmenter, Segmentation


class MarkedSegmenter:
    """Reads the labels that the test drew into the images' values: a segmenter whose answer is known."""

    def __init__(self, *label_names: str, shift: int = 0) -> None:
        self.label_names = label_names or ("background", "foreground")
        self._shift = shift

    def segment(self, images: Sequence[np.ndarray]) -> list[Segmentation]:
        results = []
        for image in images:
            labels = np.roll(image % 8, self._shift, 1).astype(np.uint8)
            results.append(Segmentation(labels[None].astype(np.float32), labels))
        return results


def marked(root: Path, masks: dict[str, np.ndarray], *, predicted: dict[str, np.ndarray] | None = None) -> Manifest:
    """A data folder whose images hold, in their three lowest bits, what ``MarkedSegmenter`` shall answer."""
    for index, (name, labels) in enumerate(masks.items()):
        answer = (predicted or masks)[name]
        write_png(root / "images" / f"{name}.png", (answer + 8 * (index + 1)).astype(np.uint8))
        write_png(root / "masks" / f"{name}.png", labels.astype(np.uint8))
    return load_manifest(root, settings=DataSettings())


def square(row: int, column: int, side: int = 4, size: tuple[int, int] = (12, 16)) -> np.ndarray:
    labels = np.zeros(size, int)
    labels[row : row + side, column : column + side] = 1
    return labels


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_a_shifted_square_has_the_dice_and_iou_of_its_overlap() -> None:
    truth, found = (torch.from_numpy(square(2, column) > 0)[None, None] for column in (3, 4))
    dice, iou = dice_and_iou(found, truth)  # 16 pixels each, 12 in common, 20 in all
    assert dice.item() == pytest.approx(2 * 12 / 32)
    assert iou.item() == pytest.approx(12 / 20)


def test_an_empty_truth_has_no_overlap_and_an_empty_answer_has_none_either() -> None:
    nothing, something = torch.zeros(1, 1, 4, 4, dtype=torch.bool), torch.ones(1, 1, 4, 4, dtype=torch.bool)
    for found in (nothing, something):
        assert all(value.isnan() for value in dice_and_iou(found, nothing))
    assert [value.item() for value in dice_and_iou(nothing, something)] == [0, 0]


def test_masks_of_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="they must be equal"):
        dice_and_iou(torch.ones(1, 1, 4, 4) > 0, torch.ones(1, 1, 4, 5) > 0)


masks = hnp.arrays(bool, (2, 3, 4, 5))


@settings(max_examples=40, deadline=None)
@given(found=masks, truth=masks)
def test_dice_and_iou_agree_with_an_independent_formula_and_with_each_other(
    found: np.ndarray, truth: np.ndarray
) -> None:
    dice, iou = (value.numpy() for value in dice_and_iou(torch.from_numpy(found), torch.from_numpy(truth)))
    for b, c in np.ndindex(2, 3):
        common, both = (found & truth)[b, c].sum(), found[b, c].sum() + truth[b, c].sum()
        if not truth[b, c].any():
            assert np.isnan(dice[b, c])
            assert np.isnan(iou[b, c])
            continue
        assert dice[b, c] == pytest.approx(2 * common / both, abs=1e-6)
        assert iou[b, c] == pytest.approx(common / (both - common), abs=1e-6)
        assert iou[b, c] == pytest.approx(dice[b, c] / (2 - dice[b, c]), abs=1e-6)


# --- intervals --------------------------------------------------------------------------------------------------------


@settings(max_examples=10, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=30))
def test_an_interval_contains_its_mean_and_lies_between_the_extremes(values: list[float]) -> None:
    interval = bootstrap_mean(values)
    assert interval is not None
    assert interval.n == len(values)
    assert interval.mean == pytest.approx(sum(values) / len(values))
    assert interval.low is not None
    assert interval.high is not None
    assert min(values) - 1e-12 <= interval.low <= interval.mean + 1e-12
    assert interval.mean - 1e-12 <= interval.high <= max(values) + 1e-12


def test_an_interval_narrows_with_the_square_root_of_the_number_of_values() -> None:
    values = np.random.default_rng(0).normal(0.8, 0.1, 400)

    def width(count: int) -> float:
        interval = bootstrap_mean(np.tile(values[:25], count // 25))  # the same spread at every size
        return interval.high - interval.low

    assert width(25) / width(400) == pytest.approx(4, rel=0.1)
    interval = bootstrap_mean(values)  # and its width is that of the normal approximation
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)


def test_one_value_has_a_mean_without_an_interval_and_no_value_has_nothing() -> None:
    one = bootstrap_mean([0.5])
    assert (one.mean, one.low, one.high, one.n) == (0.5, None, None, 1)
    assert bootstrap_mean([]) is None


def test_equal_values_have_an_interval_without_width() -> None:
    interval = bootstrap_mean([0.25] * 5)
    assert (interval.low, interval.high) == (0.25, 0.25)


def test_an_interval_is_the_same_every_time_and_its_seed_matters() -> None:
    values = np.random.default_rng(0).random(50).tolist()
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1)
    assert bootstrap_mean(values, seed=1) != bootstrap_mean(values, seed=2)


# --- evaluation -------------------------------------------------------------------------------------------------------


def test_a_perfect_segmenter_scores_one_and_finds_nothing_in_empty_images(tmp_path: Path) -> None:
    manifest = marked(tmp_path, {f"{k:02}": square(k, 2 * k, 3) * (k % 4 != 0) for k in range(9)})  # 0, 4 and 8 empty
    result = evaluate(MarkedSegmenter(), manifest)
    figures = result.summary["classes"]["foreground"]
    assert (figures["images"], figures["empty"]) == (9, 3)
    assert (figures["dice"]["mean"], figures["iou"]["mean"]) == (1, 1)
    assert figures["dice"]["n"] == 6
    assert (figures["false_positive_rate"]["mean"], figures["false_positive_rate"]["n"]) == (0, 3)
    assert result.summary["split_sha256"] == manifest.split_sha256
    assert [row.name for row in result.rows] == [sample.name for sample in manifest.samples]
    assert [row.sha256 for row in result.rows] == [sample.sha256 for sample in manifest.samples]


def test_an_evaluation_computes_what_a_shifted_square_shares(tmp_path: Path) -> None:
    manifest = marked(tmp_path, {"a": square(2, 3), "b": square(5, 8)})
    result = evaluate(MarkedSegmenter(shift=1), manifest)
    for row in result.rows:
        assert (row.truth_pixels, row.predicted_pixels, row.empty) == (16, 16, False)
        assert row.dice == pytest.approx(2 * 12 / 32)
        assert row.iou == pytest.approx(12 / 20)


def test_empty_masks_stay_out_of_the_means_and_count_in_the_false_positive_rate(tmp_path: Path) -> None:
    nothing = np.zeros((12, 16), int)
    truth = {"a": square(2, 3), "b": nothing, "c": nothing, "d": square(1, 1)}
    answers = {"a": square(2, 3), "b": square(0, 0, 1), "c": nothing, "d": nothing}
    result = evaluate(MarkedSegmenter(), marked(tmp_path, truth, predicted=answers))
    figures = result.summary["classes"]["foreground"]
    assert figures["dice"]["mean"] == pytest.approx((1 + 0) / 2)
    assert figures["false_positive_rate"]["mean"] == pytest.approx(1 / 2)
    assert [(row.dice, row.predicted_pixels) for row in result.rows] == [(1, 16), (None, 1), (None, 0), (0, 0)]
    # The choice of a checkpoint counts an empty image: found something is 0, found nothing is 1.
    assert selection_score([row.as_dict() for row in result.rows]) == pytest.approx((1 + 0 + 1 + 0) / 4)


def test_without_empty_masks_there_is_no_false_positive_rate(tmp_path: Path) -> None:
    result = evaluate(MarkedSegmenter(), marked(tmp_path, {"a": square(0, 0)}))
    assert result.summary["classes"]["foreground"]["false_positive_rate"] is None


def test_every_class_has_a_row_of_its_own(tmp_path: Path) -> None:
    labels = square(0, 0) + 2 * square(6, 6)
    truth = {"a": labels, "b": np.where(labels == 2, 0, labels)}
    wrong = {"a": np.where(labels == 1, 2, labels), "b": labels}
    manifest = marked(tmp_path, truth, predicted=wrong)
    assert manifest.label_map.names == ("background", "class 1", "class 2")
    result = evaluate(MarkedSegmenter("background", "cup", "disc"), manifest)
    assert [(row.name, row.label, row.dice) for row in result.rows] == [
        ("a", "cup", 0.0),  # found nowhere
        ("a", "disc", pytest.approx(2 * 16 / (32 + 16))),  # 16 of 16 found, and 16 more
        ("b", "cup", 1.0),
        ("b", "disc", None),  # not there, but found
    ]
    assert result.summary["classes"]["disc"]["false_positive_rate"]["mean"] == 1


def test_a_real_pipeline_is_measured_at_the_images_own_resolution(
    tiny_pipeline: LeafPipeline, tiny_data: Callable[..., Path]
) -> None:
    manifest = load_manifest(tiny_data(12, size=(45, 38)), settings=DataSettings()).part("test")
    result = evaluate(PipelineSegmenter(tiny_pipeline), manifest)
    assert len(result.rows) == len(manifest) >= 2
    for row, sample in zip(result.rows, manifest.samples, strict=True):
        truth = read_mask(sample.mask) > 0
        found = tiny_pipeline(read_image(sample.image)).mask[0, 0].numpy()
        assert row.truth_pixels == truth.sum()
        assert row.dice == pytest.approx(2 * (truth & found).sum() / (truth.sum() + found.sum()), abs=1e-3)
        assert row.iou == pytest.approx(row.dice / (2 - row.dice), abs=1e-6)


def test_the_pages_of_a_tiff_are_measured_one_by_one(tmp_path: Path) -> None:
    pages = np.stack([square(k, k) for k in range(3)]).astype(np.uint8)
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    tifffile.imwrite(tmp_path / "images" / "s.tif", pages + 8, photometric="minisblack")
    tifffile.imwrite(tmp_path / "masks" / "s.tif", pages * 255, photometric="minisblack")
    manifest = load_manifest(tmp_path, settings=DataSettings())
    rows = list(evaluate_samples(MarkedSegmenter(), manifest.samples, manifest.label_map))
    assert [row.dice for row in rows] == [1, 1, 1]
    assert len({row.name for row in rows}) == 3


def test_the_tables_hold_every_row_and_the_summary(tmp_path: Path) -> None:
    truth = {"a": square(2, 3), "b": np.zeros((12, 16), int)}
    result = evaluate(MarkedSegmenter(shift=1), marked(tmp_path / "data", truth))
    result.save(tmp_path / "out" / "deep")
    with (tmp_path / "out" / "deep" / "per_image.csv").open(newline="") as stream:
        table = list(csv.DictReader(stream))
    assert [row["name"] for row in table] == ["a", "b"]
    assert (float(table[0]["dice"]), float(table[0]["iou"])) == (0.75, 0.6)
    assert (table[1]["dice"], table[1]["iou"], table[1]["empty"]) == ("", "", "True")
    stored = json.loads((tmp_path / "out" / "deep" / "summary.json").read_text())
    assert stored == json.loads(json.dumps(result.summary))


def test_a_part_without_samples_is_refused(tmp_path: Path) -> None:
    manifest = marked(tmp_path, {"a": square(0, 0)})
    other = next(name for name in ("train", "validation", "test") if name != manifest.samples[0].part)
    with pytest.raises(DataError, match="the part has no samples"):
        evaluate(MarkedSegmenter(), manifest.part(other))


def test_a_model_of_other_classes_than_the_data_is_refused(tmp_path: Path) -> None:
    manifest = marked(tmp_path, {"a": square(0, 0) + 2 * square(6, 6)})
    with pytest.raises(DataError, match=r"hold 3 classes, the model knows 2 \(background, foreground\)"):
        evaluate(MarkedSegmenter(), manifest)


def test_an_image_without_a_mask_is_refused(tmp_path: Path) -> None:
    manifest = marked(tmp_path, {"a": square(0, 0)})
    (tmp_path / "masks" / "a.png").unlink()
    unmasked = load_manifest(tmp_path, settings=DataSettings(), require_masks=False)
    with pytest.raises(DataError, match="no mask; evaluation needs one"):
        evaluate(MarkedSegmenter(), unmasked)
    with pytest.raises(DataError, match="no such file"):
        evaluate(MarkedSegmenter(), manifest)


def test_an_image_that_cannot_be_segmented_is_named(tmp_path: Path, tiny_pipeline: LeafPipeline) -> None:
    (tmp_path / "images").mkdir()
    for name, value in (("a", 1.0), ("b", math.nan)):
        tifffile.imwrite(tmp_path / "images" / f"{name}.tif", np.full((12, 16), value, np.float32))
        write_png(tmp_path / "masks" / f"{name}.png", square(0, 0).astype(np.uint8))
    with pytest.raises(DataError, match=r"b\.tif: .*no finite pixel"):
        evaluate(PipelineSegmenter(tiny_pipeline), load_manifest(tmp_path, settings=DataSettings()))


def test_a_summary_keeps_the_order_of_the_classes_and_survives_no_rows() -> None:
    def row(label: str) -> EvaluationRow:
        return EvaluationRow("a", label, "", False, 0.5, 1 / 3, 4, 4)

    assert list(summarise([row("z"), row("a"), row("z")])["classes"]) == ["z", "a"]
    assert summarise([])["classes"] == {}
    assert selection_score([]) == 0
