"""Metrics, intervals and evaluation: against hand-computed figures and independent formulas."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from leafseg.config import DataSettings, PreprocessingSettings
from leafseg.data.images import STORED, Geometry, read_image, read_mask, write_png, write_volume
from leafseg.data.manifest import Manifest, load_manifest
from leafseg.errors import DataError
from leafseg.evaluation.evaluate import (
    EvaluationRow,
    _Stacks,
    evaluate,
    evaluate_samples,
    failures,
    selection_score,
    summarise,
)
from leafseg.evaluation.metrics import dice_and_iou, precision_and_recall, surface_metrics
from leafseg.pipeline import LeafPipeline
from leafseg.predict import PipelineSegmenter, Segmentation


class MarkedSegmenter:
    """Reads the labels that the test drew into the images' values: a segmenter whose answer is known."""

    overlapping = False
    preprocessing = PreprocessingSettings()

    def __init__(self, *label_names: str, shift: int = 0) -> None:
        self.label_names = label_names or ("background", "foreground")
        self._shift = shift

    def read(self, path: Path, frame: int | None = None) -> np.ndarray:
        return read_image(path, frame)

    def segment(self, images: Sequence[np.ndarray]) -> list[Segmentation]:
        results = []
        for image in images:
            labels = np.roll(image % 8, self._shift, 1).astype(np.uint8)
            classes = np.arange(len(self.label_names))[:, None, None]
            planes = (labels == classes).astype(np.float32)  # [C, H, W]
            results.append(Segmentation(planes[1:] if len(planes) == 2 else planes, labels))
        return results


def marked(
    root: Path,
    masks: dict[str, np.ndarray],
    *,
    predicted: dict[str, np.ndarray] | None = None,
    settings: DataSettings = DataSettings(),  # noqa: B008
) -> Manifest:
    """A data folder whose images hold, in their three lowest bits, what ``MarkedSegmenter`` shall answer."""
    for index, (name, labels) in enumerate(masks.items()):
        answer = (predicted or masks)[name]
        write_png(root / "images" / f"{name}.png", (answer + 8 * (index + 1)).astype(np.uint8))
        write_png(root / "masks" / f"{name}.png", labels.astype(np.uint8))
    return load_manifest(root, settings=settings)


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


def planes(*masks: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(mask > 0)[None, None] for mask in masks]


def test_precision_and_recall_are_the_shares_of_prediction_and_truth_that_agree() -> None:
    found, truth = planes(square(2, 3, 4), square(2, 5, 6))  # 16 and 36 pixels, 2 x 4 in common
    precision, recall = precision_and_recall(found, truth)
    assert precision.item() == pytest.approx(8 / 16)
    assert recall.item() == pytest.approx(8 / 36)
    nothing = torch.zeros_like(truth)
    assert precision_and_recall(nothing, truth)[0].isnan()
    assert precision_and_recall(nothing, truth)[1] == 0
    assert precision_and_recall(found, nothing)[1].isnan()


def test_a_shifted_square_has_the_distances_of_its_outline() -> None:
    # A 4x4 square has 12 outline pixels: 4 in its first and last column, 2 (top and bottom) in each of the middle ones.
    # Moved right by 3, its first column lies on the other's last one: 4 pixels at 0. The middle columns are 1 and 2
    # away (2 pixels each), the last one 3 (4 pixels). The same seen from the other side. Mean 18 / 12; 6 of 12 are
    # within 1; the 95th percentile is 3.
    found, truth = planes(square(2, 6), square(2, 3))
    surface = surface_metrics(found, truth, tolerance=1.0)
    assert surface.assd.item() == pytest.approx(18 / 12)
    assert surface.nsd.item() == pytest.approx(6 / 12)
    assert surface.hd95.item() == pytest.approx(3)


def test_distances_follow_the_spacing_of_each_axis() -> None:
    down, right = planes(square(4, 3), square(2, 5))
    start = planes(square(2, 3))[0]
    for found, step in ((down, 0.5), (right, 3.0)):  # two rows of 0.5 mm, two columns of 3 mm
        surface = surface_metrics(found, start, spacing=(0.5, 3.0), tolerance=0.0)
        assert surface.hd95.item() == pytest.approx(2 * step)
    # Every outline pixel that moved off the other's outline is as far as its nearest one; in mm both axes count.
    assert surface_metrics(right, start, spacing=(0.5, 3.0), tolerance=2.9).nsd < 1
    assert surface_metrics(right, start, spacing=(0.5, 3.0), tolerance=6.0).nsd == 1


