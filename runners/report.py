"""The closing table of a run, for the terminal; and the same table again from finished runs.

    python -m kvbench.runners.report results/reference/longbench-mini

prints one table for each set of runs under the folder that share task, model, data and settings.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..conf.errors import InputError
from .record import RECORD, read_record


def closing_table(records: Sequence[Mapping[str, Any]], paths: Sequence[str]) -> str:
    """Score, full-cache score, paired difference and bytes of every record of one run, and where each lies."""
    failed = [r for r in records if r["status"] == "oom"]
    every, records = records, [r for r in records if r["status"] == "done"]
    lost = [f"{r['method_label']}: out of memory after {r['examples_done']} examples ({r['problem']})" for r in failed]
    if not records:
        return "\n".join(
            [f"{every[0]['task']} / {every[0]['model']}", "", *lost, *(f"record: {path}" for path in paths)]
        )
    full = next((r for r in records if is_full_cache(r)), None)
    header = ["method", "score", "95 % interval", "full", "difference", "95 % interval", "KV MiB", "KV kept"]
    lines = [header]
    for record in records:
        paired = record.get("paired")
        difference = paired["difference"] if paired else None
        lines.append(
            [
                record["method_label"],
                f"{record['average']['mean']:.2f}",
                _interval(record["average"]),
                "-" if full is None else f"{full['average']['mean']:.2f}",
                "-" if difference is None else f"{difference['mean']:+.2f}",
                "-" if difference is None else _interval(difference, "+"),
                f"{record['bytes']['kv_bytes_stored'] / 2**20:.2f}",
                f"{100 * record['bytes']['kv_ratio']:.1f} %",
            ]
        )
    first = records[0]
    examples = sum(first["data"]["examples"].values())
    title = f"{first['task']} / {first['model']}: mean over {len(first['scores'])} data sets, {examples} examples"
    parts = [title, "", *_aligned(lines), ""]
    if len(first["scores"]) > 1:
        labels = [r["method_label"] for r in records]
        by_set = [["data set", "n", *labels]]
        for name in first["scores"]:
            row = [name, str(first["scores"][name]["n"])]
            by_set.append(row + [f"{r['scores'][name]['mean']:.2f}" for r in records])
        parts += [*_aligned(by_set), ""]
    if "-mini" in first["task"]:
        parts.append("These are scores on the small bundled set, not LongBench scores.")
    if examples < 30:
        parts.append(
            f"{examples} examples say little: the intervals above are wide. Drop task.limit for the whole set."
        )
    parts += lost
    parts += [f"record: {path}" for path in paths]
    parts += [f"next:   {line}" for line in next_commands(first, full)]
    return "\n".join(parts)


def is_full_cache(record: Mapping[str, Any]) -> bool:
    """Whether a record is the baseline: everything kept, uncompressed (``full`` on another storage is not)."""
    method = record["identity"]["method"]
    return method["selection"] == {"class": "Selection"} and method["storage"] == {"class": "Dense"}


def next_commands(record: Mapping[str, Any], full: Mapping[str, Any] | None) -> list[str]:
    """What to type after a run."""
    commands = []
    if record["identity"]["task"].get("limit") is not None:
        commands.append("the same command without task.limit for every example; it continues if it is stopped")
    if full is not None and record["method"] != "full" and record["budget"] is not None:
        commands.append("'runner.budgets=[128,256,512]' for several budgets on one reading of each prompt")
    commands.append("python -m kvbench.runners.report RESULTS_DIR for these tables again")
    return commands


def _interval(estimate: Mapping[str, Any], sign: str = "") -> str:
    if estimate["low"] is None:
        return "(one per data set)"
    return f"[{estimate['low']:{sign}.2f}, {estimate['high']:{sign}.2f}]"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns padded to their widest cell: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    out = []
    for row in rows:
        name, *numbers = row
        cells = [name.ljust(widths[0]), *(n.rjust(w) for n, w in zip(numbers, widths[1:], strict=True))]
        out.append("  ".join(cells).rstrip())
    out.insert(1, "  ".join("-" * w for w in widths))
    return out


def comparable(record: Mapping[str, Any]) -> str:
    """What two records must share to stand in one table: everything that decides the numbers but the method."""
    return json.dumps({k: v for k, v in record["identity"].items() if k != "method"}, sort_keys=True)


def read_records(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Every finished run under ``folder``, by method and budget.

    Raises:
        InputError: no run there; a record that is not JSON or of another schema.
    """
    found = [(path.parent, read_record(path)) for path in sorted(folder.rglob(RECORD))]
    if not found:
        raise InputError("RESULTS", folder, f"holds no {RECORD}; `kvbench run results_dir={folder}` makes some")
    return sorted(found, key=lambda pair: (pair[1]["method"], pair[1]["budget"] or 0))


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables of every run under a folder; exit status 2 where there is none."""
    parser = argparse.ArgumentParser(prog="python -m kvbench.runners.report", description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path, help="a results folder, or any folder below it")
    args = parser.parse_args(argv)
    try:
        found = read_records(args.results)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    tables: dict[str, list[tuple[Path, dict[str, Any]]]] = {}
    for path, record in found:
        tables.setdefault(comparable(record), []).append((path, record))
    for together in tables.values():
        print(closing_table([r for _, r in together], [str(p) for p, _ in together]), end="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
