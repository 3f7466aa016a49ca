"""How far other segmenters agree with a reference on images without a truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from leafseg.data.manifest import Sample
from leafseg.evaluation.intervals import bootstrap_mean
from leafseg.evaluation.metrics import symmetric_dice
from leafseg.predict import Segmentation, Segmenter
from leafseg.progress import progress_bar


@dataclass(frozen=True)
class Agreement:
    """Dice of a segmenter's masks with the reference's, at the images' own resolution.

    Attributes:
        dice: the mean over images with its bootstrap interval (``mean``, ``low``, ``high``, ``n``, ``groups``); of an
            image, the mean over its labels; None if no mask holds anything.
        worst: (image, Dice) of the image that agrees least.
        classes: the mean Dice of each label but the background, over the images where either mask holds it.
        images: how many were compared.
        both_empty: how many of them have no label in either mask: they agree, and count for no Dice.
    """

    dice: dict[str, Any] | None
    worst: tuple[str, float] | None
    classes: dict[str, float]
    images: int
    both_empty: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_agreement(
    reference: Segmenter, others: Mapping[str, Segmenter], samples: Sequence[Sample]
) -> dict[str, Agreement]:
    """The agreement of each of the others with the reference, on the same images.

    Where one mask holds a label and the other does not, their Dice is 0.

    Args:
        reference: whose masks count as right; it reads the images.
        others: by name, of the same labels and preprocessing.
        samples: images; their masks are not looked at.
    """
    names = reference.label_names if reference.overlapping else reference.label_names[1:]
    found: dict[str, list[np.ndarray[Any, Any]]] = {name: [] for name in others}
    with progress_bar("agreement", total=len(samples)) as bar:
        for sample in samples:
            image = reference.read(sample.image, sample.frame)
            wanted = _labels(reference.segment([image])[0], len(names))
            for name, other in others.items():
                found[name].append(symmetric_dice(_labels(other.segment([image])[0], len(names)), wanted)[0].numpy())
            bar.advance()
    return {name: _summary(np.stack(dice), names, samples) for name, dice in found.items()}


def _labels(result: Segmentation, count: int) -> torch.Tensor:
    """Bool ``[1, L, H, W]``, without the background's channel where there is one."""
    return torch.from_numpy(result.mask[None, -count:])


def _summary(dice: np.ndarray[Any, Any], names: Sequence[str], samples: Sequence[Sample]) -> Agreement:
    """Of Dice ``[N, L]``, NaN where both masks lack the label."""
    holds = ~np.isnan(dice)
    shown = holds.any(1)
    means = [float(row[has].mean()) for row, has in zip(dice[shown], holds[shown], strict=True)]
    chosen = [sample for sample, has in zip(samples, shown, strict=True) if has]
    grouped = any(sample.group is not None for sample in chosen)
    groups = [sample.group or sample.sha256 for sample in chosen] if grouped else None
    interval = bootstrap_mean(means, groups=groups)
    lowest = int(np.argmin(means)) if means else None
    return Agreement(
        dice=None if interval is None else asdict(interval),
        worst=None if lowest is None else (chosen[lowest].name, means[lowest]),
        classes={
            name: float(dice[holds[:, index], index].mean())
            for index, name in enumerate(names)
            if holds[:, index].any()
        },
        images=len(samples),
        both_empty=int((~shown).sum()),
    )
