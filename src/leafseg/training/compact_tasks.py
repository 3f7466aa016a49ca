"""Distillation of the two large parts of inference into light ones; what they stand in for stays as it is.

The mask decoder learns from masks, then from what the model predicts on unlabelled images; the encoder from those.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.utils.data import Dataset

from leafseg import rng
from leafseg.config import (
    AugmentationSettings,
    CompactDecoderSettings,
    CompactEncoderSettings,
    CompactTuningSettings,
    PartChoice,
)
from leafseg.data.dataset import SegmentationDataset
from leafseg.data.manifest import Manifest
from leafseg.data.transforms import Preprocessor
from leafseg.errors import CheckpointError, ConfigError, DataError
from leafseg.evaluation.metrics import symmetric_dice
from leafseg.mask_code import BinaryMaskCode
from leafseg.model.autoencoder import DECODER_ONLY, MaskDecoder, decode_pictures, encode_pictures
from leafseg.model.compact import CompactImageEncoder, CompactMaskDecoder
from leafseg.objective import latent_loss, pixel_loss, predicted_sample
from leafseg.pipeline import LeafPipeline
from leafseg.training.autoencoder_task import one_class, synthetic_mask
from leafseg.training.task import Autocast, Validation
from leafseg.training.teacher_pairs import teacher_pairs

_LARGEST_DEFAULT_CROP = 256
_EPOCH_OF_SYNTHETIC_MASKS = 10_000  # they never repeat; an epoch is only a word there
_BLURRED, _BLENDED = 0.5, 0.25
_STATISTICS_BATCH = 4
_MASK_CACHE_MB = 512


class MaskPictures(Dataset[dict[str, Any]]):
    """Pictures that a mask decoder may have to draw: crops of masks and synthetic masks, some uncertain.

    A U-Net that is not sure predicts something between masks: some are blurred, so that a border is, and some are
    blended with another mask, so that a whole object is. All in -1..1, ``[3, crop, crop]``, keyed by position.

    Crops are cut out of masks of the model's size, synthetic ones too: most of a large picture is inside or outside of
    something, and a decoder that only ever saw whole small objects agreed worse on it the longer it learned.

    Args:
        masks: labelled samples; None takes synthetic masks alone.
        size: side of synthetic masks in pixels, at least ``crop``.
        crop: side in pixels.
        synthetic_share: of synthetic masks among those of ``masks``.
        seed: the run's seed.
        stream: of the draws: training and validation differ.
    """

    def __init__(
        self, masks: SegmentationDataset | None, *, size: int, crop: int, synthetic_share: float, seed: int, stream: str
    ) -> None:
        self.masks, self.size, self.crop, self.seed, self.stream = masks, size, crop, seed, stream
        self.synthetic_share = synthetic_share if masks is not None else 1.0

    def __len__(self) -> int:
        return len(self.masks) if self.masks is not None else _EPOCH_OF_SYNTHETIC_MASKS

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        position, _ = key
        draws = rng.generator(self.seed, self.stream, position)
        choice, top, left, blur, blend = draws.random(5)

        def cut(plane: Tensor) -> Tensor:
            y, x = (int(v * (side - self.crop + 1)) for v, side in zip((top, left), plane.shape, strict=True))
            return plane[y : y + self.crop, x : x + self.crop].float()

        def synthetic() -> Tensor:
            return cut(torch.from_numpy(synthetic_mask(self.size, draws)))

        if self.masks is None or choice < self.synthetic_share:
            values = synthetic()
        else:
            values = cut(one_class(self.masks[key]["labels"], draws))
        if blend < _BLENDED:
            share = draws.uniform(0.5, 1)
            values = share * values + (1 - share) * synthetic()
        if blur < _BLURRED:
            reach = int(draws.integers(1, max(2, self.crop // 16)))
            padded = F.pad(values[None, None], (reach,) * 4, mode="replicate")
            values = F.avg_pool2d(padded, 2 * reach + 1, stride=1)[0, 0]
        return {"picture": (values * 2 - 1).expand(3, -1, -1).contiguous(), "position": position}


class DecoderDistillationTask:
    """A compact mask decoder that draws what the full decoder draws, from the latents of masks.

    The latents are disturbed, by white and by smooth noise, and the full decoder draws the same disturbed ones: it is
    imitated where a U-Net leads it, and not only on exact latents. The loss is L1 on the grey values, and Dice +
    cross-entropy against the mask that the full decoder's picture stands for. The full decoder, much the larger one,
    draws ``settings.pairs`` pictures before the training, and no more.

    Args:
        autoencoder: the teacher.
        preprocessor: brings masks to the grid that the model works on.
        settings: how.
        masks: labelled samples whose train part is learned from; None takes synthetic masks alone.

    Raises:
        CheckpointError: if the autoencoder is its decoder alone.
        ConfigError: if crops do not fit.
        DataError: if no mask falls into the train part.
    """

    kind = "compact decoder"
    pipeline_folder = "compact_decoder"

    def __init__(
        self,
        autoencoder: AutoencoderKL | MaskDecoder,
        preprocessor: Preprocessor,
        settings: CompactDecoderSettings,
        *,
        masks: Manifest | None = None,
    ) -> None:
        if isinstance(autoencoder, MaskDecoder):
            raise CheckpointError(f"the model {DECODER_ONLY}, or distil the image encoder alone (--parts encoder)")
        self.settings, self._vae = settings, autoencoder.requires_grad_(False).eval()
        stride = 2 ** (len(autoencoder.config["block_out_channels"]) - 1)
        size = min(preprocessor.settings.size)
        crop = settings.crop or min(size, _LARGEST_DEFAULT_CROP)
        if crop % stride or crop > size:
            raise ConfigError(
                f"decoder.crop is {crop}; it must be a multiple of {stride}, at most the model's size ({size})"
            )
        seed = settings.training.seed
        torch.manual_seed(rng.torch_seed(seed, "initial-weights", 0))
        self.decoder = CompactMaskDecoder.for_autoencoder(
            autoencoder.config, width=settings.width, blocks=settings.blocks
        )
        self.module: nn.Module = self.decoder
        parts: dict[str, SegmentationDataset | None] = {"train": None, "validation": None}
        if masks is not None:
            if not len(masks.part("train")):
                raise DataError(
                    f"{masks.root}: no mask falls into the train part ({len(masks)} in all); add masks, or leave out "
                    "--data: synthetic masks are then drawn"
                )
            for name in parts:
                chosen = masks.part(name)
                if len(chosen):
                    parts[name] = SegmentationDataset(
                        chosen, preprocessor, augmentation=None, seed=seed, cache_mb=_MASK_CACHE_MB
                    )

        def pictures(name: str) -> MaskPictures:
            return MaskPictures(
                parts[name],
                size=size,
                crop=crop,
                synthetic_share=settings.synthetic_share,
                seed=seed,
                stream=f"compact-mask-{name}",
            )

        self._pictures, self._validation = pictures("train"), pictures("validation")
        self.dataset: Dataset[Any] = self._pictures
        self._autocast: Autocast | None = None
        self._device = torch.device("cpu")

    def prepare(self, device: torch.device, autocast: Autocast, run: Path) -> None:
        self._device, self._autocast = device, autocast
        self._vae.to(device, memory_format=torch.channels_last)
        if pairs := self.settings.pairs:
            self.dataset = teacher_pairs(self._pictures, self._taught, run, self.settings.training, most=pairs)

    def _taught(self, batch: Mapping[str, Any], seed: int) -> dict[str, Tensor]:
        draws = [rng.generator(seed, "compact-disturbance", position) for position in batch["position"].tolist()]
        latent, wanted = self._latent_and_picture(batch["picture"].to(self._device), draws)
        return {"latent": latent, "grey": wanted}

    def loss(self, forward: nn.Module, batch: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
        return _drawing_loss(forward, batch if self.settings.pairs else self._taught(batch, seed), self.settings)

    @torch.no_grad()
    def _latent_and_picture(self, pictures: Tensor, draws: list[np.random.Generator]) -> tuple[Tensor, Tensor]:
        """Disturbed mask latents ``[B, z, h, w]``, and the grey values ``[B, H, W]`` that the full decoder draws."""
        if self._autocast is None:
            raise RuntimeError("prepare() was not called")
        with self._autocast():
            latent = encode_pictures(self._vae, pictures.to(memory_format=torch.channels_last)).float()
        pairs = zip(latent, draws, strict=True)
        latent = torch.stack([one + _disturbance(one, self.settings.noise, own) for one, own in pairs])
        with self._autocast():
            return latent, decode_pictures(self._vae, latent).float().mean(1)

    def validate(self, limit: int, rank: int, world_size: int) -> list[Mapping[str, Any]]:
        """Dice of the two decoders' masks on pictures that are not trained on; empty ones are left out."""
        rows: list[Mapping[str, Any]] = []
        for index in range(rank, limit, world_size):
            entry = index % len(self._validation)
            picture = self._validation[index, entry]["picture"][None].to(self._device)
            draws = rng.generator(self.settings.training.seed, "compact-disturbance-validation", index)
            latent, wanted = self._latent_and_picture(picture, [draws])
            if self._autocast is None:
                raise RuntimeError("prepare() was not called")
            with self._autocast():
                drawn = self.decoder(latent).float()
            dice = symmetric_dice(drawn > 0, wanted[:, None] > 0)
            if not dice.isnan().all():
                rows.append({"dice": float(dice)})
        return rows

    def summarise(self, rows: list[Mapping[str, Any]]) -> Validation:
        return _agreement(rows)

    def save_inference(self, folder: Path, *, earlier: Path | None = None) -> None:
        self.decoder.save_pretrained(folder)


