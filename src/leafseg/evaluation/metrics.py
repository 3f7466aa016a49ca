"""Agreement of a mask with the truth: overlap and distances of outlines, through MONAI. Works without diffusers."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class SurfaceMetrics:
    """How far two outlines lie apart, per image and channel; float tensors ``[B, C]`` each.

    Attributes:
        hd95: the larger of the two directions' 95th percentiles of distances, in the unit of the spacing; NaN where the
            truth or the prediction is empty.
        assd: mean over the outline pixels of both masks of the distance to the other's outline; NaN like ``hd95``.
        nsd: share of both outlines' pixels that lie within the tolerance of the other's outline, in 0..1; 0 where only
            the prediction is empty, NaN where the truth is.
    """

    hd95: Tensor
    assd: Tensor
    nsd: Tensor


def dice_and_iou(predicted: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Dice and intersection over union, per image and channel.

    Args:
        predicted: bool ``[B, C, H, W]``.
        truth: bool ``[B, C, H, W]``.

    Returns:
        Two float tensors ``[B, C]`` in 0..1; NaN where the truth is empty, since no overlap can be measured there.

    Raises:
        ValueError: if the shapes differ.
    """
    from monai.metrics import compute_dice, compute_iou

    _check_shapes(predicted, truth)
    prediction, target = predicted.float(), truth.float()
    return (
        compute_dice(prediction, target, include_background=True, ignore_empty=True),
        compute_iou(prediction, target, include_background=True, ignore_empty=True),
    )


def symmetric_dice(first: Tensor, second: Tensor) -> Tensor:
    """Dice of two masks of which neither is the truth, per image and channel.

    Args:
        first, second: bool ``[B, C, H, W]``.

    Returns:
        Float tensor ``[B, C]`` in 0..1; 0 where one alone is empty, NaN where both are.

    Raises:
        ValueError: if the shapes differ.
    """
    dice, _ = dice_and_iou(first, second)
    alone = first.flatten(2).any(2) & ~second.flatten(2).any(2)
    return dice.masked_fill(alone, 0.0)


def precision_and_recall(predicted: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Share of the predicted pixels that are true, and share of the true pixels that are predicted.

    Args:
        predicted: bool ``[B, C, H, W]``.
        truth: bool ``[B, C, H, W]``.

    Returns:
        Two float tensors ``[B, C]`` in 0..1; NaN where the prediction (precision) or the truth (recall) is empty.

    Raises:
        ValueError: if the shapes differ.
    """
    from monai.metrics import compute_confusion_matrix_metric, get_confusion_matrix

    _check_shapes(predicted, truth)
    counts = get_confusion_matrix(predicted.float(), truth.float(), include_background=True)  # [B, C, 4]
    return (
        compute_confusion_matrix_metric("precision", counts),
        compute_confusion_matrix_metric("sensitivity", counts),
    )


def surface_metrics(
    predicted: Tensor, truth: Tensor, *, spacing: tuple[float, ...] | None = None, tolerance: float
) -> SurfaceMetrics:
    """Hausdorff distance (95 %), average symmetric surface distance, normalised surface Dice.

    An outline is what a mask loses in an erosion by one pixel (four neighbours; six in 3-D). Distances run between
    centres of pixels.

    Args:
        predicted: bool ``[B, C, H, W]`` or ``[B, C, D, H, W]``.
        truth: bool, of the same shape.
        spacing: between pixels along each axis, in mm for instance; None for 1, which makes pixels the unit.
        tolerance: of the normalised surface Dice, in the same unit.

    Raises:
        ValueError: if the shapes differ.
    """
    _check_shapes(predicted, truth)
    hd95, assd, nsd = (torch.full(truth.shape[:2], math.nan) for _ in range(3))
    for b in range(truth.shape[0]):
        for c in range(truth.shape[1]):
            if not truth[b, c].any():
                continue
            if not predicted[b, c].any():
                nsd[b, c] = 0.0
                continue
            there, back = _outline_distances(predicted[b, c], truth[b, c], spacing)
            both = torch.cat([there, back])
            # NumPy's: torch.quantile refuses more than 2**24 values, which a noisy volume's outline can have.
            hd95[b, c] = max(float(np.quantile(side.numpy(), 0.95)) for side in (there, back))
            assd[b, c] = both.mean()
            nsd[b, c] = (both <= tolerance).float().mean()
    return SurfaceMetrics(hd95, assd, nsd)


def _outline_distances(predicted: Tensor, truth: Tensor, spacing: tuple[float, ...] | None) -> tuple[Tensor, Tensor]:
    """Distances from each outline pixel of the prediction to the truth's outline, and back; neither may be empty.

    MONAI's own metrics would do this three times, each with a general-purpose cropping that costs more than all the
    rest; the crop to what either mask touches changes nothing, since an erosion takes the outside for background.
    """
    from monai.metrics.utils import get_edge_surface_distance

    either = predicted | truth
    box = tuple(
        slice(int(places.min()), int(places.max()) + 1)
        for axis in range(either.ndim)
        for places in (either.movedim(axis, 0).flatten(1).any(1).nonzero(),)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI calls its own function in a way that it has deprecated
        _, (there, back), _ = get_edge_surface_distance(
            predicted[box], truth[box], spacing=spacing, symmetric=True, mask=torch.ones_like(either[box])
        )
    return there, back


def _check_shapes(predicted: Tensor, truth: Tensor) -> None:
    if predicted.shape != truth.shape:
        raise ValueError(f"predicted is {list(predicted.shape)}, truth is {list(truth.shape)}; they must be equal")
