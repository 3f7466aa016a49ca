"""Which number format a training computes in."""

from __future__ import annotations

import torch

from leafseg.errors import ConfigError
from leafseg.hardware import gpu_multiplies_in_bf16, multiplies_in_bf16


def resolve_precision(precision: str) -> str:
    """accelerate's name of a precision; auto is bf16 where the hardware multiplies in it, else full precision.

    Raises:
        ConfigError: for fp16 without a GPU.
    """
    if precision == "fp16" and not torch.cuda.is_available():
        raise ConfigError("training.precision is fp16, which needs a GPU to train; use bf16, fp32 or auto")
    if precision != "auto":
        return {"fp32": "no"}.get(precision, precision)
    if torch.cuda.is_available():
        return "bf16" if gpu_multiplies_in_bf16() else "fp16"
    return "bf16" if multiplies_in_bf16() else "no"
