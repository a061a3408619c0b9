"""The contract of a schedule: after which decode steps a cache is brought back to its budget."""

from __future__ import annotations

from typing import ClassVar

from ....conf.identity import HasIdentity


class Schedule(HasIdentity):
    """Says when tokens leave after the prompt; the prompt itself is always compressed once."""

    key_prefix: ClassVar[str] = "method.schedule."

    @property
    def interval(self) -> int | None:
        """Decode steps from one eviction to the next; None: every generated token stays."""
        raise NotImplementedError

    @property
    def label(self) -> str:
        """Short text for tables."""
        return self.id
