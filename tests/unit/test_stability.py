"""Stability: hand-computed figures of small masks, models whose spread is known, and the page."""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from torch import Tensor

from leafseg.cli import main
from leafseg.config import DataSettings, Settings, override_settings
from leafseg.data.images import write_png
from leafseg.data.manifest import Manifest, load_manifest, save_split
from leafseg.errors import CheckpointError, ConfigError, DataError
from leafseg.evaluation import stability
from leafseg.evaluation.metrics import dice_and_iou
from leafseg.evaluation.stability import (
    METRICS,
    DrawStatistics,
    StabilityRow,
    draw_statistics,
    evenly_spaced,
    load_shared_manifest,
    measure_stability,
    overlap_counts,
    rank_by_disagreement,
    starting_noise,
)
from leafseg.pipeline import LeafPipeline
from leafseg.runs import checkpoint_folder, run_of

TYPES = ("sample", "v_prediction", "epsilon")
SCALARS = (*METRICS, "predicted_share")


def mask(*pixels: int, size: int = 8) -> Tensor:
    """A mask of two rows whose numbered pixels are foreground."""
    flat = torch.zeros(size, dtype=torch.bool)
    flat[list(pixels)] = True
    return flat.reshape(2, -1)


def statistics(masks: Sequence[Tensor], truth: Tensor) -> DrawStatistics:
    """Of draws that are sure: their probability is the mask."""
    stacked = torch.stack(list(masks))
    return draw_statistics([(stacked.float(), stacked)], truth)


def scalars(found: object) -> dict[str, float | None]:
    return {name: getattr(found, name) for name in SCALARS}


# --- one image --------------------------------------------------------------------------------------------------------


def test_three_small_masks_have_the_figures_computed_by_hand() -> None:
    found = statistics([mask(0, 1), mask(1, 2), mask()], truth=mask(0, 1, 2, 3))
    # Dice with the truth: 4/6, 4/6, 0. Between each two: 2/4, 0, 0.
    assert found.dice_mean == pytest.approx(4 / 9)
    assert found.dice_std == pytest.approx(math.sqrt(((2 / 9) ** 2 * 2 + (4 / 9) ** 2) / 2))
    assert found.dice_spread == pytest.approx(2 / 3)
    assert found.disagreement == pytest.approx(1 - 0.5 / 3)
    assert found.predicted_share == pytest.approx(2 / 3)
    # Votes 1/3, 2/3, 1/3 on three of eight pixels; each carries the entropy of one in three.
    np.testing.assert_allclose(found.votes.ravel(), [1 / 3, 2 / 3, 1 / 3, 0, 0, 0, 0, 0], atol=1e-7)
    third = -(math.log2(1 / 3) + 2 * math.log2(2 / 3)) / 3
    assert found.vote_entropy == pytest.approx(3 / 8 * third)
    # Pixels 0 and 2 are hit once in three draws, pixel 1 twice: a variance of 1/3 each.
    assert found.probability_std == pytest.approx(3 / 8 * math.sqrt(1 / 3))
    # Wrong pixels of eight: 2, 2, 4. The mean draw is off by 2/3, 1/3, 2/3 and 1, each value in a bin of its own but
    # the two thirds: |1/3 - 1| twice, |2/3 - 1| once, |0 - 1/5| five times.
    assert found.ece_draw == pytest.approx((2 + 2 + 4) / 8 / 3)
    assert found.ece_mean == pytest.approx((2 * 2 / 3 + 1 / 3 + 5 * 1 / 5) / 8, abs=1e-6)


def test_the_probability_spreads_where_masks_do_not() -> None:
    # Two draws that differ by 0.2 on one of eight pixels, below the threshold: sample deviation 0.2 / sqrt(2).
    probability = torch.zeros(2, 2, 4)
    probability[:, 0, 0] = torch.tensor([0.1, 0.3])
    found = draw_statistics([(probability, probability > 0.5)], mask(0))
    assert found.probability_std == pytest.approx(0.2 / math.sqrt(2) / 8)
    assert (found.disagreement, found.vote_entropy, found.dice_mean, found.dice_std) == (0, 0, 0, 0)


def test_empty_masks_agree_with_each_other_and_with_nothing_else() -> None:
    assert statistics([mask(), mask()], mask(0)).disagreement == 0
    assert statistics([mask(), mask(3)], mask(0)).disagreement == 1
    # Three pairs: one of two empty masks, two of an empty and a filled one.
    assert statistics([mask(), mask(), mask(3)], mask(0)).disagreement == pytest.approx(2 / 3)


