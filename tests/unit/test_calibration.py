"""Calibration: against MONAI's metric, an independent formula, and cases whose answer is known."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from leafseg.evaluation.calibration import BINS, pooled, reliability


def random_pixels(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = np.random.default_rng(seed)
    probability = generator.beta(0.4, 0.6, shape).astype(np.float32)
    truth = generator.random(shape) < 1 - probability  # too high where it is high, too low where it is low
    return torch.from_numpy(probability), torch.from_numpy(truth)


def errors_by_loop(probability: np.ndarray, truth: np.ndarray, bins: int) -> tuple[float, float]:
    """ECE and ACE, bin by bin."""
    gaps, weights = [], []
    for index in range(bins):
        inside = (probability > index / bins) & (probability <= (index + 1) / bins)
        if index == 0:
            inside |= probability == 0
        if inside.any():
            gaps.append(abs(probability[inside].mean(dtype=np.float64) - truth[inside].mean()))
            weights.append(inside.mean())
    return float(np.dot(gaps, weights)), float(np.mean(gaps))


@pytest.mark.parametrize("bins", [4, BINS])
def test_both_errors_agree_with_an_independent_loop_over_bins(bins: int) -> None:
    probability, truth = random_pixels(300, 301)  # more pixels than are binned at once
    found = reliability(probability, truth, bins=bins)
    ece, ace = errors_by_loop(probability.numpy(), truth.numpy(), bins)
    assert ece > 0.05  # these pixels are not calibrated
    assert found.expected_error == pytest.approx(ece, abs=1e-6)
    assert found.average_error == pytest.approx(ace, abs=1e-6)


def test_the_expected_error_is_that_of_monai() -> None:
    from monai.metrics import CalibrationErrorMetric

    probability, truth = random_pixels(40, 50)
    metric = CalibrationErrorMetric(num_bins=BINS)
    metric(y_pred=probability[None, None], y=truth[None, None].float())
    assert reliability(probability, truth).expected_error == pytest.approx(float(metric.aggregate()), abs=1e-6)


def test_probabilities_that_come_true_as_often_as_they_say_have_no_error() -> None:
    # 20 pixels of each probability k/20, of which exactly k are foreground.
    k = torch.arange(21)
    probability = (k / 20).repeat_interleave(20)
    truth = (torch.arange(20) < k[:, None]).flatten()
    found = reliability(probability, truth)
    assert found.expected_error == pytest.approx(0, abs=1e-6)
    assert found.average_error == pytest.approx(0, abs=1e-6)


def test_overconfidence_has_the_size_and_sign_of_its_gap() -> None:
    # 30 pixels at 0.9 of which 15 are foreground, 10 at 0.1 of which none: gaps 0.4 and 0.1.
    probability = torch.tensor([0.9] * 30 + [0.1] * 10)
    truth = torch.arange(40) < 15
    found = reliability(probability, truth)
    assert found.expected_error == pytest.approx((30 * 0.4 + 10 * 0.1) / 40, abs=1e-6)
    assert found.average_error == pytest.approx((0.4 + 0.1) / 2, abs=1e-6)
    gaps = found.gap[~np.isnan(found.gap)]
    np.testing.assert_allclose(gaps, [0.1, 0.4], atol=1e-6)
    under = reliability(1 - probability, ~truth)  # mirrored: as wrong, on the other side
    assert under.expected_error == pytest.approx(found.expected_error, abs=1e-6)
    np.testing.assert_allclose(under.gap[~np.isnan(under.gap)], [-0.4, -0.1], atol=1e-6)


def test_pooling_parts_is_binning_all_their_pixels() -> None:
    parts = [random_pixels(20, 30, seed=seed) for seed in range(3)]
    whole = reliability(torch.cat([p.flatten() for p, _ in parts]), torch.cat([t.flatten() for _, t in parts]))
    together = pooled(reliability(p, t) for p, t in parts)
    np.testing.assert_array_equal(together.counts, whole.counts)
    np.testing.assert_allclose(together.probability, whole.probability, rtol=1e-6)
    np.testing.assert_allclose(together.foreground, whole.foreground, rtol=1e-6)


def test_every_pixel_of_a_large_image_counts() -> None:
    # float32 stops counting at 2**24.
    pixels = 2**24 + 4000
    found = reliability(torch.full((pixels,), 0.25), torch.zeros(pixels, dtype=torch.bool), bins=4)
    assert found.counts.sum() == pixels
    assert found.expected_error == pytest.approx(0.25, abs=1e-6)


def test_an_empty_bin_is_null_in_json_and_no_pixels_have_no_error() -> None:
    found = reliability(torch.tensor([0.05]), torch.tensor([True]), bins=2)
    written = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert written["bins"][0] == {"count": 1, "probability": pytest.approx(0.05), "foreground": 1.0}
    assert written["bins"][1] == {"count": 0, "probability": None, "foreground": None}
    nothing = reliability(torch.zeros(0), torch.zeros(0, dtype=torch.bool))
    assert math.isnan(nothing.expected_error)
    assert math.isnan(nothing.average_error)


def test_other_shapes_than_the_truth_are_refused() -> None:
    with pytest.raises(ValueError, match="they must be equal"):
        reliability(torch.zeros(4, 4), torch.zeros(4, 5, dtype=torch.bool))
