"""Likelihoods of given continuations after a compressed prompt."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from ...methods.cache.cache import KVCache
from ...tasks.base import Likelihood
from .decoding import feed
from .prefilling import prefill

Continuation = tuple[Sequence[int], Sequence[int]]
"""Tokens that follow the prompt, and tokens after these that are scored."""


@torch.inference_mode()
def score(
    model: PreTrainedModel,
    cache: KVCache,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    continuations: Sequence[Sequence[Continuation]],
    *,
    chunk_size: int | None = None,
    after_prefill: Callable[[], None] | None = None,
) -> list[list[Likelihood]]:
    """Prefill the prompts, then score continuations, each on its own copy of the compressed cache.

    A continuation is scored only through the compressed cache if ``given`` has at least one token: the first token
    after a prompt is predicted before anything is compressed.

    Args:
        model, cache, input_ids, attention_mask, chunk_size, after_prefill: As in :func:`generate`.
        continuations: For each prompt, pairs of ``given`` tokens that follow it and one or more tokens to be scored.

    Returns:
        For each row (as in :func:`decode`) the likelihoods in the order of its prompt's continuations.
    """
    batch, members = input_ids.shape[0], cache.copies
    last_logits = prefill(model, cache, input_ids, attention_mask, chunk_size)
    if after_prefill is not None:
        after_prefill()
    likelihoods: list[list[Likelihood]] = [[] for _ in range(batch * members)]
    count = max(len(c) for c in continuations)
    for number in range(count):
        pairs = [c[number] if number < len(c) else ((), ()) for c in continuations]
        tails = [[*given, *scored] for given, scored in pairs]
        width = max(len(tail) for tail in tails)
        # Padding comes after everything that is scored in its row, and the copy of the cache is discarded.
        ids = torch.tensor([tail + [0] * (width - len(tail)) for tail in tails], device=input_ids.device)
        fork = cache if number == count - 1 else cache.fork()
        log_probs, is_greedy = _log_probs(model, fork, last_logits, ids.repeat(members, 1))
        for row in range(batch * members):
            given, scored = pairs[row % batch]
            if scored:
                span = slice(len(given), len(given) + len(scored))
                likelihoods[row].append(Likelihood(log_probs[row, span].tolist(), is_greedy[row, span].tolist()))
    return likelihoods


def _log_probs(
    model: PreTrainedModel, cache: KVCache, last_logits: torch.Tensor, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each of ``ids`` [rows, n] and whether it is the most probable token, both [rows, n].

    ``last_logits`` [rows, vocabulary] predict the first of them.
    """
    log_probs, is_greedy, start = [], [], 0
    for logits in itertools.chain([last_logits[:, None]], feed(model, cache, ids[:, :-1]) if ids.shape[1] > 1 else ()):
        targets = ids[:, start : start + logits.shape[1], None]  # [rows, m, 1]
        log_probs.append(logits.float().log_softmax(-1).gather(-1, targets)[..., 0])
        is_greedy.append(logits.argmax(-1, keepdim=True)[..., 0] == targets[..., 0])
        start += logits.shape[1]
    return torch.cat(log_probs, dim=1), torch.cat(is_greedy, dim=1)
