"""What an efficiency record says beside its repetitions, computed from them again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from .stats import ratio


def of_repetitions(record: Mapping[str, Any], full: Mapping[str, Any] | None) -> dict[str, Any]:
    """Fields of an efficiency record that follow from others, and gains over the full cache that it is paired with."""
    metrics = {key: _spread(m["repetitions"]) for key, m in record["metrics"].items() if m and "repetitions" in m}
    bandwidth, read = record["bandwidth"]["copy_bytes_per_s"], record["limit"]["bytes_read_per_step"]
    floor = None if bandwidth is None else 1e3 * read / bandwidth
    tpots = record["metrics"]["tpot_ms"]["repetitions"]
    mbu = None if floor is None else _spread([floor / tpot for tpot in tpots])
    expected: dict[str, Any] = {"metrics": metrics, "limit": {"tpot_ms_floor": floor, "mbu": mbu}}
    if full is not None:
        expected["paired"] = _gains(full, record)
    return expected


def _gains(full: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    def of_medians(name: str) -> tuple[float, float]:
        baseline, own = (median(one["metrics"][name]["repetitions"]) for one in (full, record))
        return baseline, own

    if "search" in record:
        names = ("output_tokens_per_s", "total_tokens_per_s")
        return {
            "largest_ratio": record["search"]["measured_at"] / full["search"]["measured_at"],
            **{f"{name}_ratio": own / theirs for name in names for theirs, own in [of_medians(name)]},
        }
    in_turn = record.get("interleaved")  # repetitions of the full cache that were measured in turn with these

    def repetitions(name: str) -> tuple[Sequence[float], Sequence[float]]:
        baseline = full["metrics"][name]["repetitions"] if in_turn is None else in_turn[name]
        return baseline, record["metrics"][name]["repetitions"]

    (tpots_full, tpots), (ttfts_full, ttfts) = repetitions("tpot_ms"), repetitions("ttft_ms")
    name = "decode_speed_up_interval"
    interval = ratio(tpots_full, tpots, paired=in_turn is not None)
    return {
        "decode_speed_up_by_bytes": full["limit"]["bytes_read_per_step"] / record["limit"]["bytes_read_per_step"],
        "decode_speed_up": median(tpots_full) / median(tpots),
        **({name: asdict(interval)} if name in record["paired"] else {}),
        "prefill_slow_down": median(ttfts) / median(ttfts_full),
        "kv_bytes_saved_end": full["bytes"]["kv_bytes_stored_end"] - record["bytes"]["kv_bytes_stored_end"],
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}