def test_an_empty_truth_has_no_dice_but_a_share_of_seeds_that_find_something() -> None:
    found = statistics([mask(), mask(1), mask(), mask(5)], truth=mask())
    assert (found.dice_mean, found.dice_std, found.dice_spread) == (None, None, None)
    assert found.predicted_share == 0.5
    missed = statistics([mask(), mask()], truth=mask(1))
    assert (missed.dice_mean, missed.dice_std, missed.dice_spread) == (0, 0, 0)


def test_equal_draws_have_exactly_no_spread() -> None:
    probability = torch.rand(30, 31, generator=torch.Generator().manual_seed(0)).expand(7, -1, -1)
    found = draw_statistics([(probability, probability > 0.5)], probability[0] > 0.3)
    assert (found.dice_std, found.dice_spread, found.disagreement) == (0, 0, 0)
    assert (found.vote_entropy, found.probability_std) == (0, 0)
    assert found.ece_mean == pytest.approx(found.ece_draw)


def test_neither_order_nor_chunks_of_the_draws_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    probability = torch.rand(6, 9, 11, generator=generator)
    truth = torch.rand(9, 11, generator=generator) > 0.6
    reference = draw_statistics([(probability, probability > 0.5)], truth)
    shuffled = probability[torch.tensor([3, 0, 5, 1, 4, 2])]
    found = draw_statistics([(part, part > 0.5) for part in shuffled.split([1, 3, 2])], truth)
    assert scalars(found) == pytest.approx(scalars(reference), abs=1e-6)
    np.testing.assert_allclose(found.votes, reference.votes)
    np.testing.assert_array_equal(found.draws.counts, reference.draws.counts)


def test_one_draw_has_no_spread_to_measure() -> None:
    with pytest.raises(ValueError, match="at least two"):
        statistics([mask(0)], mask(0))


def test_overlaps_are_those_of_the_dice_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stability, "_RUN", 7)  # several runs of pixels, the last a short one
    masks = torch.rand(5, 6, 8, generator=torch.Generator().manual_seed(1)) > 0.5
    overlaps = overlap_counts(list(masks))
    for i in range(5):
        dice, _ = dice_and_iou(masks[i][None, None], masks[:1][None])
        assert 2 * overlaps[i, 0] / (overlaps[i, i] + overlaps[0, 0]) == pytest.approx(float(dice))


# --- models -----------------------------------------------------------------------------------------------------------


def saved(pipeline: LeafPipeline, folder: Path, prediction_type: str = "sample") -> str:
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, prediction_type=prediction_type)
    pipeline.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tiny_data: Callable[..., Path]) -> Path:
    return tiny_data(4)


@pytest.fixture(scope="module")
def three(data: Path) -> Manifest:
    return evenly_spaced(load_manifest(data, settings=DataSettings()), 3)


@pytest.fixture
def models(tiny_pipeline: LeafPipeline, tmp_path: Path) -> dict[str, str]:
    """One set of random weights, as a model of each prediction type."""
    return {kind: saved(tiny_pipeline, tmp_path / f"model-{kind}", kind) for kind in TYPES}


def of(rows: Sequence[StabilityRow], model: str) -> list[dict[str, object]]:
    return [{**vars(row), "model": ""} for row in rows if row.model == model]


def test_a_model_that_ignores_its_noise_has_exactly_no_spread(
    tiny_pipeline: LeafPipeline, three: Manifest, tmp_path: Path
) -> None:
    noisy = saved(tiny_pipeline, tmp_path / "noisy")
    latent_channels = tiny_pipeline.unet.config["out_channels"]
    with torch.no_grad():
        tiny_pipeline.unet.conv_in.weight[:, -latent_channels:] = 0  # the image latent comes first
    deaf = saved(tiny_pipeline, tmp_path / "deaf")
    found = measure_stability({"noisy": noisy, "deaf": deaf}, three, steps=[1], noise_seeds=range(5))
    for row in found.rows:
        figures = (row.disagreement, row.vote_entropy, row.probability_std, row.dice_std, row.dice_spread)
        if row.model == "deaf":
            assert figures == (0, 0, 0, 0, 0)
        else:
            assert all(figure is not None and figure > 0 for figure in figures), figures


