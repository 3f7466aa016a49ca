"""The inference model rewritten for a CPU: what does not depend on the image is computed once, beforehand.

Four changes, each exact up to rounding:

- **Fixed timesteps.** Inference visits one timestep, or a few. The time embedding and every residual block's scale and
  shift are constants there, and go into the weights of the group norm before them; the layers that made them are gone.
- **Upsampling and the convolution after it** become one transposed convolution. Nearest-neighbour upsampling by 2 is a
  transposed convolution with a 2x2 kernel of ones; together with a 3x3 convolution it has a 4x4 kernel, of which each
  output pixel meets 4 taps instead of 9.
- **Divisions by one**, dropout and separate query, key and value projections are left out.
- **Convolution kernels**: oneDNN with weights reordered once (``prepacked``), or Winograd's (NNPACK), which multiplies
  five times less in fp32 where channels and pixels are many.

:func:`fold_unet`, :func:`fold_encoder` and :func:`fold_decoder` take a model apart: the given module must not be used
afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from leafseg.errors import CheckpointError
from leafseg.model.autoencoder import MaskDecoder
from leafseg.model.compact import CompactImageEncoder, CompactMaskDecoder
from leafseg.model.group_norm import group_norm
from leafseg.model.image_encoder import ImageEncoder
from leafseg.model.unet import MaskUNet

_FEW_PIXELS = 1024
_DOUBLING = ([1, 1], [0, 0], [2, 2], [1, 1], 1)  # padding, output padding, stride, dilation, groups


@dataclass(frozen=True)
class Kernels:
    """Which kernels compute, and in which number format.

    Attributes:
        dtype: of weights and activations; norms keep fp32 weights.
        channels_last: memory format of activations.
        prepacked: where pixels are few, oneDNN reorders weights once for an input size, not at every call.
        winograd_channels: 3x3 convolutions of at least so many channels in and out, at enough pixels, go through
            NNPACK's Winograd kernels, in fp32 whatever ``dtype`` is; None for none.
    """

    dtype: torch.dtype = torch.float32
    channels_last: bool = True
    prepacked: bool = False
    winograd_channels: int | None = None


def winograd_is_available() -> bool:
    """Whether this torch and processor have NNPACK; asking initialises it, and without that it refuses to compute."""
    return bool(torch._nnpack_available())


def prepacking_is_available() -> bool:
    mkldnn = getattr(torch.ops, "mkldnn", None)
    needed = (
        *("_reorder_convolution_weight", "_convolution_pointwise"),
        *("_reorder_convolution_transpose_weight", "_convolution_transpose_pointwise"),
        *("_reorder_linear_weight", "_linear_pointwise"),
    )
    return torch.backends.mkldnn.is_available() and all(hasattr(mkldnn, name) for name in needed)


class _Packable(nn.Module):
    """A layer whose weight may be in oneDNN's order, which holds for one input size.

    The order for one size may be hundreds of times slower at another.
    """

    weight: Tensor

    def __init__(self, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self._packed_for: Any = None

    def _reordered(self, size: Any) -> Tensor:
        raise NotImplementedError

    def _restored(self) -> Tensor:
        return _stored(self.weight.to_dense(), self.kernels)

    def _pack(self, size: Any) -> None:
        if size != self._packed_for:
            self._unpack()
            self.weight = self._reordered(size)
            self._packed_for = size

    def _unpack(self) -> None:
        if self._packed_for is not None:
            self.weight = self._restored()
            self._packed_for = None


class FoldedConv(_Packable):
    """A convolution through the kernel that suits its size. No groups, no dilation."""

    def __init__(self, convolution: nn.Conv2d, kernels: Kernels) -> None:
        super().__init__(kernels)
        if convolution.groups != 1 or convolution.dilation != (1, 1) or isinstance(convolution.padding, str):
            raise CheckpointError("a convolution has groups, dilation or named padding, which fast mode does not know")
        self.stride, self.padding = convolution.stride, convolution.padding
        self.weight = _stored(convolution.weight, kernels)
        self.bias = None if convolution.bias is None else convolution.bias.detach().to(kernels.dtype)
        limit = kernels.winograd_channels
        self._suits_winograd = (
            limit is not None
            and convolution.kernel_size == (3, 3)
            and self.stride == (1, 1)
            and self.bias is not None
            and min(convolution.in_channels, convolution.out_channels) >= limit
        )

    def forward(self, sample: Tensor) -> Tensor:
        # The transformed kernels are 64/9 as large as the weights, and made at every call: pixels must be many.
        if self._suits_winograd and sample.shape[2] * sample.shape[3] >= 4 * sample.shape[1]:
            return self._winograd(sample)
        # Reordering costs as much as about twenty pixels.
        if self.kernels.prepacked and not self._suits_winograd and sample[:, 0].numel() <= _FEW_PIXELS:
            return self._prepacked(sample)
        self._unpack()
        return F.conv2d(sample, self.weight, self.bias, self.stride, self.padding)

    def _winograd(self, sample: Tensor) -> Tensor:
        weight = self.weight.to(torch.float32, memory_format=torch.contiguous_format)
        bias = None if self.bias is None else self.bias.float()
        single = sample.to(torch.float32, memory_format=torch.contiguous_format)
        # One image at a time: NNPACK's path for batches is about half as fast.
        outputs = [torch._nnpack_spatial_convolution(one, weight, bias, self.padding) for one in single.split(1)]
        result = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return result.to(sample.dtype, memory_format=_layout(self.kernels))

    def _prepacked(self, sample: Tensor) -> Tensor:
        self._pack(sample.shape)
        convolve = torch.ops.mkldnn._convolution_pointwise
        padding, stride = list(self.padding), list(self.stride)
        result: Tensor = convolve(sample, self.weight, self.bias, padding, stride, [1, 1], 1, "none", [], "")
        return result

    def _reordered(self, size: torch.Size) -> Tensor:
        padding, stride = list(self.padding), list(self.stride)
        made: Tensor = torch.ops.mkldnn._reorder_convolution_weight(self.weight, padding, stride, [1, 1], 1, list(size))
        return made


class UpsamplingConv(_Packable):
    """Nearest-neighbour upsampling by 2 and a 3x3 convolution (stride 1, padding 1), as one transposed convolution."""

    def __init__(self, convolution: nn.Conv2d, kernels: Kernels) -> None:
        super().__init__(kernels)
        if (convolution.kernel_size, convolution.stride, convolution.padding) != ((3, 3), (1, 1), (1, 1)):
            raise CheckpointError("the convolution after an upsampling is not 3x3, which fast mode does not know")
        self.weight = _stored(upsampling_kernel(convolution.weight.detach().float()), kernels)
        self.bias = None if convolution.bias is None else convolution.bias.detach().to(kernels.dtype)

    def forward(self, sample: Tensor, *_: Any, **__: Any) -> Tensor:
        if self.kernels.prepacked and sample[:, 0].numel() <= _FEW_PIXELS:
            return self._prepacked(sample)
        self._unpack()
        return F.conv_transpose2d(sample, self.weight, self.bias, stride=2, padding=1)

    def _prepacked(self, sample: Tensor) -> Tensor:
        self._pack(sample.shape)
        convolve = torch.ops.mkldnn._convolution_transpose_pointwise
        result: Tensor = convolve(sample, self.weight, self.bias, *_DOUBLING, "none", [], "")
        return result

    def _reordered(self, size: torch.Size) -> Tensor:
        reorder = torch.ops.mkldnn._reorder_convolution_transpose_weight
        made: Tensor = reorder(self.weight.contiguous(), *_DOUBLING, list(size))
        return made

    def _restored(self) -> Tensor:
        # oneDNN keeps [out, in]; a transposed convolution's weight is [in, out].
        return _stored(self.weight.to_dense().transpose(0, 1), self.kernels)


def upsampling_kernel(weight: Tensor) -> Tensor:
    """The kernel ``[in, out, 4, 4]`` of a transposed convolution (stride 2, padding 1) that upsamples and convolves.

    A transposed convolution applies its kernel the other way round, hence the flip; convolving that with 2x2 ones, as
    the upsampling does, adds up its four shifts.

    Args:
        weight: of the 3x3 convolution, ``[out, in, 3, 3]``.
    """
    flipped = weight.flip(2, 3).transpose(0, 1)
    kernel = flipped.new_zeros(*flipped.shape[:2], 4, 4)
    for row in (0, 1):
        for column in (0, 1):
            kernel[:, :, row : row + 3, column : column + 3] += flipped
    return kernel


class FoldedNorm(nn.Module):
    """Group norm with fp32 weights; with ``films``, followed by ``x * (1 + scale) + shift`` of the given timestep."""

    def __init__(self, norm: nn.GroupNorm, films: Mapping[int, tuple[Tensor, Tensor]] | None = None) -> None:
        super().__init__()
        self.groups, self.eps = norm.num_groups, norm.eps
        weight, bias = norm.weight.detach().float(), norm.bias.detach().float()
        self.affine: dict[int | None, tuple[Tensor, Tensor]] = {None: (weight, bias)}
        if films is not None:
            self.affine = {t: (weight * (1 + scale), bias * (1 + scale) + shift) for t, (scale, shift) in films.items()}

    def forward(self, sample: Tensor, timestep: int | None = None) -> Tensor:
        return group_norm(sample, self.groups, *self.affine[timestep], self.eps)


class FoldedResnet(nn.Module):
    """A residual block at fixed timesteps.

    Args:
        block: a ResnetBlock2D with SiLU; without resampling, or with plain doubling or halving.
        kernels: see there.
        embeddings: time embedding ``[1, D]`` of each timestep; None for a block that takes none.
    """

    def __init__(self, block: ResnetBlock2D, kernels: Kernels, embeddings: Mapping[int, Tensor] | None = None) -> None:
        super().__init__()
        if not isinstance(block.nonlinearity, nn.SiLU) or block.output_scale_factor != 1:
            raise CheckpointError("a residual block has another activation or output scale than fast mode knows")
        projection, films = block.time_emb_proj, None
        if projection is not None:
            if block.time_embedding_norm != "scale_shift" or block.skip_time_act or embeddings is None:
                raise CheckpointError("a residual block takes its time embedding in a way that fast mode does not know")
            films = {}
            for timestep, embedding in embeddings.items():
                made = F.linear(F.silu(embedding), projection.weight.float(), projection.bias.float())
                scale, shift = made.detach()[0].chunk(2)
                films[timestep] = (scale, shift)
        self.norm1, self.norm2 = FoldedNorm(block.norm1), FoldedNorm(block.norm2, films)
        self.conv2 = FoldedConv(block.conv2, kernels)
        shortcut = block.conv_shortcut
        self.shortcut = None if shortcut is None else FoldedConv(shortcut, kernels)
        self.upsamples, self.downsample = block.upsample is not None, block.downsample
        self.conv1 = (UpsamplingConv if self.upsamples else FoldedConv)(block.conv1, kernels)
        self._takes_time = films is not None

    def forward(self, sample: Tensor, temb: int | None = None) -> Tensor:
        hidden = F.silu(self.norm1(sample), inplace=True)
        if self.downsample is not None:
            sample, hidden = self.downsample(sample), self.downsample(hidden)
        hidden = self.conv1(hidden)
        hidden = F.silu(self.norm2(hidden, temb if self._takes_time else None), inplace=True)
        hidden = self.conv2(hidden)
        if self.shortcut is not None:
            sample = self.shortcut(sample)  # 1x1: before or after upsampling is the same
        if self.upsamples:
            sample = F.interpolate(sample, scale_factor=2.0, mode="nearest")
        return hidden.add_(sample)


class FoldedLinear(_Packable):
    """A linear layer over tokens ``[B, N, D]``."""

    def __init__(self, weight: Tensor, bias: Tensor | None, kernels: Kernels) -> None:
        super().__init__(kernels)
        self.weight = weight.detach().to(kernels.dtype)
        self.bias = None if bias is None else bias.detach().to(kernels.dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        count = tokens.shape[0] * tokens.shape[1]
        if not (self.kernels.prepacked and count <= _FEW_PIXELS):
            self._unpack()
            return F.linear(tokens, self.weight, self.bias)
        self._pack(count)
        result: Tensor = torch.ops.mkldnn._linear_pointwise(tokens, self.weight, self.bias, "none", [], "")
        return result

    def _reordered(self, size: int) -> Tensor:
        made: Tensor = torch.ops.mkldnn._reorder_linear_weight(self.weight, size)
        return made

    def _restored(self) -> Tensor:
        return self.weight.to_dense().contiguous()


class FoldedAttention(nn.Module):
    """Self-attention over the pixels, with one projection for query, key and value."""

    def __init__(self, attention: Attention, kernels: Kernels) -> None:
        super().__init__()
        odd = (attention.spatial_norm, attention.norm_q, attention.norm_k, attention.norm_cross)
        if any(part is not None and part is not False for part in odd) or attention.rescale_output_factor != 1:
            raise CheckpointError("an attention has a norm or a scale that fast mode does not know")
        self.norm = None if attention.group_norm is None else FoldedNorm(attention.group_norm)
        self.heads, self.residual = int(attention.heads), bool(attention.residual_connection)
        parts = (attention.to_q, attention.to_k, attention.to_v)
        biases = [part.bias for part in parts]
        bias = None if biases[0] is None else torch.cat([bias.detach() for bias in biases])
        self.projections = FoldedLinear(torch.cat([part.weight.detach() for part in parts]), bias, kernels)
        self.out = FoldedLinear(attention.to_out[0].weight, attention.to_out[0].bias, kernels)

    def forward(self, sample: Tensor, **_: Any) -> Tensor:
        batch, channels, height, width = sample.shape
        hidden = sample if self.norm is None else self.norm(sample)
        tokens = hidden.permute(0, 2, 3, 1).reshape(batch, height * width, channels)  # a view of channels_last
        made = self.projections(tokens)  # [B, N, 3D]
        query, key, value = made.view(batch, height * width, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value)  # [B, heads, N, D / heads]
        tokens = self.out(attended.transpose(1, 2).flatten(2))
        result = tokens.view(batch, height, width, -1).permute(0, 3, 1, 2)
        return result + sample if self.residual else result


class _FoldedPart(nn.Module):
    """What a pipeline asks of its parts: their config, and where and in which number format they compute."""

    def __init__(self, config: Any, kernels: Kernels) -> None:
        super().__init__()
        self.config, self.kernels = config, kernels

    @property
    def dtype(self) -> torch.dtype:
        return self.kernels.dtype

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")


class FoldedUNet(_FoldedPart):
    """A MaskUNet at fixed timesteps; made by :func:`fold_unet`."""

    def __init__(self, unet: MaskUNet, kernels: Kernels, timesteps: Sequence[int]) -> None:
        config = unet.config
        super().__init__(config, kernels)
        if config["center_input_sample"] or config["time_embedding_type"] != "positional" or unet.class_embedding:
            raise CheckpointError("the U-Net has an input, time or class embedding that fast mode does not know")
        self.timesteps = tuple(timesteps)
        embeddings = {}
        with torch.no_grad():
            for timestep in self.timesteps:
                wave = unet.time_proj(torch.tensor([timestep]))
                embeddings[timestep] = unet.time_embedding.float()(wave)  # [1, D]
            for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
                if hasattr(block, "skip_conv"):
                    raise CheckpointError("the U-Net has blocks with skip convolutions, which fast mode does not know")
                _fold_children(block, kernels, embeddings)
        self.conv_in, self.conv_out = FoldedConv(unet.conv_in, kernels), FoldedConv(unet.conv_out, kernels)
        self.down_blocks, self.mid_block, self.up_blocks = unet.down_blocks, unet.mid_block, unet.up_blocks
        self.norm_out = FoldedNorm(unet.conv_norm_out)

    def forward(self, sample: Tensor, timestep: int) -> Tensor:
        # diffusers' blocks hand their time embedding on as it is: here it is the timestep, by which the folded parts
        # find their constants.
        sample = self.conv_in(sample.contiguous(memory_format=_layout(self.kernels)))
        residuals: tuple[Tensor, ...] = (sample,)
        for block in self.down_blocks:
            sample, outputs = block(sample, temb=timestep)
            residuals += outputs
        if self.mid_block is not None:
            sample = self.mid_block(sample, timestep)
        for block in self.up_blocks:
            used = len(block.resnets)
            sample = block(sample, residuals[-used:], timestep)
            residuals = residuals[:-used]
        return self.conv_out(F.silu(self.norm_out(sample)))

    def denoise(self, sample: Tensor, timestep: Tensor | int) -> Tensor:
        """See :meth:`leafseg.model.unet.MaskUNet.denoise`.

        Raises:
            ValueError: for a timestep that the U-Net was not folded for.
        """
        timestep = int(timestep)
        if timestep not in self.timesteps:
            raise ValueError(f"the timestep is {timestep}; this U-Net was folded for {list(self.timesteps)}")
        prediction: Tensor = self(sample, timestep)
        return prediction


class FoldedEncoder(_FoldedPart):
    """An ImageEncoder for inference; made by :func:`fold_encoder`."""

    def __init__(self, encoder: ImageEncoder, kernels: Kernels) -> None:
        super().__init__(encoder.config, kernels)
        self.encoder = _fold_stack(encoder.encoder, kernels)
        self.quant_conv = FoldedConv(encoder.quant_conv, kernels)

    def forward(self, images: Tensor) -> Tensor:
        """See :meth:`leafseg.model.image_encoder.ImageEncoder.forward`."""
        images = images.contiguous(memory_format=_layout(self.kernels))
        return self.quant_conv(self.encoder(images)).chunk(2, 1)[0]  # the mode is the mean


class FoldedDecoder(_FoldedPart):
    """A MaskDecoder for inference; made by :func:`fold_decoder`."""

    def __init__(self, decoder: MaskDecoder, kernels: Kernels) -> None:
        super().__init__(decoder.config, kernels)
        self.decoder = _fold_stack(decoder.decoder, kernels)
        convolution = decoder.post_quant_conv
        self.post_quant_conv = None if convolution is None else FoldedConv(convolution, kernels)

    def forward(self, code: Tensor) -> Tensor:
        code = code.contiguous(memory_format=_layout(self.kernels))
        if self.post_quant_conv is not None:
            code = self.post_quant_conv(code)
        pictures: Tensor = self.decoder(code)
        return pictures

    def decode(self, code: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """See :meth:`leafseg.model.autoencoder.MaskDecoder.decode`."""
        return (self(code),)


class FoldedCompact(_FoldedPart):
    """A compact decoder or encoder for inference; made by :func:`fold_compact`."""

    def __init__(self, part: CompactMaskDecoder | CompactImageEncoder, kernels: Kernels) -> None:
        super().__init__(part.config, kernels)
        _fold_children(part, kernels, None)
        # At the part's own door, since drawing pictures calls it too.
        part.register_forward_pre_hook(lambda _, given: (given[0].contiguous(memory_format=_layout(kernels)),))
        self.part = part

    def forward(self, sample: Tensor) -> Tensor:
        """The part's own ``forward``."""
        made: Tensor = self.part(sample)
        return made

    def decode_pictures(self, latent: Tensor) -> Tensor:
        """See :meth:`leafseg.model.compact.CompactMaskDecoder.decode_pictures`."""
        if not isinstance(self.part, CompactMaskDecoder):
            raise TypeError("an encoder draws no pictures")
        return self.part.decode_pictures(latent)


