"""Reverse diffusion: the timesteps that are visited, and the update between them."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler

from leafseg.objective import add_noise, prediction_target
from leafseg.pipeline import LeafPipeline
from leafseg.sampler import ddim_update, inference_timesteps

TYPES = ("sample", "epsilon", "v_prediction")


def test_trailing_timesteps_start_at_the_last_one_whatever_their_number() -> None:
    assert inference_timesteps(1000, 1) == [999]
    assert inference_timesteps(1000, 2) == [999, 499]
    assert inference_timesteps(1000, 5) == [999, 799, 599, 399, 199]
    assert inference_timesteps(1000, 3) == [999, 666, 332]
    assert inference_timesteps(4, 4) == [3, 2, 1, 0]


def test_released_timesteps_are_those_of_the_released_code() -> None:
    assert inference_timesteps(1000, 1, "released") == [999]
    assert inference_timesteps(1000, 5, "released") == [800, 600, 400, 200, 0]
    assert inference_timesteps(1000, 2, "released") == [500, 0]


@pytest.mark.parametrize("steps", [2, 3, 6, 7, 15, 333, 600, 999, 1000])
def test_timesteps_are_the_trailing_ones_of_diffusers(steps: int) -> None:
    scheduler = DDIMScheduler(num_train_timesteps=1000, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    assert inference_timesteps(1000, steps) == scheduler.timesteps.tolist()


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_a_number_of_steps_outside_the_schedule_is_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=r"must be 1\.\.1000"):
        inference_timesteps(1000, steps)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("prediction_type", TYPES)
def test_where_the_steps_divide_the_schedule_diffusers_computes_the_same_update(
    prediction_type: str, clip: bool
) -> None:
    scheduler = DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.0015,
        beta_end=0.0155,
        beta_schedule="linear",
        clip_sample=clip,
        prediction_type=prediction_type,
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(5)
    visited = inference_timesteps(1000, 5)
    bars = [float(scheduler.alphas_cumprod[t]) for t in visited]
    generator = torch.Generator().manual_seed(0)
    mine = theirs = torch.randn(2, 4, 3, 3, generator=generator)
    for timestep, bar, following in zip(visited, bars, [*bars[1:], 1.0], strict=True):
        prediction = torch.randn(2, 4, 3, 3, generator=generator)
        mine = ddim_update(
            prediction,
            mine,
            alpha_bar=bar,
            next_alpha_bar=following,
            prediction_type=prediction_type,
            clip_range=1.0 if clip else None,
        )
        theirs = scheduler.step(prediction, timestep, theirs, return_dict=False)[0]
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("steps", [1, 3, 7])
@pytest.mark.parametrize("prediction_type", TYPES)
def test_a_perfect_prediction_ends_at_the_clean_latent_after_any_number_of_steps(
    prediction_type: str, steps: int
) -> None:
    generator = torch.Generator().manual_seed(1)
    sample, noise = torch.randn(2, 1, 4, 2, 2, generator=generator, dtype=torch.float64)
    bars = [math.exp(-0.005 * t) for t in inference_timesteps(1000, steps)]
    latent = add_noise(sample, noise, torch.tensor(bars[:1], dtype=torch.float64))
    for bar, following in zip(bars, [*bars[1:], 1.0], strict=True):
        now = torch.tensor([bar], dtype=torch.float64)
        torch.testing.assert_close(latent, add_noise(sample, noise, now), rtol=0, atol=1e-8)
        target = prediction_target(sample, noise, now, prediction_type)
        latent = ddim_update(target, latent, alpha_bar=bar, next_alpha_bar=following, prediction_type=prediction_type)
    torch.testing.assert_close(latent, sample, rtol=0, atol=1e-8)


def test_the_named_timesteps_are_what_the_network_is_asked_at(tiny_pipeline: LeafPipeline) -> None:
    asked: list[int] = []
    denoise = tiny_pipeline.unet.forward

    def listen(sample: torch.Tensor, timestep: torch.Tensor | int, **kwargs: object) -> object:
        asked.append(int(timestep))
        return denoise(sample, timestep, **kwargs)

    tiny_pipeline.unet.forward = listen
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tiny_pipeline(image, num_inference_steps=5)
    tiny_pipeline(image, num_inference_steps=5, timesteps="released")
    tiny_pipeline(image, timesteps="released")
    assert asked == [999, 799, 599, 399, 199, 800, 600, 400, 200, 0, 999]


def test_an_unknown_name_of_timesteps_is_refused(tiny_pipeline: LeafPipeline) -> None:
    with pytest.raises(ValueError, match="known are trailing, released"):
        tiny_pipeline(torch.zeros(1, 3, 32, 32), timesteps="leading")


def test_a_saved_pipeline_remembers_its_timesteps(tiny_pipeline: LeafPipeline, tmp_path) -> None:
    tiny_pipeline.register_to_config(timesteps="released")
    tiny_pipeline.save_pretrained(tmp_path / "model")
    assert LeafPipeline.from_pretrained(tmp_path / "model").config["timesteps"] == "released"