def require_parts(images: Manifest) -> None:
    """Raises a DataError if there is no image to learn from, or none to choose a checkpoint with."""
    for name in ("train", "validation"):
        if not len(images.part(name)):
            raise DataError(
                f"{images.root}: no image falls into the {name} part ({len(images)} in all); give more images"
            )


class _ImageTask:
    """What the two distillations from unlabelled images share: their images, and how the model goes on from latents."""

    def __init__(
        self, pipeline: LeafPipeline, images: Manifest, augmentation: AugmentationSettings, *, seed: int, cache_mb: int
    ) -> None:
        self._pipeline, self._seed, self._images = pipeline, seed, images
        require_parts(images)
        self._train = self._part("train", augmentation, cache_mb)
        self.dataset: Dataset[Any] = self._train
        self._validation = self._part("validation", None, 0)
        pipeline.unet.requires_grad_(False).eval()
        pipeline.image_encoder.requires_grad_(False).eval()
        self._terminal = int(pipeline.scheduler.config["num_train_timesteps"]) - 1
        self._alpha_bar = float(pipeline.scheduler.alphas_cumprod[-1])
        self._autocast: Autocast | None = None
        self._device = torch.device("cpu")

    def _part(self, name: str, augmentation: AugmentationSettings | None, cache_mb: int) -> SegmentationDataset:
        return SegmentationDataset(
            self._images.part(name),
            self._pipeline.preprocessor,
            augmentation=augmentation,
            seed=self._seed,
            cache_mb=cache_mb,
            foreground_tiles=0.0,
            with_labels=False,
        )

    def prepare(self, device: torch.device, autocast: Autocast, run: Path) -> None:
        self._device, self._autocast = device, autocast
        pipe = self._pipeline
        for part in (pipe.unet, pipe.image_encoder, pipe.vae, pipe.compact_decoder):
            if part is not None:
                part.to(device, memory_format=torch.channels_last)

    def _noise(self, positions: list[int], cells: torch.Size, seed: int, stream: str) -> Tensor:
        shape = (int(self._pipeline.unet.config["out_channels"]), *cells)
        if self._pipeline.config["noise"] == "zeros":
            return torch.zeros(len(positions), *shape, device=self._device)
        draws = [rng.normal(seed, stream, position, shape) for position in positions]
        return torch.from_numpy(np.stack(draws)).to(self._device)

    def _prediction(self, latent: Tensor, noise: Tensor) -> Tensor:
        return self._pipeline.unet.denoise(torch.cat([latent, noise], 1), self._terminal).float()

    def _sample(self, prediction: Tensor, noise: Tensor) -> Tensor:
        """The mask latent that a prediction at the last timestep stands for."""
        alpha_bar = noise.new_full((len(noise),), self._alpha_bar)
        return predicted_sample(prediction, noise, alpha_bar, self._pipeline.scheduler.config["prediction_type"])

    def _validation_images(
        self, limit: int, rank: int, world_size: int, stream: str
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Evenly spaced validation images ``[1, 3, H, W]`` in -1..1, each with the noise that its step starts from."""
        size = len(self._validation)
        count = min(limit, size)
        stride = int(2 ** (len(self._pipeline.vae.config["block_out_channels"]) - 1))
        for index in [i * size // count for i in range(count)][rank::world_size]:
            images = self._validation[index, index]["image"][None].to(self._device) * 2 - 1
            cells = torch.Size(side // stride for side in images.shape[2:])
            yield images, self._noise([index], cells, self._seed, stream)

    def _compared(self, mine: Tensor, theirs: Tensor) -> dict[str, float] | None:
        """Mean Dice over the classes of the masks that two sets of pictures stand for; None if both are empty."""
        code = self._pipeline.mask_code
        dice = symmetric_dice(*(code.mask(code.probability(pictures)) for pictures in (mine, theirs)))[0]
        dice = dice[1:] if code.exclusive and code.n_outputs > 1 else dice  # without the background
        return None if dice.isnan().all() else {"dice": float(dice.nanmean())}

    def summarise(self, rows: list[Mapping[str, Any]]) -> Validation:
        return _agreement(rows)

    def _autocasting(self) -> Any:
        if self._autocast is None:
            raise RuntimeError("prepare() was not called")
        return self._autocast()


class DecoderTuningTask(_ImageTask):
    """A compact mask decoder goes on learning, from the mask latents that the model itself predicts on images.

    A U-Net's latents are not those of masks: where the full decoder learned with the model, they may be far from them,
    and agreement is decided there. The loss is that of :class:`DecoderDistillationTask`, and here too the full model
    is asked ``settings.pairs`` times and no more.

    Args:
        pipeline: the model, with a compact decoder, whose copy is trained.
        images: all images, masks are not looked at; the train part is learned from, the validation part chooses the
            checkpoint.
        settings: how.

    Raises:
        DataError: if a part that is needed has no images.
    """

    kind = "compact decoder on images"
    pipeline_folder = DecoderDistillationTask.pipeline_folder

    def __init__(self, pipeline: LeafPipeline, images: Manifest, settings: CompactTuningSettings) -> None:
        super().__init__(
            pipeline, images, settings.augmentation, seed=settings.training.seed, cache_mb=settings.cache_mb
        )
        self.settings = settings
        pipeline.vae.requires_grad_(False).eval()
        before = pipeline.compact_decoder
        # Not that object: diffusers would write the place that it was loaded from into the new one's config.
        names = ("latent_channels", "width", "blocks", "upsamplings")
        self.decoder = CompactMaskDecoder(**{name: before.config[name] for name in names})
        self.decoder.load_state_dict(before.state_dict())
        self.module: nn.Module = self.decoder

    def prepare(self, device: torch.device, autocast: Autocast, run: Path) -> None:
        super().prepare(device, autocast, run)
        if pairs := self.settings.pairs:
            self.dataset = teacher_pairs(self._train, self._taught, run, self.settings.training, most=pairs)

    @torch.no_grad()
    def _taught(self, batch: Mapping[str, Any], seed: int) -> dict[str, Tensor]:
        """Mask latents that the model predicts ``[B, P, z, h, w]``, and what it draws of them ``[B, P, H, W]``."""
        images = (batch["image"].to(self._device) * 2 - 1).to(memory_format=torch.channels_last)
        with self._autocasting():
            latent = self._pipeline.encode_images(images).float()
            noise = self._noise(batch["position"].tolist(), latent.shape[2:], seed, "compact-tuning-noise")
            sample = self._sample(self._prediction(latent, noise), noise)
            single = sample.unflatten(1, (-1, int(self.decoder.config["latent_channels"])))
            wanted = decode_pictures(self._pipeline.vae, single.flatten(0, 1)).float().mean(1)
        return {"latent": single, "grey": wanted.unflatten(0, single.shape[:2])}

    def loss(self, forward: nn.Module, batch: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
        taught = batch if self.settings.pairs else self._taught(batch, seed)
        return _drawing_loss(forward, {name: taught[name].flatten(0, 1) for name in ("latent", "grey")}, self.settings)

    @torch.no_grad()
    def validate(self, limit: int, rank: int, world_size: int) -> list[Mapping[str, Any]]:
        """Dice of the masks that the two decoders draw of the model's own latents, on validation images."""
        rows: list[Mapping[str, Any]] = []
        for images, noise in self._validation_images(limit, rank, world_size, "compact-tuning-noise-validation"):
            with self._autocasting():
                latent = self._pipeline.encode_images(images).float()
                sample = self._sample(self._prediction(latent, noise), noise)
                pictures = [self.decoder.decode_pictures(sample), self._pipeline.decode_latent(sample)]
            if (row := self._compared(pictures[0].float(), pictures[1].float())) is not None:
                rows.append(row)
        return rows

    def save_inference(self, folder: Path, *, earlier: Path | None = None) -> None:
        self.decoder.save_pretrained(folder)


class EncoderDistillationTask(_ImageTask):
    """A compact image encoder whose latents lead the frozen U-Net to the same masks.

    The loss is the L1 distance of the latents, in units of their standard deviation; that of what the U-Net predicts
    from them at the last timestep, where inference begins; and Dice + cross-entropy of the mask that follows, against
    the one that follows from the full encoder's latents. Masks are decoded by the compact decoder if the model has one.

    Args:
        pipeline: the model.
        images: all images; the train part is learned from, the validation part chooses the checkpoint.
        settings: how.

    Raises:
        DataError: if a part that is needed has no images.
    """

    kind = "compact encoder"
    pipeline_folder = "compact_encoder"

    def __init__(self, pipeline: LeafPipeline, images: Manifest, settings: CompactEncoderSettings) -> None:
        seed = settings.training.seed
        super().__init__(pipeline, images, settings.augmentation, seed=seed, cache_mb=settings.cache_mb)
        self.settings = settings
        mean, std = self._latent_statistics(self._part("train", None, 0))
        torch.manual_seed(rng.torch_seed(seed, "initial-weights", 0))
        self.encoder = CompactImageEncoder.for_encoder(
            pipeline.image_encoder.config,
            width=settings.width,
            blocks=settings.blocks,
            latent_mean=mean,
            latent_std=std,
        )
        self.module: nn.Module = self.encoder
        self._std = torch.tensor(std)[:, None, None]
        self._decoder: PartChoice = "compact" if pipeline.compact_decoder is not None else "full"

    @torch.no_grad()
    def _latent_statistics(self, plain: SegmentationDataset) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each latent channel, over evenly spaced training images."""
        count = min(self.settings.statistics_samples, len(plain))
        chosen = [i * len(plain) // count for i in range(count)]
        codes = []
        for start in range(0, count, _STATISTICS_BATCH):
            images = torch.stack([plain[i, i]["image"] for i in chosen[start : start + _STATISTICS_BATCH]])
            codes.append(self._pipeline.encode_images(images * 2 - 1).transpose(0, 1).flatten(1))
        values = torch.cat(codes, 1)
        mean, std = values.mean(1), values.std(1).clamp(min=1e-3)
        return [round(v, 6) for v in mean.tolist()], [round(v, 6) for v in std.tolist()]

    def prepare(self, device: torch.device, autocast: Autocast, run: Path) -> None:
        super().prepare(device, autocast, run)
        self._std = self._std.to(device)

    def loss(self, forward: nn.Module, batch: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
        images = (batch["image"] * 2 - 1).to(memory_format=torch.channels_last)
        with torch.no_grad(), self._autocasting():
            wanted = self._pipeline.encode_images(images).float()
        latent = forward(images).float()
        parts = {"latent": ((latent - wanted).abs() / self._std).mean()}
        loss = parts["latent"]
        if self.settings.prediction_weight or self.settings.mask_weight:
            noise = self._noise(batch["position"].tolist(), wanted.shape[2:], seed, "compact-noise")
            with self._autocasting():
                prediction = self._prediction(latent, noise)
                with torch.no_grad():
                    wanted_prediction = self._prediction(wanted, noise)
            parts["prediction"] = latent_loss(prediction, wanted_prediction)
            loss = loss + self.settings.prediction_weight * parts["prediction"]
            # What epsilon implies at the last timestep is noise.
            if self.settings.mask_weight and self._pipeline.scheduler.config["prediction_type"] != "epsilon":
                code = self._pipeline.mask_code
                with torch.no_grad():
                    probability = code.probability(self._pictures(wanted_prediction, noise))
                    labels = code.labels(probability)
                    if labels is None:  # they overlap
                        labels = code.mask(probability)
                logits = code.logits(self._pictures(prediction, noise))
                parts["mask"] = pixel_loss(logits, labels, exclusive=code.exclusive)
                loss = loss + self.settings.mask_weight * parts["mask"]
        return {"loss": loss, **parts}

    def _pictures(self, prediction: Tensor, noise: Tensor) -> Tensor:
        sample = self._sample(prediction, noise)
        with self._autocasting():
            return self._pipeline.decode_latent(sample, self._decoder).float()

    def validate(self, limit: int, rank: int, world_size: int) -> list[Mapping[str, Any]]:
        """Dice of the masks that follow from the two encoders' latents, on evenly spaced validation images."""
        rows: list[Mapping[str, Any]] = []
        for images, noise in self._validation_images(limit, rank, world_size, "compact-noise-validation"):
            pictures = []
            for encode in (self.encoder, self._pipeline.encode_images):
                with self._autocasting():
                    prediction = self._prediction(encode(images).float(), noise)
                pictures.append(self._pictures(prediction, noise))
            if (row := self._compared(*pictures)) is not None:
                rows.append(row)
        return rows

    def save_inference(self, folder: Path, *, earlier: Path | None = None) -> None:
        self.encoder.save_pretrained(folder)


def _drawing_loss(
    forward: nn.Module, taught: Mapping[str, Tensor], settings: CompactDecoderSettings | CompactTuningSettings
) -> dict[str, Tensor]:
    """Of ``latent`` ``[B, z, h, w]`` and ``grey`` ``[B, H, W]``: L1 of values, Dice + cross-entropy of masks."""
    drawn, wanted = forward(taught["latent"].to(memory_format=torch.channels_last)).float(), taught["grey"]
    grey = (drawn[:, 0] - wanted).abs().mean()
    # Any code's pictures are black and white.
    shape = pixel_loss(BinaryMaskCode().logits(drawn.expand(-1, 3, -1, -1)), (wanted > 0).long())
    return {"loss": grey + settings.shape_weight * shape, "grey": grey, "shape": shape}


def _disturbance(latent: Tensor, most: float, draws: np.random.Generator) -> Tensor:
    """Noise for a latent ``[z, h, w]``: white, and smooth over a few cells, each of a random size up to ``most``."""
    sizes = draws.uniform(0, most, 2)
    white = torch.from_numpy(draws.standard_normal(tuple(latent.shape), dtype=np.float32))
    coarse = [max(2, side // 4) for side in latent.shape[1:]]
    smooth = torch.from_numpy(draws.standard_normal((1, len(latent), *coarse), dtype=np.float32))
    smooth = F.interpolate(smooth, latent.shape[1:], mode="bilinear", align_corners=False)[0]
    return (float(sizes[0]) * white + float(sizes[1]) * smooth).to(latent.device)


def _agreement(rows: list[Mapping[str, Any]]) -> Validation:
    dice = [row["dice"] for row in rows] or [0.0]
    return Validation(score=float(np.mean(dice)), metrics={"dice": float(np.mean(dice)), "worst": min(dice)})
