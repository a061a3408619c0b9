"""Evict after the prefill and after every ``n`` decode steps; in between the cache grows by up to n tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ....conf.options import PositiveInt
from .base import Schedule


@dataclass(frozen=True)
class EveryN(Schedule):
    """Eviction at intervals while decoding.

    Attributes:
        n: Decode steps between evictions.
    """

    id: ClassVar[str] = "every_n"
    n: PositiveInt = 128

    @property
    def interval(self) -> int:
        return self.n

    @property
    def label(self) -> str:
        return f"every {self.n}"
