"""The largest batch, or the longest prompt, that fits into memory: by doubling, then by bisection.

Out of memory is a result. A size at which the kernel kills the process ends that process, not the search: the results
so far are in a file, and the next process continues, with that size known not to fit. The same command, repeated after
an interruption, continues from that file too, and tries the interrupted size again.
"""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..conf.errors import InputError
from ..models.pretrained import devices_of
from ..tasks.workload import Search
from .measure.fresh import Killed
from .measure.job import Batch, Job, LoadedJob
from .measure.memory import (
    MemoryMeter,
    available_memory,
    data_bytes,
    in_memory_process,
    is_out_of_memory,
    release_memory,
)
from .measure.memory_pass import memory_of, warm_up
from .measure.session import load

USABLE_MEMORY = 0.95
"""Share of the free memory that a search on a CPU may use; the rest keeps the machine responsive."""


@dataclass(frozen=True)
class SearchJob:
    """Input of a searching process.

    Attributes:
        job: Model, method and settings; its workload is ignored.
        search: The size that is varied.
        limit_bytes: Memory that may be used, in the device's allocator or in the whole process; None: all available.
        log: File of the sizes that were tried, one per line.
    """

    job: Job
    search: Search
    limit_bytes: int | None
    log: Path


def search(todo: SearchJob) -> dict[str, Any]:
    """The field ``search`` of a record: the result and every size that was tried."""
    known = outcomes(todo.log).values()
    todo.log.parent.mkdir(parents=True, exist_ok=True)
    todo.log.write_text("".join(json.dumps(line) + "\n" for line in known))
    while True:
        try:
            return in_memory_process(search_pass, todo, todo.job.device)
        except Killed:
            began = next((line.get("began") for line in reversed(_lines(todo.log))), None)
            if began is None:
                raise  # killed before it tried a size
            _note(todo.log, {"value": began, "fits": False, "peak_bytes": None, "problem": "the process was killed"})


def search_pass(todo: SearchJob) -> dict[str, Any]:
    """Try one size after another, in this process."""
    job = todo.job
    known = outcomes(todo.log)
    loaded = load(job)
    meter = MemoryMeter(job.device, devices_of(loaded.model, job.device))
    if meter.problem is not None:
        raise InputError("workload", todo.search.name, f"needs a measured peak of memory: {meter.problem}")
    max_positions, name = loaded.loaded.max_positions, loaded.loaded.name
    ceiling, stopped_by = todo.search.most, "most"
    positions = todo.search.within(max_positions)
    if positions is not None and positions < todo.search.step:
        if positions < 1:
            problem = f"needs all {max_positions} positions of {name}, so that no prompt fits"
            raise InputError("workload.new_tokens", todo.search.new_tokens, problem)
        problem = f"and the new tokens are beyond the {max_positions} positions of {name}"
        raise InputError("workload.step", todo.search.step, problem)
    warm_up(loaded, _batch(loaded, todo.search, todo.search.step))
    _limit_memory(todo, devices_of(loaded.model, job.device))

    def fits(value: int) -> bool:
        if value not in known:
            _note(todo.log, {"began": value})
            outcome = _try(todo, value, loaded, meter)
            _note(todo.log, outcome)
            known[value] = outcome
        return bool(known[value]["fits"])

    if positions is not None and (ceiling is None or positions < ceiling):
        ceiling, stopped_by = positions, "positions"
    result = largest(fits, todo.search.start, ceiling, todo.search.step, todo.search.tolerance)
    over = any(not outcome["fits"] for outcome in known.values())
    return {
        "what": todo.search.what,
        "largest": result,
        "stopped_by": "memory" if over else stopped_by,
        "limit_bytes": todo.limit_bytes,
        "tried": [known[value] for value in sorted(known)],
    }


def largest(fits: Callable[[int], bool], start: int, max_size: int | None, step: int, tolerance: float) -> int | None:
    """The largest multiple of ``step`` that fits, to within ``tolerance`` of it; None: not even one step does.

    Args:
        fits: Whether a size fits; called at most once per size. If a size fits, so does everything smaller.
        start: The first size to try, doubled for as long as it fits.
        max_size: Largest size to try; None: no limit.
        step: Sizes are multiples of it.
        tolerance: Share of the result by which it may be too small.
    """
    end = None if max_size is None else max_size // step
    if end is not None and end < 1:
        return None
    low, size = 0, max(1, start // step)  # in steps; `low` fits
    size = size if end is None else min(size, end)
    while fits(size * step):
        low = size
        if size == end:
            return low * step
        size = 2 * size if end is None else min(2 * size, end)
    high = size  # does not fit
    while high - low > max(1, int(tolerance * low)):
        middle = (low + high) // 2
        if fits(middle * step):
            low = middle
        else:
            high = middle
    return low * step if low else None


def _try(todo: SearchJob, value: int, loaded: LoadedJob, meter: MemoryMeter) -> dict[str, Any]:
    """Answer a batch of this size."""
    job = todo.job
    try:
        memory = memory_of(loaded, _batch(loaded, todo.search, value), meter)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        problem = str(error).splitlines()[0]
    else:
        peak = max(p.allocated for p in (memory.peak_prefill, memory.peak_decode) if p is not None)
        within = todo.limit_bytes is None or peak <= todo.limit_bytes
        return {"value": value, "fits": within, "peak_bytes": peak, "problem": None if within else "above the limit"}
    release_memory(job.device)  # outside the handler, because the exception keeps tensors alive
    return {"value": value, "fits": False, "peak_bytes": None, "problem": problem}


def _batch(loaded: LoadedJob, search: Search, value: int) -> Batch:
    (batch,) = loaded.with_workload(*search.at(value, loaded.job.batch_size)).batches()
    return batch


def _limit_memory(todo: SearchJob, devices: Sequence[str]) -> None:
    """Make the allocator refuse sizes above the limit (CUDA), or that would exhaust the machine (CPU)."""
    if todo.job.device.startswith("cuda"):
        if todo.limit_bytes is not None:
            for device in devices:  # each may use all of it; the measured peak is the sum
                number = torch.device(device).index or 0
                total = torch.cuda.get_device_properties(number).total_memory
                torch.cuda.set_per_process_memory_fraction(min(1.0, todo.limit_bytes / total), number)
        return
    limit = data_bytes() + int(USABLE_MEMORY * available_memory())
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def outcomes(log: Path) -> dict[int, dict[str, Any]]:
    """Sizes that were tried, by size."""
    return {line["value"]: line for line in _lines(log) if "value" in line}


def _lines(log: Path) -> list[dict[str, Any]]:
    """Complete lines; a last line that a killed process left incomplete is skipped."""
    return [json.loads(line) for line in log.read_text().split("\n")[:-1] if line] if log.exists() else []


def _note(log: Path, line: dict[str, Any]) -> None:
    with log.open("a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
