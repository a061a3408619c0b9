"""Speed goals of the methods on one CUDA GPU of 80 GB: the runs that they need, and which goals are met.

    python scripts/gpu_goals.py [RESULTS]            run what has no record yet, then print the goals
    python scripts/gpu_goals.py --table RESULTS...   print the goals from records

Random weights of Llama-2-7B's shape in bfloat16. Exit status: 0 all met, 1 one is missed or not run.
``python scripts/gpu_check.py kernels`` has the share of bandwidth of each storage's kernel.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = dict[str, Any]
Records = dict[str, Record]
"""Records of one task by their names (:func:`name_of`)."""

SHORT, LONG, SNAPKV, SEARCH = "shape-16384+128", "shape-32768+128", "shape-16384+512", "max_context+16"
GENERATE = ("transformers dynamic", "transformers static")
SNAPKV_FAMILY = ("snapkv 2048", "pyramidkv 2048", "ada_kv 2048")
RUNS = (
    ["experiment=gpu_smoke", "workload.prompt_tokens=16384", "workload.new_tokens=128", "runner.budgets=[2048]"],
    ["experiment=gpu_campaign", "campaign=kivi-32k"],
    [
        "experiment=gpu_campaign",
        "campaign=snapkv-16k",
        "runner.pair_with=[full,transformers,{method: transformers, cache: static}]",
    ],
    ["experiment=gpu_campaign", "campaign=context-batch2"],
)


@dataclass(frozen=True)
class Goal:
    """A bound on a number of a run.

    Attributes:
        name: What it is about.
        value: The number; None: not run.
        bound: Largest value that meets the goal, or the smallest if ``at_least``.
        at_least: Whether larger is better.
    """

    name: str
    value: float | None
    bound: float
    at_least: bool = False

    @property
    def verdict(self) -> str:
        """``met``, ``missed`` or ``not run``."""
        if self.value is None:
            return "not run"
        return "met" if (self.value >= self.bound if self.at_least else self.value <= self.bound) else "missed"


def name_of(record: Record) -> str:
    """Label of a method; StreamingLLM's label does not tell its modes apart."""
    mode = record["identity"]["method"].get("selection", {}).get("mode")
    return str(record["method_label"]) + (" prefill_evict" if mode == "prefill_evict" else "")


def tpot(record: Record) -> float:
    """Median time per output token, in ms."""
    return float(record["metrics"]["tpot_ms"]["median"])


def prefill_ratio(record: Record) -> float:
    """TTFT over the full cache's, of repetitions in turn."""
    return float(record["paired"]["prefill_slow_down"])


def of(records: Records, labels: str | tuple[str, ...], number: Callable[..., float]) -> float | None:
    """``number`` of the records with these names; None if one is missing or has no such number."""
    names = (labels,) if isinstance(labels, str) else labels
    try:
        return number(*(records[name] for name in names))
    except (KeyError, TypeError):
        return None


def goals(tasks: dict[str, Records]) -> Iterator[Goal]:
    """All goals, from records by task and name."""
    short, long, snapkv, search = (tasks.get(name, {}) for name in (SHORT, LONG, SNAPKV, SEARCH))

    def ratio(one: Record, *others: Record) -> float:
        return tpot(one) / min(map(tpot, others))

    yield Goal("full at 16k: MBU", of(short, "full", lambda r: r["limit"]["mbu"]["median"]), 0.75, at_least=True)
    yield Goal("full at 16k: TPOT / generate's faster one", of(short, ("full", *GENERATE), ratio), 1.0)
    for label in sorted(short):
        if short[label].get("budget") is None:
            continue
        yield Goal(f"{label} at 16k: TPOT / full", of(short, (label, "full"), ratio), 1.0)
        yield Goal(
            f"{label} at 16k: TPOT / what its bytes allow",
            of(short, label, lambda r: r["paired"]["decode_speed_up_by_bytes"] / r["paired"]["decode_speed_up"]),
            1.15,
        )
    yield Goal("kivi4 at 32k: TPOT / full", of(long, ("kivi4", "full"), ratio), 1.0)
    for label in ("minicache", "minicache_kivi4"):
        yield Goal(f"{label} at 16k: TPOT / full", of(short, (label, "full"), ratio), 1.0)
    yield Goal("ada_kv at 16k: TPOT / snapkv", of(short, ("ada_kv 2048", "snapkv 2048"), ratio), 1.1)
    yield Goal("h2o at 16k: TTFT / full", of(short, "h2o 2048", prefill_ratio), 1.4)
    yield Goal("streaming_llm at 16k: TTFT / full", of(short, "streaming_llm 2048", prefill_ratio), 1.2)
    for label in SNAPKV_FAMILY:
        yield Goal(f"{label} at 16k: TTFT / full", of(short, label, prefill_ratio), 1.03)
    for label in ("kivi4", "kivi2", "minicache"):
        yield Goal(f"{label} at 16k: TTFT / full", of(short, label, prefill_ratio), 1.08)
    against = of(snapkv, ("snapkv 2048", *GENERATE), ratio)
    speed_up = None if against is None else 1 / against
    yield Goal("snapkv at 16k, 2 sequences: generate's TPOT / its own", speed_up, 3.6, at_least=True)
    longest = of(search, ("snapkv 2048", "full"), lambda a, b: a["search"]["measured_at"] / b["search"]["measured_at"])
    yield Goal("snapkv, longest prompt of 2 sequences on 80 GB / full", longest, 8.2, at_least=True)


def read(folders: list[str]) -> dict[str, Records]:
    """Finished records by task and name."""
    tasks: dict[str, Records] = {}
    for path in (path for folder in folders for path in sorted(Path(folder).rglob("record.json"))):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["kind"] == "efficiency" and record["status"] == "done":
            tasks.setdefault(record["task"], {})[name_of(record)] = record
    return tasks


def run_all(results: str) -> None:
    """Run everything that has no record."""
    from kvbench.runners.cli import run
    from kvbench.runners.config.loader import compose

    for overrides in RUNS:
        run(compose([*overrides, f"results_dir={results}"]))


def main() -> int:
    """Run, print the goals and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", nargs="*", default=["gpu_goals"])
    parser.add_argument("--table", action="store_true", help="print only")
    args = parser.parse_args()
    if not args.table:
        run_all(args.results[0])
    rows = list(goals(read(args.results)))
    print("| | value | goal | |\n|---|---:|---:|---|")
    for goal in rows:
        value = "" if goal.value is None else f"{goal.value:.3f}"
        print(f"| {goal.name} | {value} | {'>=' if goal.at_least else '<='} {goal.bound:g} | {goal.verdict} |")
    return int(any(goal.verdict != "met" for goal in rows))


if __name__ == "__main__":
    sys.exit(main())
