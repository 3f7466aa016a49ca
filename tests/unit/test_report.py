"""The report: one file that holds everything, and shows what the evaluation says."""

from __future__ import annotations

import base64
import html
import io
import re
import shlex
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from leafseg.config import DataSettings, PreprocessingSettings, load_settings, override_settings
from leafseg.data.images import read_image, write_png
from leafseg.data.manifest import load_manifest
from leafseg.errors import DataError
from leafseg.evaluation.calibration import Reliability
from leafseg.evaluation.evaluate import Evaluation, EvaluationRow, evaluate, summarise
from leafseg.evaluation.report import (
    _PREDICTION_COLOUR,
    _TRUTH_COLOUR,
    Example,
    _outlines,
    find_examples,
    in_short,
    rank_images,
    write_report,
)
from leafseg.predict import Segmentation

pytest.importorskip("matplotlib")

EVIL = "<script>alert(1)</script> & $x_1$"


def row(name: str, dice: float | None, label: str = "foreground") -> EvaluationRow:
    iou = None if dice is None else dice / (2 - dice)
    return EvaluationRow(name, label, name, dice is None, dice, iou, 0 if dice is None else 10, 10)


def evaluation(rows: list[EvaluationRow]) -> Evaluation:
    return Evaluation(tuple(rows), summarise(rows))


def metrics() -> list[dict[str, float]]:
    lines: list[dict[str, float]] = []
    for step in range(10, 101, 10):
        train = {"loss": 1 / step, "alignment": -step / 100, "learning_rate": 1e-4, "samples_per_second": 8.0}
        lines.append({"step": step, **{f"train/{k}": v for k, v in train.items()}})
        if step % 50 == 0:
            lines.append({"step": step, "validation/dice": step / 200, "validation/score": step / 200})
    return lines


def write(path: Path, rows: list[EvaluationRow], **options: object) -> str:
    values = {"title": "A title", "notice": "A notice.", "evaluation": evaluation(rows), **options}
    write_report(path, **values)  # type: ignore[arg-type]
    return path.read_text(encoding="utf-8")


def example(name: str) -> Example:
    image = np.random.default_rng(0).integers(0, 256, (20, 30)).astype(np.uint8)
    truth = np.zeros((20, 30), np.uint8)
    truth[5:15, 5:15] = 1
    return Example("best", name, 0.5, image, truth, truth)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    record = {
        "settings": {"training": {"batch_size": 4, "seed": 3}, "teacher": {"name": EVIL}},
        "samples": {"train": 60, "test": 20},
        "split_sha256": "ab" * 32,
        "versions": {"torch": "9.8.7"},
        "teacher": EVIL,
    }
    rows = [row("a", 0.8), row("b", 0.9), row(EVIL, 0.7, EVIL), row("d", None)]
    return write(
        tmp_path_factory.mktemp("report") / "report.html",
        rows,
        title=EVIL,
        notice=EVIL,
        metrics=metrics(),
        record=record,
        examples=[example(EVIL)],
        examples_note=EVIL,
        facts={EVIL: EVIL},
        command=f"leafseg {EVIL}",
    )


def test_the_page_needs_nothing_from_outside(page: str) -> None:
    assert not re.search(r"https?://", page)
    sources = re.findall(r"(?:src|href|srcset)=\"([^\"]*)\"", page)
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "<script" not in page
    assert "<link" not in page
    assert "url(" not in page
    assert "@import" not in page


def test_names_from_data_and_settings_are_escaped(page: str) -> None:
    assert "alert(1)" in page
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; $x_1$" in page


def test_the_page_holds_figures_hash_versions_settings_command_and_the_warning(page: str) -> None:
    assert "0.850" in page  # mean of 0.8 and 0.9
    assert "ab" * 32 in page
    assert "torch 9.8.7" in page
    assert "training.seed=3" in page
    assert "60 train, 20 test" in page
    assert "Research software; not a medical device." in page
    assert "95 % percentile bootstrap" in page
    # 100 steps of 4 samples at 8 a second
    assert "50 s" in page


def test_the_pictures_are_whole_and_small_images_are_enlarged(page: str) -> None:
    # Two histograms, two loss parts and the validation Dice, for a light and a dark page each; four panels.
    found = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)
    assert len(found) == 2 * (2 + 2 + 1) + 4
    sizes = []
    for data in found:
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            picture.load()
            sizes.append(picture.size)
    # 30 pixels wide, enlarged by the smallest whole factor that gives 400: 14.
    assert sizes.count((420, 280)) == 4


