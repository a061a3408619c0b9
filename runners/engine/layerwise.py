"""Chunked prefill one decoder layer at a time: each layer runs the whole prompt before the next layer starts.

Within a decoder layer, tokens interact only through K/V, which the cache owns; so each layer can run chunk by chunk,
and the output of a chunk can overwrite its input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from ...methods.cache.cache import KVCache
from .model_properties import decoder_layers

LayerForward = Callable[..., Any]


@contextmanager
def layers_run_in_chunks(model: PreTrainedModel, cache: KVCache, chunk_size: int) -> Iterator[None]:
    """Within the block, each decoder layer splits its input into chunks of ``chunk_size`` columns.

    The ``forward`` of each layer is replaced on the instance and restored afterwards.
    """
    layers = decoder_layers(model)
    assert layers is not None
    instance_forwards = [vars(layer).get("forward") for layer in layers]
    last_layer = layers[len(layers) - 1]
    cache.chunk_states = {}
    try:
        for layer in layers:
            layer.forward = _in_chunks(layer.forward, chunk_size, layer is last_layer)
        yield
    finally:
        cache.chunk_states = None
        for layer, forward in zip(layers, instance_forwards, strict=True):
            if forward is None:
                del layer.forward
            else:  # a forward that a library had set on the instance
                layer.forward = forward


def _in_chunks(forward: LayerForward, chunk_size: int, is_last_layer: bool) -> LayerForward:
    """Wrap the forward of a decoder layer so that it runs chunk by chunk."""

    def run(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        length = hidden_states.shape[1]  # [B, columns, hidden]
        for start in range(0, length, chunk_size):
            end = min(length, start + chunk_size)
            out = forward(
                hidden_states[:, start:end],
                *(_chunk_of("", x, start, end, length) for x in args),
                **{k: _chunk_of(k, v, start, end, length) for k, v in kwargs.items()},
            )
            hidden_states[:, start:end] = out[0] if isinstance(out, tuple) else out
        return hidden_states[:, -1:] if is_last_layer else hidden_states  # only the last column's logits are used

    return run


def _chunk_of(name: str, value: Any, start: int, end: int, length: int) -> Any:
    """Return the slice of a decoder layer's argument for columns ``start`` .. ``end`` - 1 of ``length``."""
    if isinstance(value, tuple):
        return tuple(_chunk_of(name, x, start, end, length) for x in value)
    if not isinstance(value, torch.Tensor):
        return value
    if name == "attention_mask":  # [B, columns so far]; the cache applies causality
        return value[..., :end]
    if name == "cache_position":
        return value[start:end]
    # Positions, their cosines and sines, per-layer inputs: [B, columns, ...] or [B, heads, columns, ...]
    for dim in (1, 2):
        if value.dim() > dim and value.shape[dim] == length:
            return value.narrow(dim, start, end - start)
    return value
