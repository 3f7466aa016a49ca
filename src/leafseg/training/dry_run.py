"""What a training will be, measured: everything is built and tried, nothing is kept."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from leafseg.config import Settings
from leafseg.data.manifest import Manifest, load_manifest
from leafseg.errors import ConfigError
from leafseg.model.build import count_parameters
from leafseg.progress import progress_bar
from leafseg.training.loading import loading_errors
from leafseg.training.optimizers import optimizer_bytes
from leafseg.training.run import make_task
from leafseg.training.segmentation_task import SegmentationTask
from leafseg.training.session import Session
from leafseg.training.trainer import calibrate, validation_steps

# Steps are timed until they took this long together, but no more than so many: the first one warms up.
_TIMED_SECONDS, _TIMED_STEPS = 3.0, 8  # at most as many as the calibration takes


@dataclass(frozen=True)
class DryRun:
    """What a dry run found; sizes in bytes, times in seconds.

    Attributes:
        trained: parameters of what is trained and saved for inference, by part.
        frozen: of what is saved with the model, but not trained.
        training_only: of what no saved model holds (teacher, projector).
        averaged: how many parameters have a moving average.
        device, precision, processes: where and in which number format it computes.
        peak_bytes: the most memory in use so far; of the GPU where there is one, else of this process.
        trainer_bytes: a checkpoint's trainer state on disk (the last checkpoint only).
        inference_bytes: a checkpoint's model on disk.
        samples: of each part.
        steps: optimizer steps, given or from minutes.
        validations: how many are due.
        step_seconds, validation_seconds: measured; the latter for all of a validation's samples. With a budget in
            minutes both are the calibration's.
        preparation_seconds: teacher features of all training images, where they are cached.
        loss: of the first batch.
    """

    trained: Mapping[str, int]
    frozen: Mapping[str, int]
    training_only: Mapping[str, int]
    averaged: int
    device: str
    precision: str
    processes: int
    peak_bytes: int
    trainer_bytes: int
    inference_bytes: int
    samples: Mapping[str, int]
    batch_size: int
    steps: int
    validations: int
    step_seconds: float
    validation_seconds: float
    preparation_seconds: float
    loss: float

    @property
    def total_seconds(self) -> float:
        """Steps, validations and cached features; writing checkpoints comes on top."""
        return self.preparation_seconds + self.steps * self.step_seconds + self.validations * self.validation_seconds


def dry_run(
    settings: Settings,
    data: Path,
    *,
    split_file: Path | None = None,
    fold: int | None = None,
    init_from: str | None = None,
) -> DryRun:
    """Build everything, train on a few batches and validate on one image, and forget it all.

    Args:
        settings, data, split_file, fold, init_from: as :func:`leafseg.training.run.run_training` takes them.

    Raises:
        LeafsegError: in one sentence, for anything that would end the training at its start.
    """
    started = time.monotonic()
    training = settings.training
    if training.steps is None and training.minutes is None:
        raise ConfigError("no budget: set --steps or --minutes")
    # Features go to a folder that is thrown away, and only those of the batches that are tried.
    settings = settings.model_copy(update={"teacher": settings.teacher.model_copy(update={"cache_dir": None})})
    with progress_bar("dry run", total=4) as bar, tempfile.TemporaryDirectory(prefix="leafseg-dry-run-") as place:
        manifest = load_manifest(data, settings=settings.data, split_file=split_file, fold=fold)
        bar.advance("data")
        task = make_task(settings, manifest, init_from=init_from, fill_cache=False)
        session = Session(task, training, Path(place), workers=settings.data.workers)
        bar.advance("model")
        built = time.monotonic() - started
        preparation = _seconds_for_features(task, session)
        with loading_errors():
            loss, step_seconds = _try_steps(session, _TIMED_STEPS if training.steps is not None else 1)
            bar.advance("steps")
            if training.steps is not None:
                steps, validation = training.steps, _seconds_of_a_validation(session, manifest)
            else:
                # Of what was done so far, the training itself would have built everything and cached all features.
                steps, timed = calibrate(session, time.monotonic() - built - preparation)
                step_seconds, validation = timed["seconds_per_step"], timed["seconds_per_validation"]
        bar.advance("validation")
    weights = sum(value.nbytes for value in task.module.state_dict().values())
    average = sum(value.nbytes for value in session.ema.shadow_params)
    each_weight = 4 if training.inference_dtype == "fp32" else 2
    trained, frozen = _counted(task.trained_parts), _counted(task.frozen_parts)
    return DryRun(
        trained=trained,
        frozen=frozen,
        training_only=_counted(task.training_only_parts),
        averaged=sum(value.numel() for value in session.ema.shadow_params),
        device=_device_name(session.device),
        precision={"no": "fp32"}.get(session.accelerator.mixed_precision, session.accelerator.mixed_precision),
        processes=session.accelerator.num_processes,
        peak_bytes=_peak_bytes(session.device),
        trainer_bytes=weights + average + optimizer_bytes(session.optimizer),
        inference_bytes=each_weight * sum((*trained.values(), *frozen.values())),
        samples={
            "train": len(task.dataset),
            **{name: len(manifest.part(name)) for name in ("validation", "test")},
        },
        batch_size=training.batch_size,
        steps=steps,
        validations=len(validation_steps(training, steps)),
        step_seconds=step_seconds,
        validation_seconds=validation,
        preparation_seconds=preparation,
        loss=loss,
    )


def _counted(parts: Mapping[str, nn.Module]) -> dict[str, int]:
    return {name: count_parameters(part) for name, part in parts.items()}


def describe(found: DryRun) -> list[str]:
    """Lines to print."""
    epoch = found.samples["train"] / found.batch_size
    lines = ["dry run: everything was built and tried, nothing was written"]
    for title, parts in (
        ("trained", found.trained),
        ("frozen", found.frozen),
        ("training only", found.training_only),
    ):
        if parts:
            lines.append(f"  {title:<15}" + ", ".join(f"{name} {count:,}" for name, count in parts.items()))
    lines += [
        f"  {'device':<15}{found.device}, {found.precision}, {_count(found.processes, 'process', 'processes')}",
        f"  {'memory':<15}{_size(found.peak_bytes)} at its peak",
        f"  {'on disk':<15}trainer state {_size(found.trainer_bytes)} (last checkpoint only), model "
        f"{_size(found.inference_bytes)} a checkpoint (the last and the best are kept)",
        f"  {'data':<15}" + ", ".join(f"{name} {count}" for name, count in found.samples.items()),
        f"  {'steps':<15}{found.steps:,} of {_count(found.batch_size, 'sample', 'samples')}; a pass over the training "
        f"set is {epoch:.1f} steps, {found.steps / epoch:.1f} passes in all",
        f"  {'one step':<15}{found.step_seconds:.3g} s, first loss {found.loss:.4f}",
        f"  {'validations':<15}{found.validations:,}, {found.validation_seconds:.3g} s each",
    ]
    if found.preparation_seconds:
        lines.append(f"  {'features':<15}{found.preparation_seconds:.3g} s once, before training")
    lines.append(f"  {'expected time':<15}{_duration(found.total_seconds)}, and what writing checkpoints takes")
    return lines


def _count(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _try_steps(session: Session, most: int) -> tuple[float, float]:
    """Loss of the first batch, and the seconds of a whole step: batch, gradients, optimizer, average."""
    losses, times = [], []
    begin = time.monotonic()
    for step, parts in enumerate(session.batches(0, most)):
        losses.append(session.backward(parts, step)["loss"])
        session.update(session.settings.learning_rate)
        times.append(time.monotonic() - begin)
        begin = time.monotonic()
        if len(times) > 1 and sum(times) > _TIMED_SECONDS and session.accelerator.num_processes == 1:
            break
    return losses[0], statistics.median(times[1:] or times)


def _seconds_of_a_validation(session: Session, manifest: Manifest) -> float:
    """The time of one image a process, times the images that each will have."""
    settings, processes = session.settings, session.accelerator.num_processes
    if not settings.validates:
        return 0.0
    session.validate(processes)  # warms up: kernels are made for inference as well
    begin = time.monotonic()
    session.validate(processes)
    images = min(settings.validation_samples, len(manifest.part(settings.selection_part)))
    return (time.monotonic() - begin) * -(-images // processes)


def _seconds_for_features(task: SegmentationTask, session: Session) -> float:
    """How long the teacher will take for all training images, if its features are cached: computes those that the first
    steps need, so that these are timed as later ones will be."""
    begin = time.monotonic()
    keys = [key for batch in session.sampler(0, _TIMED_STEPS) for key in batch]
    lenders = {lender for lender, box in (task.dataset.lender(*key) for key in keys) if any(box)}
    computed = task.fill_cache({index for _, index in keys} | lenders)
    seconds = time.monotonic() - begin
    return seconds / computed * len(task.dataset) if computed else 0.0


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({_count(torch.get_num_threads(), 'thread', 'threads')})"