def test_best_median_and_worst_follow_dice() -> None:
    rows = [row("a", 0.5), row("b", 0.9), row("c", 0.1), row("d", 0.7), row("e", 0.6), row("empty", None)]

    assert rank_images(rows) == [("best", "b", 0.9), ("median", "e", 0.6), ("worst", "c", 0.1)]


def test_an_image_ranks_by_the_mean_over_its_measurable_classes() -> None:
    rows = [row("a", 0.2, "x"), row("a", 1.0, "y"), row("b", 0.7, "x"), row("b", None, "y"), row("c", 0.1, "x")]

    assert [(rank, name) for rank, name, _ in rank_images(rows)] == [("best", "b"), ("median", "a"), ("worst", "c")]


@pytest.mark.parametrize(
    ("dice", "expected"),
    [([], []), ([None], []), ([0.5], [("best", "0")]), ([0.5, 0.5], [("best", "1"), ("worst", "0")])],
)
def test_few_images_give_fewer_ranks_and_none_twice(dice: list[float | None], expected: list[tuple[str, str]]) -> None:
    found = rank_images([row(str(i), value) for i, value in enumerate(dice)])

    assert [(rank, name) for rank, name, _ in found] == expected


def test_a_report_of_empty_masks_without_training_is_written(tmp_path: Path) -> None:
    text = write(tmp_path / "report.html", [row("a", None), row("b", None)])

    assert "Training" not in text
    assert "Examples" not in text
    assert "data:image" not in text


def test_equal_dice_everywhere_is_drawn(tmp_path: Path) -> None:
    for dice in (0.0, 0.3, 1.0):
        assert f"{dice:.3f}" in write(tmp_path / "report.html", [row("a", dice), row("b", dice)])


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")

    with pytest.raises(DataError, match="cannot be written"):
        write(tmp_path / "file" / "report.html", [row("a", 0.5)])

    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# --- what the page says -----------------------------------------------------------------------------------------------


def measured(name: str, dice: float, *, group: str = "", assd: float | None = 1.5, found: int = 10) -> EvaluationRow:
    return EvaluationRow(
        name, "lesion", name, False, dice, dice / (2 - dice), 10, found,
        group=group, precision=None if not found else 0.9, recall=dice, hd95=assd, assd=assd, nsd=dice, unit="mm",
    )  # fmt: skip


def full() -> Evaluation:
    rows = [measured(f"image {k}", 0.9 if k < 7 else 0.4, group=f"{k % 3}" * 12) for k in range(9)]
    rows += [measured("missed", 0.0, group="0" * 12, assd=None, found=0)]
    rows += [EvaluationRow(f"empty {k}", "lesion", "", True, None, None, 0, k, pixels=100, unit="mm") for k in (0, 5)]
    part = Reliability(np.array([90.0, 10.0]), np.array([9.0, 9.0]), np.array([9.0, 5.0]))
    summary = {
        **summarise(rows), "model_sha256": "cd" * 32, "data": "clinic", "part": "test", "steps": 3, "noise": "gaussian",
        "timesteps": "trailing", "samples": 2, "precision": "bf16", "split_sha256": "ef" * 32,
        "preprocessing": {"fit": "stretch"}, "versions": {"monai": "1.2.3"},
    }  # fmt: skip
    return Evaluation(tuple(rows), summary, {"lesion": part})


def test_the_first_sentences_count_images() -> None:
    lines = " ".join(in_short(full()))
    assert "in 7 of 10 images that show it, the found area agrees well" in lines
    assert "1 of them was missed altogether" in lines
    assert "the mean Dice is 0.71" in lines  # (7 x 0.9 + 2 x 0.4 + 0) / 10
    assert "1.5 millimetres apart" in lines
    assert "in 1 of 2 images that do not show it, something was marked" in lines


def test_the_page_shows_every_measure_with_its_number_of_images_and_all_that_repeats_it(tmp_path: Path) -> None:
    write_report(tmp_path / "r.html", title="T", evaluation=full())
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    for text in (
        "Dice", "IoU", "Precision", "Recall", "HD95, mm", "ASSD, mm", "Surface Dice at 2 mm", "False-positive rate",
        "False-positive area", "n = 10", "n = 9", "n = 2", "of these, missed", "Calibration", "What went wrong",
        "missed 1, false positive 1, low Dice 2", "Groups", "0" * 12, "over 5 groups", "Intended use",
        "cd" * 32, "ef" * 32, "3 (trailing timesteps)", "gaussian, 2 draws", "bf16", "fit=stretch", "monai 1.2.3",
    ):  # fmt: skip
        assert text in page, text
    # 9 of 10 pixels that are stated with 0.9 should be true, 5 are; the other 90 are calibrated: (0.4 x 10) / 100.
    assert "0.0400" in page
    assert not re.search(r"https?://", page)


