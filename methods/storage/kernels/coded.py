"""Attention of one token per row over keys and values that are stored as codes of their own: FP8, or codebook indices.

Codes become numbers in registers, one tile at a time. The scale of a key is multiplied into its logit, and the scale of
a value into its weight. A rotation is applied to the query and to the output, outside of the kernel.

Legend: N segments (heads of all rows), B batch rows, H stored heads, H_q query heads, rows: query heads per stored
head, D and D_v channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...cache.logits import LogitRule
from ..codec import KernelOperands
from .launch import Tiling, default_tiling, half_operands, on_device, padded, tilings, tuned
from .online import LOWEST, logits_of, product, softmax_step, store_split
from .splits import Splits, join

E4M3, E5M2 = tl.constexpr(-4), tl.constexpr(-5)
"""Kinds of codes besides the numbers of bits of indices, 2 to 4: FP8 formats, by their bits of exponent."""
KINDS = {torch.float8_e4m3fn: -4, torch.float8_e5m2: -5}
E4M3_FACTOR = 256.0
"""Factor between an e4m3 number and the float16 number of the same sign, exponent and mantissa bits."""


@triton.jit
def spread(low, high, KIND: tl.constexpr):
    """Turn bytes [T, W] of codes into codes [T, W * codes per byte]; ``high`` [T, W / 2]: third bits of 3-bit codes."""
    if KIND == 4:
        x = tl.join(low & 15, low >> 4)
        x = tl.reshape(x, (low.shape[0], low.shape[1] * 2))
    else:
        x = tl.join(tl.join(low & 3, (low >> 4) & 3), tl.join((low >> 2) & 3, low >> 6))
        x = tl.reshape(x, (low.shape[0], low.shape[1] * 4))
    if KIND == 3:
        y = tl.reshape(tl.join(high & 15, high >> 4), (low.shape[0], low.shape[1]))
        y = tl.join(tl.join(y & 1, (y >> 2) & 1), tl.join((y >> 1) & 1, y >> 3))
        x = x | (tl.reshape(y, (low.shape[0], low.shape[1] * 4)) << 2)
    return x


@triton.jit
def numbers_of(codes, high, table, slot, inside, DIM: tl.constexpr, STRIDE: tl.constexpr, WIDE: tl.constexpr,
               KIND: tl.constexpr, dtype: tl.constexpr):  # fmt: skip
    """Load DIM codes of each slot, of the STRIDE in a slot, and return their numbers without scales.

    Returns [TOKENS, WIDE]; 0 beyond DIM.

    ``table`` [2 ** bits] has been loaded: lookups in memory would be loaded ahead like codes, 4 bytes at a time.
    """
    if KIND < 0:
        if DIM % 2 == 0:  # in pairs: bytes that go straight into a product are loaded 8 at a time, pairs 16 bytes
            w = tl.arange(0, WIDE // 2)
            at = codes + slot[:, None] * (STRIDE // 2) + w[None]
            pair = tl.load(at, mask=inside[:, None] & (w[None] < DIM // 2), other=0)
            x = tl.reshape(tl.join(pair & 255, (pair >> 8) & 255), (slot.shape[0], WIDE))
        else:
            c = tl.arange(0, WIDE)
            at = codes + slot[:, None] * STRIDE + c[None]
            x = tl.load(at, mask=inside[:, None] & (c[None] < DIM), other=0).to(tl.int16)
        # Sign, exponent and mantissa of e4m3 in the places of float16 are the number divided by 256.
        bits = ((x & 128) << 8) | ((x & 127) << 7) if KIND == E4M3 else x << 8
        out = bits.to(tl.int16).to(tl.float16, bitcast=True).to(dtype)
    else:
        EACH: tl.constexpr = 2 if KIND == 4 else 4
        w, c = tl.arange(0, WIDE // EACH), tl.arange(0, WIDE)
        known = inside[:, None] & (w[None] < DIM // EACH)
        low = tl.load(codes + slot[:, None] * (STRIDE // EACH) + w[None], mask=known, other=0).to(tl.int32)
        third = low
        if KIND == 3:
            b = tl.arange(0, WIDE // 8)
            known = inside[:, None] & (b[None] < DIM // 8)
            third = tl.load(high + slot[:, None] * (STRIDE // 8) + b[None], mask=known, other=0).to(tl.int32)
        index = tl.reshape(spread(low, third, KIND), (slot.shape[0] * WIDE,))
        x = tl.reshape(tl.gather(table, index, 0), (slot.shape[0], WIDE))
        out = tl.where(inside[:, None] & (c[None] < DIM), x, 0.0).to(dtype)
    return out


@triton.jit
def load_table(table, KIND: tl.constexpr, dtype: tl.constexpr):
    """Load the number of each index, [2 ** bits]; of FP8, which needs none, zeros."""
    if KIND < 0:
        out = tl.zeros((2,), dtype)
    else:
        out = tl.load(table + tl.arange(0, 2**KIND)).to(dtype)
    return out


@triton.jit
def split_coded(
    query, key_codes, key_high, key_scale, key_table, value_codes, value_high, value_scale, value_table,
    starts, ends, valid, sums, maxima, totals,
    scaling, softcap, key_factor, value_factor, capacity, chunk, rows, heads,
    D: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, WIDE_V: tl.constexpr,
    TOKENS: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, TOKEN_SCALES: tl.constexpr,
    SCALES: tl.constexpr, HALF: tl.constexpr, HAS_VALID: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Attend over one split of the tokens of one segment."""
    n, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    g, d = tl.arange(0, ROWS), tl.arange(0, WIDE)
    q = tl.load(query + (n * rows + g[:, None]) * D + d[None], mask=(g[:, None] < rows) & (d[None] < D), other=0.0)
    first, end = tl.load(starts + n), tl.load(ends + n).to(tl.int32)
    if SCALES and not TOKEN_SCALES:
        key_factor *= tl.load(key_scale + n)
        value_factor *= tl.load(value_scale + n)
    key_numbers, value_numbers = load_table(key_table, KEYS, q.dtype), load_table(value_table, VALUES, q.dtype)
    top = tl.full((ROWS,), LOWEST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, WIDE_V), tl.float32)
    low = part * chunk
    for begin in range(low, tl.minimum(low + chunk, end), TOKENS):
        t = begin + tl.arange(0, TOKENS)
        inside = t < end
        slot = first + t
        visible = inside
        if HAS_VALID:
            visible = tl.load(valid + n * capacity + t, mask=inside, other=0) != 0
        k = numbers_of(key_codes, key_high, key_numbers, slot, inside, D, D, WIDE, KEYS, q.dtype)
        x = product(q, tl.trans(k), tl.zeros((ROWS, TOKENS), tl.float32), HALF) * key_factor
        if TOKEN_SCALES:
            x *= tl.load(key_scale + slot, mask=inside, other=0.0).to(tl.float32)[None]
        logits = logits_of(x, scaling, softcap, CAPPED)
        weights, rescale, top, total = softmax_step(logits, visible[None], top, total)
        weights *= value_factor
        if TOKEN_SCALES:
            weights *= tl.load(value_scale + slot, mask=inside, other=0.0).to(tl.float32)[None]
        v = numbers_of(value_codes, value_high, value_numbers, slot, inside, DV, DV, WIDE_V, VALUES, q.dtype)
        acc = product(weights.to(q.dtype), v, acc * rescale[:, None], HALF)
    store_split(
        sums, maxima, totals, top, total, acc, n, part, tl.num_programs(1), rows, tl.arange(0, WIDE_V), DV, ROWS
    )


