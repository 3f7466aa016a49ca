"""One call from a checkpoint of any known kind to a folder that leafseg opens, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch
from diffusers import AutoencoderKL, DDIMScheduler
from safetensors.torch import save_file
from torch import Tensor, nn

import leafseg
from leafseg.config import PredictionType, Settings, TimestepSpacing, WeightsDtype, load_settings
from leafseg.convert.ldm import (
    SCALING_FACTOR,
    AutoencoderLayout,
    State,
    autoencoder_entries,
    autoencoder_layout_of,
    check_keys,
    first_line,
    to_diffusers,
    to_ldm,
    unet_entries,
    unet_layout_of,
)
from leafseg.convert.leaf_release import (
    autoencoder_layout,
    ignored_autoencoder_fields,
    ignored_unet_fields,
    layout_of_autoencoder,
    layout_of_image_encoder,
    layout_of_unet,
    read_scheduler,
    released_autoencoder_config,
    released_index,
    released_scheduler_config,
    released_unet_config,
    unet_layout,
)
from leafseg.convert.sources import (
    Component,
    LdmCheckpoint,
    Released,
    local_source,
    pipeline_folder,
    read_component,
    read_config,
    read_ldm,
    released_parts,
    weight_files,
)
from leafseg.errors import CheckpointError, ConfigError
from leafseg.files import check_new_folder, new_folder, write_json_atomic
from leafseg.mask_code import MaskCode, make_mask_code
from leafseg.model.autoencoder import DECODER_ONLY, MaskDecoder
from leafseg.model.build import build_scheduler
from leafseg.model.image_encoder import ImageEncoder
from leafseg.model.unet import MaskUNet
from leafseg.pipeline import FORMAT_VERSION, LeafPipeline
from leafseg.progress import progress_bar

Kind = Literal["autoencoder", "starting point", "released checkpoint", "released training checkpoint", "pipeline"]

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_LDM_HEADS = 8  # of lsun_churches; the weights do not show it
_PRESETS: dict[Kind, str] = {
    "starting point": "leaf-base",
    "released checkpoint": "leaf-reference",
    "released training checkpoint": "leaf-reference",
}
# diffusers' older names of the attention inside an autoencoder.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
REPORT_FILE = "conversion.json"


@dataclass(frozen=True)
class PartReport:
    """One converted part.

    Attributes:
        source: the name of the file or folder that its weights came from.
        source_tensors: how many were read.
        tensors: how many were written (a fused projection becomes three).
        dtype: as written, e.g. ``float16``; several are joined by ``+``.
    """

    source: str
    source_tensors: int
    tensors: int
    dtype: str


@dataclass
class ConversionReport:
    """What was recognised, what was converted, and what of the source was not used; stored as conversion.json.

    Attributes:
        kind: what the source was recognised as.
        parts: by the name of the part in ``out``.
        unused: names of weights and entries of the source that are in no part, by their first word.
        ignored_fields: config fields that were not used, by the folder of the config.
        unused_files: entries of the source folder that were not read.
        notes: what a user should know, one sentence each.
    """

    kind: Kind
    source: str
    out: str
    preset: str | None = None
    parts: dict[str, PartReport] = field(default_factory=dict)
    unused: dict[str, list[str]] = field(default_factory=dict)
    ignored_fields: dict[str, list[str]] = field(default_factory=dict)
    unused_files: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The report as a person reads it."""
        lines = [f"{self.kind}: {self.source} -> {self.out}"]
        for name, part in self.parts.items():
            lines.append(f"  {name}: {part.source_tensors} tensors -> {part.tensors}, {part.dtype}, from {part.source}")
        if self.unused:
            groups = ", ".join(f"{name} ({len(keys)})" for name, keys in sorted(self.unused.items()))
            lines.append(f"  not used: {groups}")
        for file, names in self.ignored_fields.items():
            lines.append(f"  not used in {file}: {', '.join(names)}")
        if self.unused_files:
            lines.append(f"  not read: {', '.join(self.unused_files)}")
        return lines + [f"  {note}" for note in self.notes]

    def _add_unused(self, checkpoint: LdmCheckpoint) -> None:
        for key in (*checkpoint.unused, *checkpoint.other_entries):
            self.unused.setdefault(key.split(".")[0], []).append(key)

    def _add_ignored(self, where: Path, names: list[str]) -> None:
        if names:
            self.ignored_fields[where.name] = names


