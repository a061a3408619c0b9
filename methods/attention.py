"""The attention function of every kvbench run: it hands each layer's new queries, keys and values to the cache.

Registered with transformers under the name ``"kvbench"`` when this module is imported. A model that is switched to it
(:func:`use_kvbench_attention`) calls :func:`attention_function` once a layer; the cache that ``update()`` tagged on
the key tensor appends, attends over what it holds and compresses. No model code is touched and nothing is patched.

Also here: the two attention shapes that caches need, over a whole prompt and over a compressed cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from ..conf.errors import InputError

if TYPE_CHECKING:
    from .base import KVCache

ATTENTION_NAME = "kvbench"

PIECE = 1 << 18
"""Numbers that are converted or expanded at a time on a CPU: as many as stay in its cache."""

WORTH_LENGTH, WORTH_GAIN = 4096, 1.5
"""Cached tokens, and time that whole heads take over that with all threads at work, from which on it pays to share a
head's slots between the threads of a CPU (measured on two threads: docs/efficiency.md)."""


def tag(key: torch.Tensor, cache: KVCache) -> torch.Tensor:
    """Name the cache on the key tensor, so that the attention function finds it.

    ``model.generate`` refuses keyword arguments it does not know, so a cache cannot arrive as a keyword there; an
    attribute on the tensor that ``update()`` returns arrives in both.
    """
    key.kvbench_cache = cache  # type: ignore[attr-defined]
    return key


def attention_function(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    strict: bool = False,
    new_kv: tuple[torch.Tensor, torch.Tensor] | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer, as transformers calls it.

    Args:
        module: the attention module; ``module.layer_idx`` names the layer.
        query: [B, H_q, n, D], after RoPE.
        key, value: [B, H_kv, n, D], the new tokens only, after RoPE.
        attention_mask: the 2-D padding mask [B, tokens seen + n], True where a token is real, or None: no padding.
        scaling: factor on the logits; 1 / sqrt(D) when None.
        sliding_window: the model's own window for this layer, if it has one.
        strict, new_kv: of kvbench's own models (:mod:`.sharing.model`): no token sees itself; what the layer adds where
            that is not what it attends over.

    Returns:
        ([B, n, H_q, D], None).

    Raises:
        InputError: the layer's own sliding window is shorter than the sequence, which no cache here models yet.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    cache: KVCache | None = getattr(key, "kvbench_cache", None)
    seen = 0 if cache is None else cache.get_seq_length(module.layer_idx) + key.shape[2]
    if cache is not None and not cache.keeps_windows and sliding_window is not None and seen > sliding_window:
        raise InputError(
            "model",
            type(module).__name__,
            f"its layers attend over a sliding window of {sliding_window} tokens and the sequence has {seen}; "
            f"use a model without a window, or task.max_length below {sliding_window}",
        )
    if cache is None:  # a forward without a cache: scoring, or method=no_cache
        out = uncached_attention(query, key, value, scaling, attention_mask, strict, sliding_window)
    else:
        out = cache.attend(module.layer_idx, query, key, value, scaling, attention_mask, new_kv)
    return out.transpose(1, 2).contiguous(), None


def padding_mask(attention_mask: torch.Tensor | None = None, **_: Any) -> torch.Tensor | None:
    """The mask "function" registered beside it: the 2-D padding mask as it is; causality belongs to the cache."""
    return attention_mask


AttentionInterface.register(ATTENTION_NAME, attention_function)
AttentionMaskInterface.register(ATTENTION_NAME, padding_mask)


def use_kvbench_attention(model: PreTrainedModel) -> PreTrainedModel:
    """Switch a transformers model to the registered attention function; returns the same model."""
    if model.config._attn_implementation != ATTENTION_NAME:
        model.set_attn_implementation(ATTENTION_NAME)
    return model


def repeat_heads(x: torch.Tensor, times: int) -> torch.Tensor:
    """[B, H_kv, S, D] -> [B, H_kv * times, S, D]; query head j is served by KV head j // times."""
    return x if times == 1 else x.repeat_interleave(times, dim=1)


def causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, strict: bool = False
) -> torch.Tensor:
    """Causal attention of the last n tokens of a sequence over all of it (rows without padding).

    Args:
        query: [B, H_q, n, D], the queries of positions S - n .. S - 1.
        key, value: [B, H_kv, S, D] with S >= n.
        scaling: factor on the logits.
        strict: no token sees itself; the first token of all sees nothing, and its output is zero.

    Returns:
        [B, H_q, n, D].
    """
    n, length = query.shape[2], key.shape[2]
    if strict:  # token i sees what token i - 1 sees of a sequence that is one token shorter
        lead = int(n == length)
        out = torch.zeros_like(query)
        if n > lead:
            out[:, :, lead:] = causal_attention(query[:, :, lead:], key[:, :, :-1], value[:, :, :-1], scaling)
        return out
    if n < length:
        if query.is_cuda and n > 1:
            return lower_right_attention(query, key, value, scaling)
        return cached_attention(query, key, value, scaling)
    if query.is_cuda:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    # On the CPU the flash kernel is faster on expanded heads than through enable_gqa.
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_heads(key, groups), repeat_heads(value, groups)
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)


