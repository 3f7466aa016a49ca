"""What a training runs on: processes, modules, optimizer, averaged weights, batches. The loop is in trainer.py."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.utils.data import DataLoader

from leafseg import rng
from leafseg.config import TrainingSettings
from leafseg.data.dataset import PositionSampler
from leafseg.errors import CheckpointError, ConfigError
from leafseg.model.group_norm import use_quick_group_norm
from leafseg.model.residual import use_quick_residual_blocks
from leafseg.training.checkpoint import TrainerState, open_checkpoint
from leafseg.training.loading import none_left_behind, obey_the_trainer_alone, signals_held_back
from leafseg.training.memory import keep_freed_memory
from leafseg.training.optimizers import make_optimizer
from leafseg.training.precision import resolve_precision
from leafseg.training.task import TrainingTask, Validation

Result = TypeVar("Result")


class Session:
    """One process's part in a training: the loop and the dry run go through the same one.

    Args:
        task: what is trained.
        settings: how.
        run: folder that the task may keep files in.
        workers: data loading processes.

    Raises:
        ConfigError: if the batch cannot be cut as asked, or the optimizer does not work here.
    """

    def __init__(self, task: TrainingTask, settings: TrainingSettings, run: Path, *, workers: int = 0) -> None:
        self.task, self.settings, self._workers = task, settings, workers
        AcceleratorState._reset_state()  # accelerate keeps one precision per process; runs of one process may differ
        self.accelerator = Accelerator(
            mixed_precision=resolve_precision(settings.precision),
            cpu=not torch.cuda.is_available(),
            step_scheduler_with_optimizer=False,
        )
        processes = self.accelerator.num_processes
        local = settings.batch_size // processes
        self._micro = max(1, min(settings.micro_batch_size or local, local))
        if local * processes != settings.batch_size or local % self._micro:
            raise ConfigError(
                f"training.batch_size is {settings.batch_size}; it must be a multiple of {processes} "
                f"process(es) times training.micro_batch_size {self._micro}"
            )
        self._micro_steps = local // self._micro

        torch.manual_seed(settings.seed)  # nothing draws from it; a module that did would at least do so repeatably
        self.module = task.module.to(self.device)
        # bitsandbytes reads weights as flat memory, in rows: it would undo channels_last at its first step.
        order = torch.contiguous_format if settings.optimizer == "adamw_8bit" else torch.channels_last
        self.module.to(memory_format=order)  # type: ignore[call-overload]  # missing from torch's stubs
        if self.device.type == "cpu":
            keep_freed_memory()
            use_quick_group_norm(self.module)
        use_quick_residual_blocks(self.module)
        task.prepare(self.device, self.accelerator.autocast, run)
        self._trained = [p for p in self.module.parameters() if p.requires_grad]
        self._averaged = _averaged(self.module, settings)
        self.ema = EMAModel(self._averaged, decay=settings.ema_decay, foreach=True)
        self.ema.to(device=self.device)
        self._exchanged = False
        self._forward, self.optimizer = self.accelerator.prepare(
            self.module, make_optimizer(self.module, settings, self.device)
        )
        self.module.train()

    @property
    def device(self) -> torch.device:
        device: torch.device = self.accelerator.device
        return device

    @property
    def is_main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    @property
    def samples(self) -> int:
        """Training samples: one pass over them is an epoch."""
        return len(self.task.dataset)  # type: ignore[arg-type]

    def load(self, folder: Path) -> TrainerState:
        """Take everything from a checkpoint.

        Raises:
            CheckpointError: if it is damaged, or belongs to another model.
        """
        checkpoint = open_checkpoint(folder)
        scaler = None
        try:
            # One part at a time, each copied to where it belongs and let go.
            self.module.load_state_dict(checkpoint.weights())
            for mine, stored in zip(self.ema.shadow_params, checkpoint.ema(), strict=True):
                mine.copy_(stored)
            optimizer, scaler = checkpoint.optimizer()
            self.optimizer.load_state_dict(optimizer)
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{folder}: the checkpoint has other weights than these settings build "
                f"({str(error).splitlines()[0]}); resume with the settings it was made with"
            ) from error
        self.ema.optimization_step = checkpoint.state.ema_step
        if self.accelerator.scaler is not None and scaler is not None:
            self.accelerator.scaler.load_state_dict(scaler)
        return checkpoint.state

    def sampler(self, first_step: int, steps: int) -> PositionSampler:
        """This process's share of the stream of global sample positions, cut into micro-batches."""
        return PositionSampler(
            n=self.samples,
            seed=self.settings.seed,
            start_position=first_step * self.settings.batch_size,
            batch_size_global=self.settings.batch_size,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            micro_batch=self._micro,
            num_steps=steps,
        )

    def batches(self, first_step: int, steps: int) -> Iterator[list[dict[str, Tensor]]]:
        """The micro-batches of each optimizer step."""
        loader = DataLoader(
            self.task.dataset,
            batch_sampler=self.sampler(first_step, steps),
            num_workers=self._workers,
            multiprocessing_context="spawn" if self._workers else None,  # fork after torch's thread pool may hang
            worker_init_fn=obey_the_trainer_alone,
            pin_memory=self.device.type == "cuda",
        )
        parts = []
        with none_left_behind():
            with signals_held_back(self._workers > 0):
                iterator = iter(loader)
            try:
                for batch in iterator:
                    parts.append({k: v.to(self.device, non_blocking=True) for k, v in batch.items()})
                    if len(parts) == self._micro_steps:
                        yield parts
                        parts = []
            finally:
                del iterator  # asks its processes to end, and waits some seconds for each

    def backward(self, parts: list[dict[str, Tensor]], at_step: int) -> dict[str, float]:
        """Gradients of one optimizer step; the mean of each loss part over its micro-batches and processes."""
        accelerator = self.accelerator
        sums: dict[str, float] = defaultdict(float)
        for index, batch in enumerate(parts):
            last = index == self._micro_steps - 1
            with nullcontext() if last else accelerator.no_sync(self._forward), torch.random.fork_rng():
                # Dropout only knows torch's own generator: seed it for this micro-batch alone.
                position = (at_step * self._micro_steps + index) * accelerator.num_processes + accelerator.process_index
                torch.manual_seed(rng.torch_seed(self.settings.seed, "dropout", position))
                losses = self.task.loss(self._forward, batch, self.settings.seed)
                accelerator.backward(losses["loss"] / self._micro_steps)
            for name, value in losses.items():
                sums[name] += float(value.detach()) / self._micro_steps
        if accelerator.num_processes > 1:  # DDP averages gradients; the figures are averaged here
            mean = accelerator.reduce(torch.tensor(list(sums.values()), device=self.device), "mean")
            return dict(zip(sums, mean.tolist(), strict=True))
        return sums

    def update(self, rate: float) -> float:
        """One optimizer step with the gradients that are there, and the average; returns the gradient's norm."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        norm = self.accelerator.clip_grad_norm_(self._trained, self.settings.clip_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.step(self._averaged)
        return float(norm)

    def with_ema(self, action: Callable[[], Result]) -> Result:
        """Run an action on the EMA weights in eval mode; raw weights and train mode return whatever happens."""
        self._exchange()
        self.module.eval()
        try:
            with torch.no_grad():
                return action()
        finally:
            self._exchange()
            self.module.train()

    def _exchange(self) -> None:
        """Let weights and their averages change places: no copy of either, as EMAModel's own store makes."""
        for weight, average in zip(self._averaged, self.ema.shadow_params, strict=True):
            weight.data, average.data = average.data, weight.data
        self._exchanged = not self._exchanged

    def averages(self) -> list[Tensor]:
        """The averaged weights, also inside :meth:`with_ema`."""
        return [p.detach() for p in self._averaged] if self._exchanged else list(self.ema.shadow_params)

    def raw_weights(self) -> dict[str, Tensor]:
        """The module's own weights, also inside :meth:`with_ema`."""
        kept = self.ema.shadow_params if self._exchanged else []
        raw = {id(p): value for p, value in zip(self._averaged, kept, strict=False)}
        named = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        return {name: raw.get(id(value), value.detach()) for name, value in named.items()}

    def validate(self, limit: int | None = None) -> Validation:
        """Figures of the EMA weights, over all processes' shares of the validation samples."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        count = self.settings.validation_samples if limit is None else limit
        rows = self.with_ema(lambda: self.task.validate(count, rank, world))
        return self.task.summarise(gather_object(rows) if world > 1 else rows)

    def agree(self, flag: bool) -> bool:
        """Whether any process got a signal: all must stop at the same step."""
        if self.accelerator.num_processes == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(int(flag), device=self.device), "sum") > 0)

    def mean_over_processes(self, number: int) -> int:
        """The same whole number for every process."""
        if self.accelerator.num_processes == 1:
            return number
        total = self.accelerator.reduce(torch.tensor(number, device=self.device), "sum")
        return int(total) // int(self.accelerator.num_processes)


def _averaged(module: nn.Module, settings: TrainingSettings) -> list[nn.Parameter]:
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    if settings.ema_parts == "all":
        return [p for _, p in named]
    chosen = [p for name, p in named if name.startswith(f"{settings.ema_parts}.")]
    if not chosen:
        raise ConfigError(f"training.ema_parts is {settings.ema_parts}, and this training has no such part; use all")
    return chosen
