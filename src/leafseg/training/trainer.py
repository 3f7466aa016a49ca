"""One training loop, read top to bottom, for every task.

Nothing random happens here: batches, noise and augmentation are functions of (seed, global sample position), dropout of
(seed, step, micro-batch). The learning rate is a function of the step. A run can therefore stop after any step and
continue bit for bit (one machine, one set of versions, one thread count).
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from leafseg.config import Settings, TrainingSettings
from leafseg.errors import CheckpointError, ConfigError
from leafseg.files import write_json_atomic
from leafseg.progress import progress_bar
from leafseg.runs import RUN_FILE, best_checkpoint, checkpoint_folder, checkpoint_steps, has_trainer_state
from leafseg.training.checkpoint import (
    TrainerState,
    link_best,
    open_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from leafseg.training.loading import loading_errors
from leafseg.training.session import Session
from leafseg.training.task import TrainingTask
from leafseg.training.tracking import Tracker

log = logging.getLogger(__name__)

_SAVES, _STEPS_BETWEEN_SAVES = 50, 25  # over a run without evenly spaced validations; the latter at least
_CALIBRATION_WARMUP, _CALIBRATION_STEPS = 2, 6
# Share of a budget in minutes that is planned; the rest covers the optimizer, checkpoints and a slower machine.
_PLANNED_SHARE = 0.94


@dataclass(frozen=True)
class TrainingResult:
    """How a training ended."""

    status: Literal["finished", "interrupted", "stopped"]
    step: int
    total_steps: int
    best_step: int | None
    best_score: float | None
    seconds: float
    samples_per_second: float
    checkpoint: Path
    """The best checkpoint's folder."""


