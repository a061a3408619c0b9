"""Means, intervals and tests against closed forms, scipy and what must be true of any of them."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from scipy import stats as scipy_stats

from kvbench.analysis import stats
from kvbench.analysis.older_intervals import percentile_bootstrap
from kvbench.analysis.stats import Estimate, compare, holm, macro_mean, paired_difference, ratio, sign_flip_p
from kvbench.analysis.summaries import compare_all


def rows(*groups: list[float]) -> dict[str, dict[str, float]]:
    return {f"set{i}": {str(k): value for k, value in enumerate(values)} for i, values in enumerate(groups)}


# means ----------------------------------------------------------------------------------------------------------------


def test_the_mean_is_over_data_sets_not_over_examples():
    estimate = macro_mean({"a": [0.0] * 99 + [100.0], "b": [50.0, 50.0]})
    assert estimate.mean == pytest.approx((1.0 + 50.0) / 2)
    assert estimate.n == 102


def test_one_data_set_without_skewness_has_the_t_interval():
    values = [20.0, 30.0, 40.0, 50.0, 60.0]
    expected = scipy_stats.ttest_1samp(values, 0).confidence_interval(0.95)
    estimate = macro_mean({"a": values})
    assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high))
    assert estimate.method == "t"


def test_two_data_sets_have_the_degrees_of_freedom_of_welch():
    """The mean of two sets is half the difference of one and the other one's negative."""
    a, b = [10.0, 20.0, 30.0], [55.0, 60.0, 65.0, 70.0, 75.0]
    expected = scipy_stats.ttest_ind(a, [-x for x in b], equal_var=False).confidence_interval(0.95)
    estimate = macro_mean({"a": a, "b": b})
    assert (estimate.low, estimate.high) == pytest.approx((expected.low / 2, expected.high / 2))


def test_the_interval_is_the_normal_one_for_many_examples():
    values = np.random.default_rng(0).normal(30.0, 8.0, 400)
    estimate = macro_mean({"a": values.tolist()})
    half = 1.966 * values.std(ddof=1) / 20
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.02)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.02)


def test_skewness_moves_one_end_outwards():
    values = [0.0] * 9 + [40.0, 60.0, 90.0]
    plain = scipy_stats.ttest_1samp(values, 0).confidence_interval(0.95)
    estimate = macro_mean({"a": values}, None)
    assert estimate.low == pytest.approx(plain.low)
    n, q = len(values), scipy_stats.t.ppf(0.975, len(values) - 1)
    error = np.std(values, ddof=1) / math.sqrt(n)
    skewness = scipy_stats.skew(values, bias=True) * n / (n - 1) / (n - 2) * n / math.sqrt(n)
    skewness *= (math.sqrt(n - 1) / math.sqrt(n)) ** 3  # by the unbiased variance
    assert estimate.high == pytest.approx(plain.high + error * skewness * (2 * q * q + 1) / 6)
    mirrored = macro_mean({"a": [-x for x in values]}, None)
    assert (mirrored.low, mirrored.high) == pytest.approx((-estimate.high, -estimate.low))


@pytest.mark.parametrize("bounds", [stats.PERCENT_BOUNDS, None])
def test_the_order_of_rows_and_of_data_sets_changes_no_bit(bounds):
    rng = random.Random(0)
    groups = {name: [100 * rng.random() ** 3 for _ in range(n)] for name, n in (("a", 7), ("b", 10), ("c", 1))}
    other = {name: rng.sample(groups[name], len(groups[name])) for name in ("c", "b", "a")}
    assert macro_mean(groups, bounds) == macro_mean(other, bounds)
    by_id = {name: {str(i): v for i, v in enumerate(values)} for name, values in groups.items()}
    full = {name: {i: rng.random() for i in found} for name, found in by_id.items()}
    turned = {name: dict(reversed(found.items())) for name, found in reversed(by_id.items())}
    assert compare(turned, full, bounds) == compare(by_id, full, bounds)


def test_ends_stay_within_the_bounds():
    estimate = macro_mean({"a": [0.0, 0.0, 100.0, 90.0], "b": [1.0, 0.0]})
    assert 0.0 <= estimate.low < estimate.mean < estimate.high <= 100.0


