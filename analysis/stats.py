"""Means, paired differences and ratios with 95 % intervals, and tests of them.

A run's average is the macro average: the mean over data sets of the mean over examples. An interval says how far the
number would move with other examples of the same data sets; it says nothing of other seeds or other models. Every
function depends on the values alone and not on their order, so an interval is computed again from ``samples.jsonl`` to
the last bit. No interval is drawn by resampling: docs/explanation/statistics.md has the coverage of each construction.

Three constructions (``Estimate.method``):

* ``t``: Welch-Satterthwaite t interval of the stratified mean. Each end moves outwards by the first Edgeworth term of
  the skewness (N. J. Johnson 1978, P. Hall 1992), because most scores of a small model are zero. A data set of one
  example, or of equal scores, has the mean variance of the others, divided by its number of examples.
* ``midp``: mid-P binomial interval, for scores that are all 0 or 100. Several data sets count as one of their effective
  number of examples (E. L. Korn and B. I. Graubard 1998).
* ``bounds``: for equal scores in every data set, the interval over all distributions within the bounds whose other
  values would be missing from the sample with a probability of 5 % or more.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from scipy.optimize import brentq
from scipy.special import betainc, stdtrit

LEVEL = 0.95
TAIL = (1 - LEVEL) / 2
PERCENT_BOUNDS = (0.0, 100.0)
FLIPS = 19_999
"""Random sign flips of a test, beside the observed signs."""
EXACT_FLIPS_LIMIT = 14
"""Largest number of differing examples for which all patterns of signs are enumerated."""
RATE_PRIOR = 2.0
"""Examples with the overall rate that are added to each data set when the spread between data sets is estimated."""

Bounds = tuple[float, float]
Groups = Mapping[str, Mapping[str, float]]
"""Scores by data set and example: ``{data set: {example id: score}}``."""
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval.

    Attributes:
        mean: In the unit of the values.
        low, high: Ends of the interval; None where ``reason`` says why there is none.
        n: Number of examples.
        method: Construction of the interval; empty where there is none.
        reason: Why there is no interval; empty where there is one.
    """

    mean: float
    low: float | None
    high: float | None
    n: int
    method: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Comparison:
    """One method compared with another on the same examples.

    Attributes:
        difference: Paired difference of the scores.
        p: Two-sided p-value of :func:`sign_flip_p`.
        won, tied, lost: Numbers of examples with a larger, an equal and a smaller score.
    """

    difference: Estimate
    p: float
    won: int
    tied: int
    lost: int


# means ----------------------------------------------------------------------------------------------------------------


def macro_mean(groups: Mapping[str, Sequence[float]], bounds: Bounds | None = PERCENT_BOUNDS) -> Estimate:
    """Mean over the groups of the mean inside each group.

    Args:
        groups: Values by data set; every group has at least one.
        bounds: Least and greatest value that a score can have; None where there are none (nats).

    Raises:
        ValueError: There is no group, or one is empty.
    """
    if not groups or any(len(values) == 0 for values in groups.values()):
        raise ValueError("macro_mean needs at least one value in every group")
    strata = [_Stratum.of(groups[name]) for name in sorted(groups)]
    mean = math.fsum(s.mean for s in strata) / len(strata)
    n = sum(s.n for s in strata)
    if bounds is not None and all(value in bounds for values in groups.values() for value in values):
        return _rate_interval(strata, mean, n, bounds)
    if len(strata) > 1 and all(s.n == 1 for s in strata):
        # Collapsed strata: the spread between data sets is in the variance too, so the interval is conservative.
        strata = [_Stratum.of([s.mean for s in strata])]
    if all(s.variance == 0 for s in strata):
        return _equal_scores(strata, mean, n, bounds)
    low, high = _t_interval(strata, mean)
    if bounds is not None:
        low, high = max(low, bounds[0]), min(high, bounds[1])
    return Estimate(mean, low, high, n, "t")


def paired_difference(scores: Groups, baseline: Groups, bounds: Bounds | None = PERCENT_BOUNDS) -> Estimate:
    """Macro mean of ``scores - baseline`` over the examples that both have.

    Args:
        scores, baseline: Scores by data set and example.
        bounds: Bounds of a score, not of a difference; None where there are none.

    Raises:
        ValueError: There is no example in common.
    """
    widest = None if bounds is None else bounds[1] - bounds[0]
    values = {name: list(rows.values()) for name, rows in _differences(scores, baseline).items()}
    return macro_mean(values, None if widest is None else (-widest, widest))


def _differences(scores: Groups, baseline: Groups) -> dict[str, dict[str, float]]:
    both = {
        name: {key: score - baseline[name][key] for key, score in rows.items() if key in baseline[name]}
        for name, rows in scores.items()
        if name in baseline
    }
    return {name: rows for name, rows in both.items() if rows}


