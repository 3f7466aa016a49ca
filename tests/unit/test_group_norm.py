"""The quick group normalisation against PyTorch's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from leafseg.model import group_norm as module
from leafseg.model.group_norm import QuickGroupNorm, group_norm, use_quick_group_norm


def _pair(channels: int, groups: int) -> tuple[nn.GroupNorm, QuickGroupNorm]:
    torch.manual_seed(0)
    plain = nn.GroupNorm(groups, channels, eps=1e-6)
    nn.init.normal_(plain.weight)
    nn.init.normal_(plain.bias)
    holder = nn.ModuleDict({"norm": nn.GroupNorm(groups, channels, eps=1e-6)})
    holder.load_state_dict({f"norm.{name}": value for name, value in plain.state_dict().items()})
    quick = use_quick_group_norm(holder)["norm"]
    assert isinstance(quick, QuickGroupNorm)
    return plain, quick


def _input(shape: tuple[int, ...], dtype: torch.dtype, *, last: bool = True) -> torch.Tensor:
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 2 + 3).to(dtype)
    return x.to(memory_format=torch.channels_last) if last else x


# The last two go by rows in the forward direction too, in bf16 or in both types; smaller ones in bf16 are turned.
@pytest.mark.parametrize(
    "shape",
    [(2, 16, 12, 20), (3, 32, 8, 8), (2, 8, 1, 9), (1, 16, 7, 1), (4, 64, 2, 2), (18, 16, 16, 17), (18, 32, 16, 16)],
)
def test_gradients_agree_with_those_in_double_precision(shape: tuple[int, ...]) -> None:
    plain, quick = _pair(shape[1], 8)
    outward = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    for dtype, most in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        x = _input(shape, dtype).requires_grad_()
        wanted = x.detach().double().requires_grad_()
        exact = nn.GroupNorm(8, shape[1], eps=1e-6).double()
        exact.load_state_dict(plain.state_dict())
        y, y_exact = quick(x), exact(wanted)
        assert (y.double() - y_exact).norm() <= most * y_exact.norm()
        quick.zero_grad()
        y.backward(outward.to(dtype))
        y_exact.backward(outward.to(dtype).double())
        for mine, theirs in (
            (x.grad, wanted.grad),
            (quick.weight.grad, exact.weight.grad),
            (quick.bias.grad, exact.bias.grad),
        ):
            assert mine is not None
            assert theirs is not None
            assert (mine.double() - theirs).norm() <= most * theirs.norm()


def test_only_what_needs_a_gradient_gets_one() -> None:
    _, quick = _pair(16, 8)
    quick.requires_grad_(False)
    x = _input((2, 16, 6, 6), torch.float32).requires_grad_()
    quick(x).square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert quick.weight.grad is None


def test_in_other_memory_order_or_without_gradient_it_is_pytorchs() -> None:
    _, quick = _pair(16, 8)
    inputs = _input((2, 16, 6, 6), torch.float32, last=False).requires_grad_()
    assert "NativeGroupNorm" in type(quick(inputs).grad_fn).__name__
    with torch.no_grad():
        assert quick(_input((2, 16, 6, 6), torch.float32).requires_grad_()).grad_fn is None


def test_names_and_parameters_stay() -> None:
    module = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Sequential(nn.GroupNorm(4, 16), nn.GroupNorm(2, 16, affine=False)))
    before = {name: value.data_ptr() for name, value in module.state_dict().items()}
    use_quick_group_norm(module.eval())
    assert {name: value.data_ptr() for name, value in module.state_dict().items()} == before
    assert not any(part.training for part in module.modules())
    x = _input((1, 3, 8, 8), torch.float32).requires_grad_()
    module(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("shape", [(18, 48, 16, 16), (1, 48, 40, 40), (2, 48, 2, 2)])
def test_without_gradient_it_agrees_with_double_precision(
    shape: tuple[int, ...], dtype: torch.dtype, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []
    by_rows = module._by_rows
    monkeypatch.setattr(module, "_by_rows", lambda *given: used.append(True) or by_rows(*given))
    plain, _ = _pair(48, 8)
    x = _input(shape, dtype)
    weight, bias = plain.weight.detach(), plain.bias.detach()
    made = group_norm(x, 8, weight, bias, 1e-6)
    exact = torch.nn.functional.group_norm(x.double(), 8, weight.double(), bias.double(), 1e-6)
    assert (made.double() - exact).norm() <= most * exact.norm()
    assert made.dtype == dtype
    assert made.is_contiguous(memory_format=torch.channels_last)
    assert bool(used) == (shape[0] == 18), "by rows where pixels are few and numbers many"
