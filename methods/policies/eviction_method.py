"""Method whose eviction policy is composed of a scorer, an allocator and a schedule (``conf/method``)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ...conf.options import NonNegativeInt
from ..cache.method import Method
from .allocators.base import Allocator
from .allocators.uniform import Uniform
from .budget import Budget, Recent
from .eviction import EvictionPolicy
from .policy import CachePolicy
from .schedules.base import Schedule
from .schedules.every_step import EveryStep
from .schedules.hold import Hold
from .scorers.base import Scorer


@dataclass(frozen=True)
class EvictionMethod(Method):
    """Token eviction method: ``method=... method/scorer=... method/allocator=... method/schedule=...``.

    Attributes:
        scorer, allocator, schedule, sinks, recent: See :class:`.eviction.EvictionPolicy`.
        hold_budget: Evict at every decode step whatever the schedule, so that the budget is never exceeded: as the
            scorer does while decoding, or by :class:`.schedules.hold.Hold`.
    """

    policy: CachePolicy = field(init=False)
    budget: Budget = field(default=1024, kw_only=True)
    scorer: Scorer = field(kw_only=True)
    allocator: Allocator = field(default=Uniform(), kw_only=True)
    schedule: Schedule | None = field(default=None, kw_only=True)
    sinks: NonNegativeInt | None = field(default=None, kw_only=True)
    recent: Recent | None = field(default=None, kw_only=True)
    hold_budget: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if self.hold_budget is True:
            object.__setattr__(self, "schedule", self._holding_schedule())
        parts: dict[str, Any] = {"schedule": self.schedule, "sinks": self.sinks, "recent": self.recent}
        policy = EvictionPolicy(self.scorer, self.budget, allocator=self.allocator, **parts)
        object.__setattr__(self, "policy", policy)
        for name in parts:  # the scorer's defaults in place of None
            object.__setattr__(self, name, getattr(policy, name))
        super().__post_init__()

    def _holding_schedule(self) -> Schedule:
        """Return the schedule, or one that evicts at every step if tokens exceed the budget under it."""
        schedule = self.schedule or self.scorer.default_schedule
        if not schedule.evicts_from_whole_heads:
            return Hold()
        if schedule.evicts_every_step:
            return schedule
        return Hold() if schedule.interval is None and not self.scorer.tracks_attention else EveryStep()
