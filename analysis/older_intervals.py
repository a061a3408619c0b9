"""Intervals of records that name no construction, computed by the rule under which they were written.

Until 27 November 2026 the interval of a macro mean was a percentile bootstrap, stratified by data set. Tables replace
it by the constructions of :mod:`.intervals`; ``kvbench verify`` compares it. The drawn places are always the same, so
the ends depend on the order of the examples: that of the data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .stats import LEVEL, Groups, example_differences

RESAMPLES = 2000
METHOD = "percentile bootstrap"


def percentile_bootstrap(groups: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Mean over the groups of the mean inside each group, as an older record has it.

    Args:
        groups: Values by data set, in the order of the data; every group has at least one.

    Returns:
        ``mean``, ``low``, ``high`` and ``n``; the ends are None where no group has two values.
    """
    arrays = [np.asarray(groups[name], dtype=float) for name in sorted(groups)]
    varied = [values for values in arrays if len(values) > 1]  # a group of one adds no spread
    mean = float(np.mean([values.mean() for values in arrays]))
    n = sum(map(len, arrays))
    if not varied:
        return {"mean": mean, "low": None, "high": None, "n": n}
    if all(values.min() == values.max() for values in varied):
        return {"mean": mean, "low": mean, "high": mean, "n": n}
    rng = np.random.default_rng(0)
    total = np.full(RESAMPLES, float(sum(values[0] for values in arrays if len(values) == 1)))
    for values in varied:
        total += values[rng.integers(0, len(values), (RESAMPLES, len(values)))].mean(axis=1)
    low, high = np.quantile(total / len(arrays), ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return {"mean": mean, "low": float(low), "high": float(high), "n": n}


def with_older_intervals(
    record: Mapping[str, Any], current: Mapping[str, Any], scores: Groups, baseline: Groups | None
) -> dict[str, Any]:
    """``scores``, ``average`` and ``paired`` of ``current``, by the older rule where the record names no construction.

    Args:
        record: The record as it was written.
        current: Its statistics by today's rules.
        scores, baseline: Scores of the run and of the one that it is paired with, in the order of the data.
    """
    values = {name: list(rows.values()) for name, rows in scores.items()}
    out = {
        "scores": {
            name: _by_its_rule(record["scores"][name], estimate, {name: values[name]})
            for name, estimate in current["scores"].items()
        },
        "average": _by_its_rule(record["average"], current["average"], values),
    }
    if baseline is not None:
        differences = {name: list(rows.values()) for name, rows in example_differences(scores, baseline).items()}
        recorded, estimate = record["paired"]["difference"], current["paired"]["difference"]
        out["paired"] = {"difference": _by_its_rule(recorded, estimate, differences)}
    return out


def _by_its_rule(recorded: Any, current: Mapping[str, Any], groups: Mapping[str, Sequence[float]]) -> Mapping[str, Any]:
    return current if not isinstance(recorded, Mapping) or "method" in recorded else percentile_bootstrap(groups)
