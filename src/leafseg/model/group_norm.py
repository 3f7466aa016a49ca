"""Group normalisation that does not crawl on a CPU.

PyTorch's CPU kernels walk channels_last tensors channel group by channel group: the gradient's always, the forward one
below 1024 pixels (torch 2.13), which cannot use vectors where a group has few channels. Here both go in sums and
products of whole rows. What the gradient gains is measured in docs/performance.md.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# From so many channels a group on PyTorch's own kernels run in vectors too (with torch 2.13, AVX-512).
_OWN_BELOW = {torch.float32: 8, torch.bfloat16: 16}
# PyTorch's forward kernel goes by rows from so many pixels on; below, ours pays from so many numbers on. In bf16 fewer
# are better turned into PyTorch's default order and back, which its kernel takes in vectors.
_FEW_PIXELS = 1024
_ROWS_PAY_FROM = {torch.float32: 131_072, torch.bfloat16: 65_536}


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """As ``F.group_norm`` but for rounding, without a gradient, by the kernel that suits the input.

    Args:
        x: ``[N, C, H, W]``, any float type and memory format; the result has both.
        groups, eps: as there.
        weight, bias: ``[C]``, in fp32 or the input's type.
    """
    if _pays(x, groups):
        return _normalised(x, weight, bias, groups, eps)[0]
    return F.group_norm(x, groups, weight, bias, eps)


class QuickGroupNorm(nn.GroupNorm):
    """An ``nn.GroupNorm`` with its parameters; values and gradient of a training are equal but for rounding."""

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


def _normalised(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised ``x``, and the groups' mean and reciprocal standard deviation ``[N, G]``."""
    n, c, h, w = x.shape
    few = h * w < _FEW_PIXELS
    if few and x.numel() >= _ROWS_PAY_FROM[x.dtype]:
        return _by_rows(x, weight, bias, groups, eps)
    turned = few and x.dtype == torch.bfloat16
    given = x.contiguous() if turned else x
    y, mean, rstd = torch.native_group_norm(given, weight, bias, n, c, h * w, groups, eps)
    return y.contiguous(memory_format=torch.channels_last) if turned else y, mean, rstd


def _by_rows(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    n, c, h, w = x.shape
    count = h * w * c // groups
    rows = x.permute(0, 2, 3, 1).reshape(n, h * w, c).float()
    mean = rows.sum(1).view(n, groups, -1).sum(2) / count
    square = rows.square().sum(1).view(n, groups, -1).sum(2) / count
    rstd = (square - mean.square()).clamp_(min=0).add_(eps).rsqrt_()
    scale = weight.float().view(groups, -1) * rstd[..., None]  # [N, G, C / G]
    shift = bias.float().view(groups, -1) - scale * mean[..., None]
    y = torch.addcmul(shift.view(n, 1, c), rows, scale.view(n, 1, c)).to(x.dtype)
    return y.view(n, h, w, c).permute(0, 3, 1, 2), mean, rstd


class _RowwiseGroupNorm(torch.autograd.Function):
    """``[N, C, H, W]`` in channels_last."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        y, mean, rstd = _normalised(x, weight, bias, groups, eps)
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
