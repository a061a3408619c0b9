"""Eviction while decoding: attention with its weights in view, and which tokens leave after it.

Legend: B rows of a batch, H stored heads, g query heads a stored head, S slots, w held queries, D channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..cache.products import exact_products
from ..cache.prompt import Prompt
from ..storage.base import LayerStorage
from .eviction_state import EvictionState, slots_in_use
from .policy import Step
from .ranking import keep_mask, last_slot
from .scorers.base import Scorer


def attend_and_weigh(storage: LayerStorage, step: Step) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Append one token per row and attend, with the weights in view.

    Returns:
        (output [B, H_q, 1, D]; weights [B, H, g, S] float32 over all slots seen, the new token's the last unless it
        does not see itself; which slots hold a real token [B, 1 or H, S], or None: all).
    """
    step.append_to(storage, before_attention=True)
    keys, values, held = storage.read()
    batch, query_heads, _, dim = step.query.shape
    grouped = step.query.reshape(batch, keys.shape[1], -1, dim)  # [B, H, g, D]
    logits = step.rule.logits(exact_products(grouped, keys))  # [B, H, g, S]
    if held is not None:
        visible = held
        if step.valid is not None:
            visible = held.clone()
            visible[..., -1] = True  # a pad sees itself, for a softmax over something
        logits = logits.masked_fill(~visible[:, :, None], float("-inf"))
    weights = step.rule.weights(logits, head_dims=2)
    out = (weights.to(values.dtype) @ values).reshape(batch, query_heads, 1, -1)
    step.append_to(storage, before_attention=False)
    return out, weights.float(), held


def join_readers(state: EvictionState, storage: LayerStorage, step: Step, weights: torch.Tensor) -> torch.Tensor | None:
    """Attention that all layers of the model which read one cache layer have paid in a step; None before the last.

    Args:
        state: Holds what came before.
        storage: Of the cache layer.
        step: The step of the layer that comes now.
        weights: [B, H, g, S]. A layer that came before the new token was written paid it nothing.

    Returns:
        [B, H, g of all readers, S].
    """
    if step.use.is_last_reader and not step.use.strictly_causal and not state.pending:
        return weights
    state.pending.append(weights)
    if not step.use.is_last_reader:
        return None
    parts, state.pending = state.pending, []
    slots = storage.read()[0].shape[2]
    return torch.cat([F.pad(part, (0, slots - part.shape[3])) for part in parts], dim=2)


def evict_one(state: EvictionState, storage: LayerStorage, scores: torch.Tensor, sinks: int, at_once: bool) -> None:
    """Let the lowest-scored token leave where more are held than the limit; its slot is used again later.

    Args:
        state: Of the layer.
        storage: Of the layer.
        scores: [B, 1 or H, S] float32.
        sinks: First tokens that may not leave.
        at_once: Close the gaps now, so that the real tokens end at the last slot again (a pad was appended).
    """
    assert state.limit is not None and state.recent is not None
    slots, held = scores.shape[-1], storage.read()[2]
    if slots <= state.max_limit and held is None:  # padding is on the left: more slots than tokens, never fewer
        return
    limit = state.limit[:, :, None]  # [B, 1 or H, 1]
    count = torch.full_like(limit, slots) if held is None else held.sum(-1, keepdim=True)  # [B, 1 or H, 1]
    stay = torch.ones_like(scores, dtype=torch.bool) if held is None else held.expand_as(scores)
    place = torch.arange(slots, device=scores.device)
    protected = place >= storage.end - state.recent[:, :, None]  # the last slots hold the last tokens, without a gap
    if sinks:
        protected = protected | (stay.cumsum(-1) <= sinks)
    victim = last_slot(scores.masked_fill(protected | ~stay, float("inf")))  # [B, 1 or H, 1]
    stay = stay.scatter(-1, victim, stay.gather(-1, victim) & (count <= limit))
    state.evict(storage, stay, at_once)


