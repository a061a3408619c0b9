"""Compression of stored prompts, once all layers have prefilled: under one budget for all of them, or by later scores.

Legend: B batch rows, R rows of one prompt length, H stored heads, N candidates, S slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .allocators.base import Allocator
from .eviction_state import Candidates, EvictionState, slots_in_use
from .prompt_ranks import ranks_under
from .ranking import keep_mask
from .scorers.base import Scorer


def compress_stored(allocator: Allocator, scorer: Scorer, states: Sequence[EvictionState], keeps_ranks: bool) -> None:
    """Distribute the budget over layers and heads and compress the stored prompt of each layer.

    Args:
        allocator: Allocator of the policy.
        scorer: Scorer of the policy.
        states: State of each layer.
        keeps_ranks: Whether the schedule evicts by the prompt's ranks, which replace ``state.scores``.
    """
    prompts = [state.prompt for state in states if state.prompt is not None]
    assert len(prompts) == len(states)
    masks = [slots_in_use(p.storage, p.storage.read()[0].shape[1]).clone() for p in prompts]  # [B, H, S] per layer
    for group in zip(*(state.candidates for state in states), strict=True):  # all layers, rows of one prompt length
        ranked, best = [], []  # scores and ties, and bool [R, H, N], per layer
        for keep, c, budget in zip(masks, group, _budgets(allocator, group), strict=True):
            ranked.append(scorer.ranking_scores(c.scores, c.ties, budget))
            best.append(keep_mask(ranked[-1][0], budget, ranked[-1][1]))
            rows = slice(None) if c.rows is None else c.rows
            keep[rows, :, keep.shape[2] - c.length :] = F.pad(best[-1], (c.sinks, c.recent), value=True)
        if keeps_ranks:
            for state, c, rank in zip(states, group, _ranks(allocator, group, ranked, best), strict=True):
                assert state.scores is not None
                rows = slice(None) if c.rows is None else c.rows
                state.scores[rows, :, state.scores.shape[2] - c.length :] = rank
    for state, prompt, keep in zip(states, prompts, masks, strict=True):
        state.evict(prompt.storage, keep, compact_now=True)
        state.candidates = []


def _budgets(allocator: Allocator, group: Sequence[Candidates]) -> list[torch.Tensor]:
    """Return the number of candidates that each head of each layer keeps, int64 [R, H] per layer."""
    if allocator.spans_layers:
        return allocator.cache_budgets([c.scores for c in group], group[0].free, [c.ties for c in group])
    if allocator.heads_differ:
        return [allocator.head_budgets(c.scores, c.free, c.ties, c.sinks + c.recent) for c in group]
    return [torch.full(c.scores.shape[:2], c.free, device=c.scores.device) for c in group]


def _ranks(
    allocator: Allocator,
    group: Sequence[Candidates],
    ranked: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
    kept: Sequence[torch.Tensor],
) -> list[torch.Tensor]:
    """Return the ranks [R, H, T] of each layer, among all heads that share a budget; see :mod:`.prompt_ranks`."""
    layers = range(len(group))
    ranks = []
    for members in [layers] if allocator.spans_layers else [[layer] for layer in layers]:
        c = group[members[0]]
        scores, ties = zip(*(ranked[layer] for layer in members), strict=True)
        ranks += ranks_under(allocator, scores, ties, [kept[layer] for layer in members], c.free, c.sinks, c.recent)
    return ranks
