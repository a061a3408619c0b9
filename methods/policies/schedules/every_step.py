"""Evict after the prefill and after every decode step, so that the budget is never exceeded (H2O, TOVA)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import Schedule


@dataclass(frozen=True)
class EveryStep(Schedule):
    """Eviction of one token per decode step."""

    id: ClassVar[str] = "every_step"

    @property
    def interval(self) -> int:
        return 1