def test_the_page_holds_the_command_that_trains_such_a_model_again(tmp_path: Path) -> None:
    overrides = ["teacher.name=none", "training.minutes=20", "data.label_names={1: left lung}", "training.seed=3"]
    trained = load_settings("leaf-tiny", overrides=overrides)
    record = {"settings": trained.model_dump(mode="json"), "calibration": {"steps": 757}}
    write_report(tmp_path / "r.html", title="T", evaluation=full(), record=record)
    page = html.unescape((tmp_path / "r.html").read_text(encoding="utf-8"))
    (command,) = re.findall(r"<pre>(leafseg train .*)</pre>", page)
    words = shlex.split(command)
    assert words[:8] == shlex.split("leafseg train --data DATA --split-file RUN/split.csv --preset leaf-tiny")
    again = load_settings("leaf-tiny", overrides=[b for a, b in pairwise(words) if a == "--set"])
    assert again.training.steps == 757  # the minutes gave so many; on another machine they would give others
    assert again == override_settings(trained, ["training.steps=757"])


def test_few_images_groups_and_a_part_that_was_trained_on_are_said(tmp_path: Path) -> None:
    evaluation = full()
    evaluation.summary["part"] = "all"
    evaluation.summary["selected_on_test"] = True
    write_report(tmp_path / "r.html", title="T", evaluation=evaluation)
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    for text in ("Only 12 images were evaluated", "come from 5 groups", "trained on", "chose the checkpoint"):
        assert text in page
    write_report(tmp_path / "r.html", title="T", evaluation=Evaluation((row("a", 0.5),), summarise([row("a", 0.5)])))
    assert "No groups (patients, volumes) are known" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_the_outlines_of_reference_and_prediction_have_their_colours_where_they_run() -> None:
    truth, predicted = np.zeros((30, 30), np.uint8), np.zeros((30, 30), np.uint8)
    truth[5:15, 5:15] = 1
    predicted[5:15, 10:25] = 1
    drawn = _outlines(np.zeros((30, 30, 3), np.uint8), truth, predicted)
    assert tuple(drawn[10, 5]) == _TRUTH_COLOUR  # its left edge
    assert tuple(drawn[10, 24]) == _PREDICTION_COLOUR  # its right edge
    assert tuple(drawn[5, 12]) == _PREDICTION_COLOUR  # where both run, the narrow one lies upon the wide one
    assert tuple(drawn[4, 12]) == _TRUTH_COLOUR
    assert not drawn[10, 20].any()
    layers = _outlines(np.zeros((30, 30, 3), np.uint8), truth[None] > 0, predicted[None] > 0)
    assert np.array_equal(layers, drawn)


class LeftHalf:
    """Says that every image's left half is foreground."""

    label_names = ("background", "foreground")
    overlapping = False
    preprocessing = PreprocessingSettings()

    def read(self, path: Path, frame: int | None = None) -> np.ndarray:
        return read_image(path, frame)

    def segment(self, images: list[np.ndarray]) -> list[Segmentation]:
        labels = [np.zeros(image.shape[:2], np.uint8) for image in images]
        for mask in labels:
            mask[:, : mask.shape[1] // 2] = 1
        return [Segmentation(mask[None].astype(np.float32), mask) for mask in labels]


def test_examples_hold_the_pixels_of_the_images_they_name(tmp_path: Path) -> None:
    for index, columns in enumerate((2, 4, 8)):  # of 8; the prediction is 4: Dice 4/6, 1, 8/12
        write_png(tmp_path / "images" / f"{index}.png", np.full((4, 8), 50 + index, np.uint8))
        mask = np.zeros((4, 8), np.uint8)
        mask[:, :columns] = 255
        mask[0, 7] = 0
        write_png(tmp_path / "masks" / f"{index}.png", mask)
    manifest = load_manifest(tmp_path, settings=DataSettings())

    found = find_examples(LeftHalf(), manifest, evaluate(LeftHalf(), manifest))

    # Truth 8 of 16 predicted: 2*8/24 = 0.667; 16 of 16: 1; 31 of which 16: 32/47 = 0.681.
    assert [(e.rank, e.name, round(e.dice, 3)) for e in found] == [
        ("best", "1", 1.0),
        ("median", "2", 0.681),
        ("worst", "0", 0.667),
    ]
    assert [int(e.image[0, 0]) for e in found] == [51, 52, 50]
    assert [int(e.truth.sum()) for e in found] == [16, 31, 8]
    assert all(e.predicted.sum() == 16 for e in found)
