"""Format of ``record.json``: its fields with their types. ``kvbench.runners.records.record`` writes the files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal

from ..conf.options import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Text

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
    "needs?": Text,
    "data": {"examples?": Each(PositiveInt)},
    "finished?": Text,
    "further_forwards?": {"forwards_per_prompt": NonNegativeFloat, "tokens_per_prompt": NonNegativeFloat},
    "unit?": Text,
    "shown?": Each(object),
    "rode_with?": ListOf(str),
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
        "bytes": {
            "kv_bytes_stored": NonNegativeFloat,
            "kv_ratio": NonNegativeFloat,
            "kv_bytes_mean?": NonNegativeFloat,
            "kv_bytes_read_mean?": NonNegativeFloat,
            "kv_bytes_full_mean?": NonNegativeFloat,
            "kv_ratio_mean?": NonNegativeFloat,
        },
        "data": {"examples": Each(PositiveInt)},
        "paired?": {"difference": ESTIMATE, "hash?": Text},
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
            "compression_ms?": (SPREAD, None),
            "step_ms?": {"p90": float, "p99": float},
        },
        "bytes": {"kv_bytes_stored": NonNegativeFloat},
        "memory": {"problem?": str | None, "peak_prefill": (PEAK, None), "peak_decode": (PEAK, None)},
        "bandwidth": {"problem?": str | None},
        "decode?": Text,
        "limit": {"mbu": (SPREAD, None)},
        "interleaved?": {"with": Text, "ttft_ms": ListOf(float), "tpot_ms": ListOf(float)},
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
