"""`leafseg crossval`: each image is judged once, by a model that never saw it; what was interrupted goes on."""

from __future__ import annotations

import csv
import json
import logging
import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from leafseg.config import DataSettings, Settings, override_settings
from leafseg.crossval import run_crossval, store_new_split
from leafseg.data.manifest import Manifest, load_manifest
from leafseg.ensemble import EnsembleSegmenter, load_model
from leafseg.errors import ConfigError, DataError
from leafseg.predict import load_segmenter
from leafseg.runs import checkpoint_folder, checkpoint_steps
from leafseg.training.run import run_training


@pytest.fixture(scope="module")
def data(tiny_data: Callable[..., Path]) -> Path:
    return tiny_data(16)


@pytest.fixture(scope="module")
def settings(tiny_settings: Settings) -> Settings:
    return override_settings(tiny_settings, ["training.steps=2", "training.validations=1"])


def split(data: Path, out: Path, *, folds: int = 2, test: float = 0.25) -> Manifest:
    store_new_split(data, out, settings=DataSettings(), folds=folds, test=test)
    return load_manifest(data, settings=DataSettings(), split_file=out / "split.csv")


@pytest.fixture(scope="module")
def done(data: Path, settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """A finished cross-validation of two folds and its split; not to be changed."""
    out = tmp_path_factory.mktemp("crossval")
    manifest = split(data, out)
    result = run_crossval(settings, data, out)
    assert len(result.folds) == result.total == 2
    return out, manifest


def table(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((out / "per_image.csv").open()))


def test_every_image_is_judged_once_by_a_model_that_never_saw_it(done: tuple[Path, Manifest]) -> None:
    out, manifest = done
    rows = table(out)
    assert {row["name"]: row["fold"] for row in rows} == {
        s.name: "ensemble" if s.fold is None else str(s.fold) for s in manifest.samples
    }
    assert len(rows) == len(manifest)
    for number in range(2):
        record = json.loads((out / f"fold-{number}" / "run.json").read_text())["record"]
        assert record["fold"] == number
        learned = {
            r["sha256"] for r in csv.DictReader((out / f"fold-{number}" / "split.csv").open()) if r["part"] == "train"
        }
        judged = {row["sha256"] for row in rows if row["fold"] in (str(number), "ensemble")}
        assert learned
        assert not learned & judged


def test_out_of_fold_figures_are_those_of_all_held_out_images(done: tuple[Path, Manifest]) -> None:
    out, _ = done
    report = json.loads((out / "crossval.json").read_text())
    rows = [row for row in table(out) if row["fold"] != "ensemble"]
    figures = report["out_of_fold"]["classes"]["foreground"]
    assert figures["images"] == len(rows) == sum(fold["images"] for fold in report["folds"])
    assert figures["dice"]["mean"] == pytest.approx(np.mean([float(row["dice"]) for row in rows]), abs=1e-6)
    assert report["test"]["classes"]["foreground"]["images"] == len(table(out)) - len(rows)
    assert [fold["steps"] for fold in report["folds"]] == [2, 2]


def test_the_folder_is_an_ensemble_of_the_last_checkpoints(done: tuple[Path, Manifest]) -> None:
    out, manifest = done
    ensemble = load_model(str(out))
    assert isinstance(ensemble, EnsembleSegmenter)
    sample = manifest.part("test").samples[0]
    image = ensemble.read(sample.image, sample.frame)
    singles = [load_segmenter(str(checkpoint_folder(out / f"fold-{k}", 2))) for k in range(2)]
    mean = sum(single.segment([image])[0].probability for single in singles) / 2
    np.testing.assert_allclose(ensemble.segment([image])[0].probability, mean, atol=1e-6)


def test_a_second_call_trains_and_evaluates_nothing_again(
    done: tuple[Path, Manifest], data: Path, settings: Settings
) -> None:
    out, _ = done
    kept = [*out.glob("fold-*/run.json"), *out.glob("**/rows.json"), *out.glob("fold-*/checkpoints/*")]
    before = {path: path.stat().st_mtime_ns for path in kept}
    assert len(before) >= 6
    report = (out / "crossval.json").read_text()
    run_crossval(settings, data, out)
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    assert (out / "crossval.json").read_text() == report


def test_an_interrupted_fold_continues_to_the_same_figures(
    done: tuple[Path, Manifest], data: Path, settings: Settings, tmp_path: Path
) -> None:
    out, _ = done
    split(data, tmp_path)
    assert (tmp_path / "split.csv").read_text() == (out / "split.csv").read_text()
    cached = override_settings(settings, [f"teacher.cache_dir={tmp_path / 'features'}"])
    stopped = run_training(cached, data, tmp_path / "fold-0", split_file=tmp_path / "split.csv", fold=0, stop_after=1)
    assert stopped.status == "stopped"
    run_crossval(settings, data, tmp_path)
    assert table(tmp_path) == table(out)


class TermOnce(logging.Handler):
    """Sends this process SIGTERM at the first validation, as a cluster does when time is up."""

    def emit(self, record: logging.LogRecord) -> None:
        if "validation dice" in record.getMessage():
            logging.getLogger("leafseg").removeHandler(self)
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_ends_it_after_a_save_and_the_same_call_goes_on(
    data: Path, settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    three = override_settings(settings, ["training.steps=3", "training.validations=3"])
    split(data, tmp_path)
    with caplog.at_level(logging.INFO, "leafseg"):
        handler = TermOnce()
        logging.getLogger("leafseg").addHandler(handler)
        first = run_crossval(three, data, tmp_path)
        assert handler not in logging.getLogger("leafseg").handlers  # it was sent
    assert (first.folds, first.total, first.out_of_fold) == ((), 2, None)
    assert checkpoint_steps(tmp_path / "fold-0")[-1] == 2
    assert not (tmp_path / "ensemble.json").exists()
    second = run_crossval(three, data, tmp_path)
    assert [fold.steps for fold in second.folds] == [3, 3]
    assert second.out_of_fold is not None


def test_what_does_not_belong_together_is_refused(
    done: tuple[Path, Manifest], data: Path, settings: Settings, tmp_path: Path
) -> None:
    out, _ = done
    with pytest.raises(ConfigError, match=r"other settings.*learning_rate"):
        run_crossval(override_settings(settings, ["training.learning_rate=0.5"]), data, out)
    with pytest.raises(ConfigError, match=r"folds: 2 then, 3 now"):
        split(data, out, folds=3)
    other = tmp_path / "other"
    split(data, other, test=0.5)
    with pytest.raises(ConfigError, match="began with another split"):
        run_crossval(settings, data, out, split_file=other / "split.csv")
    (tmp_path / "plain.csv").write_text((out / "fold-0" / "split.csv").read_text().replace(",fold\n", ",kept\n"))
    with pytest.raises(DataError, match="holds no folds"):
        run_crossval(settings, data, tmp_path / "new", split_file=tmp_path / "plain.csv")


def test_the_command_makes_the_split_and_says_what_came_out(
    cli: Callable[..., object], data: Path, tiny_config: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = ("--preset", "leaf-tiny", "--config", tiny_config, "--steps", 1, "--set", "training.validations=0")
    ended = cli("crossval", "--data", data, "--out", out, "--folds", 2, "--stratify-labels", *options)
    assert ended.code == 0, ended.stderr
    names = Counter(line.split(":")[0] for line in ended.stdout.splitlines())
    assert names["fold 0"] == names["fold 1"] == names["all folds, held out"] == names["ensemble, test part"] == 1
    predicted = cli("predict", out, data / "images" / "000.png", "--out", tmp_path / "masks")
    assert predicted.code == 0, predicted.stderr
    assert (tmp_path / "masks" / "000.png").is_file()
    evaluated = cli("evaluate", out, "--data", data, "--out", tmp_path / "evaluation", "--no-report")
    assert evaluated.code == 0, evaluated.stderr
    ours = json.loads((out / "evaluation-test" / "summary.json").read_text())
    theirs = json.loads((tmp_path / "evaluation" / "summary.json").read_text())
    assert ours["classes"] == theirs["classes"]


def test_a_split_with_folds_needs_a_fold_to_train(cli: Callable[..., object], data: Path, tmp_path: Path) -> None:
    assert cli("data", "split", data, "--out", tmp_path / "split.csv", "--folds", 2).code == 0
    train = ("train", "--data", data, "--out", tmp_path / "run", "--set", "teacher.name=none", "--steps", 1)
    assert "--fold" in cli(*train, "--split-file", tmp_path / "split.csv").error
    assert "--split-file" in cli(*train, "--fold", 0).error
