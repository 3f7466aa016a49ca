"""Training of a compact autoencoder on images, masks and synthetic masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset

from leafseg import rng
from leafseg.config import AugmentationSettings, AutoencoderSettings, AutoencoderTrainingSettings
from leafseg.data.dataset import SegmentationDataset
from leafseg.data.manifest import IGNORE, Manifest
from leafseg.data.transforms import Preprocessor
from leafseg.errors import ConfigError, DataError
from leafseg.evaluation.round_trip import AUTOENCODER_FOLDER, mask_round_trip_dice
from leafseg.mask_code import BinaryMaskCode, foreground
from leafseg.model.autoencoder import new_autoencoder
from leafseg.model.recompute import recompute_activations
from leafseg.objective import pixel_loss
from leafseg.training.task import Autocast, Validation

_IMAGE, _MASK, _SYNTHETIC = range(3)


def synthetic_mask(size: int, generator: np.random.Generator) -> NDArray[np.uint8]:
    """A random mask ``[size, size]`` of 0 and 1: ellipses of all scales, or thresholded smooth noise.

    Shapes that no training set has, so that the autoencoder learns boundaries rather than organs.
    """
    if generator.random() < 0.4:
        cells = int(2 ** generator.uniform(2, 5.3))
        coarse = torch.from_numpy(generator.standard_normal((1, 1, cells, cells), dtype=np.float32))
        smooth = nn.functional.interpolate(coarse, (size, size), mode="bicubic", align_corners=False)[0, 0].numpy()
        level = np.quantile(smooth, generator.uniform(0.4, 0.95))
        return (smooth > level).astype(np.uint8)
    mask = np.zeros((size, size), np.uint8)
    rows, columns = np.mgrid[:size, :size]
    scale = 2 ** generator.uniform(2, np.log2(size / 2))  # one scale an image, as nuclei have
    for _ in range(int(generator.integers(1, max(2, int(min(40, (size / scale) ** 2 / 3)) + 1)))):
        y, x = generator.uniform(0, size, 2)
        a, b = scale * generator.uniform(0.5, 1.0, 2)
        angle = generator.uniform(0, np.pi)
        u = (columns - x) * np.cos(angle) + (rows - y) * np.sin(angle)
        v = (rows - y) * np.cos(angle) - (columns - x) * np.sin(angle)
        mask |= ((u / a) ** 2 + (v / b) ** 2 < 1).astype(np.uint8)
    return mask


class BalancedSets(Dataset[dict[str, Any]]):
    """Several data sets as one, each repeated to about the size of the largest."""

    def __init__(self, sets: Sequence[SegmentationDataset]) -> None:
        self.sets = tuple(sets)
        largest = max(len(s) for s in sets)
        self.entries = [
            (which, index)
            for which, s in enumerate(sets)
            for _ in range(max(1, largest // len(s)))
            for index in range(len(s))
        ]

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        position, entry = key
        which, index = self.entries[entry]
        return self.sets[which][position, index]


class AutoencoderDataset(Dataset[dict[str, Any]]):
    """One training picture: a crop of an image, of a mask (as it is, or a coarser one), or a synthetic mask; -1..1."""

    def __init__(self, sets: BalancedSets, settings: AutoencoderTrainingSettings) -> None:
        self.sets, self.settings = sets, settings

    def __len__(self) -> int:
        return len(self.sets)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        position, _ = key
        settings = self.settings
        draws = rng.generator(settings.training.seed, "autoencoder-sample", position)
        choice, top, left = draws.random(3)
        # No draw where there is nothing to choose: without coarse masks the samples stay what they were.
        coarse = settings.coarse_share > 0 and draws.random() < settings.coarse_share
        crop = settings.crop * (1 + coarse)
        if choice < settings.synthetic_share:
            kind, picture = _SYNTHETIC, torch.from_numpy(synthetic_mask(crop, draws))[None].float()
        else:
            sample = self.sets[key]
            if choice < settings.synthetic_share + settings.image_share:
                kind, picture, crop, coarse = _IMAGE, sample["image"], settings.crop, False
            else:
                kind, picture = _MASK, one_class(sample["labels"], draws)[None].float()
            y, x = (int(v * (side - crop + 1)) for v, side in zip((top, left), picture.shape[1:], strict=True))
            picture = picture[:, y : y + crop, x : x + crop]
        if coarse:
            picture = nn.functional.avg_pool2d(picture, 2)
        return {"picture": picture.expand(3, -1, -1) * 2 - 1, "kind": kind, "position": position}


def one_class(labels: Tensor, generator: np.random.Generator) -> Tensor:
    """Bool ``[H, W]``: a random class of labels ``[H, W]``, or label of bool ``[C, H, W]``; all of it if there is one.

    A code for several classes draws each by itself, so that the autoencoder must know their shapes, not the union's.
    """
    if labels.ndim == 3:
        return labels[int(generator.integers(len(labels)))]
    classes = [value for value in labels.unique().tolist() if value not in (0, IGNORE)]
    # No draw where there is nothing to choose: binary data keep the samples that they always had.
    return labels == (classes[int(generator.integers(len(classes)))] if len(classes) > 1 else max(classes, default=1))


class AutoencoderTask:
    """A KL autoencoder whose latents stay decodable under noise, for masks first and images second.

    The loss is L1 on all pictures, Dice + cross-entropy on masks, and a weighted Kullback-Leibler term that makes the
    sampled latent noisy: the decoder must read latents that a U-Net predicts, which are never exact.

    Raises:
        DataError: if a data set has no training samples.
        ConfigError: if crops do not fit, or the shares of sample kinds exceed 1.
    """

    kind = "autoencoder"
    pipeline_folder = AUTOENCODER_FOLDER

    def __init__(
        self, manifests: Sequence[Manifest], model: AutoencoderSettings, settings: AutoencoderTrainingSettings
    ) -> None:
        self.settings = settings
        _check(manifests, model, settings)
        # Seeded here, so that the same settings start from the same weights in every process.
        torch.manual_seed(rng.torch_seed(settings.training.seed, "initial-weights", 0))
        self._trainable = _Trainable(new_autoencoder(model))
        if settings.training.gradient_checkpointing:
            recompute_activations(self._trainable)
        self.module: nn.Module = self._trainable
        self.names = [_set_name(m) for m in manifests]
        preprocessor = Preprocessor(settings.preprocessing)

        def dataset(manifest: Manifest, augmentation: AugmentationSettings | None) -> SegmentationDataset:
            return SegmentationDataset(
                manifest,
                preprocessor,
                augmentation=augmentation,
                seed=settings.training.seed,
                cache_mb=settings.cache_mb // len(manifests),
            )

        self._training_sets = BalancedSets([dataset(m.part("train"), settings.augmentation) for m in manifests])
        self._plain_training = [dataset(m.part("train"), None) for m in manifests]
        self._validation = [dataset(m.part("validation"), None) for m in manifests]
        self.dataset = AutoencoderDataset(self._training_sets, settings)
        self.code = BinaryMaskCode()
        self._autocast: Autocast | None = None
        self._device = torch.device("cpu")

    @property
    def autoencoder(self) -> AutoencoderKL:
        return self._trainable.autoencoder

    def prepare(self, device: torch.device, autocast: Autocast, run: Path) -> None:
        self._device, self._autocast = device, autocast

    def loss(self, forward: nn.Module, batch: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
        picture = batch["picture"].to(memory_format=torch.channels_last)
        z = self._latent_shape(picture)
        noise = np.stack([rng.normal(seed, "autoencoder-noise", int(p), z) for p in batch["position"]])
        decoded, mean, logvar = forward(picture, torch.from_numpy(noise).to(picture.device))
        per_picture = (decoded - picture).abs().mean((1, 2, 3))
        reconstruction = per_picture.mean()
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        masks = batch["kind"] != _IMAGE
        share = masks.float().mean()
        shape = reconstruction.new_zeros(())
        if masks.any():
            shares = (picture[masks, :1] + 1) / 2  # 0 or 1, and between them where a mask is coarse
            shape = pixel_loss(self.code.logits(decoded[masks]), shares) * share
        loss = reconstruction + self.settings.shape_weight * shape + self.settings.kl_weight * divergence
        return {"loss": loss, "reconstruction": reconstruction, "shape": shape, "divergence": divergence}

    def _latent_shape(self, picture: Tensor) -> tuple[int, int, int]:
        config = self.autoencoder.config
        down = 2 ** (len(config["block_out_channels"]) - 1)
        return int(config["latent_channels"]), picture.shape[2] // down, picture.shape[3] // down

    def validate(self, limit: int, rank: int, world_size: int) -> list[Mapping[str, Any]]:
        rows: list[Mapping[str, Any]] = []
        for name, dataset in zip(self.names, self._validation, strict=True):
            for index in range(rank, min(len(dataset), limit // len(self.names)), world_size):
                dice = self._round_trip(dataset, index)
                if dice is not None:
                    rows.append({"set": name, "dice": dice})
        return rows

    def _round_trip(self, dataset: SegmentationDataset, index: int) -> float | None:
        labels = foreground(dataset[0, index]["labels"][None].to(self._device))
        if not labels.any():
            return None
        if self._autocast is None:
            raise RuntimeError("prepare() was not called")
        with self._autocast():
            return mask_round_trip_dice(self.autoencoder, labels)

    def summarise(self, rows: list[Mapping[str, Any]]) -> Validation:
        means = {name: float(np.mean([r["dice"] for r in rows if r["set"] == name] or [0.0])) for name in self.names}
        return Validation(
            score=float(np.mean(list(means.values()))), metrics={f"round_trip_dice/{k}": v for k, v in means.items()}
        )

    def save_inference(self, folder: Path, *, earlier: Path | None = None) -> None:
        """The autoencoder in half precision, with the latent statistics of the training masks."""
        stored = AutoencoderKL.from_config(self.autoencoder.config)
        stored.load_state_dict(self.autoencoder.state_dict())
        stored = stored.half().float().eval()  # statistics of the weights as they are stored
        codes = []
        with torch.no_grad():
            for dataset in self._plain_training:
                for index in range(0, len(dataset), max(1, len(dataset) // self.settings.statistics_samples)):
                    labels = dataset[0, index]["labels"][None]
                    if foreground(labels).any():
                        codes.append(
                            stored.encode(self.code.encode(foreground(labels))).latent_dist.mode()[0].flatten(1)
                        )
        values = torch.cat(codes, 1)
        stored.register_to_config(
            latents_mean=[round(v, 6) for v in values.mean(1).tolist()],
            latents_std=[round(v, 6) for v in values.std(1).tolist()],
        )
        stored.half().save_pretrained(folder)


class _Trainable(nn.Module):
    """Encoding, sampling with given noise, decoding: one forward call, as distributed training needs."""

    def __init__(self, autoencoder: AutoencoderKL) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, picture: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        distribution = self.autoencoder.encode(picture).latent_dist
        latent = distribution.mean + distribution.std * noise
        decoded: Tensor = self.autoencoder.decode(latent, return_dict=False)[0]
        return decoded, distribution.mean, distribution.logvar


def _check(manifests: Sequence[Manifest], model: AutoencoderSettings, settings: AutoencoderTrainingSettings) -> None:
    for manifest in manifests:
        if not len(manifest.part("train")):
            raise DataError(
                f"{manifest.root}: no sample falls into the train part ({len(manifest)} in all); add images or "
                "leave the set out"
            )
    stride = model.stride
    side = min(settings.preprocessing.size)
    problems = []
    if settings.coarse_share > 0 and 2 * settings.crop > side:
        problems.append(
            f"crop is {settings.crop} and coarse_share {settings.coarse_share}: coarse masks need preprocessing.size "
            f"({side}) of at least twice the crop; use a smaller crop, or coarse_share=0"
        )
    if settings.crop % stride or settings.crop > side:
        problems.append(
            f"crop is {settings.crop}; it must be a multiple of {stride}, at most preprocessing.size ({side})"
        )
    if settings.image_share + settings.synthetic_share > 1:
        problems.append(
            f"image_share {settings.image_share} and synthetic_share {settings.synthetic_share} add up to more than 1"
        )
    if problems:
        raise ConfigError("; ".join(problems))


def _set_name(manifest: Manifest) -> str:
    return manifest.root.name if manifest.root.is_dir() else manifest.root.stem
