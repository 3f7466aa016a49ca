"""A run's own split and its own autoencoder survive whatever happens to the data folder and to a resume."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from leafseg.config import DataSettings, Settings
from leafseg.data.manifest import Manifest, load_manifest, save_split
from leafseg.errors import ConfigError
from leafseg.pipeline import LeafPipeline
from leafseg.training.precision import resolve_precision
from leafseg.training.run import run_training


def swapped(manifest: Manifest) -> Manifest:
    """The same samples with train and test exchanged: not what the default rule gives."""
    other = {"train": "test", "test": "train", "validation": "validation"}
    return replace(manifest, samples=tuple(replace(s, part=other[s.part]) for s in manifest.samples))


def test_a_run_split_holds_although_the_folder_has_other_files(tiny_data: Callable[..., Path], tmp_path: Path) -> None:
    data = tiny_data()
    wanted = swapped(load_manifest(data, settings=DataSettings()))
    save_split(wanted, tmp_path / "split.csv")
    (data / "images" / "README.txt").write_text("notes")
    found = load_manifest(data, settings=DataSettings(), run_split=tmp_path / "split.csv")
    assert found.split_sha256 == wanted.split_sha256


def test_samples_that_a_run_never_saw_are_left_out_of_its_parts(tiny_data: Callable[..., Path], tmp_path: Path) -> None:
    manifest = load_manifest(tiny_data(), settings=DataSettings())
    known = replace(manifest, samples=manifest.samples[:-3])
    save_split(known, tmp_path / "split.csv")
    found = load_manifest(manifest.root, settings=DataSettings(), run_split=tmp_path / "split.csv")
    assert [s.name for s in found.samples] == [s.name for s in known.samples]


def test_another_data_set_of_the_same_names_keeps_the_default_rule(
    tiny_data: Callable[..., Path], tmp_path: Path
) -> None:
    save_split(swapped(load_manifest(tiny_data(seed=1), settings=DataSettings())), tmp_path / "split.csv")
    plain = load_manifest(tiny_data(seed=2), settings=DataSettings())
    found = load_manifest(plain.root, settings=DataSettings(), run_split=tmp_path / "split.csv")
    assert found.split_sha256 == plain.split_sha256


def test_a_resumed_fine_tuning_keeps_the_autoencoder_it_began_with(
    tiny_data: Callable[..., Path], tiny_settings: Settings, tiny_pipeline: LeafPipeline, tmp_path: Path
) -> None:
    source, run, data = tmp_path / "source", tmp_path / "run", tiny_data()
    tiny_pipeline.save_pretrained(source)
    run_training(tiny_settings, data, run, init_from=str(source), stop_after=1)
    run_training(tiny_settings, data, run, init_from=str(source), resume=True)
    theirs = LeafPipeline.from_pretrained(source).vae.state_dict()
    for name, value in LeafPipeline.from_pretrained(run).vae.state_dict().items():
        assert torch.equal(value, theirs[name]), name


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU trains in fp16")
def test_training_in_fp16_without_a_gpu_is_refused_in_a_sentence() -> None:
    with pytest.raises(ConfigError, match="needs a GPU"):
        resolve_precision("fp16")
