"""Bootstrap intervals: over images, and over the groups that images come in."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leafseg.evaluation.intervals import bootstrap_mean


@settings(max_examples=10, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=30))
def test_an_interval_contains_its_mean_and_lies_between_the_extremes(values: list[float]) -> None:
    interval = bootstrap_mean(values)
    assert interval is not None
    assert interval.n == len(values)
    assert interval.mean == pytest.approx(sum(values) / len(values))
    assert interval.low is not None
    assert interval.high is not None
    assert min(values) - 1e-12 <= interval.low <= interval.mean + 1e-12
    assert interval.mean - 1e-12 <= interval.high <= max(values) + 1e-12


def test_an_interval_narrows_with_the_square_root_of_the_number_of_values() -> None:
    values = np.random.default_rng(0).normal(0.8, 0.1, 400)

    def width(count: int) -> float:
        interval = bootstrap_mean(np.tile(values[:25], count // 25))  # the same spread at every size
        return interval.high - interval.low

    assert width(25) / width(400) == pytest.approx(4, rel=0.1)
    interval = bootstrap_mean(values)  # and its width is that of the normal approximation
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)


def test_one_value_has_a_mean_without_an_interval_and_no_value_has_nothing() -> None:
    one = bootstrap_mean([0.5])
    assert (one.mean, one.low, one.high, one.n) == (0.5, None, None, 1)
    assert bootstrap_mean([]) is None


def test_equal_values_have_an_interval_without_width() -> None:
    interval = bootstrap_mean([0.25] * 5)
    assert (interval.low, interval.high) == (0.25, 0.25)


def test_an_interval_is_the_same_every_time_and_its_seed_matters() -> None:
    values = np.random.default_rng(0).random(50).tolist()
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1)
    assert bootstrap_mean(values, seed=1) != bootstrap_mean(values, seed=2)


def test_groups_of_one_image_give_the_interval_over_images() -> None:
    values = np.random.default_rng(0).random(40).tolist()
    plain, grouped = bootstrap_mean(values), bootstrap_mean(values, groups=[f"g{i}" for i in range(40)])
    assert (grouped.mean, grouped.n, grouped.groups, plain.groups) == (plain.mean, 40, 40, None)
    assert (grouped.low, grouped.high) == pytest.approx((plain.low, plain.high), abs=1e-12)


def test_images_that_resemble_each_other_within_groups_have_a_wider_interval() -> None:
    draws = np.random.default_rng(1)
    groups = np.repeat(np.arange(12), 20)
    values = draws.normal(0.7, 0.1, 12)[groups] + draws.normal(0, 0.01, 240)
    plain, grouped = bootstrap_mean(values), bootstrap_mean(values, groups=groups.tolist())
    # 20 images of a group say hardly more than one: the interval is that of 12 values, wider by about sqrt(20).
    assert grouped.mean == plain.mean
    assert (grouped.high - grouped.low) / (plain.high - plain.low) == pytest.approx(np.sqrt(20), rel=0.15)


def test_the_mean_of_unequal_groups_is_one_over_images() -> None:
    interval = bootstrap_mean([1.0, 1.0, 1.0, 0.0], groups=["a", "a", "a", "b"])
    assert (interval.mean, interval.groups) == (0.75, 2)
    assert (interval.low, interval.high) == (0, 1)  # a quarter of the resamples are b twice, a quarter a twice


def test_one_group_leaves_nothing_to_resample() -> None:
    interval = bootstrap_mean([0.2, 0.4], groups=["a", "a"])
    assert (interval.mean, interval.low, interval.high, interval.n, interval.groups) == (
        pytest.approx(0.3),
        None,
        None,
        2,
        1,
    )


def test_every_value_needs_a_group() -> None:
    with pytest.raises(ValueError, match="1 groups are given for 2 values"):
        bootstrap_mean([0.1, 0.2], groups=["a"])
