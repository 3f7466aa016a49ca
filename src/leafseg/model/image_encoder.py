"""The trainable image encoder: a copy of the autoencoder's encoder."""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderKL
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution, Encoder
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from leafseg.model.recompute import recompute_activations, recomputes


class ImageEncoder(ModelMixin, ConfigMixin):
    """Encoder and ``quant_conv`` of an AutoencoderKL; returns the distribution's mode.

    Args mirror AutoencoderKL's names. ``dropout`` acts inside every residual block, in training mode only.
    """

    __module__ = "leafseg"  # see MaskUNet
    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        latent_channels: int = 4,
        block_out_channels: tuple[int, ...] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        act_fn: str = "silu",
        mid_block_add_attention: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.encoder = Encoder(
            in_channels=in_channels,
            out_channels=latent_channels,
            down_block_types=("DownEncoderBlock2D",) * len(block_out_channels),
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            act_fn=act_fn,
            norm_num_groups=norm_num_groups,
            double_z=True,
            mid_block_add_attention=mid_block_add_attention,
        )
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        for module in self.modules():
            if isinstance(module, ResnetBlock2D):
                module.dropout.p = dropout

    def forward(self, images: Tensor) -> Tensor:
        """Code ``[B, latent_channels, H/s, W/s]`` of images ``[B, 3, H, W]`` in -1..1 (stride s), before scaling."""
        mode: Tensor = DiagonalGaussianDistribution(self.quant_conv(self.encoder(images))).mode()
        return mode

    @property
    def is_gradient_checkpointing(self) -> bool:
        return recomputes(self)

    def _set_gradient_checkpointing(self, enable: bool = True, gradient_checkpointing_func: Any = None) -> None:
        """What diffusers' ``enable_gradient_checkpointing`` calls; see :meth:`MaskUNet._set_gradient_checkpointing`."""
        recompute_activations(self, enable)

    @classmethod
    def from_autoencoder(cls, autoencoder: AutoencoderKL, *, dropout: float = 0.0, copy: bool = True) -> ImageEncoder:
        """An encoder of the autoencoder's layout, with a copy of its weights or random ones."""
        config = autoencoder.config
        encoder = cls(
            in_channels=config["in_channels"],
            latent_channels=config["latent_channels"],
            block_out_channels=tuple(config["block_out_channels"]),
            layers_per_block=config["layers_per_block"],
            norm_num_groups=config["norm_num_groups"],
            act_fn=config["act_fn"],
            mid_block_add_attention=config["mid_block_add_attention"],
            dropout=dropout,
        )
        if copy:
            encoder.encoder.load_state_dict(autoencoder.encoder.state_dict())
            encoder.quant_conv.load_state_dict(autoencoder.quant_conv.state_dict())
        return encoder
