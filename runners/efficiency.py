"""Speed and memory of a method on a workload, compared with the full cache on the same one.

Definitions (vLLM's and MLPerf's, so that numbers can be compared):

* TTFT: time from handing over a batch to its first token; includes prefill and compression.
* TPOT: (latency - TTFT) / (output tokens - 1).
* decode throughput: output tokens without the first / decode time. Output throughput: output tokens / latency. Total
  throughput: (prompt + output tokens) / latency. Padding and tokens beyond a request's own length do not count.
* step: time of one decode step; its percentiles are over all steps of all repetitions.
* MBU: lower bound of a decode step's time, (weights + KV) / copy bandwidth, divided by its measured time.

Time, memory and energy are measured in separate passes (:mod:`.measure.passes`), time in turn with the full cache.

A search (``workload=max_batch`` or ``max_context``) first finds the largest size that fits and is then measured at it.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..conf.errors import InputError
from ..conf.options import NonNegativeInt, PositiveFloat, PositiveInt
from ..methods.cache.method import Method
from ..methods.storage.kernels.cpp import compiler_problem
from ..models.base import ModelSource
from ..tasks.base import Described
from ..tasks.workload import Search, Workload
from .config.settings import Settings
from .engine.compiled import MAX_ROWS
from .measure.gains import add_gains
from .measure.job import Job
from .measure.lock import measurement_lock
from .measure.passes import Passes, is_memory_failure
from .progress import elapsed_since, status_line
from .records import provenance
from .records.runs import BASELINE, MethodRun, announce_needs, open_run, record_head, run_with_locks
from .runner import PairedRunner
from .search import SearchJob, search

log = logging.getLogger(__name__)

GIB = 2**30
TRIED_SIZES = "tried.jsonl"
"""File of the sizes that a search has tried, in its run's folder until it is done."""
SIZE_REDUCTION = 0.02
"""Share by which a size is reduced that fitted in the search and then does not fit when it is measured."""


@dataclass
class EfficiencyRunner(PairedRunner):
    """``runner=efficiency``; methods and budgets are measured one after another, each beside the full cache.

    Attributes:
        warmups: Number of repetitions that are not recorded.
        repeats: Number of repetitions that are recorded.
        memory_limit_gib: Memory that a search may use, in the device's allocator or in the whole process; None: all
            available memory.
        cuda_graph: Capture a decode step as a CUDA graph and replay it, if its shapes are static.
        compile: Compile the decode steps; on a CPU, for one or two rows (:mod:`.engine.compiled`). None: if that is
            possible and there is a compiler.
        fuse_projections: On CUDA, compute queries, keys and values of a decode step by one matrix product, and gate and
            up of an MLP by one (:mod:`.engine.fused_weights`).
    """

    warmups: NonNegativeInt = 1
    repeats: PositiveInt = 5
    memory_limit_gib: PositiveFloat | None = None
    cuda_graph: bool = True
    compile: bool | None = None
    fuse_projections: bool = True

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
        if self.compile is None and _can_compile(task, settings) and (problem := compiler_problem()):
            log.warning(f"decode steps are not compiled, which is slower: {problem}")
        made_by = provenance.collect(settings.torch_device)
        conditions = self._conditions(task, settings, made_by)
        sources = [source.for_sharing(m.sharing, m.name) for m in methods]
        runs = [
            MethodRun(m, open_run("efficiency", m, s, data, task.identity(), settings, **conditions), s)
            for m, s in zip(methods, sources, strict=True)
        ]

        baseline = next((run for run in runs if run.method.identity() == BASELINE.identity()), None)
        in_turn = None if baseline is None or isinstance(task, Search) else self._job(baseline, task, settings)

        def work(locked: list[MethodRun]) -> None:
            for run in [run for run in locked if run.folder.done]:
                log.info(f"{run.method.label}: already done, in {run.folder.path}")
            left = [run for run in locked if not run.folder.done]
            if not left:
                return
            with measurement_lock(settings.torch_device), Passes(in_turn) as passes:
                for run in left:
                    log.info(f"{run.method.label}: {self.warmups} + {self.repeats} timed repetitions, then memory")
                    load = os.getloadavg()[0]
                    show = partial(elapsed_since, time.monotonic(), f"measuring {run.method.label}")
                    with status_line(show):
                        status, results = self._measure(run, task, settings, passes)
                    head = record_head(status, run.folder, run.method, data, settings)
                    run.folder.finish({**head, "provenance": made_by, "load_average_before": load, **results})

        run_with_locks(runs, work)
        add_gains(runs)
        return runs

    def _checked(self, task: Described, settings: Settings) -> Workload | Search:
        """The task, if it can be measured with these options; otherwise InputError."""
        if not isinstance(task, Workload | Search):
            raise InputError("task", task.name, "is scored, not timed: use workload=shape, or runner=accuracy")
        searches = isinstance(task, Search)
        if self.memory_limit_gib is not None and not searches:
            allowed = "is for workload=max_batch and max_context"
            raise InputError("runner.memory_limit_gib", self.memory_limit_gib, allowed)
        if self.compile and not _can_compile(task, settings):
            limits = f"device=cpu, workload=shape or workload=sharegpt, and batch_size of at most {MAX_ROWS}"
            raise InputError("runner.compile", True, f"is for {limits}")
        return task

    def _compiles(self, task: Workload | Search, settings: Settings) -> bool:
        """Whether decode steps are compiled, of models and methods for which that is possible."""
        if self.compile is None:
            return _can_compile(task, settings) and compiler_problem() is None
        return self.compile

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
                **({"compile": True} if self._compiles(task, settings) else {}),
                **({} if self.fuse_projections else {"fuse_projections": False}),
                **({"memory_limit_gib": self.memory_limit_gib} if searches else {}),
            },
            # Times are those of one version of the code: after a change the baseline is measured again too.
            "code": provenance.code_id(made_by["git"]),
            "torch": made_by["packages"].get("torch"),
        }

    def _job(self, run: MethodRun, task: Workload | Search, settings: Settings) -> Job:
        return Job(
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
            self._compiles(task, settings),
            self.fuse_projections,
        )

    def _measure(
        self, run: MethodRun, task: Workload | Search, settings: Settings, passes: Passes
    ) -> tuple[str, dict[str, Any]]:
        """(status, fields of the record)."""
        job = self._job(run, task, settings)
        try:
            if isinstance(task, Search):
                return self._measure_largest(job, task, run.folder.path / TRIED_SIZES, passes)
            return "done", passes.measure(job)
        except Exception as error:
            if not is_memory_failure(error):
                raise
            problem = str(error).splitlines()[0]
            log.warning(f"{run.method.label}: out of memory: {problem}")
            return "oom", {"problem": problem}

    def _measure_largest(self, job: Job, task: Search, log: Path, passes: Passes) -> tuple[str, dict[str, Any]]:
        passes.release()  # a search may take all the memory that there is
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
                results = passes.measure(replace(job, workload=workload, batch_size=batch_size))
            except Exception as error:
                smaller = (value - max(task.step, int(SIZE_REDUCTION * value))) // task.step * task.step
                if not is_memory_failure(error) or smaller < 0.8 * result["largest"] or smaller < task.step:
                    raise
                value = smaller
            else:
                break
        log.unlink()
        return "done", {**results, "batch_size": batch_size, "search": {**result, "measured_at": value}}


def _can_compile(task: Workload | Search, settings: Settings) -> bool:
    is_on_cpu, is_search = settings.torch_device == "cpu", isinstance(task, Search)
    return is_on_cpu and not is_search and settings.batch_size <= MAX_ROWS
