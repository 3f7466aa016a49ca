"""Training samples by global position: what a step sees depends on the seed and its position, and on nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from leafseg import rng
from leafseg.config import AugmentationSettings
from leafseg.data.manifest import Manifest, read_labels
from leafseg.data.transforms import (
    Augmentation,
    Box,
    Preprocessor,
    augment,
    draw_augmentation,
    draw_mix,
    draw_tile,
    pack_augmentation,
    paste,
    with_background,
)
from leafseg.errors import DataError


class SegmentationDataset(Dataset[dict[str, Any]]):
    """Decoded, preprocessed, augmented samples, asked for by (global sample position, index).

    The un-augmented sample is rounded to 8 bits before anything else happens to it, so that the memory cache, its limit
    and the number of workers cannot change a value.

    Args:
        manifest: the samples, normally one part; each needs a mask, unless ``with_labels`` is False.
        preprocessor: the one that the model is saved with.
        augmentation: None leaves samples as they are.
        seed: the run's seed.
        cache_mb: memory for decoded samples in each process; what does not fit is decoded again each time.
        foreground_tiles: with fit ``tile``, a sample is one tile of its image, keyed by the position; this share of
            them is centred on a labelled pixel.
        with_labels: False reads no masks; all labels are 0.
        soft_labels: give the share of each input pixel that a label covers. Not with fit ``tile``, which resizes
            nothing, nor where some pixels have no label.
    """

    def __init__(
        self,
        manifest: Manifest,
        preprocessor: Preprocessor,
        *,
        augmentation: AugmentationSettings | None,
        seed: int,
        cache_mb: int,
        foreground_tiles: float = 0.5,
        with_labels: bool = True,
        soft_labels: bool = False,
    ) -> None:
        unmasked = [sample.name for sample in manifest.samples if not sample.has_labels]
        if unmasked and with_labels:
            raise DataError(
                f"{manifest.root}: {len(unmasked)} samples have no mask ({unmasked[0]} first); add the masks"
            )
        self.manifest = manifest
        self.preprocessor = preprocessor
        self.augmentation = augmentation
        self.seed = seed
        self.cache_mb = cache_mb
        self.foreground_tiles = foreground_tiles
        self.with_labels = with_labels
        resized = preprocessor.settings.fit != "tile"
        self.soft_labels = soft_labels and with_labels and resized and manifest.label_map.ignore is None
        self._cache: dict[int, tuple[Tensor, Tensor]] = {}
        self._cached_bytes = 0

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """One sample.

        Args:
            key: (global sample position, index into the manifest).

        Returns:
            ``image`` float32 ``[3, h, w]`` in 0..1, ``labels`` int64 ``[h, w]`` (``IGNORE`` where nobody labelled) or
            bool ``[C, h, w]`` for overlapping labels, or with soft labels shares, float32 ``[K, h, w]`` in 0..1 (see
            ``Preprocessor.apply_label_shares``), ``augmentation`` float32 ``[13]`` (see
            ``transforms.unpack_augmentation``), and the ints ``index`` and ``position``. Where the augmentation mixes
            samples also ``mix_box`` int64 ``[4]``, the rectangle that was pasted (top, left, bottom, right; empty: all
            0), ``mix_index``, whose it is, and ``mix_augmentation``, that one's.

        Raises:
            DataError: if a file changed or was damaged since the manifest was read.
        """
        position, index = key
        image, labels, change = self._changed(position, index)
        sample = {"augmentation": pack_augmentation(change), "index": index, "position": position}
        if self.augmentation is not None and self.augmentation.mix > 0:
            other, box = self.lender(position, index)
            change = Augmentation()
            if any(box):
                other_image, other_labels, change = self._changed(position, other, lender=True)
                image, labels = paste(image, other_image, box), paste(labels, other_labels, box)
            sample.update(mix_box=torch.tensor(box), mix_index=other, mix_augmentation=pack_augmentation(change))
        return {"image": image, "labels": labels, **sample}

    def lender(self, position: int, index: int) -> tuple[int, Box]:
        """Which sample lends sample ``index`` a rectangle at this position, and which; see ``transforms.draw_mix``."""
        share = self.augmentation.mix if self.augmentation is not None else 0.0
        draws = rng.generator(self.seed, "mix", position)
        return draw_mix(share, len(self), index, self.preprocessor.settings.size, draws)

    def _changed(self, position: int, index: int, *, lender: bool = False) -> tuple[Tensor, Tensor, Augmentation]:
        """Image and labels of sample ``index`` as position ``position`` changes them, and how.

        A ``lender`` of a rectangle is changed by draws of its own.
        """
        image_bytes, label_bytes = self._decoded(index)
        if self.preprocessor.settings.fit == "tile":
            tile = rng.generator(self.seed, "mix-tile" if lender else "tile", position)
            image_bytes, label_bytes = draw_tile(
                image_bytes,
                label_bytes,
                self.preprocessor.settings.size,
                foreground_share=self.foreground_tiles,
                generator=tile,
            )
        image = image_bytes.float() / 255.0
        overlapping = self.with_labels and self.manifest.label_map.overlapping
        if self.soft_labels:
            labels = label_bytes.float() / 255.0
        else:
            labels = label_bytes.bool() if overlapping else label_bytes.long()
        change = Augmentation()
        if self.augmentation is not None:
            draws = rng.generator(self.seed, "mix-augmentation" if lender else "augmentation", position)
            change = draw_augmentation(self.augmentation, draws)
            image, labels = augment(image, labels, change)
            if self.soft_labels and not overlapping and len(labels) > 1:
                labels = with_background(labels[1:])  # beyond the border, and where shares were rounded
        return image, labels, change

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": {}, "_cached_bytes": 0}  # a spawned worker fills its own

    def _decoded(self, index: int) -> tuple[Tensor, Tensor]:
        cached = self._cache.get(index)
        if cached is not None:
            return cached
        sample = self.manifest.samples[index]
        pixels = self.preprocessor.read(sample.image, sample.frame)
        if self.with_labels:
            classes = read_labels(sample, self.manifest.label_map, reading=self.preprocessor.reading)
        else:
            classes = np.zeros(pixels.shape[1:], np.uint8)
        try:
            image, placement = self.preprocessor.apply(pixels)
            if self.soft_labels:
                count = len(self.manifest.label_map.names)
                shares = self.preprocessor.apply_label_shares(classes, placement, classes=count)
                labels = (shares * 255.0).round()
            else:
                labels = self.preprocessor.apply_labels(classes, placement)
        except DataError as error:
            raise DataError(f"{sample.image}: {error}") from error
        decoded = (image * 255.0).round().to(torch.uint8), labels.to(torch.uint8)
        # Never evicted: an epoch visits every sample once, so a full cache that evicts would never hit.
        n_bytes = sum(tensor.numel() for tensor in decoded)
        if self._cached_bytes + n_bytes <= self.cache_mb * 2**20:
            self._cache[index] = decoded
            self._cached_bytes += n_bytes
        return decoded


class PositionSampler(Sampler[list[tuple[int, int]]]):
    """Micro-batches of (global sample position, index), resumable by the position alone.

    Position ``p`` belongs to epoch ``p // n`` and is entry ``p % n`` of that epoch's permutation. Each optimizer step
    covers ``batch_size_global`` positions; a process takes its contiguous share, cut into micro-batches, so that the
    samples of a step are the same for any number of processes.

    Args:
        n: samples in the data set.
        seed: the run's seed.
        start_position: where to go on; step ``s`` begins at ``s * batch_size_global``.
        batch_size_global: samples an optimizer step, over all processes.
        rank, world_size: this process and how many there are; must divide the batch evenly.
        micro_batch: samples a forward pass; None takes the whole share. The last one of a step may be smaller.
        num_steps: optimizer steps to yield; None never ends.
    """

    def __init__(
        self,
        *,
        n: int,
        seed: int,
        batch_size_global: int,
        start_position: int = 0,
        rank: int = 0,
        world_size: int = 1,
        micro_batch: int | None = None,
        num_steps: int | None = None,
    ) -> None:
        if n < 1:
            raise DataError("no training samples; check the split, or add images")
        if batch_size_global < 1 or batch_size_global % world_size:
            raise ValueError(f"batch size is {batch_size_global}; it must be a positive multiple of {world_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}; it must be in 0..{world_size - 1}")
        if micro_batch is not None and micro_batch < 1:
            raise ValueError(f"micro batch is {micro_batch}; it must be at least 1")
        if start_position < 0:
            raise ValueError(f"start position is {start_position}; it must not be negative")
        self.n = n
        self.seed = seed
        self.start_position = start_position
        self.batch_size_global = batch_size_global
        self.rank = rank
        self.share = batch_size_global // world_size
        self.micro_batch = min(micro_batch or self.share, self.share)
        self.num_steps = num_steps

    @property
    def micro_batches_per_step(self) -> int:
        return -(-self.share // self.micro_batch)

    def __len__(self) -> int:
        if self.num_steps is None:
            raise TypeError("an endless sampler has no length")
        return self.num_steps * self.micro_batches_per_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, rng.permutation(self.seed, "shuffle", 0, self.n)
        step = 0
        while self.num_steps is None or step < self.num_steps:
            first = self.start_position + step * self.batch_size_global + self.rank * self.share
            keys = []
            for position in range(first, first + self.share):
                if position // self.n != epoch:
                    epoch = position // self.n
                    order = rng.permutation(self.seed, "shuffle", epoch, self.n)
                keys.append((position, int(order[position % self.n])))
            for begin in range(0, self.share, self.micro_batch):
                yield keys[begin : begin + self.micro_batch]
            step += 1
