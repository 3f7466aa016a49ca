"""One image to a probability: the single-step pipeline, and the same loop for any number of steps.

Never imports training, teachers or the projector: what infers is exactly what is saved.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline
from diffusers.utils import BaseOutput
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import snapshot_download
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from leafseg import rng
from leafseg.config import Noise, PartChoice, PreprocessingSettings, TimestepSpacing
from leafseg.data.large import open_large
from leafseg.data.pixels import draw_noise, noise_position, noise_stream
from leafseg.data.transforms import Preprocessor
from leafseg.errors import CheckpointError, ConfigError, DataError
from leafseg.mask_code import MaskCode, make_mask_code
from leafseg.model.autoencoder import MaskDecoder, decode_pictures, own_memory, scale_latent
from leafseg.model.compact import CompactImageEncoder, CompactMaskDecoder
from leafseg.model.image_encoder import ImageEncoder
from leafseg.model.unet import MaskUNet
from leafseg.presence import checked, without_absent
from leafseg.runs import BASELINE_FILE, resolve_model
from leafseg.sampler import ddim_update, inference_timesteps
from leafseg.tiling import (
    TileGrid,
    blend_tiles,
    blended_on_disk,
    check_free_space,
    image_position,
    working_bytes,
)

# The newest that is read. A folder is written as the oldest that can say it: 3 may have presence thresholds, 2 compact
# parts.
FORMAT_VERSION = 3

# The classes that a model folder may name. Anything else is refused before it is looked at: loading a model never runs
# code that came with it.
_ALLOWED_CLASSES = {
    "unet": {("leafseg", "MaskUNet")},
    "vae": {("diffusers", "AutoencoderKL"), ("leafseg", "MaskDecoder")},
    "image_encoder": {("leafseg", "ImageEncoder")},
    "scheduler": {("diffusers", "DDIMScheduler")},
}
# Parts that a model may have besides, each standing in for one of the above when it is asked for.
COMPACT_PARTS = {
    "compact_decoder": ("leafseg", "CompactMaskDecoder"),
    "compact_encoder": ("leafseg", "CompactImageEncoder"),
}


@dataclass
class LeafOutput(BaseOutput):
    """What the pipeline returns, on the grid of the given images.

    Attributes:
        probability: float32 ``[B, C, H, W]`` in 0..1; C = 1 (foreground) for binary models.
        labels: int64 ``[B, H, W]``; None for overlapping labels. A label below its presence threshold is not drawn,
            whatever the probability says.
        mask: bool ``[B, C, H, W]``, as the labels.
        spread: float32 ``[B, C, H, W]``, the standard deviation over ``num_samples`` noise draws; None for one draw.
        samples: float32 ``[B, num_samples, C, H, W]``, the probability of each noise draw; only if asked for.
    """

    probability: Tensor
    labels: Tensor | None
    mask: Tensor
    spread: Tensor | None = None
    samples: Tensor | None = None


class LeafPipeline(DiffusionPipeline):
    """LEAF at inference: image encoder, U-Net, mask decoder.

    Args:
        unet: predicts the mask latent from image latent and noisy mask latent.
        vae: the frozen autoencoder of masks, or its decoder alone.
        image_encoder: the trained image encoder.
        scheduler: its betas, prediction type and clipping are used; the steps are leafseg.sampler's.
        preprocessing: the fields of :class:`leafseg.config.PreprocessingSettings`.
        mask_code: ``{"name": ..., "label_names": [...]}``.
        num_inference_steps: the recommended number of steps.
        timesteps: which timesteps several steps visit, see :func:`leafseg.sampler.inference_timesteps`.
        noise: what the model starts from by default, see ``__call__``.
        presence: for each foreground label the highest probability that an image must reach somewhere for it to be
            drawn, see :mod:`leafseg.presence`; None: no such threshold.
        format_version: of this folder layout.
        compact_decoder, compact_encoder: light stand-ins for ``vae`` and ``image_encoder`` (``leafseg compact``).

    Attributes:
        decoder, encoder: which part a call uses by default, ``"full"`` or ``"compact"``.

    Not a medical device.
    """

    __module__ = "leafseg"  # see MaskUNet
    model_cpu_offload_seq = "image_encoder->compact_encoder->unet->vae->compact_decoder"
    _optional_components: ClassVar[list[str]] = list(COMPACT_PARTS)
    decoder: PartChoice = "full"
    encoder: PartChoice = "full"

    def __init__(
        self,
        unet: MaskUNet,
        vae: AutoencoderKL | MaskDecoder,
        image_encoder: ImageEncoder,
        scheduler: DDIMScheduler,
        preprocessing: dict[str, Any] | None = None,
        mask_code: dict[str, Any] | None = None,
        num_inference_steps: int = 1,
        timesteps: str = "trailing",
        noise: str = "gaussian",
        presence: list[float] | None = None,
        format_version: int = FORMAT_VERSION,
        compact_decoder: CompactMaskDecoder | None = None,
        compact_encoder: CompactImageEncoder | None = None,
    ) -> None:
        super().__init__()
        if preprocessing is None:
            preprocessing = PreprocessingSettings().model_dump(mode="json")
        if mask_code is None:
            mask_code = {"name": "binary", "label_names": ["background", "foreground"]}
        self.register_modules(unet=unet, vae=vae, image_encoder=image_encoder, scheduler=scheduler)
        self.register_modules(compact_decoder=compact_decoder, compact_encoder=compact_encoder)
        self.register_to_config(
            preprocessing=preprocessing,
            mask_code=mask_code,
            num_inference_steps=num_inference_steps,
            timesteps=timesteps,
            noise=noise,
            presence=None,
            format_version=format_version,
        )
        self.preprocessor = Preprocessor(PreprocessingSettings.model_validate(preprocessing))
        self.mask_code: MaskCode = make_mask_code(mask_code["name"], tuple(mask_code["label_names"]))
        self.presence = tuple(presence or ())

    @property
    def label_names(self) -> tuple[str, ...]:
        return self.mask_code.label_names

    @property
    def presence(self) -> tuple[float, ...]:
        """The thresholds in use, see :mod:`leafseg.presence`; may be set, to nothing too, and are saved as they are.

        Raises:
            ConfigError: for thresholds that are no number in 0..1 a foreground label.
        """
        return tuple(self.config["presence"] or ())

    @presence.setter
    def presence(self, thresholds: Sequence[float]) -> None:
        labels = len(self.label_names) - self.mask_code.exclusive  # without the background
        try:
            found = checked(thresholds, labels)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self.register_to_config(presence=list(found) or None)

    def to_json_string(self) -> str:
        """The model index; of a model without thresholds or compact parts, what it was before there were any."""
        content = json.loads(super().to_json_string())
        for name in COMPACT_PARTS:
            if getattr(self, name) is None:
                content.pop(name, None)
        if content.get("presence") is None:
            content.pop("presence", None)
        thresholds, compact = "presence" in content, COMPACT_PARTS.keys() & content.keys()
        content["format_version"] = 3 if thresholds else 2 if compact else 1
        return json.dumps(content, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *,
        decoder: PartChoice = "full",
        encoder: PartChoice = "full",
        **kwargs: Any,
    ) -> LeafPipeline:
        """Load a run, a pipeline folder or a hub id; safetensors only, known classes only.

        Args:
            pretrained_model_name_or_path: a run (its best checkpoint is taken), a folder that ``save_pretrained``
                wrote, or a hub id.
            decoder, encoder: ``"compact"`` lets calls use that part by default, if the model has it.
            **kwargs: diffusers' own, e.g. ``dtype=torch.bfloat16`` (``torch_dtype`` is taken too).

        Raises:
            CheckpointError: if the folder is missing, damaged, of another kind, names a class that is not allowed, or
                lacks a compact part that is asked for.
        """
        name = resolve_model(str(pretrained_model_name_or_path))
        folder = Path(name)
        if folder.exists():
            check_folder(folder)
        elif name.count("/") != 1 or name.startswith((".", "/", "~")):
            raise CheckpointError(f"{name}: no such folder; give a run, a pipeline folder, or a hub id (owner/name)")
        kwargs.setdefault("low_cpu_mem_usage", True)
        if "torch_dtype" in kwargs:  # the name that most users know; diffusers now calls it dtype
            kwargs.setdefault("dtype", kwargs.pop("torch_dtype"))
        bars = diffusers_logging.is_progress_bar_enabled()
        try:
            if not folder.exists():
                # The index is checked before any component is touched.
                folder = _download(name, kwargs)
                check_folder(folder)
            diffusers_logging.disable_progress_bar()
            pipe = super().from_pretrained(folder, use_safetensors=True, **kwargs)
            stored = [part for part in COMPACT_PARTS if getattr(pipe, part) is not None]
            for part in (part for part in ("unet", "vae", "image_encoder", *stored) if part not in kwargs):
                _check_weights(folder / part, getattr(pipe, part))
                own_memory(getattr(pipe, part))
            # Not in __init__: a training makes pipelines over modules that it is training.
            pipe.vae.requires_grad_(False)
        except CheckpointError:
            raise
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, ConfigError) as error:
            raise CheckpointError(
                f"{name}: the model cannot be loaded ({_first_line(error)}); copy, download or train it again"
            ) from error
        finally:
            if bars:
                diffusers_logging.enable_progress_bar()
        loaded = cast(LeafPipeline, pipe)
        loaded.decoder, loaded.encoder = loaded._chosen(decoder, encoder)
        return loaded

    @torch.no_grad()
    def __call__(
        self,
        image: Image.Image | np.ndarray[Any, Any] | Tensor | Sequence[Image.Image | np.ndarray[Any, Any]],
        *,
        num_inference_steps: int | None = None,
        timesteps: TimestepSpacing | None = None,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        noise: Noise | None = None,
        num_samples: int = 1,
        return_samples: bool = False,
        tile_batch_size: int = 4,
        decoder: PartChoice | None = None,
        encoder: PartChoice | None = None,
    ) -> LeafOutput:
        """Segment images.

        A model whose preprocessing has fit ``tile`` sees overlapping tiles of each image at its own resolution. Their
        probabilities are blended in one float32 map a class; starting noise is one canvas over the whole image.

        Args:
            image: a PIL image; an array ``[H, W]`` or ``[H, W, 3]`` in its own integer or float type; a list of such of
                one size; or a tensor ``[B, 3, H, W]`` in 0..1. Any H and W.
            num_inference_steps: default: what the model recommends (1).
            timesteps: ``"trailing"`` or ``"released"``; default: what the model recommends.
            generator: one number is drawn from it and mixed into the noise; without one, the noise depends on the image
                alone, so that the same image always gives the same mask.
            latents: starting noise ``[B * num_samples, *latent_shape(size)]``, in the order image by image; replaces
                ``noise``.
            noise: ``"gaussian"``, keyed per image (a mask never depends on its batch), or ``"zeros"``; default: what
                the model was trained to start from.
            num_samples: noise draws an image; their probabilities are averaged.
            return_samples: also return the probability of each draw.
            tile_batch_size: tiles that the network sees at once; changes speed and memory, not the result.
            decoder, encoder: ``"full"`` or ``"compact"``; default: what the model was loaded with.

        Returns:
            :class:`LeafOutput` on the grid of the given images.

        Raises:
            DataError: if an image has a shape or range that cannot be read, or a list mixes sizes.
            ValueError: for an argument out of range.
            CheckpointError: if the model lacks a compact part that is asked for.
        """
        visited = self.visited_timesteps(num_inference_steps, timesteps)
        noise = self._starting_noise(noise)
        _check_draws(noise, num_samples, tile_batch_size)
        predict = partial(self._predict, visited=visited, parts=self._chosen(decoder, encoder))

        # 1. Pixels to the network's grid.
        images, placement = self._prepare_images(image)  # [B, 3, h, w] in 0..1, float32
        batch = images.shape[0]

        # 2. Starting noise, float32, keyed per image.
        shape = self.latent_shape(placement.source_size)
        if latents is None:
            latent = self._draw_noise(images, shape, noise, num_samples, generator)
        elif latents.shape != (batch * num_samples, *shape):
            raise ValueError(f"latents are {list(latents.shape)}; they must be {[batch * num_samples, *shape]}")
        else:
            latent = latents.float()

        # 3. The network, on the images or on their tiles.
        if self.preprocessor.settings.fit == "tile":
            blend = partial(
                blend_tiles,
                images,
                predict=predict,
                grid=self._tile_grid(placement.source_size),
                batch_size=tile_batch_size,
            )
            canvases = latent.reshape(batch, num_samples, *shape)
            draws = (blend(canvases[:, k]).clamp(0, 1) for k in range(num_samples))
            probability, spread, samples = _mean_and_spread(draws, keep=return_samples)
            return self._output(probability, spread if num_samples > 1 else None, samples)
        maps = predict(images, latent)  # [B*S, C, h, w]

        # 4. Back to the images' grid.
        restored = self.preprocessor.restore(maps.flatten(0, 1), placement)  # [B*S*C, H, W]
        restored = restored.reshape(batch, num_samples, -1, *restored.shape[-2:]).clamp(0, 1)
        return self._output(
            restored.mean(1),
            restored.std(1, correction=0) if num_samples > 1 else None,
            restored if return_samples else None,
        )

    @contextmanager
    def segment_large(
        self,
        path: Path,
        *,
        folder: Path,
        frame: int | None = None,
        num_inference_steps: int | None = None,
        timesteps: TimestepSpacing | None = None,
        generator: torch.Generator | None = None,
        noise: Noise | None = None,
        num_samples: int = 1,
        tile_batch_size: int = 4,
        decoder: PartChoice | None = None,
        encoder: PartChoice | None = None,
    ) -> Iterator[tuple[tuple[int, int], Callable[[slice, slice], Tensor]]]:
        """Segment a TIFF that need not fit into memory, nor its result; for models with fit ``tile``.

        Gives what ``__call__`` gives, except that the percentiles or mean and deviation of ``intensity`` are those of
        about four million pixels on a regular grid.

        Args:
            path: a TIFF or OME-TIFF, see :func:`leafseg.data.large.open_large`.
            folder: where working files are kept until the context ends, about ``10 * (C + 1)`` bytes a pixel.
            frame: page of the file.
            num_inference_steps, timesteps, generator, noise, num_samples, tile_batch_size, decoder, encoder: as in
                ``__call__``.

        Yields:
            (height, width), and a reader: (rows, columns) as slices to probabilities ``[C, h, w]`` in 0..1.

        Raises:
            DataError: if the image cannot be read, or the disk is too small.
            ValueError: for an argument out of range, or a model with another fit.
        """
        if self.preprocessor.settings.fit != "tile":
            raise ValueError(f"the model's fit is {self.preprocessor.settings.fit}; only fit tile reads piece by piece")
        visited = self.visited_timesteps(num_inference_steps, timesteps)
        noise = self._starting_noise(noise)
        _check_draws(noise, num_samples, tile_batch_size)
        parts = self._chosen(decoder, encoder)
        channels = self.mask_code.n_outputs
        with open_large(path, frame) as image, torch.no_grad():
            grid = self._tile_grid(image.size)
            z, *cells = self.latent_shape(image.size)
            needed = working_bytes(grid, channels=channels, noise_channels=z * num_samples)
            check_free_space(folder, needed, path=path)
            sample = image.sample()
            with _named(path):
                to_unit = self.preprocessor.parts_to_unit(sample)

            def rows(top: int, bottom: int) -> Tensor:
                pixels = image.region(top, 0, bottom - top, image.size[1])
                with _named(path):
                    return to_unit(pixels)

            with tempfile.TemporaryDirectory(dir=folder, prefix=".tmp-noise-") as working:
                # Mapped from a file: for a very large image it is gigabytes.
                canvas = np.memmap(f"{working}/noise", np.float32, "w+", shape=(num_samples, z, *cells))
                if noise == "gaussian":
                    height, band = image.size[0], grid.tile[0]
                    position = image_position(rows(top, min(top + band, height)) for top in range(0, height, band))
                    seed = _noise_seed(generator)
                    for k in range(num_samples):
                        draws = rng.generator(seed, noise_stream(k), position)
                        draws.standard_normal(dtype=np.float32, out=canvas[k])

                def predict(tiles: Tensor, crops: Tensor) -> Tensor:
                    """Mean over the draws: crops are ``[b, S, z, h, w]``."""
                    draws = [
                        self._predict(tiles, crops[:, k], visited=visited, parts=parts) for k in range(num_samples)
                    ]
                    return torch.stack(draws).mean(0)

                with blended_on_disk(
                    rows,
                    torch.from_numpy(canvas),
                    predict,
                    grid,
                    channels=channels,
                    batch_size=tile_batch_size,
                    folder=folder,
                ) as read:
                    yield image.size, lambda y, x: read(y, x).clamp(0, 1)

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """Shape ``(z, h, w)`` of the starting noise of an image of this (height, width)."""
        z = int(self.unet.config["out_channels"])
        if self.preprocessor.settings.fit == "tile":
            return (z, *self._tile_grid(size).cells)
        height, width = self.preprocessor.settings.size
        return z, height // self._latent_stride, width // self._latent_stride

    @property
    def _latent_stride(self) -> int:
        return int(2 ** (len(self.vae.config["block_out_channels"]) - 1))

    def _tile_grid(self, size: tuple[int, int]) -> TileGrid:
        settings = self.preprocessor.settings
        return TileGrid.plan(size, settings.size, overlap=settings.tile_overlap, stride=self._latent_stride)

    def visited_timesteps(self, steps: int | None, timesteps: TimestepSpacing | None) -> list[int]:
        """The timesteps of a call with these arguments, descending. Raises ValueError for one out of range."""
        steps = self.config["num_inference_steps"] if steps is None else steps
        limit = int(self.scheduler.config["num_train_timesteps"])
        if not 1 <= steps <= limit:
            raise ValueError(f"num_inference_steps is {steps}; it must be 1..{limit}")
        spacing = cast(TimestepSpacing, timesteps or self.config["timesteps"])
        if spacing not in ("trailing", "released"):
            raise ValueError(f"timesteps is {spacing!r}; known are trailing, released")
        return inference_timesteps(limit, steps, spacing)

    def _starting_noise(self, noise: Noise | None) -> Noise:
        return cast(Noise, noise or self.config["noise"])

    def _chosen(self, decoder: PartChoice | None, encoder: PartChoice | None) -> tuple[PartChoice, PartChoice]:
        """Which (decoder, encoder) to use; None stands for the pipeline's own."""
        self.check_parts(decoder, encoder)
        return decoder or self.decoder, encoder or self.encoder

    def check_parts(self, decoder: PartChoice | None, encoder: PartChoice | None) -> None:
        """
        Raises:
            ValueError: for another choice than ``full`` and ``compact``.
            CheckpointError: if the model lacks a compact part that is asked for.
        """
        for name, wanted in (("decoder", decoder), ("encoder", encoder)):
            if wanted not in (None, "full", "compact"):
                raise ValueError(f"{name} is {wanted!r}; known are full, compact")
            if wanted == "compact" and getattr(self, f"compact_{name}") is None:
                raise CheckpointError(
                    f"the model has no compact {name}; run leafseg compact MODEL --images DIR --out DIR, and use what "
                    "it writes"
                )

    def encode_images(self, images: Tensor, encoder: PartChoice = "full") -> Tensor:
        """Image latents ``[B, z, h, w]``, as the U-Net takes them, of images ``[B, 3, H, W]`` in -1..1."""
        if encoder == "compact":
            latent: Tensor = self.compact_encoder(images)
            return latent
        return scale_latent(self.image_encoder(images), self.vae.config)

    def decode_latent(self, latent: Tensor, decoder: PartChoice = "full") -> Tensor:
        """Pictures ``[B, P*3, H, W]``, about -1..1, of a mask latent ``[B, P*z, h, w]``."""
        if decoder == "compact":
            return cast(CompactMaskDecoder, self.compact_decoder).decode_pictures(latent.to(self.compact_decoder.dtype))
        return decode_pictures(self.vae, latent.to(self.vae.dtype))

    def _predict(
        self,
        images: Tensor,
        latent: Tensor,
        *,
        visited: Sequence[int],
        parts: tuple[PartChoice, PartChoice] = ("full", "full"),
    ) -> Tensor:
        """What the network says, on its own grid.

        Args:
            images: ``[B, 3, h, w]`` in 0..1, on the network's grid.
            latent: starting noise ``[B*S, z, h/s, w/s]`` (latent stride s), in the order image by image.
            visited: timesteps, descending.
            parts: which decoder and which encoder.

        Returns:
            Probabilities ``[B*S, C, h, w]``, float32 on the CPU.
        """
        decoder, encoder = parts
        return self.probability_of(self.mask_latent(images, latent, visited=visited, encoder=encoder), decoder)

    def mask_latent(
        self, images: Tensor, latent: Tensor, *, visited: Sequence[int], encoder: PartChoice = "full"
    ) -> Tensor:
        """The first half of a prediction: arguments as ``_predict``'s, result ``[B*S, z, h/s, w/s]`` in fp32."""
        # Image latent, once an image.
        device, dtype = self.unet.device, self.unet.dtype
        if device.type == "meta" or hasattr(self.unet, "_hf_hook"):
            # Parts are moved about. Not asked always: it looks at every module of every part, which takes milliseconds.
            device = self._execution_device
        image_latent = self.encode_images((images * 2 - 1).to(device, dtype), encoder)
        image_latent = image_latent.repeat_interleave(len(latent) // len(images), 0)
        latent = latent.to(device)

        # Reverse steps; one step at t=999 gives the mask latent itself.
        schedule = self.scheduler.config
        final = float(self.scheduler.final_alpha_cumprod)
        alpha_bars = [float(self.scheduler.alphas_cumprod[timestep]) for timestep in visited]
        for timestep, alpha_bar, next_alpha_bar in zip(visited, alpha_bars, [*alpha_bars[1:], final], strict=True):
            prediction = self.unet.denoise(torch.cat([image_latent, latent.to(dtype)], 1), timestep)
            latent = ddim_update(
                prediction.float(),
                latent,
                alpha_bar=alpha_bar,
                next_alpha_bar=next_alpha_bar,
                prediction_type=schedule["prediction_type"],
                clip_range=float(schedule["clip_sample_range"]) if schedule["clip_sample"] else None,
            )
        return latent

    def probability_of(self, latent: Tensor, decoder: PartChoice = "full") -> Tensor:
        """The second half: probabilities ``[B*S, C, h, w]``, float32 on the CPU, of mask latents."""
        decoded = self.decode_latent(latent, decoder).float()  # [B*S, P*3, h, w]
        return self.mask_code.probability(decoded).cpu()

    def drawn(self, probability: Tensor) -> Tensor:
        """Probabilities ``[B, C, H, W]`` of whole images, float32 on the CPU, with 0 for labels that are absent."""
        if not self.presence:
            return probability
        return torch.from_numpy(without_absent(probability.numpy(), self.presence))

    def _output(self, probability: Tensor, spread: Tensor | None, samples: Tensor | None) -> LeafOutput:
        drawn = self.drawn(probability)
        return LeafOutput(
            probability=probability,
            labels=self.mask_code.labels(drawn),
            mask=self.mask_code.mask(drawn),
            spread=spread,
            samples=samples,
        )

    def _prepare_images(self, image: Any) -> tuple[Tensor, Any]:
        if isinstance(image, Tensor):
            if image.ndim != 4 or image.shape[1] != 3 or not image.is_floating_point():
                raise DataError(
                    f"the tensor is {image.dtype} {list(image.shape)}; give floating point [B, 3, H, W] in 0..1"
                )
            images = image.float()
            if not images.numel():
                raise DataError(f"the tensor is {list(images.shape)}; give at least one image of at least one pixel")
            low, high = (float(v) for v in images.aminmax())
            if not (low >= -1e-3 and high <= 1 + 1e-3):
                raise DataError(f"the tensor's values run from {low:.3g} to {high:.3g}; give values in 0..1")
            return self.preprocessor.resize_tensor(images.cpu())
        items = list(image) if isinstance(image, list | tuple) else [image]
        if not items:
            raise DataError("the list of images is empty; give at least one image")
        units = [self.preprocessor.intensity_to_unit(_pixels(item)) for item in items]
        sizes = {tuple(unit.shape[1:]) for unit in units}
        if len(sizes) > 1:
            raise DataError(f"the images have sizes {sorted(sizes)}; one call takes images of one size")
        return self.preprocessor.resize_tensor(torch.stack(units))

    def _draw_noise(
        self,
        images: Tensor,
        shape: tuple[int, ...],
        noise: Noise,
        num_samples: int,
        generator: torch.Generator | None,
    ) -> Tensor:
        total = images.shape[0] * num_samples
        if noise == "zeros":
            return torch.zeros(total, *shape)
        seed = _noise_seed(generator)
        draws = []
        for one in images:
            if self.preprocessor.settings.fit == "tile":
                position = image_position([one])
            else:
                position = noise_position(one.numpy())
            draws.append(draw_noise(position, shape, seed=seed, num_samples=num_samples))
        return torch.from_numpy(np.concatenate(draws))


def _check_draws(noise: str, num_samples: int, tile_batch_size: int) -> None:
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}; it must be at least 1")
    if noise not in ("gaussian", "zeros"):
        raise ValueError(f"noise is {noise!r}; known are gaussian, zeros")
    if tile_batch_size < 1:
        raise ValueError(f"tile_batch_size is {tile_batch_size}; it must be at least 1")


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Put the file's name before a DataError about its pixels."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _noise_seed(generator: torch.Generator | None) -> int:
    if generator is None:
        return 0
    return int(torch.randint(2**62, (1,), generator=generator, device=generator.device))


