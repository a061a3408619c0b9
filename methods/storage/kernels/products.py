"""The two products of a decode step with packed codes, for storages without a fused kernel.

Packed codes are dequantized in registers, one tile at a time, and the dequantized cache is never written to memory.
Dequantized numbers are rounded to the dtype of the queries before a product, as with a dequantized cache, and sums are
in float32.

Legend: N segments (heads of all rows), rows: queries per segment.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..packed import Quantized
from .launch import MIN_DOT_SIZE, on_device

TILE = 64
"""Tokens per tile."""
MAX_SPLITS = 64
"""Maximum number of splits of a head's tokens, so that one head occupies many streaming multiprocessors."""


@triton.jit
def _scores(
    query, codes, scale, zero, out,
    groups, dim, block, length, rows,
    codes_n, codes_b, codes_d, scale_n, scale_b, scale_d,
    BITS: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, TOKENS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Compute one tile of tokens of one segment: out [N, rows, length] = query [N, rows, dim] x keys."""
    n = tl.program_id(0).to(tl.int64)
    g, d = tl.arange(0, ROWS), tl.arange(0, DIM)
    t = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    q = tl.load(
        query + n * rows * dim + g[:, None] * dim + d[None], mask=(g[:, None] < rows) & (d[None] < dim), other=0.0
    )
    b, within = t // block, t % block
    known = (d[:, None] < dim) & (t[None] < length)
    each: tl.constexpr = 8 // BITS
    at = n * codes_n + b[None] * codes_b + d[:, None] * codes_d + (within // each)[None]
    byte = tl.load(codes + at, mask=known, other=0).to(tl.int32)
    number = ((byte >> ((within % each) * BITS)[None]) & ((1 << BITS) - 1)).to(tl.float32)
    group = n * scale_n + b[None] * scale_b + d[:, None] * scale_d + (within // (block // groups))[None]
    step = tl.load(scale + group, mask=known, other=0.0).to(tl.float32)
    least = tl.load(zero + group, mask=known, other=0.0).to(tl.float32)
    keys = (number * step + least).to(q.dtype)
    if HALF:
        products = tl.dot(q, keys)
    else:
        products = tl.dot(q, keys, input_precision="ieee")
    place = n * rows * length + g[:, None] * length + t[None]
    tl.store(out + place, products, mask=(g[:, None] < rows) & (t[None] < length))


@triton.jit
def _sums(
    weights, codes, scale, zero, out,
    groups, dim, length, rows, tiles,
    weights_n, weights_g, codes_n, codes_t, scale_n, scale_t,
    BITS: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, TOKENS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Sum the tiles of one split of one segment: out [N, splits, rows, dim] = weights [N, rows, length] x values."""
    n, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    g, d = tl.arange(0, ROWS), tl.arange(0, DIM)
    each: tl.constexpr = 8 // BITS
    total = tl.zeros((ROWS, DIM), tl.float32)
    for tile in range(tiles):
        t = (part * tiles + tile) * TOKENS + tl.arange(0, TOKENS)
        known = (t[:, None] < length) & (d[None] < dim)
        byte = tl.load(codes + n * codes_n + t[:, None] * codes_t + (d // each)[None], mask=known, other=0).to(tl.int32)
        number = ((byte >> ((d % each) * BITS)[None]) & ((1 << BITS) - 1)).to(tl.float32)
        group = n * scale_n + t[:, None] * scale_t + (d // (dim // groups))[None]
        step = tl.load(scale + group, mask=known, other=0.0).to(tl.float32)
        least = tl.load(zero + group, mask=known, other=0.0).to(tl.float32)
        w = tl.load(
            weights + n * weights_n + g[:, None] * weights_g + t[None],
            mask=(g[:, None] < rows) & (t[None] < length),
            other=0.0,
        )
        values = (number * step + least).to(w.dtype)
        if HALF:
            total += tl.dot(w, values)
        else:
            total += tl.dot(w, values, input_precision="ieee")
    place = ((n * tl.num_programs(1) + part) * rows + g[:, None]) * dim + d[None]
    tl.store(out + place, total, mask=(g[:, None] < rows) & (d[None] < dim))


def query_times_keys(query: torch.Tensor, keys: Quantized, bits: int) -> torch.Tensor:
    """See :func:`..packed.query_times_keys`; float32."""
    segments, rows, dim = query.shape
    blocks, width = keys.codes.shape[1], keys.codes.shape[3]
    block = width * 8 // bits
    length = blocks * block
    out = torch.empty(segments, rows, length, dtype=torch.float32, device=query.device)
    codes, scale, zero = _last_contiguous(keys)
    with on_device(query):
        _scores[(segments, triton.cdiv(length, TILE))](
            query.contiguous(), codes, scale, zero, out,
            scale.shape[3], dim, block, length, rows,
            *codes.stride()[:3], *scale.stride()[:3],
            BITS=bits, **_sizes(query, rows, dim),
        )  # fmt: skip
    return out


def weights_times_values(weights: torch.Tensor, values: Quantized, bits: int) -> torch.Tensor:
    """See :func:`..packed.weights_times_values`; float32."""
    segments, rows, length = weights.shape
    codes, scale, zero = _last_contiguous(values)
    dim = codes.shape[2] * 8 // bits
    tiles = triton.cdiv(triton.cdiv(length, TILE), MAX_SPLITS)
    splits = triton.cdiv(triton.cdiv(length, TILE), tiles)
    out = torch.empty(segments, splits, rows, dim, dtype=torch.float32, device=weights.device)
    weights = weights if weights.stride(2) == 1 else weights.contiguous()
    with on_device(weights):
        _sums[(segments, splits)](
            weights, codes, scale, zero, out,
            scale.shape[2], dim, length, rows, tiles,
            *weights.stride()[:2], *codes.stride()[:2], *scale.stride()[:2],
            BITS=bits, **_sizes(weights, rows, dim),
        )  # fmt: skip
    return out.sum(1)


def _last_contiguous(q: Quantized) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes, scale and zero with a contiguous last dimension, and equal strides of scale and zero."""
    codes = q.codes if q.codes.stride(-1) == 1 else q.codes.contiguous()
    scale, zero = q.scale, q.zero
    if scale.stride() != zero.stride() or scale.stride(-1) != 1:
        scale, zero = scale.contiguous(), zero.contiguous()
    return codes, scale, zero


def _sizes(x: torch.Tensor, rows: int, dim: int) -> dict[str, int | bool]:
    """Return the compile-time sizes of a kernel."""
    return {
        "ROWS": max(MIN_DOT_SIZE, triton.next_power_of_2(rows)),
        "DIM": max(MIN_DOT_SIZE, triton.next_power_of_2(dim)),
        "TOKENS": TILE,
        "HALF": x.dtype != torch.float32,
    }
