"""Peak memory of a device, phase by phase.

On CUDA it is the peak of the allocator; on the CPU it is the peak resident set of the process (``VmHWM`` of
/proc/self/status, reset through /proc/self/clear_refs), which needs a fresh process.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from ..records.provenance import preloaded
from .fresh import in_forked_process, in_fresh_process

A = TypeVar("A")
R = TypeVar("R")

KIB = 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means out of memory: by its class on CUDA, by the allocator's message on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    message = str(error).lower()
    return any(w in message for w in ("out of memory", "allocate memory", "std::bad_alloc", "alloc_failed"))


def release_memory(device: str) -> None:
    """Free what is no longer referenced, including what CUDA's allocator caches."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Peak:
    """Peak memory since the last reset.

    Attributes:
        allocated: Bytes in use: of tensors on CUDA, of the whole process (resident set) on the CPU.
        reserved: Bytes reserved by CUDA's allocator; None on the CPU.
    """

    allocated: int
    reserved: int | None


class MemoryMeter:
    """Peak memory of one device, phase by phase.

        meter = MemoryMeter("cpu")
        meter.reset(); prefill(...); peak_prefill = meter.peak()
        meter.reset(); decode(...);  peak_decode = meter.peak()

    Args:
        device: The device to measure.
        among: CUDA devices that a model is spread over, whose peaks are added up; None: only ``device``.

    Attributes:
        problem: Why this machine cannot measure it, or None. :meth:`peak` then returns None.
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
        """Start a new phase; memory freed in earlier phases is released first, so that it does not count."""
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
        """Peak since :meth:`reset`."""
        if self.problem is not None:
            return None
        if self.device.startswith("cuda"):
            for device in self._among:
                torch.cuda.synchronize(device)
            allocated = sum(torch.cuda.max_memory_allocated(device) for device in self._among)
            return Peak(allocated, sum(torch.cuda.max_memory_reserved(device) for device in self._among))
        return Peak(_resident("VmHWM"), None)


def malloc_trim_env() -> dict[str, str]:
    """Environment that makes glibc return freed memory at once, so that the resident set is what is in use.

    By default glibc keeps blocks of up to 32 MiB after they are freed; with this environment every block of 64 KiB is
    returned to the system. Other allocators ignore these variables, so none is preloaded.
    """
    return {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "MALLOC_MMAP_MAX_": "1000000",
        "LD_PRELOAD": ":".join(path for path in preloaded() if "malloc" not in Path(path).name),
    }


def in_memory_process(function: Callable[[A], R], argument: A, device: str) -> R:
    """``function(argument)`` in a process in which memory can be measured, as :func:`.fresh.in_forked_process` does.

    On the CPU that is one whose allocator returns what is freed, which it must be told when the process starts.
    """
    if device == "cpu":
        return in_fresh_process(function, argument, malloc_trim_env())
    return in_forked_process(function, argument)


def available_memory() -> int:
    """Return the bytes that the machine can still allocate to a process."""
    return _field_bytes("/proc/meminfo", "MemAvailable")


def data_bytes() -> int:
    """Bytes of this process's data segment, as RLIMIT_DATA counts them."""
    return _field_bytes("/proc/self/status", "VmData")


def _reset_resident_peak() -> None:
    with contextlib.suppress(AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # 5: reset the peak (proc(5))


def _resident(field: str) -> int:
    return _field_bytes("/proc/self/status", field)


def _field_bytes(path: str, field: str) -> int:
    """Bytes given by one field of a file under /proc."""
    for line in Path(path).read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * KIB
    raise KeyError(f"no {field} in {path}")
