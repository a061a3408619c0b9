"""Bytes of a run's cache: what it holds, and what a step reads."""

from __future__ import annotations

from collections.abc import Sequence

from .load import Run


def held_bytes(run: Run) -> float:
    """Bytes that a method's cache takes: their mean over the decode steps, or after the prompt in older records."""
    held = run.record["bytes"]
    return float(held.get("kv_bytes_mean", held["kv_bytes_stored"]))


def share_held(run: Run) -> float:
    """Share of the full cache's bytes that a method holds: over the steps, or after the prompt in older records."""
    held = run.record["bytes"]
    return float(held.get("kv_ratio_mean", held["kv_ratio"]))


def share_read(run: Run) -> float | None:
    """Share of the full cache's bytes that a step reads, on average; None in older records."""
    held = run.record["bytes"]
    return float(held["kv_bytes_read_mean"] / held["kv_bytes_full_mean"]) if "kv_bytes_read_mean" in held else None


def reads_another_part(runs: Sequence[Run]) -> bool:
    """Whether a step of any of the runs reads other bytes than are held."""
    shares = [(share_held(run), share_read(run)) for run in runs if run.done]
    return any(read is not None and abs(read - held) > 0.01 * held for held, read in shares)
