"""Residual blocks without the passes over memory that a training does not need.

diffusers' own turns the input of a shortcut into PyTorch's default order while it trains, which convolutions turn back
in both directions, and divides every sum by its scale, even by one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn


class QuickResidualBlock(ResnetBlock2D):
    """A ResnetBlock2D with its parameters; values and gradients are the same but for rounding."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        """``[B, C', H', W']`` of ``[B, C, H, W]`` and, where the block is conditioned, its embedding ``[B, E]``."""
        hidden = self.nonlinearity(self.norm1(input_tensor))
        resample = self.upsample or self.downsample
        if resample is not None:
            input_tensor, hidden = resample(input_tensor), resample(hidden)
        hidden = self.conv1(hidden)
        if self.time_emb_proj is not None:
            temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))[:, :, None, None]
        if self.time_embedding_norm == "scale_shift":
            if temb is None:
                raise ValueError("a block whose embedding scales and shifts was called without one")
            scale, shift = temb.chunk(2, 1)
            hidden = self.norm2(hidden) * (1 + scale) + shift
        else:
            hidden = self.norm2(hidden if temb is None else _added(hidden, temb))
        hidden = self.conv2(F.dropout(self.nonlinearity(hidden), self.dropout.p, self.dropout.training))
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        hidden = _added(hidden, input_tensor)
        return hidden if self.output_scale_factor == 1 else hidden / self.output_scale_factor


def use_quick_residual_blocks(module: nn.Module) -> nn.Module:
    """Let every plain ResnetBlock2D inside ``module`` be a :class:`QuickResidualBlock`, with the same parameters."""
    for part in module.modules():
        if type(part) is ResnetBlock2D:
            part.__class__ = QuickResidualBlock
    return module


def _added(convolved: Tensor, other: Tensor) -> Tensor:
    """Their sum, in the place of what a convolution made, which nothing else needs; that saves a pass over memory."""
    if convolved.dtype == torch.promote_types(convolved.dtype, other.dtype):
        return convolved.add_(other)
    return convolved + other
