"""Eviction while decoding: attention that returns its weights, and the choice of the tokens to evict.

Legend: B batch rows, H stored heads, g query heads per stored head, S slots, w stored queries, D channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..cache.prompt import Prompt
from ..storage.base import LayerStorage
from ..storage.buffer import take_slots
from ..storage.step_attention import step_attention_with_weights
from .eviction_state import EvictionState, slots_in_use
from .policy import Step
from .ranking import keep_mask, lowest_ranked_slot
from .scorers.base import Scorer

UNLIMITED = 2**30
"""Limit of a head that evicts no tokens."""

HEAD_SEED_STEP = 86_028_121
"""Difference of the seeds of two heads that are scored again as if they were rows."""


def limit_each_head(state: EvictionState, evicts_from_whole_heads: bool) -> None:
    """Limit each head to what the prompt's compression has left; heads of a prompt within the budget keep its limit.

    Args:
        state: State of the layer, with the limits [B, 1] of its rows.
        evicts_from_whole_heads: See :class:`.schedules.base.Schedule`.
    """
    assert state.limit is not None and state.prompt is not None
    lengths, tokens = state.prompt.lengths[:, None], state.prompt.storage.tokens  # [B, 1] and [B, 1 or H]
    state.limit = torch.where(lengths > state.limit, tokens, state.limit)
    evicts = torch.full_like(tokens, True, dtype=torch.bool) if evicts_from_whole_heads else tokens < lengths
    state.max_limit = max(state.limit[evicts].tolist(), default=UNLIMITED)
    state.limit = state.limit.masked_fill(~evicts, UNLIMITED)


def attend_with_weights(
    storage: LayerStorage, step: Step, may_average: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Attend with one token per row, returning the attention weights.

    Args:
        storage: Storage of the layer.
        step: The step.
        may_average: See :func:`..storage.step_attention.step_attention_with_weights`.

    Returns:
        (output [B, H_q, 1, D]; weights [B, H, g or 1, S] float32; valid [B, 1 or H, S] bool, True where a slot holds a
        real token, or None: everywhere).
    """
    keys, values, valid = storage.read()  # [B, H, S, D]
    visible = valid
    if valid is not None and step.valid is not None:
        visible = valid.clone()
        visible[..., -1] = True  # a pad attends to itself, because the softmax of a fully masked row is NaN
    out, weights = step_attention_with_weights(step.query, keys, values, step.rule, visible, may_average)
    return out, weights, valid


def step_weights(state: EvictionState, storage: LayerStorage) -> torch.Tensor:
    """Return the attention weights of all :meth:`.policy.CachePolicy.attend` calls of a step: [B, H, g of all, S].

    Weights with fewer than S slots are of a call before the new token was stored; the others get a zero for it.
    """
    collected, state.weights = state.weights, []
    slots = storage.slots
    if len(collected) == 1 and collected[0].shape[3] == slots:
        return collected[0]
    return torch.cat([F.pad(x, (0, slots - x.shape[3])) for x in collected], dim=2)


def evict_one(
    state: EvictionState,
    storage: LayerStorage,
    scores: torch.Tensor,
    sinks: int | torch.Tensor,
    compact_now: bool,
) -> None:
    """Evict the lowest-scored token of every row and head over its limit; its slot is a hole until a compaction.

    Args:
        state: State of the layer.
        storage: Storage of the layer.
        scores: [B, 1 or H, S] float32.
        sinks: Number of first tokens that are never evicted, or int64 [B, 1 or H, 1].
        compact_now: Compact immediately, because a pad was appended and the last slots must hold the last tokens.
    """
    assert state.limit is not None and state.recent is not None
    slots, valid = scores.shape[-1], storage.valid
    if slots <= state.max_limit and valid is None:  # with padding there are more slots than tokens, never fewer
        return
    if valid is not None and valid.shape[1] > scores.shape[1]:  # scores of all heads alike, masks of each head
        scores = scores.expand_as(valid)
    limit = state.limit[:, :, None]  # [B, 1 or H, 1]
    count = torch.full_like(limit, slots) if valid is None else valid.sum(-1, keepdim=True)  # [B, 1 or H, 1]
    keep = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid.expand_as(scores)  # [B, 1 or H, S]
    slot = torch.arange(slots, device=scores.device)
    # The last slots hold the last tokens, without holes.
    protected = slot >= (storage.end - state.recent)[..., None]  # [B, 1 or H, S]
    if isinstance(sinks, torch.Tensor) or sinks:
        protected = protected | (keep.cumsum(-1) <= sinks)
    victim = lowest_ranked_slot(scores.masked_fill(protected | ~keep, float("inf")))  # [B, 1 or H, 1]
    is_evicted = keep.gather(-1, victim) & (count > limit)  # [B, 1 or H, 1]
    keep = keep.scatter(-1, victim, keep.gather(-1, victim) & ~is_evicted)
    if state.merging is not None:
        state.merging.merge_one(storage, scores, keep, victim, is_evicted, in_place=state.is_static)
    state.evict(storage, keep, compact_now)