@dataclass(frozen=True)
class _Stratum:
    """Moments of one data set: size, mean, unbiased variance and third central moment."""

    n: int
    mean: float
    variance: float
    third: float

    @classmethod
    def of(cls, values: Sequence[float]) -> _Stratum:
        # math.fsum rounds once, so the result does not depend on the order of the values.
        n = len(values)
        if min(values) == max(values):
            return cls(n, float(values[0]), 0.0, 0.0)
        mean = math.fsum(values) / n
        centred = [value - mean for value in values]
        variance = math.fsum(d * d for d in centred) / (n - 1)
        third = math.fsum(d**3 for d in centred) * n / ((n - 1) * (n - 2)) if n > 2 else 0.0
        return cls(n, mean, variance, third)


def _t_interval(strata: Sequence[_Stratum], mean: float) -> tuple[float, float]:
    varied = [s for s in strata if s.variance > 0]
    own = [s.variance / s.n for s in varied]
    degrees = math.fsum(own) ** 2 / math.fsum(v * v / (s.n - 1) for v, s in zip(own, varied, strict=True))
    # A set without spread borrows variance; the degrees of freedom stay those of the sets that have their own.
    pooled = math.fsum(s.variance for s in varied) / len(varied)
    total = math.fsum(own) + math.fsum(pooled / s.n**2 for s in strata if s.variance == 0)
    q = float(stdtrit(degrees, 1 - TAIL))
    skewness = math.fsum(s.third / s.n**2 for s in strata) / total**1.5
    shift = skewness * (2 * q * q + 1) / 6
    error = math.sqrt(total) / len(strata)
    return mean - error * (q + max(-shift, 0.0)), mean + error * (q + max(shift, 0.0))


def _rate_interval(strata: Sequence[_Stratum], mean: float, n: int, bounds: Bounds) -> Estimate:
    least, greatest = bounds
    width = greatest - least
    rate = (mean - least) / width
    size = _effective_size(strata)
    if 0 < rate < 1 and len(strata) > 1:
        variance = 0.0
        for s in strata:
            smoothed = ((s.mean - least) / width * s.n + RATE_PRIOR * rate) / (s.n + RATE_PRIOR)
            # The last factor removes the bias: smoothed * (1 - smoothed) is too small by the variance of smoothed.
            unbiased = smoothed * (1 - smoothed) / (1 - s.n / (s.n + RATE_PRIOR) ** 2)
            variance += unbiased / s.n / len(strata) ** 2
        size = max(size, rate * (1 - rate) / variance)
    low, high = _mid_p(rate, size)
    return Estimate(mean, least + width * low, least + width * high, n, "midp")


def _effective_size(strata: Sequence[_Stratum]) -> float:
    """Number of examples of one data set whose mean has the variance of the macro mean at one common rate."""
    return len(strata) ** 2 / math.fsum(1 / s.n for s in strata)


def _mid_p(rate: float, size: float) -> tuple[float, float]:
    """Mid-P interval of a binomial rate; ``size`` and the count may be fractions."""
    count = rate * size

    def below(p: float) -> float:  # P(X < count) + P(X = count) / 2
        upto = 1.0 if count >= size else 1.0 - float(betainc(count + 1, size - count, p))
        before = 0.0 if count <= 0 else 1.0 - float(betainc(count, size - count + 1, p))
        return (upto + before) / 2

    low = 0.0 if rate <= 0 else float(brentq(lambda p: below(p) - (1 - TAIL), 0.0, 1.0))
    high = 1.0 if rate >= 1 else float(brentq(lambda p: below(p) - TAIL, 0.0, 1.0))
    return low, high


def _equal_scores(strata: Sequence[_Stratum], mean: float, n: int, bounds: Bounds | None) -> Estimate:
    if n == 1 or bounds is None:
        return Estimate(mean, None, None, n, reason="one example" if n == 1 else "no two examples differ")
    unseen = 1 - (2 * TAIL) ** (1 / _effective_size(strata))
    low, high = mean - unseen * (mean - bounds[0]), mean + unseen * (bounds[1] - mean)
    return Estimate(mean, low, high, n, "bounds")


# tests ----------------------------------------------------------------------------------------------------------------


def compare(scores: Groups, baseline: Groups, bounds: Bounds | None = PERCENT_BOUNDS) -> Comparison:
    """Paired difference, p-value, and numbers of examples won, tied and lost.

    Raises:
        ValueError: There is no example in common.
    """
    rows = [value for by_id in _differences(scores, baseline).values() for value in by_id.values()]
    won, lost = sum(value > 0 for value in rows), sum(value < 0 for value in rows)
    difference = paired_difference(scores, baseline, bounds)
    return Comparison(difference, sign_flip_p(scores, baseline), won, len(rows) - won - lost, lost)


