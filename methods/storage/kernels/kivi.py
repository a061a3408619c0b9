"""Attention of one token per row over KIVI's packed keys and values and its unquantized recent tokens, in one launch.

A tile of codes is dequantized in registers and multiplied as a 16-bit matrix. Codes become floating-point numbers
without a conversion: OR-ed into the mantissa of 1024 in float16, two at a time in a 32-bit word, they are
``1024 + code``. Operands are float16 for bfloat16 models as well: scales and zeros are stored in it, it holds codes of
8 bits, and it rounds eight times less. The order of the tokens (or channels) of a word is :func:`within_words`.

Legend: N segments (heads of all rows), rows: query heads per stored head, D and D_v channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ...cache.logits import LogitRule
from ..packed import Quantized
from .launch import Tiling, block_tilings, half_operands, on_device, padded, tuned
from .online import LOWEST, attend_tile, logits_of, product, store_split
from .splits import Splits, join


@triton.jit
def unpacked(words, BITS: tl.constexpr, HALF: tl.constexpr):
    """Unpack words [R, W] int32 to codes [R, W * 32 / BITS] in the order of :func:`within_words`."""
    ONE: tl.constexpr = (1 << BITS) - 1
    BOTH: tl.constexpr = ONE | (ONE << 16)
    ADD: tl.constexpr = 0x64006400 if HALF else 0  # 1024 in float16, in both halves of a word
    x = tl.join(words & BOTH | ADD, (words >> 8) & BOTH | ADD)
    if BITS <= 4:
        x = tl.join(x, tl.join((words >> 4) & BOTH | ADD, (words >> 12) & BOTH | ADD))
    if BITS == 2:
        y = tl.join((words >> 2) & BOTH | ADD, (words >> 10) & BOTH | ADD)
        y = tl.join(y, tl.join((words >> 6) & BOTH | ADD, (words >> 14) & BOTH | ADD))
        x = tl.join(x, y)
    x = tl.join(x.to(tl.int16), (x >> 16).to(tl.int16))
    x = tl.reshape(x, (words.shape[0], words.shape[1] * (32 // BITS)))
    return x.to(tl.float16, bitcast=True) - 1024 if HALF else x.to(tl.float32)


@triton.jit
def dequantized(words, scales, zeros, BITS: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr):
    """Dequantize words [R, W] with scales and zeros [R, groups]: [R, W * 32 / BITS] float16 or float32."""
    N: tl.constexpr = words.shape[1] * 32 // BITS
    x = tl.reshape(unpacked(words, BITS, HALF), (words.shape[0], N // GROUP, GROUP))
    if not HALF:
        scales, zeros = scales.to(tl.float32), zeros.to(tl.float32)
    return tl.reshape(x * scales[:, :, None] + zeros[:, :, None], (words.shape[0], N))


@triton.jit
def within_words(i, BITS: tl.constexpr):
    """Return the index of the code at place ``i`` of :func:`unpacked`: the two halves of a word alternate."""
    CODES: tl.constexpr = 32 // BITS
    return i // CODES * CODES + (i % CODES) // 2 + (i % 2) * (CODES // 2)


@triton.jit
def key_products(q, codes, scales, zeros, start, D: tl.constexpr,
                 ROWS: tl.constexpr, WIDE: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
                 BITS: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr):  # fmt: skip
    """Multiply queries [ROWS, WIDE] with one tile of packed keys: [ROWS, TOKENS] float32, tokens in word order."""
    GROUPS: tl.constexpr = TOKENS // GROUP
    WORDS: tl.constexpr = TOKENS * BITS // 32
    d, w, j = tl.arange(0, WIDE)[:, None], tl.arange(0, WORDS), tl.arange(0, GROUPS)
    b, first = start // BLOCK, start % BLOCK
    word, group = tl.multiple_of(first // (32 // BITS), WORDS), tl.multiple_of(first // GROUP, GROUPS)
    words = tl.load(codes + (b * D + d) * (BLOCK * BITS // 32) + (word + w)[None], mask=d < D, other=0)  # [WIDE, WORDS]
    place = (b * D + d) * (BLOCK // GROUP) + (group + j)[None]  # [WIDE, GROUPS]
    scale, zero = tl.load(scales + place, mask=d < D, other=0.0), tl.load(zeros + place, mask=d < D, other=0.0)
    k = dequantized(words, scale, zero, BITS, GROUP, HALF)  # [WIDE, TOKENS]
    return product(q, k, tl.zeros((ROWS, TOKENS), tl.float32), HALF)


@triton.jit
def attend_packed(logits, t, end, codes, scales, zeros, top, total, acc, DV: tl.constexpr,
                  WIDE_V: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr):  # fmt: skip
    """Add packed values of tokens ``t`` before ``end`` to an online softmax with sums ``acc`` [ROWS, WIDE_V]."""
    j, w = tl.arange(0, WIDE_V // GROUP)[None], tl.arange(0, WIDE_V * BITS // 32)[None]
    is_held = t < end
    is_code, has_scale = is_held[:, None] & (w < DV * BITS // 32), is_held[:, None] & (j < DV // GROUP)
    words = tl.load(codes + t[:, None] * (DV * BITS // 32) + w, mask=is_code, other=0)  # [TOKENS, words]
    place = t[:, None] * (DV // GROUP) + j  # [TOKENS, groups]
    scale, zero = tl.load(scales + place, mask=has_scale, other=0.0), tl.load(zeros + place, mask=has_scale, other=0.0)
    return attend_tile(logits, is_held[None], dequantized(words, scale, zero, BITS, GROUP, HALF), top, total, acc, HALF)


@triton.jit
def attend_recent(
    q, scaled, key_codes, key_scales, key_zeros, keys, values, packed, rounded, ends, sums, maxima, totals,
    scaling, softcap, rows, ring,
    D: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, WIDE_V: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    HALF: tl.constexpr, HALF_RECENT: tl.constexpr, CAPPED: tl.constexpr, ON_DEVICE: tl.constexpr,
):  # fmt: skip
    """Attend over the tokens from ``rounded``, whose values are not packed, as the last split of a segment."""
    d, c, i = tl.arange(0, WIDE), tl.arange(0, WIDE_V), tl.arange(0, TOKENS)
    top, total = tl.full((ROWS,), LOWEST, tl.float32), tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, WIDE_V), tl.float32)
    for start in range(rounded // TOKENS * TOKENS, packed, TOKENS):  # packed keys
        start = tl.multiple_of(start, TOKENS)
        t = start + within_words(i, BITS)
        is_held = (t >= rounded) & (t < packed)
        x = key_products(scaled, key_codes, key_scales, key_zeros, start,
                         D, ROWS, WIDE, TOKENS, BLOCK, BITS, GROUP, HALF)  # fmt: skip
        slot = t % ring if ON_DEVICE else t - rounded
        v = tl.load(values + slot[:, None] * DV + c[None], mask=is_held[:, None] & (c[None] < DV), other=0.0)
        x = logits_of(x, 1.0, softcap, CAPPED)
        top, total, acc = attend_tile(x, is_held[None], v, top, total, acc, HALF_RECENT)
    for start in range(packed, ends, TOKENS):
        t = start + i
        is_held = t < ends
        k = tl.load(keys + (t - packed)[None] * D + d[:, None], mask=is_held[None] & (d[:, None] < D), other=0.0)
        x = product(q, k, tl.zeros((ROWS, TOKENS), tl.float32), HALF_RECENT)
        slot = t % ring if ON_DEVICE else t - rounded
        v = tl.load(values + slot[:, None] * DV + c[None], mask=is_held[:, None] & (c[None] < DV), other=0.0)
        x = logits_of(x, scaling, softcap, CAPPED)
        top, total, acc = attend_tile(x, is_held[None], v, top, total, acc, HALF_RECENT)
    n, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    store_split(sums, maxima, totals, top, total, acc, n, part, parts, rows, c, DV, ROWS)


@triton.jit
def split_kivi(
    query, key_codes, key_scales, key_zeros, value_codes, value_scales, value_zeros, keys, values,
    packed, rounded, ends, sums, maxima, totals,
    scaling, softcap, chunk, rows, ring,
    code_n, scale_n, vcode_n, vscale_n, key_n, value_n,
    D: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, WIDE_V: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, GROUP_V: tl.constexpr,
    HALF: tl.constexpr, HALF_RECENT: tl.constexpr, CAPPED: tl.constexpr, ON_DEVICE: tl.constexpr,
):  # fmt: skip
    """Attend over one split of the tokens with packed keys and values; the last program over all other tokens.

    Keys of tokens before ``packed`` and values of tokens before ``rounded`` (not after ``packed``) are codes. If the
    counts are ON_DEVICE, values are in a ring buffer.
    """
    n, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    g, d, i = tl.arange(0, ROWS), tl.arange(0, WIDE), tl.arange(0, TOKENS)
    q = tl.load(query + (n * rows + g[:, None]) * D + d[None], mask=(g[:, None] < rows) & (d[None] < D), other=0.0)
    scaled = q.to(tl.float32) * scaling  # before it is rounded to float16, whose largest number is 65504
    if HALF:
        scaled = scaled.to(tl.float16)
    if ON_DEVICE:
        packed = tl.load(packed + n).to(tl.int32)
        rounded = tl.load(rounded + n).to(tl.int32)
        ends = tl.load(ends + n).to(tl.int32)
    key_codes += n * code_n
    key_scales += n * scale_n
    key_zeros += n * scale_n
    top, total = tl.full((ROWS,), LOWEST, tl.float32), tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, WIDE_V), tl.float32)
    is_last = part == parts - 1
    high = tl.where(is_last, 0, tl.minimum(part * chunk + chunk, rounded))
    for start in range(part * chunk, high, TOKENS):  # packed keys and values
        start = tl.multiple_of(start, TOKENS)
        x = key_products(scaled, key_codes, key_scales, key_zeros, start,
                         D, ROWS, WIDE, TOKENS, BLOCK, BITS, GROUP, HALF)  # fmt: skip
        top, total, acc = attend_packed(
            logits_of(x, 1.0, softcap, CAPPED), start + within_words(i, BITS), rounded, value_codes + n * vcode_n,
            value_scales + n * vscale_n, value_zeros + n * vscale_n, top, total, acc,
            DV, WIDE_V, BITS, GROUP_V, HALF)  # fmt: skip
    if not is_last:
        c = within_words(tl.arange(0, WIDE_V), BITS)
        store_split(sums, maxima, totals, top, total, acc, n, part, parts, rows, c, DV, ROWS)
    else:
        attend_recent(
            q, scaled, key_codes, key_scales, key_zeros, keys + n * key_n, values + n * value_n, packed, rounded, ends,
            sums, maxima, totals, scaling, softcap, rows, ring,
            D, DV, ROWS, WIDE, WIDE_V, TOKENS, BLOCK, BITS, GROUP, HALF, HALF_RECENT, CAPPED, ON_DEVICE)  # fmt: skip


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


def default_tiling(block: int, group: int, bits: int) -> Tiling:
    """Return the tiling for blocks of ``block`` tokens in groups of ``group``; a tile has whole groups of one block.

    Rows of 32 bytes or more of packed keys are loaded 16 bytes at a time; eight warps keep a tile in 113 registers.
    """
    tokens = 128 if bits == 2 else 64
    return Tiling(min(block, max(group, tokens)), 8, 2 if bits == 2 else 3, 2)


def kivi_attention(query: torch.Tensor, stored: PackedSegments, rule: LogitRule) -> torch.Tensor:
    """Attention of one token per row: query [B, H_q, 1, D] -> [B, H_q, 1, D_v]."""
    batch, heads = stored.shape
    value_dim, query = stored.values.shape[2], query.contiguous()
    out = torch.empty(batch, query.shape[1], 1, value_dim, dtype=query.dtype, device=query.device)
    block = stored.blocks.codes.shape[3] * 8 // stored.bits

    def run(tiling: Tiling) -> None:
        join(_split(query, stored, rule, tiling), rule.sinks, out, heads)

    group = block // stored.blocks.scale.shape[3]
    default = default_tiling(block, group, stored.bits)
    size = triton.next_power_of_2(max(1, stored.old.codes.shape[1]))
    key = ("kivi", stored.bits, query.dtype, query.shape, stored.shape, value_dim, size, rule.softcap is None)
    with on_device(query):
        run(tuned(key, default, block_tilings(default, group), run))
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
    assert key_words[0].is_contiguous() and value_words[0].is_contiguous(), "a segment must be contiguous"
    on_host = isinstance(stored.length, int)
    split_kivi[(segments, splits.maxima.shape[1])](
        query, key_words, blocks.scale, blocks.zero, value_words, old.scale, old.zero, stored.keys, stored.values,
        stored.packed, stored.rounded, stored.length, splits.sums, splits.maxima, splits.totals,
        rule.scaling, rule.softcap or 1.0, chunk, rows, stored.values.shape[1],
        key_words.stride(0), blocks.scale.stride(0), value_words.stride(0), old.scale.stride(0),
        stored.keys.stride(0), stored.values.stride(0),
        D=dim, DV=value_dim, ROWS=triton.next_power_of_2(rows), WIDE=padded(dim), WIDE_V=padded(value_dim),
        TOKENS=tiling.tokens, BLOCK=block, BITS=bits, GROUP=group, GROUP_V=channels,
        HALF=query.dtype != torch.float32, HALF_RECENT=half_operands(query.dtype), CAPPED=rule.softcap is not None,
        ON_DEVICE=not on_host, num_warps=tiling.warps, num_stages=tiling.stages,
    )  # fmt: skip
    return splits
