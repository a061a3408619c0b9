"""Further forwards that give a prompt to the model again, behind its cache, and score its tokens by them (KVzip).

Legend: R rows of one prompt length, H_q query heads, H_kv KV heads, g = H_q / H_kv, T prompt tokens, N repeated
tokens, n queries of a block, C columns, D channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ...conf.errors import InputError
from ..cache.cache import KVCache
from ..cache.forward import LayerCall
from ..cache.products import cached_attention
from ..cache.rotary import DYNAMIC_ROPE_TYPES
from ..sharing.plan import Plan
from ..storage.base import LayerStorage
from .policy import FurtherForwards
from .repeated_prompt import Repetitions
from .request import Request
from .scorers.base import Scorer

Stored = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values [R, H_kv, T, D] of each layer."""
PREFIX_SCORE = 2.0
"""Score of what always stays, above that of any attention."""
BLOCK_QUERIES = 512
"""Queries whose attention is computed at once."""


@dataclass(frozen=True)
class RepetitionResult:
    """Result of :func:`_scores_by_repetition` and the arguments that it depends on."""

    repetitions: Repetitions
    stored: Stored
    ids: torch.Tensor
    scores: list[torch.Tensor]

    def matches(self, repetitions: Repetitions, stored: Stored, ids: torch.Tensor) -> bool:
        """Return whether the same forwards would see the same keys, values and prompts."""
        pairs = zip(self.stored, stored, strict=True)
        return (
            self.repetitions == repetitions
            and torch.equal(self.ids, ids)
            and all(torch.equal(x, y) for ours, theirs in pairs for x, y in zip(ours, theirs, strict=True))
        )


def stored_prompts(storages: Sequence[LayerStorage], rows: list[int], length: int) -> Stored:
    """Return keys and values of each layer for ``rows``, whose prompts have ``length`` tokens."""
    read = [storage.read()[:2] for storage in storages]  # [B, H_kv, S, D]
    index = slice(None) if len(rows) == len(read[0][0]) else rows  # no copy of a batch of one length
    return [(keys[index, :, -length:], values[index, :, -length:]) for keys, values in read]


def scores_by_repetition(
    scorer: Scorer,
    request: Request,
    model: PreTrainedModel,
    plan: Plan,
    stored: Stored,
    ids: torch.Tensor,
    earlier: list[RepetitionResult] | None = None,
) -> tuple[list[torch.Tensor], list[FurtherForwards]]:
    """Return the largest attention that each token receives from the tokens that repeat it, and what that took.

    Tokens that a chat template has before the user's text are above all others (:data:`PREFIX_SCORE`).

    Args:
        scorer: Says what each forward repeats (:meth:`.scorers.base.Scorer.repetitions`).
        request: State of the scorer.
        model: The model.
        plan: Plan of the model.
        stored: Keys and values [R, H_kv, T, D] of each layer, which are not modified.
        ids: [R, T], the prompts.
        earlier: Results of other members of a fan-out, to which new ones are appended: several budgets of one scorer
            need the forwards once. None: there are no other members.

    Returns:
        Scores [R, H_kv, T] of each layer, and the forwards of each row.

    Raises:
        InputError: The model cannot be run behind its cache.
    """
    n_prefix = len(request.prefix or ())
    prefixes = [request.prefix_length(prompt) for prompt in ids[:, :n_prefix].tolist()]
    scores = [torch.zeros(keys.shape[:3], device=keys.device) for keys, _ in stored]
    forwards = [FurtherForwards()] * len(prefixes)
    for prefix in dict.fromkeys(prefixes):
        rows = [row for row, other in enumerate(prefixes) if other == prefix]
        index = slice(None) if len(rows) == len(prefixes) else rows  # no copy of a batch whose rows are alike
        repetitions = scorer.repetitions(ids.shape[1], prefix, request)
        part = [(keys[index], values[index]) for keys, values in stored]
        of_rows = _scores_by_repetition(repetitions, model, plan, part, ids[index], earlier)
        for all_rows, new in zip(scores, of_rows, strict=True):
            all_rows[index] = new
            all_rows[index, :, : prefix or 0] = PREFIX_SCORE
        took = FurtherForwards(len(repetitions.forwards), sum(r.tokens for r in repetitions.forwards))
        forwards = [took if row in rows else other for row, other in enumerate(forwards)]
    return scores, forwards