def test_models_and_steps_share_their_noise(models: dict[str, str], three: Manifest, tmp_path: Path) -> None:
    twice = {"one": models["sample"], "two": models["sample"]}
    found = measure_stability(twice, three, steps=[2, 1], noise_seeds=[4, 9, 2])
    assert found.steps == (1, 2)
    assert of(found.rows, "one") == of(found.rows, "two")
    for difference in found.summary["differences"]:
        interval = difference["disagreement"]
        assert (interval["mean"], interval["low"], interval["high"]) == (0, 0, 0)
    # Seeds in another order, each model alone, and fewer steps give the same.
    again = measure_stability({"one": models["sample"]}, three, steps=[1], noise_seeds=[9, 2, 4])
    for before, after in zip([row for row in found.rows[:6] if row.steps == 1], again.rows, strict=True):
        assert scalars(after) == pytest.approx(scalars(before), abs=1e-6)


def test_noise_depends_on_the_seed_and_the_image_and_on_nothing_else(three: Manifest) -> None:
    first, second = three.samples[:2]
    noise = starting_noise(first, [0, 1, 2], (4, 16, 16))
    assert torch.equal(starting_noise(first, [2, 0], (4, 16, 16)), noise[[2, 0]])
    others = [noise[1], noise[2], starting_noise(second, [0], (4, 16, 16))[0]]
    for other in others:
        assert abs(np.corrcoef(noise[0].flatten(), other.flatten())[0, 1]) < 0.15
    assert float(noise.std()) == pytest.approx(1, abs=0.05)


