"""Removal of prompt tokens between decoder layers, for policies with ``narrows_prompt``.

A policy selects the tokens that a layer forwards (:meth:`..policies.policy.CachePolicy.next_layer_tokens`). Hooks on
the model's decoder layers drop the hidden states and position embeddings of the others. They are registered in the
first forward with the cache, by its first layer, so that ``model.generate`` runs them too and a cache that is not used
leaves the model as it is. They are removed after the last layer's prefill, or when the cache is deleted. Forwards with
another cache are not changed.

Legend: B batch rows, T columns of a layer's input, W columns of the next layer's input.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from ...conf.errors import InputError
from ..storage.base import slots_to_keep
from .cache import KVCache
from .forward import NewTokens


def narrow_between_layers(model: PreTrainedModel, cache: KVCache, method: str) -> None:
    """Drop prompt tokens between decoder layers in the prefill of a cache, as selected by its policies.

    Args:
        model: The model, each of whose layers has its own cache layer.
        cache: A new cache.
        method: Name of the method, for the error message.

    Raises:
        InputError: The model is not a stack of decoder layers that share one RoPE.
    """
    decoder = model.get_decoder()
    if not hasattr(decoder, "layers") or not hasattr(decoder, "rotary_emb"):
        raise InputError(
            "method",
            method,
            f"drops tokens between decoder layers that share one RoPE, which {type(model).__name__} does not have",
        )
    if len(decoder.layers) > 1:
        cache.on_first_forward = partial(_register, weakref.ref(decoder))


def _register(decoder: weakref.ref[Any], cache: KVCache) -> None:
    """Register the hooks on a decoder, whose first layer is running."""
    model = decoder()
    assert model is not None and isinstance(model.layers, torch.nn.ModuleList)
    _Hooks(list(model.layers), cache)


class _Hooks:
    """Hooks on the decoder layers of a model for the prefill of one cache, which they reference weakly."""

    def __init__(self, layers: list[torch.nn.Module], cache: KVCache):
        self._cache = weakref.ref(cache, lambda _: self._remove())
        self._columns: torch.Tensor | None = None  # [B, W] text columns of the current layer's input; None: all
        self._handles = [
            layer.register_forward_pre_hook(partial(self._before, layer_idx), with_kwargs=True)
            for layer_idx, layer in enumerate(layers)
            if layer_idx > 0
        ]
        self._handles.append(layers[-1].register_forward_hook(self._after_last, with_kwargs=True))

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _cache_of(self, kwargs: dict[str, Any]) -> KVCache | None:
        """Return the cache if the forward uses it."""
        cache = self._cache()
        return cache if kwargs.get("past_key_values") is cache else None

    def _before(
        self, layer_idx: int, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Replace the inputs of a layer by those of the tokens that the previous layer forwards."""
        cache, hidden = self._cache_of(kwargs), args[0]  # [B, T, hidden size]
        if cache is None:
            return None
        previous, new = cache.layers[layer_idx - 1], cache.new_tokens
        assert new is not None
        if previous.in_prefill:
            raise InputError(
                "runner.chunk_size",
                hidden.shape[1],
                f"{previous.method_names()} narrows a prompt after a layer's whole prefill: use runner.chunk_size=null",
            )
        forwarded = previous.policy.next_layer_tokens(previous.state)
        if any(tokens is not None for tokens in forwarded):
            columns, cache.new_tokens = narrowed(new.on(hidden.device), forwarded, hidden.shape)
            hidden = _take(hidden, columns)  # [B, W, hidden size]
            self._columns = columns if self._columns is None else _take(self._columns, columns)
        if self._columns is None:
            return None
        embeddings = tuple(_take(x, self._columns) for x in kwargs["position_embeddings"])
        changed = kwargs | {"position_embeddings": embeddings}
        if kwargs.get("position_ids") is not None:
            changed["position_ids"] = _take(kwargs["position_ids"], self._columns)
        return (hidden, *args[1:]), changed

    def _after_last(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Remove the hooks after the last layer's prefill."""
        if self._cache_of(kwargs) is not None:
            self._columns = None
            self._remove()


def narrowed(new: NewTokens, forwarded: list[torch.Tensor | None], shape: torch.Size) -> tuple[torch.Tensor, NewTokens]:
    """Return the columns and token metadata that the next layer receives.

    Args:
        new: Token metadata of this layer.
        forwarded: See :meth:`..policies.policy.CachePolicy.next_layer_tokens`.
        shape: B and T of this layer.

    Returns:
        (columns of this layer [B, W], padded on the left by arbitrary columns; metadata of the next layer).
    """
    batch, length = shape[:2]
    device = next(tokens.device for tokens in forwarded if tokens is not None)
    keep = torch.zeros(batch, length, dtype=torch.bool, device=device)  # [B, T]
    counts = []
    for group, tokens in zip(new.rows, forwarded, strict=True):
        rows = slice(None) if group.index is None else group.index
        if tokens is None:
            keep[rows, group.pads :] = True
        else:
            keep[rows] = torch.zeros_like(keep[rows]).scatter(1, tokens + group.pads, True)
        counts.append(length - group.pads if tokens is None else tokens.shape[1])
    columns, _ = slots_to_keep(keep)  # [B, W]
    width = columns.shape[1]
    narrowed_rows = [
        replace(group, pads=width - count, tokens_seen=group.tokens_seen or length - group.pads)
        for group, count in zip(new.rows, counts, strict=True)
    ]
    return columns, NewTokens(narrowed_rows, None, width, new.columns_seen or length)


def _take(x: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Select columns [B, W] of x [1 or B, T, ...], on the device of x."""
    columns = columns.to(x.device)
    x = x.expand(columns.shape[0], *[-1] * (x.dim() - 1))
    index = columns.view(*columns.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])
    return x.gather(1, index)
