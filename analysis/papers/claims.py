"""Published figures of speed and memory, and the runs that answer them.

The claims are facts from the papers, one a line in ``data/efficiency.csv``, each with where it stands, on what it was
measured, and which of our runs answers it. Most are ratios to the full cache. A time says something of another machine
only where the cards are alike, so each figure is compared only where what it depends on is.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.resources import files
from typing import Any

from ..load import Run, flat


@dataclass(frozen=True)
class Claim:
    """One line of ``data/efficiency.csv``.

    Attributes:
        paper, claim, published, unit, published_on, source: what is claimed, of what hardware and model, and where.
        model, task, batch_size, memory_limit_gib: of the runs that answer it; an empty batch size: a search for it.
        method, settings: label of the method's run, and ``part.key=value`` of its identity where labels do not tell.
        against, against_settings: the same of the run it is compared with, if any.
        metric: path into a record; ``a / b`` divides two.
        compare: ``method``, ``method / against``, ``against / method`` or ``percent less``.
        differs: in which our runs differ from the paper's on any machine.
        part: of ``experiment=gpu_campaign``, which makes the runs: those of ``campaign=PART-...``.
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
    differs: str
    part: str

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
        return has_settings(record, settings)

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

    def differences(self, record: Mapping[str, Any]) -> list[str]:
        """In which the run differs from the paper's: :attr:`differs`, and the hardware where the figure depends on it.

        Bytes of the cache are the same anywhere, what fits into a memory limit is the same on any GPU, and times are
        comparable on the same kind of card only.
        """
        found = self.differs.split("; ") if self.differs else []
        hardware = record["identity"]["hardware"]
        gpu, card = hardware.get("gpu"), self.published_on.partition(";")[0]
        kind = card.partition("-")[0]  # A100 of A100-80GB
        if self.metric.startswith("metrics."):
            if gpu is None or re.search(rf"\b{re.escape(kind)}\b", gpu, re.IGNORECASE) is None:
                found.append(f"hardware: {gpu or hardware.get('cpu')}, not {card}")
        elif not self.metric.startswith("bytes.") and gpu is None:
            found.append(f"hardware: {hardware.get('cpu')}, not a GPU")
        return found


def claims() -> list[Claim]:
    """Every published figure of speed and memory that we know how to answer."""
    text = (files("kvbench.analysis") / "papers" / "data" / "efficiency.csv").read_text(encoding="utf-8")
    return [Claim.from_row(row) for row in csv.DictReader(text.splitlines())]


def has_settings(record: Mapping[str, Any], settings: str) -> bool:
    """Whether a run's method has these ``part.key=value``, or ``key=value`` of any part, in its identity."""
    have = {(f".{key}", str(value)) for key, value in flat(record["identity"]["method"]).items()}
    wanted = [setting.partition("=") for setting in settings.split()]
    return all(any(key.endswith(f".{name}") and own == value for key, own in have) for name, _, value in wanted)


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


def answers(claim: Claim, runs: Sequence[Run]) -> list[tuple[Run, float]]:
    """(run of the method, our figure), one for each kind of hardware."""
    out = []
    for run in runs:
        if run.record["kind"] != "efficiency" or not claim.answered_by(run.record, claim.method, claim.settings):
            continue
        against = None
        if claim.against:
            same = [
                r
                for r in runs
                if r.record["kind"] == "efficiency"
                and claim.answered_by(r.record, claim.against, claim.against_settings)
                and _beside(r.record, run.record)
            ]
            if len(same) != 1:  # none, or runs that the claim does not tell apart
                continue
            against = same[0].record
        value = claim.ours(run.record, against)
        if value is not None:
            out.append((run, value))
    return out


def device(run: Run) -> str:
    """The hardware of a timed run, with the part of its memory that a search was given."""
    hardware = run.record["identity"]["hardware"]
    limit = (run.record.get("search") or {}).get("limit_bytes")
    name = str(hardware["gpu"] or hardware["cpu"])
    return name if limit is None else f"{name}, {limit / 2**30:.4g} GiB of it"


def _beside(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two runs differ in their method alone (and the weights that it brings)."""
    keys = (a["identity"].keys() | b["identity"].keys()) - {"method", "model"}
    return all(a["identity"].get(k) == b["identity"].get(k) for k in keys)
