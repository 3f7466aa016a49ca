"""Reverse diffusion: which timesteps are visited, and the step from one to the next (DDIM, deterministic).

diffusers' DDIMScheduler derives the next timestep as ``t - T // N``, which leaves its own trailing timesteps where N
does not divide T. Here each step goes to the timestep that is visited next, and the last one to the clean latent.
"""

from __future__ import annotations

from torch import Tensor

from leafseg.config import PredictionType, TimestepSpacing
from leafseg.objective import predicted_sample


def inference_timesteps(num_train_timesteps: int, steps: int, spacing: TimestepSpacing = "trailing") -> list[int]:
    """The timesteps that ``steps`` reverse steps visit, descending.

    Args:
        num_train_timesteps: T of the noise schedule.
        steps: N in 1..T.
        spacing: ``trailing`` starts at T-1 whatever N is ([999] for one step of 1000). ``released`` is what the
            released LEAF code does: T-1 for one step, else multiples of ``T // N`` down to 0 ([800, 600, 400, 200, 0]
            for five), although it starts from pure noise all the same.

    Raises:
        ValueError: if ``steps`` is out of range.
    """
    if not 1 <= steps <= num_train_timesteps:
        raise ValueError(f"num_inference_steps is {steps}; it must be 1..{num_train_timesteps}")
    if spacing == "released" and steps > 1:
        return [(num_train_timesteps // steps) * index for index in reversed(range(steps))]
    return [round(num_train_timesteps * (steps - index) / steps) - 1 for index in range(steps)]


def ddim_update(
    prediction: Tensor,
    latent: Tensor,
    *,
    alpha_bar: float,
    next_alpha_bar: float,
    prediction_type: PredictionType,
    clip_range: float | None = None,
) -> Tensor:
    """The latent at the next timestep (eta = 0).

    Args:
        prediction: the U-Net's output ``[B, z, h, w]``.
        latent: the noisy latent that it saw, same shape.
        alpha_bar, next_alpha_bar: cumulative alphas of this timestep and the next; 1 for the clean latent.
        prediction_type: what the prediction is.
        clip_range: the clean latent is clamped to +- this; None leaves it. The direction towards the noise is that of
            the latent before clamping, as in diffusers.

    Source: DDIM (arXiv 2010.02502), equation 12.
    """
    sample = predicted_sample(prediction, latent, latent.new_full((latent.shape[0],), alpha_bar), prediction_type)
    noise = (latent - alpha_bar**0.5 * sample) / (1 - alpha_bar) ** 0.5
    if clip_range is not None:
        sample = sample.clamp(-clip_range, clip_range)
    if next_alpha_bar == 1.0:
        return sample
    return next_alpha_bar**0.5 * sample + (1 - next_alpha_bar) ** 0.5 * noise
