"""What is wrong with a record that was read: types, infinite numbers, and numbers that contradict each other.

A sound record has the types of :mod:`.schema`, the hash of its identity, each mean in its interval, and the average of
its data sets.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from functools import cache, lru_cache
from statistics import fmean
from typing import Any

from ..conf.options import fits, in_words
from .schema import DONE, HEAD, Each, ListOf, identity_hash

TOLERANCE = 1e-6
"""Largest relative difference of two numbers that should be equal and were added up in another order."""

MAX_NATS = 700.0
"""Largest loss whose exponential is a number."""

Problem = tuple[str, str]
"""Path of a field, and what is wrong with it."""
Checker = Callable[[Any], Problem | None]


def problem_of(record: Mapping[str, Any]) -> str | None:
    """What makes a record's numbers unfit to be shown, with the field and its value; None for a sound record.

    Args:
        record: A mapping with the fields :data:`FIELDS` and, if the run is done, those of its kind in :data:`RESULTS`.
    """
    found = _checker_of_head()(record)
    if found is None and record["status"] == "done":
        found = _checker_of_results(record["kind"])(record)
    if found is not None:
        return " ".join(part for part in found if part)
    return next(_rule_problems(record), None)


@cache
def _checker_of_head() -> Checker:
    return _checker(HEAD)


@cache
def _checker_of_results(kind: str) -> Checker:
    return _checker(DONE[kind])


def _checker(spec: Any) -> Checker:
    """A function that finds the first value that does not fit a specification."""
    if isinstance(spec, tuple):  # a specification, or null
        inner = _checker(spec[0])
        return lambda value: None if value is None else inner(value)
    if isinstance(spec, Mapping):
        return _checker_of_fields({key: _checker(inner) for key, inner in spec.items()})
    if isinstance(spec, Each | ListOf):
        return _checker_of_entries(_checker(spec.spec), type(spec))
    words = in_words(spec)
    takes_floats = spec in (float, float | None)  # most values of a record, and no two are the same

    @lru_cache(maxsize=1000, typed=True)  # `fits` is slow, and records of one folder have most other values in common
    def fits_spec(value: Hashable) -> bool:
        return fits(value, spec)

    def check(value: Any) -> Problem | None:
        if takes_floats and type(value) is float and math.isfinite(value):
            return None
        if fits(value, spec) if isinstance(value, list | dict) else fits_spec(value):
            return None
        return "", f"is {_shown(value)}: must be {words}"

    return check


def _checker_of_fields(checkers: Mapping[str, Checker]) -> Checker:
    fields = [(key.removesuffix("?"), key.endswith("?"), check) for key, check in checkers.items()]

    def check(value: Any) -> Problem | None:
        if not isinstance(value, Mapping):
            return "", f"is {_shown(value)}: must be a mapping"
        for name, optional, inner in fields:
            if name in value:
                if (found := inner(value[name])) is not None:
                    return _below(name, found)
            elif not optional:
                return name, "is missing"
        return None

    return check


def _checker_of_entries(inner: Checker, container: type) -> Checker:
    wanted, words = (dict, "a mapping") if container is Each else (list, "a list")

    def check(value: Any) -> Problem | None:
        if not isinstance(value, wanted):
            return "", f"is {_shown(value)}: must be {words}"
        for name, entry in value.items() if isinstance(value, dict) else enumerate(value):
            if (found := inner(entry)) is not None:
                return _below(str(name), found)
        return None

    return check


def _below(name: str, found: Problem) -> Problem:
    path, problem = found
    return f"{name}.{path}" if path else name, problem


def _rule_problems(record: Mapping[str, Any]) -> Iterator[str]:
    """Rules between fields; the types are right."""
    identity = record["identity"]
    if identity["kind"] != record["kind"]:
        yield f"kind is {record['kind']}: identity.kind says {identity['kind']}"
    try:
        expected = identity_hash(identity)
    except ValueError:
        yield "identity holds a number that is not finite"
        return
    if record["hash"] != expected:
        yield f"hash is {_shown(record['hash'])}: its identity has {expected}, so one of the two was edited"
    if record["status"] != "done":
        return
    for field, estimate in _estimates(record):
        low, high, mean = estimate["low"], estimate["high"], estimate["mean"]
        if (low is None) != (high is None):
            yield f"{field} has one end of its interval"
        elif low is not None and not _at_most(low, mean) & _at_most(mean, high):
            yield f"{field}.mean is {mean:g}: outside its own interval [{low:g}, {high:g}]"
    for name, spread in _spreads(record):
        if not _at_most(spread["min"], spread["median"]) & _at_most(spread["median"], spread["max"]):
            yield f"{name}.median is {spread['median']:g}: outside its own range"
        if not spread["repetitions"]:
            yield f"{name}.repetitions is empty"
    if record["kind"] == "accuracy":
        yield from _score_problems(record)


def _estimates(record: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if record["kind"] == "accuracy":
        yield from ((f"scores.{name}", estimate) for name, estimate in record["scores"].items())
        yield "average", record["average"]
        yield from ((f"averages.{name}", estimate) for name, estimate in record.get("averages", {}).items())
        if "paired" in record:
            yield "paired.difference", record["paired"]["difference"]


def _spreads(record: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if record["kind"] == "efficiency":
        metrics = record["metrics"]
        yield from ((f"metrics.{name}", s) for name, s in metrics.items() if name != "step_ms" and s and "median" in s)
        if record["limit"]["mbu"] is not None:
            yield "limit.mbu", record["limit"]["mbu"]


def _score_problems(record: Mapping[str, Any]) -> Iterator[str]:
    """Scores, their average and the examples behind them must agree."""
    scores, examples = record["scores"], record["data"]["examples"]
    if not scores:
        yield "scores is empty"
        return
    # A task may split a data set further: qasper/0-4k.
    missing = [name for name in examples if name not in scores and not any(s.startswith(f"{name}/") for s in scores)]
    if missing:
        yield f"lacks the score of {', '.join(missing)}, which data.examples counts"
    counted, told = sum(examples.values()), sum(estimate["n"] for estimate in scores.values())
    largest = max(scores.values(), key=lambda estimate: estimate["mean"])["mean"]
    if "unit" in record and largest > MAX_NATS:
        yield f"scores hold {largest:g} nats per token: too many for a perplexity"
    if counted != told or record["average"]["n"] != counted:
        yield f"scores are of {told} examples, the average of {record['average']['n']}, data.examples counts {counted}"
    mean = fmean(estimate["mean"] for estimate in scores.values())
    if not agree(mean, record["average"]["mean"]):
        yield f"average.mean is {record['average']['mean']:g}: the mean of its data sets is {mean:g}"


def _at_most(a: float, b: float) -> bool:
    return a <= b or agree(a, b)


def agree(a: float, b: float) -> bool:
    """Whether two numbers are equal up to rounding."""
    return math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=TOLERANCE)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else f"{text[:37]}..."
