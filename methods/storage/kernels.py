"""Triton kernels for the attention of a decode step on CUDA: products with packed codes, and split-KV attention.

Packed codes are dequantized in registers, one tile at a time, and the dequantized cache is never written to memory.
Dequantized numbers are rounded to the dtype of the queries before a product, as with a dequantized cache, and sums are
in float32. With ``TRITON_INTERPRET=1`` in the environment the kernels run, slowly, on CPU tensors for tests.

Legend: N segments (heads of all rows), rows: queries per segment, B batch rows, H stored heads, H_q query heads.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl

from .packed import Quantized

TILE = 64
"""Tokens per tile."""
MAX_SPLITS = 64
"""Maximum number of splits of a head's tokens, so that one head occupies many streaming multiprocessors."""
MIN_DOT_SIZE = 16
"""Minimum size of ``tl.dot`` operands; the query heads of a KV head are padded to it."""


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


@triton.jit
def _attention(
    query, keys, values, valid, end, sums, maxima, totals,
    scaling, dim, length, rows, heads, tiles, valid_b, valid_h,
    ROWS: tl.constexpr, DIM: tl.constexpr, TOKENS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Attend over one split of the tokens of one head: weighted sums, and maxima and totals to combine the splits."""
    n, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    g, d = tl.arange(0, ROWS), tl.arange(0, DIM)
    q = tl.load(
        query + n * rows * dim + g[:, None] * dim + d[None], mask=(g[:, None] < rows) & (d[None] < dim), other=0.0
    )
    last = tl.minimum(tl.load(end), length)
    mask = valid + (n // heads) * valid_b + (n % heads) * valid_h
    total = tl.zeros((ROWS, DIM), tl.float32)
    top = tl.full((ROWS,), -1e30, tl.float32)
    weight = tl.zeros((ROWS,), tl.float32)
    for tile in range(tiles):
        t = (part * tiles + tile) * TOKENS + tl.arange(0, TOKENS)
        inside = t < last
        k = tl.load(keys + (n * length + t[None]) * dim + d[:, None], mask=inside[None] & (d[:, None] < dim), other=0.0)
        v = tl.load(
            values + (n * length + t[:, None]) * dim + d[None], mask=inside[:, None] & (d[None] < dim), other=0.0
        )
        real = tl.load(mask + t, mask=inside, other=0) != 0
        if HALF:
            logits = tl.dot(q, k) * scaling
        else:
            logits = tl.dot(q, k, input_precision="ieee") * scaling
        logits = tl.where(real[None], logits, -1e30)
        new_top = tl.maximum(top, tl.max(logits, axis=1))
        rescale = tl.exp(top - new_top)
        w = tl.where(real[None], tl.exp(logits - new_top[:, None]), 0.0)
        weight = weight * rescale + tl.sum(w, axis=1)
        if HALF:
            total = total * rescale[:, None] + tl.dot(w.to(v.dtype), v)
        else:
            total = total * rescale[:, None] + tl.dot(w, v, input_precision="ieee")
        top = new_top
    row = (n * tl.num_programs(1) + part) * rows + g
    tl.store(sums + row[:, None] * dim + d[None], total, mask=(g[:, None] < rows) & (d[None] < dim))
    tl.store(maxima + row, top, mask=g < rows)
    tl.store(totals + row, weight, mask=g < rows)


def attention_of_one_token(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    valid: torch.Tensor,
    end: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Split-KV attention of one token per row over buffers of fixed size.

    Args:
        query: [B, H_q, 1, D].
        keys, values: [B, H, capacity, D], contiguous.
        valid: [B, 1 or H, capacity] bool, True where a slot holds a token.
        end: [1] int64 on the device, one past the last slot that is read.
        scaling: Factor on the logits.

    Returns:
        [B, H_q, 1, D].
    """
    batch, query_heads, _, dim = query.shape
    heads, length = keys.shape[1:3]
    rows, segments = query_heads // heads, batch * heads
    tiles = triton.cdiv(triton.cdiv(length, TILE), MAX_SPLITS)
    splits = triton.cdiv(triton.cdiv(length, TILE), tiles)
    sums = torch.empty(segments, splits, rows, dim, dtype=torch.float32, device=query.device)
    maxima, totals = (torch.empty(segments, splits, rows, dtype=torch.float32, device=query.device) for _ in range(2))
    mask = valid.view(torch.uint8)
    with _on(query):
        _attention[(segments, splits)](
            query.contiguous(), keys, values, mask, end, sums, maxima, totals,
            scaling, dim, length, rows, heads, tiles, mask.stride(0), mask.stride(1) if mask.shape[1] > 1 else 0,
            **_sizes(query, rows, dim),
        )  # fmt: skip
    share = (maxima - maxima.amax(1, keepdim=True)).exp()  # [B * H, splits, rows]
    out = (sums * share[..., None]).sum(1) / (totals * share).sum(1)[..., None]  # [B * H, rows, D]
    return out.to(query.dtype).view(batch, query_heads, 1, dim)


def query_times_keys(query: torch.Tensor, keys: Quantized, bits: int) -> torch.Tensor:
    """See :func:`.packed.query_times_keys`; float32."""
    segments, rows, dim = query.shape
    blocks, width = keys.codes.shape[1], keys.codes.shape[3]
    block = width * 8 // bits
    length = blocks * block
    out = torch.empty(segments, rows, length, dtype=torch.float32, device=query.device)
    codes, scale, zero = _last_contiguous(keys)
    with _on(query):
        _scores[(segments, triton.cdiv(length, TILE))](
            query.contiguous(), codes, scale, zero, out,
            scale.shape[3], dim, block, length, rows,
            *codes.stride()[:3], *scale.stride()[:3],
            BITS=bits, **_sizes(query, rows, dim),
        )  # fmt: skip
    return out


def weights_times_values(weights: torch.Tensor, values: Quantized, bits: int) -> torch.Tensor:
    """See :func:`.packed.weights_times_values`; float32."""
    segments, rows, length = weights.shape
    codes, scale, zero = _last_contiguous(values)
    dim = codes.shape[2] * 8 // bits
    tiles = triton.cdiv(triton.cdiv(length, TILE), MAX_SPLITS)
    splits = triton.cdiv(triton.cdiv(length, TILE), tiles)
    out = torch.empty(segments, splits, rows, dim, dtype=torch.float32, device=weights.device)
    weights = weights if weights.stride(2) == 1 else weights.contiguous()
    with _on(weights):
        _sums[(segments, splits)](
            weights, codes, scale, zero, out,
            scale.shape[2], dim, length, rows, tiles,
            *weights.stride()[:2], *codes.stride()[:2], *scale.stride()[:2],
            BITS=bits, **_sizes(weights, rows, dim),
        )  # fmt: skip
    return out.sum(1)


def _on(x: torch.Tensor) -> AbstractContextManager[object]:
    """Return a context that launches on the device of ``x``; Triton uses the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


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
