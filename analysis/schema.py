"""Format of ``record.json``: its fields with their types, and the rules that a sound record keeps.

:func:`problem_of` finds what is wrong with a record that was read. It checks types, finite numbers, the hash, that each
mean lies in its interval, and that the average is that of the data sets. ``kvbench.runners.records.record`` writes the
files.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from statistics import fmean
from typing import Any, Literal

from ..conf.options import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Text, fits, in_words

SCHEMA = 1
"""Version of record.json and samples.jsonl; a record of another version is reported, not guessed at."""

RECORD, SAMPLES = "record.json", "samples.jsonl"

FIELDS = ("status", "kind", "hash", "identity", "task", "model", "method", "method_label", "budget", "data")
"""Fields of every record."""

RESULTS = {
    "accuracy": ("scores", "average", "bytes"),
    "train": ("training", "curve", "validation", "bytes", "weights"),
    "efficiency": ("metrics", "bytes", "memory", "limit", "bandwidth", "workload"),
}
"""Fields of a finished run by its kind."""

TOLERANCE = 1e-6
"""Largest relative difference of two numbers that should be equal and were added up in another order."""

MAX_NATS = 700.0
"""Largest loss whose exponential is a number."""


class Each:
    """A mapping with any names, whose values all have one type."""

    def __init__(self, spec: Any) -> None:
        self.spec = spec


class ListOf:
    """A list whose entries all have one type."""

    def __init__(self, spec: Any) -> None:
        self.spec = spec


def identity_hash(identity: Mapping[str, Any]) -> str:
    """12 hexadecimal digits of the sha256 of ``identity`` as canonical JSON."""
    text = json.dumps({"schema": SCHEMA, **identity}, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


# A dict lists fields by name; "?" marks those that a record may lack. Everything else is an annotation of
# `conf.options`, whose float is a finite number. Fields that are not listed are not read by the analysis.
ESTIMATE = {"mean": float, "low": float | None, "high": float | None, "n": PositiveInt}
SPREAD = {"median": float, "min": float, "max": float, "repetitions": ListOf(float)}
PEAK = {"allocated": NonNegativeInt}
MAKER = {
    "git?": {"sha?": str | None, "dirty?": bool | None},
    "packages?": Each(str | None),
    "hardware?": {"cpu?": str | None, "gpu?": str | None},
}
HEAD = {
    "status": Literal["done", "oom"],
    "kind": Literal["accuracy", "train", "efficiency"],
    "hash": Text,
    "identity": {
        "kind": Text,
        "method": {"selection": {"class": Text}, "storage": {"class": Text}, "sharing?": Mapping[str, Any] | None},
        "model": {"name": Text},
        "task": {"class?": Text, "limit?": NonNegativeInt | None},
        "device": Text,
        "dtype": Text,
        "seed": int,
        "batch_size?": PositiveInt | None,
        "runner?": Mapping[str, Any],
        "hardware?": {"gpu": Text | None, "cpu": Text | None, "torch_threads": PositiveInt},
    },
    "task": Text,
    "model": Text,
    "method": Text,
    "method_label": Text,
    "budget": PositiveFloat | None,
    "data": {"examples?": Each(PositiveInt)},
    "finished?": Text,
    "unit?": Text,
    "shown?": Each(object),
    "rode_with?": Sequence[str],
    "sessions?": ListOf({"after_examples?": NonNegativeInt, "chunk_size?": PositiveInt | None, **MAKER}),
    "provenance?": MAKER,
    "cache_layers?": {
        "full_attention": NonNegativeInt,
        "local?": ListOf({"kind": Text, "tokens": PositiveInt, "layers": PositiveInt}),
        "reading_others?": NonNegativeInt,
        "recurrent?": NonNegativeInt,
        "latents?": {"held": Text, "latent_numbers_a_token": PositiveInt},
    },
}
DONE: Mapping[str, Mapping[str, Any]] = {
    "accuracy": {
        "scores": Each(ESTIMATE),
        "average": ESTIMATE,
        "averages?": Each(ESTIMATE),
        "bytes": {"kv_bytes_stored": NonNegativeFloat, "kv_ratio": NonNegativeFloat, "kv_bytes_mean?": float | None},
        "data": {"examples": Each(PositiveInt)},
        "paired?": {"difference": ESTIMATE},
    },
    "train": {
        "identity": {"train": {"lr": float}},
        "training": {
            "lr": PositiveFloat,
            "tokens": PositiveInt,
            "parameters": PositiveInt,
            "seconds": NonNegativeFloat,
            "tokens_per_s": NonNegativeFloat,
        },
        "validation": {"loss": float, "perplexity": float, "accuracy": float},
        "bytes": {"kv_bytes_per_token": NonNegativeInt, "kv_bytes_fixed": NonNegativeInt},
    },
    "efficiency": {
        "identity": {"runner": {"repeats": PositiveInt}, "task": {"tolerance?": NonNegativeFloat}},
        "metrics": {
            **dict.fromkeys(("ttft_ms", "tpot_ms", "prefill_tokens_per_s", "decode_tokens_per_s"), SPREAD),
            **dict.fromkeys(("output_tokens_per_s?", "total_tokens_per_s?"), SPREAD),
            "step_ms?": {"p90": float, "p99": float},
        },
        "bytes": {"kv_bytes_stored": NonNegativeFloat},
        "memory": {"problem?": str | None, "peak_prefill": (PEAK, None), "peak_decode": (PEAK, None)},
        "bandwidth": {"problem?": str | None},
        "decode?": Text,
        "limit": {"mbu": (SPREAD, None)},
        "paired?": {
            "decode_speed_up?": float,
            "decode_speed_up_by_bytes?": float,
            "largest_ratio?": float,
            "output_tokens_per_s_ratio?": float,
        },
        "energy?": {"problem?": str | None, "joules?": float | None, "joules_per_output_token?": float | None},
        "search?": {
            "what": Literal["batch_size", "prompt_tokens"],
            "measured_at": PositiveInt,
            "stopped_by": Text,
            "limit_bytes": PositiveInt | None,
        },
    },
}


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
    takes_floats = spec in (float, float | None)  # most values of a record: `fits` would be slow

    def check(value: Any) -> Problem | None:
        if (takes_floats and type(value) is float and math.isfinite(value)) or fits(value, spec):
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
        yield from ((f"metrics.{name}", s) for name, s in metrics.items() if name != "step_ms" and "median" in s)
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
