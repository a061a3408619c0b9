"""Speed and memory of a method on a workload, compared with the full cache on the same one.

Definitions (vLLM's and MLPerf's, so that numbers can be compared):

* TTFT: time from handing over a batch to its first token; includes prefill and compression.
* TPOT: (latency - TTFT) / (output tokens - 1).
* decode throughput: output tokens without the first / decode time. Output throughput: output tokens / latency. Total
  throughput: (prompt + output tokens) / latency. Padding and tokens beyond a request's own length do not count.
* step: time of one decode step; its percentiles are over all steps of all repetitions.
* MBU: lower bound of a decode step's time, (weights + KV) / copy bandwidth, divided by its measured time.

Time, memory and energy are measured in separate passes (``measure/``), each in its own process.

A search (``workload=max_batch`` or ``max_context``) first finds the largest size that fits and is then measured at it.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..analysis.stats import ratio
from ..conf.errors import InputError
from ..conf.options import NonNegativeInt, PositiveFloat, PositiveInt
from ..methods.cache.method import Method
from ..models.base import ModelSource
from ..tasks.base import Described
from ..tasks.workload import Search, Workload
from .config.settings import Settings
from .engine.compiled import MAX_ROWS
from .measure.energy import EnergyMeter
from .measure.energy_pass import energy_pass
from .measure.fresh import Killed, in_forked_process
from .measure.job import Job
from .measure.lock import measurement_lock
from .measure.memory import in_memory_process, is_out_of_memory
from .measure.memory_pass import memory_pass
from .measure.time_pass import spread, time_pass
from .progress import elapsed_since, status_line
from .records import provenance
from .records.runs import MethodRun, announce_needs, finished_baseline, open_run, record_head, run_with_locks
from .runner import PairedRunner
from .search import SearchJob, search

log = logging.getLogger(__name__)

GIB = 2**30
TRIED_SIZES = "tried.jsonl"
"""File of the sizes that a search has tried, in its run's folder until it is done."""
SIZE_REDUCTION = 0.02
"""Share by which a size is reduced that fitted in the search and then does not fit when it is measured."""
THROUGHPUT = ("output_tokens_per_s", "total_tokens_per_s")


@dataclass
class EfficiencyRunner(PairedRunner):
    """``runner=efficiency``; every method and budget is measured in its own processes, one after another.

    Attributes:
        warmups: Number of repetitions that are not recorded.
        repeats: Number of repetitions that are recorded.
        memory_limit_gib: Memory that a search may use, in the device's allocator or in the whole process; None: all
            available memory.
        cuda_graph: Capture a decode step as a CUDA graph and replay it, if its shapes are static.
        compile: Compile the decode steps with torch.compile; on a CPU, for one or two rows (:mod:`.engine.compiled`).
    """

    warmups: NonNegativeInt = 1
    repeats: PositiveInt = 5
    memory_limit_gib: PositiveFloat | None = None
    cuda_graph: bool = True
    compile: bool = False

    def data_group(self) -> str:
        """See :meth:`.runner.Runner.data_group`."""
        return "workload"

    def run(
        self, source: ModelSource, methods: Sequence[Method], task: Described, settings: Settings
    ) -> list[MethodRun]:
        """Measure every method and write one record each.

        Args:
            source: Where the model comes from; random weights are allowed.
            methods: The requested methods, then those they are paired with.
            task: The requests.
            settings: The top-level configuration.

        Returns:
            The runs, in the order of ``methods``, all with a record (``done`` or ``oom``).
        """
        task = self._checked(task, settings)
        announce_needs(methods)
        data = task.source()
        log.info(f"workload: {data.name}")
        made_by = provenance.collect(settings.torch_device)
        conditions = self._conditions(task, settings, made_by)
        sources = [source.for_sharing(m.sharing, m.name) for m in methods]
        runs = [
            MethodRun(m, open_run("efficiency", m, s, data, task.identity(), settings, **conditions), s)
            for m, s in zip(methods, sources, strict=True)
        ]

        def work(locked: list[MethodRun]) -> None:
            for run in locked:
                if run.folder.done:
                    log.info(f"{run.method.label}: already done, in {run.folder.path}")
                    continue
                with measurement_lock(settings.torch_device):
                    log.info(f"{run.method.label}: {self.warmups} + {self.repeats} timed repetitions, then memory")
                    load = os.getloadavg()[0]
                    show = partial(elapsed_since, time.monotonic(), f"measuring {run.method.label}")
                    with status_line(show):
                        status, results = self._measure(run, task, settings)
                head = record_head(status, run.folder, run.method, data, settings)
                run.folder.finish({**head, "provenance": made_by, "load_average_before": load, **results})

        run_with_locks(runs, work)
        _pair(runs)
        return runs

    def _checked(self, task: Described, settings: Settings) -> Workload | Search:
        """The task, if it can be measured with these options; otherwise InputError."""
        if not isinstance(task, Workload | Search):
            raise InputError("task", task.name, "is scored, not timed: use workload=shape, or runner=accuracy")
        searches = isinstance(task, Search)
        if self.memory_limit_gib is not None and not searches:
            allowed = "is for workload=max_batch and max_context"
            raise InputError("runner.memory_limit_gib", self.memory_limit_gib, allowed)
        if self.compile and (settings.torch_device != "cpu" or searches or settings.batch_size > MAX_ROWS):
            limits = f"device=cpu, workload=shape or workload=sharegpt, and batch_size of at most {MAX_ROWS}"
            raise InputError("runner.compile", True, f"is for {limits}")
        return task

    def _conditions(self, task: Workload | Search, settings: Settings, made_by: dict[str, Any]) -> dict[str, Any]:
        """The part of a run's identity that decides its times: batch size, machine, options and code."""
        searches, hardware = isinstance(task, Search), made_by["hardware"]
        return {
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
            # Times are those of one version of the code: after a change the baseline is measured again too.
            "code": provenance.code_id(made_by["git"]),
            "torch": made_by["packages"].get("torch"),
        }

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
                return self._measure_largest(job, task, run.folder.path / TRIED_SIZES)
            return "done", _passes(job)
        except Exception as error:
            if not _is_memory_failure(error):
                raise
            problem = str(error).splitlines()[0]
            log.warning(f"{run.method.label}: out of memory: {problem}")
            return "oom", {"problem": problem}

    def _measure_largest(self, job: Job, task: Search, log: Path) -> tuple[str, dict[str, Any]]:
        limit = None if self.memory_limit_gib is None else int(self.memory_limit_gib * GIB)
        result = search(SearchJob(job, task, limit, log))
        if result["largest"] is None:
            log.unlink()  # the result is in the record; a repeated search starts from the beginning
            problem = f"not even {task.what}={task.step} fits"
            return "oom", {"problem": problem, "search": result}
        value = result["largest"]
        while True:  # a size that just fits when memory is measured may not fit when time is measured
            workload, batch_size = task.at(value, job.batch_size)
            try:
                results = _passes(replace(job, workload=workload, batch_size=batch_size))
            except Exception as error:
                smaller = (value - max(task.step, int(SIZE_REDUCTION * value))) // task.step * task.step
                if not _is_memory_failure(error) or smaller < 0.8 * result["largest"] or smaller < task.step:
                    raise
                value = smaller
            else:
                break
        log.unlink()
        return "done", {**results, "batch_size": batch_size, "search": {**result, "measured_at": value}}


