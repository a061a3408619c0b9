"""Hidden states that shrink from layer to layer while the prompt is read, by hooks on the model's decoder layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from ....conf.errors import InputError
from ...cache.forward import NewTokens, Rows
from ...storage.base import slots_that_stay
from .state import Sequences

if TYPE_CHECKING:
    from ...cache.cache import KVCache


def hook_layers(model: PreTrainedModel, shared: Sequences) -> None:
    """Let the hidden states of the cache's prompt shrink from layer to layer; the hooks go when it is read."""
    layers = model.get_decoder().layers
    handles: list[Any] = []

    def done() -> None:
        for handle in handles:
            handle.remove()

    def before(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cache = shared.cache()
        if cache is None:
            done()
            return None
        mine = kwargs.get("past_key_values") is cache
        return _shrink(cache, shared, order[module], args, kwargs) if mine else None

    def after(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        cache = shared.cache()
        mine = kwargs.get("past_key_values") is cache
        if cache is not None and mine:
            for layer in cache.layers:
                layer.seen = cache.layers[0].seen
                layer.state.chosen = []
            shared.columns = None
            done()

    order = {layer: i for i, layer in enumerate(layers)}
    handles += [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers[1:]]
    handles.append(layers[-1].register_forward_hook(after, with_kwargs=True))


def _shrink(
    cache: KVCache, shared: Sequences, layer_idx: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """What a layer is given: only the tokens that the one before passes on."""
    hidden = args[0]
    before, new = cache.layers[layer_idx - 1], cache.new_tokens
    assert new is not None
    if before.in_prefill:
        raise InputError(
            "runner.chunk_size",
            hidden.shape[1],
            "method=pyramid_infer looks at the prompt's end before its next layer begins: use runner.chunk_size=null",
        )
    if any(chosen is not None for chosen in before.state.chosen):
        batch, width = hidden.shape[0], hidden.shape[1]
        stay = torch.zeros(batch, width, dtype=torch.bool, device=hidden.device)
        rows = []
        for group, chosen in zip(new.rows, before.state.chosen, strict=True):
            which = slice(None) if group.index is None else group.index
            if chosen is None:
                stay[which, group.pads :] = True
                rows.append((group, width - group.pads))
            else:
                stay[which] = torch.zeros_like(stay[which]).scatter(1, chosen + group.pads, True)
                rows.append((group, chosen.shape[1]))
        columns, _ = slots_that_stay(stay)  # in order, padded on the left
        longest = columns.shape[1]
        cache.new_tokens = NewTokens([Rows(longest - n, group.index) for group, n in rows], None, longest)
        hidden = hidden.gather(1, columns[..., None].expand(-1, -1, hidden.shape[2]))
        shared.columns = columns if shared.columns is None else shared.columns.gather(1, columns)
    if shared.columns is None:
        return None
    at = shared.columns
    changed = dict(kwargs)
    cos_sin = []
    for x in kwargs["position_embeddings"]:
        x = x.expand(at.shape[0], -1, -1)
        cos_sin.append(x.gather(1, at[..., None].expand(-1, -1, x.shape[2])))
    changed["position_embeddings"] = tuple(cos_sin)
    if kwargs.get("position_ids") is not None:
        changed["position_ids"] = kwargs["position_ids"].expand(at.shape[0], -1).gather(1, at)
    return (hidden, *args[1:]), changed
