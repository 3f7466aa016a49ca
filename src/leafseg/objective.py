"""What LEAF minimises: tensors in, tensors out.

Source: LEAF (arXiv 2507.18214). Every mean is a true mean over the batch and all positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from leafseg.config import AlignmentSimilarity, PredictionType


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.to(device=like.device, dtype=like.dtype).view(-1, *([1] * (like.ndim - 1)))


def add_noise(sample: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """``sqrt(abar) * sample + sqrt(1 - abar) * noise``; ``alpha_bar`` is ``[B]``."""
    abar = _per_sample(alpha_bar, sample)
    return abar.sqrt() * sample + (1 - abar).sqrt() * noise


def prediction_target(sample: Tensor, noise: Tensor, alpha_bar: Tensor, prediction_type: PredictionType) -> Tensor:
    """What the U-Net shall output: the clean latent, the noise, or the velocity ``sqrt(abar) eps - sqrt(1-abar) z``."""
    if prediction_type == "sample":
        return sample
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        abar = _per_sample(alpha_bar, sample)
        return abar.sqrt() * noise - (1 - abar).sqrt() * sample
    raise ValueError(f"prediction_type is {prediction_type!r}; known are sample, epsilon, v_prediction")


def predicted_sample(
    prediction: Tensor, noisy_latent: Tensor, alpha_bar: Tensor, prediction_type: PredictionType
) -> Tensor:
    """The clean latent that a prediction of any type implies (x0)."""
    abar = _per_sample(alpha_bar, prediction)
    if prediction_type == "sample":
        return prediction
    if prediction_type == "epsilon":
        return (noisy_latent - (1 - abar).sqrt() * prediction) / abar.sqrt()
    if prediction_type == "v_prediction":
        return abar.sqrt() * noisy_latent - (1 - abar).sqrt() * prediction
    raise ValueError(f"prediction_type is {prediction_type!r}; known are sample, epsilon, v_prediction")


def latent_loss(prediction: Tensor, target: Tensor, *, known: Tensor | None = None) -> Tensor:
    """Mean absolute error of the prediction, scalar.

    Args:
        prediction, target: ``[B, z, h, w]``.
        known: bool ``[B, h, w]``, the latent cells that count; None counts all. Without any, the loss is 0.

    Raises:
        ValueError: if the shapes differ.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"prediction is {list(prediction.shape)}, target is {list(target.shape)}; they must be equal")
    if known is None:
        return F.l1_loss(prediction, target)
    return ((prediction - target).abs() * _share_of_mean(known)[:, None]).mean()


def known_cells(known: Tensor, size: tuple[int, int]) -> Tensor:
    """Bool ``[B, h, w]``: latent cells all of whose pixels are known, of bool ``[B, H, W]``; ``size`` is (h, w)."""
    return F.adaptive_max_pool2d((~known).float()[:, None], size)[:, 0] == 0


def _share_of_mean(known: Tensor) -> Tensor:
    """Weights of mean 1 that are 0 where nothing is known: exactly 1 everywhere if all is, so that no bit changes."""
    weight = known.float()
    return weight / weight.mean().clamp(min=torch.finfo(weight.dtype).eps)


