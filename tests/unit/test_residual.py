"""The quick residual blocks against diffusers' own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from leafseg.model.recompute import recompute_activations
from leafseg.model.residual import QuickResidualBlock, use_quick_residual_blocks

_KINDS: dict[str, dict[str, Any]] = {
    "plain": {"out_channels": 16},
    "shortcut": {"out_channels": 24},
    "without embedding": {"out_channels": 24, "temb_channels": None},
    "scaled and shifted": {"out_channels": 24, "time_embedding_norm": "scale_shift"},
    "embedding as it is": {"out_channels": 16, "skip_time_act": True},
    "up": {"out_channels": 24, "up": True},
    "down": {"out_channels": 16, "down": True},
    "sum scaled": {"out_channels": 16, "output_scale_factor": 1.4},
}


def _pair(kind: str) -> tuple[ResnetBlock2D, nn.Module]:
    torch.manual_seed(0)
    options = {"in_channels": 16, "temb_channels": 12, "groups": 8, "groups_out": 8, "eps": 1e-6} | _KINDS[kind]
    plain = ResnetBlock2D(**options).to(memory_format=torch.channels_last)
    return plain, use_quick_residual_blocks(nn.ModuleList([copy.deepcopy(plain)]))[0]


def _inputs(block: nn.Module) -> list[torch.Tensor | None]:
    draws = torch.Generator().manual_seed(1)
    image = torch.randn(3, 16, 8, 12, generator=draws).to(memory_format=torch.channels_last)
    embedding = torch.randn(3, 12, generator=draws) if block.time_emb_proj is not None else None
    return [value.requires_grad_() if value is not None else None for value in (image, embedding)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", _KINDS)
def test_values_and_gradients_are_diffusers_own(kind: str, training: bool) -> None:
    results = []
    for block in _pair(kind):
        block.train(training)
        image, embedding = _inputs(block)
        made = block(image, embedding)
        made.square().sum().backward()
        gradients = [value.grad for value in (image, embedding) if value is not None]
        results.append([made, *gradients, *(p.grad for p in block.parameters())])
    assert len(results[0]) == len(results[1])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_no_input_is_changed_and_the_order_of_memory_stays() -> None:
    _, quick = _pair("shortcut")
    image, embedding = _inputs(quick)
    before = [value.detach().clone() for value in (image, embedding)]
    made = quick.train()(image, embedding)
    assert made.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(value, old) for value, old in zip((image, embedding), before, strict=True))


def test_a_sum_of_two_formats_is_of_the_wider_one() -> None:
    plain, quick = _pair("plain")
    image, embedding = _inputs(quick)
    with torch.autocast("cpu", torch.bfloat16):
        made = [block(image, embedding) for block in (plain, quick)]
    assert made[0].dtype == made[1].dtype == torch.float32
    torch.testing.assert_close(made[0], made[1], rtol=2e-2, atol=2e-2)


def test_dropout_is_that_of_the_block() -> None:
    plain, quick = _pair("plain")
    made = []
    for block in (plain, quick):
        block.dropout.p = 0.5
        torch.manual_seed(3)
        made.append(block.train()(*_inputs(block)))
    torch.testing.assert_close(*made, rtol=1e-4, atol=1e-4)
    plain.eval()
    assert not torch.allclose(made[0], plain(*_inputs(plain)), atol=1e-2)


def test_only_plain_blocks_are_changed_and_recomputation_still_works() -> None:
    class Own(ResnetBlock2D):
        pass

    torch.manual_seed(0)
    module = nn.ModuleList([ResnetBlock2D(in_channels=8, temb_channels=None, groups=4), Own(in_channels=8, groups=4)])
    names = list(module.state_dict())
    use_quick_residual_blocks(module)
    assert type(module[0]) is QuickResidualBlock
    assert type(module[1]) is Own
    assert list(module.state_dict()) == names
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    (kept,) = torch.autograd.grad(module[0](x, None).square().sum(), x)
    assert recompute_activations(module) == 2
    (again,) = torch.autograd.grad(module[0](x, None).square().sum(), x)
    assert torch.equal(kept, again)
