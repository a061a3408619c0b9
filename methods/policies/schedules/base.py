"""Interface of schedules: after which decode steps tokens are evicted."""

from __future__ import annotations

from typing import ClassVar

from ....conf.identity import HasIdentity


class Schedule(HasIdentity):
    """Times of evictions while decoding; the prompt is always compressed once."""

    key_prefix: ClassVar[str] = "method.schedule."

    evicts_oldest: ClassVar[bool] = False
    """Whether the oldest of the recent tokens is evicted at each step, whatever its score."""

    @property
    def interval(self) -> int | None:
        """Decode steps between evictions; None: all generated tokens are kept."""
        raise NotImplementedError

    @property
    def label(self) -> str:
        """Short name for tables."""
        return self.id
