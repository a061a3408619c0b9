"""Attention of one token per row over KIVI's packed keys and values and its unquantized recent tokens, in one launch.

A scale belongs to a group: of keys, the tokens of a group in one channel, and of values, the channels of a group in one
token. The matrix products take codes that are not dequantized; the scales are multiplied into the other operand:
into a copy of the query for each group of tokens, and into a copy of the weights for each group of channels. Products
of a copy with codes of other groups are discarded; the copies fill rows of the matrix units that would be padding.

Codes become floating-point numbers without a conversion: OR-ed into the mantissa of a power of two, two at a time in a
32-bit word, they are ``offset + code``, and ``offset`` times the sum of the other operand is subtracted. The order of
the tokens (or channels) of a word is then that of :func:`within_words`.

Legend: N segments (heads of all rows), rows: query heads per stored head, D and D_v channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ...cache.logits import LogitRule
from ..packed import Quantized
from .launch import Tiling, half_operands, on_device, padded, tuned
from .online import LOWEST, attend_tile, logits_of, product, softmax_step, store_split
from .splits import Splits, join

OFFSETS = {torch.float16: 1024, torch.bfloat16: 128}
"""Power of two in whose mantissa a code fits, by dtype; bfloat16 has no room for codes of 8 bits."""
MAX_TILE = 64
"""Tokens per tile without tuning."""


@triton.jit
def floating_codes(words, BITS: tl.constexpr, OFFSET: tl.constexpr, dtype: tl.constexpr):
    """Unpack words [R, W] int32 to ``OFFSET + code``, [R, W * 32 / BITS], in the order of :func:`within_words`."""
    ONE: tl.constexpr = (1 << BITS) - 1
    BOTH: tl.constexpr = ONE | (ONE << 16)
    # The bits of OFFSET in bfloat16 or float16, in both halves of a word.
    ADD: tl.constexpr = 0x43004300 if OFFSET == 128 else (0x64006400 if OFFSET == 1024 else 0)
    x = tl.join(words & BOTH | ADD, (words >> 8) & BOTH | ADD)
    if BITS <= 4:
        x = tl.join(x, tl.join((words >> 4) & BOTH | ADD, (words >> 12) & BOTH | ADD))
    if BITS == 2:
        y = tl.join((words >> 2) & BOTH | ADD, (words >> 10) & BOTH | ADD)
        y = tl.join(y, tl.join((words >> 6) & BOTH | ADD, (words >> 14) & BOTH | ADD))
        x = tl.join(x, y)
    x = tl.join(x.to(tl.int16), (x >> 16).to(tl.int16))
    x = tl.reshape(x, (words.shape[0], words.shape[1] * (32 // BITS)))
    if OFFSET == 128:
        out = x.to(tl.bfloat16, bitcast=True)
    elif OFFSET == 1024:
        out = x.to(tl.float16, bitcast=True)
    else:
        out = x.to(tl.float32).to(dtype)
    return out


@triton.jit
def within_words(i, BITS: tl.constexpr):
    """Return the index of the code at place ``i`` of :func:`floating_codes`: the two halves of a word alternate."""
    CODES: tl.constexpr = 32 // BITS
    return i // CODES * CODES + (i % CODES) // 2 + (i % 2) * (CODES // 2)


@triton.jit
def key_products(q, codes, scales, zeros, start, code_b, code_d, D: tl.constexpr,
                 ROWS: tl.constexpr, WIDE: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
                 BITS: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr, HALF: tl.constexpr):  # fmt: skip
    """Multiply queries [ROWS, WIDE] with one tile of packed keys: [ROWS, TOKENS] float32, tokens in word order."""
    GROUPS: tl.constexpr = TOKENS // GROUP
    WORDS: tl.constexpr = TOKENS * BITS // 32
    d, w, j = tl.arange(0, WIDE), tl.arange(0, WORDS), tl.arange(0, GROUPS)
    b, first = start // BLOCK, start % BLOCK
    word, group = tl.multiple_of(first // (32 // BITS), WORDS), tl.multiple_of(first // GROUP, GROUPS)
    place = codes + b * code_b + d[:, None] * code_d + (word + w)[None]
    words = tl.load(place, mask=d[:, None] < D, other=0)  # [WIDE, WORDS]
    place = (b * D + d[None]) * (BLOCK // GROUP) + (group + j)[:, None]
    scale = tl.load(scales + place, mask=d[None] < D, other=0.0).to(tl.float32)  # [GROUPS, WIDE]
    zero = tl.load(zeros + place, mask=d[None] < D, other=0.0).to(tl.float32)
    wide_q = q.to(tl.float32)[None]
    scaled = (scale[:, None] * wide_q).to(q.dtype)  # [GROUPS, ROWS, WIDE]
    bias = tl.sum(zero[:, None] * wide_q - OFFSET * scaled.to(tl.float32), 2)  # [GROUPS, ROWS]
    empty = tl.zeros((GROUPS * ROWS, TOKENS), tl.float32)
    numbers = floating_codes(words, BITS, OFFSET, q.dtype)
    x = product(tl.reshape(scaled, (GROUPS * ROWS, WIDE)), numbers, empty, HALF)
    x = tl.reshape(x, (GROUPS, ROWS, TOKENS)) + bias[:, :, None]
    is_own = (tl.arange(0, TOKENS) // GROUP)[None] == j[:, None]  # a word is within one group
    return tl.sum(tl.where(is_own[:, None], x, 0.0), 0)


@triton.jit
def rescaled(acc, rescale, GROUPS: tl.constexpr, ROWS: tl.constexpr):
    """Multiply sums [GROUPS * ROWS, D_v] by a factor of each row."""
    return acc * tl.reshape(tl.broadcast_to(rescale[None], (GROUPS, ROWS)), (GROUPS * ROWS,))[:, None]


@triton.jit
def attend_packed(logits, t, end, codes, scales, zeros, code_t, top, total, acc, bias, DV: tl.constexpr,
                  ROWS: tl.constexpr, WIDE_V: tl.constexpr, TOKENS: tl.constexpr, BITS: tl.constexpr,
                  GROUP: tl.constexpr, OFFSET: tl.constexpr, dtype: tl.constexpr, HALF: tl.constexpr):  # fmt: skip
    """Add packed values of tokens ``t`` before ``end`` to an online softmax.

    ``acc`` [GROUPS * ROWS, WIDE_V] has a copy of the sums for each group of channels, of which only the group's own
    channels count; ``bias`` [GROUPS, ROWS] is to be added to them.
    """
    GROUPS: tl.constexpr = WIDE_V // GROUP
    j, w = tl.arange(0, GROUPS), tl.arange(0, WIDE_V * BITS // 32)
    is_held = t < end
    weights, rescale, top, total = softmax_step(logits, is_held, top, total)
    is_code = is_held[:, None] & (w[None] < DV * BITS // 32)
    words = tl.load(codes + t[:, None] * code_t + w[None], mask=is_code, other=0)  # [TOKENS, words]
    place = t[None] * (DV // GROUP) + j[:, None]
    has_scale = is_held[None] & (j[:, None] < DV // GROUP)
    scale = tl.load(scales + place, mask=has_scale, other=0.0).to(tl.float32)  # [GROUPS, TOKENS]
    zero = tl.load(zeros + place, mask=has_scale, other=0.0).to(tl.float32)
    scaled = (weights[None] * scale[:, None]).to(dtype)  # [GROUPS, ROWS, TOKENS]
    bias = bias * rescale[None] + tl.sum(weights[None] * zero[:, None] - OFFSET * scaled.to(tl.float32), 2)
    acc = rescaled(acc, rescale, GROUPS, ROWS)
    numbers = floating_codes(words, BITS, OFFSET, dtype)
    acc = product(tl.reshape(scaled, (GROUPS * ROWS, TOKENS)), numbers, acc, HALF)
    return top, total, acc, bias


@triton.jit
def attend_recent(
    q, key_codes, key_scales, key_zeros, keys, values, packed, rounded, ends, sums, maxima, totals,
    scaling, softcap, rows, ring, code_b, code_d,
    D: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, WIDE_V: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr,
    HALF: tl.constexpr, CAPPED: tl.constexpr, ON_DEVICE: tl.constexpr,
):  # fmt: skip
    """Attend over the tokens from ``rounded``, whose values are not packed, as the last split of a segment."""
    d, c, i = tl.arange(0, WIDE), tl.arange(0, WIDE_V), tl.arange(0, TOKENS)
    top, total = tl.full((ROWS,), LOWEST, tl.float32), tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, WIDE_V), tl.float32)
    for start in range(rounded // TOKENS * TOKENS, packed, TOKENS):  # packed keys
        start = tl.multiple_of(start, TOKENS)
        t = start + within_words(i, BITS)
        is_held = (t >= rounded) & (t < packed)
        x = key_products(q, key_codes, key_scales, key_zeros, start, code_b, code_d,
                         D, ROWS, WIDE, TOKENS, BLOCK, BITS, GROUP, OFFSET, HALF)  # fmt: skip
        slot = t % ring if ON_DEVICE else t - rounded
        v = tl.load(values + slot[:, None] * DV + c[None], mask=is_held[:, None] & (c[None] < DV), other=0.0)
        top, total, acc = attend_tile(logits_of(x, scaling, softcap, CAPPED), is_held, v, top, total, acc, HALF)
    for start in range(packed, ends, TOKENS):
        t = start + i
        is_held = t < ends
        k = tl.load(keys + (t - packed)[None] * D + d[:, None], mask=is_held[None] & (d[:, None] < D), other=0.0)
        x = product(q, k, tl.zeros((ROWS, TOKENS), tl.float32), HALF)
        slot = t % ring if ON_DEVICE else t - rounded
        v = tl.load(values + slot[:, None] * DV + c[None], mask=is_held[:, None] & (c[None] < DV), other=0.0)
        top, total, acc = attend_tile(logits_of(x, scaling, softcap, CAPPED), is_held, v, top, total, acc, HALF)
    n, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    store_split(sums, maxima, totals, top, total, acc, n, part, parts, rows, c, DV, ROWS)


@triton.jit
def split_kivi(
    query, key_codes, key_scales, key_zeros, value_codes, value_scales, value_zeros, keys, values,
    packed, rounded, ends, sums, maxima, totals,
    scaling, softcap, chunk, rows, ring,
    code_n, code_b, code_d, scale_n, vcode_n, vcode_t, vscale_n, key_n, value_n,
    D: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, WIDE_V: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, GROUP_V: tl.constexpr,
    OFFSET: tl.constexpr, HALF: tl.constexpr, CAPPED: tl.constexpr, ON_DEVICE: tl.constexpr,
):  # fmt: skip
    """Attend over one split of the tokens with packed keys and values; the last program over all other tokens.

    Keys of tokens before ``packed`` and values of tokens before ``rounded`` (not after ``packed``) are codes. If the
    counts are ON_DEVICE, values are in a ring buffer.
    """
    n, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    GROUPS: tl.constexpr = WIDE_V // GROUP_V
    g, d, i = tl.arange(0, ROWS), tl.arange(0, WIDE), tl.arange(0, TOKENS)
    q = tl.load(query + (n * rows + g[:, None]) * D + d[None], mask=(g[:, None] < rows) & (d[None] < D), other=0.0)
    if ON_DEVICE:
        packed = tl.load(packed + n).to(tl.int32)
        rounded = tl.load(rounded + n).to(tl.int32)
        ends = tl.load(ends + n).to(tl.int32)
    key_codes += n * code_n
    key_scales += n * scale_n
    key_zeros += n * scale_n
    top, total = tl.full((ROWS,), LOWEST, tl.float32), tl.zeros((ROWS,), tl.float32)
    acc, bias = tl.zeros((GROUPS * ROWS, WIDE_V), tl.float32), tl.zeros((GROUPS, ROWS), tl.float32)
    is_last = part == parts - 1
    high = tl.where(is_last, 0, tl.minimum(part * chunk + chunk, rounded))
    for start in range(part * chunk, high, TOKENS):  # packed keys and values
        start = tl.multiple_of(start, TOKENS)
        x = key_products(q, key_codes, key_scales, key_zeros, start, code_b, code_d,
                         D, ROWS, WIDE, TOKENS, BLOCK, BITS, GROUP, OFFSET, HALF)  # fmt: skip
        top, total, acc, bias = attend_packed(
            logits_of(x, scaling, softcap, CAPPED), start + within_words(i, BITS), rounded, value_codes + n * vcode_n,
            value_scales + n * vscale_n, value_zeros + n * vscale_n, vcode_t, top, total, acc, bias,
            DV, ROWS, WIDE_V, TOKENS, BITS, GROUP_V, OFFSET, q.dtype, HALF)  # fmt: skip
    if not is_last:
        c = within_words(tl.arange(0, WIDE_V), BITS)
        is_own = (c // GROUP_V)[None] == tl.arange(0, GROUPS)[:, None]  # [GROUPS, WIDE_V]
        out = tl.where(is_own[:, None], tl.reshape(acc, (GROUPS, ROWS, WIDE_V)) + bias[:, :, None], 0.0)
        store_split(sums, maxima, totals, top, total, tl.sum(out, 0), n, part, parts, rows, c, DV, ROWS)
    else:
        attend_recent(
            q, key_codes, key_scales, key_zeros, keys + n * key_n, values + n * value_n, packed, rounded, ends,
            sums, maxima, totals, scaling, softcap, rows, ring, code_b, code_d,
            D, DV, ROWS, WIDE, WIDE_V, TOKENS, BLOCK, BITS, GROUP, OFFSET, HALF, CAPPED, ON_DEVICE)  # fmt: skip


@dataclass(frozen=True)
class PackedSegments:
    """KIVI's tensors of all segments of a layer.

    Attributes:
        blocks: Packed keys [N, blocks, D, block] in groups of tokens.
        old: Packed values [N, tokens, D_v] in groups of channels.
        keys, values: Recent tokens [N, slots, D] and [N, slots, D_v].
        packed, rounded, length: Number of tokens with packed keys, with packed values, and of all tokens: integers if
            the values are in token order, or [N] int64 if they are in a ring buffer.
        shape: Rows B and heads H.
        bits: Bits per code.
    """

    blocks: Quantized
    old: Quantized
    keys: torch.Tensor
    values: torch.Tensor
    packed: torch.Tensor | int
    rounded: torch.Tensor | int
    length: torch.Tensor | int
    shape: tuple[int, int]
    bits: int


def default_tiling(block: int, group: int) -> Tiling:
    """Return the tiling for blocks of ``block`` tokens in groups of ``group``; a tile has whole groups of one block."""
    return Tiling(min(block, max(group, MAX_TILE)), 4, 2, 2)


def offset_of(bits: int, dtype: torch.dtype) -> int:
    """Return the offset of codes in floating point; 0: they are converted."""
    return 0 if bits == 8 and dtype == torch.bfloat16 else OFFSETS.get(dtype, 0)


def kivi_attention(query: torch.Tensor, stored: PackedSegments, rule: LogitRule) -> torch.Tensor:
    """Attention of one token per row: query [B, H_q, 1, D] -> [B, H_q, 1, D_v]."""
    batch, heads = stored.shape
    value_dim, query = stored.values.shape[2], query.contiguous()
    out = torch.empty(batch, query.shape[1], 1, value_dim, dtype=query.dtype, device=query.device)
    block = stored.blocks.codes.shape[3] * 8 // stored.bits

    def run(tiling: Tiling) -> None:
        join(_split(query, stored, rule, tiling), rule.sinks, out, heads)

    default = default_tiling(block, block // stored.blocks.scale.shape[3])
    sizes = {max(default.tokens // 2, block // stored.blocks.scale.shape[3]), default.tokens}
    candidates = [default, *(Tiling(t, w, s, p) for t in sizes for w in (4, 8) for s in (1, 2, 3) for p in (1, 2, 4))]
    size = triton.next_power_of_2(max(1, stored.old.codes.shape[1]))
    key = ("kivi", stored.bits, query.dtype, query.shape, stored.shape, value_dim, size, rule.softcap is None)
    with on_device(query):
        run(tuned(key, default, candidates, run))
    return out


def _split(query: torch.Tensor, stored: PackedSegments, rule: LogitRule, tiling: Tiling) -> Splits:
    """Attend over the splits of all segments."""
    bits, segments = stored.bits, stored.shape[0] * stored.shape[1]
    rows, dim, value_dim = query.shape[1] // stored.shape[1], query.shape[3], stored.values.shape[2]
    blocks, old = stored.blocks, stored.old
    block, tokens = blocks.codes.shape[3] * 8 // bits, old.codes.shape[1]
    group, channels = block // blocks.scale.shape[3], value_dim // old.scale.shape[2]
    chunk = tiling.chunk(segments, tokens, tokens, query.device)
    splits = Splits.empty(segments, triton.cdiv(tokens, chunk) + 1, rows, value_dim, query.device)
    key_words, value_words = blocks.codes.view(torch.int32), old.codes.view(torch.int32)
    on_host = isinstance(stored.length, int)
    split_kivi[(segments, splits.maxima.shape[1])](
        query, key_words, blocks.scale, blocks.zero, value_words, old.scale, old.zero, stored.keys, stored.values,
        stored.packed, stored.rounded, stored.length, splits.sums, splits.maxima, splits.totals,
        rule.scaling, rule.softcap or 1.0, chunk, rows, stored.values.shape[1],
        *key_words.stride()[:3], blocks.scale.stride(0), *value_words.stride()[:2], old.scale.stride(0),
        stored.keys.stride(0), stored.values.stride(0),
        D=dim, DV=value_dim, ROWS=triton.next_power_of_2(rows), WIDE=padded(dim), WIDE_V=padded(value_dim),
        TOKENS=tiling.tokens, BLOCK=block, BITS=bits, GROUP=group, GROUP_V=channels,
        OFFSET=offset_of(bits, query.dtype), HALF=half_operands(query.dtype), CAPPED=rule.softcap is not None,
        ON_DEVICE=not on_host, num_warps=tiling.warps, num_stages=tiling.stages,
    )  # fmt: skip
    return splits
