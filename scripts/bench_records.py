"""Time and memory of `kvbench table` on a large results folder: copies of a committed run, each with its own identity.

    python scripts/bench_records.py --runs 100000

Prints a line for the first reading, which checks every file and writes the index, and one for the second, which reads
the index. The copies (33 kB a run) are in a temporary folder, and so is the index.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from kvbench.analysis.load import read_runs
from kvbench.analysis.schema import RECORD, SAMPLES, identity_hash

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "results/reference/methods_longbench/longbench-subset/smollm2-135m"
RUNS_OF_A_TABLE = 50
READ_FIELDS = ("dataset", "id", "score", "new_tokens")
"""Fields of a sample that the analysis reads; the copies have no others."""


def main() -> None:
    """Make the copies and read them twice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = time.perf_counter()
        make_runs(folder / "results", args.runs)
        print(f"{args.runs} runs made in {time.perf_counter() - start:.0f} s", flush=True)
        for reading in ("first", "second"):
            seconds, cpu_seconds, peak = measure(folder)
            print(f"{reading} reading: {seconds:.1f} s ({cpu_seconds:.1f} s CPU), {peak / 2**30:.2f} GiB", flush=True)
        size = sum(path.stat().st_size for path in (folder / "cache").rglob("*") if path.is_file())
        print(f"index: {size / 2**20:.0f} MiB")


def make_runs(folder: Path, count: int) -> None:
    """Write the copies: methods that differ in their budget, on models that differ in their name."""
    source = sorted(SOURCE.glob("snapkv/*/record.json"))[0].parent
    (run,) = read_runs([source])  # with today's intervals, as a run would write them now
    record = {**json.loads((source / RECORD).read_text(encoding="utf-8")), **run.record}
    paired = record.pop("paired")
    record["paired"] = {**paired, "difference": {**paired["difference"], "method": "t", "reason": ""}}
    lines = (source / SAMPLES).read_text(encoding="utf-8").split("\n")[:-1]
    samples = "".join(json.dumps({k: json.loads(line)[k] for k in READ_FIELDS}) + "\n" for line in lines)
    for number in range(count):
        copy = with_identity(record, f"model-{number // RUNS_OF_A_TABLE}", 1 + number % RUNS_OF_A_TABLE)
        path = folder / copy["task"] / copy["model"] / "snapkv" / copy["hash"]
        path.mkdir(parents=True)
        (path / RECORD).write_text(json.dumps(copy), encoding="utf-8")
        (path / SAMPLES).write_text(samples, encoding="utf-8")


def with_identity(record: dict[str, Any], model: str, budget: int) -> dict[str, Any]:
    """The record of another run with the same numbers."""
    identity = record["identity"]
    selection = {**identity["method"]["selection"], "budget": budget}
    identity = {
        **identity,
        "model": {**identity["model"], "name": model},
        "method": {**identity["method"], "selection": selection},
    }
    own = {"identity": identity, "hash": identity_hash(identity), "model": model, "budget": budget}
    return {**record, **own, "method_label": f"snapkv {budget}"}


def measure(folder: Path) -> tuple[float, float, int]:
    """Elapsed seconds, CPU seconds of all processes and peak bytes of the largest, for a page of all tables."""
    command = [sys.executable, "-m", "kvbench.analysis.tables", str(folder / "results"), "-o", str(folder / "out.md")]
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
    start = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"kvbench table ended with status {os.waitstatus_to_exitcode(status)}")
    return time.perf_counter() - start, used.ru_utime + used.ru_stime, 1024 * used.ru_maxrss


if __name__ == "__main__":
    main()
