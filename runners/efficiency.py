"""Speed and memory of a method on a workload, beside the full cache on the same one.

Definitions (vLLM's and MLPerf's, so that numbers can be compared):

* TTFT: a batch is handed over -> its first token is out; prefill and compression are in it.
* TPOT: (latency - TTFT) / (output tokens - 1).
* decode throughput: output tokens without the first / decode time. Output throughput: output tokens / latency. Total
  throughput: (prompt + output tokens) / latency. Pads and tokens beyond a request's own length do not count.
* step: the time of one decode step by itself; its percentiles are over all steps of all repetitions.
* MBU: the time a decode step takes at least, which is (weights + KV) / copy bandwidth, over the time it took.

Time, memory and energy are measured in separate passes (``passes.py``), each in a process of its own.

A search (``task=max_batch``, ``task=max_context``) first finds the largest size that fits and is then measured at it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..conf.errors import InputError, is_whole, require
from ..methods.cache.method import Method
from ..models.base import ModelSource
from ..tasks.workload import Search, Workload
from . import provenance
from .compiled import ROWS
from .fresh import Killed, in_fresh_process
from .measure import EnergyMeter, is_out_of_memory, malloc_trim_env, one_at_a_time
from .passes import QUIET, Job, energy_pass, memory_pass, spread, time_pass
from .runs import MethodRun, PairedRunner, finished_baseline, open_run, record_head, run_with_locks
from .search import SearchJob, search
from .settings import Settings

GIB = 2**30
TRIED = "tried.jsonl"
"""In the folder of a run that searches, until it is done: sizes that were tried."""
LESS = 0.02
"""Share by which a size is made smaller when it was found to fit and then did not."""
THROUGHPUT = ("output_tokens_per_s", "total_tokens_per_s")


@dataclass
class EfficiencyRunner(PairedRunner):
    """``runner=efficiency``; every method and budget is measured by itself, one after another.

    Attributes:
        warmups: repetitions that are dropped.
        repeats: repetitions that are recorded, all of them.
        memory_limit_gib: what a search may take, by the device's allocator or by the whole process; None: all that
            there is.
        cuda_graph: record a decode step and play it again where shapes allow it, on CUDA.
        compile: have torch.compile make the decode steps, on a CPU and for a row or two (:mod:`.compiled`).
    """

    warmups: int = 1
    repeats: int = 5
    memory_limit_gib: float | None = None
    cuda_graph: bool = True
    compile: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        at = "runner."
        for key, least in (("warmups", 0), ("repeats", 1)):
            value = getattr(self, key)
            require(is_whole(value, least), at + key, value, f"must be a whole number >= {least}")
        for key in ("cuda_graph", "compile"):
            value = getattr(self, key)
            require(isinstance(value, bool), at + key, value, "must be true or false")
        limit = self.memory_limit_gib
        ok = limit is None or (isinstance(limit, int | float) and limit is not True and 0 < limit < float("inf"))
        require(ok, at + "memory_limit_gib", limit, "must be a number above 0, or null")

    def run(
        self,
        source: ModelSource,
        methods: Sequence[Method],
        task: Workload | Search,
        settings: Settings,
        say: Callable[[str], None],
    ) -> list[MethodRun]:
        """Measure every method and write one record each.

        Args:
            source: where the model comes from; random weights will do.
            methods: the methods asked for first, then those they are paired with.
            task: the requests.
            settings: the top-level configuration.
            say: prints a line for the person at the keyboard.

        Returns:
            The runs, in the order of ``methods``, all with a record (``done`` or ``oom``).
        """
        if not isinstance(task, Workload | Search):
            name = getattr(task, "name", "longbench")
            raise InputError("task", name, "is scored, not timed: use task=shape or task=sharegpt, or runner=accuracy")
        searches = isinstance(task, Search)
        if self.memory_limit_gib is not None and not searches:
            raise InputError("runner.memory_limit_gib", self.memory_limit_gib, "is for task=max_batch and max_context")
        if self.compile and (settings.torch_device != "cpu" or searches or settings.batch_size > ROWS):
            limits = f"device=cpu, task=shape or task=sharegpt, and batch_size of at most {ROWS}"
            raise InputError("runner.compile", True, f"is for {limits}")
        data = task.source()
        say(f"workload: {data.name}")
        made_by = provenance.collect(settings.torch_device)
        hardware = made_by["hardware"]
        further = {
            "batch_size": None if isinstance(task, Search) and task.what == "batch_size" else settings.batch_size,
            "hardware": {k: hardware.get(k) for k in ("cpu", "gpu", "torch_threads", "preloaded")},
            "runner": {
                "warmups": self.warmups,
                "repeats": self.repeats,
                "chunk_size": self.chunk_size,
                "cuda_graph": self.cuda_graph,
                **({"compile": True} if self.compile else {}),
                **({"memory_limit_gib": self.memory_limit_gib} if searches else {}),
            },
            # A time is that of some code: after a change the baseline is measured again with the rest.
            "code": provenance.code_id(made_by["git"]),
            "torch": made_by["packages"].get("torch"),
        }
        runs = [
            MethodRun(m, open_run("efficiency", m, s, data, task.identity(), settings, **further), s)
            for m, s in ((m, source.for_sharing(m.sharing, m.name)) for m in methods)
        ]

        def work(mine: list[MethodRun]) -> None:
            for run in mine:
                if run.folder.done:
                    say(f"{run.method.label}: already done, in {run.folder.path}")
                    continue
                with one_at_a_time(settings.torch_device, say):
                    say(f"{run.method.label}: {self.warmups} + {self.repeats} timed repetitions, then memory")
                    load = os.getloadavg()[0]
                    status, results = self._measure(run, task, settings)
                head = record_head(status, run.folder, run.method, data, settings)
                run.folder.finish({**head, "provenance": made_by, "load_average_before": load, **results})

        run_with_locks(runs, work, say)
        _pair(runs)
        return runs

    def _measure(self, run: MethodRun, task: Workload | Search, settings: Settings) -> tuple[str, dict[str, Any]]:
        """(status, fields of the record)."""
        job = Job(
            run.source,
            run.method,
            task if isinstance(task, Workload) else None,
            settings.torch_device,
            settings.torch_dtype,
            settings.seed,
            settings.batch_size,
            self.chunk_size,
            self.warmups,
            self.repeats,
            self.cuda_graph,
            self.compile,
        )
        try:
            if isinstance(task, Search):
                return self._measure_largest(job, task, run.folder.path / TRIED)
            return "done", _passes(job)
        except Exception as error:
            if not _no_memory(error):
                raise
            problem = str(error).splitlines()[0]
            print(f"{run.method.label}: out of memory: {problem}", file=sys.stderr)
            return "oom", {"problem": problem}

    def _measure_largest(self, job: Job, task: Search, log: Path) -> tuple[str, dict[str, Any]]:
        limit = None if self.memory_limit_gib is None else int(self.memory_limit_gib * GIB)
        found = search(SearchJob(job, task, limit, log))
        if found["largest"] is None:
            log.unlink()  # what is found stands in the record; a search that is asked for again begins anew
            problem = f"not even {task.what}={task.step} fits"
            return "oom", {"problem": problem, "search": found}
        value = found["largest"]
        while True:  # what fits by a hair when memory is measured may not when time is
            workload, batch_size = task.at(value, job.batch_size)
            try:
                results = _passes(replace(job, workload=workload, batch_size=batch_size))
            except Exception as error:
                smaller = (value - max(task.step, int(LESS * value))) // task.step * task.step
                if not _no_memory(error) or smaller < 0.8 * found["largest"] or smaller < task.step:
                    raise
                value = smaller
            else:
                break
        log.unlink()
        return "done", {**results, "batch_size": batch_size, "search": {**found, "measured_at": value}}


def _passes(job: Job) -> dict[str, Any]:
    """Time, memory and energy of a workload, and what the times mean."""
    times = in_fresh_process(time_pass, job, QUIET)
    memory = in_fresh_process(memory_pass, job, QUIET | (malloc_trim_env() if job.device == "cpu" else {}))
    # No process for what is known to be impossible; only CUDA's counter needs a look at the device.
    problem = EnergyMeter(job.device).problem if job.device == "cpu" else None
    try:
        energy = {"energy": {"problem": problem}} if problem else in_fresh_process(energy_pass, job, QUIET)
    except Exception as error:  # time and memory have been measured
        if not _no_memory(error):
            raise
        energy = {"energy": {"problem": "out of memory when energy was measured"}}
    return {**times, **memory, **energy, **_against_the_limit(times)}


def _no_memory(error: Exception) -> bool:
    return isinstance(error, Killed) or is_out_of_memory(error)


# what the numbers mean ----------------------------------------------------------------------------------------------


def _against_the_limit(times: dict[str, Any]) -> dict[str, Any]:
    """How near a decode step came to the time that reading the weights and the cache once takes."""
    read = times["bytes_read_per_step"]
    bandwidth = times["bandwidth"]["copy_bytes_per_s"]
    floor_ms = None if bandwidth is None else 1e3 * read / bandwidth
    tpots = times["metrics"]["tpot_ms"]["repetitions"]
    return {
        "limit": {
            "bytes_read_per_step": read,
            "tpot_ms_floor": floor_ms,
            "mbu": None if floor_ms is None else spread([floor_ms / t for t in tpots]),
        }
    }


def _pair(runs: Sequence[MethodRun]) -> None:
    """Add to every record what its method gains over the full cache: by its bytes, and as measured."""
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
    """At equal requests: times and bytes; of a search, whose requests differ, the sizes and the throughput at each."""
    if "search" in record:
        return {
            "largest_ratio": record["search"]["measured_at"] / full["search"]["measured_at"],
            **{
                f"{name}_ratio": record["metrics"][name]["median"] / full["metrics"][name]["median"]
                for name in THROUGHPUT
            },
        }
    return {
        "decode_speed_up_by_bytes": full["limit"]["bytes_read_per_step"] / record["limit"]["bytes_read_per_step"],
        "decode_speed_up": full["metrics"]["tpot_ms"]["median"] / record["metrics"]["tpot_ms"]["median"],
        "prefill_slow_down": record["metrics"]["ttft_ms"]["median"] / full["metrics"]["ttft_ms"]["median"],
        "kv_bytes_saved_end": full["bytes"]["kv_bytes_stored_end"] - record["bytes"]["kv_bytes_stored_end"],
        "peak_decode_bytes_saved": _peak_saved(full, record, "peak_decode"),
        "peak_prefill_bytes_saved": _peak_saved(full, record, "peak_prefill"),
    }


def _peak_saved(full: dict[str, Any], record: dict[str, Any], phase: str) -> int | None:
    """Bytes; None where a machine cannot measure the peak."""
    if full["memory"][phase] is None or record["memory"][phase] is None:
        return None
    return full["memory"][phase]["allocated"] - record["memory"][phase]["allocated"]
