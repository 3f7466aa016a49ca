"""Settings to modules, and modules to figures (parameters, GFLOPs)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, DDIMScheduler
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from leafseg.config import Settings
from leafseg.errors import ConfigError
from leafseg.mask_code import MaskCode, make_mask_code
from leafseg.model.autoencoder import build_autoencoder, new_autoencoder
from leafseg.model.image_encoder import ImageEncoder
from leafseg.model.projector import Projector
from leafseg.model.unet import MaskUNet


@dataclass(frozen=True)
class Components:
    """The inference model's parts; ``autoencoder`` is frozen."""

    unet: MaskUNet
    autoencoder: AutoencoderKL
    image_encoder: ImageEncoder
    scheduler: DDIMScheduler
    mask_code: MaskCode


def build_scheduler(settings: Settings) -> DDIMScheduler:
    """The noise schedule, every field written out: a default that changes elsewhere must not change a saved model."""
    return DDIMScheduler(
        num_train_timesteps=settings.scheduler.num_train_timesteps,
        beta_start=settings.scheduler.beta_start,
        beta_end=settings.scheduler.beta_end,
        beta_schedule=settings.scheduler.beta_schedule,
        trained_betas=None,
        clip_sample=settings.scheduler.clip_sample,
        clip_sample_range=1.0,
        set_alpha_to_one=True,  # the last step lands on the clean latent itself
        steps_offset=0,
        prediction_type=settings.objective.prediction_type,
        thresholding=False,
        dynamic_thresholding_ratio=0.995,
        sample_max_value=1.0,
        timestep_spacing="trailing",  # [999] for one step: the loop needs no special case
        rescale_betas_zero_snr=settings.scheduler.zero_terminal_snr,
    )


def build_unet(settings: Settings, *, latent_channels: int, num_pictures: int) -> MaskUNet:
    """The U-Net for image latent + mask latent (image first) in, mask latent out.

    Raises:
        ConfigError: if the layout cannot be built.
    """
    unet = settings.model.unet
    try:
        return MaskUNet(
            sample_size=settings.data.preprocessing.size[0] // (settings.model.stride // unet.stride),
            in_channels=latent_channels * (1 + num_pictures),
            out_channels=latent_channels * num_pictures,
            block_out_channels=unet.block_out_channels,
            down_block_types=unet.down_block_types,
            up_block_types=unet.up_block_types,
            layers_per_block=unet.layers_per_block,
            downsample_type=unet.resample,
            upsample_type=unet.resample,
            norm_num_groups=unet.norm_num_groups,
            attn_norm_num_groups=unet.norm_num_groups,
            dropout=unet.dropout,
            num_attention_heads=unet.num_attention_heads,
        )
    except ValueError as error:
        raise ConfigError(f"model.unet cannot be built ({str(error).splitlines()[0]}); change it") from error


def build_components(
    settings: Settings,
    *,
    label_names: tuple[str, ...] = ("background", "foreground"),
    overlapping: bool = False,
    with_weights: bool = True,
) -> Components:
    """All parts of the inference model, initialised for training.

    Args:
        settings: the preset or run settings.
        label_names: names of the classes, background first; of overlapping labels, no background.
        overlapping: whether a pixel may have several labels.
        with_weights: False leaves the autoencoder at random weights (to count, or to load others over it).

    Raises:
        ConfigError: if the layout cannot be built, or the mask code cannot write these labels.
        CheckpointError: if the autoencoder's weights are missing or damaged.
    """
    code = make_mask_code(settings.model.mask_code, label_names, overlapping=overlapping)
    make = build_autoencoder if with_weights else new_autoencoder
    autoencoder = make(settings.model.autoencoder).eval().requires_grad_(False)
    return Components(
        unet=build_unet(
            settings, latent_channels=settings.model.autoencoder.latent_channels, num_pictures=code.num_pictures
        ),
        autoencoder=autoencoder,
        image_encoder=ImageEncoder.from_autoencoder(
            autoencoder,
            dropout=settings.model.image_encoder_dropout,
            copy=settings.model.image_encoder_start == "autoencoder",
        ).requires_grad_(True),
        scheduler=build_scheduler(settings),
        mask_code=code,
    )


def build_projector(settings: Settings, *, teacher_dim: int) -> Projector:
    """The training-only MLP from the tap's channels to the teacher's width."""
    channels = settings.model.unet.block_out_channels[settings.objective.alignment_tap]
    return Projector(channels, settings.teacher.projector_width, teacher_dim)


def tap_grid(settings: Settings) -> tuple[int, int]:
    """Height and width of the alignment tap for the preset's input size (16x16 at 256 px for leaf-base)."""
    factor = settings.model.autoencoder.stride * 2 ** (settings.objective.alignment_tap + 1)
    height, width = settings.data.preprocessing.size
    return height // factor, width // factor


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@dataclass(frozen=True)
class ModelFigures:
    """Exact parameter counts, and GFLOPs (2 per multiply-add) for one image at ``size``."""

    size: tuple[int, int]
    parameters: dict[str, int]
    gflops: dict[str, float]


def model_figures(
    settings: Settings,
    *,
    size: tuple[int, int] | None = None,
    label_names: tuple[str, ...] = ("background", "foreground"),
    overlapping: bool = False,
) -> ModelFigures:
    """Count without memory or weights: the parts are built on the meta device."""
    height, width = size or settings.data.preprocessing.size
    with torch.device("meta"):
        parts = build_components(settings, label_names=label_names, overlapping=overlapping, with_weights=False)
        image = torch.empty(1, 3, height, width)
        down = settings.model.stride // settings.model.unet.stride
        z = settings.model.autoencoder.latent_channels
        outputs = z * parts.mask_code.num_pictures
        latent = torch.empty(1, z + outputs, height // down, width // down)

        def flops(module: nn.Module, *inputs: object) -> float:
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                module(*inputs)
            return counter.get_total_flops() / 1e9

        autoencoder = parts.autoencoder
        decoder_parameters = count_parameters(autoencoder.decoder) + count_parameters(autoencoder.post_quant_conv)
        parameters = {
            "autoencoder": count_parameters(autoencoder),
            "image_encoder": count_parameters(parts.image_encoder),
            "unet": count_parameters(parts.unet),
        }
        # Inference needs the autoencoder's decoder only.
        parameters["inference"] = parameters["image_encoder"] + parameters["unet"] + decoder_parameters
        gflops = {
            "image_encoder": flops(parts.image_encoder, image),
            "unet": flops(parts.unet, latent, torch.zeros(1)),
            "mask_decoder": parts.mask_code.num_pictures
            * flops(autoencoder.decoder, torch.empty(1, z, *latent.shape[2:])),
        }
        gflops["inference"] = sum(gflops.values())
    return ModelFigures(size=(height, width), parameters=parameters, gflops=gflops)
