"""The closing table of a run, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def closing_table(records: Sequence[Mapping[str, Any]], paths: Sequence[str]) -> str:
    """Score, full-cache score, paired difference and bytes of every record of one run, and where each lies."""
    full = next((r for r in records if r["method"] == "full"), None)
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
    if first["task"].endswith("-mini"):
        parts.append("These are scores on the small bundled set, not LongBench scores.")
    if examples < 30:
        parts.append(
            f"{examples} examples say little: the intervals above are wide. Drop task.limit for the whole set."
        )
    parts += [f"record: {path}" for path in paths]
    return "\n".join(parts)


def _interval(estimate: Mapping[str, Any], sign: str = "") -> str:
    if estimate["low"] is None:
        return "(one example)"
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
