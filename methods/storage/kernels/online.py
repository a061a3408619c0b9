"""Parts that the kernels share: logits, online softmax, and the join of splits.

Logits are in base 2, multiplied by log2(e), because ``exp2`` is one instruction.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1e30)
"""Logit of a masked token; finite, because the difference of two infinities is NaN."""
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def product(a, b, acc, HALF: tl.constexpr):
    """Add the matrix product of ``a`` and ``b`` to ``acc``, in half precision operands or in full float32 precision."""
    if HALF:
        return tl.dot(a, b, acc)
    return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")


@triton.jit
def logits_of(products, scaling, softcap, CAPPED: tl.constexpr):
    """Return logits in base 2: ``scaling`` and then the soft cap c * tanh(x / c)."""
    if CAPPED:
        x = products * (scaling / softcap)
        return (softcap - 2 * softcap / (tl.exp2(x * (2 * LOG2_E)) + 1)) * LOG2_E
    return products * (scaling * LOG2_E)


@triton.jit
def softmax_step(logits, visible, top, total):
    """Return the weights [ROWS, TOKENS] of a tile, the factor of earlier ones, and the new maximum and total [ROWS].

    Args:
        logits: [ROWS, TOKENS], base 2.
        visible: [1 or ROWS, TOKENS].
        top, total: Maximum logit and sum of weights [ROWS] so far.
    """
    logits = tl.where(visible, logits, LOWEST)
    new_top = tl.maximum(top, tl.max(logits, 1))
    rescale = tl.exp2(top - new_top)
    weights = tl.where(visible, tl.exp2(logits - new_top[:, None]), 0.0)
    return weights, rescale, new_top, total * rescale + tl.sum(weights, 1)


@triton.jit
def attend_tile(logits, visible, v, top, total, acc, HALF: tl.constexpr):
    """Add one tile of values [TOKENS, D_v] to the weighted sums ``acc`` [ROWS, D_v]; see :func:`softmax_step`."""
    weights, rescale, top, total = softmax_step(logits, visible, top, total)
    acc = product(weights.to(v.dtype), v, acc * rescale[:, None], HALF)
    return top, total, acc


@triton.jit
def store_split(sums, maxima, totals, top, total, acc, n, part, parts, rows, c, DV: tl.constexpr,
                ROWS: tl.constexpr):  # fmt: skip
    """Store the result of one split: sums [N, parts, rows, D_v] of channels c, maxima and totals [N, parts, rows]."""
    g = tl.arange(0, ROWS)
    row = (n * parts + part) * rows + g
    tl.store(sums + row[:, None] * DV + c[None], acc, mask=(g[:, None] < rows) & (c[None] < DV))
    tl.store(maxima + row, top, mask=g < rows)
    tl.store(totals + row, total, mask=g < rows)


@triton.jit
def join_splits(sums, maxima, totals, sinks, out, parts, rows, heads, DV: tl.constexpr, WIDE_V: tl.constexpr,
                PARTS: tl.constexpr, STEP: tl.constexpr, SINKS: tl.constexpr):  # fmt: skip
    """Join the splits of one query head by log-sum-exp: out [N, rows, D_v]. A sink is a logit without a value."""
    n, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    s, c = tl.arange(0, PARTS), tl.arange(0, WIDE_V)
    row = (n * parts + s) * rows + g
    top = tl.load(maxima + row, mask=s < parts, other=LOWEST)
    weight = tl.load(totals + row, mask=s < parts, other=0.0)
    highest = tl.max(top, 0)
    if SINKS:
        sink = tl.load(sinks + (n % heads) * rows + g).to(tl.float32) * LOG2_E
        highest = tl.maximum(highest, sink)
    total = tl.sum(weight * tl.exp2(top - highest), 0)
    if SINKS:
        total += tl.exp2(sink - highest)
    acc = tl.zeros((WIDE_V,), tl.float32)
    for first in range(0, parts, STEP):
        p = first + tl.arange(0, STEP)
        place = (n * parts + p) * rows + g
        share = tl.exp2(tl.load(maxima + place, mask=p < parts, other=LOWEST) - highest)
        x = tl.load(sums + place[:, None] * DV + c[None], mask=(p[:, None] < parts) & (c[None] < DV), other=0.0)
        acc += tl.sum(x * share[:, None], 0)
    acc = acc / tl.maximum(total, 1e-30)  # 0 if no token is visible
    tl.store(out + (n * rows + g) * DV + c, acc.to(out.dtype.element_ty), mask=c < DV)


@triton.jit
def slot_weights(logits, maxima, totals, sinks, ends, out, length, window, parts, rows, heads, end_n,
                 ROWS: tl.constexpr, PARTS: tl.constexpr, TOKENS: tl.constexpr, SINKS: tl.constexpr,
                 HAS_END: tl.constexpr, MEAN: tl.constexpr):  # fmt: skip
    """Turn logits [N, rows, length] into attention weights, or into their mean over the rows [N, length]."""
    n, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    s, g, t = tl.arange(0, PARTS), tl.arange(0, ROWS), tile * TOKENS + tl.arange(0, TOKENS)
    known = (s[:, None] < parts) & (g[None] < rows)
    row = (n * parts + s[:, None]) * rows + g[None]
    top = tl.load(maxima + row, mask=known, other=LOWEST)  # [PARTS, ROWS]
    weight = tl.load(totals + row, mask=known, other=0.0)
    highest = tl.max(top, 0)
    if SINKS:
        sink = tl.load(sinks + (n % heads) * rows + g, mask=g < rows, other=0.0).to(tl.float32) * LOG2_E
        highest = tl.maximum(highest, sink)
    total = tl.sum(weight * tl.exp2(top - highest[None]), 0)
    if SINKS:
        total += tl.exp2(sink - highest)
    end = length
    if HAS_END:
        end = tl.minimum(tl.load(ends + n * end_n).to(tl.int32), length)
    seen = (t >= end - window) & (t < end)
    place = logits + (n * rows + g[:, None]) * length + t[None]
    x = tl.load(place, mask=(g[:, None] < rows) & seen[None], other=LOWEST)
    w = tl.exp2(x - highest[:, None]) / tl.maximum(total, 1e-30)[:, None]
    w = tl.where((g[:, None] < rows) & seen[None], w, 0.0)
    if MEAN:
        tl.store(out + n * length + t, tl.sum(w, 0) / rows, mask=t < length)
    else:
        place = out + (n * rows + g[:, None]) * length + t[None]
        tl.store(place, w, mask=(g[:, None] < rows) & (t[None] < length))
