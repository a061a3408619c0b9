"""Evict after the prompt and after every ``n`` decode steps: in between the cache grows by up to n tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ....conf.options import PositiveInt
from .base import Schedule


@dataclass(frozen=True)
class EveryN(Schedule):
    """Decode-time compression at intervals.

    Attributes:
        n: Decode steps from one eviction to the next.
    """

    id: ClassVar[str] = "every_n"
    n: PositiveInt = 128

    @property
    def interval(self) -> int:
        return self.n

    @property
    def label(self) -> str:
        return f"every {self.n}"