_Module = TypeVar("_Module", bound=nn.Module)


@dataclass
class _Part(Generic[_Module]):
    """A part on its way: our module without memory, and its weights under our names."""

    module: _Module
    state: State
    source: Path
    source_tensors: int


def convert(
    source: str | Path,
    out: str | Path,
    *,
    vae: str | Path | None = None,
    to: Literal["released"] | None = None,
    dtype: WeightsDtype | None = None,
    preset: str | None = None,
    prediction_type: PredictionType | None = None,
) -> ConversionReport:
    """Convert a checkpoint; its kind is recognised.

    Args:
        source: an LDM checkpoint file (``kl-f8``, ``lsun_churches``) or a folder with both; a checkpoint in the
            released LEAF layout (folder or hub id); with ``to="released"``, a run or pipeline of ours.
        out: the new folder: a pipeline, an autoencoder, or the released layout.
        vae: the autoencoder, where the source has none: a ``kl-f8`` file, an autoencoder folder in the released or
            diffusers' form, or a folder that has one as ``vae``.
        to: ``"released"`` writes the released layout.
        dtype: of the written weights; default: the source's own.
        preset: whose schedule, preprocessing and dropout are taken where the source has none.
        prediction_type: instead of the source's or preset's.

    Raises:
        CheckpointError: if the source is unknown, incomplete, unsafe to load, or cannot be expressed in the target.
        ConfigError: if the arguments contradict each other or the source.
        DataError: if ``out`` is not empty or cannot be written.
    """
    source, out = str(source), Path(out)
    check_new_folder(out)
    ours = pipeline_folder(source)
    if to == "released":
        for option, value in (("--vae", vae), ("--preset", preset), ("--prediction-type", prediction_type)):
            if value is not None:
                raise ConfigError(f"{option} has no meaning with --to released; leave it out")
        return _to_released(ours, source, out, dtype=dtype)
    if ours is not None:
        raise ConfigError(f"{source}: a leafseg model already; add --to released to write it in the released layout")

    path = local_source(source)
    released = released_parts(path) if path.is_dir() else None
    if released is not None:
        return _from_released(released, source, out, vae, dtype=dtype, preset=preset, prediction_type=prediction_type)
    if path.is_dir() and (path / "config.json").is_file():
        return _from_autoencoder_folder(path, source, out, vae, dtype=dtype)
    return _from_ldm(path, source, out, vae, dtype=dtype, preset=preset, prediction_type=prediction_type)


# --- CompVis ----------------------------------------------------------------------------------------------------------


