"""Group normalisation whose gradient does not crawl on a CPU.

PyTorch's CPU gradient of group normalisation walks channels_last tensors channel group by channel group. With few
channels a group (16 channels at full resolution in 8 groups) it takes as long as several convolutions; the same
gradient in sums and products of whole rows takes a fraction of that (docs/performance.md).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# From so many channels a group on PyTorch's own gradient runs in vectors too (measured with torch 2.13, AVX-512).
_OWN_BELOW = {torch.float32: 8, torch.bfloat16: 16}


class QuickGroupNorm(nn.GroupNorm):
    """An ``nn.GroupNorm`` with its parameters, its values to the bit, and a gradient that is equal but for rounding."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled() and input.requires_grad and self.affine and _pays(input, self.num_groups):
            normalised: Tensor = _RowwiseGroupNorm.apply(input, self.weight, self.bias, self.num_groups, self.eps)
            return normalised
        return F.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


def use_quick_group_norm(module: nn.Module) -> nn.Module:
    """Put :class:`QuickGroupNorm` in the place of every plain ``nn.GroupNorm`` inside, over the same parameters."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.GroupNorm:
                quick = QuickGroupNorm(child.num_groups, child.num_channels, eps=child.eps, affine=False)
                quick.affine, quick.weight, quick.bias = child.affine, child.weight, child.bias
                quick.train(child.training)
                setattr(parent, name, quick)
    return module


def _pays(x: Tensor, groups: int) -> bool:
    in_rows = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return x.device.type == "cpu" and in_rows and x.shape[1] // groups < _OWN_BELOW.get(x.dtype, 0)


class _RowwiseGroupNorm(torch.autograd.Function):
    """``[N, C, H, W]`` in channels_last."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        n, c, h, w = x.shape
        y, mean, rstd = torch.native_group_norm(x, weight, bias, n, c, h * w, groups, eps)
        ctx.save_for_backward(x, weight, mean.float(), rstd.float())
        ctx.groups = groups
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, weight, mean, rstd = ctx.saved_tensors
        n, c, h, w = x.shape
        groups, width = ctx.groups, c // ctx.groups
        dy = dy.contiguous(memory_format=torch.channels_last)
        # Rows of W * C numbers: long enough for vectors, however few the channels are.
        x_rows, dy_rows = (t.permute(0, 2, 3, 1).reshape(n, h, w * c) for t in (x, dy))

        def channel_sums(rows: Tensor) -> Tensor:
            # A column is summed in float32 and rounded once; asking for a float32 sum would copy the whole input first.
            return rows.sum(1).float().view(n, w, c).sum(1)  # [N, C]

        def per_channel(values: Tensor) -> Tensor:  # [N, G] to [N, C]
            return values.repeat_interleave(width, 1)

        sum_dy, sum_dy_x = channel_sums(dy_rows), channel_sums(dy_rows * x_rows)
        d_weight = d_bias = d_x = None
        if ctx.needs_input_grad[1]:
            d_weight = ((sum_dy_x - sum_dy * per_channel(mean)) * per_channel(rstd)).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            d_bias = sum_dy.sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            # With y = weight * (x - mean) * rstd + bias, dx = rstd * weight * dy + b * x + c, b and c of the group.
            scale = weight.float()
            weighted, weighted_x = ((t * scale).view(n, groups, width).sum(2) for t in (sum_dy, sum_dy_x))
            slope = (weighted * mean - weighted_x) * rstd**3 / (width * h * w)
            offset = -slope * mean - weighted * rstd / (width * h * w)

            def wide(values: Tensor) -> Tensor:  # [N, C] to one row
                return values.to(x.dtype).view(n, 1, 1, c).expand(n, 1, w, c).reshape(n, 1, w * c)

            rows = torch.addcmul(wide(per_channel(offset)), x_rows, wide(per_channel(slope)))
            rows = rows.addcmul_(dy_rows, wide(per_channel(rstd) * scale))
            d_x = rows.view(n, h, w, c).permute(0, 3, 1, 2)
        return d_x, d_weight, d_bias, None, None
