"""Light stand-ins for the two large parts of inference: a decoder that draws masks alone, and a small image encoder.

The autoencoder's decoder can draw any picture, and a mask needs next to nothing of that; the image encoder was made to
keep what a picture looks like, and the U-Net reads only what tells the label. Both are distilled from the parts that
they stand in for (``leafseg compact``), and are valid for the model that they were distilled from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention_processor import Attention
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from leafseg.mask_code import PICTURE_CHANNELS

_GROUPS = 8
_WIDTH_A_STRIDE = 8  # least channels at the latent's size, a pixel of its stride: about equal work an image
_MIN_WIDTH = 16


def _least_width(levels: Sequence[int]) -> int:
    return int(_WIDTH_A_STRIDE * 2 ** (len(levels) - 1))


class _Block(nn.Module):
    """Two 3x3 convolutions and a shortcut. The one normalisation also tells each place about the whole picture."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(_GROUPS, channels)
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.silu(self.first(F.silu(self.norm(x)))))


class CompactMaskDecoder(ModelMixin, ConfigMixin):
    """Mask latents to black-and-white pictures: the mean of the three channels that the full decoder draws.

    It decodes the latent of each picture by itself, as the full decoder does. So one decoder serves every mask code and
    number of classes, and the masks it learns from need no classes: any shape is an example of each of them.

    Most work is done at the latent's own size; each doubling halves the width.

    Args:
        latent_channels: of one picture.
        width: channels at the latent's size, a multiple of 8.
        blocks: residual blocks there; one at each larger size.
        upsamplings: doublings from a latent cell to a pixel: 3 for 8 pixels a cell.
    """

    __module__ = "leafseg"  # see MaskUNet

    @register_to_config
    def __init__(self, latent_channels: int = 4, width: int = 128, blocks: int = 4, upsamplings: int = 3) -> None:
        super().__init__()
        widths = [max(width >> level, _MIN_WIDTH) for level in range(upsamplings)]
        self.enter = nn.Conv2d(latent_channels, width, 3, padding=1)
        self.body = nn.Sequential(*(_Block(width) for _ in range(blocks)))
        self.up = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(wide, 4 * narrow, 3, padding=1), nn.PixelShuffle(2), _Block(narrow))
                for wide, narrow in pairwise(widths)
            )
        )
        self.draw = nn.Sequential(nn.Conv2d(widths[-1], 4, 3, padding=1), nn.PixelShuffle(2))

    @classmethod
    def for_autoencoder(
        cls, config: Mapping[str, Any], *, width: int | None = None, blocks: int | None = None
    ) -> CompactMaskDecoder:
        """With random weights, for the masks of an autoencoder of this config; width and depth follow from it."""
        widths = config["block_out_channels"]
        # With stride 2 no blocks follow at larger sizes; two wide ones then agreed better than four narrow ones.
        single = len(widths) == 2
        return cls(
            latent_channels=int(config["latent_channels"]),
            width=width or max(_least_width(widths) * (2 if single else 1), int(widths[-1]) // 4),
            blocks=blocks or (2 if single else 4),
            upsamplings=len(widths) - 1,
        )

    def forward(self, latent: Tensor) -> Tensor:
        """Grey values ``[B, 1, H, W]``, about -1..1, of latents ``[B, z, h, w]`` as the U-Net predicts them."""
        x = self.body(self.enter(latent))
        values: Tensor = self.draw(F.silu(self.up(x)))
        return values

    def decode_pictures(self, latent: Tensor) -> Tensor:
        """What :func:`leafseg.model.autoencoder.decode_pictures` gives, in grey.

        Args:
            latent: mask latent ``[B, P*z, h, w]``.

        Returns:
            ``[B, P*3, H, W]``, about -1..1; the three channels of a picture are equal.
        """
        single = latent.reshape(-1, int(self.config["latent_channels"]), *latent.shape[-2:])
        grey = self(single)
        grey = grey.reshape(latent.shape[0], -1, *grey.shape[-2:])  # [B, P, H, W]
        return grey.repeat_interleave(PICTURE_CHANNELS, 1)


class CompactImageEncoder(ModelMixin, ConfigMixin):
    """Images to image latents, already scaled as the U-Net takes them.

    Args:
        latent_channels: of the image latent.
        width: channels at the latent's size, a multiple of 16; half of them at twice its size, if work is done there.
        blocks: residual blocks at the latent's size; half as many at twice its size.
        downsamplings: halvings from a pixel to a latent cell. All but one happen at the entrance, where pixels become
            channels; a single one happens there too, and then all blocks work at the latent's size.
        attention: self-attention after the blocks, for encoders that have it.
        latent_mean, latent_std: of the latents to be met, one a channel; the network works on normalised ones.
    """

    __module__ = "leafseg"  # see MaskUNet

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 4,
        width: int = 256,
        blocks: int = 4,
        downsamplings: int = 3,
        attention: bool = True,
        latent_mean: tuple[float, ...] = (0.0,) * 4,
        latent_std: tuple[float, ...] = (1.0,) * 4,
    ) -> None:
        super().__init__()
        # A single halving leaves no size between the image's and the latent's, and at the image's nothing is done.
        single = downsamplings == 1
        fold = 2 if single else 2 ** (downsamplings - 1)
        entered = width if single else width // 2
        self.enter = nn.Sequential(nn.PixelUnshuffle(fold), nn.Conv2d(3 * fold**2, entered, 3, padding=1))
        self.large = nn.Sequential(*(() if single else (_Block(entered) for _ in range(max(blocks // 2, 1)))))
        self.down = nn.Identity() if single else nn.Conv2d(entered, width, 3, stride=2, padding=1)
        self.body = nn.Sequential(*(_Block(width) for _ in range(blocks)))
        self.attend = (
            Attention(width, heads=4, dim_head=width // 4, norm_num_groups=_GROUPS, bias=True, residual_connection=True)
            if attention
            else None
        )
        self.leave = nn.Sequential(
            nn.GroupNorm(_GROUPS, width), nn.SiLU(), nn.Conv2d(width, latent_channels, 3, padding=1)
        )

    @classmethod
    def for_encoder(
        cls,
        config: Mapping[str, Any],
        *,
        width: int | None = None,
        blocks: int = 4,
        latent_mean: Sequence[float] | None = None,
        latent_std: Sequence[float] | None = None,
    ) -> CompactImageEncoder:
        """With random weights, for an image encoder of this config; its width follows from it by default."""
        widths, channels = config["block_out_channels"], int(config["latent_channels"])
        return cls(
            latent_channels=channels,
            width=width or max(_least_width(widths), int(widths[-1]) // 2),
            blocks=blocks,
            downsamplings=len(widths) - 1,
            attention=bool(config["mid_block_add_attention"]),
            latent_mean=tuple(latent_mean or [0.0] * channels),
            latent_std=tuple(latent_std or [1.0] * channels),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Image latents ``[B, z, h, w]``, scaled, of images ``[B, 3, H, W]`` in -1..1."""
        x = self.body(self.down(self.large(self.enter(images))))
        if self.attend is not None:
            x = self.attend(x)
        x = self.leave(x)
        mean, std = (x.new_tensor(self.config[name])[:, None, None] for name in ("latent_mean", "latent_std"))
        return x * std + mean
