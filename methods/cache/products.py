"""Attention of new tokens over a whole prompt or a compressed cache, without expanding grouped KV heads.

Legend: B batch, H_q query heads, H or H_kv stored heads, g = H_q / H, n new tokens, S slots, T tokens of a sequence,
D key channels, D_v value channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.backends import cuda
from torch.nn.attention.bias import causal_lower_right

from ..sharing.plan import Span
from .cpu_threads import kv_splits, split_kv_attention
from .logits import LogitRule
from .sdpa import sdpa_without_cudnn

QUERY_BLOCK = 256
"""Queries per block of masked attention; memory grows with it times the visible keys."""
MAX_BLOCK_LOGITS = 1 << 27
"""Maximum number of logits per block of masked attention."""

CHUNK_ELEMENTS = 1 << 18
"""Elements that are converted or dequantized at a time on a CPU, few enough for its cache."""


def repeat_heads(x: torch.Tensor, times: int) -> torch.Tensor:
    """Repeat KV heads: [B, H_kv, S, D] -> [B, H_kv * times, S, D]; query head j uses KV head j // times."""
    return x if times == 1 else x.repeat_interleave(times, dim=1)


def causal_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rule: LogitRule,
    strictly_causal: bool = False,
    span: Span | None = None,
) -> torch.Tensor:
    """Causal attention of the last n tokens of a sequence over the whole sequence, for rows without padding.

    Args:
        query: [B, H_q, n, D], queries of positions S - n .. S - 1.
        key: [B, H_kv, S, D] with S >= n.
        value: [B, H_kv, S, D_v].
        rule: How logits are computed.
        strictly_causal: No token attends to itself; the output of the first token of the sequence is zero.
        span: Local attention window; None: each token attends to all tokens before it.

    Returns:
        [B, H_q, n, D_v].
    """
    n, length = query.shape[2], key.shape[2]
    if strictly_causal:  # causal attention with keys and values shifted by one position
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


