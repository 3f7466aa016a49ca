"""The released LEAF layout: folders ``unet``, ``vae``, ``latent_encoder``, ``scheduler``, weights under LDM's names.

Each direction is strict: a config that means another network, or a model that the layout cannot express, is refused
with the field that says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers
from diffusers import DDIMScheduler

from leafseg.convert.ldm import SCALING_FACTOR, AutoencoderLayout, UNetLayout
from leafseg.errors import CheckpointError

# Fields that would make another network, with the values under which they do not.
_UNET_FIXED: dict[str, tuple[Any, ...]] = {
    "use_scale_shift_norm": (True,),
    "use_new_attention_order": (False,),  # another order inside qkv
    "num_head_channels": (-1,),
    "num_classes": (None,),
    "use_spatial_transformer": (False,),
    "context_dim": (None,),
    "n_embed": (None,),
    "dims": (2,),
}
_UNET_FIELDS = {
    *("attention_resolutions", "channel_mult", "conv_resample", "dropout", "image_size", "in_channels", "legacy"),
    *("model_channels", "num_heads", "num_heads_upsample", "num_res_blocks", "out_channels", "resblock_updown"),
    *("use_checkpoint", "use_fp16", *_UNET_FIXED),  # the first two change no output
}
_VAE_FIXED: dict[str, tuple[Any, ...]] = {
    "double_z": (True,),
    "attn_resolutions": ([],),
    "attn_type": ("vanilla",),
    "use_linear_attn": (False,),
    "resamp_with_conv": (True,),
    "tanh_out": (False,),
    "give_pre_end": (False,),
}
_VAE_FIELDS = {
    *("ch", "ch_mult", "dropout", "embed_dim", "in_channels", "num_res_blocks", "out_ch", "resolution", "z_channels"),
    *_VAE_FIXED,
}


# --- released configs to layouts --------------------------------------------------------------------------------------


def unet_layout(config: Mapping[str, Any], *, where: str) -> UNetLayout:
    """The layout that a released U-Net's config.json states.

    Raises:
        CheckpointError: if a field is missing, of another type, or means another network.
    """
    _check_fixed(config, _UNET_FIXED, where)
    heads = config.get("num_heads")
    if config.get("num_heads_upsample", -1) not in (-1, heads):
        raise CheckpointError(
            f"{where}: num_heads is {heads} and num_heads_upsample {config['num_heads_upsample']}; they must be equal"
        )
    updown = bool(config.get("resblock_updown", False))
    if not updown and not config.get("conv_resample", True):
        raise CheckpointError(
            f"{where}: conv_resample and resblock_updown are both false; only samplers with weights are known"
        )
    try:
        mult = tuple(_whole(factor) for factor in config["channel_mult"])
        resolutions = {_whole(value) for value in config["attention_resolutions"]}
        layout = UNetLayout(
            in_channels=_whole(config["in_channels"]),
            out_channels=_whole(config["out_channels"]),
            model_channels=_whole(config["model_channels"]),
            channel_mult=mult,
            num_res_blocks=_whole(config["num_res_blocks"]),
            attention_levels=tuple(2**level in resolutions for level in range(len(mult))),
            num_heads=_whole(heads),
            resblock_updown=updown,
            dropout=float(config.get("dropout", 0.0)),
            image_size=_whole(config.get("image_size", 32)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{where}: not a released U-Net's config ({_reason(error)}); download it again"
        ) from error
    if layout.channel_mult[:1] != (1,):
        raise CheckpointError(f"{where}: channel_mult is {list(mult)}; its first factor must be 1")
    return layout


def autoencoder_layout(config: Mapping[str, Any], *, where: str) -> AutoencoderLayout:
    """The layout that a released autoencoder's (or latent encoder's) config.json states.

    Raises:
        CheckpointError: as :func:`unet_layout`.
    """
    _check_fixed(config, _VAE_FIXED, where)
    try:
        layout = AutoencoderLayout(
            ch=_whole(config["ch"]),
            ch_mult=tuple(_whole(factor) for factor in config["ch_mult"]),
            num_res_blocks=_whole(config["num_res_blocks"]),
            z_channels=_whole(config["z_channels"]),
            in_channels=_whole(config.get("in_channels", 3)),
            out_ch=_whole(config.get("out_ch", 3)),
            dropout=float(config.get("dropout", 0.0)),
            resolution=_whole(config.get("resolution", 256)),
        )
        embed_dim = _whole(config.get("embed_dim", layout.z_channels))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{where}: not a released autoencoder's config ({_reason(error)}); download it again"
        ) from error
    if embed_dim != layout.z_channels or layout.ch_mult[:1] != (1,):
        raise CheckpointError(
            f"{where}: embed_dim is {embed_dim}, z_channels {layout.z_channels}, ch_mult {list(layout.ch_mult)}; the "
            "first two must be equal, and the first factor 1"
        )
    return layout


def ignored_unet_fields(config: Mapping[str, Any]) -> list[str]:
    """Fields of a U-Net's config that say nothing about the network, such as those of its running average."""
    return _ignored(config, _UNET_FIELDS)


