"""Attention of new tokens over a whole prompt and over a compressed cache, without expanding grouped heads.

Legend: B batch, H_q query heads, H_kv stored heads, n new tokens, S slots, D channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from ..sharing.plan import Span
from .cpu_threads import kv_splits, split_kv_attention
from .logits import LogitRule
from .sdpa import sdpa_without_cudnn

BLOCK = 256
"""Queries at a time where attention is computed under a mask; memory grows with it times the keys in view."""
MASK_ELEMENTS = 1 << 27
"""Logits of one block, at most."""

PIECE = 1 << 18
"""Numbers that are converted or expanded at a time on a CPU: as many as stay in its cache."""


def repeat_heads(x: torch.Tensor, times: int) -> torch.Tensor:
    """[B, H_kv, S, D] -> [B, H_kv * times, S, D]; query head j is served by KV head j // times."""
    return x if times == 1 else x.repeat_interleave(times, dim=1)


def causal_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rule: LogitRule,
    strict: bool = False,
    span: Span | None = None,
) -> torch.Tensor:
    """Causal attention of the last n tokens of a sequence over all of it (rows without padding).

    Args:
        query: [B, H_q, n, D], the queries of positions S - n .. S - 1.
        key: [B, H_kv, S, D] with S >= n.
        value: [B, H_kv, S, D_v].
        rule: how logits are formed.
        strict: no token sees itself; the first token of all sees nothing, and its output is zero.
        span: which of the tokens before it each one sees; None: all.

    Returns:
        [B, H_q, n, D_v].
    """
    n, length = query.shape[2], key.shape[2]
    if strict:  # token i sees what token i - 1 sees of a sequence that is one token shorter
        lead = int(n == length)
        out = query.new_zeros(*query.shape[:3], value.shape[3])
        if n > lead:
            out[:, :, lead:] = causal_attention(query[:, :, lead:], key[:, :, :-1], value[:, :, :-1], rule)
        return out
    local = span is not None and span.first_visible(length - 1) > 0
    if local or (not rule.is_plain and n > 1):
        return _attention_by_blocks(query, key, value, rule, span)
    if n < length or not rule.is_plain:
        if query.is_cuda and n > 1:
            return lower_right_attention(query, key, value, rule.scaling)
        return cached_attention(query, key, value, rule)
    if query.is_cuda:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=rule.scaling, enable_gqa=True)
    # On the CPU the flash kernel is faster on expanded heads than through enable_gqa.
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_heads(key, groups), repeat_heads(value, groups)
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=rule.scaling)


def _attention_by_blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: LogitRule, span: Span | None
) -> torch.Tensor:
    """:func:`causal_attention` in blocks of queries, each over the keys that it can see: no [n, S] tensor is made."""
    n, length = query.shape[2], key.shape[2]
    first = length - n  # position of the first query
    columns = length if span is None else min(length, span.size + BLOCK)
    block = max(1, min(BLOCK, MASK_ELEMENTS // (query.shape[0] * query.shape[1] * columns)))
    out = []
    for start in range(0, n, block):
        end = min(n, start + block)
        begin = 0 if span is None else span.first_visible(first + start)
        stop = first + end
        at = torch.arange(first + start, stop, device=query.device)[:, None]  # [n, 1]
        columns_at = torch.arange(begin, stop, device=query.device)[None]  # [1, S]
        visible = columns_at <= at
        if span is not None:
            visible = visible & span.visible(at, columns_at)
        part = (query[:, :, start:end], key[:, :, begin:stop], value[:, :, begin:stop])
        out.append(masked_attention(*part, rule, visible[None, None]))
    return torch.cat(out, dim=2)


def lower_right_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """Compute :func:`causal_attention` of n < S queries with flash kernels.

    They need no [n, S] mask, which for a long chunked prompt would be larger than its cache.
    """
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
    rule: LogitRule,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of n new tokens over a cache whose last n slots are those tokens.

    Args:
        query: [B, H_q, n, D].
        keys: [B, H, S, D] with H dividing H_q.
        values: [B, H, S, D_v].
        rule: how logits are formed.
        valid: see :func:`visibility`.

    Returns:
        [B, H_q, n, D_v].
    """
    mask = visibility(query.shape[2], keys.shape[2], valid, query.device)
    if mask is not None and mask.shape[2] != query.shape[2]:
        mask = mask.expand(-1, -1, query.shape[2], -1)
    return masked_attention(query, keys, values, rule, mask)


def masked_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rule: LogitRule, mask: torch.Tensor | None
) -> torch.Tensor:
    """Attention under a bool mask [B or 1, H or 1, n, S] (None: everything is visible).

    The query heads of a group are laid side by side as extra query rows of their KV head, so keys and values are never
    expanded: [B, H_kv, g * n, D] against [B, H_kv, S, D].

    Args:
        query: [B, H_q, n, D].
        keys: [B, H_kv, S, D].
        values: [B, H_kv, S, D_v].
        rule: how logits are formed.
        mask: True where a query sees a slot; every query sees one at least.

    Returns:
        [B, H_q, n, D_v].
    """
    batch, query_heads, n, dim = query.shape
    heads = keys.shape[1]
    groups = query_heads // heads
    rows = query.reshape(batch, heads, groups * n, dim)
    if not rule.is_plain:
        logits = rule.logits(exact_products(rows, keys)).unflatten(2, (groups, n))  # [B, H_kv, g, n, S]
        if mask is not None:
            logits = logits.masked_fill(~mask[:, :, None], float("-inf"))
        weights = rule.weights(logits, head_dims=2).to(values.dtype).flatten(2, 3)
        return torch.matmul(weights, values).reshape(batch, query_heads, n, -1)
    if mask is not None and groups > 1 and n > 1:
        mask = mask.repeat(1, 1, groups, 1)
    parts = 1 if mask is not None else kv_splits(rows, keys, values)
    if parts > 1:
        out = split_kv_attention(rows, keys, values, rule.scaling, parts)
    else:
        out = sdpa_without_cudnn(rows, keys, values, attn_mask=mask, scale=rule.scaling)
    return out.reshape(batch, query_heads, n, -1)


def uncached_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rule: LogitRule,
    attention_mask: torch.Tensor | None,
    strict: bool = False,
    span: Span | None = None,
) -> torch.Tensor:
    """Causal attention of the last n tokens of whole rows, which may be padded on either side.

    Args:
        query: [B, H_q, n, D].
        key: [B, H_kv, T, D].
        value: [B, H_kv, T, D_v].
        rule: how logits are formed.
        attention_mask: [B, T], True for a real token; None: no padding.
        strict: no token sees itself.
        span: which of the tokens before it each one sees; None: all.

    Returns:
        [B, H_q, n, D_v]; zero where a token sees nothing.
    """
    n, length = query.shape[2], key.shape[2]
    if attention_mask is None or bool(attention_mask.all()):
        return causal_attention(query, key, value, rule, strict, span)
    mask = attention_mask.bool()
    columns = torch.arange(length, device=query.device)
    position = (mask.long().cumsum(1) - 1) if span is not None and span.counts_from_start else columns.expand_as(mask)
    at, of = position[:, length - n :, None], position[:, None]  # [B, n, 1], [B, 1, T]
    visible = columns[length - n :, None] - columns[None] >= int(strict)
    visible = visible & mask[:, None]
    if span is not None:
        visible = visible & span.visible(at, of)
    visible = visible[:, None]
    sees = visible.any(-1, keepdim=True)
    return masked_attention(query, key, value, rule, visible | ~sees).masked_fill(~sees, 0.0)
