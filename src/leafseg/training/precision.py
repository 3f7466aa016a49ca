"""Which number format a training computes in."""

from __future__ import annotations

import torch


def resolve_precision(precision: str) -> str:
    """accelerate's name of a precision; auto is bf16 where the hardware multiplies in it, else full precision."""
    if precision != "auto":
        return {"fp32": "no"}.get(precision, precision)
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "no"