def ignored_autoencoder_fields(config: Mapping[str, Any]) -> list[str]:
    return _ignored(config, _VAE_FIELDS)


def _ignored(config: Mapping[str, Any], known: set[str]) -> list[str]:
    return sorted(name for name in config if name not in known and not name.startswith("_"))


def _check_fixed(config: Mapping[str, Any], fixed: Mapping[str, tuple[Any, ...]], where: str) -> None:
    for name, allowed in fixed.items():
        value = config.get(name, allowed[0])
        value = list(value) if isinstance(value, tuple) else value
        if value not in allowed:
            raise CheckpointError(f"{where}: {name} is {value!r}; only {allowed[0]!r} is known")


# --- scheduler --------------------------------------------------------------------------------------------------------

# Both walk the same chain, and DDIM without its own noise is what the released code samples with.
_SCHEDULERS = ("DDIMScheduler", "DDPMScheduler")
_SCHEDULER_NEEDS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")
_SCHEDULER_KEPT = (
    *_SCHEDULER_NEEDS,
    *("trained_betas", "clip_sample", "clip_sample_range", "set_alpha_to_one", "thresholding"),
    *("dynamic_thresholding_ratio", "sample_max_value", "rescale_betas_zero_snr"),
)
_SCHEDULER_REPLACED = ("timestep_spacing", "steps_offset", "variance_type")


def read_scheduler(
    config: Mapping[str, Any], *, prediction_type: str | None, where: str
) -> tuple[DDIMScheduler, list[str]]:
    """DDIM with the stored betas, clipping and prediction type, and trailing spacing; and the fields that were ignored.

    Raises:
        CheckpointError: if the scheduler is of an unknown class, incomplete, or cannot be built.
    """
    name = config.get("_class_name")
    if name not in _SCHEDULERS:
        raise CheckpointError(f"{where}: the scheduler is a {name}; known are {', '.join(_SCHEDULERS)}")
    stated = dict(config) if prediction_type is None else {**config, "prediction_type": prediction_type}
    missing = [field for field in _SCHEDULER_NEEDS if stated.get(field) is None]
    if stated.get("trained_betas") is not None:
        missing = [field for field in missing if not field.startswith("beta_")]
    if missing:
        raise CheckpointError(f"{where}: no {', '.join(missing)}; a scheduler states all of its values")
    if "learned" in str(stated.get("variance_type", "")):
        raise CheckpointError(f"{where}: variance_type is {stated['variance_type']}; only fixed variances are known")
    if stated["prediction_type"] not in ("sample", "epsilon", "v_prediction"):
        raise CheckpointError(
            f"{where}: prediction_type is {stated['prediction_type']!r}; known are sample, epsilon, v_prediction"
        )
    if stated.get("thresholding"):
        raise CheckpointError(f"{where}: thresholding is on; the reverse steps here know clip_sample only")
    kept = {field: stated[field] for field in _SCHEDULER_KEPT if field in stated}
    try:
        # steps_offset moves the timesteps of other spacings only.
        scheduler = DDIMScheduler(**{**kept, "steps_offset": 0, "timestep_spacing": "trailing"})
    except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(f"{where}: the scheduler cannot be built ({_reason(error)})") from error
    ignored = sorted(
        field for field in config if field not in (*_SCHEDULER_KEPT, *_SCHEDULER_REPLACED) and not field.startswith("_")
    )
    return scheduler, ignored


