"""One reverse step as one module, image and noise to probability: what is exported."""

from __future__ import annotations

import copy
from typing import cast

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from leafseg.config import PartChoice, PredictionType
from leafseg.errors import ConfigError
from leafseg.mask_code import BinaryMaskCode, BitsMaskCode, OverlappingMaskCode, PlanesMaskCode
from leafseg.model.autoencoder import MaskDecoder, decode_pictures, scale_latent
from leafseg.model.compact import CompactMaskDecoder
from leafseg.model.unet import MaskUNet
from leafseg.pipeline import LeafPipeline
from leafseg.sampler import ddim_update, inference_timesteps

# Whose labels follow from the probability alone, by the rules that the runtime knows.
_CODES = (BinaryMaskCode, BitsMaskCode, OverlappingMaskCode, PlanesMaskCode)


class SingleStep(nn.Module):
    """Image encoder, U-Net at the last timestep, mask decoder and mask code.

    The pipeline's own modules are used, except for a copy of the U-Net whose time embedding is a constant.

    Args:
        pipeline: see :func:`check_exportable`.
        decoder, encoder: ``compact`` takes the pipeline's light part (``leafseg compact``).
    """

    def __init__(self, pipeline: LeafPipeline, *, decoder: PartChoice = "full", encoder: PartChoice = "full") -> None:
        super().__init__()
        schedule = pipeline.scheduler.config
        (self.timestep,) = inference_timesteps(int(schedule["num_train_timesteps"]), 1)
        self._light_encoder, self._light_decoder = encoder == "compact", decoder == "compact"
        self.image_encoder = pipeline.compact_encoder if self._light_encoder else pipeline.image_encoder
        self.unet = fold_time(pipeline.unet, self.timestep)
        self.mask_decoder = pipeline.compact_decoder if self._light_decoder else pipeline.vae
        self._latent_statistics = pipeline.vae.config
        self._probability = pipeline.mask_code.probability
        self._prediction_type = cast(PredictionType, schedule["prediction_type"])
        self._clip_range = float(schedule["clip_sample_range"]) if schedule["clip_sample"] else None
        self._alpha_bar = float(pipeline.scheduler.alphas_cumprod[self.timestep])
        self._final_alpha_bar = float(pipeline.scheduler.final_alpha_cumprod)

    def forward(self, image: Tensor, noise: Tensor) -> Tensor:
        """Probability, float32 ``[B, C, h, w]``, of images ``[B, 3, h, w]`` in 0..1 and noise ``[B, z, h/s, w/s]``;
        s is the latent stride.
        """
        dtype = self.unet.dtype
        image_latent = self._encode(image.to(dtype) * 2 - 1)
        prediction = self.unet.denoise(torch.cat([image_latent, noise.to(dtype)], 1), self.timestep)
        latent = ddim_update(
            prediction.float(),
            noise,
            alpha_bar=self._alpha_bar,
            next_alpha_bar=self._final_alpha_bar,
            prediction_type=self._prediction_type,
            clip_range=self._clip_range,
        )
        return self._probability(self._decode(latent.to(dtype)).float())

    def _encode(self, image: Tensor) -> Tensor:
        latent: Tensor = self.image_encoder(image)
        return latent if self._light_encoder else scale_latent(latent, self._latent_statistics)

    def _decode(self, latent: Tensor) -> Tensor:
        if self._light_decoder:
            return cast(CompactMaskDecoder, self.mask_decoder).decode_pictures(latent)
        return decode_pictures(cast(MaskDecoder, self.mask_decoder), latent)


class _Constant(nn.Module):
    """Gives its value ``[1, C]`` whatever it is given; it takes part in every batch by broadcasting."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)

    def forward(self, *_inputs: Tensor) -> Tensor:
        return self.value


@torch.no_grad()
def fold_time(unet: MaskUNet, timestep: int) -> MaskUNet:
    """A copy of the U-Net for one timestep: each block's scale and shift by time, computed once, is a constant.

    What computed them is left out, a few percent of the weights.
    """
    if unet.class_embedding is not None:
        raise ConfigError("the U-Net embeds classes, and an exported graph takes image and noise alone")
    folded = copy.deepcopy(unet)
    parameter = next(folded.parameters())
    time = torch.tensor([timestep], device=parameter.device)
    embedding = folded.time_embedding(folded.time_proj(time).to(parameter.dtype))  # [1, D]
    for module in folded.modules():
        if isinstance(module, ResnetBlock2D) and module.time_emb_proj is not None:
            given = embedding if module.skip_time_act else module.nonlinearity(embedding)
            module.time_emb_proj = _Constant(module.time_emb_proj(given))
    folded.time_proj = _Constant(embedding.new_zeros(1, 1))
    folded.time_embedding = _Constant(embedding.new_zeros(1, 1))
    return folded


def check_exportable(pipeline: LeafPipeline, *, decoder: PartChoice = "full", encoder: PartChoice = "full") -> None:
    """
    Raises:
        ConfigError: if an export cannot say what the model says.
        CheckpointError: if the model lacks a compact part that is asked for.
    """
    pipeline.check_parts(decoder, encoder)
    if pipeline.preprocessor.settings.fit == "tile":
        raise ConfigError(
            "the model's fit is 'tile', and an exported model takes whole images; predict with the model itself, or "
            "train with data.preprocessing.fit=stretch or pad"
        )
    steps = int(pipeline.config["num_inference_steps"])
    if steps != 1:
        raise ConfigError(
            f"the model recommends {steps} reverse steps, and an exported model takes one; predict with it itself"
        )
    if type(pipeline.mask_code) not in _CODES:
        raise ConfigError(
            f"the model's mask code {pipeline.mask_code.name!r} is none of binary, planes, bits and overlapping, whose "
            "labels an exported model knows; predict with the model itself"
        )
