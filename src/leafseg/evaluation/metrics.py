"""Overlap of a mask with the truth, through MONAI. Works without diffusers."""

from __future__ import annotations

from torch import Tensor


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

    if predicted.shape != truth.shape:
        raise ValueError(f"predicted is {list(predicted.shape)}, truth is {list(truth.shape)}; they must be equal")
    prediction, target = predicted.float(), truth.float()
    return (
        compute_dice(prediction, target, include_background=True, ignore_empty=True),
        compute_iou(prediction, target, include_background=True, ignore_empty=True),
    )
