"""Evict after the prefill and after every ``n`` decode steps; in between the cache grows by up to n tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from ....conf.options import Bounds, PositiveInt, Wording
from .base import Schedule

Interval = Annotated[
    PositiveInt | Annotated[float, Bounds(gt=0, le=1)],
    Wording("a whole number >= 1, or a share of the budget in (0, 1]"),
]
"""Decode steps (int), or their share of the budget (float in (0, 1])."""


@dataclass(frozen=True)
class EveryN(Schedule):
    """Eviction at intervals while decoding.

    Attributes:
        n: Decode steps between evictions (int, as in R-KV), or their share of the budget (float, as in Scissorhands).
    """

    id: ClassVar[str] = "every_n"
    n: Interval = 128

    @property
    def interval(self) -> int | float:
        return self.n

    @property
    def label(self) -> str:
        return f"every {self.n}" if isinstance(self.n, int) else f"every {self.n:g} budgets"
