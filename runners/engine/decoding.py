"""Tokens after the prompt: the choice of a decode step, one token per row, or several."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from ...methods.cache.cache import KVCache
from .captured import CapturedStep, capture_problem
from .compiled import MAX_ROWS, CompiledDecoder, CompiledStep, can_compile
from .eager import EagerStep, RecomputeStep, forward_without_cache
from .fused_decode import FusedStep, supports_fused_decode
from .model_properties import has_dynamic_rope
from .step import DecodeStep

MAX_TOKENS_PER_FEED = 256
"""Largest number of columns that :func:`feed` runs together."""
MAX_LOGITS_PER_FEED = 1 << 28
"""Largest number of logits that :func:`feed` computes at a time (rows x columns x vocabulary)."""


def decode_step(
    model: PreTrainedModel,
    cache: KVCache,
    token: torch.Tensor,
    steps: int,
    *,
    capture: bool = True,
    compiled: CompiledDecoder | None = None,
) -> DecodeStep:
    """The fastest decode step of a model and a cache, after prefill.

    Args:
        model, cache: As in :func:`decode`.
        token: [rows] int64, any tokens; the first ones are suitable.
        steps: Largest number of steps.
        capture: Whether to capture a step as a CUDA graph if possible.
        compiled: The model's compiled decoder, if it has been compiled.
    """
    rows = token.shape[0]
    is_supported = rows <= MAX_ROWS and not cache.recomputes
    if compiled is not None and compiled.model is model and is_supported and can_compile(model):
        return CompiledStep(compiled, cache, rows)
    step = uncaptured_step(model, cache)
    if not capture or model.device.type != "cuda":
        return step
    step.capture_problem = capture_problem(model, cache)
    return CapturedStep(step, token, steps) if step.capture_problem is None else step


def uncaptured_step(model: PreTrainedModel, cache: KVCache) -> DecodeStep:
    """The step that needs no preparation: fused if the model supports it, else transformers' forward."""
    if cache.recomputes:
        return RecomputeStep(model, cache)
    return FusedStep(model, cache) if supports_fused_decode(model) else EagerStep(model, cache)


def decode(model: PreTrainedModel, cache: KVCache, token: torch.Tensor) -> torch.Tensor:
    """Feed one token per row: [rows] int64 -> logits [rows, vocabulary]; rows are ``cache.copies`` x B.

    For a loop over tokens, :func:`decode_step` chooses the kind of step once.
    """
    return uncaptured_step(model, cache)(token)


@torch.inference_mode()
def feed(model: PreTrainedModel, cache: KVCache, ids: torch.Tensor) -> Iterator[torch.Tensor]:
    """Feed several tokens to every row after the prompt, with the result of feeding them one by one.

    Several tokens run in one forward unless that would change the result: not if the storage requantizes tokens after
    they are appended, nor if the RoPE depends on the length, nor if layers keep a recurrent state.

    Args:
        model: The model that ``cache`` was made for.
        cache: The cache after :func:`prefill`.
        ids: [rows, n] without padding; rows as in :func:`decode`.

    Yields:
        Logits [rows, m, vocabulary] of the next m columns; n columns in all.
    """
    vocabulary = model.config.get_text_config().vocab_size
    width = min(MAX_TOKENS_PER_FEED, max(1, MAX_LOGITS_PER_FEED // (ids.shape[0] * vocabulary)))
    if cache.requantizes_on_append or cache.states is not None or has_dynamic_rope(model):
        width = 1
    for chunk in ids.split(width, dim=1):
        n = chunk.shape[1]
        if cache.recomputes:
            yield forward_without_cache(model, cache, chunk, None, n)
        elif n == 1:
            yield decode(model, cache, chunk[:, 0])[:, None]
        else:
            yield model(
                input_ids=chunk,
                position_ids=cache.next_positions()[:, None] + torch.arange(n, device=chunk.device),
                past_key_values=cache,
                use_cache=True,
            ).logits
