"""Means and intervals against closed forms and against what must be true of any bootstrap."""

from __future__ import annotations

import numpy as np
import pytest

from kvbench.analysis.stats import macro_mean, paired_difference


def test_the_mean_is_over_data_sets_not_over_examples():
    estimate = macro_mean({"a": [0.0] * 99 + [100.0], "b": [50.0, 50.0]})
    assert estimate.mean == pytest.approx((1.0 + 50.0) / 2)
    assert estimate.n == 102


def test_the_interval_is_the_normal_one_for_many_examples():
    values = np.random.default_rng(0).normal(30.0, 8.0, 400)
    estimate = macro_mean({"a": values.tolist()})
    half = 1.96 * values.std() / 20
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.15)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.15)


def test_the_same_seed_gives_the_same_interval():
    groups = {"a": [1.0, 5.0, 9.0], "b": [2.0, 2.5]}
    assert macro_mean(groups, seed=3) == macro_mean(groups, seed=3)


def test_single_examples_have_no_interval_and_shift_the_mean_only():
    assert macro_mean({"a": [40.0]}).low is None
    mixed = macro_mean({"a": [40.0], "b": [0.0, 100.0, 0.0, 100.0]})
    assert mixed.mean == pytest.approx(45.0)
    assert 20.0 <= mixed.low <= mixed.mean <= mixed.high <= 70.0


def test_equal_values_have_an_interval_of_no_width():
    estimate = macro_mean({"a": [7.0, 7.0, 7.0]})
    assert (estimate.low, estimate.high) == (7.0, 7.0)


def test_pairing_takes_the_noise_of_the_examples_out():
    """A method that loses 1 point on every example, on examples that differ by 50: the difference is certain."""
    baseline = {"a": {str(i): 50.0 * (i % 2) for i in range(40)}}
    scores = {"a": {key: value - 1.0 for key, value in baseline["a"].items()}}
    difference = paired_difference(scores, baseline)
    assert (difference.mean, difference.low, difference.high) == pytest.approx((-1.0, -1.0, -1.0))
    assert macro_mean({"a": list(scores["a"].values())}).high > 24.0


def test_only_examples_that_both_have_are_compared():
    difference = paired_difference({"a": {"1": 10.0, "2": 90.0}}, {"a": {"1": 20.0}, "b": {"9": 0.0}})
    assert difference.mean == -10.0
    assert difference.n == 1


@pytest.mark.parametrize("groups", [{}, {"a": []}])
def test_nothing_to_average_is_an_error(groups):
    with pytest.raises(ValueError, match="at least one"):
        macro_mean(groups)