def sign_flip_p(scores: Groups, baseline: Groups) -> float:
    """Two-sided p-value of the paired macro mean, by flipping the signs of the differences.

    All patterns of signs are enumerated where few examples differ; otherwise :data:`FLIPS` are drawn, always the same.
    1.0 where no example differs.
    """
    by_set = _differences(scores, baseline)
    # Sorted, so that the drawn signs meet the same values whatever the order of the rows.
    weighted = sorted(value / len(rows) for rows in by_set.values() for value in rows.values() if value != 0)
    values = np.array(weighted)
    if len(values) == 0:
        return 1.0
    observed = abs(math.fsum(weighted)) * (1 - 1e-12)  # a sum in another order is a tie
    if len(values) <= EXACT_FLIPS_LIMIT:
        patterns = np.arange(2 ** len(values))[:, None] >> np.arange(len(values)) & 1
        return float(np.mean(np.abs((2 * patterns - 1) @ values) >= observed))
    rng = np.random.default_rng(0)
    extreme, left = 0, FLIPS
    while left:
        rows = min(left, max(1, 2_000_000 // len(values)))
        signs = 2.0 * rng.integers(0, 2, (rows, len(values)), dtype=np.int8) - 1.0
        extreme += int(np.sum(np.abs(signs @ values) >= observed))
        left -= rows
    return (extreme + 1) / (FLIPS + 1)


def holm(p_values: Mapping[K, float]) -> dict[K, float]:
    """P-values adjusted for their number by Holm's step-down rule: below ``1 - LEVEL`` they are significant."""
    adjusted: dict[K, float] = {}
    largest = 0.0
    for place, key in enumerate(sorted(p_values, key=lambda key: p_values[key])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[key]))
        adjusted[key] = largest
    return {key: adjusted[key] for key in p_values}


def non_inferior(difference: Estimate, margin: float, fewer_is_better: bool = False) -> bool | None:
    """Whether a method is less than ``margin`` worse than the one it is compared with.

    Returns:
        True or False where the whole interval is on one side of the margin, None where it is on both.
    """
    if difference.low is None or difference.high is None:
        return None
    worst, best = (-difference.high, -difference.low) if fewer_is_better else (difference.low, difference.high)
    return True if worst > -margin else False if best < -margin else None


def not_worse_than_best(methods: Mapping[K, Groups], fewer_is_better: bool = False) -> set[K]:
    """The method with the best mean, and all that cannot be told from it by sign flips after Holm's rule.

    Args:
        methods: Scores of each method on the same examples.
        fewer_is_better: Whether scores are losses.
    """
    if not methods:
        return set()
    means = {
        key: macro_mean({name: list(rows.values()) for name, rows in groups.items()}, None).mean
        for key, groups in methods.items()
    }
    best = (min if fewer_is_better else max)(means, key=lambda key: means[key])
    others = {key: sign_flip_p(groups, methods[best]) for key, groups in methods.items() if key != best}
    return {best, *(key for key, p in holm(others).items() if p >= 1 - LEVEL)}


# ratios ---------------------------------------------------------------------------------------------------------------


def ratio(baseline: Sequence[float], other: Sequence[float], paired: bool) -> Estimate:
    """Geometric mean of ``baseline / other`` over repetitions: a speed-up, from times.

    Args:
        baseline, other: Positive measurements of each repetition.
        paired: Whether repetition i of both was measured in turn. Otherwise the interval is Welch's, and does not hold
            what changed on the machine between the two series.

    Raises:
        ValueError: Paired series of different lengths.
    """
    logs, others = [math.log(x) for x in baseline], [math.log(x) for x in other]
    n = min(len(logs), len(others))
    if paired:
        series = [_Stratum.of([a - b for a, b in zip(logs, others, strict=True)])]
        center = series[0].mean
    else:
        series = [_Stratum.of(logs), _Stratum.of(others)]
        center = series[0].mean - series[1].mean
    if n < 2:
        return Estimate(math.exp(center), None, None, n, reason="one repetition")
    total = math.fsum(s.variance / s.n for s in series)
    if total == 0:
        return Estimate(math.exp(center), None, None, n, reason="no two repetitions differ")
    degrees = total**2 / math.fsum((s.variance / s.n) ** 2 / (s.n - 1) for s in series)
    half = float(stdtrit(degrees, 1 - TAIL)) * math.sqrt(total)
    return Estimate(math.exp(center), math.exp(center - half), math.exp(center + half), n, "t of logarithms")
