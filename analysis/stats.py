"""Means with 95 % bootstrap intervals, for scores and for paired differences.

A run's average is the macro average (mean over data sets of the mean over examples), so resampling happens inside each
data set. An interval says how far the number would move with other examples of the same kind; it says nothing of other
seeds or other models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap

RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval.

    Attributes:
        mean: in the unit of the values.
        low, high: ends of the interval; None where no data set has two examples.
        n: examples behind it.
    """

    mean: float
    low: float | None
    high: float | None
    n: int


def macro_mean(groups: Mapping[str, Sequence[float]], seed: int = 0) -> Estimate:
    """Mean over groups of the mean inside each group, with a percentile bootstrap stratified by group.

    Args:
        groups: values by data set; every group has at least one.
        seed: of the resampling; the same seed gives the same interval.

    Raises:
        ValueError: no group, or an empty one.
    """
    if not groups or any(len(values) == 0 for values in groups.values()):
        raise ValueError("macro_mean needs at least one value in every group")
    arrays = [np.asarray(groups[name], dtype=float) for name in sorted(groups)]
    mean = float(np.mean([a.mean() for a in arrays]))
    count = sum(len(a) for a in arrays)
    # A group of one has nothing to resample: it shifts the mean and adds no spread.
    varied = [a for a in arrays if len(a) > 1]
    if not varied:
        return Estimate(mean, None, None, count)
    fixed = sum(float(a[0]) for a in arrays if len(a) == 1)

    def statistic(*samples: np.ndarray, axis: int = -1) -> np.ndarray:
        total = sum(s.mean(axis=axis) for s in samples)
        return (total + fixed) / len(arrays)

    if all(a.min() == a.max() for a in varied):
        return Estimate(mean, mean, mean, count)
    result = bootstrap(
        varied,
        statistic,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(seed),
    )
    interval = result.confidence_interval
    return Estimate(mean, float(interval.low), float(interval.high), count)


def paired_difference(
    scores: Mapping[str, Mapping[str, float]], baseline: Mapping[str, Mapping[str, float]], seed: int = 0
) -> Estimate:
    """Macro mean of ``scores - baseline`` over the examples both have: ``{dataset: {example id: score}}``.

    Raises:
        ValueError: no example in common.
    """
    differences = {
        name: [score - baseline[name][key] for key, score in rows.items() if key in baseline[name]]
        for name, rows in scores.items()
        if name in baseline
    }
    return macro_mean({name: values for name, values in differences.items() if values}, seed)
