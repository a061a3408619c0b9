"""Attention of one token per row of a MiniCache layer whose shared directions are packed codes.

As :mod:`.merged`, with the directions of keys in groups of tokens and those of values in groups of channels, as in
:mod:`.kivi`: a tile of codes is dequantized in registers. Retained tokens and new tokens are unquantized.

Legend: N segments (heads of all rows), B rows, H heads, rows: query heads per KV head, S tokens (merged or retained), D
channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...cache.logits import LogitRule
from ..packed import Quantized
from .kivi import dequantized, within_words
from .launch import Tiling, block_tilings, half_operands, on_device, padded, tuned
from .merged import MergedVectors, attend_new, operands
from .online import LOWEST, logits_of, product, softmax_step, store_split
from .splits import Splits, join

LARGEST = tl.constexpr(65504.0)
"""Largest number of float16, to which products of weights and magnitudes are clamped."""


@triton.jit
def key_logits(q, scaled, scaling, codes, scales, zeros, scale_d, magnitudes, unmerged, entries, start, t,
               D: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr,
               HALF_NEW: tl.constexpr):  # fmt: skip
    """Return the scaled logits of queries [ROWS, WIDE] and the keys of one tile, [ROWS, TOKENS] float32.

    Args:
        q, scaled: Queries, and queries times ``scaling`` in the dtype of dequantized directions.
        codes: Pointers [WIDE, 1] to the first word of each channel.
        scales, zeros: Pointers; consecutive channels are ``scale_d`` elements apart.
        magnitudes, unmerged, entries: See :class:`.merged.MergedVectors`.
        start, t: First token of the tile, and its tokens in the order of :func:`.kivi.within_words`.
    """
    ROWS: tl.constexpr = q.shape[0]
    TOKENS: tl.constexpr = t.shape[0]
    d = tl.arange(0, q.shape[1])[:, None]
    word, group = tl.arange(0, TOKENS * BITS // 32)[None], tl.arange(0, TOKENS // GROUP)[None]
    words = tl.load(codes + (start // (32 // BITS) + word), mask=d < D, other=0)
    place = d * scale_d + (start // GROUP + group)  # [WIDE, groups]
    scale, zero = tl.load(scales + place, mask=d < D, other=0.0), tl.load(zeros + place, mask=d < D, other=0.0)
    direction = dequantized(words, scale, zero, BITS, GROUP, HALF)  # [WIDE, TOKENS]
    magnitude = tl.load(magnitudes + t).to(tl.float32)
    merged = product(scaled, direction, tl.zeros((ROWS, TOKENS), tl.float32), HALF) * magnitude[None]
    entry = tl.load(entries + t)[None]
    k = tl.load(unmerged + entry.to(tl.int64) * D + d, mask=(entry >= 0) & (d < D), other=0.0)
    retained = product(q, k, tl.zeros((ROWS, TOKENS), tl.float32), HALF_NEW) * scaling
    return tl.where(entry >= 0, retained, merged)


@triton.jit
def add_values(weights, acc, codes, scales, zeros, magnitudes, unmerged, entries, t, c, DV: tl.constexpr,
               BITS: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr, HALF_NEW: tl.constexpr):  # fmt: skip
    """Add the values of tokens ``t``, with weights [ROWS, TOKENS], to ``acc`` [ROWS, WIDE_V] of channels ``c``."""
    word, group = tl.arange(0, c.shape[0] * BITS // 32)[None], tl.arange(0, c.shape[0] // GROUP)[None]
    words = tl.load(codes + t[:, None] * (DV * BITS // 32) + word, mask=word < DV * BITS // 32, other=0)
    place = t[:, None] * (DV // GROUP) + group  # [TOKENS, groups]
    scale = tl.load(scales + place, mask=group < DV // GROUP, other=0.0)
    zero = tl.load(zeros + place, mask=group < DV // GROUP, other=0.0)
    direction = dequantized(words, scale, zero, BITS, GROUP, HALF)  # [TOKENS, WIDE_V]
    magnitude, entry = tl.load(magnitudes + t).to(tl.float32), tl.load(entries + t)
    merged = tl.where(entry[None] >= 0, 0.0, tl.minimum(weights * magnitude[None], LARGEST))
    acc = product(merged.to(direction.dtype), direction, acc, HALF)
    place = unmerged + entry.to(tl.int64)[:, None] * DV + c[None]
    v = tl.load(place, mask=(entry[:, None] >= 0) & (c[None] < DV), other=0.0)
    return product(tl.where(entry[None] >= 0, weights, 0.0).to(v.dtype), v, acc, HALF_NEW)


@triton.jit
def split_merged_codes(
    query, key_codes, value_codes, key_scales, key_zeros, value_scales, value_zeros,
    key_magnitudes, value_magnitudes, key_unmerged, value_unmerged, key_entries, value_entries, new_keys, new_values,
    valid, sums, maxima, totals,
    scaling, softcap, length, new_count, chunk, rows, heads,
    code_n, code_d, scale_n, scale_d, vcode_n, vscale_n,
    key_magnitude_n, value_magnitude_n, key_unmerged_n, value_unmerged_n, key_entry_n, value_entry_n,
    new_key_n, new_value_n, valid_b,
    D: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, WIDE_V: tl.constexpr,
    TOKENS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, GROUP_V: tl.constexpr, ALIGN: tl.constexpr,
    HALF: tl.constexpr, HALF_NEW: tl.constexpr, HAS_VALID: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Attend over one split of the tokens; the last program attends over the new tokens, which are not merged yet.

    ``length`` is a multiple of TOKENS. Tokens of a tile, and channels of a value, are in the order of
    :func:`.kivi.within_words`. Consecutive channels of keys are ``code_d * ALIGN`` words apart, from which the compiler
    knows how the loads are aligned.
    """
    n, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    g, d = tl.arange(0, ROWS), tl.arange(0, WIDE)
    q = tl.load(query + (n * rows + g[:, None]) * D + d[None], mask=(g[:, None] < rows) & (d[None] < D), other=0.0)
    top, total = tl.full((ROWS,), LOWEST, tl.float32), tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, WIDE_V), tl.float32)
    if HAS_VALID:
        valid += (n // heads) * valid_b
    if part == parts - 1:
        c = tl.arange(0, WIDE_V)
        top, total, acc = attend_new(
            q, new_keys + n * new_key_n, new_values + n * new_value_n, valid, length, new_count, scaling, softcap,
            top, total, acc, D, DV, TOKENS, HALF_NEW, HAS_VALID, CAPPED)  # fmt: skip
        store_split(sums, maxima, totals, top, total, acc, n, part, parts, rows, c, DV, ROWS)
    else:
        scaled = q.to(tl.float32) * scaling  # in float32, so that rounding to float16 does not overflow
        if HALF:
            scaled = scaled.to(tl.float16)
        c, i = within_words(tl.arange(0, WIDE_V), BITS), within_words(tl.arange(0, TOKENS), BITS)
        codes = key_codes + n * code_n + d[:, None] * (code_d * ALIGN)
        for start in range(part * chunk, tl.minimum(part * chunk + chunk, length), TOKENS):
            start = tl.multiple_of(start, TOKENS)
            t = start + i
            x = key_logits(
                q, scaled, scaling, codes, key_scales + n * scale_n, key_zeros + n * scale_n, scale_d,
                key_magnitudes + n * key_magnitude_n, key_unmerged + n * key_unmerged_n, key_entries + n * key_entry_n,
                start, t, D, BITS, GROUP, HALF, HALF_NEW)  # fmt: skip
            visible = t < length
            if HAS_VALID:
                visible = tl.load(valid + t) != 0
            weights, rescale, top, total = softmax_step(logits_of(x, 1.0, softcap, CAPPED), visible[None], top, total)
            acc = add_values(
                weights, acc * rescale[:, None], value_codes + n * vcode_n, value_scales + n * vscale_n,
                value_zeros + n * vscale_n, value_magnitudes + n * value_magnitude_n,
                value_unmerged + n * value_unmerged_n, value_entries + n * value_entry_n,
                t, c, DV, BITS, GROUP_V, HALF, HALF_NEW)  # fmt: skip
        store_split(sums, maxima, totals, top, total, acc, n, part, parts, rows, c, DV, ROWS)


def word_alignment(stride: int) -> int:
    """Return 4 if rows of codes that are ``stride`` words apart can be loaded 16 bytes at a time, else 1."""
    return 4 if stride % 4 == 0 else 1


def default_tiling(block: int, group: int) -> Tiling:
    """Return the tiling; a tile is a multiple of ``group`` tokens and divides a block of ``block`` tokens.

    Codes and retained tokens need many registers: 16 warps of 128 registers a thread use all of a multiprocessor.
    """
    return Tiling(min(block, max(group, 64)), 16, 3, 1)


def merged_codes_attention(
    query: torch.Tensor,
    keys: MergedVectors[Quantized],
    values: MergedVectors[Quantized],
    new: tuple[torch.Tensor, torch.Tensor] | None,
    valid: torch.Tensor | None,
    rule: LogitRule,
    bits: int,
    block: int,
) -> torch.Tensor:
    """Attention of one new token per row over one layer of a pair.

    Args:
        query: [B, H_q, 1, D].
        keys: Merged keys; codes of the directions [B, H, D, S * bits / 8], S a multiple of ``block``.
        values: Merged values; codes of the directions [B, H, S, D_v * bits / 8].
        new: Keys [B, H, n, D] and values [B, H, n, D_v] that are not merged yet, or None.
        valid: [B, 1, S + n] bool, False for slots without a token; None: all slots have one.
        rule: How logits are computed.
        bits: Bits per code.
        block: Tokens that are merged together, a multiple of the tokens per group.

    Returns:
        [B, H_q, 1, D_v].
    """
    batch, heads, dim, width = keys.directions.codes.shape
    length, value_dim, device = width * 8 // bits, values.unmerged.shape[3], query.device
    query, segments, rows = query.contiguous(), batch * heads, query.shape[1] // heads
    out = torch.empty(batch, query.shape[1], 1, value_dim, dtype=query.dtype, device=device)
    mask = None if valid is None else valid.contiguous().view(torch.uint8)
    codes = [x.directions.codes.flatten(0, 1).view(torch.int32) for x in (keys, values)]
    scales = [y.flatten(0, 1) for x in (keys, values) for y in (x.directions.scale, x.directions.zero)]
    tensors = operands(keys, values, new, length)
    contiguous = (codes[1], scales[2], scales[3])
    assert all(x[0].is_contiguous() for x in contiguous), "a segment must be contiguous"
    group, align = length // keys.directions.scale.shape[3], word_alignment(codes[0].stride(1))

    def run(tiling: Tiling) -> None:
        chunk = tiling.chunk(segments, length, length, device)
        splits = Splits.empty(segments, triton.cdiv(length, chunk) + 1, rows, value_dim, device)
        split_merged_codes[(segments, splits.maxima.shape[1])](
            query, *codes, *scales, *tensors, mask, splits.sums, splits.maxima, splits.totals,
            rule.scaling, rule.softcap or 1.0, length, tensors[-1].shape[1], chunk, rows, heads,
            codes[0].stride(0), codes[0].stride(1) // align, *scales[0].stride()[:2],
            codes[1].stride(0), scales[2].stride(0),
            *(x.stride(0) for x in tensors), 0 if mask is None else mask.stride(0),
            D=dim, DV=value_dim, ROWS=padded(rows), WIDE=padded(dim), WIDE_V=padded(value_dim), TOKENS=tiling.tokens,
            BITS=bits, GROUP=group, GROUP_V=value_dim // values.directions.scale.shape[3],
            ALIGN=align, HALF=query.dtype != torch.float32, HALF_NEW=half_operands(query.dtype),
            HAS_VALID=mask is not None, CAPPED=rule.softcap is not None,
            num_warps=tiling.warps, num_stages=tiling.stages,
        )  # fmt: skip
        join(splits, rule.sinks, out, heads)

    default = default_tiling(block, group)
    size = triton.next_power_of_2(length)
    key = ("merged codes", bits, query.dtype, dim, value_dim, segments, rows, size, mask is None, rule.softcap is None)
    with on_device(query):
        run(tuned(key, default, block_tilings(default, group), run))
    return out
