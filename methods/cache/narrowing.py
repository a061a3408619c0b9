"""Removal of prompt tokens between layers, for policies with ``narrows_prompt``.

The hidden states are the model's, so hooks on its decoder layers leave out the tokens that a policy does not pass on
(:meth:`..policies.policy.CachePolicy.next_layer_tokens`), with their position embeddings. The hooks are set when the
cache is made, so that ``model.generate`` runs them too, and removed when the last layer has read the prompt; a forward
with another cache is not changed.

Legend: B rows of a batch, T columns that a layer is given, W columns that the next layer is given.
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
    """Let the prompt of a new cache lose tokens between the layers of a model, as the cache's policies say.

    Args:
        model: The model, each of whose layers has a cache layer to itself.
        cache: The cache.
        method: Name of the method, for an error.

    Raises:
        InputError: The model has no decoder layers in a row that share one RoPE.
    """
    decoder = model.get_decoder()
    if not hasattr(decoder, "layers") or not hasattr(decoder, "rotary_emb"):
        raise InputError(
            "method",
            method,
            f"drops tokens between decoder layers that share one RoPE, and {type(model).__name__} is not built so",
        )
    _Hooks(list(decoder.layers), cache)


class _Hooks:
    """Hooks on the decoder layers of a model for the prompt of one cache, which they do not keep alive."""

    def __init__(self, layers: list[torch.nn.Module], cache: KVCache):
        self._cache = weakref.ref(cache)
        self._columns: torch.Tensor | None = None  # [B, W] of the text, that the layer under way is given; None: all
        self._handles = [
            layer.register_forward_pre_hook(partial(self._before, number), with_kwargs=True)
            for number, layer in enumerate(layers)
            if number > 0
        ]
        self._handles.append(layers[-1].register_forward_hook(self._after_last, with_kwargs=True))

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _is_for(self, cache: KVCache | None, kwargs: dict[str, Any]) -> bool:
        """Whether a forward is one of this cache."""
        if cache is None:
            self._remove()
        return cache is not None and kwargs.get("past_key_values") is cache

    def _before(
        self, number: int, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Give a layer the tokens that the one before passes on."""
        cache, hidden = self._cache(), args[0]  # [B, T, hidden size]
        if cache is None or not self._is_for(cache, kwargs):
            return None
        before, new = cache.layers[number - 1], cache.new_tokens
        assert new is not None
        if before.in_prefill:
            raise InputError(
                "runner.chunk_size",
                hidden.shape[1],
                f"{before.method_names()} narrows a prompt after a layer's whole prefill: use runner.chunk_size=null",
            )
        going_on = before.policy.next_layer_tokens(before.state)
        if any(tokens is not None for tokens in going_on):
            columns, cache.new_tokens = narrowed(new.on(hidden.device), going_on, hidden.shape)
            hidden = _take(hidden, columns)
            self._columns = columns if self._columns is None else _take(self._columns, columns)
        if self._columns is None:
            return None
        embeddings = tuple(_take(x, self._columns) for x in kwargs["position_embeddings"])
        changed = kwargs | {"position_embeddings": embeddings}
        if kwargs.get("position_ids") is not None:
            changed["position_ids"] = _take(kwargs["position_ids"], self._columns)
        return (hidden, *args[1:]), changed

    def _after_last(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """The prompt is in."""
        if self._is_for(self._cache(), kwargs):
            self._columns = None
            self._remove()


def narrowed(new: NewTokens, going_on: list[torch.Tensor | None], shape: torch.Size) -> tuple[torch.Tensor, NewTokens]:
    """What is left of a prompt's tokens for the next layer.

    Args:
        new: What this layer was given.
        going_on: See :meth:`..policies.policy.CachePolicy.next_layer_tokens`.
        shape: B and T of this layer.

    Returns:
        Columns [B, W] of this layer, padded on the left by any columns; and what the next layer is given.
    """
    width = shape[1]
    device = next(tokens.device for tokens in going_on if tokens is not None)
    stay = torch.zeros(shape[0], width, dtype=torch.bool, device=device)
    counts = []
    for group, tokens in zip(new.rows, going_on, strict=True):
        rows = slice(None) if group.index is None else group.index
        if tokens is None:
            stay[rows, group.pads :] = True
        else:
            stay[rows] = torch.zeros_like(stay[rows]).scatter(1, tokens + group.pads, True)
        counts.append(width - group.pads if tokens is None else tokens.shape[1])
    columns, _ = slots_to_keep(stay)
    longest = columns.shape[1]
    rows_left = [
        replace(group, pads=longest - count, tokens_seen=group.tokens_seen or width - group.pads)
        for group, count in zip(new.rows, counts, strict=True)
    ]
    return columns, NewTokens(rows_left, None, longest, new.columns_seen or width)


def _take(x: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Columns [B, W] of x [1 or B, T, ...], on the device of x."""
    columns = columns.to(x.device)
    x = x.expand(columns.shape[0], *[-1] * (x.dim() - 1))
    index = columns.view(*columns.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])
    return x.gather(1, index)