def flash_attention_with_logsumexp(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Compute :func:`causal_attention` by the flash kernel on CUDA, and the log-sum-exp of each query's logits.

    Returns:
        (output [B, H_q, n, D_v]; [B, H_q, n] float32); None: the kernel does not support the call.
    """
    gqa = query.shape[1] > key.shape[1]
    if not query.is_cuda or query.shape[3] % 8 or query.shape[3] != value.shape[3]:
        return None
    # Asked and called as by torch.nn.attention.bias: the mask is aligned to the last query and the last key.
    if not cuda.can_use_flash_attention(cuda.SDPAParams(query, key, value, None, 0.0, False, gqa)):
        return None
    out, logsumexp, *_ = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True, scale=scaling)
    return out, logsumexp


def _attention_by_blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: LogitRule, span: Span | None
) -> torch.Tensor:
    """Compute :func:`causal_attention` in blocks of queries over their visible keys, without an [n, S] tensor."""
    n, length = query.shape[2], key.shape[2]
    first = length - n  # position of the first query
    columns = length if span is None else min(length, span.size + QUERY_BLOCK)
    block = max(1, min(QUERY_BLOCK, MAX_BLOCK_LOGITS // (query.shape[0] * query.shape[1] * columns)))
    out = []
    for start in range(0, n, block):
        end = min(n, start + block)
        begin = 0 if span is None else span.first_visible(first + start)
        stop = first + end
        query_position = torch.arange(first + start, stop, device=query.device)[:, None]  # [block, 1]
        key_position = torch.arange(begin, stop, device=query.device)[None]  # [1, visible keys]
        visible = key_position <= query_position  # [block, visible keys]
        if span is not None:
            visible = visible & span.visible(query_position, key_position)
        tensors = (query[:, :, start:end], key[:, :, begin:stop], value[:, :, begin:stop])
        out.append(masked_attention(*tensors, rule, visible[None, None]))
    return torch.cat(out, dim=2)  # [B, H_q, n, D_v]


def lower_right_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """Compute :func:`causal_attention` of n < S queries with flash kernels.

    They need no [n, S] mask, which for a long chunked prompt would be larger than its cache.
    """
    bias = causal_lower_right(query.shape[2], key.shape[2])
    gqa = query.shape[1] > key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scaling, enable_gqa=gqa)


def query_key_products(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Compute ``query @ keys^T`` in float32 or wider, the precision of logits in attention kernels.

    Args:
        query: [..., G, D].
        keys: [..., S, D], with the same leading dimensions.

    Returns:
        [..., G, S].
    """
    acc_dtype = torch.promote_types(query.dtype, torch.float32)
    if acc_dtype == query.dtype:
        return torch.matmul(query, keys.transpose(-1, -2))
    if query.is_cuda:
        flat = (query.flatten(0, -3), keys.flatten(0, -3).transpose(1, 2))
        return torch.bmm(*flat, out_dtype=acc_dtype).view(*query.shape[:-1], keys.shape[-2])
    out = query.new_empty(*query.shape[:-1], keys.shape[-2], dtype=acc_dtype)
    step = max(1, CHUNK_ELEMENTS // (keys.shape[:-2].numel() * keys.shape[-1]))
    for start in range(0, keys.shape[-2], step):  # in chunks, because a float32 copy would double the cache
        chunk = keys[..., start : start + step, :].to(acc_dtype)
        out[..., start : start + step] = torch.matmul(query.to(acc_dtype), chunk.transpose(-1, -2))
    return out


def softmax_of(logits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Softmax of logits in float32 or wider, with the weights rounded to ``dtype``."""
    return logits.softmax(-1).to(dtype)


def visibility(n: int, length: int, valid: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    """Return the mask of the slots to which each of the last ``n`` tokens attends.

    The new tokens are in the last ``n`` slots. They attend to all earlier slots and causally to each other. SDPA's
    ``is_causal`` would be wrong here, because it aligns the triangle to the first slot.

    Args:
        n: Number of new tokens.
        length: Number of slots, including the new tokens.
        valid: [B, 1 or H, length] bool, True where a slot contains a real token; None: everywhere.

    Returns:
        bool, broadcastable to [B, H, n, length]; None: everything is visible.
    """
    causal = None
    if n > 1:
        causal = torch.ones(n, length, dtype=torch.bool, device=device).tril(length - n)[None, None]
    if valid is None:
        return causal
    visible = valid[:, :, None, :]
    if causal is not None:
        # A pad attends to itself, because the softmax of a fully masked row is NaN.
        diagonal = torch.eye(n, dtype=torch.bool, device=device)
        diagonal = F.pad(diagonal, (length - n, 0))[None, None]
        visible = (visible & causal) | diagonal
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
        rule: How logits are computed.
        valid: See :func:`visibility`.

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
    """Attention under a mask, without expanding keys and values to query heads.

    The query heads of a group become extra query rows of their KV head: [B, H_kv, g * n, D] x [B, H_kv, S, D].

    Args:
        query: [B, H_q, n, D].
        keys: [B, H_kv, S, D].
        values: [B, H_kv, S, D_v].
        rule: How logits are computed.
        mask: [B or 1, H or 1, n, S] bool, True where a query attends to a slot, at least once per query; None:
            everywhere.

    Returns:
        [B, H_q, n, D_v].
    """
    batch, query_heads, n, dim = query.shape
    heads = keys.shape[1]
    groups = query_heads // heads
    rows = query.reshape(batch, heads, groups * n, dim)  # [B, H_kv, g * n, D]
    if not rule.is_plain:
        logits = rule.logits(query_key_products(rows, keys)).unflatten(2, (groups, n))  # [B, H_kv, g, n, S]
        if mask is not None:
            logits = logits.masked_fill(~mask[:, :, None], float("-inf"))
        weights = rule.weights(logits, head_dims=2).to(values.dtype).flatten(2, 3)  # [B, H_kv, g * n, S]
        return torch.matmul(weights, values).reshape(batch, query_heads, n, -1)
    if mask is not None and groups > 1 and n > 1:
        mask = mask.repeat(1, 1, groups, 1)
    splits = 1 if mask is not None else kv_splits(rows, keys, values)
    if splits > 1:
        out = split_kv_attention(rows, keys, values, rule.scaling, splits)
    else:
        out = sdpa_without_cudnn(rows, keys, values, attn_mask=mask, scale=rule.scaling)
    return out.reshape(batch, query_heads, n, -1)


def uncached_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rule: LogitRule,
    attention_mask: torch.Tensor | None,
    strictly_causal: bool = False,
    span: Span | None = None,
) -> torch.Tensor:
    """Causal attention of the last n tokens of complete rows, which may be padded on either side.

    Args:
        query: [B, H_q, n, D].
        key: [B, H_kv, T, D].
        value: [B, H_kv, T, D_v].
        rule: How logits are computed.
        attention_mask: [B, T], True for a real token; None: no padding.
        strictly_causal: No token attends to itself.
        span: Local attention window; None: each token attends to all tokens before it.

    Returns:
        [B, H_q, n, D_v]; zero for fully masked tokens.
    """
    n, length = query.shape[2], key.shape[2]
    if attention_mask is None or bool(attention_mask.all()):
        return causal_attention(query, key, value, rule, strictly_causal, span)
    mask = attention_mask.bool()
    columns = torch.arange(length, device=query.device)
    position = (mask.long().cumsum(1) - 1) if span is not None and span.counts_from_start else columns.expand_as(mask)
    visible = columns[length - n :, None] - columns[None] >= int(strictly_causal)  # [n, T]
    visible = visible & mask[:, None]  # [B, n, T]
    if span is not None:
        visible = visible & span.visible(position[:, length - n :, None], position[:, None])
    visible = visible[:, None]  # [B, 1, n, T]
    is_masked = ~visible.any(-1, keepdim=True)  # fully masked rows get zero output instead of NaN
    return masked_attention(query, key, value, rule, visible | is_masked).masked_fill(is_masked, 0.0)
