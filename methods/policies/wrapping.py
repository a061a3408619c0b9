"""Base class of scorers that build on the scores of another one (ChunkKV, CriticalKV)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .scorers.base import Scorer

if TYPE_CHECKING:
    from .model_layer import ModelLayer


@dataclass(frozen=True)
class WrappingScorer(Scorer):
    """Scorer over another one. What the other observes, protects and stores is what this one does.

    Attributes:
        scorer: The other scorer.
    """

    scorer: Scorer

    def chain(self) -> list[Scorer]:
        return [self, *self.scorer.chain()]

    @property
    def prefill_only(self) -> bool:  # type: ignore[override]
        """As the other scorer."""
        return self.scorer.prefill_only

    @property
    def may_be_negative(self) -> bool:  # type: ignore[override]
        """As the other scorer."""
        return self.scorer.may_be_negative

    @property
    def weighs_values(self) -> str:
        """As the other scorer, whose setting it is."""
        setting = self.scorer.weighs_values
        return f"scorer.{setting}" if setting else ""

    @property
    def observation_window(self) -> int:
        return self.scorer.observation_window

    @property
    def observes_question(self) -> bool:  # type: ignore[override]
        """As the other scorer."""
        return self.scorer.observes_question

    @property
    def repositions(self) -> bool:  # type: ignore[override]
        """As the other scorer."""
        return self.scorer.repositions

    @property
    def stores_query_heads(self) -> bool:
        return self.scorer.stores_query_heads

    def queries_while_decoding(self, steps: int) -> int:
        return self.scorer.queries_while_decoding(steps)

    def protected_recent(self) -> int | float:
        return self.scorer.protected_recent()

    def protected_sinks(self) -> int:
        return self.scorer.protected_sinks()

    def new_state(self, layer: ModelLayer) -> Any:
        return self.scorer.new_state(layer)
