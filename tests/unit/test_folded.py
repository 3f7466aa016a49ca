"""The folded model computes what the plain one does."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leafseg.config import Settings, override_settings
from leafseg.errors import CheckpointError
from leafseg.model.autoencoder import MaskDecoder
from leafseg.model.build import Components, build_components
from leafseg.model.folded import (
    FoldedConv,
    FoldedLinear,
    Kernels,
    UpsamplingConv,
    fold_decoder,
    fold_encoder,
    fold_unet,
    prepacking_is_available,
    upsampling_kernel,
    winograd_is_available,
)
from leafseg.model.unet import MaskUNet

KERNELS = {
    "contiguous": Kernels(channels_last=False),
    "channels_last": Kernels(),
    "prepacked": Kernels(prepacked=True),
    "winograd": Kernels(channels_last=False, winograd_channels=8),
}


@pytest.fixture(params=list(KERNELS))
def kernels(request: pytest.FixtureRequest) -> Kernels:
    chosen = KERNELS[request.param]
    if (chosen.prepacked and not prepacking_is_available()) or (
        chosen.winograd_channels and not winograd_is_available()
    ):
        pytest.skip("not in this torch, or not for this processor")
    return chosen


def _relative(got: Tensor, expected: Tensor) -> float:
    return float((got.float() - expected.float()).norm() / expected.norm())


def _noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _randomised(module: nn.Module) -> nn.Module:
    """Every weight drawn anew, so that no norm is the identity and no output zero."""
    generator = torch.Generator().manual_seed(2)
    for parameter in module.parameters():
        scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    return module


@pytest.mark.parametrize("timestep", [999, 799, 0])
@torch.no_grad()
def test_the_folded_unet_predicts_what_the_plain_one_does_at_each_of_its_timesteps(
    tiny_components: Components, kernels: Kernels, timestep: int
) -> None:
    unet = _randomised(tiny_components.unet)
    sample = _noise(2, 8, 8, 12)
    expected = unet.denoise(sample, timestep)
    folded = fold_unet(copy.deepcopy(unet), kernels, timesteps=[999, 799, 0])
    assert _relative(folded.denoise(sample, timestep), expected) < 1e-5
    # Weights are packed for a size, and again for another; where pixels are many, they are not.
    for shape in ((1, 8, 16, 8), (16, 8, 16, 16), (2, 8, 8, 12)):
        other = _noise(*shape)
        assert _relative(folded.denoise(other, timestep), unet.denoise(other, timestep)) < 1e-5


@torch.no_grad()
def test_encoder_and_decoder_fold_to_the_same_outputs(tiny_components: Components, kernels: Kernels) -> None:
    encoder = _randomised(tiny_components.image_encoder)
    decoder = _randomised(MaskDecoder.from_autoencoder(tiny_components.autoencoder))
    images, code = _noise(2, 3, 32, 48), _noise(3, 4, 4, 6)
    expected = encoder(images), decoder.decode(code)[0]
    assert _relative(fold_encoder(copy.deepcopy(encoder), kernels)(images), expected[0]) < 1e-5
    assert _relative(fold_decoder(copy.deepcopy(decoder), kernels).decode(code)[0], expected[1]) < 1e-5


@torch.no_grad()
def test_mid_block_attention_folds_too(tiny_settings: Settings, kernels: Kernels) -> None:
    settings = override_settings(tiny_settings, ["model.autoencoder.mid_block_attention=true"])
    parts = build_components(settings)
    decoder = _randomised(MaskDecoder.from_autoencoder(parts.autoencoder)).eval()
    code = _noise(2, 4, 4, 6)
    expected = decoder.decode(code)[0]
    assert _relative(fold_decoder(copy.deepcopy(decoder), kernels).decode(code)[0], expected) < 1e-5


@torch.no_grad()
def test_bf16_stays_within_its_precision(tiny_components: Components) -> None:
    unet = _randomised(tiny_components.unet)
    sample = _noise(2, 8, 8, 12)
    folded = fold_unet(copy.deepcopy(unet), Kernels(torch.bfloat16), timesteps=[999])
    prediction = folded.denoise(sample.bfloat16(), 999)
    assert prediction.dtype == torch.bfloat16
    assert 0 < _relative(prediction, unet.denoise(sample, 999)) < 0.03  # 2^-8 an operation, over some tens of them


def test_a_folded_unet_has_no_time_embedding_left_and_refuses_other_timesteps(tiny_components: Components) -> None:
    folded = fold_unet(tiny_components.unet, Kernels(), timesteps=[999])
    assert not any("time" in name for name, _ in folded.named_modules())
    with pytest.raises(ValueError, match="the timestep is 500; this U-Net was folded for \\[999\\]"):
        folded.denoise(torch.zeros(1, 8, 8, 8), 500)


@pytest.mark.parametrize("size", [(4, 4), (5, 3), (1, 1)])
def test_upsampling_and_convolution_are_one_transposed_convolution(size: tuple[int, int]) -> None:
    sample, weight, bias = _noise(2, 3, *size), _noise(5, 3, 3, 3, seed=2), _noise(5, seed=3)
    expected = F.conv2d(F.interpolate(sample, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)
    got = F.conv_transpose2d(sample, upsampling_kernel(weight), bias, stride=2, padding=1)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


def test_the_transposed_kernel_holds_every_tap_four_times() -> None:
    weight = _noise(5, 3, 3, 3)
    torch.testing.assert_close(upsampling_kernel(weight).sum((2, 3)), 4 * weight.sum((2, 3)).T, rtol=0, atol=1e-5)


@pytest.mark.skipif(not winograd_is_available(), reason="not in this torch, or not for this processor")
@pytest.mark.parametrize(("size", "used"), [((32, 32), True), ((4, 4), False)])
def test_winograd_takes_what_has_enough_pixels(
    size: tuple[int, int], used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    original = torch._nnpack_spatial_convolution
    monkeypatch.setattr(torch, "_nnpack_spatial_convolution", lambda *a: calls.append(1) or original(*a))
    convolution = nn.Conv2d(8, 8, 3, padding=1)
    sample = _noise(3, 8, *size)
    folded = FoldedConv(convolution, Kernels(channels_last=False, winograd_channels=8))
    # Winograd adds and subtracts larger numbers than the sum itself: a digit less than direct summation.
    torch.testing.assert_close(folded(sample), convolution(sample).detach(), rtol=0, atol=1e-4)
    assert bool(calls) is used


def test_what_cannot_be_folded_is_refused() -> None:
    unet = MaskUNet(
        block_out_channels=(32, 32), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        resnet_time_scale_shift="default",
    )  # fmt: skip
    with pytest.raises(CheckpointError, match="takes its time embedding in a way that fast mode does not know"):
        fold_unet(unet, Kernels(), timesteps=[999])


@pytest.mark.skipif(not prepacking_is_available(), reason="this torch has no prepacking")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_in_onednns_order_follow_the_input_size(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    packed, plain = Kernels(dtype, prepacked=True), Kernels(dtype)
    convolution, linear = nn.Conv2d(16, 24, 3, padding=1), nn.Linear(32, 48)
    layers = [
        (UpsamplingConv(convolution, packed), UpsamplingConv(convolution, plain)),
        (FoldedConv(convolution, packed), FoldedConv(convolution, plain)),
        (FoldedLinear(linear.weight, linear.bias, packed), FoldedLinear(linear.weight, linear.bias, plain)),
    ]
    for quick, wanted in layers:
        for side in (4, 4, 8, 48, 4):  # the same size again, another, beyond what is packed, and back
            x = torch.randn(1, 16, side, side).to(dtype, memory_format=torch.channels_last)
            if isinstance(quick, FoldedLinear):
                x = torch.randn(1, side**2, 32).to(dtype)
            with torch.no_grad():
                made, exact = quick(x).double(), wanted(x).double()
            assert (made - exact).norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * exact.norm()