def _from_ldm(
    path: Path,
    source: str,
    out: Path,
    vae: str | Path | None,
    *,
    dtype: WeightsDtype | None,
    preset: str | None,
    prediction_type: PredictionType | None,
) -> ConversionReport:
    checkpoints = [read_ldm(file) for file in (weight_files(path) if path.is_dir() else [path])]
    nets = [c for c in checkpoints if c.unet]
    autoencoders = [c for c in checkpoints if c.autoencoder]
    for what, found in (("U-Nets", nets), ("autoencoders", autoencoders)):
        if len(found) > 1:
            names = ", ".join(str(c.path) for c in found)
            raise CheckpointError(f"{source}: holds several {what} ({names}); give one of each")
    if not checkpoints:
        raise CheckpointError(
            f"{source}: no weights in a known layout; give lsun_churches, kl-f8, a folder with both, or a folder with "
            "unet, vae, latent_encoder and scheduler"
        )
    if vae is not None and autoencoders:
        raise ConfigError(f"{source}: holds an autoencoder itself; leave --vae out, or give the U-Net alone as SOURCE")

    if not nets:
        if preset is not None or prediction_type is not None:
            raise ConfigError(f"{source}: an autoencoder alone; leave --preset and --prediction-type out")
        report = ConversionReport("autoencoder", source, str(out))
        report._add_unused(autoencoders[0])
        return _write_autoencoder(_ldm_autoencoder(autoencoders[0]), out, report, dtype)

    net = nets[0]
    report = ConversionReport("starting point", source, str(out))
    settings = _settings("starting point", preset, prediction_type)
    report.preset = settings.preset
    if vae is not None:
        autoencoder = _read_vae(vae, report, resolution=settings.data.preprocessing.size[0])
    elif autoencoders:
        autoencoder = _ldm_autoencoder(autoencoders[0])
        report._add_unused(autoencoders[0])
    elif net.first_stage:
        autoencoder = _first_stage_autoencoder(net)
        report.notes.append("the autoencoder is the one inside the U-Net's checkpoint (first_stage_model)")
        net.first_stage = {}
    else:
        raise ConfigError(f"{source}: a U-Net without an autoencoder; add --vae with the kl-f8 checkpoint")
    net.unused += net.first_stage_keys
    report._add_unused(net)

    z = int(autoencoder.module.config["latent_channels"])
    where = str(net.path)
    stride = settings.model.stride // settings.model.unet.stride
    layout = unet_layout_of(
        net.unet,
        num_heads=_LDM_HEADS,
        dropout=settings.model.unet.dropout,
        image_size=settings.data.preprocessing.size[0] // stride,
        where=where,
    )
    if (layout.in_channels, layout.out_channels) != (z, z):
        raise CheckpointError(
            f"{where}: the U-Net takes {layout.in_channels} channels and gives {layout.out_channels}, the latents of "
            f"{autoencoder.source} have {z}; give a U-Net and an autoencoder that belong together"
        )
    unet = layout.build()
    state = to_diffusers(unet_entries(layout, unet), net.unet, unet, heads=layout.num_heads, where=where)
    # Image latent and mask latent enter side by side; each half of the doubled weight keeps half of the response.
    state["conv_in.weight"] = state["conv_in.weight"].repeat(1, 2, 1, 1) * 0.5
    unet = replace(layout, in_channels=2 * z).build()
    report.notes.append(f"conv_in was repeated over {2 * z} input channels and halved")

    encoder = _encoder_like(autoencoder, dropout=settings.model.image_encoder_dropout)
    return _write_pipeline(
        out,
        report,
        unet=_Part(unet, state, net.path, len(net.unet)),
        autoencoder=autoencoder,
        encoder=encoder,
        scheduler=build_scheduler(settings),
        settings=settings,
        dtype=dtype,
    )


def _ldm_autoencoder(checkpoint: LdmCheckpoint, *, resolution: int = 256) -> _Part[AutoencoderKL]:
    where = str(checkpoint.path)
    layout = autoencoder_layout_of(checkpoint.autoencoder, resolution=resolution, where=where)
    return _autoencoder_part(layout, checkpoint.autoencoder, checkpoint.path)


