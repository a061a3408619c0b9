"""H2O (Zhang et al., 2023, arXiv 2306.14048): the heavy hitters stay, the tokens that have received most attention.

Algorithm 1 and appendix A: every held token carries the sum of the attention that all queries up to now have paid it,
the prompt's included. After each step the token with the smallest sum leaves, among those that are not in the recent
half of the budget. Sums, not averages: the authors tried averages and found them worse (appendix B.2).

The prompt's sums are those of the full causal attention matrix, taken in blocks of queries, so that memory grows with
the prompt and not with its square. The published code runs on multi-head attention; with grouped queries the heads of a
group are averaged into their KV head's sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ...cache.prompt import ALL_QUERIES, Prompt
from ...cache.prompt_attention import attention_received
from ..schedules.base import Schedule
from ..schedules.every_step import EveryStep
from .base import Scorer


@dataclass(frozen=True)
class AttentionSums(Scorer):
    """Attention received so far."""

    id: ClassVar[str] = "H2O"
    name: ClassVar[str] = "attention_sums"
    recent_recorded_as: ClassVar[str] = "recent_share"
    default_recent: ClassVar[int | float] = 0.5
    default_schedule: ClassVar[Schedule] = EveryStep()
    tracks_attention: ClassVar[bool] = True
    accumulates: ClassVar[bool] = True

    @property
    def observation_window(self) -> int:
        return ALL_QUERIES

    def score(self, prompt: Prompt, state: Any = None) -> torch.Tensor:
        return prompt.cached("attention_received", attention_received)  # [R, H_kv, T]

    def update(self, scores: torch.Tensor | None, weights: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
        assert scores is not None
        received = weights.mean(dim=2)  # [B, H, S]
        return scores + (received if real is None else received * real[:, None, None])
