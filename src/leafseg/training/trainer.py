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
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object
from diffusers.training_utils import EMAModel
from torch import nn
from torch.utils.data import DataLoader

from leafseg import rng
from leafseg.config import TrainingSettings
from leafseg.data.dataset import PositionSampler
from leafseg.errors import CheckpointError, ConfigError
from leafseg.files import write_json_atomic
from leafseg.progress import progress_bar
from leafseg.runs import RUN_FILE, best_checkpoint, checkpoint_folder, checkpoint_steps
from leafseg.training.checkpoint import (
    TrainerState,
    link_best,
    load_checkpoint,
    remove_other_checkpoints,
    save_checkpoint,
)
from leafseg.training.loading import loading_errors, obey_the_trainer_alone, signals_held_back
from leafseg.training.precision import resolve_precision
from leafseg.training.task import TrainingTask, Validation
from leafseg.training.tracking import Tracker

log = logging.getLogger(__name__)

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
    AcceleratorState._reset_state()  # accelerate keeps one precision per process; runs of one process may differ
    accelerator = Accelerator(
        mixed_precision=resolve_precision(settings.precision),
        cpu=not torch.cuda.is_available(),
        step_scheduler_with_optimizer=False,
    )
    main = accelerator.is_main_process

    # --- what can be refused is refused before any work is done
    if settings.steps is None and settings.minutes is None:
        raise ConfigError("no budget: set --steps or --minutes")
    local = settings.batch_size // accelerator.num_processes
    micro = max(1, min(settings.micro_batch_size or local, local))
    if local * accelerator.num_processes != settings.batch_size or local % micro:
        raise ConfigError(
            f"training.batch_size is {settings.batch_size}; it must be a multiple of {accelerator.num_processes} "
            f"process(es) times training.micro_batch_size {micro}"
        )
    micro_steps = local // micro

    # --- the run's folder: new, or the same training as before
    run_file = run / RUN_FILE
    stored = _read_run(run_file)
    if stored is not None:
        if not resume:
            raise ConfigError(
                f"{run}: already holds a training; continue it with --resume auto or choose another --out"
            )
        _same_record(run_file, stored["record"], record)
    last = checkpoint_steps(run)[-1] if stored is not None and checkpoint_steps(run) else None

    # --- modules, optimizer, EMA
    torch.manual_seed(settings.seed)  # nothing draws from it; a module that did would at least do so repeatably
    module = task.module.to(accelerator.device)
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing from torch's stubs
    task.prepare(accelerator.device, accelerator.autocast, run)
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(_parameter_groups(module, settings), lr=settings.learning_rate, fused=True)
    ema = EMAModel(parameters, decay=settings.ema_decay, foreach=True)
    ema.to(device=accelerator.device)
    best: tuple[float, int] | None = None
    step = 0
    if last is not None:
        checkpoint = load_checkpoint(checkpoint_folder(run, last))
        _load_weights(module, checkpoint.weights, checkpoint_folder(run, last))
        optimizer.load_state_dict(checkpoint.optimizer)
        ema.load_state_dict({"shadow_params": checkpoint.ema, "optimization_step": checkpoint.state.ema_step})
        ema.to(device=accelerator.device)
        if accelerator.scaler is not None and checkpoint.scaler is not None:
            accelerator.scaler.load_state_dict(checkpoint.scaler)
        step = checkpoint.state.step
        if checkpoint.state.best_score is not None and checkpoint.state.best_step is not None:
            best = (checkpoint.state.best_score, checkpoint.state.best_step)
        del checkpoint  # its weights would stay in memory for the whole training
    prepared, optimizer = accelerator.prepare(module, optimizer)

    # --- batches: a stream of global sample positions, cut by process and micro-batch
    def batches(first_step: int, steps: int) -> Iterator[list[dict[str, torch.Tensor]]]:
        """The micro-batches of each optimizer step."""
        sampler = PositionSampler(
            n=len(task.dataset),  # type: ignore[arg-type]
            seed=settings.seed,
            start_position=first_step * settings.batch_size,
            batch_size_global=settings.batch_size,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            micro_batch=micro,
            num_steps=steps,
        )
        loader = DataLoader(
            task.dataset,
            batch_sampler=sampler,
            num_workers=workers,
            multiprocessing_context="spawn" if workers else None,  # fork after torch's thread pool may hang
            worker_init_fn=obey_the_trainer_alone,
            pin_memory=accelerator.device.type == "cuda",
        )
        parts = []
        with signals_held_back(workers > 0):
            iterator = iter(loader)
        for batch in iterator:
            parts.append({k: v.to(accelerator.device, non_blocking=True) for k, v in batch.items()})
            if len(parts) == micro_steps:
                yield parts
                parts = []

    def backward(parts: list[dict[str, torch.Tensor]], at_step: int) -> dict[str, float]:
        """Gradients of one optimizer step; the mean of each loss part over its micro-batches and processes."""
        sums: dict[str, float] = defaultdict(float)
        for index, batch in enumerate(parts):
            with accelerator.no_sync(prepared) if index < micro_steps - 1 else nullcontext(), torch.random.fork_rng():
                # Dropout only knows torch's own generator: seed it for this micro-batch alone.
                position = (at_step * micro_steps + index) * accelerator.num_processes + accelerator.process_index
                torch.manual_seed(rng.torch_seed(settings.seed, "dropout", position))
                losses = task.loss(prepared, batch, settings.seed)
                accelerator.backward(losses["loss"] / micro_steps)
            for name, value in losses.items():
                sums[name] += float(value.detach()) / micro_steps
        if accelerator.num_processes > 1:  # DDP averages gradients; the figures are averaged here
            mean = accelerator.reduce(torch.tensor(list(sums.values()), device=accelerator.device), "mean")
            return dict(zip(sums, mean.tolist(), strict=True))
        return sums

    def with_ema(action: Any) -> Any:
        """Run an action on the EMA weights in eval mode; raw weights and train mode return whatever happens."""
        ema.store(parameters)
        ema.copy_to(parameters)
        module.eval()
        try:
            with torch.no_grad():
                return action()
        finally:
            ema.restore(parameters)
            module.train()

    def validate() -> Validation:
        rank, world = accelerator.process_index, accelerator.num_processes
        rows = with_ema(lambda: task.validate(settings.validation_samples, rank, world))
        return task.summarise(gather_object(rows) if world > 1 else rows)

    # --- budget: minutes become steps once, and the number is stored, so that the schedule can resume
    module.train()
    if stored is not None:
        total = settings.steps or int(stored["total_steps"])
        if total < step:
            raise ConfigError(f"{run}: --steps is {total}, but the run is at step {step}; give at least as many")
        if settings.steps is None:
            log.info("%s: the budget was turned into %d steps when the run began, and stays", run, total)
    elif settings.steps is not None:
        total = settings.steps
    else:
        with loading_errors():
            total, calibration = _calibrate(settings, started, batches, backward, validate, optimizer, accelerator)
        record = {**record, "calibration": calibration}
    if main:
        kept = {**(stored["record"] if stored else {}), **record}
        write_json_atomic(run_file, {"kind": task.kind, "total_steps": total, "record": kept})
    accelerator.wait_for_everyone()
    validate_at = _evenly_spaced(total, settings.validations)
    warmup = settings.warmup_steps if settings.schedule == "constant" else min(settings.warmup_steps, total // 10)

    def save() -> None:
        if main:
            state = TrainerState(
                step=step,
                total_steps=total,
                best_step=best[1] if best else None,
                best_score=best[0] if best else None,
                ema_step=ema.optimization_step,
            )
            with_ema(
                lambda: save_checkpoint(
                    run,
                    state=state,
                    # with_ema has put the EMA weights into the module: the raw ones are in its store.
                    weights=_raw_state(module, parameters, ema.temp_stored_params),
                    ema=ema.shadow_params,
                    optimizer=optimizer.state_dict(),
                    scaler=accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
                    write_inference=lambda folder: task.save_inference(folder / task.pipeline_folder),
                )
            )
            link_best(run, task.pipeline_folder)
            remove_other_checkpoints(run, {step} | ({best[1]} if best else set()))
        accelerator.wait_for_everyone()

    # --- the loop
    status: Literal["finished", "interrupted", "stopped"] = "finished"
    first_step, loop_started, saved_step = step, time.monotonic(), last
    end = total if stop_after is None else min(total, stop_after)
    with (
        loading_errors(),
        _signals() as signalled,
        Tracker(run, start_step=step) if main else nullcontext() as tracker,
        progress_bar(task.kind, total=total, done=step, show=main) as bar,
    ):
        since, window = time.monotonic(), 0
        for parts in batches(step, max(end - step, 0)):
            rate = learning_rate(settings, step, total, warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate
            losses = backward(parts, step)
            if not math.isfinite(losses["loss"]):
                raise ConfigError(
                    f"the loss became {losses['loss']} at step {step}; lower training.learning_rate or use "
                    f"training.precision=fp32, then continue from the last checkpoint in {run} with --resume auto"
                )
            norm = accelerator.clip_grad_norm_(parameters, settings.clip_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            ema.step(parameters)
            step += 1
            window += settings.batch_size
            bar.advance(f"loss {losses['loss']:.3f}")
            interrupted = _agree(accelerator, signalled())
            last_step = interrupted or step == end
            validating = step in validate_at
            if tracker is not None and (step % 10 == 0 or validating or last_step):
                now = time.monotonic()
                figures = {f"train/{k}": v for k, v in losses.items()}
                figures |= {"train/learning_rate": rate, "train/gradient_norm": float(norm)}
                tracker.log(step, {**figures, "train/samples_per_second": window / (now - since)})
                since, window = now, 0
            if validating:
                result = validate()
                if best is None or result.score > best[0]:
                    best = (result.score, step)
                if tracker is not None:
                    figures = {f"validation/{k}": v for k, v in result.metrics.items()}
                    tracker.log(step, {**figures, "validation/score": result.score})
                bar.note("validation " + ", ".join(f"{k} {v:.4f}" for k, v in result.metrics.items()))
                since, window = time.monotonic(), 0
            due = validating if settings.save_every is None else step % settings.save_every == 0
            if due or validating or last_step:
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


def _parameter_groups(module: nn.Module, settings: TrainingSettings) -> list[dict[str, Any]]:
    """Weight decay for matrices and kernels only: norms and biases (one-dimensional) keep their scale."""
    trained = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _evenly_spaced(total: int, count: int) -> set[int]:
    return {round(total * (i + 1) / count) for i in range(count)} - {0} if count else set()


def _calibrate(
    settings: TrainingSettings,
    started: float,
    batches: Any,
    backward: Any,
    validate: Any,
    optimizer: Any,
    accelerator: Accelerator,
) -> tuple[int, dict[str, float]]:
    """Steps that fit the minutes: times a few steps (nothing is updated) and one validation."""
    minutes = settings.minutes or 0.0
    times = []
    begin = time.monotonic()
    for parts in batches(0, _CALIBRATION_WARMUP + _CALIBRATION_STEPS):  # loading counts: it delays steps as well
        backward(parts, 0)
        optimizer.zero_grad(set_to_none=True)
        times.append(time.monotonic() - begin)
        begin = time.monotonic()
    step_seconds = sorted(times[_CALIBRATION_WARMUP:])[_CALIBRATION_STEPS // 2]
    begin = time.monotonic()
    if settings.validations:
        validate()
    validation_seconds = time.monotonic() - begin
    used = time.monotonic() - started
    left = (minutes * 60 - used) * _PLANNED_SHARE - validation_seconds * settings.validations
    total = max(int(left / step_seconds), 1)
    if accelerator.num_processes > 1:  # every process must run the same number
        total = (
            int(accelerator.reduce(torch.tensor(total, device=accelerator.device), "sum")) // accelerator.num_processes
        )
    return total, {
        "minutes": minutes,
        "seconds_per_step": round(step_seconds, 4),
        "seconds_per_validation": round(validation_seconds, 2),
        "seconds_before_training": round(used, 1),
        "steps": total,
    }


def _raw_state(module: nn.Module, parameters: list[nn.Parameter], raw: Any) -> dict[str, torch.Tensor]:
    by_id = {id(p): value for p, value in zip(parameters, raw, strict=True)}
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: by_id.get(id(value), value.detach()) for name, value in named.items()}


def _load_weights(module: nn.Module, weights: dict[str, torch.Tensor], folder: Path) -> None:
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(
            f"{folder}: the checkpoint has other weights than these settings build ({str(error).splitlines()[0]}); "
            "resume with the settings it was made with"
        ) from error


def _read_run(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        stored = json.loads(path.read_text())
        stored["record"], stored["total_steps"]
        return dict(stored)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a readable run record; restore it or choose another --out") from error


# What may change between the parts of one training: another budget is the user's wish, the rest changes no numbers (the
# micro-batch not without dropout).
_FREE = ("settings.training.steps", "settings.training.minutes", "settings.data.workers", "settings.data.cache_mb",
         "settings.training.save_every", "settings.training.validations", "settings.training.validation_samples",
         "settings.training.micro_batch_size", "settings.teacher.cache_dir", "settings.teacher.cache_mb")  # fmt: skip


def _same_record(path: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    before, after = _flat(old), _flat(new)
    names = sorted(n for n in after if before.get(n) != after[n] and n not in _FREE)
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


def _agree(accelerator: Accelerator, flag: bool) -> bool:
    """Whether any process got a signal: all must stop at the same step."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(int(flag), device=accelerator.device), "sum") > 0)


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
