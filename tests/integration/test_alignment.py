"""Training with a teacher: a small random DINOv2 in a folder, live and cached."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from leafseg.runs import checkpoint_folder, checkpoint_steps
from leafseg.training.tracking import read_metrics
from leafseg.training.trainer import TrainingResult

Train = Callable[..., TrainingResult]


@pytest.fixture(scope="module")
def aligned(teacher: Path) -> tuple[str, ...]:
    """Settings of a training with a teacher and without augmentation or dropout."""
    return (
        f"teacher.name={teacher}", "objective.alignment_weight=0.5", "training.validations=0", "training.steps=4",
        "data.augmentation.horizontal_flip=false", "model.unet.dropout=0", "model.image_encoder_dropout=0",
    )  # fmt: skip


def alignment(run: Path) -> list[float]:
    return [line["train/alignment"] for line in read_metrics(run)]


@pytest.mark.parametrize("features", ["live", "cached"])
def test_the_alignment_improves_in_a_short_training(
    train_tiny: Train, data: Path, tmp_path: Path, aligned: tuple[str, ...], features: str
) -> None:
    train_tiny(
        data, tmp_path, *aligned, f"teacher.features={features}", "training.steps=40", "training.save_every=1000"
    )
    values = alignment(tmp_path)
    assert [line["step"] for line in read_metrics(tmp_path)] == [10, 20, 30, 40]
    assert all(-1 <= value <= 1 for value in values)
    assert values[-1] < values[0] - 0.1  # -1 is perfect agreement


def test_cached_and_live_features_agree_where_nothing_is_augmented(
    train_tiny: Train, data: Path, tmp_path: Path, aligned: tuple[str, ...]
) -> None:
    for features in ("live", "cached"):
        train_tiny(data, tmp_path / features, *aligned, f"teacher.features={features}", "training.steps=1")
    live, cached = (read_metrics(tmp_path / name)[0] for name in ("live", "cached"))
    # Half precision keeps 11 bits; the image itself is the same bytes in both.
    assert cached["train/alignment"] == pytest.approx(live["train/alignment"], abs=2e-3)
    assert cached["train/prediction"] == live["train/prediction"]


def test_a_training_with_cached_features_resumes_exactly_when_the_cache_is_gone(
    train_tiny: Train,
    data: Path,
    tmp_path: Path,
    aligned: tuple[str, ...],
    same_checkpoint: Callable[[Path, Path, int], None],
) -> None:
    settings = (
        *aligned, "teacher.features=cached", "data.augmentation.horizontal_flip=true",
        "data.augmentation.rotation_degrees=20", "data.augmentation.mix=0.5", "model.unet.dropout=0.1",
    )  # fmt: skip
    train_tiny(data, tmp_path / "whole", *settings)
    train_tiny(data, tmp_path / "cut", *settings, stop_after=2)
    shutil.rmtree(tmp_path / "cut" / "features")
    train_tiny(data, tmp_path / "cut", *settings, resume=True)
    same_checkpoint(tmp_path / "whole", tmp_path / "cut", 4)


def test_a_cache_that_is_damaged_or_lies_elsewhere_changes_no_bit(
    train_tiny: Train,
    data: Path,
    tmp_path: Path,
    aligned: tuple[str, ...],
    same_checkpoint: Callable[[Path, Path, int], None],
) -> None:
    settings = (*aligned, "teacher.features=cached")
    train_tiny(data, tmp_path / "whole", *settings)
    train_tiny(data, tmp_path / "cut", *settings, stop_after=2)
    for path in (tmp_path / "cut" / "features").rglob("*.npy"):
        path.write_bytes(path.read_bytes()[:-1])
    # A cache elsewhere is no other training.
    train_tiny(data, tmp_path / "cut", *settings, f"teacher.cache_dir={tmp_path / 'elsewhere'}", resume=True)
    same_checkpoint(tmp_path / "whole", tmp_path / "cut", 4)


def test_neither_projector_nor_teacher_is_in_the_saved_model(
    train_tiny: Train, data: Path, tmp_path: Path, aligned: tuple[str, ...]
) -> None:
    from safetensors.torch import load_file

    train_tiny(data, tmp_path, *aligned, "training.steps=1")
    (step,) = checkpoint_steps(tmp_path)
    folder = checkpoint_folder(tmp_path, step)
    assert {p.name for p in (folder / "pipeline").iterdir() if p.is_dir()} == {
        "unet", "vae", "image_encoder", "scheduler",
    }  # fmt: skip
    trained = load_file(folder / "trainer" / "weights.safetensors")
    kinds = {name.split(".")[0] for name in trained}
    assert kinds == {"unet", "image_encoder", "projector"}
    saved = {
        f"{part}.{name}"
        for part in ("unet", "image_encoder")
        for name in load_file(folder / "pipeline" / part / "diffusion_pytorch_model.safetensors")
    }
    assert saved == {name for name in trained if not name.startswith("projector.")}
    index = (folder / "pipeline" / "model_index.json").read_text()
    assert "projector" not in index
    assert "teacher" not in index


def test_a_teacher_that_is_no_folder_is_refused_without_asking_the_network(
    train_tiny: Train, data: Path, tmp_path: Path, aligned: tuple[str, ...]
) -> None:
    from leafseg.errors import ConfigError

    with pytest.raises(ConfigError, match="no such folder"):
        train_tiny(data, tmp_path / "run", *aligned, f"teacher.name={tmp_path / 'nowhere'}")


def test_the_released_second_division_is_by_the_whole_batch_however_it_is_cut(
    train_tiny: Train, data: Path, tmp_path: Path, aligned: tuple[str, ...]
) -> None:
    one = (*aligned, "training.steps=1", "training.batch_size=4")
    released = (*one, "objective.alignment_reduction=mean_over_batch")
    train_tiny(data, tmp_path / "mean", *one)
    train_tiny(data, tmp_path / "whole", *released)
    train_tiny(data, tmp_path / "cut", *released, "training.micro_batch_size=1")
    mean, whole, cut = (alignment(tmp_path / name)[0] for name in ("mean", "whole", "cut"))
    assert whole == pytest.approx(mean / 4, rel=1e-4)
    assert cut == pytest.approx(mean / 4, rel=1e-4)


def test_a_start_from_a_model_of_another_schedule_says_so(
    train_tiny: Train, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train_tiny(data, tmp_path / "first", "training.steps=1", "training.validations=0")
    caplog.clear()
    again = ("training.steps=1", "training.validations=0")
    train_tiny(data, tmp_path / "same", *again, init_from=str(tmp_path / "first"))
    assert "another noise schedule" not in caplog.text
    train_tiny(data, tmp_path / "other", *again, "scheduler.beta_schedule=linear", init_from=str(tmp_path / "first"))
    assert "beta_schedule scaled_linear there, linear here" in caplog.text
