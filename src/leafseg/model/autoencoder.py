"""The frozen autoencoder of masks, the shipped compact one included: building, loading, latent scale, decoder alone."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.modeling_utils import ModelMixin
from safetensors import SafetensorError
from torch import Tensor, nn

from leafseg.config import AutoencoderSettings
from leafseg.errors import CheckpointError, ConfigError

_PACKAGED = "packaged:"

DECODER_ONLY = (
    "holds the decoder of its autoencoder only (leafseg slim --decoder-only), and this needs the encoder too; use the "
    "model it was made from"
)


class MaskDecoder(ModelMixin, ConfigMixin):
    """Decoder and ``post_quant_conv`` of an AutoencoderKL: all that inference needs of it.

    Args are AutoencoderKL's of the same names.
    """

    __module__ = "leafseg"  # see MaskUNet

    @register_to_config
    def __init__(
        self,
        out_channels: int = 3,
        up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",) * 4,
        block_out_channels: tuple[int, ...] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        act_fn: str = "silu",
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        sample_size: int = 256,
        scaling_factor: float = 0.18215,
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
        use_post_quant_conv: bool = True,
        mid_block_add_attention: bool = True,
    ) -> None:
        super().__init__()
        self.decoder = Decoder(
            in_channels=latent_channels,
            out_channels=out_channels,
            up_block_types=up_block_types,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            act_fn=act_fn,
            mid_block_add_attention=mid_block_add_attention,
        )
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1) if use_post_quant_conv else None

    def decode(self, code: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """Pictures ``[B, 3, H, W]`` of a code ``[B, z, h, w]``, in a tuple of one as AutoencoderKL gives them."""
        if return_dict:
            raise ValueError("MaskDecoder.decode returns a tuple; call it with return_dict=False")
        if self.post_quant_conv is not None:
            code = self.post_quant_conv(code)
        return (self.decoder(code),)

    @classmethod
    def from_autoencoder(cls, autoencoder: AutoencoderKL) -> MaskDecoder:
        """The autoencoder's decoder; its weights are shared, not copied."""
        names = list(inspect.signature(cls.__init__).parameters)[1:]
        with torch.device("meta"):
            decoder = cls(**{name: autoencoder.config[name] for name in names})
        weights = autoencoder.state_dict()
        decoder.load_state_dict({name: weights[name] for name in decoder.state_dict()}, assign=True)
        return decoder.train(autoencoder.training).requires_grad_(False)


def new_autoencoder(settings: AutoencoderSettings) -> AutoencoderKL:
    """An AutoencoderKL with random weights. Latents keep mean 0 and deviation 1 until they are measured.

    Raises:
        ConfigError: if the layout cannot be built.
    """
    levels = len(settings.block_out_channels)
    try:
        return AutoencoderKL(
            block_out_channels=settings.block_out_channels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=settings.layers_per_block,
            latent_channels=settings.latent_channels,
            norm_num_groups=settings.norm_num_groups,
            mid_block_add_attention=settings.mid_block_attention,
            scaling_factor=settings.scaling_factor,
            sample_size=256,
        )
    except ValueError as error:
        raise ConfigError(f"model.autoencoder cannot be built ({str(error).splitlines()[0]}); change it") from error


def build_autoencoder(settings: AutoencoderSettings) -> AutoencoderKL:
    """The autoencoder that the settings name, in float32.

    Raises:
        CheckpointError: if its weights are missing or damaged.
        ConfigError: if the stored autoencoder has another shape than the settings say.
    """
    if settings.weights is None:
        return new_autoencoder(settings)
    packaged = settings.weights.startswith(_PACKAGED)
    folder = packaged_autoencoder(settings.weights) if packaged else Path(settings.weights)
    autoencoder = load_autoencoder(folder)
    wanted: dict[str, Any] = {
        "block_out_channels": list(settings.block_out_channels),
        "layers_per_block": settings.layers_per_block,
        "latent_channels": settings.latent_channels,
    }
    stored = {name: autoencoder.config[name] for name in wanted}
    stored["block_out_channels"] = list(stored["block_out_channels"])
    if stored != wanted:
        raise ConfigError(
            f"{folder}: the autoencoder has {stored}, the settings ask for {wanted}; change model.autoencoder"
        )
    return autoencoder