def train(
    task: TrainingTask,
    settings: TrainingSettings,
    run: Path,
    *,
    record: dict[str, Any],
    workers: int = 0,
    resume: bool = False,
    stop_after: int | None = None,
) -> TrainingResult:
    """Train a task, or continue it.

    Args:
        task: what is trained.
        settings: how; exactly one of ``steps`` and ``minutes`` is set.
        run: folder for checkpoints, logs and ``run.json``.
        record: plain values stored in ``run.json``; a resumed run must have the same, apart from the budget.
        workers: data loading processes.
        resume: continue from the last checkpoint if there is one.
        stop_after: save and stop after this step, as a signal would (the schedule keeps the whole budget).

    Raises:
        ConfigError: if the run exists and ``resume`` is False, or was made with other settings; if there is no budget,
            the batch cannot be cut as asked, or the loss stops being a number.
        DataError: if a sample cannot be read any more, a loading process dies, or the log cannot be written.
        CheckpointError: if a checkpoint is damaged or cannot be written.
    """
    started = time.monotonic()
    # --- what can be refused is refused before any work is done
    if settings.steps is None and settings.minutes is None:
        raise ConfigError("no budget: set --steps or --minutes")

    # --- the run's folder: new, or the same training as before
    run_file = run / RUN_FILE
    stored = _read_run(run_file)
    if stored is not None:
        if not resume:
            raise ConfigError(
                f"{run}: already holds a training; continue it with --resume auto or choose another --out"
            )
        _same_record(run_file, stored["record"], record)
    last = last_trainer_state(run) if stored is not None else None

    # --- modules, optimizer, EMA; then what the last checkpoint holds of them
    session = Session(task, settings, run, workers=workers)
    best: tuple[float, int] | None = None
    step = 0
    if last is not None:
        state = session.load(checkpoint_folder(run, last))
        step = state.step
        if state.best_score is not None and state.best_step is not None:
            best = (state.best_score, state.best_step)

    # --- budget: minutes become steps once, and the number is stored, so that the schedule can resume
    if stored is not None:
        total = settings.steps or int(stored["total_steps"])
        if total < step:
            raise ConfigError(f"{run}: --steps is {total}, but the run is at step {step}; give at least as many")
        if settings.steps is None:
            _explain_kept_budget(run, total, stored["record"], settings)
    elif settings.steps is not None:
        total = settings.steps
    else:
        with loading_errors():
            total, calibration = calibrate(session, started)
        record = {**record, "calibration": calibration}
    if session.is_main:
        kept = {**(stored["record"] if stored else {}), **record}
        write_json_atomic(run_file, {"kind": task.kind, "total_steps": total, "record": kept})
    session.accelerator.wait_for_everyone()
    validate_at = validation_steps(settings, total)
    save_at = saving_steps(settings, total)
    warmup = settings.warmup_steps if settings.schedule == "constant" else min(settings.warmup_steps, total // 10)

    def save() -> None:
        if session.is_main:
            scaler = session.accelerator.scaler
            before = checkpoint_steps(run)
            earlier = checkpoint_folder(run, before[-1]) / task.pipeline_folder if before else None
            session.with_ema(
                lambda: save_checkpoint(
                    run,
                    state=TrainerState(
                        step=step,
                        total_steps=total,
                        best_step=best[1] if best else None,
                        best_score=best[0] if best else None,
                        ema_step=session.ema.optimization_step,
                    ),
                    weights=session.raw_weights(),
                    ema=session.averages(),
                    optimizer=session.optimizer.state_dict(),
                    scaler=scaler.state_dict() if scaler is not None else None,
                    write_inference=lambda folder: task.save_inference(folder / task.pipeline_folder, earlier=earlier),
                )
            )
            link_best(run, task.pipeline_folder)
            prune_checkpoints(run, last=step, best=best[1] if best else None)
        session.accelerator.wait_for_everyone()

    # --- the loop
    status: Literal["finished", "interrupted", "stopped"] = "finished"
    first_step, loop_started, saved_step = step, time.monotonic(), last
    end = total if stop_after is None else min(total, stop_after)
    with (
        loading_errors(),
        _signals() as signalled,
        Tracker(run, start_step=step) if session.is_main else nullcontext() as tracker,
        progress_bar(task.kind, total=total, done=step, show=session.is_main) as bar,
    ):
        since, window = time.monotonic(), 0
        for parts in session.batches(step, max(end - step, 0)):
            rate = learning_rate(settings, step, total, warmup)
            session.module.train(in_train_mode(settings, step, session.samples))
            losses = session.backward(parts, step)
            if not math.isfinite(losses["loss"]):
                raise ConfigError(
                    f"the loss became {losses['loss']} at step {step}; lower training.learning_rate or use "
                    f"training.precision=fp32, then continue from the last checkpoint in {run} with --resume auto"
                )
            norm = session.update(rate)
            step += 1
            window += settings.batch_size
            bar.advance(f"loss {losses['loss']:.3f}")
            interrupted = session.agree(signalled())
            last_step = interrupted or step == end
            validating, improved = step in validate_at, False
            if tracker is not None and (step % 10 == 0 or validating or last_step):
                now = time.monotonic()
                figures = {f"train/{k}": v for k, v in losses.items()}
                figures |= {"train/learning_rate": rate, "train/gradient_norm": norm}
                tracker.log(step, {**figures, "train/samples_per_second": window / (now - since)})
                since, window = now, 0
            if validating:
                result = session.validate()
                improved = best is None or result.score > best[0]
                if improved:
                    best = (result.score, step)
                if tracker is not None:
                    figures = {f"validation/{k}": v for k, v in result.metrics.items()}
                    tracker.log(step, {**figures, "validation/score": result.score})
                bar.note("validation " + ", ".join(f"{k} {v:.4f}" for k, v in result.metrics.items()))
                since, window = time.monotonic(), 0
            if step in save_at or improved or last_step:
                save()
                saved_step = step
            if interrupted:
                break
    if step < total:
        status = "stopped" if step >= end else "interrupted"
    if saved_step is None:
        save()
    seconds = time.monotonic() - loop_started
    return TrainingResult(
        status=status,
        step=step,
        total_steps=total,
        best_step=best[1] if best else None,
        best_score=best[0] if best else None,
        seconds=time.monotonic() - started,
        samples_per_second=(step - first_step) * settings.batch_size / max(seconds, 1e-9),
        checkpoint=best_checkpoint(run),
    )


def learning_rate(settings: TrainingSettings, step: int, total: int, warmup: int) -> float:
    """The rate of optimizer step ``step`` (0-based): linear warm-up, then constant or a cosine to zero."""
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    if settings.schedule == "constant":
        return settings.learning_rate
    share = (step - warmup) / max(total - warmup, 1)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


def in_train_mode(settings: TrainingSettings, step: int, samples: int) -> bool:
    """Whether optimizer step ``step`` (0-based) is taken with dropout.

    As the released code does it (``next_epoch``), a validation turns dropout off until the next pass over the training
    set begins: until the first step whose first sample lies in it. A function of the step: a resumed run agrees.
    """
    every = settings.validate_every
    if settings.train_mode_after_validation == "at_once" or every is None:
        return True
    newest = step // every * every  # validations stand after so many steps
    if newest == 0 or newest < settings.validate_from:
        return True
    validated_in, now = ((s * settings.batch_size) // samples for s in (newest - 1, step))
    return now > validated_in


def validation_steps(settings: TrainingSettings, total: int) -> set[int]:
    """The numbers of done steps after which a validation is due."""
    if settings.validate_every is not None:
        return {
            s for s in range(settings.validate_every, total + 1, settings.validate_every) if s >= settings.validate_from
        }
    count = settings.validations
    return {round(total * (i + 1) / count) for i in range(count)} - {0} if count else set()


def saving_steps(settings: TrainingSettings, total: int) -> set[int]:
    """Steps after which a checkpoint is due, besides the last one and every new best.

    Without ``save_every``: at evenly spaced validations; where there are none, or others, every fiftieth of the run, so
    that a kill never costs more.
    """
    if settings.save_every is not None:
        return set(range(settings.save_every, total + 1, settings.save_every)) | (
            validation_steps(settings, total) if settings.validate_every is None else set()
        )
    if settings.validate_every is None and settings.validations > 0:
        return validation_steps(settings, total)
    every = max(total // _SAVES, _STEPS_BETWEEN_SAVES)
    return set(range(every, total + 1, every))


def calibrate(session: Session, started: float) -> tuple[int, dict[str, float]]:
    """Steps that fit the minutes: times a few steps (nothing is updated) and one validation.

    Args:
        session: what will train.
        started: when the budget began, on time.monotonic's clock.
    """
    settings = session.settings
    minutes = settings.minutes or 0.0
    times = []
    begin = time.monotonic()
    for parts in session.batches(0, _CALIBRATION_WARMUP + _CALIBRATION_STEPS):  # loading counts: it delays steps too
        session.backward(parts, 0)
        session.optimizer.zero_grad(set_to_none=True)
        times.append(time.monotonic() - begin)
        begin = time.monotonic()
    step_seconds = sorted(times[_CALIBRATION_WARMUP:])[_CALIBRATION_STEPS // 2]
    begin = time.monotonic()
    if settings.validates:
        session.validate()
    validation_seconds = time.monotonic() - begin
    used = time.monotonic() - started
    left = (minutes * 60 - used) * _PLANNED_SHARE
    total = session.mean_over_processes(_steps_in(left, settings, step_seconds, validation_seconds))
    return total, {
        "minutes": minutes,
        "seconds_per_step": round(step_seconds, 4),
        "seconds_per_validation": round(validation_seconds, 2),
        "seconds_before_training": round(used, 1),
        "steps": total,
    }


def _steps_in(seconds: float, settings: TrainingSettings, step: float, validation: float) -> int:
    """Steps that fit some seconds, with the validations that are due among them; at least one."""
    if settings.validate_every is None:
        return max(int((seconds - validation * settings.validations) / step), 1)
    before = seconds / step
    if before > settings.validate_from:
        rest = seconds - settings.validate_from * step
        before = settings.validate_from + rest / (step + validation / settings.validate_every)
    return max(int(before), 1)


def last_trainer_state(run: Path) -> int | None:
    """Step of the newest checkpoint that a training can continue from; None if nothing was saved yet.

    Raises:
        CheckpointError: if there are checkpoints, and none holds the trainer's state any more.
    """
    steps = checkpoint_steps(run)
    whole = [step for step in steps if has_trainer_state(checkpoint_folder(run, step))]
    if steps and not whole:
        newest = open_checkpoint(checkpoint_folder(run, steps[-1]))
        for read in (newest.weights, newest.ema, newest.optimizer):
            read()  # one of them says what is missing, and what to do
    return whole[-1] if whole else None


def _read_run(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        stored = json.loads(path.read_text())
        stored["record"], stored["total_steps"]
        return dict(stored)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a readable run record; restore it or choose another --out") from error


def _explain_kept_budget(run: Path, total: int, record: dict[str, Any], settings: TrainingSettings) -> None:
    minutes = record.get("calibration", {}).get("minutes")
    if minutes is not None and settings.minutes not in (None, minutes):
        log.warning(
            "%s: minutes was %g when the run began and is %g now; the %d steps that it was turned into stay: give "
            "--steps to change them",
            run, minutes, settings.minutes, total,
        )  # fmt: skip
    else:
        log.info("%s: the budget was turned into %d steps when the run began, and stays", run, total)


# What may change between the parts of one training: another budget is the user's wish, the rest changes no numbers (the
# micro-batch not without dropout).
_FREE = ("settings.training.steps", "settings.training.minutes", "settings.data.workers", "settings.data.cache_mb",
         "settings.training.save_every", "settings.training.validations", "settings.training.validation_samples",
         "settings.training.micro_batch_size", "settings.training.gradient_checkpointing",
         "settings.training.latent_cache_mb", "settings.teacher.cache_dir", "settings.teacher.cache_mb",
         "settings.inference.presence")  # fmt: skip
# What a training did before such a setting existed, where that is not the setting's default.
_BEFORE_IT_EXISTED = {"settings.coarse_share": 0.0, "settings.pairs": 0}
# Free as well, unless they decide when dropout acts.
_FREE_AT_ONCE = ("settings.training.validate_every", "settings.training.validate_from")


def _same_record(path: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    before, after = _flat(old), _flat(new)
    # A setting that did not exist when the run began: its default is what was done before it.
    defaults = {f"settings.{n}": v for n, v in _flat(Settings().model_dump(mode="json")).items()}
    before = {**defaults, **_BEFORE_IT_EXISTED, **before}
    at_once = after.get("settings.training.train_mode_after_validation", "at_once") == "at_once"
    free = {*_FREE, *(_FREE_AT_ONCE if at_once else ())}
    names = sorted(n for n in after if before.get(n) != after[n] and n not in free)
    # An upgrade of a library changes last bits, not the training: no reason to lose a run.
    for name in [n for n in names if n.startswith("versions.")]:
        log.warning("%s was %s and is %s now: the rest may differ in last bits", name, before.get(name), after[name])
        names.remove(name)
    if names:
        changes = ", ".join(f"{n}: {before.get(n)!r} then, {after[n]!r} now" for n in names[:4])
        raise ConfigError(
            f"{path}: made with other settings ({changes}); resume with the same, or choose another --out"
        )


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(values, dict):
        return {k: v for name, value in values.items() for k, v in _flat(value, f"{prefix}{name}.").items()}
    return {prefix.removesuffix("."): values}


@contextmanager
def _signals() -> Iterator[Any]:
    """SIGINT and SIGTERM ask for a save and a clean end after the current step; a second one ends at once."""
    received: list[int] = []

    def handle(number: int, _frame: Any) -> None:
        if received:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        received.append(number)
        log.warning("stopping after this step; a checkpoint is saved")

    try:
        previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: the caller owns the signals
        previous = {}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
