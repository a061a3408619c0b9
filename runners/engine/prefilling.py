"""Prefill: run the prompts through the model and compress their cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ...conf.errors import InputError
from ...methods.cache.cache import KVCache
from ...methods.cache.compression import compression
from ...methods.cache.forward import text_seeds
from ...methods.cache.layer import CacheLayer
from ...methods.cache.prefill import PrefillLayer
from ...models.kvshare.model import KVShareLlamaForCausalLM
from .eager import forward_without_cache
from .layerwise import layers_run_in_chunks
from .model_properties import decoder_layers, has_dynamic_rope, rope_type


@torch.inference_mode()
def prefill(
    model: PreTrainedModel,
    cache: KVCache,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    chunk_size: int | None = None,
    question_tokens: Sequence[int] | None = None,
) -> torch.Tensor:
    """Run the prompts through the model, and compress what the cache stores of them.

    Args:
        model: The model that ``cache`` was made for.
        cache: A fresh cache.
        input_ids: [B, T], padded on the left.
        attention_mask: [B, T], 1 for a real token; None: no padding.
        chunk_size: Number of columns per forward (same result, less memory); None: all at once. Where layers are
            independent, each layer runs the whole prompt in such chunks and is compressed before the next one starts,
            so the peak is the compressed cache, one layer's keys and values, and the hidden states.
        question_tokens: Number of last tokens of each of the B prompts that are its question (0: it has none), for
            methods that compress by them; None: unknown.

    Returns:
        Logits of the last token, [rows, vocabulary]; rows are ``cache.copies`` x B.

    Raises:
        InputError: The prompt is empty, the cache has been used, or the model cannot run the prompt in chunks.
        RuntimeError: A layer did not pass its keys and values to the cache (full attention would run silently).
    """
    if not input_ids.shape[1]:
        raise InputError("prompt", "of no tokens", "must have at least one token")
    if cache.get_seq_length():
        state = f"of {cache.get_seq_length()} tokens"
        raise InputError("cache", state, "has been used; make a new one for each prompt")
    if cache.separate_prefills:
        each = cache.separate_prefills
        return cache.join([prefill(model, x, input_ids, attention_mask, chunk_size, question_tokens) for x in each])
    length = input_ids.shape[1]
    mask = None if attention_mask is None or bool(attention_mask.all()) else attention_mask.bool()
    if cache.recomputes:
        return forward_without_cache(model, cache, input_ids, mask)[:, -1]
    chunk = None if chunk_size is None or chunk_size >= length else chunk_size
    cache.prompt_length = length
    cache.text_seeds = text_seeds(input_ids, mask)
    if question_tokens is not None:
        _observe_questions(cache, question_tokens, input_ids.shape[0])
    if chunk is not None and cache.layers_are_independent and decoder_layers(model) is not None:
        _check(model, cache, mask, input_ids.shape[0], chunk, by_layer=True)
        with layers_run_in_chunks(model, cache, chunk):
            logits = _forward_in_chunks(model, cache, input_ids, mask, length)
    else:
        _check(model, cache, mask, input_ids.shape[0], chunk, by_layer=False)
        logits = _forward_in_chunks(model, cache, input_ids, mask, chunk or length)
    if any(cache.get_seq_length(i) != length for i in cache.plan.attending):
        raise RuntimeError(f"{type(model).__name__} did not route every layer's attention through the kvbench cache")
    cache.finish_prefill()
    _compress_after_prefill(model, cache, input_ids, mask)
    return logits.repeat(cache.copies, 1)


def _observe_questions(cache: KVCache, question_tokens: Sequence[int], batch: int) -> None:
    if len(question_tokens) != batch:
        raise ValueError(f"question_tokens has {len(question_tokens)} numbers for {batch} prompts")
    cache.question_tokens = question_tokens
    for layer in cache.layers:
        if isinstance(layer, PrefillLayer):
            layer.observe_questions(max(question_tokens))


def _compress_after_prefill(
    model: PreTrainedModel, cache: KVCache, input_ids: torch.Tensor, mask: torch.Tensor | None
) -> None:
    """Let the policy of each cache compress the prompts with further forwards, if it needs any."""
    lengths = [input_ids.shape[1]] * input_ids.shape[0] if mask is None else mask.sum(1).tolist()
    prompts = [ids[len(ids) - n :] for ids, n in zip(input_ids, lengths, strict=True)]
    members = getattr(cache, "members", [cache])
    earlier: list[Any] | None = [] if len(members) > 1 else None
    for member in members:
        layers = [layer for layer in member.layers if isinstance(layer, CacheLayer) and layer.span is None]
        if layers:
            pairs = [(layer.state, layer.storage) for layer in layers]
            with compression(input_ids.device):
                forwards = layers[0].policy.after_prefill(model, cache.plan, pairs, prompts, earlier)
            member.further_forwards = forwards


def _check(
    model: PreTrainedModel,
    cache: KVCache,
    mask: torch.Tensor | None,
    batch: int,
    chunk: int | None,
    by_layer: bool,
) -> None:
    """Raise InputError if the model cannot run this prompt in chunks, or padded."""
    if has_dynamic_rope(model) and (mask is not None or (chunk is not None and not by_layer)):
        raise InputError(
            "runner.chunk_size" if mask is None else "batch_size",
            chunk if mask is None else batch,
            f"the model's RoPE ({rope_type(model)}) depends on the length of what is fed together: "
            "use batch_size=1 and runner.chunk_size=null",
        )
    if chunk is not None and cache.states is not None:
        allowed = "must be null: a model with recurrent layers runs a prompt in one forward"
        raise InputError("runner.chunk_size", chunk, allowed)


def _forward_in_chunks(
    model: PreTrainedModel, cache: KVCache, input_ids: torch.Tensor, mask: torch.Tensor | None, chunk: int
) -> torch.Tensor:
    """Run the prompt in chunks of ``chunk`` columns; logits [B, vocabulary] of the last column."""
    length = input_ids.shape[1]
    if mask is None:
        positions = torch.arange(length, device=input_ids.device).expand_as(input_ids)
    else:
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    # Given a number of logits, Gemma 4 skips the other tokens in layers that share K/V, so a method would miss their
    # queries; given an index it runs all tokens.
    takes_index = cache.plan.shares and not isinstance(model, KVShareLlamaForCausalLM)
    for start in range(0, length, chunk):
        end = min(length, start + chunk)
        logits: torch.Tensor = model(
            input_ids=input_ids[:, start:end],
            attention_mask=None if mask is None else mask[:, :end],
            position_ids=positions[:, start:end],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=torch.tensor([end - start - 1], device=input_ids.device) if takes_index else 1,
        ).logits
    return logits[:, -1]
