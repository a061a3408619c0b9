"""Work that is shared out among forked processes, which have all runs without copying them."""

from __future__ import annotations

import gc
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def each_result(work: Sequence[Callable[[], T]], min_per_process: int = 1) -> Iterator[T]:
    """The results in their order, made on all cores where the system can fork and no other thread runs.

    Args:
        work: Functions; only their results are sent between processes.
        min_per_process: Fewest functions for which another process is worth its start.
    """
    workers = min(os.cpu_count() or 1, len(work) // min_per_process)
    can_fork = "fork" in multiprocessing.get_all_start_methods() and threading.active_count() == 1
    if workers < 2 or not can_fork:
        yield from (make() for make in work)
        return
    _WORK[:] = work  # forked processes have it without pickling
    gc.freeze()  # they need not look for cycles among the runs, nor copy them for it
    try:
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            yield from pool.imap(_result, range(len(work)))
    finally:
        gc.unfreeze()
        _WORK.clear()


_WORK: list[Callable[[], Any]] = []


def _result(number: int) -> Any:
    return _WORK[number]()
