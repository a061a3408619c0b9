"""Energy by the counters of the drivers: NVML's of a CUDA device, RAPL's of the processor's packages."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .clock import now

RAPL = Path("/sys/class/powercap")
"""Counters of the processor's packages; most systems allow only root to read them."""


@dataclass(frozen=True)
class Energy:
    """Energy used in an interval.

    Attributes:
        joules: Energy.
        seconds: Length of the interval.
    """

    joules: float
    seconds: float


class EnergyMeter:
    """Energy by the counter that a driver keeps.

    Args:
        device: The device to measure.
        among: CUDA devices that a model is spread over, whose counters are added up; None: only ``device``.

    Attributes:
        what: Name of the counter.
        problem: Why this machine has none, or None.
    """

    def __init__(self, device: str, among: Sequence[str] | None = None):
        self._device = device
        self._among = [device] if among is None else list(among)
        self.what = "NVML, the whole device" if device.startswith("cuda") else "RAPL, the processor's packages"
        self.problem: str | None = None
        try:
            self._counters()
        except Exception as error:  # a driver's library raises its own exceptions
            reason = " ".join(str(error).split()) or type(error).__name__
            self.problem = f"no energy counter can be read ({reason})"

    def over(self, work: Callable[[], object]) -> Energy:
        """Energy used while ``work`` runs, including everything that it queues."""
        start, before = now(self._device), self._counters()
        work()
        seconds, after = now(self._device) - start, self._counters()
        joules = 0.0
        for (a, _), (b, wraps_at) in zip(before, after, strict=True):
            joules += b - a if b >= a else b - a + wraps_at
        return Energy(joules, seconds)

    def _counters(self) -> list[tuple[float, float]]:
        """(joules so far, joules at which the counter starts again) of every counter."""
        if self._device.startswith("cuda"):
            import pynvml

            pynvml.nvmlInit()
            identities = [torch.cuda.get_device_properties(device).uuid for device in self._among]
            handles = [pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{identity}") for identity in identities]
            return [(pynvml.nvmlDeviceGetTotalEnergyConsumption(h) / 1e3, math.inf) for h in handles]
        counters = []
        for package in sorted(RAPL.glob("intel-rapl:?")):
            joules, wraps_at = (int((package / f).read_text()) / 1e6 for f in ("energy_uj", "max_energy_range_uj"))
            counters.append((joules, wraps_at))
        if not counters:
            raise OSError(f"there is no {RAPL}/intel-rapl:0")
        return counters
