"""What a run's examples cost: bytes, prompt tokens and further forwards of a record, from the rows of its samples.

The runner writes a record by this, and :mod:`.verify` computes it again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

KV_BYTES = tuple(f"kv_bytes_{kind}" for kind in ("stored", "stored_end", "logical", "formula", "full"))
"""Fields of every row."""
STEP_BYTES = ("kv_bytes_mean", "kv_bytes_read_mean", "kv_bytes_full_mean")
"""Means over the predicted tokens; rows recorded before 2026-11-28 lack them."""
FURTHER_FORWARDS = ("further_forwards", "further_forward_tokens")
"""Forwards that a method took for the example after the prefill, and their tokens; only where it makes any."""


def costs_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the fields ``bytes``, ``prompt_tokens`` and, if any were made, ``further_forwards`` of a record."""
    stored, full = (sum(row[key] for row in rows) for key in ("kv_bytes_stored", "kv_bytes_full"))
    return {
        "bytes": {
            **{key: fmean(row[key] for row in rows) for key in KV_BYTES},
            "kv_ratio": stored / full,
            **means_over_steps(rows),
        },
        "prompt_tokens": fmean(row["prompt_tokens"] for row in rows),
        **further_forwards([row[key] for key in FURTHER_FORWARDS if key in row] for row in rows),
    }


def means_over_steps(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the fields :data:`STEP_BYTES` and ``kv_ratio_mean`` of a record, if all of its rows have the former."""
    if not all(key in row for row in rows for key in STEP_BYTES):
        return {}
    means = {key: fmean(row[key] for row in rows) for key in STEP_BYTES}
    return {**means, "kv_ratio_mean": means["kv_bytes_mean"] / means["kv_bytes_full_mean"]}


def further_forwards(each: Iterable[Sequence[int]]) -> dict[str, dict[str, float]]:
    """Return the field ``further_forwards`` of a record, given forwards and tokens of each prompt, if any."""
    means = [fmean(values) for values in zip(*each, strict=True)]
    names = ("forwards_per_prompt", "tokens_per_prompt")
    return {"further_forwards": dict(zip(names, means, strict=True))} if means else {}
