"""TOVA (Oren et al., 2024, arXiv 2401.06104): score tokens by the attention of the newest query.

Section 3.2: the attention weights of the last query, averaged over all query heads of the layer, rank the tokens. After
each step the lowest-scored token is evicted from all heads. No token is protected, neither the first nor the newest. A
prompt is compressed once, by the attention of its last token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ...cache.prompt import Prompt
from ...cache.prompt_attention import window_attention
from ..schedules.base import Schedule
from ..schedules.every_step import EveryStep
from .base import Scorer


@dataclass(frozen=True)
class LastQuery(Scorer):
    """Attention of the newest query."""

    id: ClassVar[str] = "TOVA"
    name: ClassVar[str] = "last_query"
    default_schedule: ClassVar[Schedule] = EveryStep()
    tracks_attention: ClassVar[bool] = True
    averages_query_heads: ClassVar[bool] = True
    scores_heads_alike: ClassVar[bool] = True

    @property
    def observation_window(self) -> int:
        return 1

    def score(self, prompt: Prompt, state: Any = None) -> torch.Tensor:
        return prompt.cached("window_attention", window_attention)[:, :, -1].mean(dim=1, keepdim=True)  # [R, 1, T]

    def update(self, scores: torch.Tensor | None, weights: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
        new = weights.mean(dim=(1, 2))[:, None]  # [B, 1, S]
        # The attention of a pad does not count. Its slot holds no token, so its row is not over the budget.
        return new if real is None else torch.where(real[:, None, None], new, torch.ones_like(new))