def packaged_autoencoder(name: str) -> Path:
    """The folder of an autoencoder that ships with the package, by ``packaged:NAME``.

    Raises:
        ConfigError: if the package ships none of that name.
    """
    shipped = Path(str(files("leafseg") / "weights"))
    folder = shipped / name.removeprefix(_PACKAGED)
    if not (folder / "config.json").is_file():
        known = sorted(p.name for p in shipped.iterdir() if p.is_dir()) if shipped.is_dir() else []
        raise ConfigError(f"the autoencoder is {name!r}; the package ships {', '.join(known) or 'none'}")
    return folder


def load_autoencoder(folder: Path) -> AutoencoderKL:
    """An autoencoder folder (config.json and safetensors), in float32.

    Raises:
        CheckpointError: if the folder is missing, incomplete or damaged; every weight is accounted for.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: no config.json; an autoencoder is a folder that diffusers' save_pretrained wrote"
        )
    try:
        decoder_only = json.loads((folder / "config.json").read_text()).get("_class_name") == "MaskDecoder"
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder}: config.json is damaged; copy or download the folder again") from error
    if decoder_only:
        raise CheckpointError(f"{folder}: {DECODER_ONLY}")
    try:
        autoencoder, report = AutoencoderKL.from_pretrained(
            folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, SafetensorError, RuntimeError, json.JSONDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{folder}: the autoencoder cannot be loaded ({reason}); copy or download it again"
        ) from error
    wrong = sorted({*report["missing_keys"], *report["unexpected_keys"]})
    if wrong:  # diffusers leaves a missing weight random, with a warning
        raise CheckpointError(
            f"{folder}: {len(wrong)} weights are missing or unknown ({', '.join(wrong[:3])}); copy or download it again"
        )
    own_memory(autoencoder)
    return autoencoder


def own_memory(module: nn.Module) -> None:
    """Copy weights that were loaded into memory of their own.

    A loaded safetensors file is mapped, at whatever offsets its header leaves. Kernels take other paths for unaligned
    memory, so that the same weights would compute other last bits than before they were saved; and a file that is
    replaced under a running model would take its weights along.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.clone()


def _statistics(config: Mapping[str, Any], like: Tensor) -> tuple[Tensor | float, Tensor | float, float]:
    mean, std = config.get("latents_mean"), config.get("latents_std")
    scale = float(config["scaling_factor"])
    if mean is None or std is None:
        return 0.0, 1.0, scale
    # Masks that take several pictures stack their latents along the channels: repeat the statistics.
    repeats = like.shape[1] // len(mean)
    shape = (1, -1, 1, 1)
    mean_tensor = torch.tensor(mean, device=like.device, dtype=like.dtype).repeat(repeats).view(shape)
    std_tensor = torch.tensor(std, device=like.device, dtype=like.dtype).repeat(repeats).view(shape)
    return mean_tensor, std_tensor, scale


def scale_latent(code: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Diffusion latent of an autoencoder code ``[B, z, h, w]``: ``(code - mean) / std * scaling_factor`` per channel.

    ``config`` is the autoencoder's; mean and std are those of MASK codes (0 and 1 where they are not stored).
    """
    mean, std, scale = _statistics(config, code)
    return (code - mean) / std * scale


def unscale_latent(latent: Tensor, config: Mapping[str, Any]) -> Tensor:
    """The inverse of :func:`scale_latent`."""
    mean, std, scale = _statistics(config, latent)
    return latent / scale * std + mean


def encode_pictures(autoencoder: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Mask latent ``[B, P*z, h, w]`` of coded labels ``[B, P*3, H, W]`` in -1..1; each picture is encoded by itself."""
    batch, channels, height, width = pictures.shape
    single = pictures.reshape(batch * channels // 3, 3, height, width)
    code = autoencoder.encode(single).latent_dist.mode()  # [B*P, z, h, w]
    return scale_latent(code.reshape(batch, -1, *code.shape[-2:]), autoencoder.config)


def decode_pictures(autoencoder: AutoencoderKL | MaskDecoder, latent: Tensor) -> Tensor:
    """Pictures ``[B, P*3, H, W]``, about -1..1, of a mask latent ``[B, P*z, h, w]``."""
    code = unscale_latent(latent, autoencoder.config)
    single = code.reshape(-1, int(autoencoder.config["latent_channels"]), *code.shape[-2:])
    pictures: Tensor = autoencoder.decode(single, return_dict=False)[0]
    return pictures.reshape(latent.shape[0], -1, *pictures.shape[-2:])