def _first_stage_autoencoder(checkpoint: LdmCheckpoint, *, resolution: int = 256) -> _Part[AutoencoderKL]:
    where = f"{checkpoint.path} (first_stage_model)"
    try:
        layout = autoencoder_layout_of(checkpoint.first_stage, resolution=resolution, where=where)
        return _autoencoder_part(layout, checkpoint.first_stage, checkpoint.path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; or add --vae with the kl-f8 checkpoint") from error


def _autoencoder_part(layout: AutoencoderLayout, state: Mapping[str, Tensor], path: Path) -> _Part[AutoencoderKL]:
    module = layout.build()
    table = autoencoder_entries(layout, module, decoder=True)
    return _Part(module, to_diffusers(table, state, module, where=str(path)), path, len(state))


def _encoder_like(autoencoder: _Part[AutoencoderKL], *, dropout: float) -> _Part:
    """The image encoder as training starts it: a copy of the autoencoder's encoder."""
    with torch.device("meta"):
        module = ImageEncoder.from_autoencoder(autoencoder.module, dropout=dropout)
    state = {name: autoencoder.state[name] for name in module.state_dict()}
    return _Part(module, state, autoencoder.source, len(state))


# --- autoencoders -----------------------------------------------------------------------------------------------------


def _read_vae(given: str | Path, report: ConversionReport, *, resolution: int) -> _Part[AutoencoderKL]:
    """What ``--vae`` names."""
    path = local_source(str(given))
    if path.is_file():
        checkpoint = read_ldm(path)
        if not checkpoint.autoencoder:
            raise CheckpointError(f"{path}: holds no autoencoder; give the kl-f8 checkpoint to --vae")
        report._add_unused(checkpoint)
        return _ldm_autoencoder(checkpoint, resolution=resolution)
    if not (path / "config.json").is_file():
        if (path / "vae" / "config.json").is_file():
            path = path / "vae"
        else:
            files = weight_files(path)
            if len(files) != 1:
                raise CheckpointError(
                    f"{path}: no autoencoder; give the kl-f8 file, an autoencoder folder, or one that has it as vae"
                )
            return _read_vae(files[0], report, resolution=resolution)
    return _read_autoencoder_folder(path, report)


def _read_autoencoder_folder(folder: Path, report: ConversionReport) -> _Part[AutoencoderKL]:
    part = read_component(folder)
    where = str(folder)
    if "ch_mult" in part.config:
        report._add_ignored(folder, ignored_autoencoder_fields(part.config))
        return _autoencoder_part(autoencoder_layout(part.config, where=where), part.state, folder)
    state = {_new_attention_name(name): tensor for name, tensor in part.state.items()}
    return _part_of(AutoencoderKL, replace(part, state=state))


def _new_attention_name(name: str) -> str:
    words = name.split(".")
    if "attentions" in words and words[-2] in _OLD_ATTENTION:
        words[-2] = _OLD_ATTENTION[words[-2]]
    return ".".join(words)


def _from_autoencoder_folder(
    folder: Path, source: str, out: Path, vae: str | Path | None, *, dtype: WeightsDtype | None
) -> ConversionReport:
    config = read_config(folder)
    if config.get("_class_name") != "AutoencoderKL":
        raise CheckpointError(
            f"{source}: one component ({config.get('_class_name')}); give the folder with unet, vae, latent_encoder"
        )
    if "ch_mult" not in config:
        raise ConfigError(f"{source}: an autoencoder in diffusers' form already; use it as model.autoencoder.weights")
    if vae is not None:
        raise ConfigError(f"{source}: an autoencoder itself; leave --vae out")
    report = ConversionReport("autoencoder", source, str(out))
    return _write_autoencoder(_read_autoencoder_folder(folder, report), out, report, dtype)


# --- the released layout ----------------------------------------------------------------------------------------------


def _from_released(
    released: Released,
    source: str,
    out: Path,
    vae: str | Path | None,
    *,
    dtype: WeightsDtype | None,
    preset: str | None,
    prediction_type: PredictionType | None,
) -> ConversionReport:
    kind: Kind = "released checkpoint" if released.vae is not None else "released training checkpoint"
    report = ConversionReport(kind, source, str(out), unused_files=released.unused)
    settings = _settings(kind, preset, prediction_type)
    report.preset = settings.preset
    given = vae if released.vae is None else released.vae
    if given is None:
        raise ConfigError(
            f"{source}: a training checkpoint without an autoencoder; add --vae with the one it was trained with (a "
            "released vae folder, an AutoencoderKL folder, or the kl-f8 checkpoint)"
        )
    if released.vae is not None and vae is not None:
        raise ConfigError(f"{source}: has its own vae; leave --vae out")
    if released.unet.name == "unet_ema" and "unet" in released.unused:
        report.notes.append("unet_ema was taken: it is the one that was validated")

    with progress_bar("reading", total=3) as bar:
        part = read_component(released.unet)
        layout = unet_layout(part.config, where=str(released.unet))
        report._add_ignored(released.unet, ignored_unet_fields(part.config))
        unet = layout.build()
        table = unet_entries(layout, unet)
        where = str(released.unet)
        state = to_diffusers(table, part.state, unet, heads=layout.num_heads, where=where)
        unet_part = _Part(unet, state, released.unet, len(part.state))
        bar.advance("unet")

        part = read_component(released.latent_encoder)
        where = str(released.latent_encoder)
        encoder_layout = autoencoder_layout(part.config, where=where)
        report._add_ignored(released.latent_encoder, ignored_autoencoder_fields(part.config))
        encoder = encoder_layout.build_encoder()
        table = autoencoder_entries(encoder_layout, encoder, decoder=False)
        encoder_part = _Part(
            encoder,
            to_diffusers(table, part.state, encoder, where=where),
            released.latent_encoder,
            len(part.state),
        )
        bar.advance("latent_encoder")

        resolution = encoder_layout.resolution
        autoencoder = _read_vae(given, report, resolution=resolution)
        bar.advance("vae")
    config = autoencoder.module.config
    if config["scaling_factor"] != SCALING_FACTOR or config["latents_mean"] is not None:
        raise CheckpointError(
            f"{autoencoder.source}: its latents are scaled otherwise (scaling_factor {config['scaling_factor']}); the "
            f"released code always takes {SCALING_FACTOR}: give the autoencoder that the checkpoint was trained with"
        )
    z = int(config["latent_channels"])
    if (layout.in_channels, layout.out_channels, encoder_layout.z_channels) != (2 * z, z, z):
        raise CheckpointError(
            f"{source}: the U-Net takes {layout.in_channels} channels and gives {layout.out_channels}, the image "
            f"latent has {encoder_layout.z_channels}, the mask latent {z}; these parts do not belong together"
        )
    if len(config["block_out_channels"]) != len(encoder_layout.ch_mult):
        raise CheckpointError(
            f"{source}: image and mask latents have different sizes (ch_mult of latent_encoder has "
            f"{len(encoder_layout.ch_mult)} levels, the autoencoder {len(config['block_out_channels'])})"
        )
    scheduler = _released_scheduler(released, settings, prediction_type, report)
    return _write_pipeline(
        out,
        report,
        unet=unet_part,
        autoencoder=autoencoder,
        encoder=encoder_part,
        scheduler=scheduler,
        settings=settings,
        size=(resolution, resolution),
        timesteps="trailing",
        dtype=dtype,
    )


def _released_scheduler(
    released: Released, settings: Settings, prediction_type: PredictionType | None, report: ConversionReport
) -> DDIMScheduler:
    if released.scheduler is None:
        report.notes.append(f"no scheduler there: the one of preset {settings.preset} was taken")
        return build_scheduler(settings)
    name = "scheduler_config.json"
    config = read_config(released.scheduler, name)
    scheduler, ignored = read_scheduler(config, prediction_type=prediction_type, where=str(released.scheduler / name))
    report._add_ignored(released.scheduler, ignored)
    spacing = config.get("timestep_spacing", "leading")
    report.notes.append(
        f"timestep_spacing {spacing} became trailing, which is the same for one step; --timesteps released at predict "
        "and evaluate walks the released code's own timesteps"
    )
    return scheduler


def _to_released(folder: Path | None, source: str, out: Path, *, dtype: WeightsDtype | None) -> ConversionReport:
    path = folder or local_source(source)
    if folder is None and not (path / "image_encoder").is_dir():
        raise CheckpointError(f"{source}: not a leafseg model; --to released takes a run or a pipeline folder")
    code = _mask_code(path)
    unet = _read_module(MaskUNet, path / "unet")
    vae = _read_module(AutoencoderKL, path / "vae")
    encoder = _read_module(ImageEncoder, path / "image_encoder")
    scheduler = _read_scheduler(path / "scheduler")
    noise = read_config(path, "model_index.json").get("noise", "gaussian")
    if code.name != "binary":
        raise CheckpointError(
            f"{source}: the released layout cannot hold mask code {code.name} ({code.num_pictures} pictures for "
            f"{len(code.label_names)} labels); it knows one foreground only"
        )
    # Our autoencoder has no dropout of its own; being frozen, the released one never uses its.
    dropout = float(encoder.module.config["dropout"])
    vae_layout = layout_of_autoencoder(vae.module.config, dropout=dropout, where=source)
    encoder_layout = layout_of_image_encoder(
        encoder.module.config, resolution=vae_layout.resolution, dropout=dropout, where=source
    )
    layout = layout_of_unet(unet.module.config, where=source)
    tables = {
        "unet": (unet, unet_entries(layout, layout.build()), layout.num_heads, released_unet_config(layout)),
        "vae": (
            vae,
            autoencoder_entries(vae_layout, vae_layout.build(), decoder=True),
            1,
            released_autoencoder_config(vae_layout, class_name="AutoencoderKL"),
        ),
        "latent_encoder": (
            encoder,
            autoencoder_entries(encoder_layout, encoder_layout.build_encoder(), decoder=False),
            1,
            released_autoencoder_config(encoder_layout, class_name="LatentEncoder"),
        ),
    }
    report = ConversionReport("pipeline", source, str(out))
    if noise == "zeros":
        report.notes.append(
            "the model starts from zeros, which has no place there: the released code starts from random noise, which "
            "the model was not trained for"
        )
    if code.label_names != ("background", "foreground"):
        report.notes.append(f"the label names {', '.join(code.label_names)} have no place there")
    with new_folder(out) as partial, progress_bar("writing", total=len(tables)) as bar:
        for name, (part, table, heads, config) in tables.items():
            state = to_ldm(table, part.state, heads=heads, where=str(part.source))
            state = _own_storage(_cast(state, dtype))
            (partial / name).mkdir()
            save_file(state, partial / name / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
            write_json_atomic(partial / name / "config.json", config)
            report.parts[name] = PartReport(part.source.name, part.source_tensors, len(state), _dtype_name(state))
            bar.advance(name)
        (partial / "scheduler").mkdir()
        write_json_atomic(partial / "scheduler" / "scheduler_config.json", released_scheduler_config(scheduler))
        write_json_atomic(partial / "model_index.json", released_index())
        write_json_atomic(partial / REPORT_FILE, _report_json(report))
    return report


def _mask_code(folder: Path) -> MaskCode:
    """The mask code of a pipeline's folder, once its index is found to be one that this version reads."""
    index = read_config(folder, "model_index.json")
    name, version = index.get("_class_name"), index.get("format_version", FORMAT_VERSION)
    if name != "LeafPipeline" or not isinstance(version, int) or version > FORMAT_VERSION:
        raise CheckpointError(
            f"{folder / 'model_index.json'}: a {name} of format {version}; this leafseg reads LeafPipeline up to "
            f"format {FORMAT_VERSION}"
        )
    try:
        code = index["mask_code"]
        return make_mask_code(str(code["name"]), tuple(str(label) for label in code["label_names"]))
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder / 'model_index.json'}: no readable mask_code; copy or download the model again"
        ) from error


