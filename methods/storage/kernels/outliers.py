"""Attention of one token per row over KVQuant's codes: keys per channel before RoPE, values per token, and outliers.

A tile of keys becomes numbers in registers, gets its outliers, and is rotated there. Positions are slot numbers.

Legend: N segments (heads of all rows), B batch rows, H stored heads, H_q query heads, rows: query heads per stored
head, D and D_v channels, P pairs of key channels (D / 2), m outliers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ...cache.logits import LogitRule
from .coded import load_table, numbers_of
from .launch import Tiling, half_operands, on_device, padded, tilings, tuned
from .online import LOWEST, attend_tile, logits_of, product, store_split
from .splits import Splits, join

QUARTER_TURNS = tl.constexpr(0.6366197723675814)  # 2 / pi
# pi / 2 in three parts; the products of the first two, of 8 and 11 bits, with a number of quarter turns are exact.
PI_1, PI_2, PI_3 = tl.constexpr(1.5703125), tl.constexpr(4.837512969970703125e-4), tl.constexpr(7.549790126404332e-8)


@dataclass(frozen=True)
class OutlierOperands:
    """Keys or values of all slots.

    Attributes:
        dim: Channels.
        codes, high: [slots, D * bits / 8] uint8; of 3 bits the lower two, and [slots, D / 8] the third.
        outliers: [slots, m] float16.
        channels: [slots, m] uint8, distinct in each slot.
        middle, half: Middle and half of the range: of keys [N, D], of values [slots], float16.
        sink: [N, 1, D], unquantized first token; [N, 0, D]: it is quantized.
        table: [2 ** bits] float32, increasing levels from -1 to 1.
        inv_freq: [P] float32, radians per position by which key channels i and i + P are rotated; None: not at all.
    """

    dim: int
    codes: torch.Tensor
    high: torch.Tensor | None
    outliers: torch.Tensor
    channels: torch.Tensor
    middle: torch.Tensor
    half: torch.Tensor
    sink: torch.Tensor
    table: torch.Tensor
    inv_freq: torch.Tensor | None = None

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return len(self.table).bit_length() - 1


@triton.jit
def cos_sin(angle):
    """Return cosine and sine of angles in radians, within 1e-6 up to 1e5 quarter turns."""
    turns = tl.floor(angle * QUARTER_TURNS + 0.5)
    x = tl.fma(turns, -PI_1, angle)
    x = tl.fma(turns, -PI_2, x)
    x = tl.fma(turns, -PI_3, x)  # from -pi / 4 to pi / 4
    y = x * x
    sin = x + x * y * (-0.16666667 + y * (0.008333331 + y * (-0.00019840874 + y * 2.7525562e-6)))
    cos = 1.0 - 0.5 * y + y * y * (0.041666668 + y * (-0.0013888397 + y * 2.4390449e-5))
    quarter = turns.to(tl.int32)
    odd, high = (quarter & 1) != 0, (quarter & 2) != 0
    first, second = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    return tl.where(odd != high, -first, first), tl.where(high, -second, second)


@triton.jit
def with_outliers(x, outliers, channels, slot, inside, c, M: tl.constexpr):
    """Overwrite the outliers of a tile [TOKENS, WIDE] of channels ``c``."""
    for i in tl.static_range(M):
        channel = tl.load(channels + slot * M + i, mask=inside, other=0).to(tl.int32)
        number = tl.load(outliers + slot * M + i, mask=inside, other=0.0).to(tl.float32)
        x = tl.where(c[None] == channel[:, None], number[:, None], x)
    return x


@triton.jit
def half_of_keys(codes, high, table, middle, half, outliers, channels, n, slot, inside, FIRST: tl.constexpr,
                 PAIRS: tl.constexpr, WIDE: tl.constexpr, KIND: tl.constexpr, M: tl.constexpr):  # fmt: skip
    """Return key channels FIRST to FIRST + PAIRS of a tile before RoPE, [TOKENS, WIDE] float32; the rest is 0."""
    EACH: tl.constexpr = 2 if KIND == 4 else 4
    c = tl.arange(0, WIDE)
    used = c < PAIRS
    place = n * (2 * PAIRS) + FIRST + c
    x = numbers_of(codes + FIRST // EACH, high + FIRST // 8 if KIND == 3 else high, table, slot, inside, PAIRS,
                   2 * PAIRS, WIDE, KIND, tl.float32)  # fmt: skip
    x = x * tl.load(half + place, mask=used, other=0.0).to(tl.float32)[None]
    x += tl.load(middle + place, mask=used, other=0.0).to(tl.float32)[None]
    return with_outliers(x, outliers, channels, slot, inside, FIRST + tl.where(used, c, 256), M)


@triton.jit
def split_outliers(
    query, key_codes, key_high, key_outliers, key_channels, key_middle, key_half, key_sink, key_table,
    value_codes, value_high, value_outliers, value_channels, value_middle, value_half, value_sink, value_table,
    inv_freq, starts, ends, sums, maxima, totals, scaling, softcap, chunk, rows,
    D: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, WIDE_V: tl.constexpr,
    TOKENS: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, M: tl.constexpr, M_V: tl.constexpr,
    SINKS: tl.constexpr, ROTATED: tl.constexpr, HALF: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Attend over one split of the tokens of one segment; WIDE: padded pairs of key channels."""
    n, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    g, c, d = tl.arange(0, ROWS), tl.arange(0, WIDE), tl.arange(0, WIDE_V)
    P: tl.constexpr = D // 2
    known = (g[:, None] < rows) & (c[None] < P)
    q_1 = tl.load(query + (n * rows + g[:, None]) * D + c[None], mask=known, other=0.0)
    q_2 = tl.load(query + (n * rows + g[:, None]) * D + P + c[None], mask=known, other=0.0)
    first, end = tl.load(starts + n), tl.load(ends + n).to(tl.int32)
    key_numbers, value_numbers = load_table(key_table, KEYS, tl.float32), load_table(value_table, VALUES, tl.float32)
    if ROTATED:
        frequency = tl.load(inv_freq + c, mask=c < P, other=0.0)
    top = tl.full((ROWS,), LOWEST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, WIDE_V), tl.float32)
    low = part * chunk
    if SINKS and part == 0:  # the first token, which RoPE does not rotate, before the tokens that are codes
        k_1 = tl.load(key_sink + n * D + c, mask=c < P, other=0.0)
        k_2 = tl.load(key_sink + n * D + P + c, mask=c < P, other=0.0)
        x = tl.sum(q_1.to(tl.float32) * k_1.to(tl.float32)[None] + q_2.to(tl.float32) * k_2.to(tl.float32)[None], 1)
        top, total = logits_of(x, scaling, softcap, CAPPED), total + 1.0
        acc += tl.load(value_sink + n * DV + d, mask=d < DV, other=0.0).to(tl.float32)[None]
    for begin in range(low, tl.minimum(low + chunk, end), TOKENS):
        t = begin + tl.arange(0, TOKENS)
        inside = t < end
        slot = first + t
        visible = inside & (t > 0) if SINKS else inside
        k_1 = half_of_keys(key_codes, key_high, key_numbers, key_middle, key_half, key_outliers, key_channels,
                           n, slot, inside, 0, P, WIDE, KEYS, M)  # fmt: skip
        k_2 = half_of_keys(key_codes, key_high, key_numbers, key_middle, key_half, key_outliers, key_channels,
                           n, slot, inside, P, P, WIDE, KEYS, M)  # fmt: skip
        if ROTATED:
            cos, sin = cos_sin(t.to(tl.float32)[:, None] * frequency[None])
            k_1, k_2 = k_1 * cos - k_2 * sin, k_2 * cos + k_1 * sin
        x = product(q_1, tl.trans(k_1.to(q_1.dtype)), tl.zeros((ROWS, TOKENS), tl.float32), HALF)
        x = product(q_2, tl.trans(k_2.to(q_2.dtype)), x, HALF)
        v = numbers_of(value_codes, value_high, value_numbers, slot, inside, DV, DV, WIDE_V, VALUES, tl.float32)
        v = v * tl.load(value_half + slot, mask=inside, other=0.0).to(tl.float32)[:, None]
        v += tl.load(value_middle + slot, mask=inside, other=0.0).to(tl.float32)[:, None]
        v = with_outliers(v, value_outliers, value_channels, slot, inside, d, M_V)
        logits = logits_of(x, scaling, softcap, CAPPED)
        top, total, acc = attend_tile(logits, visible[None], v.to(q_1.dtype), top, total, acc, HALF)
    store_split(sums, maxima, totals, top, total, acc, n, part, tl.num_programs(1), rows, d, DV, ROWS)