# data sets of one row, of equal rows ----------------------------------------------------------------------------------


def test_a_data_set_of_one_row_has_the_variance_of_the_others():
    pair, single = [20.0, 30.0], 60.0
    estimate = macro_mean({"a": pair, "b": [single]}, None)
    variance = 50.0  # of the pair, and so of the single row
    assert estimate.mean == 42.5
    half = scipy_stats.t.ppf(0.975, 1) * math.sqrt(variance / 2 + variance / 1) / 2
    assert (estimate.low, estimate.high) == pytest.approx((42.5 - half, 42.5 + half))


def test_a_data_set_of_equal_rows_widens_the_interval():
    varied = {"a": [10.0, 20.0, 30.0, 40.0], "b": [15.0, 25.0, 35.0, 55.0]}
    with_constant = macro_mean({**varied, "c": [0.0] * 4})
    alone = macro_mean(varied)
    assert (with_constant.high - with_constant.low) * 3 > (alone.high - alone.low) * 2


def test_single_rows_of_several_sets_are_one_sample():
    estimate = macro_mean({"a": [10.0], "b": [20.0], "c": [60.0]}, None)
    same = macro_mean({"all": [10.0, 20.0, 60.0]}, None)
    assert (estimate.mean, estimate.low, estimate.high) == (same.mean, same.low, same.high)


def test_one_example_has_no_interval_unless_it_is_a_rate():
    assert macro_mean({"a": [40.0]}) == Estimate(40.0, None, None, 1, reason="one example")
    rate = macro_mean({"a": [0.0]})
    assert rate.low == 0.0 and rate.high == pytest.approx(95.0)


def test_equal_losses_have_no_interval_and_a_reason():
    assert macro_mean({"a": [2.0, 2.0]}, None).reason == "no two examples differ"


def test_no_interval_has_no_width():
    """Equal differences, such as those of a method that changes no reply, leave room for the examples not seen."""
    same = rows([33.3] * 8, [50.0] * 8, [0.0] * 8)
    estimate = paired_difference(same, same)
    unseen = 100 * (1 - 0.05 ** (1 / 24))
    assert (estimate.low, estimate.high) == pytest.approx((-unseen, unseen))
    assert estimate.method == "bounds"
    constant = macro_mean({"a": [50.0] * 24})
    assert (constant.low, constant.high) == pytest.approx((50 - unseen / 2, 50 + unseen / 2))


# rates ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "right"), [(24, 24), (24, 0), (24, 7), (5, 4), (503, 160)])
def test_a_rate_has_the_mid_p_interval(n: int, right: int) -> None:
    estimate = macro_mean({"a": [100.0] * right + [0.0] * (n - right)})
    binomial = scipy_stats.binom
    if right:  # half of the probability of the count itself, and of all above
        tail = binomial.sf(right, n, estimate.low / 100) + binomial.pmf(right, n, estimate.low / 100) / 2
        assert tail == pytest.approx(0.025)
    if right < n:
        tail = binomial.cdf(right, n, estimate.high / 100) - binomial.pmf(right, n, estimate.high / 100) / 2
        assert tail == pytest.approx(0.025)
    assert (estimate.low == 0.0) == (right == 0)
    assert (estimate.high == 100.0) == (right == n)
    exact = scipy_stats.binomtest(right, n).proportion_ci(0.95, method="exact")
    assert exact.low * 100 <= estimate.low and estimate.high <= exact.high * 100


def test_needles_that_are_all_found_have_the_interval_of_24_examples():
    three_sets = macro_mean({name: [100.0] * 8 for name in "abc"})
    one_set = macro_mean({"a": [100.0] * 24})
    assert (three_sets.low, three_sets.high) == pytest.approx((one_set.low, one_set.high))
    assert three_sets.low == pytest.approx(100 * 0.05 ** (1 / 24))


def test_data_sets_of_unequal_rates_have_a_narrower_interval():
    apart = macro_mean({"a": [100.0] * 8, "b": [0.0, 100.0] * 4, "c": [0.0] * 8})
    alike = macro_mean({name: [0.0, 100.0] * 4 for name in "abc"})
    assert apart.mean == alike.mean == 50.0
    assert apart.high - apart.low < 0.85 * (alike.high - alike.low)