def _read_module(kind: type[_Module], folder: Path) -> _Part[_Module]:
    return _part_of(kind, read_component(folder))


def _part_of(kind: type[_Module], part: Component) -> _Part[_Module]:
    """A component in diffusers' form; every weight is accounted for."""
    where = str(part.folder)
    name = part.config.get("_class_name")
    if name == MaskDecoder.__name__:
        raise CheckpointError(f"{where}: {DECODER_ONLY}")
    if name != kind.__name__:
        raise CheckpointError(f"{where}: holds a {name}; {kind.__name__} belongs there")
    try:
        with torch.device("meta"):
            module = kind(**{name: value for name, value in part.config.items() if not name.startswith("_")})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: its config.json builds no {kind.__name__} ({first_line(error)})") from error
    check_keys({name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}, part.state, where=where)
    return _Part(module, part.state, part.folder, len(part.state))


def _read_scheduler(folder: Path) -> DDIMScheduler:
    name = "scheduler_config.json"
    return read_scheduler(read_config(folder, name), prediction_type=None, where=str(folder / name))[0]


# --- writing ----------------------------------------------------------------------------------------------------------


def _settings(kind: Kind, preset: str | None, prediction_type: PredictionType | None) -> Settings:
    overrides = [] if prediction_type is None else [f"objective.prediction_type={prediction_type}"]
    return load_settings(preset or _PRESETS[kind], overrides=overrides)


