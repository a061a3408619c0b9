"""Compression of a prompt whose budget is shared out between layers: all of them wait for the last one."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F

from .allocators.base import Allocator
from .eviction_state import EvictionState, slots_in_use
from .ranking import keep_mask


def compress_together(allocator: Allocator, states: Sequence[EvictionState]) -> None:
    """Share the budget out between all layers and evict from each what does not stay."""
    prompts = [state.prompt for state in states if state.prompt is not None]
    assert len(prompts) == len(states)
    kept = [slots_in_use(p.storage, p.storage.read()[0].shape[1]).clone() for p in prompts]  # [B, H, S] of each layer
    for group in zip(*(state.waiting for state in states), strict=True):  # the layers' candidates of some rows
        scores, ties = [c.scores for c in group], [c.ties for c in group]
        budgets = allocator.cache_budgets(scores, group[0].free, ties)
        for prompt, stay, c, budget in zip(prompts, kept, group, budgets, strict=True):
            best = keep_mask(c.scores, budget, c.ties)  # [R, H, N]
            rows = prompt.lengths == c.length
            stay[rows, :, stay.shape[2] - c.length :] = F.pad(best, (c.sinks, c.recent), value=True)
    for state, prompt, stay in zip(states, prompts, kept, strict=True):
        state.evict(prompt.storage, stay, at_once=True)
        state.waiting = []
