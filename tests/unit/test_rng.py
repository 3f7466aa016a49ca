"""Laws of the keyed draws: they depend on their key, and on nothing else."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from leafseg import rng

KEYS = st.tuples(st.integers(-(2**63), 2**64 - 1), st.text(max_size=8), st.integers(0, 2**63))


@given(KEYS)
@settings(deadline=None)
def test_one_key_gives_one_draw(key: tuple[int, str, int]) -> None:
    np.testing.assert_array_equal(rng.normal(*key, (3, 2)), rng.normal(*key, (3, 2)))


@given(KEYS, KEYS)
@settings(deadline=None)
def test_other_keys_give_other_draws(first: tuple[int, str, int], second: tuple[int, str, int]) -> None:
    same_key = (first[0] % 2**64, *first[1:]) == (second[0] % 2**64, *second[1:])
    assert same_key == bool((rng.normal(*first, (8,)) == rng.normal(*second, (8,))).all())


def test_draws_before_do_not_change_a_draw() -> None:
    expected = rng.normal(1, "noise", 5, (4,))
    rng.normal(1, "noise", 4, (1000,))
    np.testing.assert_array_equal(rng.normal(1, "noise", 5, (4,)), expected)


def test_long_draws_of_neighbouring_positions_do_not_overlap() -> None:
    first, second = (set(rng.generator(1, "noise", position).integers(0, 2**63, 20_000)) for position in (0, 1))
    assert not first & second


def test_normal_draws_have_mean_0_and_variance_1() -> None:
    draws = np.concatenate([rng.normal(7, "noise", position, (1000,)) for position in range(40)])
    assert draws.dtype == np.float32
    # Four standard errors: 1 / sqrt(40000) = 0.005 for the mean, sqrt(2 / 40000) = 0.0071 for the variance.
    assert abs(draws.mean()) < 4 * 0.005
    assert abs(draws.var() - 1) < 4 * 0.0071


@given(KEYS, st.integers(1, 200))
@settings(deadline=None)
def test_a_permutation_holds_every_index_once(key: tuple[int, str, int], n: int) -> None:
    assert sorted(rng.permutation(*key, n)) == list(range(n))


def test_epochs_are_shuffled_differently() -> None:
    assert not np.array_equal(rng.permutation(1, "shuffle", 0, 100), rng.permutation(1, "shuffle", 1, 100))


@given(KEYS)
@settings(deadline=None)
def test_torch_seeds_fit_63_bits(key: tuple[int, str, int]) -> None:
    assert 0 <= rng.torch_seed(*key) < 2**63 - 1


def test_a_content_position_is_the_first_eight_bytes() -> None:
    assert rng.content_position("00" * 7 + "ff" + "ab" * 24) == 255
    assert rng.content_position("01" + "00" * 31) == 2**56