def _write_pipeline(
    out: Path,
    report: ConversionReport,
    *,
    unet: _Part,
    autoencoder: _Part[AutoencoderKL],
    encoder: _Part,
    scheduler: DDIMScheduler,
    settings: Settings,
    dtype: WeightsDtype | None,
    size: tuple[int, int] | None = None,
    timesteps: TimestepSpacing | None = None,
) -> ConversionReport:
    parts: dict[str, _Part] = {"unet": unet, "vae": autoencoder, "image_encoder": encoder}
    levels = len(autoencoder.module.config["block_out_channels"]) + len(unet.module.config["block_out_channels"])
    preprocessing = settings.data.preprocessing.model_dump(mode="json") | {"stride": 2 ** (levels - 2)}
    if size is not None:
        preprocessing["size"] = list(size)
    if any(side % preprocessing["stride"] for side in preprocessing["size"]):
        raise CheckpointError(
            f"{report.source}: its input of {preprocessing['size']} pixels is no multiple of its stride "
            f"{preprocessing['stride']}; the configs do not belong to these weights"
        )
    with new_folder(out) as partial, progress_bar("writing", total=1) as bar:
        for name, part in parts.items():
            report.parts[name] = _fill(part, dtype)
        pipe = LeafPipeline(
            unet=unet.module,
            vae=autoencoder.module,
            image_encoder=encoder.module,
            scheduler=scheduler,
            preprocessing=preprocessing,
            num_inference_steps=settings.inference.num_inference_steps,
            timesteps=timesteps or settings.inference.timesteps,
        )
        pipe.save_pretrained(partial, safe_serialization=True)
        write_json_atomic(partial / REPORT_FILE, _report_json(report))
        bar.advance()
    return report


