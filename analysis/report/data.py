"""What the page of :mod:`.page` holds: finished runs as plain JSON values, and their examples in compressed chunks.

Every text of a record or of a model ends up as a JSON string. Nothing here is HTML.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..describe import is_needle
from ..figures.registry import looks_of
from ..load import Run, average, comparable, fewer_is_better, flat, setting
from ..tables.groups import differences_of
from ..tables.marks import tests_of
from ..tables.reference import FULL_CACHE
from .examples import Examples, needle_map, number

TIMES = ("ttft_ms", "tpot_ms", "prefill_tokens_per_s", "decode_tokens_per_s", "output_tokens_per_s")


@dataclass
class ReportData:
    """The content of one page.

    Attributes:
        meta: groups of comparable runs, runs, looks of the curves, provenance and problems.
        chunks: the examples of each group by its index, as base64 of zlib-compressed JSON.
    """

    meta: dict[str, Any]
    chunks: dict[int, str] = field(default_factory=dict)


def report_data(
    runs: Sequence[Run], problems: Sequence[str], folders: Sequence[Path], version: str, with_predictions: bool = True
) -> ReportData:
    """Everything that the page shows.

    Args:
        runs: all that were read.
        problems: a line for each record that could not be read, or whose examples could not.
        folders: results folders; run folders are named relative to theirs.
        version: of kvbench.
        with_predictions: False leaves out the texts of the predictions and keeps their scores.
    """
    provenance = _Numbered()
    methods = _Numbered()
    groups: list[dict[str, Any]] = []
    entries: list[dict[str, Any]] = []
    chunks: dict[int, str] = {}
    grouped = comparable(runs)
    differences = differences_of(grouped)
    for index, group in enumerate(grouped):
        described = _group(group)
        described["setting"] = ", ".join([described["setting"], *differences[group[0].group_key]])
        groups.append(described)
        examples = Examples(with_predictions)
        tests = _tests(group)
        for run in group:
            entry = {"id": run.record["hash"], "group": index, **_run(run, described, folders)}
            entry["provenance"] = provenance.number(run.record.get("provenance") or {})
            entry["identity"] = methods.number(run.record["identity"]["method"])
            if run.record["hash"] in tests:
                entry["test"] = tests[run.record["hash"]]
            if run.examples is not None:  # they fit the record
                rows = run.samples()
                examples.add(entry["id"], rows, percent=not fewer_is_better(run.record))
                entry["examples"] = len(rows)
                if is_needle(run):
                    entry["map"] = needle_map(rows, described)
            entries.append(entry)
        if examples.runs:
            chunks[index] = examples.packed()
    meta = {
        "version": version,
        "folder": ", ".join(folder.resolve().name for folder in folders),
        "problems": list(problems),
        "looks": _looks(runs),
        "groups": groups,
        "runs": entries,
        "provenance": provenance.values,
        "methods": methods.values,
    }
    return ReportData(meta, chunks)


def at(record: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path; None where there is none."""
    value: Any = record
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def estimate(recorded: Any) -> list[float | int | None] | None:
    """``[mean, low, high, n]`` of an estimate of a record; None without a finite mean."""
    if not isinstance(recorded, Mapping) or number(recorded.get("mean")) is None:
        return None
    return [number(recorded.get(key)) for key in ("mean", "low", "high", "n")]


def spread(recorded: Any) -> list[float | int | None] | None:
    """``[median, min, max]`` of a repeated measurement."""
    if not isinstance(recorded, Mapping) or number(recorded.get("median")) is None:
        return None
    return [number(recorded.get(key)) for key in ("median", "min", "max")]


def _looks(runs: Iterable[Run]) -> dict[str, dict[str, str]]:
    """Colour, mark and line of each curve, in Plotly's names."""
    looks = looks_of((run.record["method"], run.curve) for run in runs)
    return {
        curve: {"color": look.color, "symbol": look.plotly_symbol, "dash": look.plotly_dash}
        for curve, look in looks.items()
    }


