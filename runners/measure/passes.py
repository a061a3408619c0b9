"""The passes over one method after another, in as few processes as the device allows.

Time is measured in turn with the full cache: each repetition of a method has one of the full cache next to it, so that
what changes on the machine falls on both, and their ratio has an interval of paired repetitions.

On CUDA all passes of all methods of a command run in one process, which loads the model once: the peaks are those of
PyTorch's allocator, which are reset, and nothing but the model outlives a pass. On a CPU the peak is that of the whole
process, so memory has a process of its own for each method. transformers' ``generate`` keeps what it compiles, so that
method shares no process with another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ...methods.policies.transformers_generate import TransformersGenerate
from .energy import EnergyMeter
from .energy_pass import energy_pass
from .fresh import Killed, MeasuringProcess
from .job import Job
from .memory import in_memory_process, is_out_of_memory
from .memory_pass import memory_pass
from .session import Session, same_model
from .time_pass import spread, time_pass

_session = Session()
"""Of a measuring process; unused in the process that starts it."""


class Passes:
    """Time, memory and energy of one method after another; a context manager.

    Args:
        baseline: The job of the full cache on the same requests; None: nothing is measured in turn with a method.
    """

    def __init__(self, baseline: Job | None = None):
        self._process, self._baseline = MeasuringProcess(), baseline
        self._baseline_times: dict[str, Any] | None = None

    def __enter__(self) -> Passes:
        return self

    def __exit__(self, *error: Any) -> None:
        self._process.__exit__(*error)

    def release(self) -> None:
        """Release what the process keeps on the device."""
        self._process.close()

    def measure(self, job: Job) -> dict[str, Any]:
        """The fields of the record that are measured, and the times relative to their lower bound.

        Without memory for it the job is tried again in a new process and with nothing in turn.

        Raises:
            Exception: :func:`is_memory_failure`, or an error of the method.
        """
        other = self._other(job)
        is_alone = other is None and not self._process.has_answered
        try:
            return self._measure(job, other)
        except Exception as error:
            self._process.close()
            if is_alone or not is_memory_failure(error):
                raise
        try:
            return self._measure(job, None)
        except Exception:
            self._process.close()
            raise

    def _other(self, job: Job) -> Job | None:
        """The job whose repetitions are measured in turn with those of ``job``."""
        baseline = self._baseline
        return baseline if baseline is not None and job != baseline and same_model(job, baseline) else None

    def _measure(self, job: Job, other: Job | None) -> dict[str, Any]:
        shares_process = job.device != "cpu" and not isinstance(job.method, TransformersGenerate)
        if not shares_process:
            self._process.close()
        times = self._times(job, other)
        if shares_process:
            memory = self._process.call(_memory, job)
            energy = self._energy(job)
        else:
            energy = self._energy(job)
            self._process.close()
            # Not compiled: a compiler would be in the peaks of the process.
            memory = in_memory_process(memory_pass, replace(job, compile=False), job.device)
        return {**times, **memory, **energy, **_limit(times)}

    def _times(self, job: Job, other: Job | None) -> dict[str, Any]:
        if job == self._baseline and self._baseline_times is not None:
            return self._baseline_times
        times, *others = self._process.call(_time, [job] if other is None else [job, other])
        assert times is not None
        if job == self._baseline:
            self._baseline_times = times
        if other is not None and others[0] is not None:  # None: there was no memory for it
            self._baseline_times = self._baseline_times or others[0]
            repetitions = {name: others[0]["metrics"][name]["repetitions"] for name in ("ttft_ms", "tpot_ms")}
            times["interleaved"] = {"with": other.method.label, **repetitions}
        return times

    def _energy(self, job: Job) -> dict[str, Any]:
        # No process if it is known that there is no counter; only CUDA's counter needs the device.
        problem = EnergyMeter(job.device).problem if job.device == "cpu" else None
        try:
            return {"energy": {"problem": problem}} if problem else self._process.call(_energy, job)
        except Exception as error:  # time has been measured
            self._process.close()
            if not is_memory_failure(error):
                raise
            return {"energy": {"problem": "out of memory when energy was measured"}}


def is_memory_failure(error: Exception) -> bool:
    """Whether a measuring process ended for lack of memory."""
    return isinstance(error, Killed) or is_out_of_memory(error)


def _time(jobs: Sequence[Job]) -> list[dict[str, Any] | None]:
    return time_pass(jobs, _session)


def _memory(job: Job) -> dict[str, Any]:
    return memory_pass(job, _session)


def _energy(job: Job) -> dict[str, Any]:
    return energy_pass(job, _session)


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
