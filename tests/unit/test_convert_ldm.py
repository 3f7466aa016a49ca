"""Converted weights compute what LDM computes: against a second implementation, written here in plain torch."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from leafseg.convert.ldm import (
    AutoencoderLayout,
    Entry,
    UNetLayout,
    autoencoder_entries,
    autoencoder_layout_of,
    to_diffusers,
    to_ldm,
    unet_entries,
    unet_layout_of,
)
from leafseg.convert.leaf_release import autoencoder_layout, unet_layout
from leafseg.errors import CheckpointError

SHARED = Path(os.environ.get("LEAFSEG_SHARED") or Path(__file__).parents[3] / "shared")
HEADS = 8
TOLERANCE = 1e-6  # of the largest value; the sines of the timestep are single precision on both sides


# --- LDM's modules, with their names for the weights ------------------------------------------------------------------


class Block(nn.Module):
    """A residual block of the U-Net: the time embedding scales and shifts, an optional sampler stands inside."""

    def __init__(self, inputs: int, outputs: int, embedding: int, sampler: str | None = None) -> None:
        super().__init__()
        self.sampler = sampler
        self.in_layers = nn.Sequential(nn.GroupNorm(32, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, 2 * outputs))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, outputs), nn.SiLU(), nn.Dropout(0.2), nn.Conv2d(outputs, outputs, 3, padding=1)
        )
        self.skip_connection = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def resample(self, x: Tensor) -> Tensor:
        if self.sampler == "down":
            return F.avg_pool2d(x, 2)
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3) if self.sampler == "up" else x

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        hidden = self.in_layers[2](self.resample(self.in_layers[:2](x)))
        scale, shift = self.emb_layers(embedding)[:, :, None, None].chunk(2, 1)
        hidden = self.out_layers[0](hidden) * (1 + scale) + shift
        return self.skip_connection(self.resample(x)) + self.out_layers[1:](hidden)


class HeadedAttention(nn.Module):
    """Attention whose fused projection holds, for each head in turn, its queries, keys and values."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor, _embedding: Tensor) -> Tensor:
        tokens = x.flatten(2)
        fused = self.qkv(self.norm(tokens))  # [B, 3C, N]
        width = tokens.shape[1] // HEADS
        heads = []
        for h in range(HEADS):
            query, key, value = (fused[:, (3 * h + i) * width : (3 * h + i + 1) * width] for i in range(3))
            weight = (query.mT @ key / math.sqrt(width)).softmax(-1)  # [B, N, N]
            heads.append(value @ weight.mT)
        return (tokens + self.proj_out(torch.cat(heads, 1))).reshape(x.shape)


class LdmUNet(nn.Module):
    """The whole U-Net with samplers inside residual blocks, as lsun_churches is built."""

    def __init__(
        self, channels: int, mult: tuple[int, ...], blocks: int, attends: tuple[bool, ...], inputs: int
    ) -> None:
        super().__init__()
        self.channels = channels
        width = channels
        embedding = 4 * channels
        self.time_embed = nn.Sequential(nn.Linear(channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(inputs, channels, 3, padding=1)])])
        widths = [width]
        for level, factor in enumerate(mult):
            for _ in range(blocks):
                layers: list[nn.Module] = [Block(width, factor * channels, embedding)]
                width = factor * channels
                if attends[level]:
                    layers.append(HeadedAttention(width))
                self.input_blocks.append(nn.ModuleList(layers))
                widths.append(width)
            if level < len(mult) - 1:
                self.input_blocks.append(nn.ModuleList([Block(width, width, embedding, "down")]))
                widths.append(width)
        self.middle_block = nn.ModuleList(
            [Block(width, width, embedding), HeadedAttention(width), Block(width, width, embedding)]
        )
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(mult))):
            for block in range(blocks + 1):
                layers = [Block(width + widths.pop(), mult[level] * channels, embedding)]
                width = mult[level] * channels
                if attends[level]:
                    layers.append(HeadedAttention(width))
                if level > 0 and block == blocks:
                    layers.append(Block(width, width, embedding, "up"))
                self.output_blocks.append(nn.ModuleList(layers))
        self.out = nn.Sequential(nn.GroupNorm(32, width), nn.SiLU(), nn.Conv2d(width, 4, 3, padding=1))

    def forward(self, x: Tensor, timestep: int) -> Tensor:
        half = self.channels // 2
        angles = timestep * torch.exp(-math.log(10000) * torch.arange(half) / half)
        sines = torch.cat([angles.cos(), angles.sin()]).to(x.dtype)
        embedding = self.time_embed(sines[None].expand(x.shape[0], -1))
        hidden = self.input_blocks[0][0](x)
        kept = [hidden]
        for layers in self.input_blocks[1:]:
            for layer in layers:
                hidden = layer(hidden, embedding)
            kept.append(hidden)
        for layer in self.middle_block:
            hidden = layer(hidden, embedding)
        for layers in self.output_blocks:
            hidden = torch.cat([hidden, kept.pop()], 1)
            for layer in layers:
                hidden = layer(hidden, embedding)
        return self.out(hidden)


