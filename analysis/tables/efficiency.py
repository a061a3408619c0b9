"""Tables of timed runs: times, throughput and memory, or the largest size that fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..describe import setting
from ..load import Run
from .cells import GIB, MIB, MISSING, Cell, Table, label, metric, number, out_of_memory_row, peak, run_hash
from .marks import BLOCKS, emphasized, in_blocks, members_of
from .notes import made_by, not_measured, older_versions, ways_of_decoding


def efficiency_table(runs: Sequence[Run]) -> Table:
    """Times, throughput, bytes, peaks, and the speed-up against what the bytes allow."""
    if any("search" in run.record for run in runs):
        return search_table(runs)
    runs, blocks = in_blocks(runs)
    columns = [
        *("method", "TTFT ms", "TPOT ms", "min - max", "p90", "p99", "prefill tok/s", "decode tok/s", "KV MiB, batch"),
        *("peak prefill MiB", "peak decode MiB", "MBU", "speed-up", "by bytes"),
    ]
    reads = any("kv_bytes_read_per_step" in run.record.get("bytes", {}) for run in runs)
    if reads:
        columns.insert(columns.index("KV MiB, batch") + 1, "read a step")
    compresses = any(run.record.get("metrics", {}).get("compression_ms") for run in runs)
    if compresses:
        columns.insert(columns.index("TPOT ms"), "compression ms")
    metered = any((run.record.get("energy") or {}).get("joules") for run in runs)
    columns += ["J/token", "run"] if metered else ["run"]
    rows = _rows(runs, columns, lambda run: _times(run.record, metered, reads, compresses))
    first = runs[0].record
    table = Table(_title(runs), columns, rows, runs, blocks=blocks)
    repeats = first["identity"]["runner"]["repeats"]
    table.notes.append(f"Medians of {repeats} repetitions" + ("." if repeats >= 5 else ", which is few."))
    if compresses:
        table.notes.append("compression: scoring the prompt, choosing what stays and storing it; a part of TTFT.")
    if any("step_ms" in run.record.get("metrics", {}) for run in runs):
        table.notes.append("p90, p99: of single decode steps, ms.")
    table.notes.append(
        "speed-up: TPOT of full / TPOT; by bytes: the same if a step took as long as reading the weights and the cache "
        "once; MBU: how near it came to that, at the bandwidth of a copy."
    )
    if reads:
        table.notes.append("read a step: MiB of the cache that the last decode step read.")
    if members_of(runs, blocks):
        table.notes.append(f"{BLOCKS} Bold: the best of them, if its range is clear of the others'.")
    if first["identity"]["device"] == "cpu":
        table.notes.append("Peaks are of the whole process (resident set).")
    table.notes += ways_of_decoding(runs) + older_versions(runs) + made_by(runs) + not_measured(runs)
    return emphasized(table)


def _rows(
    runs: Sequence[Run], columns: Sequence[str], numbers: Callable[[Run], Sequence[Cell] | None]
) -> list[list[Cell]]:
    """A row a run: its label, its numbers and its hash; ``numbers`` gives None for a run that has none."""
    rows = []
    for run in runs:
        if not run.done:
            rows.append(out_of_memory_row(run, len(columns)))
            continue
        cells = numbers(run)
        rows.append([label(run), *([MISSING] * (len(columns) - 2) if cells is None else cells), run_hash(run)])
    return rows


def _times(record: Mapping[str, Any], metered: bool, reads: bool, compresses: bool) -> list[Cell]:
    """Numbers of a run of one workload."""
    tpot, steps = record["metrics"]["tpot_ms"], record["metrics"].get("step_ms")
    mbu, paired = record["limit"]["mbu"], record.get("paired", {})
    return [
        metric(record, "ttft_ms", 1, -1),
        *([metric(record, "compression_ms", 1, -1)] if compresses else []),
        metric(record, "tpot_ms", 2, -1),
        Cell(f"{tpot['min']:.2f} - {tpot['max']:.2f}"),
        *(MISSING if steps is None else number(steps[p], 2) for p in ("p90", "p99")),
        metric(record, "prefill_tokens_per_s", 0, 1),
        metric(record, "decode_tokens_per_s", 1, 1),
        *_memory(record, reads),
        MISSING if mbu is None else number(mbu["median"], 2),
        *(_ratio(paired, key) for key in ("decode_speed_up", "decode_speed_up_by_bytes")),
        *([_energy(record)] if metered else []),
    ]


def _memory(record: Mapping[str, Any], reads: bool = False) -> list[Cell]:
    """Bytes of the cache, with ``reads`` those that the last step read, and both phases' peaks."""
    held = ["kv_bytes_stored", "kv_bytes_read_per_step"][: 1 + reads]
    sizes = [record["bytes"].get(key) for key in held]
    cells = [MISSING if size is None else number(size / MIB, 2) for size in sizes]
    return [*cells, peak(record, "peak_prefill"), peak(record, "peak_decode")]


def _energy(record: Mapping[str, Any]) -> Cell:
    """Joules per output token, what the idle device takes included."""
    joules = record.get("energy", {}).get("joules_per_output_token")
    return MISSING if joules is None else number(joules, 3)


def search_table(runs: Sequence[Run]) -> Table:
    """The largest size of each method that fits into memory, and how fast it is there."""
    what = next(run.record["search"]["what"] for run in runs if "search" in run.record)
    name = {"batch_size": "largest batch", "prompt_tokens": "longest prompt"}[what]
    columns = [
        *("method", name, "/ full", "ended by", "output tok/s", "/ full", "total tok/s", "TTFT ms", "TPOT ms"),
        *("KV MiB, batch", "peak prefill MiB", "peak decode MiB", "run"),
    ]
    first = runs[0].record
    table = Table(_title(runs), columns, _rows(runs, columns, lambda run: _largest(run.record)), list(runs))
    limits = {run.record["search"]["limit_bytes"] for run in runs if "search" in run.record}
    given = ["what the device has" if limit is None else f"{limit / GIB:.4g} GiB" for limit in limits]
    table.notes.append(f"Memory: {', '.join(sorted(given))}. Times and bytes are those at the largest size.")
    tolerance = first["identity"]["task"].get("tolerance")
    if tolerance:
        table.notes.append(f"Sizes are found to within {100 * tolerance:g} %.")
    table.notes += ways_of_decoding(runs) + older_versions(runs) + made_by(runs) + not_measured(runs)
    return table


def _largest(record: Mapping[str, Any]) -> list[Cell] | None:
    """Numbers of a search; None for a run that is none, of another table."""
    paired, search = record.get("paired", {}), record.get("search")
    if search is None:
        return None
    size = search["measured_at"]
    return [
        Cell(f"{size:,}", size, better=1),
        _ratio(paired, "largest_ratio"),
        Cell(search["stopped_by"]),
        metric(record, "output_tokens_per_s", 1, 1),
        _ratio(paired, "output_tokens_per_s_ratio"),
        metric(record, "total_tokens_per_s", 1, 1),
        metric(record, "ttft_ms", 1, -1),
        metric(record, "tpot_ms", 2, -1),
        *_memory(record),
    ]


def _ratio(paired: Mapping[str, Any], name: str) -> Cell:
    """A ratio to the full cache; a dash where there is no run of it."""
    return number(paired[name], 2, " x") if name in paired else MISSING


def _title(runs: Sequence[Run]) -> str:
    first = runs[0].record
    return f"{first['task']} / {first['model']}: {setting(first, runs)}"