def fold_unet(unet: MaskUNet, kernels: Kernels, *, timesteps: Sequence[int]) -> FoldedUNet:
    """The U-Net with everything that depends on the timestep alone computed; takes ``unet`` apart.

    Raises:
        CheckpointError: if the U-Net has a part that is not known here.
    """
    return FoldedUNet(unet, kernels, timesteps).eval()


def fold_encoder(encoder: ImageEncoder, kernels: Kernels) -> FoldedEncoder:
    """The image encoder for inference; takes ``encoder`` apart. Raises as :func:`fold_unet`."""
    return FoldedEncoder(encoder, kernels).eval()


def fold_decoder(decoder: MaskDecoder, kernels: Kernels) -> FoldedDecoder:
    """The mask decoder for inference; takes ``decoder`` apart. Raises as :func:`fold_unet`."""
    return FoldedDecoder(decoder, kernels).eval()


def fold_compact(part: CompactMaskDecoder | CompactImageEncoder, kernels: Kernels) -> FoldedCompact:
    """A compact part for inference; takes ``part`` apart. Raises as :func:`fold_unet`."""
    return FoldedCompact(part, kernels).eval()


class _Activated(nn.Module):
    """Group norm and SiLU in one step, in the place of the norm; the activation after it becomes nothing."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.norm = FoldedNorm(norm)

    def forward(self, sample: Tensor) -> Tensor:
        return F.silu(self.norm(sample), inplace=True)


def _fold_stack(stack: Any, kernels: Kernels) -> Any:
    """diffusers' Encoder or Decoder, folded in place."""
    stack.conv_norm_out, stack.conv_act = _Activated(stack.conv_norm_out), nn.Identity()
    _fold_children(stack, kernels, None)
    return stack


