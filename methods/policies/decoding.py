"""Eviction while decoding: the state of a layer, attention with its weights in view, and the tokens that leave.

Legend: B rows of a batch, H stored heads, g query heads a stored head, S slots, w held queries, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from ..cache.logits import LogitRule
from ..cache.products import exact_products
from ..cache.prompt import Prompt
from ..storage.base import LayerStorage
from .across_layers import Candidates, StoredPrompt
from .policy import Step
from .ranking import keep_mask, last_slot
from .scorers.base import ModelLayer, Scorer


@dataclass
class EvictionState:
    """One layer and batch.

    Attributes:
        layer: The layer of the model.
        of_scorer: What the scorer's ``new_state`` made for it.
        limit: [B, 1 or H] int64, tokens that each row (or head) may hold after an eviction.
        max_limit: The largest limit as a number of the host.
        recent: [B, 1] int64, last tokens that may not leave.
        scores: [B, H, S] float32, running scores of a scorer that accumulates; None: there are none.
        queries: [B, H_q, w, D], the last queries of a scorer that scores again, the newest last; None: none are held.
        seen: Real tokens that each row has seen.
        steps: Decode steps so far.
        is_static: The layer's tensors have their final shapes, and steps change them in place.
        rule: How the layer's logits are formed; known once a step has been.
        layers: The states of all layers whose budgets are shared out together, this one among them.
        prompt: What is stored of the prompt, until all of them have theirs.
        waiting: Candidates of this layer, for each prompt length of the batch.
        pending: Attention that layers of the model which share these tokens have paid in the step under way.
    """

    layer: ModelLayer
    of_scorer: Any = None
    limit: torch.Tensor | None = None
    max_limit: int = 0
    recent: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    queries: torch.Tensor | None = None
    seen: list[int] = field(default_factory=list)
    steps: int = 0
    is_static: bool = False
    rule: LogitRule | None = None
    layers: list[EvictionState] = field(default_factory=list, repr=False)
    prompt: StoredPrompt | None = None
    waiting: list[Candidates] = field(default_factory=list)
    pending: list[torch.Tensor] = field(default_factory=list)

    def hold_scores(self, scores: torch.Tensor) -> None:
        """Take the scores [B, 1 or H, S] of a step; a static layer's go into the tensor that is there."""
        if self.is_static and self.scores is not None:
            self.scores.copy_(scores)
        else:
            self.scores = scores

    def hold_queries(self, query: torch.Tensor, real: torch.Tensor | None) -> None:
        """Take in the queries of one step, [B, H_q, 1, D]; rows whose token is a pad (``real`` False) stay."""
        assert self.queries is not None
        moved = torch.cat([self.queries[:, :, 1:], query.to(self.queries.dtype)], dim=2)  # [B, H_q, w, D]
        if real is not None:
            moved = torch.where(real[:, None, None, None], moved, self.queries)
        if self.is_static:
            self.queries.copy_(moved)
        else:
            self.queries = moved

    def count(self, real: torch.Tensor | None = None) -> None:
        """Count a step on the host."""
        self.steps += 1
        came = [1] * len(self.seen) if real is None else real.int().tolist()
        self.seen = [n + more for n, more in zip(self.seen, came, strict=True)]


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


def _held(storage: LayerStorage, like: torch.Tensor) -> torch.Tensor:
    """Which slots hold a token, of the shape of scores [B, 1 or H, S]."""
    _, _, held = storage.read()
    return (
        torch.ones_like(like, dtype=torch.bool)
        if held is None
        else held.expand(-1, max(like.shape[1], held.shape[1]), -1)
    )


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
    _drop(state, storage, stay, at_once)


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
    held = _held(storage, scores)
    scores = scores.expand_as(held)
    count = held.sum(-1, keepdim=True)  # [B, 1 or H, 1]
    rank = held.cumsum(-1)  # [B, 1 or H, S], 1 for the first token held
    protected = held & ((rank <= sinks) | (rank > count - state.recent[:, :, None]))
    ranked = scores.masked_fill(protected, float("inf")).masked_fill(~held, float("-inf"))
    keep = torch.minimum(state.limit[:, :, None], count)[..., 0]  # [B, 1 or H]
    stay = keep_mask(ranked, keep.expand(*held.shape[:2]), None if ties is None else ties.expand_as(held))
    _drop(state, storage, stay & held, at_once=True)


def _drop(state: EvictionState, storage: LayerStorage, stay: torch.Tensor, at_once: bool) -> None:
    move_scores(state, storage.drop(stay, at_once))


def move_scores(state: EvictionState, moved: torch.Tensor | None) -> None:
    """Move running scores with their tokens, from the slots [B, 1 or H, C] that a storage has moved together."""
    if moved is None or state.scores is None:
        return
    scores = state.scores.gather(-1, moved.expand(*state.scores.shape[:2], -1))
    if state.is_static:
        state.scores.zero_()
        state.scores[..., : scores.shape[-1]] = scores
    else:
        state.scores = scores


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
    scores = ties = None
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
        found = [scorer.score(prompt, state.of_scorer), scorer.tie_scores(prompt, state.of_scorer)]
        for place, values_of in enumerate(found):
            if values_of is None:
                continue
            if place == 0 and scores is None:
                scores = values_of.new_full((len(counts), values_of.shape[1], slots), float("-inf"))
            if place == 1 and ties is None:
                ties = values_of.new_zeros(len(counts), values_of.shape[1], slots)
            whole = scores if place == 0 else ties
            assert whole is not None
            whole[rows] = whole[rows].scatter(-1, slot.expand(-1, whole.shape[1], -1), values_of)
    if heads_differ:
        scores, ties = (None if x is None else x.view(batch, heads, slots) for x in (scores, ties))
    return scores, ties