def released_scheduler_config(scheduler: DDIMScheduler) -> dict[str, Any]:
    """scheduler_config.json of the released layout: our values, with the spacing that the released code leaves alone.

    One step is the same either way, since that code hard-codes its timestep; for more it walks its own timesteps.
    """
    values = {field: scheduler.config[field] for field in _SCHEDULER_KEPT}
    return {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": diffusers.__version__,
        **values,
        "steps_offset": 0,
        "timestep_spacing": "leading",
    }


# --- our models to released configs -----------------------------------------------------------------------------------

# What the released layout does not say because it is the same everywhere, or what acts on no output.
_UNET_SILENT = ("sample_size", "attention_head_dim", "num_train_timesteps", "down_block_types", "up_block_types")
_VAE_SILENT = ("sample_size", "force_upcast")


def layout_of_unet(config: Mapping[str, Any], *, where: str) -> UNetLayout:
    """The released layout of our U-Net, from its config.

    Raises:
        CheckpointError: if the layout cannot express it; the message names the field.
    """
    widths = tuple(config["block_out_channels"])
    down, up = tuple(config["down_block_types"]), tuple(config["up_block_types"])
    downsamplers = {
        "AttnDownBlock2D": config["downsample_type"],
        "DownBlock2D": "conv",
        "ResnetDownsampleBlock2D": "resnet",
    }
    upsamplers = {"AttnUpBlock2D": config["upsample_type"], "UpBlock2D": "conv", "ResnetUpsampleBlock2D": "resnet"}
    unknown = sorted({*down} - {*downsamplers} | {*up} - {*upsamplers})
    if unknown:
        raise _inexpressible(where, "the U-Net", f"its block {unknown[0]} has no counterpart there")
    attends = tuple(name.startswith("Attn") for name in down)
    if attends != tuple(name.startswith("Attn") for name in reversed(up)):
        raise _inexpressible(where, "the U-Net", "attention stands in other levels on the way down than on the way up")
    # The last block of either way has no sampler.
    kinds = {downsamplers[name] for name in down[:-1]} | {upsamplers[name] for name in up[:-1]}
    if len(kinds) > 1 or not kinds <= {"resnet", "conv"}:
        raise _inexpressible(
            where, "the U-Net", f"its samplers are of the kinds {', '.join(sorted(kinds))}, not of one"
        )
    if any(width % widths[0] for width in widths):
        raise _inexpressible(where, "the U-Net", f"block_out_channels {list(widths)} are not multiples of the first")
    layout = UNetLayout(
        in_channels=config["in_channels"],
        out_channels=config["out_channels"],
        model_channels=widths[0],
        channel_mult=tuple(width // widths[0] for width in widths),
        num_res_blocks=config["layers_per_block"],
        attention_levels=attends,
        num_heads=config["num_attention_heads"],
        resblock_updown=kinds != {"conv"},
        dropout=config["dropout"],
        image_size=_side(config["sample_size"]),
    )
    # A U-Net of one level has no samplers, whose kind then says nothing.
    silent = (*_UNET_SILENT, *(() if kinds else ("downsample_type", "upsample_type")))
    _check_same(config, layout.build().config, silent, where, "the U-Net")
    return layout


def layout_of_autoencoder(config: Mapping[str, Any], *, dropout: float, where: str) -> AutoencoderLayout:
    """The released layout of our autoencoder of masks, from its config.

    Raises:
        CheckpointError: as :func:`layout_of_unet`.
    """
    if config["latents_mean"] is not None or config["latents_std"] is not None:
        raise _inexpressible(
            where,
            "the autoencoder",
            "it stores latents_mean and latents_std, and the released code knows one scale",
        )
    if config["scaling_factor"] != SCALING_FACTOR:
        raise _inexpressible(
            where,
            "the autoencoder",
            f"scaling_factor is {config['scaling_factor']}, and the released code always takes {SCALING_FACTOR}",
        )
    layout = _encoder_layout(
        config, out_ch=config["out_channels"], dropout=dropout, where=where, what="the autoencoder"
    )
    _check_same(config, layout.build().config, _VAE_SILENT, where, "the autoencoder")
    return layout


def layout_of_image_encoder(
    config: Mapping[str, Any], *, resolution: int, dropout: float, where: str
) -> AutoencoderLayout:
    """The released layout of our image encoder, from its config.

    Raises:
        CheckpointError: as :func:`layout_of_unet`.
    """
    config = {**config, "sample_size": resolution}
    layout = _encoder_layout(config, out_ch=3, dropout=dropout, where=where, what="the image encoder")
    _check_same(config, layout.build_encoder().config, ("sample_size",), where, "the image encoder")
    return layout


def _encoder_layout(
    config: Mapping[str, Any], *, out_ch: int, dropout: float, where: str, what: str
) -> AutoencoderLayout:
    widths = tuple(config["block_out_channels"])
    if any(width % widths[0] for width in widths):
        raise _inexpressible(where, what, f"block_out_channels {list(widths)} are not multiples of the first")
    return AutoencoderLayout(
        ch=widths[0],
        ch_mult=tuple(width // widths[0] for width in widths),
        num_res_blocks=config["layers_per_block"],
        z_channels=config["latent_channels"],
        in_channels=config["in_channels"],
        out_ch=out_ch,
        dropout=dropout,
        resolution=_side(config["sample_size"]),
    )


def _check_same(
    config: Mapping[str, Any], built: Mapping[str, Any], silent: tuple[str, ...], where: str, what: str
) -> None:
    """All that the layout does not carry must be what a model built from the layout has."""
    for name, value in built.items():
        mine = config.get(name)
        mine, value = (tuple(v) if isinstance(v, list) else v for v in (mine, value))
        if not name.startswith("_") and name not in silent and mine != value:
            raise _inexpressible(where, what, f"{name} is {mine!r}, and there it is always {value!r}")


def _inexpressible(where: str, what: str, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{where}: the released layout cannot hold {what} ({reason}); keep this model in its own layout"
    )


def released_unet_config(layout: UNetLayout) -> dict[str, Any]:
    return {
        "_class_name": "UNetModel",
        "_diffusers_version": diffusers.__version__,
        "attention_resolutions": [2**level for level, attends in enumerate(layout.attention_levels) if attends],
        "channel_mult": list(layout.channel_mult),
        "conv_resample": True,
        "dropout": layout.dropout,
        "image_size": layout.image_size,
        "in_channels": layout.in_channels,
        "legacy": True,
        "model_channels": layout.model_channels,
        "num_classes": None,
        "num_head_channels": -1,
        "num_heads": layout.num_heads,
        "num_heads_upsample": -1,
        "num_res_blocks": layout.num_res_blocks,
        "out_channels": layout.out_channels,
        "resblock_updown": layout.resblock_updown,
        "use_checkpoint": False,
        "use_new_attention_order": False,
        "use_scale_shift_norm": True,
    }


def released_autoencoder_config(layout: AutoencoderLayout, *, class_name: str) -> dict[str, Any]:
    return {
        "_class_name": class_name,
        "_diffusers_version": diffusers.__version__,
        "attn_resolutions": [],
        "ch": layout.ch,
        "ch_mult": list(layout.ch_mult),
        "double_z": True,
        "dropout": layout.dropout,
        "embed_dim": layout.z_channels,
        "in_channels": layout.in_channels,
        "num_res_blocks": layout.num_res_blocks,
        "out_ch": layout.out_ch,
        "resolution": layout.resolution,
        "z_channels": layout.z_channels,
    }


def released_index() -> dict[str, Any]:
    return {
        "_class_name": "LeafPipeline",
        "_diffusers_version": diffusers.__version__,
        "unet": ["leaf.unet", "UNetModel"],
        "vae": ["leaf.autoencoder", "AutoencoderKL"],
        "latent_encoder": ["leaf.autoencoder", "LatentEncoder"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }


def _side(size: Any) -> int:
    """One side of a size that may be a pair or missing; it shapes no weight."""
    return int(size[0] if isinstance(size, list | tuple) else size or 0)


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{value!r} is not a whole number")
    return value


def _reason(error: BaseException) -> str:
    if isinstance(error, KeyError):
        return f"no {error.args[0]}"
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