def _fold_children(module: nn.Module, kernels: Kernels, embeddings: Mapping[int, Tensor] | None) -> None:
    done: dict[nn.Module, nn.Module] = {}  # diffusers registers some convolutions under two names
    for name, child in list(module._modules.items()):
        if child is None:
            continue
        made: nn.Module | None = done.get(child)
        if made is None:
            made = _folded(child, kernels, embeddings)
            if made is None:
                _fold_children(child, kernels, embeddings)
                made = child
            done[child] = made
        setattr(module, name, made)


def _folded(child: nn.Module, kernels: Kernels, embeddings: Mapping[int, Tensor] | None) -> nn.Module | None:
    if isinstance(child, ResnetBlock2D):
        return FoldedResnet(child, kernels, embeddings)
    if isinstance(child, Attention):
        return FoldedAttention(child, kernels)
    if isinstance(child, Upsample2D) and isinstance(child.conv, nn.Conv2d):
        return UpsamplingConv(child.conv, kernels)
    if isinstance(child, nn.Conv2d):
        return FoldedConv(child, kernels)
    return None


def _stored(weight: Tensor, kernels: Kernels) -> Tensor:
    return weight.detach().to(kernels.dtype, memory_format=_layout(kernels))


def _layout(kernels: Kernels) -> torch.memory_format:
    return torch.channels_last if kernels.channels_last else torch.contiguous_format
