"""Iterative encoding of layers whose KV source is above them (Layer-Condensed KV, arXiv 2405.10637, section 3.2).

A token's keys and values at the source exist only after the token has passed the layers below. Several tokens at once
are therefore encoded in passes over the segment of layers, always from the same input, with the source's keys and
values of the previous pass. After r passes the first r tokens are exactly what feeding tokens one by one gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from ...methods.cache.attention import tag
from ...methods.cache.cache import KVCache
from ...methods.sharing.kv_map import Segment
from .attention import KV
from .config import KVShareLlamaConfig
from .layer import ForwardState, run_layer


def number_of_passes(config: KVShareLlamaConfig, n: int, n_iter: int | None, past: Any) -> int:
    """Passes over a cyclic segment for ``n`` new tokens; ``n`` passes are exact, and more change nothing."""
    if n_iter is None and isinstance(past, KVCache) and past.passes is not None:
        n_iter = past.passes or n
    if n_iter is None:
        is_exact = config.encode == "exact"
        n_iter = n if is_exact else config.iter_forward + config.iter_backward
    return max(1, min(n_iter, n))


def encode_segment(layers: nn.ModuleList, config: KVShareLlamaConfig, state: ForwardState, segment: Segment) -> None:
    """Run the passes over a cyclic segment; only the last one is cached.

    Args:
        layers: all layers of the model.
        config: config of the model.
        state: updated in place.
        segment: the layers to pass.
    """
    start, past, source = state.hidden, state.past, config.source
    targets = sorted({source[i] for i in segment.layers if source[i] > i})
    heads, dim = config.num_key_value_heads, config.head_dim
    assert heads is not None and dim is not None
    zeros = start.new_zeros(start.shape[0], heads, start.shape[1], dim)  # [B, G, n, D]
    carried = dict.fromkeys(targets, (zeros, zeros))
    earlier = {i: _cached_kv(past, i) for i in segment.layers if source[i] == i}
    for number in range(state.n_passes):
        is_final = number == state.n_passes - 1
        has_gradients = torch.is_grad_enabled() and number >= state.n_passes - config.iter_backward
        with torch.set_grad_enabled(has_gradients), nullcontext() if is_final else _warmup_pass(state):
            state.hidden = start
            new_kv = _run_pass(layers, config, state, segment, carried, earlier, is_final)
        previous, carried = carried, {t: new_kv[t] for t in targets}
    for t in targets:
        for current, last in zip(carried[t], previous[t], strict=True):
            change = nn.functional.mse_loss(current, last)
            state.kv_loss = change if state.kv_loss is None else state.kv_loss + change


def _run_pass(
    layers: Any,
    config: KVShareLlamaConfig,
    state: ForwardState,
    segment: Segment,
    carried: dict[int, KV],
    earlier: dict[int, KV | None],
    is_final: bool,
) -> dict[int, KV]:
    """Run one pass.

    Args:
        layers: all layers of the model.
        config: config of the model.
        state: updated in place.
        segment: the layers to pass.
        carried: keys and values of the new tokens after the previous pass, by source that is above a consumer.
        earlier: keys and values of earlier tokens, by source.
        is_final: append the new keys and values to the cache.

    Returns:
        Keys and values of the new tokens, by source.
    """
    new_kv: dict[int, KV] = {}
    for i in segment.layers:
        source, options = config.source[i], {}
        if source == i:
            new_kv[i] = layers[i].project_kv(state.hidden, state.cos_sin)
            if is_final:
                state.append_kv(i, new_kv[i])
        from_previous_pass = source > i or (config.is_paper_style and source == i and i in carried)
        if from_previous_pass:
            kv = _joined_kv(state.past, earlier[source], carried[source])
            if source == i and isinstance(state.past, KVCache):
                options["new_kv"] = new_kv[i]  # the source appends these, and attends over the carried ones
        elif is_final or source not in new_kv:
            kv = state.shared_kv[source]
        else:
            kv = _joined_kv(state.past, earlier[source], new_kv[source])
        run_layer(layers[i], state, kv, from_previous_pass or config.is_paper_style, **options)
    return new_kv


def _cached_kv(past: Any, i: int) -> KV | None:
    """Keys and values of earlier tokens at source i; None: there are none, or a kvbench cache adds them itself."""
    if past is None or isinstance(past, KVCache) or past.layers[i].keys is None:
        return None
    return past.layers[i].keys, past.layers[i].values


def _joined_kv(past: Any, earlier: KV | None, new: KV) -> KV:
    """Keys and values of earlier and new tokens; a kvbench cache gets the new ones and adds the earlier ones itself."""
    if isinstance(past, KVCache):
        return tag(new[0], past), new[1]
    return new if earlier is None else (torch.cat([earlier[0], new[0]], 2), torch.cat([earlier[1], new[1]], 2))


@contextmanager
def _warmup_pass(state: ForwardState) -> Iterator[None]:
    """Within the block, nothing is cached or collected."""
    collected, past = (state.hidden_states, state.attentions), state.past
    state.hidden_states = state.attentions = None
    if isinstance(past, KVCache):
        past.is_warmup_pass = True
    try:
        yield
    finally:
        state.hidden_states, state.attentions = collected
        if isinstance(past, KVCache):
            past.is_warmup_pass = False
