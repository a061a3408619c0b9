"""How many sequences of one shape fit into memory together, and how fast they are answered then.

The shape of the KIVI and MiniCache papers' throughput figures is the default: 161 tokens in, 338 out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from ..conf.options import Bounds, PositiveInt
from .base import Source
from .shape import Shape
from .workload import NewTokens, Search, Workload


@dataclass
class MaxBatch(Search):
    """The largest batch.

    Attributes:
        prompt_tokens, new_tokens: tokens of each sequence; the ids are random.
        start, most, step, tolerance: see :class:`.workload.Search`; in sequences.
    """

    id: ClassVar[str] = "MaxBatch"
    name = "max_batch"
    what: ClassVar[str] = "batch_size"

    prompt_tokens: PositiveInt = 161
    new_tokens: NewTokens = 338
    start: PositiveInt = 8
    most: PositiveInt | None = None
    step: PositiveInt = 1
    tolerance: Annotated[float, Bounds(ge=0, lt=1)] = 0.02

    def source(self) -> Source:
        """``max_batch-161+338``."""
        name = f"{self.name}-{self.prompt_tokens}+{self.new_tokens}"
        return Source(name=name, location="random token ids", revision=None, sha256={})

    def at(self, value: int, batch_size: int) -> tuple[Workload, int]:
        return Shape(self.prompt_tokens, self.new_tokens), value