def _passes(job: Job) -> dict[str, Any]:
    """Time, memory and energy of a workload, and the times relative to their lower bound."""
    times = in_forked_process(time_pass, job)
    memory = in_memory_process(memory_pass, job, job.device)
    # No process if it is known that there is no counter; only CUDA's counter needs the device.
    problem = EnergyMeter(job.device).problem if job.device == "cpu" else None
    try:
        energy = {"energy": {"problem": problem}} if problem else in_forked_process(energy_pass, job)
    except Exception as error:  # time and memory have been measured
        if not _is_memory_failure(error):
            raise
        energy = {"energy": {"problem": "out of memory when energy was measured"}}
    return {**times, **memory, **energy, **_limit(times)}


def _is_memory_failure(error: Exception) -> bool:
    return isinstance(error, Killed) or is_out_of_memory(error)


def _limit(times: dict[str, Any]) -> dict[str, Any]:
    """Lower bound of a decode step's time (reading the weights and the cache once), and how close the steps are."""
    bytes_read = times["bytes_read_per_step"]
    bandwidth = times["bandwidth"]["copy_bytes_per_s"]
    floor_ms = None if bandwidth is None else 1e3 * bytes_read / bandwidth
    tpots = times["metrics"]["tpot_ms"]["repetitions"]
    return {
        "limit": {
            "bytes_read_per_step": bytes_read,
            "tpot_ms_floor": floor_ms,
            "mbu": None if floor_ms is None else spread([floor_ms / t for t in tpots]),
        }
    }


def _pair(runs: Sequence[MethodRun]) -> None:
    """Add the gains over the full cache to every record: by bytes read, and as measured."""
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
    """Gains in time and bytes at equal requests; for a search, whose requests differ, ratios of size and throughput."""
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
        "decode_speed_up_interval": asdict(
            ratio(_repetitions(full, "tpot_ms"), _repetitions(record, "tpot_ms"), paired=False)
        ),
        "prefill_slow_down": record["metrics"]["ttft_ms"]["median"] / full["metrics"]["ttft_ms"]["median"],
        "kv_bytes_saved_end": full["bytes"]["kv_bytes_stored_end"] - record["bytes"]["kv_bytes_stored_end"],
        "peak_decode_bytes_saved": _peak_saved(full, record, "peak_decode"),
        "peak_prefill_bytes_saved": _peak_saved(full, record, "peak_prefill"),
    }


def _repetitions(record: dict[str, Any], name: str) -> list[float]:
    values: list[float] = record["metrics"][name]["repetitions"]
    return values


def _peak_saved(full: dict[str, Any], record: dict[str, Any], phase: str) -> int | None:
    """Bytes saved in the peak of one phase; None if the machine cannot measure the peak."""
    if full["memory"][phase] is None or record["memory"][phase] is None:
        return None
    return full["memory"][phase]["allocated"] - record["memory"][phase]["allocated"]
