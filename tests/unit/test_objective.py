"""The objective: targets, losses, and what is trained at the last timestep."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leafseg.objective import (
    add_noise,
    alignment_loss,
    known_cells,
    latent_loss,
    near_outline,
    pixel_loss,
    predicted_sample,
    prediction_target,
    terminal_positions,
)

TYPES = ("sample", "epsilon", "v_prediction")


@pytest.mark.parametrize("prediction_type", TYPES)
@settings(max_examples=15, deadline=None)
@given(alpha_bar=st.lists(st.floats(1e-3, 0.999), min_size=3, max_size=3), seed=st.integers(0, 2**31))
def test_a_perfect_prediction_of_any_type_gives_back_the_clean_latent(
    prediction_type: str, alpha_bar: list[float], seed: int
) -> None:
    sample, noise = torch.randn(2, 3, 4, 2, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    abar = torch.tensor(alpha_bar, dtype=torch.float64)
    target = prediction_target(sample, noise, abar, prediction_type)
    found = predicted_sample(target, add_noise(sample, noise, abar), abar, prediction_type)
    torch.testing.assert_close(found, sample, rtol=0, atol=1e-9)


@pytest.mark.parametrize("alpha_bar", [1e-4, 0.36, 0.9999])
def test_noise_and_velocity_are_the_rotation_of_clean_latent_and_noise(alpha_bar: float) -> None:
    sample, noise = torch.full((1, 1, 1, 1), 3.0), torch.full((1, 1, 1, 1), -2.0)
    abar = torch.tensor([alpha_bar])
    cos, sin = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
    assert add_noise(sample, noise, abar).item() == pytest.approx(3 * cos - 2 * sin, rel=1e-5)
    assert prediction_target(sample, noise, abar, "v_prediction").item() == pytest.approx(-2 * cos - 3 * sin, rel=1e-5)


def test_each_sample_is_noised_with_its_own_alpha_bar() -> None:
    sample, noise = torch.ones(3, 2, 2, 2), torch.zeros(3, 2, 2, 2)
    found = add_noise(sample, noise, torch.tensor([1.0, 0.25, 0.0]))
    assert found[:, 0, 0, 0].tolist() == [1.0, 0.5, 0.0]


def test_the_noise_scheduler_of_diffusers_computes_the_same_noise_and_velocity() -> None:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(beta_start=0.0015, beta_end=0.0155, beta_schedule="scaled_linear")
    sample, noise = torch.randn(2, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([0, 10, 500, 999])
    abar = scheduler.alphas_cumprod[timesteps]
    torch.testing.assert_close(add_noise(sample, noise, abar), scheduler.add_noise(sample, noise, timesteps))
    torch.testing.assert_close(
        prediction_target(sample, noise, abar, "v_prediction"), scheduler.get_velocity(sample, noise, timesteps)
    )


@pytest.mark.parametrize("function", [prediction_target, predicted_sample])
def test_an_unknown_prediction_type_is_refused(function: object) -> None:
    with pytest.raises(ValueError, match="known are sample, epsilon, v_prediction"):
        function(torch.ones(1, 1), torch.ones(1, 1), torch.ones(1), "x0")  # type: ignore[operator]


def test_the_latent_loss_is_the_mean_absolute_error() -> None:
    prediction = torch.tensor([[1.0, -2.0], [0.5, 4.0]])
    target = torch.tensor([[0.0, 1.0], [0.5, 2.0]])
    assert latent_loss(prediction, target).item() == pytest.approx((1 + 3 + 0 + 2) / 4)


def test_the_latent_loss_refuses_shapes_that_would_broadcast() -> None:
    with pytest.raises(ValueError, match=r"prediction is \[2, 4\], target is \[1, 4\]"):
        latent_loss(torch.zeros(2, 4), torch.zeros(1, 4))


def test_equal_tokens_have_an_alignment_loss_of_minus_one_and_opposite_ones_of_one() -> None:
    tokens = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    assert alignment_loss(tokens, 3 * tokens).item() == pytest.approx(-1, abs=1e-6)
    assert alignment_loss(tokens, -0.1 * tokens).item() == pytest.approx(1, abs=1e-6)


def test_the_alignment_loss_is_the_true_mean_of_hand_computed_cosines() -> None:
    student = torch.tensor([[[1.0, 0.0], [3.0, 4.0]], [[1.0, 1.0], [0.0, 2.0]]])
    teacher = torch.tensor([[[1.0, 1.0], [1.0, 0.0]], [[1.0, -1.0], [0.0, 5.0]]])
    cosines = [1 / math.sqrt(2), 3 / 5, 0.0, 1.0]
    assert alignment_loss(student, teacher).item() == pytest.approx(-sum(cosines) / 4, abs=1e-6)


def test_the_alignment_loss_does_not_depend_on_the_batch_size() -> None:
    student, teacher = torch.randn(2, 3, 4, 8, generator=torch.Generator().manual_seed(1))
    once = alignment_loss(student, teacher)
    four_times = alignment_loss(student.repeat(4, 1, 1), teacher.repeat(4, 1, 1))
    torch.testing.assert_close(once, four_times)


def test_the_alignment_loss_refuses_tokens_of_different_shapes() -> None:
    with pytest.raises(ValueError, match=r"student is \[1, 4, 8\], teacher is \[1, 9, 8\]"):
        alignment_loss(torch.zeros(1, 4, 8), torch.zeros(1, 9, 8))


def test_a_perfect_mask_has_a_pixel_loss_near_zero() -> None:
    labels = torch.zeros(2, 6, 6, dtype=torch.int64)
    labels[:, 1:4, 2:5] = 1
    sure = (labels[:, None].float() * 2 - 1) * 30
    assert pixel_loss(sure, labels).item() < 1e-5
    assert pixel_loss(-sure, labels).item() > 1


def test_an_empty_target_has_a_finite_pixel_loss_whose_best_answer_is_background() -> None:
    labels = torch.zeros(1, 4, 4, dtype=torch.int64)
    nothing = torch.full((1, 1, 4, 4), -30.0, requires_grad=True)
    loss = pixel_loss(nothing, labels)
    loss.backward()
    assert loss.item() < 1e-5
    assert nothing.grad is not None
    assert nothing.grad.isfinite().all()
    assert pixel_loss(torch.full((1, 1, 4, 4), 30.0), labels).item() > 1


def test_the_binary_pixel_loss_is_cross_entropy_plus_a_hand_computed_dice_term() -> None:
    labels = torch.tensor([[[1, 1], [1, 0]]])
    # Logits of 0 are a probability of one half: overlap 3 * 0.5, total 4 * 0.5 + 3.
    dice = (2 * 1.5 + 1) / (2 + 3 + 1)
    assert pixel_loss(torch.zeros(1, 1, 2, 2), labels).item() == pytest.approx(math.log(2) + 1 - dice, abs=1e-6)


def test_the_exclusive_pixel_loss_is_a_softmax_over_classes_computed_by_hand() -> None:
    labels = torch.tensor([[[0, 1, 1, 2]]])  # 1, 2 and 1 of 4 pixels
    dice = [(2 * n / 3 + 1) / (4 / 3 + n + 1) for n in (1, 2, 1)]
    expected = math.log(3) + 1 - sum(dice) / 3
    assert pixel_loss(torch.zeros(1, 3, 1, 4), labels).item() == pytest.approx(expected, abs=1e-6)
    shifted = pixel_loss(torch.full((1, 3, 1, 4), 5.0), labels).item()
    assert shifted == pytest.approx(expected, abs=1e-6)  # a softmax knows differences only


def test_the_overlapping_pixel_loss_treats_every_channel_as_a_binary_mask() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, target = torch.randn(2, 3, 5, 4, generator=generator), torch.rand(2, 3, 5, 4, generator=generator) > 0.5
    alone = [pixel_loss(logits[:, c : c + 1], target[:, c].long()) for c in range(3)]
    torch.testing.assert_close(pixel_loss(logits, target, exclusive=False), torch.stack(alone).mean())


@pytest.mark.parametrize(("channels", "exclusive"), product((1, 3), (True, False)))
def test_the_pixel_loss_does_not_depend_on_repeating_the_batch(channels: int, exclusive: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, channels, 4, 4, generator=generator)
    labels = torch.randint(0, max(channels, 2), (2, 4, 4), generator=generator)
    target = labels if exclusive or channels == 1 else labels[:, None] == torch.arange(channels)[:, None, None]
    torch.testing.assert_close(
        pixel_loss(logits, target, exclusive=exclusive),
        pixel_loss(torch.cat([logits] * 3), torch.cat([target] * 3), exclusive=exclusive),
    )


def test_a_terminal_fraction_of_zero_takes_no_sample_one_takes_all_and_others_their_share() -> None:
    uniforms = torch.tensor([0.0, 0.25, 0.5, 0.75, 1 - 2**-24])
    assert not terminal_positions(uniforms, 0.0).any()
    assert terminal_positions(uniforms, 1.0).all()
    assert terminal_positions(uniforms, 0.5).tolist() == [True, True, False, False, False]


def test_a_divisor_divides_the_mean_alignment() -> None:
    student, teacher = torch.randn(2, 4, 5, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(alignment_loss(student, teacher, divisor=4), alignment_loss(student, teacher) / 4)


# --- pixels that nobody labelled --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "exclusive"), [(1, True), (3, True), (3, False)])
def test_known_pixels_everywhere_change_no_bit_of_a_loss(channels: int, exclusive: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, channels, 7, 5, generator=generator)
    target = torch.randint(0, max(2, channels), (2, 7, 5), generator=generator)
    if not exclusive:
        target = target[:, None] == torch.arange(3)[:, None, None]
    known = torch.ones(2, 7, 5, dtype=torch.bool)
    assert torch.equal(
        pixel_loss(logits, target, exclusive=exclusive, known=known), pixel_loss(logits, target, exclusive=exclusive)
    )
    one, two = torch.randn(2, 2, 4, 7, 5, generator=generator)
    assert torch.equal(latent_loss(one, two, known=known), latent_loss(one, two))


@pytest.mark.parametrize(("channels", "exclusive"), [(1, True), (3, True), (3, False)])
def test_a_pixel_loss_with_unknown_pixels_is_that_of_the_image_without_them(channels: int, exclusive: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(1, channels, 4, 6, generator=generator, requires_grad=True)
    target = torch.randint(0, max(2, channels), (1, 4, 6), generator=generator)
    if not exclusive:
        target = target[:, None] == torch.arange(3)[:, None, None]
    known = torch.ones(1, 4, 6, dtype=torch.bool)
    known[:, :, 4:] = False
    found = pixel_loss(logits, target, exclusive=exclusive, known=known)
    torch.testing.assert_close(found, pixel_loss(logits[..., :4], target[..., :4], exclusive=exclusive))
    found.backward()
    assert logits.grad is not None
    assert (logits.grad[..., 4:] == 0).all()
    assert (logits.grad[..., :4] != 0).any()


def test_the_latent_loss_is_the_mean_over_known_cells() -> None:
    prediction, target = torch.tensor([[[[1.0, -2.0, 8.0]]]]), torch.zeros(1, 1, 1, 3)
    known = torch.tensor([[[True, True, False]]])
    assert latent_loss(prediction, target, known=known).item() == pytest.approx((1 + 2) / 2)


def test_a_batch_in_which_nothing_is_known_has_no_loss() -> None:
    nothing = torch.zeros(1, 4, 4, dtype=torch.bool)
    logits = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = pixel_loss(logits, torch.zeros(1, 4, 4, dtype=torch.int64), known=nothing)
    loss.backward()
    assert loss.item() == 0
    assert (logits.grad == 0).all()
    assert latent_loss(torch.ones(1, 2, 4, 4), torch.zeros(1, 2, 4, 4), known=nothing).item() == 0


def test_a_latent_cell_is_known_if_all_its_pixels_are() -> None:
    known = torch.ones(1, 16, 24, dtype=torch.bool)
    known[0, 7, 8] = False  # the last row of the first cells, the first column of the second ones
    assert known_cells(known, (2, 3)).tolist() == [[[True, False, True], [True, True, True]]]


# --- what alignment compares, and where pixels count more -----------------------------------------------------------


@pytest.mark.parametrize("similarity", ["smooth_l1", "relational"])
def test_agreement_up_to_length_costs_nothing_and_less_agreement_more(similarity: str) -> None:
    teacher, other = torch.randn(2, 2, 5, 7, generator=torch.Generator().manual_seed(0))
    losses = [
        alignment_loss(3 * teacher + share * other, teacher, similarity=similarity).item() for share in (0, 1, 10)
    ]
    assert losses[0] == pytest.approx(0, abs=1e-6)
    assert losses[0] < losses[1] < losses[2]


def test_a_relational_alignment_ignores_a_rotation_that_cosine_does_not() -> None:
    teacher = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
    turned = teacher @ torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1))).Q
    assert alignment_loss(turned, teacher, similarity="relational").item() == pytest.approx(0, abs=1e-6)
    assert alignment_loss(turned, teacher).item() > -0.9


def test_a_token_at_a_right_angle_has_the_huber_distance_worked_out_by_hand() -> None:
    # Scaled to length sqrt(2): (1.414, 0) and (0, 1.414), each component 1.414 apart: |d| - 0.5.
    student, teacher = torch.tensor([[[5.0, 0.0]]]), torch.tensor([[[0.0, 0.1]]])
    found = alignment_loss(student, teacher, similarity="smooth_l1").item()
    assert found == pytest.approx(math.sqrt(2) - 0.5, rel=1e-5)


def test_pixels_within_two_of_an_outline_are_near_it() -> None:
    mask = torch.zeros(1, 1, 1, 10)
    mask[..., 5:] = 1
    assert near_outline(mask)[0, 0, 0].tolist() == [False] * 3 + [True] * 4 + [False] * 3
    assert not near_outline(torch.ones(1, 1, 4, 4)).any()  # the border of the image is no outline


def test_boundary_weights_move_the_cross_entropy_and_not_its_scale() -> None:
    target = torch.zeros(1, 16, 16, dtype=torch.long)
    target[:, :8] = 1
    even = torch.zeros(1, 1, 16, 16)  # the same entropy everywhere: weights of mean 1 change nothing
    assert pixel_loss(even, target, boundary_weight=4).item() == pytest.approx(pixel_loss(even, target).item())
    right = torch.where(target[:, None] == 1, 6.0, -6.0)
    wrong_near, wrong_far = right.clone(), right.clone()
    wrong_near[:, :, 8], wrong_far[:, :, 15] = 6.0, 6.0  # a row each, beside the outline and far from it
    assert pixel_loss(wrong_near, target).item() == pytest.approx(pixel_loss(wrong_far, target).item())
    near, far = (pixel_loss(logits, target, boundary_weight=4).item() for logits in (wrong_near, wrong_far))
    assert near > far
