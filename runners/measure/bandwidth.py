"""Memory bandwidth: the lower bound of a decode step, which must at least read the weights and the cache once."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .clock import Stopwatch
from .memory import is_out_of_memory

COPY_BYTES = 1 << 28
"""Size of the copy that measures bandwidth: far larger than a processor's caches."""
COPIES = 10


def copy_bandwidth(device: str, size: int = COPY_BYTES, copies: int = COPIES) -> float | None:
    """Bytes per second of a copy of ``size`` bytes, reads and writes counted; the best of ``copies``.

    None if there is no memory for it: a run is valid without the bandwidth.
    """
    try:
        source = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
        target = torch.empty_like(source).fill_(0)
    except RuntimeError as error:
        if is_out_of_memory(error):
            return None
        raise
    return 2 * size / _best_time(device, lambda: target.copy_(source), copies)


def read_bandwidth(device: str, size: int = COPY_BYTES, repeats: int = COPIES) -> float | None:
    """Bytes per second at which a matrix of ``size`` bytes is read: the best of ``repeats`` of the faster operation.

    The operations are a sum and a product with a vector. The product is what a decode step does to a weight, but some
    libraries' products are limited by arithmetic. Unlike a copy, neither writes anything. None if there is no memory
    for the matrix.
    """
    try:
        matrix = torch.ones(size // 4, device=device).view(1024, -1)
    except RuntimeError as error:
        if is_out_of_memory(error):
            return None
        raise
    vector = torch.ones(matrix.shape[1], device=device)
    operations = matrix.sum, lambda: torch.mv(matrix, vector)
    return matrix.nbytes / min(_best_time(device, operation, repeats) for operation in operations)


def _best_time(device: str, work: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of several calls; all are queued at once, so the launch of a call is not included."""
    work()
    watch = Stopwatch(device)
    watch.mark()
    for _ in range(repeats):
        work()
        watch.mark()
    return min(watch.seconds())