def evict_to_limit(
    state: EvictionState, storage: LayerStorage, scores: torch.Tensor, ties: torch.Tensor | None, sinks: int
) -> None:
    """Keep the highest-ranked tokens up to the limit and evict all others, from the rows that are due.

    Args:
        state: State of the layer.
        storage: Storage of the layer.
        scores: [B, 1 or H, S] float32; entries of empty slots are ignored.
        ties: Tie-breaking scores of the same shape, or None.
        sinks: Number of first tokens that are never evicted.
    """
    assert state.limit is not None and state.recent is not None
    valid = slots_in_use(storage, scores.shape[1])  # [B, 1 or H, S]
    scores = scores.expand_as(valid)
    count = valid.sum(-1, keepdim=True)  # [B, 1 or H, 1]
    rank = valid.cumsum(-1)  # [B, 1 or H, S], 1 for the first token
    protected = valid & ((rank <= sinks) | (rank > count - state.recent[:, :, None]))
    ranked = scores.masked_fill(protected, float("inf")).masked_fill(~valid, float("-inf"))
    budget = torch.minimum(state.limit[:, :, None], count)[..., 0]  # [B, 1 or H]
    keep = keep_mask(ranked, budget.expand(*valid.shape[:2]), None if ties is None else ties.expand_as(valid))
    keep &= valid
    due = state.is_due()
    if not all(due):
        keep = torch.where(torch.tensor(due, device=keep.device)[:, None, None], keep, valid)
    if state.merging is not None:
        state.merging.merge(storage, scores, valid, keep, in_place=state.is_static)
    state.evict(storage, keep, compact_now=True)


def rescore(
    scorer: Scorer, state: EvictionState, storage: LayerStorage, heads_differ: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Score the stored tokens of the rows that are due as if they were a prompt.

    Rows with equally many tokens are scored together; if heads differ, each head is treated as a row. This syncs with
    the device, so it runs between captured steps.

    Returns:
        Scores and tie-breaking scores, [B, 1 or H, S] each; (None, None) if no row that is due is over its limit.
    """
    assert state.limit is not None and state.rule is not None
    keys, values, valid = storage.read()
    batch, heads, slots, _ = keys.shape
    mask = torch.ones(batch, 1, slots, dtype=torch.bool, device=keys.device) if valid is None else valid
    if not heads_differ:
        mask = mask[:, :1]
    queries, text_seeds = state.queries, state.text_seeds
    rows_state = list(zip(state.is_due(), state.seen, state.windows, strict=True))
    if heads_differ:  # [B, H, ...] -> [B * H, 1, ...]
        mask = mask.expand(-1, heads, -1).reshape(batch * heads, 1, slots)
        keys, values = (x.flatten(0, 1)[:, None] for x in (keys, values))
        if queries is not None:
            queries = queries.unflatten(1, (heads, -1)).flatten(0, 1)
        rows_state = [row for row in rows_state for _ in range(heads)]
        text_seeds = (text_seeds[:, None] + HEAD_SEED_STEP * torch.arange(heads, device=text_seeds.device)).flatten()
    counts = mask[:, 0].sum(-1)  # [rows]
    over = (counts > state.limit.expand(batch, heads if heads_differ else 1).flatten()).tolist()
    if not any(is_over and due for is_over, (due, _, _) in zip(over, rows_state, strict=True)):
        return None, None
    groups: dict[tuple[int, int, int], list[int]] = {}  # rows by tokens stored, tokens seen and queries
    for row, (count, (due, tokens_seen, window)) in enumerate(zip(counts.tolist(), rows_state, strict=True)):
        if due:
            groups.setdefault((count, tokens_seen, window), []).append(row)
    scores: torch.Tensor | None = None
    ties: torch.Tensor | None = None
    for (count, tokens_seen, window), members in sorted(groups.items()):
        rows = torch.tensor(members, device=counts.device)
        slot = mask[rows].int().sort(dim=-1, stable=True).indices[..., slots - count :]  # [R, 1, T]
        k, v = (take_slots(x[rows], slot) for x in (keys, values))  # [R, H, T, D]
        if queries is None:
            query = k.new_zeros(len(rows), k.shape[1], 0, k.shape[3])
        else:
            w = min(window, count, tokens_seen)
            query = queries[rows][:, :, queries.shape[2] - w :]
        place = (state.layer.place, state.layer.count)
        prompt = Prompt(query, k, v, state.rule, *place, seen=tokens_seen, text_seeds=text_seeds[rows])
        scores = _scatter(scores, scorer.score(prompt, state.scorer_state), rows, slot, mask, float("-inf"))
        tie_scores = scorer.tie_scores(prompt, state.scorer_state)
        if tie_scores is not None:
            ties = _scatter(ties, tie_scores, rows, slot, mask, 0.0)
    if heads_differ:
        scores, ties = (None if x is None else x.view(batch, heads, slots) for x in (scores, ties))
    return scores, ties


def _scatter(
    out: torch.Tensor | None,
    values: torch.Tensor,
    rows: torch.Tensor,
    slot: torch.Tensor,
    mask: torch.Tensor,
    empty: float,
) -> torch.Tensor:
    """Scatter values [R, H, T] of some rows to their slots [R, 1, T] of ``out`` [all rows, H, S], created if None."""
    if out is None:
        out = values.new_full((mask.shape[0], values.shape[1], mask.shape[2]), empty)
    out[rows] = out[rows].scatter(-1, slot.expand(-1, values.shape[1], -1), values)
    return out