def alignment_loss(
    student: Tensor, teacher: Tensor, *, divisor: int = 1, similarity: AlignmentSimilarity = "cosine"
) -> Tensor:
    """How far projected features are from the teacher's; lower is nearer.

    Args:
        student: projected U-Net features, ``[B, N, D]``; gradients flow.
        teacher: frozen patch tokens, ``[B, N, D]``, same row-major patch order.
        divisor: of the mean; the released code divides by its batch size once more.
        similarity: ``cosine``: mean negative cosine similarity between matching tokens. ``smooth_l1``: Huber distance
            between matching tokens scaled to length sqrt(D), so that a component is about 1. ``relational``: mean
            absolute difference between both ``[N, N]`` tables of cosine similarities within an image, which asks for
            the teacher's structure and not for its directions.

    Returns:
        Scalar, independent of B with divisor 1; cosine lies in [-1, 1], where -1 is perfect agreement, the others are
        at least 0, which is perfect agreement.

    Raises:
        ValueError: if the shapes differ.

    Source: LEAF (arXiv 2507.18214) for ``cosine``; relational knowledge distillation (arXiv 1904.05068).
    """
    if student.shape != teacher.shape:
        raise ValueError(f"student is {list(student.shape)}, teacher is {list(teacher.shape)}; they must be equal")
    if similarity == "cosine":
        return -F.cosine_similarity(student, teacher, dim=-1).mean() / divisor
    mine, theirs = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    if similarity == "smooth_l1":
        scale = student.shape[-1] ** 0.5
        return F.smooth_l1_loss(mine * scale, theirs * scale) / divisor
    return (mine @ mine.mT - theirs @ theirs.mT).abs().mean() / divisor


def pixel_loss(
    logits: Tensor,
    target: Tensor,
    *,
    exclusive: bool = True,
    known: Tensor | None = None,
    boundary_weight: float = 0.0,
) -> Tensor:
    """Soft Dice plus cross-entropy of a mask, scalar.

    Args:
        logits: ``[B, C, H, W]``; C = 1 is a binary foreground.
        target: labels ``[B, H, W]`` (integer); bool ``[B, C, H, W]`` for overlapping labels; or the share of each pixel
            that a channel covers, float ``[B, C, H, W]`` in 0..1.
        exclusive: whether the C > 1 channels compete (softmax) or not (sigmoid each).
        known: bool ``[B, H, W]``, the pixels that count; None counts all. The target elsewhere may be any valid label.
        boundary_weight: pixels within two of an outline of the target count ``1 + boundary_weight`` times in the
            cross-entropy, and all together as much as before.

    The Dice term is a mean over samples and channels; its smoothing of one pixel makes an empty target worth an
    all-background answer instead of an undefined one. Its overlap is the smaller of probability and target, which of
    labels is their product; of shares the product would ask for 1 wherever a share is large.

    Source: Dice semimetric loss (arXiv 2303.16296) for shares.
    """
    channels = logits.shape[1]
    shares = target.is_floating_point()
    if channels > 1 and exclusive:
        entropy = F.cross_entropy(logits, target, reduction="none")[:, None]
        probability = logits.softmax(1)
        wanted = target if shares else F.one_hot(target, channels).movedim(-1, 1).to(logits.dtype)
    else:
        wanted = (target[:, None] if target.ndim == 3 else target).to(logits.dtype)
        entropy = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
        probability = logits.sigmoid()
    if boundary_weight > 0:
        weight = 1 + boundary_weight * near_outline(wanted).to(entropy.dtype)
        entropy = entropy * weight / weight.mean()
    if known is not None:
        entropy = entropy * _share_of_mean(known)[:, None]
        probability, wanted = probability * known[:, None], wanted * known[:, None]
    overlap = (torch.minimum(probability, wanted) if shares else probability * wanted).sum((2, 3))
    total = probability.sum((2, 3)) + wanted.sum((2, 3))
    dice = (2 * overlap + 1) / (total + 1)
    return entropy.mean() + (1 - dice).mean()


def near_outline(masks: Tensor, reach: int = 2) -> Tensor:
    """Bool ``[B, 1, H, W]``: pixels with both sides of an outline of masks ``[B, C, H, W]`` within ``reach``."""
    highest, negative_lowest = (F.max_pool2d(m, 2 * reach + 1, 1, reach) for m in (masks, -masks))
    return (highest + negative_lowest > 0.5).any(1, keepdim=True)


def terminal_positions(uniforms: Tensor, terminal_fraction: float) -> Tensor:
    """Bool ``[B]``: which samples are trained at the last timestep on pure noise; ``uniforms`` are in [0, 1)."""
    return uniforms < torch.as_tensor(terminal_fraction, dtype=uniforms.dtype)
