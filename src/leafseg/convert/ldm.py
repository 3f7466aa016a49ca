"""CompVis' latent-diffusion weights (LDM) beside diffusers' names for the same modules: layouts and key tables.

A layout says how a network is built. From it follow our module (on the meta device, without memory) and a table with
one entry for every tensor. Conversion in either direction walks the table, so that no tensor of source or target can be
forgotten: what the table does not name is an error.

Two traps load without any error and compute something else:

1. LDM fixes the NUMBER of heads, diffusers their width: :class:`leafseg.MaskUNet` carries the number.
2. LDM's fused ``qkv`` weight is head-interleaved (head, then query | key | value, then channel): see :class:`Entry`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from leafseg.errors import CheckpointError
from leafseg.model.image_encoder import ImageEncoder
from leafseg.model.unet import MaskUNet

NORM_GROUPS = 32  # fixed in LDM's code, in the U-Net and in the autoencoder
SCALING_FACTOR = 0.18215  # of kl-f8's latents, fixed in the released code

State = dict[str, Tensor]
Shape = tuple[int, ...]


# --- layouts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class UNetLayout:
    """LDM's U-Net, in LDM's words; ``attention_levels[i]`` says whether level i (the finest first) has attention."""

    in_channels: int
    out_channels: int
    model_channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: int
    attention_levels: tuple[bool, ...]
    num_heads: int = 8
    resblock_updown: bool = True
    dropout: float = 0.2
    image_size: int = 32

    def build(self) -> MaskUNet:
        """Our module for these weights, on the meta device.

        Raises:
            CheckpointError: if there is no such network.
        """
        last = len(self.channel_mult) - 1
        levels = list(enumerate(self.attention_levels))
        plain_down = "ResnetDownsampleBlock2D" if self.resblock_updown else "DownBlock2D"
        plain_up = "ResnetUpsampleBlock2D" if self.resblock_updown else "UpBlock2D"
        resample = "resnet" if self.resblock_updown else "conv"
        try:
            with torch.device("meta"):
                return MaskUNet(
                    sample_size=self.image_size,
                    in_channels=self.in_channels,
                    out_channels=self.out_channels,
                    block_out_channels=tuple(self.model_channels * factor for factor in self.channel_mult),
                    # The last level has no sampler, which makes the plain block the right one either way.
                    down_block_types=tuple(
                        "AttnDownBlock2D" if attends else plain_down if level < last else "DownBlock2D"
                        for level, attends in levels
                    ),
                    up_block_types=tuple(
                        "AttnUpBlock2D" if attends else plain_up if level > 0 else "UpBlock2D"
                        for level, attends in reversed(levels)
                    ),
                    layers_per_block=self.num_res_blocks,
                    downsample_type=resample,
                    upsample_type=resample,
                    norm_num_groups=NORM_GROUPS,
                    attn_norm_num_groups=NORM_GROUPS,
                    dropout=self.dropout,
                    num_attention_heads=self.num_heads,
                )
        except (ValueError, TypeError, ZeroDivisionError) as error:
            raise CheckpointError(f"the U-Net cannot be built as {self} ({first_line(error)})") from error


@dataclass(frozen=True)
class AutoencoderLayout:
    """LDM's KL autoencoder without attention in its levels, in LDM's words; also its encoder alone."""

    ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    z_channels: int
    in_channels: int = 3
    out_ch: int = 3
    dropout: float = 0.0
    resolution: int = 256

    def build(self) -> AutoencoderKL:
        """diffusers' autoencoder for these weights, on the meta device.

        Raises:
            CheckpointError: if there is no such network.
        """
        try:
            with torch.device("meta"):
                return AutoencoderKL(
                    in_channels=self.in_channels,
                    out_channels=self.out_ch,
                    down_block_types=("DownEncoderBlock2D",) * len(self.ch_mult),
                    up_block_types=("UpDecoderBlock2D",) * len(self.ch_mult),
                    block_out_channels=tuple(self.ch * factor for factor in self.ch_mult),
                    layers_per_block=self.num_res_blocks,
                    latent_channels=self.z_channels,
                    norm_num_groups=NORM_GROUPS,
                    sample_size=self.resolution,
                    scaling_factor=SCALING_FACTOR,
                )
        except (ValueError, TypeError, ZeroDivisionError) as error:
            raise CheckpointError(f"the autoencoder cannot be built as {self} ({first_line(error)})") from error

    def build_encoder(self) -> ImageEncoder:
        """Our image encoder for these weights, on the meta device.

        Raises:
            CheckpointError: if there is no such network.
        """
        try:
            with torch.device("meta"):
                return ImageEncoder(
                    in_channels=self.in_channels,
                    latent_channels=self.z_channels,
                    block_out_channels=tuple(self.ch * factor for factor in self.ch_mult),
                    layers_per_block=self.num_res_blocks,
                    norm_num_groups=NORM_GROUPS,
                    dropout=self.dropout,
                )
        except (ValueError, TypeError, ZeroDivisionError) as error:
            raise CheckpointError(f"the image encoder cannot be built as {self} ({first_line(error)})") from error


def unet_layout_of(
    state: Mapping[str, Tensor], *, num_heads: int, dropout: float, image_size: int, where: str
) -> UNetLayout:
    """The layout that LDM's U-Net weights show. The number of heads is not in them.

    Raises:
        CheckpointError: if the names are not those of such a network, or its samplers are plain convolutions: then it
            is none of the models whose number of heads is known.
    """
    conv_in = _tensor(state, "input_blocks.0.0.weight", where, ndim=4)
    blocks = 1 + max((int(m[1]) for m in _matches(r"output_blocks\.(\d+)\.", state)), default=-1)
    if any(_matches(r"(input|output)_blocks\.\d+\.(0\.op|[12]\.conv)\.", state)):
        raise CheckpointError(
            f"{where}: this U-Net changes its resolution with plain convolutions; lsun_churches uses residual blocks, "
            "and other models have another number of heads, which no file states: give lsun_churches"
        )
    # The first output block that holds a second residual block is the end of the deepest level.
    ends = [int(m[1]) for m in _matches(r"output_blocks\.(\d+)\.[12]\.in_layers\.0\.weight", state)]
    per_level = min(ends, default=blocks - 1) + 1  # residual blocks of a level on the way up: num_res_blocks + 1
    if per_level < 2 or blocks % per_level:
        raise CheckpointError(f"{where}: {blocks} output blocks make no levels; the file is damaged or of another kind")
    starts = range(1, blocks + 1, per_level)
    widths = [_tensor(state, f"input_blocks.{i}.0.out_layers.3.weight", where, ndim=4).shape[0] for i in starts]
    model_channels = conv_in.shape[0]
    if any(width % model_channels for width in widths):
        raise CheckpointError(f"{where}: the levels are {widths} wide; all must be multiples of {model_channels}")
    return UNetLayout(
        in_channels=conv_in.shape[1],
        out_channels=_tensor(state, "out.2.weight", where, ndim=4).shape[0],
        model_channels=model_channels,
        channel_mult=tuple(width // model_channels for width in widths),
        num_res_blocks=per_level - 1,
        attention_levels=tuple(
            any(f"input_blocks.{i + block}.1.qkv.weight" in state for block in range(per_level - 1)) for i in starts
        ),
        num_heads=num_heads,
        dropout=dropout,
        image_size=image_size,
    )


def autoencoder_layout_of(state: Mapping[str, Tensor], *, resolution: int, where: str) -> AutoencoderLayout:
    """The layout that LDM's autoencoder weights show.

    Raises:
        CheckpointError: if the names are not those of a KL autoencoder that diffusers knows.
    """
    if any(key.startswith("quantize.") for key in state):
        raise CheckpointError(f"{where}: a VQ autoencoder; LEAF needs a KL autoencoder such as kl-f8")
    if any(_matches(r"(?:encoder\.down|decoder\.up)\.\d+\.attn\.", state)):
        raise CheckpointError(
            f"{where}: the autoencoder has attention in its levels; only those with attention in the middle are known, "
            "such as kl-f8"
        )
    levels = 1 + max((int(m[1]) for m in _matches(r"encoder\.down\.(\d+)\.block\.", state)), default=-1)
    blocks = 1 + max((int(m[1]) for m in _matches(r"encoder\.down\.0\.block\.(\d+)\.", state)), default=-1)
    conv_in = _tensor(state, "encoder.conv_in.weight", where, ndim=4)
    ch = conv_in.shape[0]
    widths = [
        _tensor(state, f"encoder.down.{i}.block.0.conv1.weight", where, ndim=4).shape[0] for i in range(max(levels, 1))
    ]
    if any(width % ch for width in widths):
        raise CheckpointError(f"{where}: the levels are {widths} wide; all must be multiples of {ch}")
    z = _tensor(state, "encoder.conv_out.weight", where, ndim=4).shape[0]
    quantised = _tensor(state, "quant_conv.weight", where, ndim=4).shape[0]
    if z != quantised or z % 2:
        raise CheckpointError(
            f"{where}: the encoder gives {z} channels, quant_conv {quantised}; both must be twice the latent's channels"
        )
    return AutoencoderLayout(
        ch=ch,
        ch_mult=tuple(width // ch for width in widths),
        num_res_blocks=blocks,
        z_channels=z // 2,
        in_channels=conv_in.shape[1],
        out_ch=_tensor(state, "decoder.conv_out.weight", where, ndim=4).shape[0],
        resolution=resolution,
    )


# --- tables -----------------------------------------------------------------------------------------------------------

Kind = Literal["same", "conv1d", "conv2d", "qkv"]


@dataclass(frozen=True)
class Entry:
    """One tensor of LDM and what it is in diffusers.

    Attributes:
        ldm: its name there.
        diffusers: its name here; three for ``qkv``: query, key, value.
        kind: ``same``; ``conv1d`` and ``conv2d``: a convolution of width 1 there, a linear layer here; ``qkv``: the
            fused, head-interleaved projection ``[heads, 3, head_dim, ...]`` there, three linear layers here.
    """

    ldm: str
    diffusers: tuple[str, ...]
    kind: Kind = "same"

    def ldm_shape(self, shape: Shape) -> Shape:
        """The shape there of a tensor that has ``shape`` here."""
        if self.kind == "same":
            return shape
        if self.kind == "qkv":
            return (3 * shape[0], *shape[1:], *[1] * (len(shape) - 1))  # a bias has no trailing 1
        return (*shape, 1) if self.kind == "conv1d" else (*shape, 1, 1)

    def to_diffusers(self, tensor: Tensor, *, heads: int) -> tuple[Tensor, ...]:
        if self.kind == "same":
            return (tensor,)
        if self.kind == "qkv":
            rest = tensor.shape[1:2]  # [C] for a weight, nothing for a bias
            fused = tensor.reshape(heads, 3, -1, *rest)  # [heads, 3, head_dim, C]
            return tuple(fused[:, i].reshape(-1, *rest) for i in range(3))
        return (tensor.reshape(tensor.shape[:2]),)

    def to_ldm(self, tensors: Sequence[Tensor], *, heads: int) -> Tensor:
        """The inverse of :meth:`to_diffusers`, bit for bit."""
        if self.kind != "qkv":
            return tensors[0].reshape(self.ldm_shape(tuple(tensors[0].shape)))
        split = [tensor.reshape(heads, 1, -1, *tensor.shape[1:]) for tensor in tensors]
        return torch.cat(split, 1).reshape(self.ldm_shape(tuple(tensors[0].shape)))


def unet_entries(layout: UNetLayout, unet: MaskUNet) -> list[Entry]:
    """The table of a U-Net; ``unet`` is what the layout builds."""
    names = unet.state_dict()
    table: list[Entry] = []

    def pair(ldm: str, ours: str) -> None:
        table.extend(_pair(ldm, ours))

    def resnet(ldm: str, ours: str) -> None:
        pair(f"{ldm}.in_layers.0", f"{ours}.norm1")
        pair(f"{ldm}.in_layers.2", f"{ours}.conv1")
        pair(f"{ldm}.emb_layers.1", f"{ours}.time_emb_proj")
        pair(f"{ldm}.out_layers.0", f"{ours}.norm2")
        pair(f"{ldm}.out_layers.3", f"{ours}.conv2")
        if f"{ours}.conv_shortcut.weight" in names:
            pair(f"{ldm}.skip_connection", f"{ours}.conv_shortcut")

    def attention(ldm: str, ours: str) -> None:
        pair(f"{ldm}.norm", f"{ours}.group_norm")
        for leaf in ("weight", "bias"):
            three = tuple(f"{ours}.{part}.{leaf}" for part in ("to_q", "to_k", "to_v"))
            table.append(Entry(f"{ldm}.qkv.{leaf}", three, "qkv"))
        table.extend(_pair(f"{ldm}.proj_out", f"{ours}.to_out.0", "conv1d"))

    def sampler(ldm: str, ours: str, convolution: str) -> None:
        if layout.resblock_updown:
            resnet(ldm, ours)
        else:
            pair(f"{ldm}.{convolution}", f"{ours}.conv")

    pair("time_embed.0", "time_embedding.linear_1")
    pair("time_embed.2", "time_embedding.linear_2")
    pair("input_blocks.0.0", "conv_in")
    last = len(layout.channel_mult) - 1
    index = 1
    for level, attends in enumerate(layout.attention_levels):
        for block in range(layout.num_res_blocks):
            resnet(f"input_blocks.{index}.0", f"down_blocks.{level}.resnets.{block}")
            if attends:
                attention(f"input_blocks.{index}.1", f"down_blocks.{level}.attentions.{block}")
            index += 1
        if level < last:
            sampler(f"input_blocks.{index}.0", f"down_blocks.{level}.downsamplers.0", "op")
            index += 1
    resnet("middle_block.0", "mid_block.resnets.0")
    attention("middle_block.1", "mid_block.attentions.0")
    resnet("middle_block.2", "mid_block.resnets.1")
    index = 0
    for up, attends in enumerate(reversed(layout.attention_levels)):
        for block in range(layout.num_res_blocks + 1):
            resnet(f"output_blocks.{index}.0", f"up_blocks.{up}.resnets.{block}")
            if attends:
                attention(f"output_blocks.{index}.1", f"up_blocks.{up}.attentions.{block}")
            if block == layout.num_res_blocks and up < last:
                sampler(f"output_blocks.{index}.{2 if attends else 1}", f"up_blocks.{up}.upsamplers.0", "conv")
            index += 1
    pair("out.0", "conv_norm_out")
    pair("out.2", "conv_out")
    return table


def autoencoder_entries(layout: AutoencoderLayout, module: nn.Module, *, decoder: bool) -> list[Entry]:
    """The table of an autoencoder, or of its encoder and ``quant_conv`` alone; ``module`` is what the layout builds."""
    names = module.state_dict()
    table: list[Entry] = []
    last = len(layout.ch_mult) - 1

    def pair(ldm: str, ours: str) -> None:
        table.extend(_pair(ldm, ours))

    def resnet(ldm: str, ours: str) -> None:
        for leaf in ("norm1", "conv1", "norm2", "conv2"):
            pair(f"{ldm}.{leaf}", f"{ours}.{leaf}")
        if f"{ours}.conv_shortcut.weight" in names:
            pair(f"{ldm}.nin_shortcut", f"{ours}.conv_shortcut")

    def half(name: str) -> None:
        """What encoder and decoder share."""
        pair(f"{name}.conv_in", f"{name}.conv_in")
        resnet(f"{name}.mid.block_1", f"{name}.mid_block.resnets.0")
        ldm, ours = f"{name}.mid.attn_1", f"{name}.mid_block.attentions.0"
        pair(f"{ldm}.norm", f"{ours}.group_norm")
        for theirs, mine in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
            table.extend(_pair(f"{ldm}.{theirs}", f"{ours}.{mine}", "conv2d"))
        resnet(f"{name}.mid.block_2", f"{name}.mid_block.resnets.1")
        pair(f"{name}.norm_out", f"{name}.conv_norm_out")
        pair(f"{name}.conv_out", f"{name}.conv_out")

    half("encoder")
    for level in range(last + 1):
        for block in range(layout.num_res_blocks):
            resnet(f"encoder.down.{level}.block.{block}", f"encoder.down_blocks.{level}.resnets.{block}")
        if level < last:
            pair(f"encoder.down.{level}.downsample.conv", f"encoder.down_blocks.{level}.downsamplers.0.conv")
    pair("quant_conv", "quant_conv")
    if decoder:
        half("decoder")
        for level in range(last + 1):
            up = last - level  # LDM numbers the decoder's levels from the finest, diffusers from the deepest
            for block in range(layout.num_res_blocks + 1):
                resnet(f"decoder.up.{level}.block.{block}", f"decoder.up_blocks.{up}.resnets.{block}")
            if level > 0:
                pair(f"decoder.up.{level}.upsample.conv", f"decoder.up_blocks.{up}.upsamplers.0.conv")
        pair("post_quant_conv", "post_quant_conv")
    return table


def _pair(ldm: str, ours: str, kind: Kind = "same") -> Iterator[Entry]:
    yield Entry(f"{ldm}.weight", (f"{ours}.weight",), kind)
    yield Entry(f"{ldm}.bias", (f"{ours}.bias",))


# --- walking a table --------------------------------------------------------------------------------------------------


def to_diffusers(
    table: Sequence[Entry], state: Mapping[str, Tensor], module: nn.Module, *, heads: int = 1, where: str
) -> State:
    """LDM's weights under diffusers' names, for ``module``.

    Raises:
        CheckpointError: if a weight is missing, unknown, or has another shape; the first few are named.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    expected = {entry.ldm: entry.ldm_shape(shapes[entry.diffusers[0]]) for entry in table}
    check_keys(expected, state, where=where)
    return {
        name: tensor
        for entry in table
        for name, tensor in zip(entry.diffusers, entry.to_diffusers(state[entry.ldm], heads=heads), strict=True)
    }


