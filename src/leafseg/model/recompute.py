"""Activations that are computed again in the backward pass instead of being kept."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch.utils.checkpoint import checkpoint

# The units: what a forward pass then keeps is the input of each, and the backward pass holds the inside of one at a
# time. diffusers' own switch covers the residual blocks of some block types only (never attention, nor resampling).
_UNITS = (ResnetBlock2D, Attention, Downsample2D, Upsample2D)


def recompute_activations(module: nn.Module, enable: bool = True) -> int:
    """Let every residual block, attention and resampling inside ``module`` keep its inputs alone; or end that.

    Gradients stay the same bit for bit: the second pass starts from the same inputs, random state and autocast. Forward
    hooks on or around the units run once, in the first pass. Without gradients nothing changes.

    Returns:
        How many units there are.
    """
    units = list(_outermost(module))
    for unit in units:
        if enable:
            # Shadows the class's method; copy.deepcopy binds the copy's to the copy.
            unit.forward = partial(_forward_twice, unit)
        else:
            unit.__dict__.pop("forward", None)
    return len(units)


def recomputes(module: nn.Module) -> bool:
    """Whether :func:`recompute_activations` is in force."""
    return any("forward" in unit.__dict__ for unit in _outermost(module))


def _outermost(module: nn.Module) -> list[nn.Module]:
    """The units that lie in no other unit (a residual block may hold a resampling)."""
    if isinstance(module, _UNITS):
        return [module]
    return [unit for child in module.children() for unit in _outermost(child)]


def _forward_twice(unit: nn.Module, *inputs: Any, **options: Any) -> Any:
    forward = partial(type(unit).forward, unit)
    if not torch.is_grad_enabled():
        return forward(*inputs, **options)
    return checkpoint(forward, *inputs, use_reentrant=False, **options)