# pairs ----------------------------------------------------------------------------------------------------------------


def test_pairing_takes_the_noise_of_the_examples_out():
    """A method that loses about 1 point on every example, on examples that differ by 50."""
    baseline = rows([50.0 * (i % 2) + 1.5 for i in range(40)])
    scores = {"set0": {key: value - 1.0 - 0.1 * (int(key) % 3) for key, value in baseline["set0"].items()}}
    difference = paired_difference(scores, baseline)
    assert -1.2 < difference.low < difference.mean < difference.high < -1.0
    assert macro_mean({"a": list(scores["set0"].values())}).high > 24.0


def test_only_examples_that_both_have_are_compared():
    difference = paired_difference({"a": {"1": 10.0, "2": 90.0}}, {"a": {"1": 20.0}, "b": {"9": 0.0}})
    assert difference.mean == -10.0
    assert difference.n == 1
    with pytest.raises(ValueError, match="at least one"):
        compare({"a": {"1": 1.0}}, {"a": {"2": 1.0}})


def test_wins_ties_and_losses_are_counted_by_example():
    found = compare(rows([1.0, 2.0, 3.0], [5.0]), rows([0.0, 2.0, 9.0], [4.0]))
    assert (found.won, found.tied, found.lost) == (2, 1, 1)


@pytest.mark.parametrize("sizes", [(8,), (3, 5, 10), (1, 4)])
def test_the_older_interval_is_scipys_stratified_percentile_bootstrap(sizes):
    rng = np.random.default_rng(7)
    groups = {f"set{i}": rng.random(n).tolist() for i, n in enumerate(sizes)}
    varied = [values for values in groups.values() if len(values) > 1]
    fixed = sum(values[0] for values in groups.values() if len(values) == 1)

    def statistic(*samples, axis=-1):
        return (sum(s.mean(axis=axis) for s in samples) + fixed) / len(groups)

    options = {"n_resamples": 2000, "confidence_level": 0.95, "method": "percentile"}
    expected = scipy_stats.bootstrap(varied, statistic, **options, rng=np.random.default_rng(0)).confidence_interval
    found = percentile_bootstrap(groups)
    assert (found["low"], found["high"]) == pytest.approx(tuple(expected), rel=1e-12)
    assert found["n"] == sum(sizes)


@pytest.mark.parametrize("groups", [{}, {"a": []}])
def test_nothing_to_average_is_an_error(groups):
    with pytest.raises(ValueError, match="at least one"):
        macro_mean(groups)


# tests ----------------------------------------------------------------------------------------------------------------


def enumerated_p(differences: list[list[float]]) -> float:
    """Every pattern of signs, in plain loops."""
    flat = [d / len(group) for group in differences for d in group]
    observed = abs(sum(flat))
    patterns = list(itertools.product((-1, 1), repeat=len(flat)))
    return sum(
        abs(sum(s * d for s, d in zip(signs, flat, strict=True))) >= observed - 1e-12 for signs in patterns
    ) / len(patterns)


@pytest.mark.parametrize("seed", range(4))
def test_few_differences_are_tested_by_enumeration(seed: int) -> None:
    rng = random.Random(seed)
    differences = [[rng.choice([0.0, rng.gauss(1.0, 2.0)]) for _ in range(n)] for n in (3, 5, 4)]
    zero = [[0.0] * len(group) for group in differences]
    assert sign_flip_p(rows(*differences), rows(*zero)) == pytest.approx(enumerated_p(differences))