def _write_autoencoder(
    part: _Part[AutoencoderKL], out: Path, report: ConversionReport, dtype: WeightsDtype | None
) -> ConversionReport:
    with new_folder(out) as partial:
        report.parts["autoencoder"] = _fill(part, dtype)
        part.module.save_pretrained(partial, safe_serialization=True)
        write_json_atomic(partial / REPORT_FILE, _report_json(report))
    return report


def _fill(part: _Part, dtype: WeightsDtype | None) -> PartReport:
    """Give the module its weights, in place of none, in the type they have or shall have."""
    state = _cast(part.state, dtype)
    state = _own_storage(state)
    part.module.load_state_dict(state, strict=True, assign=True)
    part.module.eval()
    return PartReport(part.source.name, part.source_tensors, len(state), _dtype_name(state))


def _own_storage(state: State) -> State:
    """Contiguous tensors that share no memory, as safetensors asks for; those that a file maps are not copied."""
    result: State = {}
    seen: set[int] = set()
    for name, tensor in state.items():
        tensor = tensor.contiguous()
        storage = tensor.untyped_storage()
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        result[name] = tensor
    return result


def _cast(state: State, dtype: WeightsDtype | None) -> State:
    if dtype is None:
        return state
    wanted = _DTYPES[dtype]
    cast = {name: tensor.to(wanted) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    lost = [name for name, tensor in cast.items() if not tensor.isfinite().all() and state[name].isfinite().all()]
    if lost:
        raise ConfigError(f"--dtype {dtype}: too small for {len(lost)} weights ({', '.join(lost[:3])}); take bf16")
    return cast


def _dtype_name(state: State) -> str:
    return "+".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state.values()}))


def _report_json(report: ConversionReport) -> dict[str, Any]:
    """The report without this machine's folders, which are nobody's business in a model that is passed on."""
    source = Path(report.source)
    fields = asdict(report) | {"source": source.resolve().name if source.exists() else report.source}
    del fields["out"]
    return {"leafseg_version": leafseg.__version__, **fields}
