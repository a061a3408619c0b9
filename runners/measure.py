"""Time, memory and bandwidth. What these functions return is what tables print: each has a test with a known answer.

* **Time**: a device works through a queue, so the clock is read only when the queue is empty.
* **Memory**: the highest mark since the last reset. On CUDA it is the allocator's; on the CPU it is the resident set of
  the process (``VmHWM`` of /proc/self/status, reset through /proc/self/clear_refs), which wants a fresh process.
* **Bandwidth**: a large copy, the yardstick of a decode step, which must at least read the weights and the cache once.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import filelock
import torch

KIB = 1024
COPY_BYTES = 1 << 28
"""Size of the copy that measures bandwidth: far beyond what a cache holds."""
COPIES = 10


def now(device: str) -> float:
    """Seconds on a clock that only goes forward, read once everything queued on ``device`` is done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def copy_bandwidth(device: str, size: int = COPY_BYTES, copies: int = COPIES) -> float | None:
    """Bytes per second of a copy of ``size`` bytes, reads and writes counted; the best of ``copies``.

    None where there is no room for it: a run without a yardstick is still a run.
    """
    try:
        source = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
        target = torch.empty_like(source).fill_(0)
    except RuntimeError as error:
        if is_out_of_memory(error):
            return None
        raise
    best = float("inf")
    for _ in range(copies):
        start = now(device)
        target.copy_(source)
        best = min(best, now(device) - start)
    return 2 * size / best


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA has a class for it; the CPU's allocator says so in words."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def release_memory(device: str) -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


@contextmanager
def one_at_a_time(device: str, say: Callable[[str], None]) -> Iterator[None]:
    """Hold this machine's lock for measuring on ``device``: two measurements at once would measure each other."""
    kind = "cpu" if not device.startswith("cuda") else device.replace(":", "-")
    lock = filelock.FileLock(Path(tempfile.gettempdir()) / f"kvbench-{os.getuid()}-measuring-{kind}.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        say(f"another process is measuring on the {kind}; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@dataclass(frozen=True)
class Peak:
    """Highest mark of memory since the last reset.

    Attributes:
        allocated: bytes in use: of tensors on CUDA, of the whole process (resident set) on the CPU.
        reserved: bytes that CUDA's allocator holds; None on the CPU.
    """

    allocated: int
    reserved: int | None


class MemoryMeter:
    """Peak memory of one device, phase by phase.

        meter = MemoryMeter("cpu")
        meter.reset(); prefill(...); peak_prefill = meter.peak()
        meter.reset(); decode(...);  peak_decode = meter.peak()

    Attributes:
        problem: why there is no measurement on this machine, or None. :meth:`peak` then returns None.
    """

    def __init__(self, device: str):
        self.device = device
        self.problem: str | None = None
        if not device.startswith("cuda"):
            try:
                _reset_resident_peak()
                _resident("VmHWM")
            except (OSError, KeyError) as error:
                self.problem = f"this system has no resettable peak of the resident set ({error})"

    def reset(self) -> None:
        """Start a new phase: what earlier phases freed is given back first, so that it cannot count here."""
        release_memory(self.device)
        if self.problem is not None:
            return
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            _reset_resident_peak()

    def peak(self) -> Peak | None:
        """The highest mark since :meth:`reset`."""
        if self.problem is not None:
            return None
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)
            return Peak(torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device))
        return Peak(_resident("VmHWM"), None)


# What glibc does with large blocks makes a resident set lie: after one is freed it keeps others of up to 32 MiB. With
# this set before the process starts, every block of 64 KiB goes back to the system the moment it is freed.
HONEST_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "1000000"}


def _reset_resident_peak() -> None:
    with contextlib.suppress(AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # 5: reset the peak (proc(5))


def _resident(field: str) -> int:
    """Bytes of one field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * KIB
    raise KeyError(f"no {field}")
