"""Gains of a method over the full cache: the field ``paired`` of an efficiency record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from ...analysis.stats import ratio
from ..records.runs import MethodRun, finished_baseline

THROUGHPUT = ("output_tokens_per_s", "total_tokens_per_s")


def add_gains(runs: Sequence[MethodRun]) -> None:
    """Add the gains over the full cache to every record that lacks them: by bytes read, and as measured."""
    baseline = finished_baseline(runs)
    if baseline is None:
        return
    full = baseline.folder.record()
    for run in runs:
        if run is baseline or not run.folder.done or "paired" in (record := run.folder.record()):
            continue
        paired = {"with": baseline.method.label, "hash": baseline.folder.hash, **_gains(full, record)}
        with run.folder:
            run.folder.amend("paired", paired)


def _gains(full: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """Gains in time and bytes at equal requests; for a search, whose requests differ, ratios of size and throughput.

    Times are compared with those of the full cache that were measured in turn with the run's own, if there are any.
    """
    if "search" in record:
        return {
            "largest_ratio": record["search"]["measured_at"] / full["search"]["measured_at"],
            **{
                f"{name}_ratio": record["metrics"][name]["median"] / full["metrics"][name]["median"]
                for name in THROUGHPUT
            },
        }
    in_turn = "interleaved" in record
    tpot_full, ttft_full = (_baseline_times(full, record, name) for name in ("tpot_ms", "ttft_ms"))
    tpot: list[float] = record["metrics"]["tpot_ms"]["repetitions"]
    return {
        "decode_speed_up_by_bytes": full["limit"]["bytes_read_per_step"] / record["limit"]["bytes_read_per_step"],
        "decode_speed_up": median(tpot_full) / median(tpot),
        "decode_speed_up_interval": asdict(ratio(tpot_full, tpot, paired=in_turn)),
        "prefill_slow_down": record["metrics"]["ttft_ms"]["median"] / median(ttft_full),
        "kv_bytes_saved_end": full["bytes"]["kv_bytes_stored_end"] - record["bytes"]["kv_bytes_stored_end"],
        "peak_decode_bytes_saved": _peak_saved(full, record, "peak_decode"),
        "peak_prefill_bytes_saved": _peak_saved(full, record, "peak_prefill"),
    }


def _baseline_times(full: dict[str, Any], record: dict[str, Any], name: str) -> list[float]:
    """Repetitions of the full cache, those in turn with the run's own if there are any."""
    times: list[float] = (
        record["interleaved"][name] if "interleaved" in record else full["metrics"][name]["repetitions"]
    )
    return times


def _peak_saved(full: dict[str, Any], record: dict[str, Any], phase: str) -> int | None:
    """Bytes saved in the peak of one phase; None if the machine cannot measure the peak."""
    if full["memory"][phase] is None or record["memory"][phase] is None:
        return None
    saved: int = full["memory"][phase]["allocated"] - record["memory"][phase]["allocated"]
    return saved