def evict_to_limit(
    state: EvictionState, storage: LayerStorage, scores: torch.Tensor, ties: torch.Tensor | None, sinks: int
) -> None:
    """Keep the best tokens up to the limit: any number may leave.

    Args:
        state: Of the layer.
        storage: Of the layer.
        scores: [B, 1 or H, S] float32; entries of empty slots are ignored.
        ties: Second scores of the same shape, or None.
        sinks: First tokens that may not leave.
    """
    assert state.limit is not None and state.recent is not None
    held = slots_in_use(storage, scores.shape[1])  # [B, 1 or H, S]
    scores = scores.expand_as(held)
    count = held.sum(-1, keepdim=True)  # [B, 1 or H, 1]
    rank = held.cumsum(-1)  # [B, 1 or H, S], 1 for the first token held
    protected = held & ((rank <= sinks) | (rank > count - state.recent[:, :, None]))
    ranked = scores.masked_fill(protected, float("inf")).masked_fill(~held, float("-inf"))
    keep = torch.minimum(state.limit[:, :, None], count)[..., 0]  # [B, 1 or H]
    stay = keep_mask(ranked, keep.expand(*held.shape[:2]), None if ties is None else ties.expand_as(held))
    state.evict(storage, stay & held, at_once=True)


def score_again(
    scorer: Scorer, state: EvictionState, storage: LayerStorage, heads_differ: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Scores and ties [B, 1 or H, S] of the held tokens, as if they were a prompt of their own.

    Rows that hold equally many tokens are scored together; where heads differ, each head is a row by itself. Counting
    them asks the device, so this is work between captured steps. (None, None): no row is over its limit.
    """
    assert state.limit is not None and state.rule is not None
    keys, values, held = storage.read()
    batch, heads, slots, _ = keys.shape
    mask = torch.ones(batch, 1, slots, dtype=torch.bool, device=keys.device) if held is None else held
    if not heads_differ:
        mask = mask[:, :1]
    queries, seen = state.queries, torch.tensor(state.seen)
    if heads_differ:  # [B, H, ...] -> [B * H, 1, ...]
        mask = mask.expand(-1, heads, -1).reshape(batch * heads, 1, slots)
        keys, values = (x.flatten(0, 1)[:, None] for x in (keys, values))
        if queries is not None:
            queries = queries.unflatten(1, (heads, -1)).flatten(0, 1)
        seen = seen.repeat_interleave(heads)
    counts = mask[:, 0].sum(-1)  # [rows]
    over = counts > state.limit.expand(batch, heads if heads_differ else 1).flatten()
    if not bool(over.any()):
        return None, None
    scores: torch.Tensor | None = None
    ties: torch.Tensor | None = None
    for count, tokens_seen in sorted(set(zip(counts.tolist(), seen.tolist(), strict=True))):
        rows = ((counts == count) & (seen.to(counts.device) == tokens_seen)).nonzero()[:, 0]
        slot = mask[rows].int().sort(dim=-1, stable=True).indices[..., slots - count :]  # [R, 1, T]
        index = slot.expand(-1, keys.shape[1], -1)[..., None]
        k, v = (x[rows].gather(2, index.expand(-1, -1, -1, x.shape[3])) for x in (keys, values))
        if queries is None:
            query = k.new_zeros(len(rows), k.shape[1], 0, k.shape[3])
        else:
            w = min(queries.shape[2], count, tokens_seen)
            query = queries[rows][:, :, queries.shape[2] - w :]
        prompt = Prompt(query, k, v, state.rule, state.layer.place, state.layer.count, seen=tokens_seen)
        scores = _scatter(scores, scorer.score(prompt, state.of_scorer), rows, slot, mask, float("-inf"))
        second = scorer.tie_scores(prompt, state.of_scorer)
        if second is not None:
            ties = _scatter(ties, second, rows, slot, mask, 0.0)
    if heads_differ:
        scores, ties = (None if x is None else x.view(batch, heads, slots) for x in (scores, ties))
    return scores, ties


def _scatter(
    whole: torch.Tensor | None,
    values: torch.Tensor,
    rows: torch.Tensor,
    slot: torch.Tensor,
    mask: torch.Tensor,
    empty: float,
) -> torch.Tensor:
    """Put values [R, H, T] of some rows to their slots [R, 1, T]; ``whole`` [rows of mask, H, S] is made if None."""
    if whole is None:
        whole = values.new_full((mask.shape[0], values.shape[1], mask.shape[2]), empty)
    whole[rows] = whole[rows].scatter(-1, slot.expand(-1, values.shape[1], -1), values)
    return whole
