"""Ranks of tokens, by which a held budget evicts while decoding; see :mod:`.schedules.hold`.

The candidates of a prompt of T tokens rank below its last ``recent`` tokens, whose ranks are their positions, as are
those of generated tokens. After a step whose token has position p, tokens stay that are sinks or rank above
``p - (C - sinks)``: as many as the budget C of a head, or of the mean head where heads share a budget.

Legend: B batch rows, R rows of one prompt length, H stored heads, N candidates, T prompt tokens, S slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..storage.base import LayerStorage
from .allocators.base import Allocator
from .eviction_state import EvictionState
from .ranking import sort_keys


def prompt_ranks(scores: torch.Tensor, ties: torch.Tensor | None, sinks: int, recent: int) -> torch.Tensor:
    """Return the ranks of all tokens of a prompt, the lowest of a head to be evicted first: float32 [R, H, T].

    Args:
        scores, ties: [R, H, N], see :func:`.ranking.keep_slots`.
        sinks: Number of tokens before the candidates; they are never evicted, whatever their rank.
        recent: Number of tokens after the candidates.
    """
    order = sort_keys(scores, ties).sort(dim=-1, descending=True, stable=True).indices  # of equal ones the lower first
    return _with_protected(_places(order), sinks, recent)


def shared_ranks(
    scores: Sequence[torch.Tensor],
    ties: Sequence[torch.Tensor | None],
    kept: Sequence[torch.Tensor],
    n_sure: int,
    sinks: int,
    recent: int,
) -> list[torch.Tensor]:
    """Return the ranks [R, H, T] of all tokens in each layer, for heads that share one budget.

    At each step as many tokens are evicted as there are heads, and these have one rank: those with the lowest scores of
    all heads, wherever they are.

    Args:
        scores, ties: [R, H, N] of each layer that shares the budget.
        kept: Bool [R, H, N] per layer, the candidates that are kept after the prompt; the others rank below them.
        n_sure: Number of candidates that the allocator keeps in each head, its best ones; they are evicted after all
            others, the lowest of every head first.
        sinks, recent: See :func:`prompt_ranks`.
    """
    heads = [x.shape[1] for x in scores]
    all_ties = None if ties[0] is None else torch.cat([x for x in ties if x is not None], dim=1)
    keys, is_kept = sort_keys(torch.cat(list(scores), dim=1), all_ties), torch.cat(list(kept), dim=1)  # [R, all H, N]
    place = _places(keys.sort(dim=-1, descending=True, stable=True).indices)  # in the head, 0 for its best
    group = torch.where(place < n_sure, 1 + n_sure - place, 1).masked_fill(~is_kept, 0).flatten(1)
    order = keys.flatten(1).sort(dim=-1, descending=True, stable=True).indices
    order = order.gather(-1, group.gather(-1, order).sort(dim=-1, descending=True, stable=True).indices)
    place = (_places(order) // sum(heads)).unflatten(1, (sum(heads), -1))
    return [_with_protected(x, sinks, recent) for x in place.split(heads, dim=1)]


def ranks_under(
    allocator: Allocator,
    scores: Sequence[torch.Tensor],
    ties: Sequence[torch.Tensor | None],
    kept: Sequence[torch.Tensor],
    free: int,
    sinks: int,
    recent: int,
) -> list[torch.Tensor]:
    """Return the ranks [R, H, T] of the layers that share the allocator's budget, or of one that has its own.

    Args:
        allocator: Decides whether heads share a budget.
        scores, ties, kept, sinks, recent: See :func:`shared_ranks`.
        free: Number of candidates that are kept, as the mean over layers and heads.
    """
    if not allocator.heads_differ:
        return [prompt_ranks(*one, sinks, recent) for one in zip(scores, ties, strict=True)]
    n_sure = allocator.sure_of_each_head(free, sinks + recent)
    return shared_ranks(scores, ties, kept, n_sure, sinks, recent)


def _places(order: torch.Tensor) -> torch.Tensor:
    """Return the place of each entry in ``order``, its inverse along the last dimension."""
    place = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, place)


def _with_protected(place: torch.Tensor, sinks: int, recent: int) -> torch.Tensor:
    """Return the ranks [R, H, T] for candidates [R, H, N] in these places from the best, and the protected tokens."""
    n = place.shape[2]
    position = torch.arange(sinks + n, sinks + n + recent, device=place.device, dtype=torch.float32)
    rank = F.pad((sinks + n - 1 - place).float(), (sinks, 0))
    return torch.cat([rank, position.expand(*rank.shape[:2], -1)], dim=-1)


def evict_by_rank(
    state: EvictionState, storage: LayerStorage, sinks: int, real: torch.Tensor | None, shares: bool
) -> None:
    """Store the rank of a step's token and evict what ranks too low; its slots are holes until a compaction.

    Args:
        state, storage: Of the layer.
        sinks: Number of first tokens that are never evicted.
        real: Bool [B], False for a row whose token is a pad; None: no pads.
        shares: Whether heads share the budget, so that each of them loses any number of tokens.
    """
    assert state.scores is not None and state.limit is not None and state.recent is not None
    assert state.position is not None
    slots, valid, end = storage.slots, storage.valid, storage.end
    stored = F.pad(state.scores, (0, slots - state.scores.shape[2]))  # [B, 1 or H, S]
    last = end - 1 if isinstance(end, int) else end[:, : stored.shape[1], None] - 1
    is_new = torch.arange(slots, device=stored.device) == last
    if real is not None:
        is_new = is_new & real[:, None, None]
    state.store_scores(torch.where(is_new, state.position, stored))
    state.position += 1 if real is None else real[:, None, None]
    if slots <= state.max_limit and valid is None and not shares:
        return
    newest = state.position - 1  # [B, 1, 1]
    held = torch.ones_like(state.scores, dtype=torch.bool) if valid is None else valid  # [B, 1 or H, S]
    limit = state.limit[:, :, None]  # [B, 1, 1]
    n_sinks = (limit - state.recent[:, :, None]).clamp(max=sinks)
    keep = (state.scores > newest - (limit - n_sinks)) | (held.cumsum(-1) <= n_sinks)
    state.evict(storage, held & keep, compact_now=real is not None)