class Resnet(nn.Module):
    """A residual block of the autoencoder."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(32, inputs, eps=1e-6)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = nn.GroupNorm(32, outputs, eps=1e-6)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm1(x)
        hidden = self.conv1(hidden * hidden.sigmoid())
        hidden = self.norm2(hidden)
        hidden = self.conv2(hidden * hidden.sigmoid())
        return hidden + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class PixelAttention(nn.Module):
    """The autoencoder's attention: one head over all pixels, its projections written as convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        for name in ("q", "k", "v", "proj_out"):
            setattr(self, name, nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        query, key, value = (getattr(self, name)(normed).flatten(2) for name in "qkv")  # [B, C, N]
        weight = torch.einsum("bci,bcj->bij", query, key).div(math.sqrt(x.shape[1])).softmax(2)
        return x + self.proj_out(torch.einsum("bij,bcj->bci", weight, value).reshape(x.shape))


def middle(channels: int) -> nn.ModuleDict:
    blocks = {name: Resnet(channels, channels) for name in ("block_1", "block_2")}
    return nn.ModuleDict(blocks | {"attn_1": PixelAttention(channels)})


class LdmEncoder(nn.Module):
    def __init__(self, ch: int, mult: tuple[int, ...], blocks: int, z: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.down = nn.ModuleList()
        width = ch
        for level, factor in enumerate(mult):
            stage = nn.ModuleDict({"block": nn.ModuleList(), "attn": nn.ModuleList()})
            for _ in range(blocks):
                stage["block"].append(Resnet(width, factor * ch))
                width = factor * ch
            if level < len(mult) - 1:
                stage["downsample"] = nn.ModuleDict({"conv": nn.Conv2d(width, width, 3, stride=2)})
            self.down.append(stage)
        self.mid = middle(width)
        self.norm_out = nn.GroupNorm(32, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, 2 * z, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for stage in self.down:
            for block in stage["block"]:
                x = block(x)
            if "downsample" in stage:
                x = stage["downsample"]["conv"](F.pad(x, (0, 1, 0, 1)))  # padded on the right and below only
        for part in ("block_1", "attn_1", "block_2"):
            x = self.mid[part](x)
        return self.conv_out(F.silu(self.norm_out(x)))


class LdmDecoder(nn.Module):
    def __init__(self, ch: int, mult: tuple[int, ...], blocks: int, z: int) -> None:
        super().__init__()
        width = mult[-1] * ch
        self.conv_in = nn.Conv2d(z, width, 3, padding=1)
        self.mid = middle(width)
        stages = []
        for level in reversed(range(len(mult))):  # the deepest level is walked first, and numbered last
            stage = nn.ModuleDict({"block": nn.ModuleList(), "attn": nn.ModuleList()})
            for _ in range(blocks + 1):
                stage["block"].append(Resnet(width, mult[level] * ch))
                width = mult[level] * ch
            if level > 0:
                stage["upsample"] = nn.ModuleDict({"conv": nn.Conv2d(width, width, 3, padding=1)})
            stages.insert(0, stage)
        self.up = nn.ModuleList(stages)
        self.norm_out = nn.GroupNorm(32, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for part in ("block_1", "attn_1", "block_2"):
            x = self.mid[part](x)
        for stage in reversed(self.up):
            for block in stage["block"]:
                x = block(x)
            if "upsample" in stage:
                x = stage["upsample"]["conv"](F.interpolate(x, scale_factor=2.0))
        return self.conv_out(F.silu(self.norm_out(x)))


class LdmAutoencoder(nn.Module):
    def __init__(self, ch: int = 32, mult: tuple[int, ...] = (1, 2, 2), blocks: int = 1, z: int = 4) -> None:
        super().__init__()
        self.encoder = LdmEncoder(ch, mult, blocks, z)
        self.decoder = LdmDecoder(ch, mult, blocks, z)
        self.quant_conv = nn.Conv2d(2 * z, 2 * z, 1)
        self.post_quant_conv = nn.Conv2d(z, z, 1)


def draw_weights(module: nn.Module, seed: int = 0) -> None:
    """Weights that keep activations near 1 and make attention peaked: a wrong head must change the output by far."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        normal = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            value = 1 + 0.1 * normal if name.endswith("weight") else 0.1 * normal
        else:
            value = normal / math.sqrt(parameter[0].numel())
        with torch.no_grad():
            parameter.copy_(value * (2 if ".qkv." in name else 1))


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relative(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).abs().max() / reference.abs().max())


MULT, BLOCKS, ATTENDS = (1, 2, 2), 2, (True, True, False)


@pytest.fixture(scope="module")
def ldm_unet() -> LdmUNet:
    """In double precision: tiny normalised groups blow rounding up, which would hide behind a loose bound."""
    net = LdmUNet(32, MULT, BLOCKS, ATTENDS, inputs=8).eval()
    draw_weights(net)
    return net.double()


@pytest.fixture(scope="module")
def ldm_autoencoder() -> LdmAutoencoder:
    net = LdmAutoencoder().eval()
    draw_weights(net)
    return net.double()


@pytest.fixture(scope="module")
def layout(ldm_unet: LdmUNet) -> UNetLayout:
    return unet_layout_of(ldm_unet.state_dict(), num_heads=HEADS, dropout=0.2, image_size=8, where="ckpt")


def state_for(layout: UNetLayout, ldm_unet: LdmUNet) -> dict[str, Tensor]:
    module = layout.build()
    table = unet_entries(layout, module)
    return to_diffusers(table, ldm_unet.state_dict(), module, heads=layout.num_heads, where="ckpt")


# --- the U-Net --------------------------------------------------------------------------------------------------------


def test_the_layout_is_read_off_the_weights(layout: UNetLayout) -> None:
    assert layout == UNetLayout(8, 4, 32, MULT, BLOCKS, ATTENDS, num_heads=8, dropout=0.2, image_size=8)


@torch.no_grad()
@pytest.mark.parametrize("timestep", [0, 999])
def test_a_converted_unet_computes_what_ldm_computes(layout: UNetLayout, ldm_unet: LdmUNet, timestep: int) -> None:
    unet = layout.build()
    unet.load_state_dict(state_for(layout, ldm_unet), strict=True, assign=True)
    x = gaussian(2, 8, 8, 12)
    assert relative(unet.eval().denoise(x, timestep), ldm_unet(x, timestep)) < TOLERANCE


@torch.no_grad()
def test_heads_of_a_fixed_width_instead_of_a_fixed_number_compute_something_else(
    layout: UNetLayout, ldm_unet: LdmUNet
) -> None:
    ours, state, x = layout.build(), state_for(layout, ldm_unet), gaussian(1, 8, 8, 8)
    ours.load_state_dict(state, assign=True)
    config = {k: v for k, v in ours.config.items() if k != "num_attention_heads" and not k.startswith("_")}
    plain = UNet2DModel(**config).double()  # the same weights fit: nothing but the numbers tells
    plain.load_state_dict(state, strict=True)
    reference = ldm_unet(x, 500)
    assert relative(ours.eval().denoise(x, 500), reference) < TOLERANCE
    assert relative(plain.eval()(x, 500).sample, reference) > 0.02


@torch.no_grad()
def test_a_fused_projection_split_in_three_without_regard_to_heads_computes_something_else(
    layout: UNetLayout, ldm_unet: LdmUNet
) -> None:
    unet, state, x = layout.build(), state_for(layout, ldm_unet), gaussian(1, 8, 8, 8)
    naive = dict(state)
    for entry in unet_entries(layout, unet):
        if entry.kind == "qkv":
            fused = ldm_unet.state_dict()[entry.ldm]
            naive |= {name: third.flatten(1) if third.ndim > 1 else third
                      for name, third in zip(entry.diffusers, fused.chunk(3), strict=True)}  # fmt: skip
    reference = ldm_unet(x, 500)
    unet.load_state_dict(state, assign=True)
    assert relative(unet.eval().denoise(x, 500), reference) < TOLERANCE
    unet.load_state_dict(naive, assign=True)
    assert relative(unet.denoise(x, 500), reference) > 0.02


def test_row_h_3_i_d_of_a_fused_projection_is_row_h_d_of_the_ith_of_query_key_value() -> None:
    heads, width, channels = 4, 3, 12
    weight = torch.arange(3 * channels * channels).reshape(3 * channels, channels, 1)
    entry = Entry("qkv.weight", ("q.weight", "k.weight", "v.weight"), "qkv")
    split = entry.to_diffusers(weight, heads=heads)
    for h in range(heads):
        for i in range(3):
            for d in range(width):
                assert torch.equal(split[i][h * width + d], weight[(h * 3 + i) * width + d, :, 0])
    assert torch.equal(entry.to_ldm(split, heads=heads), weight)


# --- the autoencoder --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_converted_autoencoder_computes_what_ldm_computes(ldm_autoencoder: LdmAutoencoder) -> None:
    state = ldm_autoencoder.state_dict()
    layout = autoencoder_layout_of(state, resolution=32, where="ckpt")
    assert layout == AutoencoderLayout(ch=32, ch_mult=(1, 2, 2), num_res_blocks=1, z_channels=4, resolution=32)
    vae = layout.build()
    table = autoencoder_entries(layout, vae, decoder=True)
    vae.load_state_dict(to_diffusers(table, state, vae, where="ckpt"), strict=True, assign=True)
    vae.eval()
    image, code = gaussian(1, 3, 32, 24), gaussian(1, 4, 8, 6, seed=1)
    mean, _ = ldm_autoencoder.quant_conv(ldm_autoencoder.encoder(image)).chunk(2, 1)
    assert relative(vae.encode(image).latent_dist.mode(), mean) < TOLERANCE
    picture = ldm_autoencoder.decoder(ldm_autoencoder.post_quant_conv(code))
    assert relative(vae.decode(code).sample, picture) < TOLERANCE


@torch.no_grad()
def test_a_converted_image_encoder_computes_what_ldm_computes(ldm_autoencoder: LdmAutoencoder) -> None:
    parts = ("encoder.", "quant_conv.")
    state = {k: v for k, v in ldm_autoencoder.state_dict().items() if k.startswith(parts)}
    layout = AutoencoderLayout(ch=32, ch_mult=(1, 2, 2), num_res_blocks=1, z_channels=4)
    encoder = layout.build_encoder()
    table = autoencoder_entries(layout, encoder, decoder=False)
    encoder.load_state_dict(to_diffusers(table, state, encoder, where="x"), strict=True, assign=True)
    image = gaussian(1, 3, 24, 32)
    mean, _ = ldm_autoencoder.quant_conv(ldm_autoencoder.encoder(image)).chunk(2, 1)
    assert relative(encoder.eval()(image), mean) < TOLERANCE


# --- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attends", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("updown", [True, False])
def test_a_table_names_every_tensor_of_the_module_once(attends: tuple[bool, ...], updown: bool) -> None:
    layout = UNetLayout(8, 4, 32, (1, 2), 1, attends, resblock_updown=updown)
    unet = layout.build()
    table = unet_entries(layout, unet)
    ours = [name for entry in table for name in entry.diffusers]
    assert sorted(ours) == sorted(unet.state_dict())
    assert len({entry.ldm for entry in table}) == len(table)


def test_conversion_there_and_back_is_the_same_bit_for_bit(layout: UNetLayout, ldm_unet: LdmUNet) -> None:
    table = unet_entries(layout, layout.build())
    back = to_ldm(table, state_for(layout, ldm_unet), heads=HEADS, where="x")
    source = ldm_unet.state_dict()
    assert back.keys() == source.keys()
    assert all(back[key].shape == source[key].shape and torch.equal(back[key], source[key]) for key in source)


def test_every_wrong_weight_is_counted_and_the_first_ones_are_named(layout: UNetLayout, ldm_unet: LdmUNet) -> None:
    state = ldm_unet.state_dict()
    del state["middle_block.1.qkv.weight"]
    state["label_emb.weight"] = torch.zeros(2)
    state["out.2.weight"] = torch.zeros(4, 32, 1, 1)
    module = layout.build()
    with pytest.raises(CheckpointError) as caught:
        to_diffusers(unet_entries(layout, module), state, module, heads=8, where="model.ckpt")
    message = str(caught.value)
    assert message.startswith("model.ckpt: the weights do not fit: 1 missing (middle_block.1.qkv.weight); ")
    assert "1 unknown (label_emb.weight)" in message
    assert "1 of another shape (out.2.weight is [4, 32, 1, 1] and should be [4, 32, 3, 3])" in message


def test_a_unet_with_plain_samplers_is_refused_because_its_number_of_heads_is_unknown() -> None:
    layout = UNetLayout(3, 3, 32, (1, 2), 1, (False, True), resblock_updown=False)
    names = [entry.ldm for entry in unet_entries(layout, layout.build())]
    state = {name: torch.zeros(32, 3, 1, 1) for name in names}
    with pytest.raises(CheckpointError, match="plain convolutions; lsun_churches uses residual blocks"):
        unet_layout_of(state, num_heads=8, dropout=0.0, image_size=32, where="ffhq.ckpt")


@pytest.mark.parametrize(
    ("key", "said"),
    [("quantize.embedding.weight", "a VQ autoencoder"), ("encoder.down.1.attn.0.q.weight", "attention in its levels")],
)
def test_an_autoencoder_of_another_kind_is_refused(ldm_autoencoder: LdmAutoencoder, key: str, said: str) -> None:
    state = {**ldm_autoencoder.state_dict(), key: torch.zeros(1)}
    with pytest.raises(CheckpointError, match=said):
        autoencoder_layout_of(state, resolution=32, where="vq.ckpt")


DAMAGED = [(0, 3, 3, 3), (), (32,)]


@pytest.mark.parametrize("shape", DAMAGED)
@pytest.mark.parametrize(
    "key",
    [
        "encoder.conv_in.weight",
        "encoder.conv_out.weight",
        "encoder.down.1.block.0.conv1.weight",
        "quant_conv.weight",
        "decoder.conv_out.weight",
    ],
)
def test_an_autoencoder_with_an_empty_or_flat_weight_is_refused(
    ldm_autoencoder: LdmAutoencoder, key: str, shape: tuple[int, ...]
) -> None:
    state = {**ldm_autoencoder.state_dict(), key: torch.zeros(shape)}
    with pytest.raises(CheckpointError) as caught:
        autoencoder_layout_of(state, resolution=32, where="kl.ckpt")
    assert str(caught.value).startswith(f"kl.ckpt: {key} is {list(shape)}; it must have 4 sizes above 0")


@pytest.mark.parametrize("shape", DAMAGED)
@pytest.mark.parametrize("key", ["input_blocks.0.0.weight", "input_blocks.1.0.out_layers.3.weight", "out.2.weight"])
def test_a_unet_with_an_empty_or_flat_weight_is_refused(ldm_unet: LdmUNet, key: str, shape: tuple[int, ...]) -> None:
    state = {**ldm_unet.state_dict(), key: torch.zeros(shape)}
    with pytest.raises(CheckpointError) as caught:
        unet_layout_of(state, num_heads=HEADS, dropout=0.2, image_size=8, where="unet.ckpt")
    assert str(caught.value).startswith(f"unet.ckpt: {key} is {list(shape)}; it must have 4 sizes above 0")


def test_an_autoencoder_without_levels_is_incomplete(ldm_autoencoder: LdmAutoencoder) -> None:
    state = {k: v for k, v in ldm_autoencoder.state_dict().items() if not k.startswith("encoder.down.")}
    with pytest.raises(CheckpointError, match=r"no encoder\.down\.0\..* the checkpoint is incomplete"):
        autoencoder_layout_of(state, resolution=32, where="kl.ckpt")


@pytest.mark.skipif(not (SHARED / "golden").is_dir(), reason="needs the reference outputs (LEAFSEG_SHARED/golden)")
def test_the_tables_name_exactly_the_weights_of_the_released_layout() -> None:
    released = json.loads((SHARED / "golden" / "released_keys.json").read_text())
    unet = unet_layout(released["unet"]["config"], where="unet")
    vae = autoencoder_layout(released["vae"]["config"], where="vae")
    encoder = autoencoder_layout(released["latent_encoder"]["config"], where="latent_encoder")
    modules = {"unet": unet.build(), "vae": vae.build(), "latent_encoder": encoder.build_encoder()}
    tables = {
        "unet": unet_entries(unet, modules["unet"]),
        "vae": autoencoder_entries(vae, modules["vae"], decoder=True),
        "latent_encoder": autoencoder_entries(encoder, modules["latent_encoder"], decoder=False),
    }
    for part, table in tables.items():
        shapes = {name: tuple(tensor.shape) for name, tensor in modules[part].state_dict().items()}
        ours = {entry.ldm: list(entry.ldm_shape(shapes[entry.diffusers[0]])) for entry in table}
        assert ours == released[part]["shapes"], part
