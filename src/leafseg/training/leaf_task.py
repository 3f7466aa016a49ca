"""Training of LEAF: the denoising objective, the alignment, and what a one-step model needs."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from leafseg import rng
from leafseg.config import ObjectiveSettings, Settings
from leafseg.data.dataset import SegmentationDataset
from leafseg.data.manifest import Manifest
from leafseg.data.transforms import augment_grid, flips_alone, paste_grid, unpack_augmentation
from leafseg.errors import CheckpointError
from leafseg.evaluation.evaluate import input_grid_pipeline
from leafseg.model.autoencoder import DECODER_ONLY, MaskDecoder, decode_pictures, encode_pictures, scale_latent
from leafseg.model.build import build_components, build_projector, tap_grid
from leafseg.model.feature_cache import FeatureCache, cached_tokens
from leafseg.model.group_norm import use_quick_group_norm
from leafseg.model.image_encoder import ImageEncoder
from leafseg.model.latent_cache import LatentCache
from leafseg.model.projector import Projector
from leafseg.model.recompute import recompute_activations
from leafseg.model.residual import use_quick_residual_blocks
from leafseg.model.teachers import Teacher, load_teacher
from leafseg.model.unet import MaskUNet
from leafseg.model_folder import round_weights, save_model_folder
from leafseg.objective import (
    add_noise,
    alignment_loss,
    known_cells,
    latent_loss,
    pixel_loss,
    predicted_sample,
    prediction_target,
    terminal_positions,
)
from leafseg.pipeline import LeafPipeline
from leafseg.predict import PipelineSegmenter
from leafseg.progress import progress_bar
from leafseg.training.precision import resolve_precision
from leafseg.training.segmentation_task import SegmentationTask
from leafseg.training.task import Autocast

log = logging.getLogger(__name__)

_PREFILL_BATCH = 16
_ENCODED_TOGETHER = 4  # masks that were moved are encoded in batches of a multiple of this


def alignment_weight_at(goal: ObjectiveSettings, step: int) -> float:
    """Weight of the alignment in optimizer step ``step`` (0-based): constant, or falling to 0 as a cosine."""
    if goal.alignment_steps is None:
        return goal.alignment_weight
    share = min(step / goal.alignment_steps, 1.0) if goal.alignment_steps else 1.0
    return goal.alignment_weight * 0.5 * (1 + math.cos(math.pi * share))


class LeafTrainable(nn.Module):
    """Everything that LEAF trains: image encoder, U-Net, the projector (None without alignment), and on demand the mask
    decoder, which is held here for its weights: it decodes as part of the autoencoder."""

    def __init__(
        self,
        image_encoder: ImageEncoder,
        unet: MaskUNet,
        projector: Projector | None,
        mask_decoder: nn.Module | None,
        *,
        tap: int,
        vae_config: Any,
    ) -> None:
        super().__init__()
        self.image_encoder, self.unet, self.projector = image_encoder, unet, projector
        self.mask_decoder = mask_decoder
        self._tap, self._vae_config = tap, vae_config

    def forward(self, images: Tensor, noisy_latent: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor | None]:
        """Prediction ``[B, z, h, w]`` and projected tokens ``[B, N, D]`` of images ``[B, 3, H, W]`` in -1..1."""
        image_latent = scale_latent(self.image_encoder(images), self._vae_config)
        sample = torch.cat([image_latent, noisy_latent.to(image_latent.dtype)], 1)  # image first
        if self.projector is None:
            return self.unet.denoise(sample, timesteps), None
        prediction, tap = self.unet.denoise_with_tap(sample, timesteps, tap_block=self._tap)
        return prediction, self.projector(tap)


class LeafTask(SegmentationTask):
    """LEAF as the trainer sees it.

    Args:
        settings, manifest: see :class:`SegmentationTask`.
        init_from: a pipeline whose weights are the start (fine-tuning).
        fill_cache: with cached teacher features, compute them all before training begins; else as they are asked for.

    Raises:
        DataError: if a part that is needed has no samples.
        ConfigError, CheckpointError: if the model cannot be built, or ``init_from`` has another shape.
    """

    kind = "leaf"

    def __init__(
        self,
        settings: Settings,
        manifest: Manifest,
        *,
        init_from: LeafPipeline | None = None,
        fill_cache: bool = True,
    ) -> None:
        super().__init__(settings, manifest)
        self._fill = fill_cache
        # Seeded here, so that the same settings start from the same weights in every process.
        torch.manual_seed(rng.torch_seed(settings.training.seed, "initial-weights", 0))
        labels = self.label_map
        self.parts = build_components(settings, label_names=labels.names, overlapping=labels.overlapping)
        if settings.model.autoencoder.weights is None and init_from is None:
            log.warning(
                "model.autoencoder.weights is not set: the autoencoder is random and cannot carry masks; name a folder "
                "with its weights, or start from a model with --init-from"
            )
        if init_from is not None:
            self._start_from(init_from)
        # The decoder that training sees is the one that will be used; and a resumed run reads it back bit for bit.
        round_weights(self.parts.autoencoder, settings.training.inference_dtype)
        if settings.training.gradient_checkpointing:
            for part in (self.parts.unet, self.parts.image_encoder):
                part.enable_gradient_checkpointing()
            recompute_activations(self.parts.autoencoder)  # the pixel loss goes back through its decoder
        self._grid = tap_grid(settings)
        self.teacher: Teacher | None = None
        projector = None
        if settings.objective.alignment_weight > 0 and settings.teacher.name != "none":
            half = resolve_precision(settings.training.precision) == "bf16"
            self.teacher = load_teacher(settings.teacher.name, precision="bf16" if half else "fp32")
            torch.manual_seed(rng.torch_seed(settings.training.seed, "initial-projector", 0))
            projector = build_projector(settings, teacher_dim=self.teacher.embed_dim)
        self.module: nn.Module = LeafTrainable(
            self.parts.image_encoder,
            self.parts.unet,
            projector,
            self._trained_decoder(),
            tap=settings.objective.alignment_tap,
            vae_config=self.parts.autoencoder.config,
        )
        self._alpha_bar = self.parts.scheduler.alphas_cumprod
        self._cache: FeatureCache | None = None
        self._latents = LatentCache(settings.training.latent_cache_mb)

    def _trained_decoder(self) -> nn.Module | None:
        """The autoencoder's own decoder modules, if they are to learn."""
        if self.settings.model.mask_decoder == "frozen":
            return None
        vae = self.parts.autoencoder
        parts = {"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv}
        return nn.ModuleDict({name: part for name, part in parts.items() if part is not None}).requires_grad_(True)

    @property
    def trained_parts(self) -> dict[str, nn.Module]:
        parts: dict[str, nn.Module] = {"unet": self.parts.unet, "image encoder": self.parts.image_encoder}
        decoder = getattr(self.module, "mask_decoder", None)
        return parts if decoder is None else {**parts, "mask decoder": decoder}

    @property
    def frozen_parts(self) -> dict[str, nn.Module]:
        vae = self.parts.autoencoder
        if self.settings.model.mask_decoder == "frozen":
            return {"autoencoder": vae}
        encoder = {"encoder": vae.encoder, "quant_conv": vae.quant_conv}
        return {"mask encoder": nn.ModuleDict({name: part for name, part in encoder.items() if part is not None})}

    @property
    def training_only_parts(self) -> dict[str, nn.Module]:
        found = {"projector": getattr(self.module, "projector", None), "teacher": getattr(self.teacher, "model", None)}
        return {name: part for name, part in found.items() if isinstance(part, nn.Module)}

    def record(self) -> dict[str, Any]:
        return {**super().record(), "teacher": self.teacher.name if self.teacher is not None else None}

    def prepare(self, device: torch.device, autocast: Autocast, run: Path) -> None:
        super().prepare(device, autocast, run)
        self._alpha_bar = self._alpha_bar.to(device)
        vae = self.parts.autoencoder.to(device)
        flat = self.settings.training.optimizer == "adamw_8bit" and self.settings.model.mask_decoder == "trained"
        for part in (vae.encoder, vae.quant_conv) if flat else (vae,):  # see Session on the 8-bit optimizer
            if part is not None:
                part.to(memory_format=torch.channels_last)
        if device.type == "cpu":
            use_quick_group_norm(self.parts.autoencoder)  # the pixel loss goes back through its decoder
        use_quick_residual_blocks(self.parts.autoencoder)
        if self.teacher is None:
            return
        self.teacher.to(device)
        if self.settings.teacher.features == "cached":
            teacher = self.settings.teacher
            self._cache = FeatureCache(
                Path(teacher.cache_dir) if teacher.cache_dir else run / "features",
                teacher_fingerprint=self.teacher.fingerprint,
                grid=self._grid,
                embed_dim=self.teacher.embed_dim,
                max_mb=teacher.cache_mb,
            )
            if self._fill:
                self.fill_cache(range(len(self._train)))

    def _feature_key(self, index: int) -> str:
        """Content and everything that decides what the teacher sees of it; augmentation is applied to the features."""
        preprocessing = hashlib.sha256(self.settings.data.preprocessing.model_dump_json().encode()).hexdigest()[:16]
        return f"{self._train.samples[index].sha256} {preprocessing}"

    def fill_cache(self, indices: Iterable[int]) -> int:
        """Compute the teacher features of these training samples that are not cached; returns how many."""
        if self.teacher is None or self._cache is None:
            return 0
        missing = [i for i in indices if self._cache.get(self._feature_key(i)) is None]
        plain = self._plain_training()
        with progress_bar("teacher features", total=len(missing)) as bar:
            for start in range(0, len(missing), _PREFILL_BATCH):
                chunk = missing[start : start + _PREFILL_BATCH]
                images = torch.stack([plain[0, i]["image"] for i in chunk]).to(self._device)
                keys = [self._feature_key(i) for i in chunk]
                cached_tokens(self.teacher, self._cache, keys, images, self._grid)
                bar.advance(count=len(chunk))
        return len(missing)

    def _plain_training(self) -> SegmentationDataset:
        """The training samples without augmentation."""
        return SegmentationDataset(self._train, self.preprocessor, augmentation=None, seed=0, cache_mb=0)

    def _loss(self, forward: nn.Module, batch: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
        goal = self.settings.objective
        images = (batch["image"] * 2 - 1).to(memory_format=torch.channels_last)
        labels, known = self._known_labels(batch)  # something must be drawn where nobody labelled: background
        code = self.parts.mask_code
        if labels.is_floating_point() and code.exclusive and labels.shape[1] < code.n_outputs:
            labels = torch.cat([1 - labels, labels], 1)  # a code of classes drawing two of them
        mask_latent = self._mask_latent(labels, batch)
        noise, timesteps, terminal = self._draw(batch, mask_latent.shape[1:], seed)

        alpha_bar = self._alpha_bar[timesteps]
        noisy = add_noise(mask_latent, noise, alpha_bar)
        # A noised mask at the last timestep still holds a trace of the mask; inference starts from noise alone.
        noisy = torch.where(terminal[:, None, None, None], noise, noisy)
        prediction, tokens = forward(images, noisy, timesteps)
        prediction = prediction.float()
        target = prediction_target(mask_latent, noise, alpha_bar, goal.prediction_type)
        cells = None if known is None else known_cells(known, (target.shape[2], target.shape[3]))
        parts = {"prediction": latent_loss(prediction, target, known=cells)}
        loss = goal.latent_weight * parts["prediction"]
        if tokens is not None:
            weight = alignment_weight_at(goal, self._step_of(batch))
            if weight > 0:
                # The whole batch's size, however it is cut into micro-batches and processes.
                again = self.settings.training.batch_size if goal.alignment_reduction == "mean_over_batch" else 1
                parts["alignment"] = alignment_loss(
                    tokens.float(), self._teacher_tokens(batch), divisor=again, similarity=goal.alignment_similarity
                )
                loss = loss + weight * parts["alignment"]
            else:
                loss = loss + 0 * tokens.sum()  # every process needs a gradient of every weight
        if goal.pixel_weight > 0:
            # On every sample, whatever its timestep: a batch of another size each step would make the CPU's kernels be
            # generated anew each time, which costs more than the decoding.
            sample = predicted_sample(prediction, noisy, alpha_bar, goal.prediction_type)
            with self._autocasting():
                decoded = decode_pictures(self.parts.autoencoder, sample)
            logits = self.parts.mask_code.logits(decoded.float())
            parts["pixel"] = pixel_loss(
                logits,
                labels,
                exclusive=self.parts.mask_code.exclusive,
                known=known,
                boundary_weight=goal.boundary_weight,
            )
            loss = loss + goal.pixel_weight * parts["pixel"]
        return {"loss": loss, **parts}

    def _mask_latent(self, labels: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """What the U-Net aims at, ``[B, z, h, w]`` float32; labels that flips alone have changed are encoded once."""

        def encoded(rows: Tensor) -> Tensor:
            with torch.no_grad(), self._autocasting():
                return encode_pictures(self.parts.autoencoder, self.parts.mask_code.encode(rows)).float()

        flips = [flips_alone(unpack_augmentation(vector)) for vector in batch["augmentation"].cpu()]
        if self.settings.data.preprocessing.fit == "tile":  # cut anew for every position
            flips = [None] * len(flips)
        if "mix_box" in batch:
            flips = [None if any(box) else flip for flip, box in zip(flips, batch["mix_box"].tolist(), strict=True)]
        moved = [i for i, flip in enumerate(flips) if flip is None]
        still = [i for i, flip in enumerate(flips) if flip is not None]
        if not still:
            return encoded(labels)
        indices = batch["index"].tolist()
        kept = self._latents.latents([(indices[i], flips[i]) for i in still], lambda i: encoded(labels[still[i]][None]))
        if not moved:
            return kept
        # Few sizes of batch: the CPU's kernels are generated anew for each, which costs more than some rows in vain.
        filled = moved + moved[-1:] * (-len(moved) % _ENCODED_TOGETHER)
        latent = kept.new_empty(len(labels), *kept.shape[1:])
        latent[still], latent[moved] = kept, encoded(labels[filled])[: len(moved)]
        return latent

    def _step_of(self, batch: dict[str, Tensor]) -> int:
        """The optimizer step (0-based) that a batch belongs to."""
        return int(batch["position"][0]) // self.settings.training.batch_size

    def _draw(self, batch: dict[str, Tensor], shape: torch.Size, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Noise ``[B, z, h, w]``, timesteps ``[B]`` and which samples are terminal ``[B]``, keyed by position."""
        goal = self.settings.objective
        last = self.settings.scheduler.num_train_timesteps - 1
        noise, uniforms = [], []
        for position in batch["position"].tolist():
            draws = rng.generator(seed, "diffusion", position)
            uniforms.append(draws.random(2))
            noise.append(draws.standard_normal(tuple(shape), dtype=np.float32))
        pairs = torch.from_numpy(np.stack(uniforms))
        fraction = goal.terminal_fraction if self._step_of(batch) >= goal.uniform_steps else 0.0
        terminal = terminal_positions(pairs[:, 0], fraction)
        spread = pairs[:, 1] if goal.timestep_power == 1 else pairs[:, 1] ** (1 / goal.timestep_power)
        timesteps = torch.where(terminal, last, (spread * (last + 1)).long())
        drawn = torch.from_numpy(np.stack(noise))
        if goal.terminal_noise == "zeros":
            drawn = drawn.masked_fill(terminal[:, None, None, None], 0.0)
        return drawn.to(self._device), timesteps.to(self._device), terminal.to(self._device)

    def _teacher_tokens(self, batch: dict[str, Tensor]) -> Tensor:
        if self.teacher is None:
            raise RuntimeError("alignment without a teacher")
        if self._cache is None:
            return self.teacher.tokens(batch["image"], self._grid)
        grids = self._stored_tokens(batch["index"], batch["augmentation"])
        if "mix_box" in batch:
            size = self.settings.data.preprocessing.size
            pasted = [i for i, box in enumerate(batch["mix_box"].tolist()) if any(box)]
            lent = self._stored_tokens(batch["mix_index"][pasted], batch["mix_augmentation"][pasted])
            for i, other in zip(pasted, lent, strict=True):
                top, left, bottom, right = batch["mix_box"][i].tolist()
                grids[i] = paste_grid(grids[i], other, (top, left, bottom, right), image_size=size)
        return torch.stack([grid.flatten(1).T for grid in grids]).to(self._device)

    def _stored_tokens(self, indices: Tensor, augmentations: Tensor) -> list[Tensor]:
        """Cached tokens of these training samples as grids ``[D, gh, gw]``, moved as the samples were."""
        if self.teacher is None or self._cache is None:
            raise RuntimeError("cached tokens without a teacher or its cache")
        chosen = indices.tolist()
        keys = [self._feature_key(i) for i in chosen]
        stored = [self._cache.get(key) for key in keys]
        if any(tokens is None for tokens in stored):  # the cache was full or a file was damaged
            plain = self._plain_training()
            images = torch.stack([plain[0, i]["image"] for i in chosen]).to(self._device)
            stored = list(cached_tokens(self.teacher, self._cache, keys, images, self._grid))
        size = self.settings.data.preprocessing.size
        moved = []
        for tokens, vector in zip(stored, augmentations, strict=True):
            if tokens is None:
                raise RuntimeError("tokens were computed above")
            grid = tokens.T.reshape(-1, *self._grid)
            moved.append(augment_grid(grid, unpack_augmentation(vector.cpu()), image_size=size))
        return moved

    def pipeline(self) -> LeafPipeline:
        """The inference model over the modules as they are now; nothing is copied.

        Thresholds of presence are those of a validation since the last step, if there was one.
        """
        return LeafPipeline(
            unet=self.parts.unet,
            vae=self.parts.autoencoder,
            image_encoder=self.parts.image_encoder,
            scheduler=self.parts.scheduler,
            preprocessing=self.settings.data.preprocessing.model_dump(mode="json"),
            mask_code={"name": self.parts.mask_code.name, "label_names": list(self.parts.mask_code.label_names)},
            num_inference_steps=self.settings.inference.num_inference_steps,
            timesteps=self.settings.inference.timesteps,
            noise=self.settings.objective.terminal_noise,
            presence=list(self._presence) or None,
        )

    def segmenter(self) -> PipelineSegmenter:
        pipeline = self.pipeline()
        if self.settings.training.validation_resolution == "input":
            pipeline = input_grid_pipeline(pipeline)
        pipeline.presence = ()  # a validation chooses thresholds from what is drawn without them
        return PipelineSegmenter(pipeline, autocast=self._autocast)

    def save_inference(self, folder: Path, *, earlier: Path | None = None) -> None:
        save_model_folder(self.pipeline(), folder, dtype=self.settings.training.inference_dtype, earlier=earlier)

    def _start_from(self, source: LeafPipeline) -> None:
        if isinstance(source.vae, MaskDecoder):
            raise CheckpointError(f"--init-from: the model {DECODER_ONLY}")
        mine, theirs = self.parts.scheduler.config, source.scheduler.config
        names = ("prediction_type", "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "clip_sample")
        if changed := [
            f"{name} {theirs[name]} there, {mine[name]} here" for name in names if mine[name] != theirs[name]
        ]:
            log.warning(
                "--init-from: the model was made for another noise schedule or prediction (%s); the settings of this "
                "training are used: change scheduler.* and objective.prediction_type to keep the model's",
                "; ".join(changed),
            )
        for name, mine, theirs in (
            ("U-Net", self.parts.unet, source.unet),
            ("image encoder", self.parts.image_encoder, source.image_encoder),
            ("autoencoder", self.parts.autoencoder, source.vae),
        ):
            try:
                mine.load_state_dict(theirs.state_dict())
            except RuntimeError as error:
                raise CheckpointError(
                    f"--init-from: its {name} has another shape than preset {self.settings.preset} builds "
                    f"({str(error).splitlines()[-1].strip()}); start from a model of the same preset"
                ) from error
        self.parts.autoencoder.register_to_config(
            **{k: source.vae.config[k] for k in ("latents_mean", "latents_std", "scaling_factor")}
        )