def test_enumeration_of_one_set_is_the_permutation_test_of_scipy() -> None:
    values = [1.0, -0.5, 2.0, 3.0, 0.25, -1.0, 4.0, 2.5]
    expected = scipy_stats.permutation_test((values,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert sign_flip_p(rows(values), rows([0.0] * 8)) == pytest.approx(expected.pvalue)


def test_many_differences_are_tested_by_drawn_signs_that_are_always_the_same() -> None:
    values = np.random.default_rng(3).normal(0.4, 1.5, 60).tolist()
    zero = rows([0.0] * 60)
    p = sign_flip_p(rows(values), zero)
    assert p == sign_flip_p(rows(values[::-1]), zero)
    assert p == pytest.approx(scipy_stats.ttest_1samp(values, 0).pvalue, abs=0.01)
    assert sign_flip_p(rows([5.0 + v for v in values]), zero) == 1 / (stats.FLIPS + 1)


def test_a_method_that_changes_nothing_has_p_one() -> None:
    same = rows([1.0, 2.0])
    assert sign_flip_p(same, same) == 1.0


def test_the_p_value_is_uniform_without_a_difference() -> None:
    rng = np.random.default_rng(5)
    ps = [
        sign_flip_p(rows(*rng.normal(0, [[1], [4]], (2, 6)).tolist()), rows([0.0] * 6, [0.0] * 6)) for _ in range(400)
    ]
    assert 0.02 < np.mean(np.array(ps) <= 0.05) < 0.08


def test_holm_multiplies_step_by_step_and_never_decreases() -> None:
    p = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}
    assert holm(p) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert list(holm(p)) == list(p)
    assert holm({"a": 0.7, "b": 0.9}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


@pytest.mark.parametrize(
    ("ends", "fewer", "verdict"),
    [((-0.5, 2.0), False, True), ((-3.0, 0.2), False, None), ((-9.0, -1.5), False, False), ((-2.0, 0.5), True, True)],
)
def test_non_inferiority_needs_the_whole_interval(ends, fewer, verdict) -> None:
    assert stats.non_inferior(Estimate(0.0, *ends, 10), 1.0, fewer) is verdict
    assert stats.non_inferior(Estimate(0.0, None, None, 1), 1.0, fewer) is None


def test_the_best_and_what_cannot_be_told_from_it() -> None:
    rng = np.random.default_rng(0)
    base = rng.uniform(0, 80, (2, 30))
    methods = {
        "best": rows(*(base + 10).tolist()),
        "near": rows(*(base + 9.5 + rng.normal(0, 4, base.shape)).tolist()),
        "far": rows(*(base + rng.normal(0, 4, base.shape)).tolist()),
    }
    assert stats.not_worse_than_best(methods) == {"best", "near"}
    assert stats.not_worse_than_best(methods, fewer_is_better=True) == {"far"}
    assert stats.not_worse_than_best({}) == set()


# ratios ---------------------------------------------------------------------------------------------------------------


def test_a_ratio_of_times_measured_in_turn_loses_what_they_share() -> None:
    """A machine that slows down from repetition to repetition, and a method that is always about 1.3 times as fast."""
    full = [10.0, 12.0, 15.0, 20.0, 30.0]
    method = [t / (1.3 + 0.01 * (i % 2)) for i, t in enumerate(full)]
    paired, apart = ratio(full, method, paired=True), ratio(full, method, paired=False)
    assert 1.29 < paired.low < paired.mean < paired.high < 1.32
    assert paired.mean == pytest.approx(apart.mean)
    assert apart.low < 1.0 < apart.high


def test_an_unpaired_ratio_is_welch_on_logarithms() -> None:
    full, method = [76.7, 70.1, 80.2], [43.6, 41.0, 47.7, 44.1]
    logs = scipy_stats.ttest_ind(np.log(full), np.log(method), equal_var=False).confidence_interval(0.95)
    estimate = ratio(full, method, paired=False)
    assert (estimate.low, estimate.high) == pytest.approx((math.exp(logs.low), math.exp(logs.high)))


def test_one_repetition_has_no_interval() -> None:
    assert ratio([2.0], [1.0], paired=True) == Estimate(pytest.approx(2.0), None, None, 1, reason="one repetition")


def test_a_method_that_shares_no_example_with_the_full_cache_is_not_compared_with_it() -> None:
    full = {"qasper": {"0": 10.0, "1": 30.0}}
    methods = {"same": {"qasper": {"0": 10.0, "1": 20.0}}, "rows": {"qasper": {"7": 5.0}}, "set": {"trec": {"0": 5.0}}}
    assert set(compare_all({key: (groups, full) for key, groups in methods.items()}, stats.PERCENT_BOUNDS)) == {"same"}