def outlier_tiling(width: int) -> Tiling:
    """Return the default tiling for vectors of ``width`` padded channels."""
    return Tiling(max(16, min(64, 2048 // width)), warps=4, stages=2)


def outlier_attention(
    query: torch.Tensor,
    keys: OutlierOperands,
    values: OutlierOperands,
    shape: tuple[int, int],
    starts: torch.Tensor,
    ends: torch.Tensor,
    capacity: int,
    rule: LogitRule,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one token per row; see :func:`.coded.coded_attention`. No token has left: ``valid`` is None."""
    assert valid is None, "positions are slot numbers"
    (batch, heads), rows = shape, query.shape[1] // shape[1]
    out = torch.empty(batch, query.shape[1], 1, values.dim, dtype=torch.float32, device=query.device)
    query = query.contiguous()
    pairs, width = padded(keys.dim // 2), padded(values.dim)

    def run(tiling: Tiling) -> Splits:
        segments = batch * heads
        chunk = tiling.chunk(segments, capacity, capacity, query.device)
        splits = Splits.empty(segments, triton.cdiv(capacity, chunk), rows, values.dim, query.device)
        tensors = [
            y for x in (keys, values)
            for y in (x.codes, x.high, x.outliers, x.channels, x.middle, x.half, x.sink, x.table)
        ]  # fmt: skip
        split_outliers[(segments, splits.maxima.shape[1])](
            query, *tensors, keys.inv_freq, starts, ends, splits.sums, splits.maxima, splits.totals,
            rule.scaling, rule.softcap or 1.0, chunk, rows,
            D=keys.dim, DV=values.dim, ROWS=padded(rows), WIDE=pairs, WIDE_V=width, TOKENS=tiling.tokens,
            KEYS=keys.bits, VALUES=values.bits, M=keys.outliers.shape[-1], M_V=values.outliers.shape[-1],
            SINKS=keys.sink.shape[1] > 0, ROTATED=keys.inv_freq is not None, HALF=half_operands(query.dtype),
            CAPPED=rule.softcap is not None,
            num_warps=tiling.warps, num_stages=tiling.stages,
        )  # fmt: skip
        join(splits, rule.sinks, out, heads)
        return splits

    default = outlier_tiling(max(2 * pairs, width))
    optional = (keys.bits, values.bits, rule.softcap is None, keys.inv_freq is None, keys.sink.shape[1])
    counts = (keys.outliers.shape[-1], values.outliers.shape[-1])
    sizes = (keys.dim, values.dim, batch * heads, rows, triton.next_power_of_2(capacity))
    with on_device(query):
        run(tuned(("outliers", query.dtype, *sizes, *counts, *optional), default, tilings(default), run))
    return out