def lower_right_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """The same as :func:`causal_attention` of n < S queries, by flash kernels: no mask [n, S] is made, which for a long
    prompt in pieces would be larger than its cache."""
    bias = causal_lower_right(query.shape[2], key.shape[2])
    gqa = query.shape[1] > key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scaling, enable_gqa=gqa)


def exact_products(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """``query @ keys^T`` in float32 or wider, as every kernel of attention has its logits before the softmax.

    Args:
        query: [..., G, D].
        keys: [..., S, D], with the same leading dimensions.

    Returns:
        [..., G, S].
    """
    exact = torch.promote_types(query.dtype, torch.float32)
    if exact == query.dtype:
        return torch.matmul(query, keys.transpose(-1, -2))
    if query.is_cuda:
        flat = (query.flatten(0, -3), keys.flatten(0, -3).transpose(1, 2))
        return torch.bmm(*flat, out_dtype=exact).view(*query.shape[:-1], keys.shape[-2])
    out = query.new_empty(*query.shape[:-1], keys.shape[-2], dtype=exact)
    step = max(1, PIECE // (keys.shape[:-2].numel() * keys.shape[-1]))
    for start in range(0, keys.shape[-2], step):  # a piece at a time: all of them in float32 would be a second cache
        piece = keys[..., start : start + step, :].to(exact)
        out[..., start : start + step] = torch.matmul(query.to(exact), piece.transpose(-1, -2))
    return out


def softmax_of(logits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Weights in ``dtype`` of logits that are in float32 or wider, as in every kernel of attention."""
    return logits.softmax(-1).to(dtype)


def visibility(n: int, length: int, valid: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    """Which of ``length`` cached slots each of the last ``n`` tokens may see.

    Everything that was cached before is visible and the new tokens, which hold the last ``n`` slots, are causal among
    themselves: SDPA's ``is_causal`` would be wrong here, because it aligns the triangle to the first slot.

    Args:
        n: new tokens.
        length: slots in all, the new ones included.
        valid: [B, 1 or H, length], True where a slot holds a real token; None: everywhere.

    Returns:
        bool, broadcastable to [B, H, n, length], or None: everything is visible.
    """
    causal = None
    if n > 1:
        causal = torch.ones(n, length, dtype=torch.bool, device=device).tril(length - n)[None, None]
    if valid is None:
        return causal
    visible = valid[:, :, None, :]
    if causal is not None:
        # A padding query sees itself alone, so that its softmax is not over nothing.
        own = torch.eye(n, dtype=torch.bool, device=device)
        own = F.pad(own, (length - n, 0))[None, None]
        visible = (visible & causal) | own
    return visible


def cached_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of n new tokens over a cache whose last n slots are those tokens.

    Args:
        query: [B, H_q, n, D].
        keys, values: [B, H, S, D] with H dividing H_q.
        scaling: factor on the logits.
        valid: see :func:`visibility`.

    Returns:
        [B, H_q, n, D].
    """
    mask = visibility(query.shape[2], keys.shape[2], valid, query.device)
    if mask is not None and mask.shape[2] != query.shape[2]:
        mask = mask.expand(-1, -1, query.shape[2], -1)
    return masked_attention(query, keys, values, scaling, mask)


def masked_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float, mask: torch.Tensor | None
) -> torch.Tensor:
    """Attention under a bool mask [B or 1, H or 1, n, S] (None: everything is visible); [B, H_q, n, D] in and out.

    The query heads of a group are laid side by side as extra query rows of their KV head, so keys and values are never
    expanded: [B, H_kv, g * n, D] against [B, H_kv, S, D].
    """
    batch, query_heads, n, dim = query.shape
    heads = keys.shape[1]
    groups = query_heads // heads
    if mask is not None and groups > 1 and n > 1:
        mask = mask.repeat(1, 1, groups, 1)
    rows = query.reshape(batch, heads, groups * n, dim)
    parts = 1 if mask is not None else _parts(rows, keys, values)
    if parts > 1:
        out = attention_in_parts(rows, keys, values, scaling, parts)
    else:
        out = F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=scaling)
    return out.reshape(batch, query_heads, n, dim)


def _parts(rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> int:
    """Parts into which to cut the slots of each head, so that every thread has as much to read; 1: leave them whole.

    PyTorch's kernel gives whole heads to threads: eight heads keep eight of sixteen threads at work.
    """
    threads = torch.get_num_threads()
    units = keys.shape[0] * keys.shape[1]
    rounds = -(-units // threads)
    gain = rounds * threads / units  # time / time with all threads at work
    in_order = all(x.stride(0) == x.shape[1] * x.stride(1) and x.stride(3) == 1 for x in (keys, values))
    worth = rows.device.type == "cpu" and keys.shape[2] >= WORTH_LENGTH and gain >= WORTH_GAIN and in_order
    return threads if worth else 1


def attention_in_parts(
    rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float, parts: int
) -> torch.Tensor:
    """Attention over slots that are cut into parts, each with a softmax of its own, joined by their log-sum-exp.

    Args:
        rows: [B, H, R, D] queries, all of which see all slots; on a CPU.
        keys, values: [B, H, S, D] with S >= ``parts``.
        scaling: factor on the logits.
        parts: how many.

    Returns:
        [B, H, R, D].
    """
    batch, heads, n, dim = rows.shape
    size = keys.shape[2] // parts
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    queries = rows.reshape(batch * heads, 1, n, dim)

    def attend(start: int, end: int, parts: int) -> tuple[torch.Tensor, torch.Tensor]:
        """([units, parts, R, D], [units, parts, R]); the parts take the place of heads, which need not lie together."""
        cut = [x[:, :, start:end].view(batch * heads, parts, -1, dim) for x in (keys, values)]
        found: tuple[torch.Tensor, torch.Tensor] = flash(queries.expand(-1, parts, -1, -1), *cut, scale=scaling)
        return found

    out, log_sum = attend(0, size * parts, parts)
    if size * parts < keys.shape[2]:
        out, log_sum = (
            torch.cat(pair, dim=1) for pair in zip((out, log_sum), attend(size * parts, keys.shape[2], 1), strict=True)
        )
    weights = log_sum.softmax(1)[..., None]
    return (out * weights).sum(1).to(rows.dtype).view(batch, heads, n, dim)


def uncached_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    attention_mask: torch.Tensor | None,
    strict: bool = False,
    window: int | None = None,
) -> torch.Tensor:
    """Causal attention of the last n tokens of whole rows, which may be padded on either side.

    Args:
        query: [B, H_q, n, D].
        key, value: [B, H_kv, T, D].
        scaling: factor on the logits.
        attention_mask: [B, T], True for a real token; None: no padding.
        strict: no token sees itself.
        window: tokens that each one sees, itself included; None: all before it.

    Returns:
        [B, H_q, n, D]; zero where a token sees nothing.
    """
    n, length = query.shape[2], key.shape[2]
    padded = attention_mask is not None and not bool(attention_mask.all())
    if not padded and (window is None or length <= window):
        return causal_attention(query, key, value, scaling, strict)
    at = torch.arange(length, device=query.device)
    age = at[length - n :, None] - at[None]
    visible = age >= int(strict)
    if window is not None:
        visible = visible & (age < window)
    visible = visible[None, None]
    if padded:
        assert attention_mask is not None
        visible = visible & attention_mask.bool()[:, None, None, :]
    sees = visible.any(-1, keepdim=True)
    return masked_attention(query, key, value, scaling, visible | ~sees).masked_fill(~sees, 0.0)
