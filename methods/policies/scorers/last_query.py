"""TOVA (Oren et al., 2024, arXiv 2401.06104): after each step, the token that the newest one attends to least leaves.

Section 3.2: the attention of the last query, averaged over all of the layer's query heads, ranks the tokens; the
lowest leaves, from all heads alike. Nothing is protected: not the first tokens, not the newest one. A prompt is read
whole and cut down once, by its last token's attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ...cache.prefill import Prompt
from ..base import Kept, resolve_budget
from ..evicting import EvictingSelection, EvictingState
from ..ranking import keep_slots
from .snapkv import window_attention


@dataclass(frozen=True)
class TOVA(EvictingSelection):
    """TOVA's rule.

    Attributes:
        budget: tokens held per layer (the paper's multi-state size), or a fraction of the prompt.
        prefill_only: see :class:`.evicting.EvictingSelection`.
    """

    id: ClassVar[str] = "TOVA"

    @property
    def observation_window(self) -> int:
        return 1

    def select(self, prompt: Prompt, state: Any = None) -> Kept:
        budget = resolve_budget(self.budget, prompt.length)
        if prompt.length <= budget:
            return Kept()
        worth = prompt.cached("window_attention", window_attention)[:, :, -1].mean(dim=1)  # [R, T]
        return Kept(keep_slots(worth, budget)[:, None].expand(-1, prompt.keys.shape[1], -1))

    def observe(self, state: EvictingState, weights: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
        worth = weights.mean(dim=(1, 2))[:, None]  # [B, 1, S]
        if real is not None:  # a pad ranks nothing; its own slot is no token, so nothing is over the limit for it
            worth = torch.where(real[:, None, None], worth, torch.ones_like(worth))
        return worth
