"""Attention of one token per row of a MiniCache layer whose shared directions are packed codes, in one launch.

As :mod:`.merged`, with the directions of keys in groups of tokens and those of values in groups of channels, as in
:mod:`.kivi`: a tile of codes is dequantized in registers. Retained tokens and new tokens are unquantized.

Legend: N segments (heads of all rows), B rows, H heads, rows: query heads per KV head, S merged tokens, D channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...cache.logits import LogitRule
from ..packed import Quantized
from .kivi import dequantized, within_words
from .launch import Tiling, half_operands, on_device, padded, tuned
from .merged import MergedVectors, attend_new, flat
from .online import LOWEST, logits_of, product, softmax_step, store_split
from .splits import Splits, join


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
    """Attend over one split of the merged tokens; the last program over the new tokens, which are not merged yet.

    The number of merged tokens is a multiple of TOKENS. Tokens of a tile, and channels of a value, are in word order.
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
        scaled = q.to(tl.float32) * scaling  # before it is rounded to float16, whose largest number is 65504
        if HALF:
            scaled = scaled.to(tl.float16)
        c, i = within_words(tl.arange(0, WIDE_V), BITS), within_words(tl.arange(0, TOKENS), BITS)
        w, j = tl.arange(0, TOKENS * BITS // 32), tl.arange(0, TOKENS // GROUP)
        vw, vj = tl.arange(0, WIDE_V * BITS // 32)[None], tl.arange(0, WIDE_V // GROUP_V)[None]
        codes = key_codes + n * code_n + d[:, None] * tl.multiple_of(code_d, ALIGN)
        group = n * scale_n + d[:, None] * scale_d
        for start in range(part * chunk, tl.minimum(part * chunk + chunk, length), TOKENS):
            start = tl.multiple_of(start, TOKENS)
            t = start + i
            entry = tl.load(key_entries + n * key_entry_n + t)
            is_retained = entry >= 0
            magnitude = tl.load(key_magnitudes + n * key_magnitude_n + t).to(tl.float32)
            words = tl.load(codes + (start // (32 // BITS) + w)[None], mask=d[:, None] < D, other=0)
            place = group + (start // GROUP + j)[None]  # [WIDE, groups]
            scale = tl.load(key_scales + place, mask=d[:, None] < D, other=0.0)
            zero = tl.load(key_zeros + place, mask=d[:, None] < D, other=0.0)
            k = dequantized(words, scale, zero, BITS, GROUP, HALF)  # [WIDE, TOKENS]
            x = product(scaled, k, tl.zeros((ROWS, TOKENS), tl.float32), HALF) * magnitude[None]
            place = key_unmerged + n * key_unmerged_n + entry.to(tl.int64)[None] * D + d[:, None]
            k = tl.load(place, mask=is_retained[None] & (d[:, None] < D), other=0.0)
            retained = product(q, k, tl.zeros((ROWS, TOKENS), tl.float32), HALF_NEW) * scaling
            x = tl.where(is_retained[None], retained, x)
            visible = t < length
            if HAS_VALID:
                visible = tl.load(valid + t) != 0
            weights, rescale, top, total = softmax_step(logits_of(x, 1.0, softcap, CAPPED), visible[None], top, total)

            entry = tl.load(value_entries + n * value_entry_n + t)
            is_retained = entry >= 0
            magnitude = tl.load(value_magnitudes + n * value_magnitude_n + t).to(tl.float32)
            place = value_codes + n * vcode_n + t[:, None] * (DV * BITS // 32) + vw  # [TOKENS, words]
            words = tl.load(place, mask=vw < DV * BITS // 32, other=0)
            place = n * vscale_n + t[:, None] * (DV // GROUP_V) + vj  # [TOKENS, groups]
            scale = tl.load(value_scales + place, mask=vj < DV // GROUP_V, other=0.0)
            zero = tl.load(value_zeros + place, mask=vj < DV // GROUP_V, other=0.0)
            v = dequantized(words, scale, zero, BITS, GROUP_V, HALF)  # [TOKENS, WIDE_V]
            merged = tl.where(is_retained[None], 0.0, weights * magnitude[None])
            acc = product(merged.to(v.dtype), v, acc * rescale[:, None], HALF)
            place = value_unmerged + n * value_unmerged_n + entry.to(tl.int64)[:, None] * DV + c[None]
            v = tl.load(place, mask=is_retained[:, None] & (c[None] < DV), other=0.0)
            acc = product(tl.where(is_retained[None], weights, 0.0).to(v.dtype), v, acc, HALF_NEW)
        store_split(sums, maxima, totals, top, total, acc, n, part, parts, rows, c, DV, ROWS)


def default_tiling(block: int, group: int) -> Tiling:
    """Return the tiling for blocks of ``block`` tokens in groups of ``group``; a tile has whole groups of one block.

    Codes, retained tokens and two sums need many registers: 16 warps keep a tile in 128, which fills a multiprocessor.
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
    new_keys, new_values = (x[:, :, :0] for x in (keys.unmerged, values.unmerged)) if new is None else new
    mask = None if valid is None else valid.contiguous().view(torch.uint8)
    codes = [_words(x.directions.codes) for x in (keys, values)]
    scales = [_rows(x) for part in (keys, values) for x in (part.directions.scale, part.directions.zero)]
    tensors = [flat(x) for x in (keys.magnitudes, values.magnitudes, keys.unmerged, values.unmerged)]
    tensors += [keys.entries(length), values.entries(length), flat(new_keys), flat(new_values)]
    assert codes[1][0].is_contiguous() and scales[2][0].is_contiguous(), "free slots are behind those of a segment"
    group, stride = length // keys.directions.scale.shape[3], codes[0].stride(1)

    def run(tiling: Tiling) -> None:
        chunk = tiling.chunk(segments, length, length, device)
        splits = Splits.empty(segments, triton.cdiv(length, chunk) + 1, rows, value_dim, device)
        split_merged_codes[(segments, splits.maxima.shape[1])](
            query, *codes, *scales, *tensors, mask, splits.sums, splits.maxima, splits.totals,
            rule.scaling, rule.softcap or 1.0, length, new_keys.shape[2], chunk, rows, heads,
            *codes[0].stride()[:2], *scales[0].stride()[:2], codes[1].stride(0), scales[2].stride(0),
            *(x.stride(0) for x in tensors), 0 if mask is None else mask.stride(0),
            D=dim, DV=value_dim, ROWS=padded(rows), WIDE=padded(dim), WIDE_V=padded(value_dim), TOKENS=tiling.tokens,
            BITS=bits, GROUP=group, GROUP_V=value_dim // values.directions.scale.shape[3],
            ALIGN=min(16, stride & -stride), HALF=query.dtype != torch.float32, HALF_NEW=half_operands(query.dtype),
            HAS_VALID=mask is not None, CAPPED=rule.softcap is not None,
            num_warps=tiling.warps, num_stages=tiling.stages,
        )  # fmt: skip
        join(splits, rule.sinks, out, heads)

    default = default_tiling(block, group)
    sizes = {max(default.tokens // 2, group), default.tokens}
    candidates = [default, *(Tiling(t, w, s, p) for t in sizes for w in (8, 16) for s in (1, 2, 3) for p in (1, 2, 4))]
    size = triton.next_power_of_2(length)
    key = ("merged codes", bits, query.dtype, dim, value_dim, segments, rows, size, mask is None, rule.softcap is None)
    with on_device(query):
        run(tuned(key, default, candidates, run))
    return out


def _words(codes: torch.Tensor) -> torch.Tensor:
    """Return codes [B, H, ..., bytes] as [N, ..., words] int32; a view if every row begins at a word."""
    begin_at_words = all(stride % 4 == 0 for stride in codes.stride()[:-1]) and codes.storage_offset() % 4 == 0
    return _rows(codes if begin_at_words else codes.contiguous()).view(torch.int32)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Return x [B, H, ...] as [N, ...] with contiguous rows; a view if the layout allows."""
    x = x.flatten(0, 1)
    return x if x.stride(-1) == 1 else x.contiguous()
