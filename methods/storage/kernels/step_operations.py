"""Small operations of a decode step, one launch each: residual and RMSNorm, RoPE and write, SwiGLU, greedy token.

They round where the same operations of PyTorch round, so that both give the same numbers up to the order of a sum.

Legend: B rows (one token each), H query heads and K KV heads of D channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..static import NextSlot
from .launch import on_device

MAX_HIDDEN = 1 << 15
"""Largest hidden size of :func:`add_rms_norm`, a row of which is in the registers of one program."""
SWIGLU_BLOCK = 1024
VOCABULARY_BLOCK = 4096
"""Logits per program of the first step of :func:`greedy_tokens`."""


@triton.jit
def rms_norm_of(x, weight, epsilon, size, dtype: tl.constexpr):
    """Normalize ``x`` [BLOCK] float32, of which ``size`` numbers count, as transformers' LlamaRMSNorm."""
    variance = tl.sum(x * x, 0) / size
    return weight * (x * tl.rsqrt(variance + epsilon)).to(dtype).to(tl.float32)


@triton.jit
def add_norm_kernel(x, y, weight, total, out, epsilon, size, x_b, y_b, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """Compute total = x + y and out = RMSNorm(total) of one row; without ADD, out = RMSNorm(x)."""
    b, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    known = i < size
    a = tl.load(x + b * x_b + i, mask=known, other=0.0).to(tl.float32)
    dtype = x.dtype.element_ty
    if ADD:
        a = (a + tl.load(y + b * y_b + i, mask=known, other=0.0).to(tl.float32)).to(dtype)
        tl.store(total + b * size + i, a, mask=known)
        a = a.to(tl.float32)
    w = tl.load(weight + i, mask=known, other=0.0).to(tl.float32)
    tl.store(out + b * size + i, rms_norm_of(a, w, epsilon, size, dtype).to(dtype), mask=known)


@triton.jit
def rope_kernel(query, key, value, cos, sin, query_weight, key_weight, query_out, key_out, values, valid, slot,
                epsilon, heads, kv_heads, query_b, query_h, key_b, key_h, value_b, value_h, cos_b, key_out_b, key_out_h,
                key_out_t, values_b, values_h, values_t, valid_b, valid_h, valid_heads, D: tl.constexpr,
                HALF_D: tl.constexpr, WIDE: tl.constexpr, DV: tl.constexpr, WIDE_V: tl.constexpr, NORM: tl.constexpr,
                STORE: tl.constexpr):  # fmt: skip
    """Rotate one head of one row, a query's or a key's; with NORM, normalize it first.

    STORE: the key goes to the slot that the device knows, with the head's value, and is marked as valid.
    """
    b, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.arange(0, WIDE)
    known = i < HALF_D
    dtype = query.dtype.element_ty
    if h < heads:
        source, target, scale = query + b * query_b + h * query_h, query_out + (b * heads + h) * D, query_weight
    else:
        k = (h - heads).to(tl.int64)
        source, target, scale = key + b * key_b + k * key_h, key_out + b * key_out_b + k * key_out_h, key_weight
        if STORE:
            t, c = tl.load(slot), tl.arange(0, WIDE_V)
            v = tl.load(value + b * value_b + k * value_h + c, mask=c < DV, other=0.0)
            tl.store(values + b * values_b + k * values_h + t * values_t + c, v, mask=c < DV)
            tl.store(valid + b * valid_b + k * valid_h + t, 1, mask=k < valid_heads)
            target += t * key_out_t
    first = tl.load(source + i, mask=known, other=0.0).to(tl.float32)
    second = tl.load(source + HALF_D + i, mask=known, other=0.0).to(tl.float32)
    if NORM:
        rest = tl.rsqrt((tl.sum(first * first, 0) + tl.sum(second * second, 0)) / D + epsilon)
        w1 = tl.load(scale + i, mask=known, other=0.0).to(tl.float32)
        w2 = tl.load(scale + HALF_D + i, mask=known, other=0.0).to(tl.float32)
        first = (w1 * (first * rest).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
        second = (w2 * (second * rest).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
    c1 = tl.load(cos + b * cos_b + i, mask=known, other=0.0).to(tl.float32)
    c2 = tl.load(cos + b * cos_b + HALF_D + i, mask=known, other=0.0).to(tl.float32)
    s1 = tl.load(sin + b * cos_b + i, mask=known, other=0.0).to(tl.float32)
    s2 = tl.load(sin + b * cos_b + HALF_D + i, mask=known, other=0.0).to(tl.float32)
    low = (first * c1).to(dtype).to(tl.float32) - (second * s1).to(dtype).to(tl.float32)
    high = (second * c2).to(dtype).to(tl.float32) + (first * s2).to(dtype).to(tl.float32)
    tl.store(target + i, low.to(dtype), mask=known)
    tl.store(target + HALF_D + i, high.to(dtype), mask=known)


@triton.jit
def swiglu_kernel(gate, up, out, size, gate_b, up_b, BLOCK: tl.constexpr):
    """Compute silu(gate) * up of one block of one row."""
    b, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    known = i < size
    g = tl.load(gate + b * gate_b + i, mask=known, other=0.0)
    x = g.to(tl.float32)
    x = (x / (1 + tl.exp(-x))).to(g.dtype).to(tl.float32)
    u = tl.load(up + b * up_b + i, mask=known, other=0.0).to(tl.float32)
    tl.store(out + b * size + i, (x * u).to(g.dtype), mask=known)


@triton.jit
def write_kernel(new_keys, new_values, keys, values, valid, slot, new_key_b, new_key_h, new_value_b, new_value_h,
                 key_b, key_h, key_t, value_b, value_h, value_t, valid_b, valid_h, valid_heads,
                 D: tl.constexpr, DV: tl.constexpr, WIDE: tl.constexpr, WIDE_V: tl.constexpr):  # fmt: skip
    """Write one token of one head to the slot that the device knows, and mark it as valid."""
    b, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    t, d, c = tl.load(slot), tl.arange(0, WIDE), tl.arange(0, WIDE_V)
    k = tl.load(new_keys + b * new_key_b + h * new_key_h + d, mask=d < D, other=0.0)
    v = tl.load(new_values + b * new_value_b + h * new_value_h + c, mask=c < DV, other=0.0)
    tl.store(keys + b * key_b + h * key_h + t * key_t + d, k, mask=d < D)
    tl.store(values + b * value_b + h * value_h + t * value_t + c, v, mask=c < DV)
    tl.store(valid + b * valid_b + h * valid_h + t, 1, mask=h < valid_heads)


@triton.jit
def largest_kernel(logits, indices, out, size, parts, logit_b, BLOCK: tl.constexpr, CHAINED: tl.constexpr):
    """Find the largest number of one block of one row, ``out``, and its first index.

    CHAINED: the numbers are those of the blocks, and ``out`` gets the index that was found in the first of them.
    """
    b, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = part * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + b * logit_b + i, mask=i < size, other=float("-inf")).to(tl.float32)
    x = tl.where(x != x, float("inf"), x)  # as in PyTorch, NaN is the largest
    top = tl.max(x, 0)
    found = tl.min(tl.where((x == top) & (i < size), i, size), 0).to(tl.int64)
    if CHAINED:
        tl.store(out + b, tl.load(indices + b * size + found))
    else:
        tl.store(out + b * parts + part, top)
        tl.store(indices + b * parts + part, found)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Return x [..., n] as [B, n] with a contiguous last dimension."""
    x = x.flatten(0, -2)
    return x if x.stride(-1) == 1 else x.contiguous()


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Return RMSNorm(x), x [B, 1, hidden]."""
    return _add_norm(x, None, weight, epsilon)[1]


def add_rms_norm(
    x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x + y and its RMSNorm, x and y [B, 1, hidden]."""
    return _add_norm(x, y, weight, epsilon)


def _add_norm(
    x: torch.Tensor, y: torch.Tensor | None, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    flat, other = _rows(x), None if y is None else _rows(y)
    size = x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = x if other is None else torch.empty_like(out)
    block = triton.next_power_of_2(size)
    with on_device(x):
        add_norm_kernel[(len(flat),)](
            flat, other, weight, total, out, epsilon, size, flat.stride(0), 0 if other is None else other.stride(0),
            ADD=y is not None, BLOCK=block, num_warps=min(16, max(1, block // 512)),
        )  # fmt: skip
    return total, out


def rotate(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor] | None = None,
    epsilon: float = 0.0,
    store: tuple[torch.Tensor, NextSlot] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply Llama's RoPE to queries and keys.

    Args:
        query, key: [B, 1, H, D] and [B, 1, K, D].
        cos, sin: [B or 1, 1, D].
        norms: [D] weights of an RMSNorm of each query head and each key head before it; None: no norms.
        epsilon: Number that the norms add to the mean square.
        store: Values [B, 1, K, D_v] of the same tokens, and where keys and values go; None: nowhere.

    Returns:
        Rotated queries and keys, the keys as a new tensor or those of the slot's buffer [B, K, S, D].
    """
    rows, _, heads, dim = query.shape
    kv_heads = key.shape[2]
    query, key, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, cos, sin))
    query_out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    query_weight, key_weight = (query, key) if norms is None else norms  # placeholders without norms
    if store is None:
        key_out = torch.empty(key.shape, dtype=key.dtype, device=key.device)
        value, targets = key, (key, key, key)  # placeholders
        strides = (0, 0, key_out.stride(0), key_out.stride(2), *[0] * 7)
        value_dim = 1
    else:
        value, to = store[0] if store[0].stride(-1) == 1 else store[0].contiguous(), store[1]
        mask, key_out, value_dim = to.valid.view(torch.uint8), to.keys, value.shape[3]
        targets = (to.values, mask, to.slot)
        strides = (value.stride(0), value.stride(2), *to.keys.stride()[:3], *to.values.stride()[:3])
        strides += (mask.stride(0), mask.stride(1), mask.shape[1])
    with on_device(query):
        rope_kernel[(rows, heads + kv_heads)](
            query, key, value, cos, sin, query_weight, key_weight, query_out, key_out, *targets, epsilon, heads,
            kv_heads, query.stride(0), query.stride(2), key.stride(0), key.stride(2), *strides[:2],
            0 if cos.shape[0] == 1 else cos.stride(0), *strides[2:], D=dim, HALF_D=dim // 2,
            WIDE=triton.next_power_of_2(dim // 2), DV=value_dim, WIDE_V=triton.next_power_of_2(value_dim),
            NORM=norms is not None, STORE=store is not None, num_warps=1,
        )  # fmt: skip
    return query_out, key_out


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up, both [B, 1, intermediate]."""
    flat, other, size = _rows(gate), _rows(up), gate.shape[-1]
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    with on_device(gate):
        swiglu_kernel[(len(flat), triton.cdiv(size, SWIGLU_BLOCK))](
            flat, other, out, size, flat.stride(0), other.stride(0), BLOCK=SWIGLU_BLOCK
        )
    return out


def write_token(
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    valid: torch.Tensor,
    slot: torch.Tensor,
) -> None:
    """Write one token per row into a slot of the cache and mark it as valid, in place.

    Args:
        new_keys, new_values: [B, H, 1, D] and [B, H, 1, D_v].
        keys, values: [B, H, S, D] and [B, H, S, D_v].
        valid: [B, 1 or H, S] bool.
        slot: [1] int64, on the device.
    """
    new_keys, new_values = (x if x.stride(3) == 1 else x.contiguous() for x in (new_keys, new_values))
    dim, value_dim, mask = keys.shape[3], values.shape[3], valid.view(torch.uint8)
    with on_device(keys):
        write_kernel[(keys.shape[0], keys.shape[1])](
            new_keys, new_values, keys, values, mask, slot, *new_keys.stride()[:2], *new_values.stride()[:2],
            *keys.stride()[:3], *values.stride()[:3], mask.stride(0), mask.stride(1), mask.shape[1],
            D=dim, DV=value_dim, WIDE=triton.next_power_of_2(dim), WIDE_V=triton.next_power_of_2(value_dim),
            num_warps=1,
        )  # fmt: skip


def greedy_tokens(logits: torch.Tensor) -> torch.Tensor:
    """Return the first index of the largest logit of each row: [B, vocabulary] -> [B] int64."""
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    rows, size = logits.shape
    parts = triton.cdiv(size, VOCABULARY_BLOCK)
    indices, out = (torch.empty(rows, n, dtype=torch.int64, device=logits.device) for n in (parts, 1))
    maxima = torch.empty(rows, parts, dtype=torch.float32, device=logits.device)
    with on_device(logits):
        largest_kernel[(rows, parts)](
            logits, indices, maxima, size, parts, logits.stride(0), BLOCK=VOCABULARY_BLOCK, CHAINED=False
        )
        largest_kernel[(rows, 1)](
            maxima, indices, out, parts, 1, parts, BLOCK=triton.next_power_of_2(parts), CHAINED=True
        )
    return out[:, 0]