def to_ldm(table: Sequence[Entry], state: Mapping[str, Tensor], *, heads: int = 1, where: str) -> State:
    """The inverse of :func:`to_diffusers`.

    Raises:
        CheckpointError: if the state's names are not exactly the table's.
    """
    wrong = sorted(set(state) ^ {name for entry in table for name in entry.diffusers})
    if wrong:
        raise CheckpointError(f"{where}: {len(wrong)} weights are missing or unknown ({', '.join(wrong[:3])})")
    return {entry.ldm: entry.to_ldm([state[name] for name in entry.diffusers], heads=heads) for entry in table}


def check_keys(expected: Mapping[str, Shape], state: Mapping[str, Tensor], *, where: str) -> None:
    """Every key is accounted for.

    Raises:
        CheckpointError: if a key is missing, unknown, or its tensor has another shape; the first few are named.
    """
    missing = [key for key in expected if key not in state]
    unknown = [key for key in state if key not in expected]
    shaped = [
        f"{key} is {list(state[key].shape)} and should be {list(shape)}"
        for key, shape in expected.items()
        if key in state and tuple(state[key].shape) != shape
    ]
    problems = [
        f"{len(found)} {what} ({', '.join(found[:3])}{', ...' if len(found) > 3 else ''})"
        for what, found in (("missing", missing), ("unknown", unknown), ("of another shape", shaped))
        if found
    ]
    if problems:
        raise CheckpointError(
            f"{where}: the weights do not fit: {'; '.join(problems)}; download it again, or give one of this kind"
        )


def _tensor(state: Mapping[str, Tensor], key: str, where: str, *, ndim: int) -> Tensor:
    """A tensor whose sizes can be read off: it has ``ndim`` of them and none is 0."""
    if key not in state:
        raise CheckpointError(f"{where}: no {key}; the checkpoint is incomplete or of another kind")
    shape = list(state[key].shape)
    if len(shape) != ndim or 0 in shape:
        raise CheckpointError(
            f"{where}: {key} is {shape}; it must have {ndim} sizes above 0, the file is damaged or of another kind"
        )
    return state[key]


def _matches(pattern: str, state: Mapping[str, Any]) -> Iterator[re.Match[str]]:
    compiled = re.compile(pattern)
    return (match for match in map(compiled.match, state) if match)


def first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
