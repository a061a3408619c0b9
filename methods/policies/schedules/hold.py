"""Hold the budget while decoding: each step evicts the prompt token that ranked lowest after the prefill.

The ranking is made once, from the complete prompt, and stored as one float32 per token and head. So a step costs no
more than attention over the budget, no queries are stored, and any scorer can be used. Generated tokens rank above
the prompt's, the newer the higher, as do the prompt's last ``method.recent`` tokens once newer ones have taken their
place: when all other tokens of the prompt are gone, the oldest one is evicted. Sinks stay.
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
