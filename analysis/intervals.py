"""Means and ratios with 95 % intervals.

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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from scipy.special import betainc, stdtrit

LEVEL = 0.95
TAIL = (1 - LEVEL) / 2
PERCENT_BOUNDS = (0.0, 100.0)
RATE_PRIOR = 2.0
"""Examples with the overall rate that are added to each data set when the spread between data sets is estimated."""

Bounds = tuple[float, float]


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

    low = 0.0 if rate <= 0 else _falling_root(lambda p: below(p) - (1 - TAIL))
    high = 1.0 if rate >= 1 else _falling_root(lambda p: below(p) - TAIL)
    return low, high


def _falling_root(function: Callable[[float], float]) -> float:
    """Where a falling function of [0, 1] is zero, to the last bit; importing scipy.optimize would take longer."""
    low, high = 0.0, 1.0
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if function(middle) > 0 else (low, middle)
    return middle


def _equal_scores(strata: Sequence[_Stratum], mean: float, n: int, bounds: Bounds | None) -> Estimate:
    if n == 1 or bounds is None:
        return Estimate(mean, None, None, n, reason="one example" if n == 1 else "no two examples differ")
    unseen = 1 - (2 * TAIL) ** (1 / _effective_size(strata))
    low, high = mean - unseen * (mean - bounds[0]), mean + unseen * (bounds[1] - mean)
    return Estimate(mean, low, high, n, "bounds")


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
