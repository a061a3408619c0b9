"""H2O (Zhang et al., 2023, arXiv 2306.14048): score tokens by the sum of the attention they have received.

Algorithm 1 and appendix A:

1. The score of a token is the sum of the attention weights it has received from all queries so far, starting with the
   column sums of the prompt's causal attention matrix.
2. Each decode step adds the new query's attention weights (:meth:`AttentionSums.update`).
3. After each step the token with the smallest sum is evicted (:func:`..decoding.evict_one`). The most recent tokens,
   half of the budget, are never evicted.

The scores are sums, because the authors found averages to be worse (appendix B.2). The published code is for
multi-head attention; with grouped-query attention (GQA) the weights are averaged over the query heads of a KV head.

Legend: R prompt rows, B batch rows, H or H_kv stored heads, g query heads per stored head, T prompt tokens, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ...cache.prompt import ALL_QUERIES, Prompt
from ...cache.prompt_sums import attention_received
from ..schedules.base import Schedule
from ..schedules.every_step import EveryStep
from .base import Scorer


@dataclass(frozen=True)
class AttentionSums(Scorer):
    """Accumulated attention of each token."""

    id: ClassVar[str] = "H2O"
    name: ClassVar[str] = "attention_sums"
    recent_recorded_as: ClassVar[str] = "recent_share"
    default_recent: ClassVar[int | float] = 0.5
    default_schedule: ClassVar[Schedule] = EveryStep()
    tracks_attention: ClassVar[bool] = True
    averages_query_heads: ClassVar[bool] = True
    accumulates: ClassVar[bool] = True

    @property
    def observation_window(self) -> int:
        return ALL_QUERIES

    def score(self, prompt: Prompt, state: Any = None) -> torch.Tensor:
        return prompt.cached("attention_received", attention_received)  # [R, H_kv, T]

    def update(self, scores: torch.Tensor | None, weights: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
        assert scores is not None
        received = weights.mean(dim=2)  # [B, H, g, S] -> [B, H, S]
        # A row whose new token is a pad adds nothing.
        return scores + (received if real is None else received * real[:, None, None])
