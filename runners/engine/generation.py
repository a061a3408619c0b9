"""Generation: prefill, then decode until every row has ended."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ...methods.cache.cache import KVCache
from .decoding import feed, uncaptured_step
from .prefilling import prefill
from .sampling import Sampler, Sampling


@dataclass
class Generation:
    """Result of :func:`generate`.

    Attributes:
        tokens: New token ids of each row, without the stop token; rows as in :func:`decode`.
        steps: Number of decode steps (each for all rows).
    """

    tokens: list[list[int]]
    steps: int


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    cache: KVCache,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    min_new_tokens: int = 0,
    sampling: Sampling | None = None,
    chunk_size: int | None = None,
    after_prefill: Callable[[], None] | None = None,
    question: torch.Tensor | None = None,
    question_tokens: Sequence[int] | None = None,
    until: Callable[[int, list[int]], bool] | None = None,
    after_step: Callable[[int], None] | None = None,
) -> Generation:
    """Prefill, then decode until every row has ended.

    Args:
        model, cache, input_ids, attention_mask, chunk_size, question_tokens: See :func:`prefill`.
        max_new_tokens: Largest number of tokens per row; >= 1.
        stop_ids: A row ends when it would produce one of these. Empty: all rows run to ``max_new_tokens`` (which is
            how speed is measured).
        min_new_tokens: No stop id is produced before a row has this many tokens (its probability is set to zero).
        sampling: Greedy when None.
        after_prefill: Called once the prompt is compressed, before anything else is fed.
        question: [B, q] further tokens of the prompts, fed after the compression.
        until: A row also ends, after a token that is kept, if ``until(prompt row, its tokens)`` is true.
        after_step: Called with the number of tokens so far, after each one.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be >= 1, got {max_new_tokens}")
    sampler = Sampler(sampling or Sampling(), stop_ids, min_new_tokens, input_ids.shape[0], input_ids.device)
    logits = prefill(model, cache, input_ids, attention_mask, chunk_size, question_tokens)
    if after_prefill is not None:
        after_prefill()
    if question is not None:
        (logits,) = collections.deque(feed(model, cache, question.repeat(cache.copies, 1)), maxlen=1)  # the last one
        logits = logits[:, -1]
    rows = _Rows(input_ids.shape[0], cache.copies, sampler.stop_ids, until)
    step = uncaptured_step(model, cache)
    steps = 0
    while True:
        token = sampler(logits, steps)
        rows.append(token)
        steps += 1
        if after_step is not None:
            after_step(steps)
        if steps >= max_new_tokens or all(rows.ended):
            return Generation(rows.tokens, steps - 1)
        token = rows.drop_ended_members(cache, token)
        logits = step(token)


class _Rows:
    """Tokens of every row, and which rows are still decoded.

    Args:
        batch: Number of prompts.
        members: Number of caches in a fan-out, 1 without one.
        stop_ids: Ids that end a row.
        until: See :func:`generate`.
    """

    def __init__(
        self, batch: int, members: int, stop_ids: frozenset[int], until: Callable[[int, list[int]], bool] | None
    ):
        self.tokens: list[list[int]] = [[] for _ in range(batch * members)]
        self.ended = [False] * (batch * members)
        self._decoded = list(range(batch * members))  # the row of `tokens` that each decode row belongs to
        self._batch, self._stop_ids, self._until = batch, stop_ids, until

    def append(self, token: torch.Tensor) -> None:
        """Append ``token`` [decode rows] to the rows that have not ended."""
        for row, value in zip(self._decoded, token.tolist(), strict=True):
            if self.ended[row]:
                continue
            if value in self._stop_ids:
                self.ended[row] = True
            else:
                self.tokens[row].append(value)
                self.ended[row] = self._until is not None and self._until(row % self._batch, self.tokens[row])

    def drop_ended_members(self, cache: KVCache, token: torch.Tensor) -> torch.Tensor:
        """Drop the fan-out members whose rows have all ended; returns the tokens [decode rows] of the others."""
        if cache.copies == 1 or not any(self.ended):
            return token
        kept = []
        for member in reversed(range(cache.copies)):
            rows = self._decoded[member * self._batch : (member + 1) * self._batch]
            if all(self.ended[row] for row in rows):
                cache.drop(member)
            else:
                kept.append(member)
        index = [member * self._batch + b for member in reversed(kept) for b in range(self._batch)]
        self._decoded = [self._decoded[i] for i in index]
        return token[torch.tensor(index, device=token.device)]