@settings(max_examples=25, deadline=None)
@given(found=hnp.arrays(bool, (7, 9)), truth=hnp.arrays(bool, (7, 9)), spacing=st.tuples(*[st.floats(0.2, 5.0)] * 2))
def test_distances_agree_with_distance_transforms_and_with_monai(
    found: np.ndarray, truth: np.ndarray, spacing: tuple[float, float]
) -> None:
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance, compute_surface_dice
    from scipy.ndimage import binary_erosion, distance_transform_edt

    surface = surface_metrics(*planes(found, truth), spacing=spacing, tolerance=1.0)
    values = [value.item() for value in (surface.hd95, surface.assd, surface.nsd)]
    if not truth.any() or not found.any():
        assert np.isnan(values[:2]).all()
        assert np.isnan(values[2]) if not truth.any() else values[2] == 0
        return
    edges = [mask & ~binary_erosion(mask) for mask in (found, truth)]
    there, back = (distance_transform_edt(~other, sampling=spacing)[edge] for edge, other in (edges, edges[::-1]))
    both = np.concatenate([there, back])
    expected = [max(np.percentile(there, 95), np.percentile(back, 95)), both.mean()]
    np.testing.assert_allclose(values[:2], expected, rtol=1e-4)
    if np.abs(both - 1).min() > 1e-4:  # at the tolerance itself, rounding decides
        assert values[2] == pytest.approx((both <= 1).mean(), abs=1e-5)
    pair = planes(found, truth)
    options = {"include_background": True, "spacing": list(spacing)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert compute_hausdorff_distance(*pair, percentile=95, **options).item() == pytest.approx(values[0], rel=1e-4)
        average = compute_average_surface_distance(*pair, symmetric=True, **options).item()
        assert average == pytest.approx(values[1], rel=1e-4, abs=1e-6)
        if np.abs(both - 1).min() > 1e-4:
            assert compute_surface_dice(*pair, [1.0], **options).item() == pytest.approx(values[2], abs=1e-5)


@settings(max_examples=25, deadline=None)
@given(found=hnp.arrays(bool, (6, 6)), truth=hnp.arrays(bool, (6, 6)))
def test_distances_are_symmetric_and_zero_for_equal_masks(found: np.ndarray, truth: np.ndarray) -> None:
    if not (found.any() and truth.any()):
        return
    one, other = (surface_metrics(*planes(*pair), tolerance=1.0) for pair in ((found, truth), (truth, found)))
    for name in ("hd95", "assd", "nsd"):
        assert getattr(one, name).item() == pytest.approx(getattr(other, name).item(), abs=1e-6)
    same = surface_metrics(*planes(truth, truth), tolerance=0.0)
    assert (same.hd95.item(), same.assd.item(), same.nsd.item()) == (0, 0, 1)


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


def test_an_image_without_a_prediction_is_missed_and_leaves_only_distances_and_precision_out(tmp_path: Path) -> None:
    nothing = np.zeros((12, 16), int)
    truth = {"a": square(2, 3), "b": square(2, 3), "c": nothing}
    answers = {"a": square(2, 6), "b": nothing, "c": square(0, 0, 2)}
    result = evaluate(MarkedSegmenter(), marked(tmp_path, truth, predicted=answers))
    found, missed, empty = result.rows
    assert (found.hd95, found.assd, found.nsd, found.unit) == (3, 1.5, pytest.approx(8 / 12), "px")  # within 2 pixels
    assert (missed.dice, missed.iou, missed.recall, missed.nsd) == (0, 0, 0, 0)
    assert (missed.precision, missed.hd95, missed.assd) == (None, None, None)
    measured = ("dice", "iou", "precision", "recall", "hd95", "assd", "nsd")
    assert [getattr(empty, name) for name in measured] == [None] * 7
    figures = result.summary["classes"]["foreground"]
    assert [figures[name]["n"] for name in measured] == [2, 2, 1, 2, 1, 1, 2]
    assert (figures["images"], figures["empty"], figures["missed"]) == (3, 1, 1)
    assert figures["hd95"]["mean"] == 3
    assert figures["precision"]["mean"] == pytest.approx(4 / 16)
    assert figures["recall"]["mean"] == pytest.approx((4 / 16 + 0) / 2)
    assert figures["false_positive_area"]["mean"] == pytest.approx(4 / (12 * 16))
    assert (result.summary["distance_unit"], result.summary["surface_dice_tolerance"]) == ("px", 2)


def test_a_validation_measures_no_distances(tmp_path: Path) -> None:
    manifest = marked(tmp_path, {"a": square(2, 3)})
    (row,) = evaluate_samples(MarkedSegmenter(), manifest.samples, manifest.label_map)
    assert (row.dice, row.precision, row.hd95, row.assd, row.nsd, row.unit) == (1, 1, None, None, None, "")


def test_calibration_pools_the_pixels_of_all_images(tmp_path: Path) -> None:
    truth = {"a": square(2, 3), "b": square(0, 0, 8)}
    result = evaluate(MarkedSegmenter(shift=3), marked(tmp_path, truth))
    # The probabilities are 0 and 1: of 16 + 64 pixels that are stated with 1, 4 + 8 x 5 are foreground; of the
    # others, the 12 + 24 that were left behind.
    part = result.calibration["foreground"]
    assert (part.counts[-1], part.foreground[-1]) == (80, 4 + 40)
    assert (part.counts[0], part.foreground[0]) == (2 * 12 * 16 - 80, pytest.approx(12 + 24))
    ece = result.summary["classes"]["foreground"]["calibration"]["ece"]
    assert ece == pytest.approx((36 + 36) / (2 * 12 * 16))


def test_pixels_that_nobody_labelled_count_for_nothing(tmp_path: Path) -> None:
    truth = square(2, 3)
    truth[:, 8:] = 255
    answer = square(2, 3)
    answer[0:2, 8:12] = 1  # found where nobody knows
    settings = DataSettings(ignore_label=255)
    manifest = marked(tmp_path, {"a": truth}, predicted={"a": answer}, settings=settings)
    result = evaluate(MarkedSegmenter(), manifest)
    (row,) = result.rows
    assert (row.dice, row.precision, row.hd95, row.predicted_pixels, row.pixels) == (1, 1, 0, 16, 12 * 8)
    assert result.calibration["foreground"].counts.sum() == 12 * 8


def grouped(root: Path, masks: dict[str, np.ndarray], groups: dict[str, str], **options: Any) -> Manifest:
    manifest = marked(root, masks, **options)
    samples = tuple(dataclasses.replace(sample, group=groups.get(sample.name)) for sample in manifest.samples)
    return dataclasses.replace(manifest, samples=samples)


def test_groups_are_resampled_whole_and_written_without_their_names(tmp_path: Path) -> None:
    truth = {f"{k}": square(k, k) for k in range(6)}
    answers = {f"{k}": square(k, k + k // 2) for k in range(6)}
    groups = {f"{k}": f"Patient {k // 2}" for k in range(6)}
    result = evaluate(MarkedSegmenter(), grouped(tmp_path / "data", truth, groups, predicted=answers))
    figures = result.summary["classes"]["foreground"]["dice"]
    assert (figures["n"], figures["groups"], result.summary["groups"]) == (6, 3, 3)
    assert "over 3 groups" in result.summary["interval"]
    # Shifts of 0, 1 and 2 pixels: Dice 1, 3/4, 1/2; resampled groups are at worst all the last one.
    assert (figures["low"], figures["mean"], figures["high"]) == pytest.approx((0.5, 0.75, 1.0), abs=0.01)
    names = [row.group for row in result.rows]
    assert names[0] == names[1] != names[2] == names[3]
    assert len(set(names)) == 3
    result.save(tmp_path / "out")
    assert all("Patient" not in path.read_text() for path in (tmp_path / "out").iterdir())


def test_one_group_has_no_interval_and_the_summary_says_why(tmp_path: Path) -> None:
    manifest = grouped(tmp_path, {"a": square(0, 0), "b": square(2, 2)}, {"a": "p", "b": "p"})
    summary = evaluate(MarkedSegmenter(), manifest).summary
    assert summary["classes"]["foreground"]["dice"]["low"] is None
    assert summary["interval"].startswith("no interval: all images are of one group")


class VolumeSegmenter(MarkedSegmenter):
    """Takes a volume's own values for the answer."""

    preprocessing = PreprocessingSettings(orientation="stored")

    def read(self, path: Path, frame: int | None = None) -> np.ndarray:
        return read_image(path, frame, reading=STORED).astype(np.uint8)


def volume(root: Path, *, answer: np.ndarray, truth: np.ndarray, spacing: tuple[float, float, float]) -> Manifest:
    size = (answer.shape[2], answer.shape[1], answer.shape[0])
    geometry = Geometry(size=size, spacing_mm=spacing, origin=(0.0,) * 3, direction=tuple(np.eye(3).ravel()))
    for folder, voxels in (("images", answer), ("masks", truth)):
        (root / folder).mkdir(parents=True, exist_ok=True)
        write_volume(root / folder / "v.nii.gz", voxels.astype(np.uint8), geometry)
    return load_manifest(root, settings=DataSettings(preprocessing=VolumeSegmenter.preprocessing))


def test_a_volume_is_measured_slice_by_slice_and_as_a_whole_in_millimetres(tmp_path: Path) -> None:
    truth = np.zeros((5, 12, 16), int)
    truth[1:3, 2:6, 3:7] = 1
    answer = np.zeros_like(truth)
    answer[1:4, 2:6, 4:8] = 1  # a column further, and a slice more
    manifest = volume(tmp_path, answer=answer, truth=truth, spacing=(0.5, 2.0, 3.0))  # x, y, z
    result = evaluate(VolumeSegmenter(), manifest)
    second, fourth = result.rows[1], result.rows[3]
    assert (second.unit, second.volume, second.hd95) == ("mm", "v", 0.5)  # one column
    assert (fourth.empty, fourth.predicted_pixels) == (True, 16)
    (whole,) = result.volumes
    assert (whole.frames, whole.truth_pixels, whole.predicted_pixels) == (5, 32, 48)
    assert whole.dice == pytest.approx(2 * 24 / (32 + 48))
    # In 3-D every voxel of a 4x4 block that is two or three slices thick, but the middle slice's inner 2x2, is outline.
    # The third slice's 16 voxels lie 3 mm (one slice) from the truth, its last column's 4 also 0.5 mm aside.
    assert whole.hd95 == pytest.approx(math.hypot(3, 0.5), abs=0.03)
    figures = result.summary["classes"]["foreground"]
    assert (figures["volumes"], figures["volume_hd95"]["n"]) == (1, 1)
    result.save(tmp_path / "out")
    with (tmp_path / "out" / "per_volume.csv").open(newline="") as stream:
        assert [row["dice"] for row in csv.DictReader(stream)] == ["0.600000"]


def test_a_part_of_a_volume_has_no_distances_in_space(tmp_path: Path) -> None:
    voxels = np.zeros((5, 12, 16), int)
    voxels[1:4, 2:6, 3:7] = 1
    manifest = volume(tmp_path, answer=voxels, truth=voxels, spacing=(1.0, 1.0, 1.0))
    some = dataclasses.replace(manifest, samples=manifest.samples[:3])
    (whole,) = evaluate(VolumeSegmenter(), some).volumes
    assert (whole.frames, whole.dice, whole.hd95) == (3, 1, None)


def test_a_volume_that_was_cut_along_another_axis_is_refused(tmp_path: Path) -> None:
    voxels = np.ones((5, 12, 16), int)
    voxels[0] = 0
    manifest = volume(tmp_path, answer=voxels, truth=voxels, spacing=(1.0, 1.0, 1.0))
    with pytest.raises(DataError, match="cut across z of stored, the model takes z of LPS"):
        evaluate(MarkedSegmenter(), manifest)


def test_images_with_and_without_a_pixel_size_are_all_measured_in_pixels(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    voxels = np.zeros((2, 12, 16), int)
    voxels[:, 2:6, 3:7] = 1
    manifest = volume(tmp_path / "v", answer=voxels, truth=voxels, spacing=(0.5, 0.5, 1.0))
    flat = marked(tmp_path / "f", {"a": square(2, 3)})
    both = dataclasses.replace(manifest, samples=(*manifest.samples, *flat.samples))
    result = evaluate(VolumeSegmenter(), both)
    assert {row.unit for row in result.rows} == {"px"}
    assert "1 of 2 image files do not state the size of their pixels" in caplog.text


class LayeredSegmenter(MarkedSegmenter):
    """Overlapping labels: the image's two lowest bits."""

    overlapping = True

    def segment(self, images: Sequence[np.ndarray]) -> list[Segmentation]:
        layers = [np.stack([image & 1, image >> 1 & 1]).astype(np.float32) for image in images]
        return [Segmentation(layer, None) for layer in layers]


def test_overlapping_labels_are_measured_one_by_one(tmp_path: Path) -> None:
    cell, nucleus = square(1, 1, 8), square(3, 3, 4)
    write_png(tmp_path / "images" / "a.png", (cell + 2 * square(3, 4, 4) + 4).astype(np.uint8))
    for label, mask in (("cell", cell), ("nucleus", nucleus)):
        write_png(tmp_path / "masks" / label / "a.png", (255 * mask).astype(np.uint8))
    manifest = load_manifest(tmp_path, settings=DataSettings())
    rows = evaluate(LayeredSegmenter("cell", "nucleus"), manifest).rows
    assert [(row.label, row.dice, row.truth_pixels) for row in rows] == [("cell", 1, 64), ("nucleus", 0.75, 16)]
    with pytest.raises(DataError, match="classes may overlap, the model's exclude each other"):
        evaluate(MarkedSegmenter("background", "nucleus"), manifest)


def test_failures_name_the_worst_images_and_say_why() -> None:
    def row(name: str, dice: float | None, hd95: float | None, truth: int = 10, predicted: int = 10) -> EvaluationRow:
        return EvaluationRow(name, "x", name, truth == 0, dice, dice, truth, predicted, hd95=hd95)

    good = [row(f"good{k}", 0.9, 3.0) for k in range(8)]
    bad = [
        row("low", 0.4, 3.0),
        row("lower", 0.1, 3.0),
        row("far", 0.9, 80.0),
        row("false", None, None, truth=0, predicted=5),
        row("more false", None, None, truth=0, predicted=9),
        row("right", None, None, truth=0, predicted=0),
        row("missed", 0.0, None, predicted=0),
        row("large missed", 0.0, None, truth=20, predicted=0),
    ]
    found = failures([*good, *bad])["x"]
    assert [entry["name"] for entry in found["worst"]] == [
        "large missed", "missed", "more false", "false", "lower", "low", "far",
    ]  # fmt: skip
    assert found["total"] == 7
    assert found["reasons"] == {"missed": 2, "false positive": 2, "low Dice": 2, "outline far off": 1}
    assert failures(good)["x"]["total"] == 0


def test_a_dice_that_stands_out_is_a_failure_though_it_is_above_a_half() -> None:
    rows = [EvaluationRow(str(k), "x", "", False, dice, dice, 9, 9) for k, dice in enumerate([0.95] * 9 + [0.9, 0.7])]
    # All quartiles are 0.95, so that the fence is 0.95 too; 0.9 is less than 0.1 below the median.
    assert [entry["name"] for entry in failures(rows)["x"]["worst"]] == ["10"]


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


def test_classes_in_another_order_are_refused_and_other_names_are_not(tmp_path: Path) -> None:
    settings = DataSettings(label_names={1: "nucleus", 2: "cytoplasm"})
    manifest = marked(tmp_path, {"a": square(0, 0) + 2 * square(6, 6)}, settings=settings)
    with pytest.raises(DataError, match="nucleus has another place"):
        evaluate(MarkedSegmenter("background", "cytoplasm", "nucleus"), manifest)
    assert evaluate(MarkedSegmenter("background", "nucleus", "plasma"), manifest).rows[0].dice == 1


def test_slices_wait_for_their_volume_without_their_probabilities(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    voxels = np.zeros((3, 12, 16), int)
    voxels[1, 2:6, 3:7] = 1
    manifest = volume(tmp_path, answer=voxels, truth=voxels, spacing=(1.0, 1.0, 1.0))
    kept = []
    monkeypatch.setattr(_Stacks, "_measure", lambda self, path, slices: kept.extend(slices))
    evaluate(VolumeSegmenter(), manifest)
    assert [compared.probability.untyped_storage().nbytes() for compared in kept] == [0, 0, 0]
