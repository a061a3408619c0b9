"""How many sequences of one shape fit into memory together, and how fast they are answered then.

The shape of the KIVI and MiniCache papers' throughput figures is the default: 161 tokens in, 338 out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import Source
from .shape import Shape
from .workload import Search, Workload, check_search, check_shape


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

    prompt_tokens: int = 161
    new_tokens: int = 338
    start: int = 8
    most: int | None = None
    step: int = 1
    tolerance: float = 0.02

    def __post_init__(self) -> None:
        check_shape(self.prompt_tokens, self.new_tokens)
        check_search(self)

    def source(self) -> Source:
        """``max_batch-161+338``."""
        name = f"{self.name}-{self.prompt_tokens}+{self.new_tokens}"
        return Source(name=name, location="random token ids", revision=None, sha256={})

    def at(self, value: int, batch_size: int) -> tuple[Workload, int]:
        return Shape(self.prompt_tokens, self.new_tokens), value
