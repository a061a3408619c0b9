"""Time, memory and bandwidth. What these functions return is what tables print: each has a test with a known answer.

* **Time**: a device works through a queue, so the clock is read only when the queue is empty.
* **Memory**: the highest mark since the last reset. On CUDA it is the allocator's; on the CPU it is the resident set of
  the process (``VmHWM`` of /proc/self/status, reset through /proc/self/clear_refs), which wants a fresh process.
* **Energy**: what the driver's own counter says, where there is one.
* **Bandwidth**: a large copy, the yardstick of a decode step, which must at least read the weights and the cache once.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import torch

from .provenance import preloaded

KIB = 1024
COPY_BYTES = 1 << 28
"""Size of the copy that measures bandwidth: far beyond what a cache holds."""
COPIES = 10


def now(device: str) -> float:
    """Seconds on a clock that only goes forward, read once everything queued on ``device`` is done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Stopwatch:
    """Times between marks, without waiting for the device at each of them.

    On CUDA a mark is an event in the queue, so that the host runs ahead as it does when nobody looks; on the CPU it is
    the clock.
    """

    def __init__(self, device: str):
        self._cuda = device.startswith("cuda")
        self._device = device
        self._marks: list[Any] = []
        if self._cuda:
            torch.cuda.synchronize(device)

    def mark(self) -> None:
        """Note that everything queued so far belongs before this mark."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """From each mark to the next one."""
        pairs = itertools.pairwise(self._marks)
        if self._cuda:
            torch.cuda.synchronize(self._device)
            return [a.elapsed_time(b) / 1e3 for a, b in pairs]
        return [b - a for a, b in pairs]


@dataclass(frozen=True)
class Energy:
    """Joules used in some seconds."""

    joules: float
    seconds: float


class EnergyMeter:
    """Energy by the counter that a driver keeps: NVML's of a CUDA device, RAPL's of the processor's packages.

    Args:
        device: what is measured.
        among: CUDA devices that a model is spread over, whose counters are added up; None: ``device`` alone.

    Attributes:
        what: which counter.
        problem: why there is none on this machine, or None.
    """

    def __init__(self, device: str, among: Sequence[str] | None = None):
        self._device = device
        self._among = [device] if among is None else list(among)
        self.what = "NVML, the whole device" if device.startswith("cuda") else "RAPL, the processor's packages"
        self.problem: str | None = None
        try:
            self._counters()
        except Exception as error:  # a driver's library has errors of its own
            reason = " ".join(str(error).split()) or type(error).__name__
            self.problem = f"no energy counter can be read ({reason})"

    def over(self, work: Callable[[], object]) -> Energy:
        """Energy while ``work`` runs, all that it queued included."""
        start, before = now(self._device), self._counters()
        work()
        seconds, after = now(self._device) - start, self._counters()
        used = 0.0
        for (a, _), (b, wraps_at) in zip(before, after, strict=True):
            used += b - a if b >= a else b - a + wraps_at
        return Energy(used, seconds)

    def _counters(self) -> list[tuple[float, float]]:
        """(joules so far, joules at which the counter starts again) of every counter."""
        if self._device.startswith("cuda"):
            import pynvml

            pynvml.nvmlInit()
            identities = [torch.cuda.get_device_properties(device).uuid for device in self._among]
            handles = [pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{identity}") for identity in identities]
            return [(pynvml.nvmlDeviceGetTotalEnergyConsumption(h) / 1e3, math.inf) for h in handles]
        found = []
        for package in sorted(RAPL.glob("intel-rapl:?")):
            used, most = (int((package / f).read_text()) / 1e6 for f in ("energy_uj", "max_energy_range_uj"))
            found.append((used, most))
        if not found:
            raise OSError(f"there is no {RAPL}/intel-rapl:0")
        return found


RAPL = Path("/sys/class/powercap")
"""Counters of the processor's packages; most systems let only root read them."""


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
    return 2 * size / _best_time(device, lambda: target.copy_(source), copies)


def read_bandwidth(device: str, size: int = COPY_BYTES, repeats: int = COPIES) -> float | None:
    """Bytes per second at which a matrix of ``size`` bytes is read: the best of ``repeats`` in the faster of two ways.

    It is added up, and multiplied by a vector: what a decode step does to a weight, but some libraries' products are
    limited by arithmetic. Unlike a copy neither writes anything. None where there is no room for it.
    """
    try:
        matrix = torch.ones(size // 4, device=device).view(1024, -1)
    except RuntimeError as error:
        if is_out_of_memory(error):
            return None
        raise
    vector = torch.ones(matrix.shape[1], device=device)
    ways = matrix.sum, lambda: torch.mv(matrix, vector)
    return matrix.nbytes / min(_best_time(device, way, repeats) for way in ways)


def _best_time(device: str, work: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of several calls, queued one behind the other: no start of a call is in them."""
    work()
    watch = Stopwatch(device)
    watch.mark()
    for _ in range(repeats):
        work()
        watch.mark()
    return min(watch.seconds())


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA has a class for it; the CPU's allocator says so in words."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = str(error).lower()
    return any(w in said for w in ("out of memory", "allocate memory", "std::bad_alloc", "alloc_failed"))


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

    Args:
        device: what is measured.
        among: CUDA devices that a model is spread over, whose peaks are added up; None: ``device`` alone.

    Attributes:
        problem: why there is no measurement on this machine, or None. :meth:`peak` then returns None.
    """

    def __init__(self, device: str, among: Sequence[str] | None = None):
        self.device = device
        self._among = [device] if among is None else list(among)
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
            for device in self._among:
                torch.cuda.synchronize(device)
                torch.cuda.reset_peak_memory_stats(device)
        else:
            _reset_resident_peak()

    def peak(self) -> Peak | None:
        """The highest mark since :meth:`reset`."""
        if self.problem is not None:
            return None
        if self.device.startswith("cuda"):
            for device in self._among:
                torch.cuda.synchronize(device)
            allocated = sum(torch.cuda.max_memory_allocated(device) for device in self._among)
            return Peak(allocated, sum(torch.cuda.max_memory_reserved(device) for device in self._among))
        return Peak(_resident("VmHWM"), None)


def malloc_trim_env() -> dict[str, str]:
    """Environment of a process whose resident set is its memory on a CPU.

    glibc keeps blocks of up to 32 MiB after they are freed; with this set before a process starts, every block of
    64 KiB goes back to the system the moment it is freed. Other allocators do not listen, so none is preloaded.
    """
    return {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "MALLOC_MMAP_MAX_": "1000000",
        "LD_PRELOAD": ":".join(path for path in preloaded() if "malloc" not in Path(path).name),
    }


def _reset_resident_peak() -> None:
    with contextlib.suppress(AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # 5: reset the peak (proc(5))


def available_memory() -> int:
    """Bytes that the machine could still give to a process."""
    return _field("/proc/meminfo", "MemAvailable")


def data_bytes() -> int:
    """Bytes of this process's data, as RLIMIT_DATA counts them."""
    return _field("/proc/self/status", "VmData")


def _resident(field: str) -> int:
    return _field("/proc/self/status", field)


def _field(path: str, field: str) -> int:
    """Bytes of one field of a file of the kernel's."""
    for line in Path(path).read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * KIB
    raise KeyError(f"no {field} in {path}")