class _Numbered:
    """Values that repeat, each kept once."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._numbers: dict[str, int] = {}

    def number(self, value: Any) -> int:
        key = json.dumps(value, sort_keys=True)
        if key not in self._numbers:
            self._numbers[key] = len(self.values)
            self.values.append(flat(value) if isinstance(value, Mapping) else value)
        return self._numbers[key]


def _group(group: Sequence[Run]) -> dict[str, Any]:
    """What the runs of one group share."""
    first = group[0].record
    sets = dict.fromkeys(name for run in group if run.done for name in run.record.get("scores", {}))
    described: dict[str, Any] = {
        "kind": first["kind"],
        "task": first["task"],
        "model": first["model"],
        "setting": setting(first, group),
        "note": first["data"].get("note") or "",
        "fewer": fewer_is_better(first),
        "unit": "perplexity" if fewer_is_better(first) else "percent",
        "sets": list(sets),
        "identity": flat({k: v for k, v in first["identity"].items() if k not in ("method", "kind")}),
    }
    if is_needle(group[0]):
        described |= {"lengths": [], "depths": []}
    return described


def _tests(group: Sequence[Run]) -> dict[str, list[float | int | None]]:
    """``[p, won, tied, lost]`` against the full cache by hash: p-values after Holm's rule over the group."""
    sign = -1 if fewer_is_better(group[0].record) else 1
    compared = tests_of(group, FULL_CACHE.run_for).paired
    return {key: [number(p), *((one.won, one.tied, one.lost)[::sign])] for key, (one, p) in compared.items()}


def _run(run: Run, group: Mapping[str, Any], folders: Sequence[Path]) -> dict[str, Any]:
    record = run.record
    git = at(record, "provenance.git") or {}
    entry: dict[str, Any] = {
        "label": run.label,
        "curve": run.curve,
        "method": record["method"],
        "budget": record["budget"],
        "full": run.is_full_cache,
        "status": record["status"],
        "dtype": at(record, "identity.dtype"),
        "device": _device(record),
        "commit": str(git.get("sha") or "unknown")[:10] + ("+" if git.get("dirty") else ""),
        "finished": record.get("finished"),
        "path": _relative(run.path, folders),
    }
    if not run.done:
        return entry
    sizes = record.get("bytes", {})
    entry["bytes"] = {key: number(value) for key, value in sizes.items() if number(value) is not None}
    return entry | {"accuracy": _accuracy, "efficiency": _efficiency, "train": _train}.get(
        record["kind"], lambda record, group: {}
    )(record, group)


def _accuracy(record: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {
        "score": estimate(average(record)),
        "sets": [estimate(average(record, name)) if name in record["scores"] else None for name in group["sets"]],
        "difference": estimate(at(record, "paired.difference")),
        "baseline": at(record, "paired.with"),
        "prompt_tokens": number(record.get("prompt_tokens")),
    }
    if at(record, "by_distance.nats"):
        made["distance"] = [[number(x) for x in record["by_distance"][key]] for key in ("up_to_tokens", "nats")]
    return made


def _efficiency(record: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {
        "times": {name: spread(at(record, f"metrics.{name}")) for name in TIMES},
        "mbu": spread(at(record, "limit.mbu")),
        "speed_up": number(at(record, "paired.decode_speed_up")),
        "roofline": number(at(record, "paired.decode_speed_up_by_bytes")),
        "load": number(record.get("load_average_before")),
    }
    for phase in ("peak_prefill", "peak_decode"):
        made[phase] = number(at(record, f"memory.{phase}.allocated"))
    found = at(record, "search.measured_at")
    return made | ({} if found is None else {"largest": number(found)})


def _train(record: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "seed": at(record, "identity.seed"),
        "training": {key: number(at(record, f"training.{key}")) for key in ("lr", "tokens", "parameters", "seconds")},
        "validation": {key: number(at(record, f"validation.{key}")) for key in ("loss", "perplexity", "accuracy")},
    }


def _device(record: Mapping[str, Any]) -> str:
    hardware = at(record, "identity.hardware") or at(record, "provenance.hardware") or {}
    name = hardware.get("gpu") or hardware.get("cpu")
    device = at(record, "identity.device")
    return f"{device}: {name}" if name else str(device)


def _relative(path: Path, folders: Sequence[Path]) -> str:
    folder = next((one for one in folders if path.is_relative_to(one)), None)
    return (path if folder is None else path.relative_to(folder)).as_posix()
