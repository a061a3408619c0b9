"""Published figures of speed and memory beside ours: what a paper claims, what a run here gave, and a plain verdict.

    kvbench table RESULTS --published

The claims are facts from the papers, one a line in ``claims/efficiency.csv``, each with where it stands, on what it was
measured, and which of our runs answers it. A claim is about another machine and, mostly, another baseline: the ratio of
a method to the full cache travels better than a time does, so most claims are ratios.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.resources import files
from typing import Any

from .load import Run, flat
from .tables import Cell, Table, different_layers

REACHED = 0.9
"""Share of a published figure from which on ours counts as reaching it: runs spread, and machines differ."""


@dataclass(frozen=True)
class Claim:
    """One line of ``claims/efficiency.csv``.

    Attributes:
        paper, claim, published, unit, published_on, source: what is claimed, of what hardware and model, and where.
        model, task, batch_size, memory_limit_gib: of the runs that answer it; an empty batch size: a search for it.
        method, settings: label of the method's run, and ``part.key=value`` of its identity where labels do not tell.
        against, against_settings: the same of the run it is compared with, if any.
        metric: path into a record; ``a / b`` divides two.
        compare: ``method``, ``method / against``, ``against / method`` or ``percent less``.
    """

    paper: str
    claim: str
    published: float
    unit: str
    published_on: str
    source: str
    model: str
    task: str
    batch_size: int | None
    memory_limit_gib: float | None
    method: str
    settings: str
    against: str
    against_settings: str
    metric: str
    compare: str

    @classmethod
    def from_row(cls, row: Mapping[str, str]) -> Claim:
        """A claim of a line of the file."""
        values: dict[str, Any] = {f.name: row[f.name] for f in fields(cls)}
        values["published"] = float(row["published"])
        values["batch_size"] = int(row["batch_size"]) if row["batch_size"] else None
        values["memory_limit_gib"] = float(row["memory_limit_gib"]) if row["memory_limit_gib"] else None
        return cls(**values)

    def answered_by(self, record: Mapping[str, Any], label: str, settings: str = "") -> bool:
        """Whether ``record`` is the run of a method with this label under the claim's circumstances."""
        identity = record["identity"]
        where = (record["model"], record["task"], identity.get("batch_size"), record["method_label"])
        if identity["runner"].get("memory_limit_gib") != self.memory_limit_gib:
            return False
        if record["status"] != "done" or where != (self.model, self.task, self.batch_size, label):
            return False
        have = {key: str(value) for key, value in flat(identity["method"]).items()}
        return all(have.get(key) == value for key, _, value in (s.partition("=") for s in settings.split()))

    def ours(self, method: Mapping[str, Any], against: Mapping[str, Any] | None) -> float | None:
        """Our figure; None where a record lacks the number."""
        mine = number(method, self.metric)
        if self.compare == "method":
            return mine
        theirs = None if against is None else number(against, self.metric)
        if not mine or not theirs:
            return None
        if self.compare == "percent less":
            return 100 * (1 - mine / theirs)
        return mine / theirs if self.compare == "method / against" else theirs / mine


def claims() -> list[Claim]:
    """Every published figure that we know how to answer."""
    text = (files("kvbench.analysis") / "claims" / "efficiency.csv").read_text(encoding="utf-8")
    return [Claim.from_row(row) for row in csv.DictReader(text.splitlines())]


def number(record: Mapping[str, Any], path: str) -> float | None:
    """The number at a dotted path (``metrics.tpot_ms.median``), or the quotient of two; None where there is none."""
    parts = []
    for one in path.split(" / "):
        value: Any = record
        for key in one.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        parts.append(value)
    if any(part is None for part in parts):
        return None
    return float(parts[0]) if len(parts) == 1 else parts[0] / parts[1]


def published_table(runs: Sequence[Run]) -> Table:
    """Every claim, with ours where the runs for it are there, on each kind of hardware that has them."""
    rows: list[list[Cell]] = []
    used: list[Run] = []
    timed = [run for run in runs if run.record["kind"] == "efficiency"]
    for claim in claims():
        head = [Cell(claim.paper), Cell(claim.claim), Cell(f"{claim.published:g} {claim.unit}", claim.published)]
        head.append(Cell(claim.published_on))
        found = list(_answers(claim, timed))
        for run, value in found:
            share = value / claim.published
            verdict = "reached" if share >= REACHED else "not reached"
            ours = [Cell(f"{value:.3g} {claim.unit}" if value < 1000 else f"{value:,.0f} {claim.unit}", value)]
            rows.append([*head, *ours, Cell(_device(run)), Cell(f"{share:.2f}", share), Cell(verdict)])
            used.append(run)
        if not found:
            rows.append([*head, Cell("-"), Cell("-"), Cell("-"), Cell("not run")])
    columns = ["paper", "claim", "published", "on", "ours", "device", "ours / published", "verdict"]
    table = Table("Published figures of speed and memory, and ours", columns, rows, used)
    table.notes.append(f"reached: at least {REACHED:g} of the published figure; random weights of the same shape.")
    table.notes += different_layers(used)
    if not used:
        table.notes.append("None of these runs is here: scripts/campaign_gpu.sh makes them.")
    return table


def _answers(claim: Claim, runs: Sequence[Run]) -> list[tuple[Run, float]]:
    """(run of the method, our figure), one for each kind of hardware."""
    out = []
    for run in runs:
        if not claim.answered_by(run.record, claim.method, claim.settings):
            continue
        against = None
        if claim.against:
            same = [
                r
                for r in runs
                if claim.answered_by(r.record, claim.against, claim.against_settings) and _beside(r.record, run.record)
            ]
            if len(same) != 1:  # none, or runs that the claim does not tell apart
                continue
            against = same[0].record
        value = claim.ours(run.record, against)
        if value is not None:
            out.append((run, value))
    return out


def _beside(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two runs differ in their method alone (and the weights that it brings)."""
    keys = (a["identity"].keys() | b["identity"].keys()) - {"method", "model"}
    return all(a["identity"].get(k) == b["identity"].get(k) for k in keys)


def _device(run: Run) -> str:
    hardware = run.record["identity"]["hardware"]
    limit = (run.record.get("search") or {}).get("limit_bytes")
    name = str(hardware["gpu"] or hardware["cpu"])
    return name if limit is None else f"{name}, {limit / 2**30:.4g} GiB of it"
