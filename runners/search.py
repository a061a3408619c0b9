"""The largest batch, or the longest prompt, that fits into memory: by doubling, then by bisection.

Out of memory is an answer. A size that is killed by the kernel ends the process that tried it, not the search: what was
found so far lies in a file, and the next process goes on with the size that killed the last one known not to fit. The
same command given again, after it was cut off, goes on from that file too; the size it was trying then says nothing.
"""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..conf.errors import InputError
from ..models.base import LoadedModel
from ..models.pretrained import devices_of
from ..tasks.workload import Search
from .fresh import Killed, in_fresh_process
from .measure import MemoryMeter, available_memory, data_bytes, is_out_of_memory, malloc_trim_env, release_memory
from .passes import QUIET, Job, batches, load, memory_of, take_workspaces, use_device

SPARE = 0.95
"""Share of the memory that is free when a search begins on a CPU that it may take; the rest keeps the machine alive."""


@dataclass(frozen=True)
class SearchJob:
    """What a searching process is given.

    Attributes:
        job: model, method and settings; its workload is not looked at.
        search: what is varied.
        limit_bytes: memory that may be taken, of the device's allocator or of the whole process; None: what there is.
        log: where sizes that were tried are noted, a line each.
    """

    job: Job
    search: Search
    limit_bytes: int | None
    log: Path


def search(todo: SearchJob) -> dict[str, Any]:
    """The field ``search`` of a record: what was found and every size that was tried."""
    environment = QUIET | (malloc_trim_env() if todo.job.device == "cpu" else {})
    known = outcomes(todo.log).values()
    todo.log.parent.mkdir(parents=True, exist_ok=True)
    todo.log.write_text("".join(json.dumps(line) + "\n" for line in known))
    while True:
        try:
            return in_fresh_process(search_pass, todo, environment)
        except Killed:
            began = next((line.get("began") for line in reversed(_lines(todo.log))), None)
            if began is None:
                raise  # it never came to try a size
            _note(todo.log, {"value": began, "fits": False, "peak_bytes": None, "problem": "the process was killed"})


def search_pass(todo: SearchJob) -> dict[str, Any]:
    """Try one size after another, in this process."""
    job = todo.job
    use_device(job.device)
    known = outcomes(todo.log)
    loaded = load(job)
    meter = MemoryMeter(job.device, devices_of(loaded.model, job.device))
    if meter.problem is not None:
        raise InputError("task", todo.search.name, f"needs a measured peak of memory: {meter.problem}")
    ceiling, stopped_by = todo.search.most, "most"
    positions = todo.search.within(loaded.max_positions)
    if positions is not None and positions < todo.search.step:
        if positions < 1:
            problem = f"leaves no room for a prompt in the {loaded.max_positions} positions of {loaded.name}"
            raise InputError("task.new_tokens", todo.search.new_tokens, problem)
        problem = f"and the new tokens are beyond the {loaded.max_positions} positions of {loaded.name}"
        raise InputError("task.step", todo.search.step, problem)
    take_workspaces(loaded.model, _batch(job, todo.search, todo.search.step, loaded), job)
    _bound(todo, devices_of(loaded.model, job.device))

    def fits(value: int) -> bool:
        if value not in known:
            _note(todo.log, {"began": value})
            outcome = _try(todo, value, loaded, meter)
            _note(todo.log, outcome)
            known[value] = outcome
        return bool(known[value]["fits"])

    if positions is not None and (ceiling is None or positions < ceiling):
        ceiling, stopped_by = positions, "positions"
    found = largest(fits, todo.search.start, ceiling, todo.search.step, todo.search.tolerance)
    over = any(not outcome["fits"] for outcome in known.values())
    return {
        "what": todo.search.what,
        "largest": found,
        "stopped_by": "memory" if over else stopped_by,
        "limit_bytes": todo.limit_bytes,
        "tried": [known[value] for value in sorted(known)],
    }


def largest(fits: Callable[[int], bool], start: int, most: int | None, step: int, tolerance: float) -> int | None:
    """The largest multiple of ``step`` that fits, to within ``tolerance`` of it; None: not even one step does.

    Args:
        fits: asked at most once about a size; whatever fits, everything smaller does.
        start: the first size to try, doubled for as long as it fits.
        most: never ask about more; None: no end.
        step: sizes are multiples of it.
        tolerance: share of the answer that it may be too small by.
    """
    end = None if most is None else most // step
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


def _try(todo: SearchJob, value: int, loaded: LoadedModel, meter: MemoryMeter) -> dict[str, Any]:
    """Answer a batch of this size."""
    job = todo.job
    try:
        held = memory_of(loaded.model, _batch(job, todo.search, value, loaded), meter, job)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        problem = str(error).splitlines()[0]
    else:
        peak = max(p.allocated for p in (held.peak_prefill, held.peak_decode) if p is not None)
        within = todo.limit_bytes is None or peak <= todo.limit_bytes
        return {"value": value, "fits": within, "peak_bytes": peak, "problem": None if within else "above the limit"}
    release_memory(job.device)  # out of the handler, whose error would hold the tensors
    return {"value": value, "fits": False, "peak_bytes": None, "problem": problem}


def _batch(job: Job, search: Search, value: int, loaded: LoadedModel) -> Any:
    workload, batch_size = search.at(value, job.batch_size)
    (batch,) = batches(replace(job, workload=workload, batch_size=batch_size), loaded)
    return batch


def _bound(todo: SearchJob, devices: Sequence[str]) -> None:
    """Have the allocator refuse what is beyond the limit (CUDA) or would bring the machine down (CPU)."""
    if todo.job.device.startswith("cuda"):
        if todo.limit_bytes is not None:
            for device in devices:  # each may take all of it; the measured peak is of all together
                number = torch.device(device).index or 0
                total = torch.cuda.get_device_properties(number).total_memory
                torch.cuda.set_per_process_memory_fraction(min(1.0, todo.limit_bytes / total), number)
        return
    most = data_bytes() + int(SPARE * available_memory())
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def outcomes(log: Path) -> dict[int, dict[str, Any]]:
    """Sizes that were tried, by size."""
    return {line["value"]: line for line in _lines(log) if "value" in line}


def _lines(log: Path) -> list[dict[str, Any]]:
    """Whole lines; what a killed process left of its last one is passed over."""
    return [json.loads(line) for line in log.read_text().split("\n")[:-1] if line] if log.exists() else []


def _note(log: Path, line: dict[str, Any]) -> None:
    with log.open("a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
