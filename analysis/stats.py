"""Paired differences of scores with 95 % intervals, and tests of them.

Scores are by data set and example; means, ratios and their intervals are those of :mod:`.intervals`. Nothing depends on
the order of the values, and nothing on drawn numbers but the signs of one test, which are always the same.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from .intervals import LEVEL, PERCENT_BOUNDS, Bounds, Estimate, macro_mean, ratio

__all__ = [
    "LEVEL",
    "PERCENT_BOUNDS",
    "Bounds",
    "Comparison",
    "Estimate",
    "Groups",
    "K",
    "compare",
    "example_differences",
    "holm",
    "macro_mean",
    "non_inferior",
    "not_worse_than_best",
    "paired_difference",
    "ratio",
    "sign_flip_p",
]

FLIPS = 19_999
"""Random sign flips of a test, beside the observed signs."""
EXACT_FLIPS_LIMIT = 14
"""Largest number of differing examples for which all patterns of signs are enumerated."""

Groups = Mapping[str, Mapping[str, float]]
"""Scores by data set and example: ``{data set: {example id: score}}``."""
K = TypeVar("K", bound=Hashable)


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


# differences ----------------------------------------------------------------------------------------------------------


def paired_difference(scores: Groups, baseline: Groups, bounds: Bounds | None = PERCENT_BOUNDS) -> Estimate:
    """Macro mean of ``scores - baseline`` over the examples that both have.

    Args:
        scores, baseline: Scores by data set and example.
        bounds: Bounds of a score, not of a difference; None where there are none.

    Raises:
        ValueError: There is no example in common.
    """
    widest = None if bounds is None else bounds[1] - bounds[0]
    values = {name: list(rows.values()) for name, rows in example_differences(scores, baseline).items()}
    return macro_mean(values, None if widest is None else (-widest, widest))


def example_differences(scores: Groups, baseline: Groups) -> dict[str, dict[str, float]]:
    """``scores - baseline`` of each example that both have, by data set; data sets without one are left out."""
    both = {
        name: {key: score - baseline[name][key] for key, score in rows.items() if key in baseline[name]}
        for name, rows in scores.items()
        if name in baseline
    }
    return {name: rows for name, rows in both.items() if rows}


# tests ----------------------------------------------------------------------------------------------------------------


def compare(scores: Groups, baseline: Groups, bounds: Bounds | None = PERCENT_BOUNDS) -> Comparison:
    """Paired difference, p-value, and numbers of examples won, tied and lost.

    Raises:
        ValueError: There is no example in common.
    """
    rows = [value for by_id in example_differences(scores, baseline).values() for value in by_id.values()]
    won, lost = sum(value > 0 for value in rows), sum(value < 0 for value in rows)
    difference = paired_difference(scores, baseline, bounds)
    return Comparison(difference, sign_flip_p(scores, baseline), won, len(rows) - won - lost, lost)


def sign_flip_p(scores: Groups, baseline: Groups) -> float:
    """Two-sided p-value of the paired macro mean, by flipping the signs of the differences.

    All patterns of signs are enumerated where few examples differ; otherwise :data:`FLIPS` are drawn, always the same.
    1.0 where no example differs.
    """
    by_set = example_differences(scores, baseline)
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
    """Return the method with the best mean, and all not significantly different from it (sign flips, Holm's rule).

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
