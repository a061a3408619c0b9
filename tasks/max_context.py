"""How long a prompt may be before memory ends, and how fast it is read then."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from ..conf.options import Bounds, PositiveInt
from .base import Source
from .shape import Shape
from .workload import NewTokens, Search, Workload


@dataclass
class MaxContext(Search):
    """The longest prompt.

    Attributes:
        new_tokens: tokens to generate after the prompt.
        start, most, step, tolerance: see :class:`.workload.Search`; in prompt tokens.
    """

    id: ClassVar[str] = "MaxContext"
    name = "max_context"
    what: ClassVar[str] = "prompt_tokens"

    new_tokens: NewTokens = 16
    start: PositiveInt = 4096
    most: PositiveInt | None = None
    step: PositiveInt = 256
    tolerance: Annotated[float, Bounds(ge=0, lt=1)] = 0.02

    def source(self) -> Source:
        """``max_context+16``."""
        return Source(name=f"{self.name}+{self.new_tokens}", location="random token ids", revision=None, sha256={})

    def at(self, value: int, batch_size: int) -> tuple[Workload, int]:
        return Shape(value, self.new_tokens), batch_size

    def within(self, positions: int) -> int | None:
        return positions - self.new_tokens
