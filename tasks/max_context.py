"""How long a prompt may be before memory ends, and how fast it is read then."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import Source
from .shape import Shape
from .workload import Search, Workload, check_search, check_shape


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

    new_tokens: int = 16
    start: int = 4096
    most: int | None = None
    step: int = 256
    tolerance: float = 0.02

    def __post_init__(self) -> None:
        check_shape(1, self.new_tokens)
        check_search(self)

    def source(self) -> Source:
        """``max_context+16``."""
        return Source(name=f"{self.name}+{self.new_tokens}", location="random token ids", revision=None, sha256={})

    def at(self, value: int, batch_size: int) -> tuple[Workload, int]:
        return Shape(value, self.new_tokens), batch_size

    def within(self, positions: int) -> int | None:
        return positions - self.new_tokens
