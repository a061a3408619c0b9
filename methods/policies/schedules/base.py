"""Interface of schedules: after which decode steps tokens are evicted."""

from __future__ import annotations

from typing import ClassVar, Literal

from ....conf.identity import HasIdentity


class Schedule(HasIdentity):
    """Times of evictions while decoding; the prompt is always compressed once."""

    key_prefix: ClassVar[str] = "method.schedule."

    evicts_by: ClassVar[Literal["score", "age", "rank"]] = "score"
    """What decides while decoding: current scores; age, at each step; or the prompt's ranking, which is stored."""

    @property
    def interval(self) -> int | None:
        """Decode steps between evictions; None: all generated tokens are kept."""
        raise NotImplementedError

    @property
    def label(self) -> str:
        """Short name for tables."""
        return self.id
