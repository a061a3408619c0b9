"""H2O (Zhang et al., 2023, arXiv 2306.14048): keep the heavy hitters, the tokens that have drawn most attention so far.

Algorithm 1 and appendix A: every held token carries the sum of the attention it has been paid by all queries up to
now, the prompt's included. After each step the token with the smallest sum leaves, among those that are not in the
recent half of the budget. Sums, not averages: the authors tried averages and found them worse (appendix B.2).

The prompt's sums are those of the full causal attention matrix. They are taken in blocks of queries, so that memory
grows with the prompt and not with its square. The published code runs on multi-head attention; with grouped queries
the heads of a group are averaged into their KV head's sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from ....conf.errors import require
from ...cache.prefill import Prompt
from ..base import ALL_QUERIES, Kept, resolve_budget
from ..evicting import EvictingSelection, EvictingState
from ..ranking import keep_slots
from .snapkv import attention_from, hide_future

BLOCK = 64
"""Queries whose attention is computed at a time on a CPU, so that it stays in its cache; on CUDA eight times more."""


@dataclass(frozen=True)
class H2O(EvictingSelection):
    """H2O's rule.

    Attributes:
        budget: tokens held per head, heavy hitters and recent ones together, or a fraction of the prompt.
        recent_share: share of the budget for the most recent tokens (half in the paper); 1 is a sliding window.
        prefill_only: see :class:`.evicting.EvictingSelection`.
    """

    id: ClassVar[str] = "H2O"
    recent_share: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        at = "method.selection."
        share = self.recent_share
        require(
            isinstance(share, int | float) and 0 <= share <= 1, at + "recent_share", share, "must be between 0 and 1"
        )

    @property
    def observation_window(self) -> int:
        return ALL_QUERIES

    def recent(self, limit: int) -> int:
        return int(self.recent_share * limit)

    def select(self, prompt: Prompt, state: Any = None) -> Kept:
        budget = resolve_budget(self.budget, prompt.length)
        if self.prefill_only and prompt.length <= budget:
            return Kept()
        scores = prompt.cached("attention_received", attention_received)  # [R, H_kv, T]
        if prompt.length > budget:
            recent = self.recent(budget)
            older = scores[..., : prompt.length - recent]
            heavy = keep_slots(older, budget - recent)  # [R, H, C - recent]
            last = torch.arange(prompt.length - recent, prompt.length, device=scores.device)
            slots = torch.cat([heavy, last.expand(*heavy.shape[:2], -1)], dim=-1)
            return Kept(slots, scores=None if self.prefill_only else scores.gather(-1, slots))
        return Kept(scores=scores)

    def observe(self, state: EvictingState, weights: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
        assert state.scores is not None
        received = weights.mean(dim=2)  # [B, H, S]
        if real is not None:
            received = received * real[:, None, None]
        state.scores = F.pad(state.scores, (0, 1)) + received
        return state.scores

    def state_bytes(self, prompt_length: int, new_tokens: int, layers: int, heads: int) -> int:
        """One float32 sum for each held token of each head."""
        return 0 if self.prefill_only else 4 * heads * sum(self.kept_tokens(prompt_length, new_tokens, layers))


def attention_received(prompt: Prompt) -> torch.Tensor:
    """Column sums of the causal attention matrix, averaged over the query heads of a group: [R, H_kv, T], float32."""
    shape = (*prompt.keys.shape[:2], prompt.length)
    sums = torch.zeros(shape, dtype=torch.float32, device=prompt.query.device)
    for _, attention in attention_blocks(prompt, prompt.length):
        sums[..., : attention.shape[-1]] += attention.sum(dim=(2, 3))
    return sums / prompt.groups


def attention_blocks(prompt: Prompt, count: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Causal attention of the prompt's last ``count`` queries, in blocks of queries, so that memory grows with T alone.

    Yields:
        (number of the block's first query, [R, H_kv, g, n, columns] float32); a block has columns up to its last query.
    """
    rows, _, held, dim = prompt.query.shape
    heads, length = prompt.keys.shape[1], prompt.length
    grouped = prompt.query.reshape(rows, heads, prompt.groups, held, dim)
    block = 8 * BLOCK if grouped.is_cuda else BLOCK
    for start in range(0, count, block):
        n = min(block, count - start)
        first, end = length - count + start, length - count + start + n  # positions of the block's queries
        at = held - count + start
        queries = grouped[:, :, :, at : at + n].reshape(rows, heads, prompt.groups * n, dim)
        logits = prompt.rule.logits((queries @ prompt.keys[:, :, :end].transpose(-1, -2)).float())
        logits = logits.reshape(rows, heads, prompt.groups, n, end)
        hide_future(logits, first, prompt.strictly_causal)
        yield start, attention_from(logits, prompt)