def test_few_draws_at_a_time_give_what_all_at_once_give(
    models: dict[str, str], three: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = {"v": models["v_prediction"]}
    whole = measure_stability(one, three, steps=[1], noise_seeds=range(4))
    monkeypatch.setattr(stability, "_MAX_INPUT_PIXELS", 32 * 32)
    for before, after in zip(
        whole.rows, measure_stability(one, three, steps=[1], noise_seeds=range(4)).rows, strict=True
    ):
        # A pixel at the threshold may fall on its other side in another kernel.
        assert scalars(after) == pytest.approx(scalars(before), abs=2e-3)


def test_the_draws_of_one_call_are_what_single_calls_give(tiny_pipeline: LeafPipeline) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    noise = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    output = tiny_pipeline(pixels, latents=noise, num_samples=3, return_samples=True)
    assert output.samples is not None
    assert output.samples.shape == (1, 3, 1, 20, 24)
    for index in range(3):
        single = tiny_pipeline(pixels, latents=noise[index : index + 1])
        assert single.samples is None
        torch.testing.assert_close(output.samples[:, index], single.probability, rtol=0, atol=1e-5)
    torch.testing.assert_close(output.samples.mean(1), output.probability)


# --- which images -----------------------------------------------------------------------------------------------------


def test_a_sample_of_images_is_evenly_spaced(data: Path) -> None:
    whole = load_manifest(data, settings=DataSettings())
    assert evenly_spaced(whole, 0) is whole
    assert evenly_spaced(whole, len(whole) + 1) is whole
    every_other = evenly_spaced(whole, len(whole) // 2).samples
    places = [whole.samples.index(sample) for sample in every_other]
    assert len(set(places)) == len(whole) // 2
    assert {after - before for before, after in itertools.pairwise(places)} <= {2, 3}


def test_models_of_different_splits_share_no_test_part(data: Path, tmp_path: Path) -> None:
    whole = load_manifest(data, settings=DataSettings())
    save_split(whole, tmp_path / "one.csv")
    text = (tmp_path / "one.csv").read_text()
    swapped = re.sub(r"(train|test)$", lambda m: "test" if m[1] == "train" else "train", text, flags=re.MULTILINE)
    (tmp_path / "two.csv").write_text(swapped)
    (tmp_path / "same.csv").write_text(text)
    settings = DataSettings()

    alike = {"a": (settings, tmp_path / "one.csv"), "b": (settings, tmp_path / "same.csv"), "c": (settings, None)}
    part = load_shared_manifest(data, alike, part="test")
    assert {s.name for s in part.samples} == {s.name for s in whole.samples if s.part == "test"}

    different = {"a": (settings, tmp_path / "one.csv"), "b": (settings, tmp_path / "two.csv")}
    with pytest.raises(DataError, match="a and b were trained with different splits"):
        load_shared_manifest(data, different, part="test")
    assert load_shared_manifest(data, different, part="test", split_file=tmp_path / "one.csv").samples == part.samples
    assert len(load_shared_manifest(data, different, part="all")) == len(whole)


def test_models_that_read_masks_differently_are_not_compared(data: Path) -> None:
    sources = {"a": (DataSettings(), None), "b": (DataSettings(mask_threshold=100), None)}
    with pytest.raises(DataError, match="a and b were trained on different readings of the masks"):
        load_shared_manifest(data, sources, part="all")


def test_the_images_of_most_disagreement_and_the_median_one_are_shown() -> None:
    def row(name: str, disagreement: float, model: str = "m") -> StabilityRow:
        return StabilityRow(model, 1, name, name, True, 0, None, None, None, disagreement, 0, 0, 0, 0, 0)

    # Means over models: a 0.1, b 0.5, c 0.3, d 0.2, e 0.4, f 0, g 0.05. The middle of seven is the fourth: d.
    values = {"a": 0.1, "b": 0.5, "c": 0.3, "d": 0.2, "e": 0.4, "f": 0.0, "g": 0.05}
    rows = [
        row(name, value + sign * value / 2, model)
        for model, sign in (("m", 1), ("n", -1))
        for name, value in values.items()
    ]
    ranked = rank_by_disagreement(rows)
    assert [name for _, name, _ in ranked] == ["b", "e", "c", "d"]
    assert [rank for rank, _, _ in ranked][::3] == ["largest disagreement", "median disagreement"]
    assert [value for _, _, value in ranked] == pytest.approx([0.5, 0.4, 0.3, 0.2])
    assert [name for _, name, _ in rank_by_disagreement(rows[:1])] == ["a"]
    assert [name for _, name, _ in rank_by_disagreement(rows[:2])] == ["b", "a"]


# --- the command and its page -----------------------------------------------------------------------------------------


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """``cli("stability", ...)`` as the shell would call it: exit code, output, errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["leafseg", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return run


Cli = Callable[..., tuple[int, str, str]]


def test_the_command_compares_three_prediction_types_on_one_page(
    cli: Cli, models: dict[str, str], data: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    empty = data.parent / "with-empty"
    (empty / "images").mkdir(parents=True)
    for folder in ("images", "masks"):
        for path in sorted((data / folder).iterdir())[:1]:
            (empty / folder).mkdir(exist_ok=True)
            (empty / folder / path.name).write_bytes(path.read_bytes())
    write_png(empty / "images" / "nothing $x_1$.png", np.full((30, 30), 9, np.uint8))
    write_png(empty / "masks" / "nothing $x_1$.png", np.zeros((30, 30), np.uint8))
    out = tmp_path / "out"
    names = {"sample": "x0 | <b>", "v_prediction": "$velocity", "epsilon": "noise"}
    code, printed, error = cli(
        "stability", *models.values(), "--data", empty, "--split", "all", "--noise-seeds", 3, "--steps", "4,1,",
        "--out", out, *(word for name in names.values() for word in ("--name", name)),
    )  # fmt: skip
    assert (code, error) == (0, "")
    for kind, name in names.items():
        assert re.search(rf"^{re.escape(name)} +{kind} +4( +[\d.-]+){{5}}$", printed, re.MULTILINE), printed

    page = (out / "stability.md").read_text(encoding="utf-8")
    for kind, name in zip(names, ("x0 \\| &lt;b>", "$velocity", "noise"), strict=True):
        assert f"| {name} | {kind} | trailing | 32x32 |" in page
    assert "not a medical device" in page
    assert "1 of them with an empty mask" in page
    tables = [line for line in page.splitlines() if line.startswith("|")]
    widths = [len(re.findall(r"(?<!\\)\|", line)) for line in tables]
    breaks = [index for index, line in enumerate(tables) if set(line) <= set("| -")]
    for start, stop in zip(breaks, [*breaks[1:], len(tables) + 1], strict=True):
        assert len(set(widths[start - 1 : stop - 1])) == 1, tables[start - 1 : stop - 1]
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page)
    assert {"steps.png", "reliability-1.png", "reliability-4.png", "disagreement-2.png"} <= set(pictures)
    for name in pictures:
        with Image.open(out / name) as picture:
            assert min(picture.size) > 300
    assert sorted(p.name for p in out.iterdir()) == sorted(
        [*pictures, "stability.md", "stability.json", "per_image.csv"]
    )

    record = json.loads((out / "stability.json").read_text())
    assert [model["prediction_type"] for model in record["models"]] == list(TYPES)
    assert (record["images"], record["empty"], record["steps"], record["part"]) == (2, 1, [1, 4], "all")
    with (out / "per_image.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 3 * 2 * 2
    assert {row["dice_mean"] == "" for row in rows if row["empty"] == "True"} == {True}
    for name in names.values():
        mine = [row for row in rows if row["model"] == name and row["steps"] == "4"]
        figures = record["figures"][name]["4"]
        disagreement = [float(row["disagreement"]) for row in mine]
        assert figures["disagreement"]["mean"] == pytest.approx(np.mean(disagreement), abs=1e-6)
        dice = [float(row["dice_mean"]) for row in mine if row["dice_mean"]]
        assert (figures["dice_mean"]["n"], len(dice)) == (1, 1)
        assert figures["dice_mean"]["mean"] == pytest.approx(np.mean(dice), abs=1e-6)
        empty_share = [float(row["predicted_share"]) for row in mine if row["empty"] == "True"]
        assert figures["false_positive_share"]["mean"] == pytest.approx(empty_share[0], abs=1e-6)
        for kind in ("draw", "mean"):
            pixels = sum(one["count"] for one in record["calibration"][name]["4"][kind]["bins"])
            assert pixels == (40 * 36 + 30 * 30) * (3 if kind == "draw" else 1)
    first, second = (figures["dice_mean"]["mean"] for figures in (record["figures"][names[k]]["1"] for k in TYPES[:2]))
    difference = next(d for d in record["differences"] if d["steps"] == 1)
    assert (difference["first"], difference["second"]) == (names["sample"], names["v_prediction"])
    assert difference["dice_mean"]["mean"] == pytest.approx(second - first)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--steps", "0"), "--steps is '0'; give whole numbers from 1"),
        (("--steps", "1,two"), "--steps is '1,two'; give whole numbers from 1"),
        (("--steps", ","), "give whole numbers from 1"),
        (("--steps", "1,1001"), "1001 steps are asked for; the model's schedule has 1..1000"),
        (("--noise-seeds", "1"), "--noise-seeds is 1; a spread needs at least 2"),
        (("--name", "a", "--name", "b"), "--name is given 2 times for 1 models"),
        (("--data", "{empty}"), "no images in the folder"),
        (("--data", "{empty}/nowhere"), "no such folder or CSV file"),
        (("--out", "{empty}/file/out"), "cannot be written"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    cli: Cli, models: dict[str, str], data: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    pytest.importorskip("matplotlib")
    empty = tmp_path / "empty"
    (empty / "images").mkdir(parents=True)
    (empty / "masks").mkdir()
    (empty / "file").write_bytes(b"")
    given = ["--data", data, "--out", tmp_path / "out", *(word.format(empty=empty) for word in options)]
    code, printed, error = cli("stability", models["sample"], *given)
    assert (code, printed) == (2, "")
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1
    assert message in error


@pytest.fixture
def run_with_its_own_rules(tiny_pipeline: LeafPipeline, tiny_settings: Settings, data: Path, tmp_path: Path) -> Path:
    """A run's folder as training leaves it: test and validation exchanged, the background as foreground."""
    run = tmp_path / "run"
    settings = override_settings(tiny_settings, ["data.foreground_labels=[0]", "training.selection_part=test"])
    trainer = checkpoint_folder(run, 1) / "trainer"
    trainer.mkdir(parents=True)
    (trainer / "state.json").write_text('{"best_step": 1}')
    tiny_pipeline.save_pretrained(trainer.parent / "pipeline")
    (run / "pipeline").symlink_to(trainer.parent / "pipeline")
    (run / "run.json").write_text(json.dumps({"record": {"settings": settings.model_dump(mode="json")}}))
    whole = load_manifest(data, settings=settings.data)
    other = {"validation": "test", "test": "validation", "train": "train"}
    save_split(replace(whole, samples=tuple(replace(s, part=other[s.part]) for s in whole.samples)), run / "split.csv")
    return run


def test_a_runs_pipeline_and_checkpoint_keep_its_split_and_its_reading_of_the_masks(
    cli: Cli, run_with_its_own_rules: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    run = run_with_its_own_rules
    plain = load_manifest(data, settings=DataSettings()).part("validation")
    background = {}
    for sample in plain.samples:
        assert sample.mask is not None
        with Image.open(sample.mask) as picture:
            background[sample.name] = str(int((np.asarray(picture) == 0).sum()))

    def truth_pixels(path: Path) -> dict[str, str]:
        with path.open() as stream:
            return {row["name"]: row["truth_pixels"] for row in csv.DictReader(stream)}

    cli("evaluate", run / "pipeline", "--data", data, "--steps", 1)
    assert truth_pixels(tmp_path / "evaluation" / "per_image.csv") == background
    cli("evaluate", run, "--data", data, "--steps", 1)
    assert truth_pixels(run / "evaluation-test" / "per_image.csv") == background
    cli("stability", checkpoint_folder(run, 1), "--data", data, "--noise-seeds", 2, "--steps", 1)
    assert truth_pixels(tmp_path / "stability" / "per_image.csv") == background


def test_a_name_on_the_hub_belongs_to_no_run(run_with_its_own_rules: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run_with_its_own_rules)
    assert run_of(Path("owner/name")) is None
    assert run_of(Path("pipeline")) == run_with_its_own_rules.resolve()


def test_a_checkpoint_that_the_test_part_chose_is_named_beside_figures_on_it(
    cli: Cli, run_with_its_own_rules: Path, models: dict[str, str], data: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    run, out = run_with_its_own_rules, tmp_path / "out"
    common = (
        "--data", data, "--split-file", run / "split.csv", "--set", "data.foreground_labels=[255]",
        "--noise-seeds", 2, "--steps", 1, "--images", 1, "--out", out,
    )  # fmt: skip
    names = ("--name", "mine|", "--name", "theirs")
    code, _, error = cli("stability", run, models["sample"], *names, *common)  # the second belongs to no run
    assert code == 0, error
    assert "warning: the test part chose the checkpoint of mine| (training.selection_part)" in error
    assert "chose the checkpoint of mine\\|**" in (out / "stability.md").read_text(encoding="utf-8")
    assert json.loads((out / "stability.json").read_text())["selected_on_test"] == ["mine|"]

    code, _, error = cli("stability", run, *common, "--split", "validation")
    assert (code, "warning" in error) == (0, False)
    assert "chose the checkpoint" not in (out / "stability.md").read_text(encoding="utf-8")
    assert "selected_on_test" not in json.loads((out / "stability.json").read_text())


def test_an_unknown_part_is_refused(cli: Cli, data: Path) -> None:
    code, _, error = cli("stability", "model", "--data", data, "--split", "holdout")
    assert code == 2
    assert "'holdout' is not one of" in error


def test_two_models_of_one_name_need_names(cli: Cli, models: dict[str, str], data: Path) -> None:
    code, _, error = cli("stability", models["sample"], models["sample"] + "/", "--data", data)
    assert code == 2
    assert "two models are named 'model-sample'; tell them apart with --name" in error


def test_missing_matplotlib_is_found_before_anything_runs(
    cli: Cli, models: dict[str, str], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, error = cli("stability", models["sample"], "--data", data, "--out", tmp_path / "out")
    assert code == 2
    assert error.count("\n") == 1
    assert 'pip install "leafseg[report]"' in error
    assert not (tmp_path / "out").exists()


def test_models_of_other_labels_are_not_compared(
    tiny_pipeline: LeafPipeline, models: dict[str, str], three: Manifest, tmp_path: Path
) -> None:
    parts = tiny_pipeline.components
    other = LeafPipeline(
        **{name: parts[name] for name in ("unet", "vae", "image_encoder", "scheduler")},
        preprocessing=dict(tiny_pipeline.config["preprocessing"]),
        mask_code={"name": "binary", "label_names": ["background", "lung"]},
    )
    pair = {"one": models["sample"], "two": saved(other, tmp_path / "other")}
    with pytest.raises(CheckpointError, match=r"labels are background, lung, those of .* are background, foreground"):
        measure_stability(pair, three, steps=[1])


def test_requests_that_measure_nothing_are_refused(models: dict[str, str], three: Manifest, data: Path) -> None:
    one = {"one": models["sample"]}
    with pytest.raises(ConfigError, match="at least two different ones"):
        measure_stability(one, three, noise_seeds=[3, 3])
    with pytest.raises(ConfigError, match="steps are 0, 1; give whole numbers from 1"):
        measure_stability(one, three, steps=[1, 0])
    with pytest.raises(ConfigError, match="no model is given"):
        measure_stability({}, three)
    with pytest.raises(DataError, match="the part has no samples"):
        measure_stability(one, Manifest(data, (), three.label_map))