def kind_of(x: KernelOperands) -> int:
    """Return the bits of an index, or the kind of FP8."""
    return KINDS[x.codes.dtype] if x.table is None else len(x.table).bit_length() - 1


def code_words(x: KernelOperands) -> torch.Tensor:
    """Codes as the kernel loads them: FP8 numbers in pairs if there is an even number of channels, else bytes."""
    return x.codes.view(torch.int16 if x.table is None and x.dim % 2 == 0 else torch.uint8)


def coded_attention(
    query: torch.Tensor,
    keys: KernelOperands,
    values: KernelOperands,
    shape: tuple[int, int],
    starts: torch.Tensor,
    ends: torch.Tensor,
    capacity: int,
    rule: LogitRule,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one token per row.

    Args:
        query: [B, H_q, 1, D], rotated as the keys are.
        keys, values: Stored vectors of all segments.
        shape: Rows B and heads H.
        starts, ends: [N] int64, first slot of each segment, and number of slots in use.
        capacity: Largest number of slots of a segment.
        rule: How logits are computed.
        valid: [N, capacity] bool, True where a slot in use holds a token; None: everywhere.

    Returns:
        [B, H_q, 1, D_v] float32, rotated as the values are.
    """
    (batch, heads), rows = shape, query.shape[1] // shape[1]
    out = torch.empty(batch, query.shape[1], 1, values.dim, dtype=torch.float32, device=query.device)
    query = query.contiguous()
    holes = None if valid is None else valid.view(torch.uint8)

    def run(tiling: Tiling) -> Splits:
        segments = batch * heads
        chunk = tiling.chunk(segments, capacity, capacity, query.device)
        splits = Splits.empty(segments, triton.cdiv(capacity, chunk), rows, values.dim, query.device)
        factors = (E4M3_FACTOR if kind_of(x) == KINDS[torch.float8_e4m3fn] else 1.0 for x in (keys, values))
        tensors = [y for x in (keys, values) for y in (code_words(x), x.high, x.scale, x.table)]
        split_coded[(segments, splits.maxima.shape[1])](
            query, *tensors, starts, ends, holes, splits.sums, splits.maxima, splits.totals,
            rule.scaling, rule.softcap or 1.0, *factors, capacity, chunk, rows, heads,
            D=keys.dim, DV=values.dim, ROWS=padded(rows), WIDE=padded(keys.dim), WIDE_V=padded(values.dim),
            TOKENS=tiling.tokens, KEYS=kind_of(keys), VALUES=kind_of(values),
            TOKEN_SCALES=keys.scale is not None and keys.scale.dtype == torch.float16, SCALES=keys.scale is not None,
            HALF=half_operands(query.dtype), HAS_VALID=holes is not None, CAPPED=rule.softcap is not None,
            num_warps=tiling.warps, num_stages=tiling.stages,
        )  # fmt: skip
        join(splits, rule.sinks, out, heads)
        return splits

    default = default_tiling(max(padded(keys.dim), padded(values.dim)), 2)
    optional = (kind_of(keys), kind_of(values), valid is None, rule.softcap is None)
    key = ("coded", query.dtype, keys.dim, values.dim, batch * heads, rows, triton.next_power_of_2(capacity), optional)
    with on_device(query):
        run(tuned(key, default, tilings(default), run))
    return out
