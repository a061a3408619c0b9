"""Hold the budget while decoding: each step evicts the prompt tokens that ranked lowest after the prefill.

The ranking is made once, from the complete prompt, and stored as one float32 per token and head. So a step costs
attention over the budget (and up to 64 slots of evicted tokens), no queries are stored, and any scorer can be used.
Generated tokens rank above the prompt's, and the prompt's last ``method.recent`` tokens above its others, newer ones
higher. Sinks and the last ``method.recent`` tokens are never evicted. A scorer that gives a prompt to the model again
(KVzip) leaves a prompt within the budget unscored: its oldest token is evicted first.

Each head loses one token at each step, or, of heads that share a budget, one on average: the lowest-ranked ones of all
of them. So heads with few tokens of the prompt keep what is generated. After s steps the cache holds of the prompt what
a budget smaller by s would have kept (but for ``method.allocator.floor`` above 0, whose tokens leave last).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import Schedule


@dataclass(frozen=True)
class Hold(Schedule):
    """Eviction of one token per decode step, by the ranking of the prompt."""

    id: ClassVar[str] = "hold"
    evicts_by = "rank"

    @property
    def interval(self) -> int:
        return 1
