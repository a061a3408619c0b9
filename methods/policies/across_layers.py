"""Compression of a prompt under a budget for all layers together, after the last layer has prefilled.

Legend: B batch rows, R rows of one prompt length, H stored heads, N candidates, S slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F

from .allocators.base import Allocator
from .eviction_state import EvictionState, slots_in_use
from .ranking import keep_mask


def compress_across_layers(allocator: Allocator, states: Sequence[EvictionState]) -> None:
    """Distribute the budget over all layers and compress the prompt of each."""
    prompts = [state.prompt for state in states if state.prompt is not None]
    assert len(prompts) == len(states)
    masks = [slots_in_use(p.storage, p.storage.read()[0].shape[1]).clone() for p in prompts]  # [B, H, S] per layer
    for group in zip(*(state.candidates for state in states), strict=True):  # all layers, rows of one prompt length
        scores, ties = [c.scores for c in group], [c.ties for c in group]
        budgets = allocator.cache_budgets(scores, group[0].free, ties)  # [R, H] per layer
        for prompt, keep, c, budget in zip(prompts, masks, group, budgets, strict=True):
            best = keep_mask(c.scores, budget, c.ties)  # [R, H, N]
            rows = prompt.lengths == c.length
            keep[rows, :, keep.shape[2] - c.length :] = F.pad(best, (c.sinks, c.recent), value=True)
    for state, prompt, keep in zip(states, prompts, masks, strict=True):
        state.evict(prompt.storage, keep, compact_now=True)
        state.candidates = []
