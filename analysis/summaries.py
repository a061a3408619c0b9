"""Statistics of a record from the scores of its examples: as a run writes them, and again when it is read.

A record says how each interval was made (``average.method``). One without is older: its intervals are percentile
bootstraps of 2,000 resamples, which depend on the order of the rows. :func:`with_current_statistics` replaces them, so
that all rows of a table are made by the same rule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from .stats import LEVEL, PERCENT_BOUNDS, Bounds, Comparison, Groups, K, compare, holm, macro_mean, paired_difference


def score_bounds(record: Mapping[str, Any]) -> Bounds | None:
    """Bounds of a score of this record: those of a percentage, or None where the record has another unit (nats)."""
    return None if "unit" in record else PERCENT_BOUNDS


def summarize(scores: Groups, bounds: Bounds | None, averages: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """``scores``, ``average``, ``averages`` and ``interval`` of a record.

    Args:
        scores: Scores by data set and example.
        bounds: Bounds of a score; None where there are none.
        averages: Data sets of each further average.
    """
    values = {name: list(rows.values()) for name, rows in scores.items()}
    average = macro_mean(values, bounds)
    return {
        "scores": {name: asdict(macro_mean({name: rows}, bounds)) for name, rows in values.items()},
        "average": asdict(average),
        "averages": {
            name: {**asdict(macro_mean({member: values[member] for member in members}, bounds)), "of": list(members)}
            for name, members in averages.items()
        },
        "interval": {"method": average.method, "level": LEVEL, "resamples": None},
    }


def difference(scores: Groups, baseline: Groups, bounds: Bounds | None) -> dict[str, Any]:
    """``paired.difference`` of a record.

    Raises:
        ValueError: There is no example in common.
    """
    return asdict(paired_difference(scores, baseline, bounds))


def with_current_statistics(
    record: Mapping[str, Any], scores: Groups, baseline: Groups | None = None
) -> dict[str, Any]:
    """A copy of an accuracy record with its means, intervals and paired difference computed from the scores.

    Args:
        record: The record of a finished run.
        scores: Its scores by data set and example, in the record's unit.
        baseline: Scores of the run that the record is paired with; without them the paired difference keeps its mean
            and loses an interval made by an older rule.

    Averages whose data sets the record does not name keep their mean and lose an older interval too.
    """
    bounds = score_bounds(record)
    members = {name: entry["of"] for name, entry in record.get("averages", {}).items() if "of" in entry}
    made = summarize(scores, bounds, members)
    out = {**record, **made}
    out["averages"] = {
        name: made["averages"].get(name) or _without_interval(entry)
        for name, entry in record.get("averages", {}).items()
    }
    if "paired" in record and "difference" in record["paired"]:
        recorded = record["paired"]["difference"]
        paired = difference(scores, baseline, bounds) if baseline is not None else _without_interval(recorded)
        out["paired"] = {**record["paired"], "difference": paired}
    return out


def _without_interval(estimate: Mapping[str, Any]) -> dict[str, Any]:
    """The estimate as it is if it names its method, else without its ends."""
    if "method" in estimate:
        return dict(estimate)
    return {**estimate, "low": None, "high": None, "method": "", "reason": "made by an older rule"}


def shares_examples(scores: Groups, baseline: Groups) -> bool:
    """Whether two runs have an example in common."""
    return any(rows.keys() & baseline.get(name, {}).keys() for name, rows in scores.items())


def compare_all(pairs: Mapping[K, tuple[Groups, Groups]], bounds: Bounds | None) -> dict[K, tuple[Comparison, float]]:
    """Comparison of each method of a table with its reference, and its p-value after Holm's rule over the table.

    Methods that share no example with their reference are left out.

    Args:
        pairs: Scores of each method, and those of its reference.
        bounds: Bounds of a score; None where there are none.
    """
    compared = {key: compare(*pair, bounds) for key, pair in pairs.items() if shares_examples(*pair)}
    adjusted = holm({key: comparison.p for key, comparison in compared.items()})
    return {key: (comparison, adjusted[key]) for key, comparison in compared.items()}
