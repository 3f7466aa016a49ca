"""The denoising U-Net: a diffusers UNet2DModel with a fixed number of heads and a tap for the alignment."""

from __future__ import annotations

from typing import Any

from diffusers import UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention
from torch import Tensor

from leafseg.model.recompute import recompute_activations, recomputes


class MaskUNet(UNet2DModel):
    """UNet2DModel whose attention has ``num_attention_heads`` heads at every level, as LDM's U-Net has.

    diffusers fixes the WIDTH of a head, LDM their NUMBER: weights load either way, but only one of them computes what
    the weights were trained for. The number is therefore part of this class's config, and such a folder must be loaded
    by this class. All other parameters are UNet2DModel's own, under their own names.
    """

    # A public home that does not move with the source file: it is written into every saved model.
    __module__ = "leafseg"

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 8,
        out_channels: int = 4,
        center_input_sample: bool = False,
        time_embedding_type: str = "positional",
        time_embedding_dim: int | None = None,
        freq_shift: int = 0,
        flip_sin_to_cos: bool = True,
        down_block_types: tuple[str, ...] = ("AttnDownBlock2D",) * 4 + ("DownBlock2D",),
        mid_block_type: str | None = "UNetMidBlock2D",
        up_block_types: tuple[str, ...] = ("ResnetUpsampleBlock2D",) + ("AttnUpBlock2D",) * 4,
        block_out_channels: tuple[int, ...] = (192, 384, 384, 768, 768),
        layers_per_block: int = 2,
        mid_block_scale_factor: float = 1,
        downsample_padding: int = 1,
        downsample_type: str = "resnet",
        upsample_type: str = "resnet",
        dropout: float = 0.2,
        act_fn: str = "silu",
        attention_head_dim: int | None = 8,
        norm_num_groups: int = 32,
        attn_norm_num_groups: int | None = 32,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: str = "scale_shift",
        add_attention: bool = True,
        class_embed_type: str | None = None,
        num_class_embeds: int | None = None,
        num_train_timesteps: int | None = None,
        num_attention_heads: int = 8,
    ) -> None:
        super().__init__(
            sample_size=sample_size,
            in_channels=in_channels,
            out_channels=out_channels,
            center_input_sample=center_input_sample,
            time_embedding_type=time_embedding_type,
            time_embedding_dim=time_embedding_dim,
            freq_shift=freq_shift,
            flip_sin_to_cos=flip_sin_to_cos,
            down_block_types=down_block_types,
            mid_block_type=mid_block_type,
            up_block_types=up_block_types,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            mid_block_scale_factor=mid_block_scale_factor,
            downsample_padding=downsample_padding,
            downsample_type=downsample_type,
            upsample_type=upsample_type,
            dropout=dropout,
            act_fn=act_fn,
            attention_head_dim=attention_head_dim,
            norm_num_groups=norm_num_groups,
            attn_norm_num_groups=attn_norm_num_groups,
            norm_eps=norm_eps,
            resnet_time_scale_shift=resnet_time_scale_shift,
            add_attention=add_attention,
            class_embed_type=class_embed_type,
            num_class_embeds=num_class_embeds,
            num_train_timesteps=num_train_timesteps,
        )
        for module in self.modules():
            if isinstance(module, Attention):
                if module.inner_dim % num_attention_heads:
                    raise ValueError(
                        f"an attention is {module.inner_dim} wide; its width must be a multiple of "
                        f"num_attention_heads={num_attention_heads}"
                    )
                module.heads = num_attention_heads
                module.scale = (module.inner_dim // num_attention_heads) ** -0.5
                module.sliceable_head_dim = num_attention_heads

    def denoise(self, sample: Tensor, timestep: Tensor | int) -> Tensor:
        """The prediction ``[B, out_channels, h, w]`` for ``sample`` ``[B, in_channels, h, w]``; no wrapper object."""
        output: Tensor = self(sample, timestep, return_dict=False)[0]
        return output

    def denoise_with_tap(self, sample: Tensor, timestep: Tensor | int, *, tap_block: int) -> tuple[Tensor, Tensor]:
        """Prediction, and the output of down block ``tap_block`` after its downsampler ``[B, C, h', w']``.

        The tap is chosen by block index, so that it exists at every input size.
        """
        taps: list[Tensor] = []

        def keep(_module: Any, _inputs: Any, output: tuple[Tensor, ...]) -> None:
            taps.append(output[0])  # a down block returns (hidden states, residuals for the up path)

        handle = self.down_blocks[tap_block].register_forward_hook(keep)
        try:
            prediction = self.denoise(sample, timestep)
        finally:
            handle.remove()
        return prediction, taps[0]

    @property
    def is_gradient_checkpointing(self) -> bool:
        return recomputes(self)

    def _set_gradient_checkpointing(self, enable: bool = True, gradient_checkpointing_func: Any = None) -> None:
        """What diffusers' ``enable_gradient_checkpointing`` calls; its own would leave attention and resampling out."""
        recompute_activations(self, enable)

    def tap_channels(self, tap_block: int) -> int:
        return int(self.config["block_out_channels"][tap_block])
