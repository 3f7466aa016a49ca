"""Optimizers by name."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from leafseg.config import TrainingSettings
from leafseg.errors import ConfigError

log = logging.getLogger(__name__)


def make_optimizer(module: nn.Module, settings: TrainingSettings, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer of everything in ``module`` that is trained; its state holds tensors and plain values only.

    Raises:
        ConfigError: if the optimizer's package is missing, or does not work on the device.
    """
    groups = parameter_groups(module, settings)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.learning_rate, fused=True)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ConfigError(
            "training.optimizer is adamw_8bit, which needs bitsandbytes; install it with "
            'pip install "leafseg[optim8]", or use adamw'
        ) from error
    except Exception as error:  # its own start-up errors (drivers, libraries) share no base
        raise _does_not_work(device, error) from error
    _try_out(AdamW8bit, device)
    if device.type == "cpu":
        log.info("adamw_8bit saves memory; on a CPU its update takes many times longer than adamw's")
    optimizer: torch.optim.Optimizer = AdamW8bit(groups, lr=settings.learning_rate)
    return optimizer


def parameter_groups(module: nn.Module, settings: TrainingSettings) -> list[dict[str, Any]]:
    """Weight decay for matrices and kernels only, or for all: norms and biases (one-dimensional) keep their scale."""
    trained = [p for p in module.parameters() if p.requires_grad]
    if settings.weight_decay_on == "all":
        return [{"params": trained, "weight_decay": settings.weight_decay}]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimizer's state; zero before its first step."""
    values = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    # Tables that all parameters share (how 8 bits are spread over a range) count once.
    shared = {v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in values}
    return sum(shared.values())


def _try_out(kind: Any, device: torch.device) -> None:
    """One step of a small matrix: what cannot work on this device fails here, before hours of work."""
    # bitsandbytes keeps 32 bits for parameters of fewer than 4096 values, and would prove nothing there.
    weight = nn.Parameter(torch.full((64, 64), 0.5, device=device))
    weight.grad = torch.ones_like(weight)
    try:
        kind([weight], lr=0.1, weight_decay=0.0).step()
    except Exception as error:
        raise _does_not_work(device, error) from error
    # Adam's first step is one rate against the gradient's sign.
    if not torch.allclose(weight, torch.full_like(weight, 0.4), atol=0.01):
        raise _does_not_work(device, ValueError("its first step is wrong"))


def _does_not_work(device: torch.device, error: Exception) -> ConfigError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return ConfigError(
        f"training.optimizer is adamw_8bit, which does not work on this {device.type} ({reason}); use adamw"
    )