def _mean_and_spread(draws: Iterable[Tensor], *, keep: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Mean and standard deviation ``[B, C, H, W]`` over draws of that shape, one in memory at a time (Welford).

    With ``keep``, also all of them, ``[B, S, C, H, W]``.
    """
    mean = squares = torch.zeros(())
    kept = []
    count = 0
    for draw in draws:
        count += 1
        difference = draw - mean
        mean = mean + difference / count
        squares = squares + difference * (draw - mean)
        if keep:
            kept.append(draw)
    return mean, (squares / count).clamp(min=0).sqrt(), torch.stack(kept, 1) if keep else None


def _pixels(item: Any) -> np.ndarray[Any, Any]:
    if isinstance(item, Image.Image):
        if item.mode not in ("L", "RGB", "I;16", "I", "F"):
            item = item.convert("RGB")
        return np.asarray(item)
    if isinstance(item, np.ndarray):
        return item
    raise DataError(f"the image is a {type(item).__name__}; give a PIL image, an array, or a tensor [B, 3, H, W]")


def check_folder(folder: Path) -> None:
    """A pipeline folder's index, before any of its weights is touched.

    Raises:
        CheckpointError: if it is missing, damaged, of another kind or version, or names a class that is not allowed.
    """
    index = folder / "model_index.json"
    if (folder / BASELINE_FILE).is_file():
        raise CheckpointError(
            f"{folder}: the model is a baseline network, and a LEAF model is needed here; train, evaluate, predict and "
            "compare take both"
        )
    if not index.is_file():
        raise CheckpointError(
            f"{folder}: no model_index.json; a model is a run, or a folder that save_pretrained wrote"
        )
    try:
        content = json.loads(index.read_text())
        version = int(content.get("format_version", FORMAT_VERSION))
        known: dict[str, set[tuple[Any, ...]]] = {
            **_ALLOWED_CLASSES,
            **{key: {(None, None), pair} for key, pair in COMPACT_PARTS.items()},
        }
        named = {key: tuple(value) for key, value in content.items() if key in known}
        extra = [k for k, v in content.items() if k not in known and not k.startswith("_") and _is_class(v)]
        name = content.get("_class_name")
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(
            f"{index}: not a readable model index ({_first_line(error)}); copy the model again"
        ) from error
    if name != "LeafPipeline":
        raise CheckpointError(f"{index}: the model is a {name}; leafseg loads LeafPipeline folders")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{index}: format version {version}; this leafseg reads up to {FORMAT_VERSION}: upgrade it"
        )
    for key, allowed in known.items():
        if named.get(key, (None, None)) not in allowed:
            wanted = " or ".join(".".join(pair) for pair in sorted(pair for pair in allowed if None not in pair))
            got = ".".join(map(str, named[key])) if key in named else "missing"
            raise CheckpointError(f"{index}: component {key} is {got}; only {wanted} is loaded")
    if extra:
        raise CheckpointError(f"{index}: unknown components {', '.join(extra)}; only {', '.join(known)} are loaded")
    stored = [key for key in COMPACT_PARTS if named.get(key, (None, None)) != (None, None)]
    for key in ("unet", "vae", "image_encoder", *stored):
        if not any((folder / key).glob("*.safetensors")):
            raise CheckpointError(
                f"{folder / key}: no safetensors weights; leafseg never unpickles a model: convert it first"
            )


def _check_weights(folder: Path, module: nn.Module) -> None:
    """Every weight is accounted for: diffusers leaves a missing one random, with a warning."""
    stored: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            stored.update(weights.keys())
    wrong = sorted(stored ^ set(module.state_dict()))
    if wrong:
        raise CheckpointError(
            f"{folder}: {len(wrong)} weights are missing or unknown ({', '.join(wrong[:3])}); copy the model again"
        )


def _is_class(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(item, str | None) for item in value)


def _download(name: str, kwargs: dict[str, Any]) -> Path:
    """The hub's files of a model, in the local cache; takes its own arguments out of ``kwargs``."""
    names = ("cache_dir", "force_download", "local_files_only", "token", "revision")
    mine = {key: kwargs.pop(key) for key in names if key in kwargs}
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"], **mine))
    except Exception as error:  # the hub library's errors, and those of whatever it speaks HTTP with, share no base
        raise CheckpointError(
            f"{name}: neither a folder here nor a reachable hub id ({_first_line(error)}); check the name, or copy the "
            "model's folder here"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
