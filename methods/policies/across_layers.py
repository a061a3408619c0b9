"""Compression of a prompt whose budget is shared out between layers: all of them wait for the last one.

Legend: R rows of one prompt length, B rows of a batch, H stored heads, N candidates, T tokens, S slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ..storage.base import LayerStorage
from .allocators.base import Allocator
from .ranking import keep_mask

if TYPE_CHECKING:
    from .decoding import EvictionState


@dataclass(frozen=True)
class Candidates:
    """Tokens of one layer that compete, for the rows of one prompt length.

    Attributes:
        scores: [R, H, N].
        ties: [R, H, N] second scores, or None.
        free: Mean over layers and heads of the candidates that stay.
        sinks, recent: Protected tokens before and after the candidates.
    """

    scores: torch.Tensor
    ties: torch.Tensor | None
    free: int
    sinks: int
    recent: int

    @property
    def length(self) -> int:
        """T, tokens of the prompt."""
        return self.sinks + self.scores.shape[2] + self.recent


@dataclass(frozen=True)
class StoredPrompt:
    """A layer's whole prompt until all layers have theirs; ``lengths`` [B] int64, ``queries`` as for the policy."""

    storage: LayerStorage
    lengths: torch.Tensor
    queries: torch.Tensor | None


def compress_together(allocator: Allocator, states: Sequence[EvictionState]) -> None:
    """Share the budget out between all layers and evict from each what does not stay."""
    kept = [_held(state) for state in states]  # [B, H, S] of each layer
    for group in zip(*(state.waiting for state in states), strict=True):  # the layers' candidates of some rows
        scores, ties = [c.scores for c in group], [c.ties for c in group]
        budgets = allocator.cache_budgets(scores, group[0].free, ties)
        for state, stay, c, budget in zip(states, kept, group, budgets, strict=True):
            assert state.prompt is not None
            best = keep_mask(c.scores, budget, c.ties)
            rows = state.prompt.lengths == c.length
            stay[rows, :, stay.shape[2] - c.length :] = F.pad(best, (c.sinks, c.recent), value=True)
    for state, stay in zip(states, kept, strict=True):
        assert state.prompt is not None
        moved = state.prompt.storage.drop(stay, at_once=True)
        if moved is not None and state.scores is not None:
            state.scores = state.scores.gather(-1, moved.expand(*state.scores.shape[:2], -1))
        state.waiting = []


def _held(state: EvictionState) -> torch.Tensor:
    assert state.prompt is not None
    keys, _, held = state.prompt.storage.read()
    shape = keys.shape[:3]
    return torch.ones(shape, dtype=torch.bool, device=keys.device) if held is None else held.expand(shape).clone()