def _scores_by_repetition(
    repetitions: Repetitions,
    model: PreTrainedModel,
    plan: Plan,
    stored: Stored,
    ids: torch.Tensor,
    earlier: list[RepetitionResult] | None,
) -> list[torch.Tensor]:
    """Return the scores of prompts for which the same forwards are made; see :func:`scores_by_repetition`."""
    if (same := next((r for r in earlier or () if r.matches(repetitions, stored, ids)), None)) is not None:
        return same.scores
    length = ids.shape[1]
    _check(repetitions, model, plan, length)
    cache = RepetitionCache(plan, stored, repetitions.sinks)
    for r in repetitions.forwards:
        new = r.input_ids(ids)  # [R, N]
        cache.start, cache.end = r.scored.start, r.scored.stop
        model(
            input_ids=new,
            position_ids=length + torch.arange(new.shape[1], device=ids.device).expand_as(new),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
    if earlier is not None:
        earlier.append(RepetitionResult(repetitions, stored, ids, cache.scores))
    return cache.scores


def _check(repetitions: Repetitions, model: PreTrainedModel, plan: Plan, length: int) -> None:
    """Raise InputError if the model cannot make the forwards behind a prompt of ``length`` tokens."""
    name, longest = repetitions.name, max(r.tokens for r in repetitions.forwards)
    if not plan.is_uniform:
        problem = "repeats the prompt behind the cache: use it on a model all of whose layers keep all tokens"
        raise InputError("method/scorer", name, problem)
    if any(getattr(module, "rope_type", None) in DYNAMIC_ROPE_TYPES for module in model.modules()):
        problem = "repeats the prompt behind the cache, and the model's RoPE depends on the length of the text"
        raise InputError("method/scorer", name, problem)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and length + longest > positions:
        problem = f"repeats {longest} tokens behind a prompt of {length}, and the model has {positions} positions"
        raise InputError("method/scorer", name, f"{problem}; use smaller chunks or shorter prompts")


class RepetitionCache(KVCache):
    """Serves forwards behind a stored prompt, to which nothing is appended, and collects the attention to it.

    Args:
        plan: Plan of the model, each of whose layers owns keys and values.
        stored: Keys and values [R, H_kv, T, D] of each layer.
        sinks: Number of first tokens in each softmax.

    Attributes:
        scores: Largest attention weight of each token so far, [R, H_kv, T] float32 per layer.
        start, end: The tokens that the current forward repeats.
    """

    def __init__(self, plan: Plan, stored: Stored, sinks: int) -> None:
        super().__init__([], plan)
        self.stored, self.sinks = list(stored), sinks
        self.start = self.end = sinks
        self.scores = [torch.zeros(keys.shape[:3], device=keys.device) for keys, _ in stored]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.stored[0][0].shape[2]

    def attend(self, layer_idx: int, call: LayerCall, padding_mask: torch.Tensor | None) -> torch.Tensor:
        number = self.plan.cache_layer[layer_idx]
        keys, values = self.stored[number]
        columns = torch.cat([keys[:, :, : self.sinks], keys[:, :, self.start : self.end], call.key], dim=2)
        self.scores[number][:, :, self.start : self.end] = self._largest_weights(call, columns)
        keys, values = torch.cat([keys, call.key], dim=2), torch.cat([values, call.value], dim=2)
        return cached_attention(call.query, keys, values, call.rule)

    def _largest_weights(self, call: LayerCall, columns: torch.Tensor) -> torch.Tensor:
        """Return the largest weight of each repeated token, [R, H_kv, end - start] float32.

        Args:
            call: Queries and keys of the N repeated tokens.
            columns: [R, H_kv, C, D], keys of the softmax, the last N of which are the new ones.
        """
        rows, heads, count, dim = columns.shape
        new, chunk = call.columns, slice(self.sinks, self.sinks + self.end - self.start)
        queries = call.query.reshape(rows, heads, -1, new, dim)  # [R, H_kv, g, N, D]
        index = torch.arange(count, device=columns.device)
        largest = torch.zeros((rows, heads, self.end - self.start), device=columns.device)
        for first in range(0, new, BLOCK_QUERIES):
            block = queries[:, :, :, first : first + BLOCK_QUERIES]  # [R, H_kv, g, n, D]
            products = (block.flatten(2, 3) @ columns.mT).float().unflatten(2, block.shape[2:4])
            own = count - new + torch.arange(first, first + block.shape[3], device=columns.device)[:, None]  # [n, 1]
            logits = call.rule.logits(products).masked_fill(index > own, float("-inf"))  # [R, H_kv, g, n, C]
            weights = call.rule.weights(logits, head_dims=2)[..., chunk]
            largest = torch.maximum(largest, weights.amax(dim=(2, 3)))
        return largest
