"""Interface of schedules: after which decode steps tokens are evicted."""

from __future__ import annotations

from typing import ClassVar, Literal

from ....conf.identity import HasIdentity


class Schedule(HasIdentity):
    """Times of evictions while decoding; the prompt is always compressed once."""

    key_prefix: ClassVar[str] = "method.schedule."

    evicts_by: ClassVar[Literal["score", "age", "rank"]] = "score"
    """What decides while decoding: current scores; age, at each step; or the prompt's ranking, which is stored."""
    evicts_from_whole_heads: ClassVar[bool] = True
    """Whether evictions while decoding reach heads that kept the whole prompt, too."""

    @property
    def interval(self) -> int | float | None:
        """Decode steps between evictions, or their share of the budget (float); None: all generated tokens are kept."""
        raise NotImplementedError

    @property
    def evicts_every_step(self) -> bool:
        """Whether tokens are evicted at each step, whatever the budget."""
        return isinstance(self.interval, int) and self.interval == 1

    def steps_between(self, budget: int) -> int:
        """Return the decode steps between evictions at a budget of ``budget`` tokens; a share is at least one step."""
        assert self.interval is not None
        return self.interval if isinstance(self.interval, int) else max(1, int(self.interval * budget + 0.5))

    @property
    def label(self) -> str:
        """Short name for tables."""
        return self.id
