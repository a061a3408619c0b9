"""Clocks: the time on a device is read only when its queue of work is empty."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable
from typing import Any

import torch


def now(device: str) -> float:
    """Seconds on a monotonic clock, read once everything queued on ``device`` is done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Stopwatch:
    """Times between marks, without a device synchronization at each mark.

    On CUDA a mark is an event in the queue, so the host runs ahead as it does when nothing is measured; on the CPU it
    is the clock.
    """

    def __init__(self, device: str):
        self._cuda = device.startswith("cuda")
        self._device = device
        self._marks: list[Any] = []
        if self._cuda:
            torch.cuda.synchronize(device)

    def mark(self, device: torch.device | None = None) -> None:
        """Set a mark after everything that is queued so far, on another device if one is given."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device if device is None else device))
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Seconds from each mark to the next one."""
        return self._elapsed(itertools.pairwise(self._marks))

    def seconds_between_pairs(self) -> float | None:
        """Seconds from the first mark to the second, from the third to the fourth, and so on; None without marks."""
        if not self._marks:
            return None
        return float(sum(self._elapsed(zip(self._marks[::2], self._marks[1::2], strict=True))))

    def _elapsed(self, pairs: Iterable[tuple[Any, Any]]) -> list[float]:
        """Seconds between the marks of each pair."""
        if self._cuda:
            torch.cuda.synchronize(self._device)
            return [a.elapsed_time(b) / 1e3 for a, b in pairs]
        return [b - a for a, b in pairs]
