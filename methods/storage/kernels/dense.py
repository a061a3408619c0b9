"""Attention of one token per row over uncompressed keys and values: rectangular buffers, ragged heads, or pages.

Legend: N segments (heads of all rows), B batch rows, H stored heads, H_q query heads, rows: query heads per stored
head, D and D_v channels, K pages.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from ...cache.logits import LogitRule
from .launch import Tiling, default_tiling, half_operands, on_device, padded, tilings, tuned
from .online import LOWEST, attend_tile, logits_of, product, slot_weights, store_split
from .splits import Splits, join

WEIGHT_TOKENS = 128
"""Tokens per program that turns logits into weights."""


@triton.jit
def split_dense(
    query, keys, values, valid, starts, ends, pages, sums, maxima, totals, logits_out,
    scaling, softcap, length, window, chunk, rows, heads,
    key_b, key_h, key_t, value_b, value_h, value_t, valid_b, valid_h, end_n,
    D: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, WIDE_V: tl.constexpr,
    TOKENS: tl.constexpr, HALF: tl.constexpr, HAS_VALID: tl.constexpr, HAS_END: tl.constexpr, RAGGED: tl.constexpr,
    CAPPED: tl.constexpr, LOGITS: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Attend over one split of the tokens of one segment, which is ``chunk`` of its last ``window`` tokens.

    With PAGE tokens per page, the tokens are those of the pages of a list [N, length / PAGE], -1 for no page.
    """
    n, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    g, d, c = tl.arange(0, ROWS), tl.arange(0, WIDE), tl.arange(0, WIDE_V)
    q = tl.load(query + (n * rows + g[:, None]) * D + d[None], mask=(g[:, None] < rows) & (d[None] < D), other=0.0)
    b, h = n // heads, n % heads
    if RAGGED:
        first = tl.load(starts + n)
        keys += first * key_t
        values += first * value_t
    else:
        keys += b * key_b + h * key_h
        values += b * value_b + h * value_h
    if HAS_VALID:
        valid += b * valid_b + h * valid_h
    end = length
    if HAS_END:
        end = tl.load(ends + n * end_n).to(tl.int32)
    last = length  # of the listed pages
    if PAGE:
        pages += n * (length // PAGE)
    else:
        last = tl.minimum(end, length)
    low = tl.maximum(last - window, 0) + part * chunk
    high = tl.minimum(low + chunk, last)
    top = tl.full((ROWS,), LOWEST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, WIDE_V), tl.float32)
    for begin in range(low, high, TOKENS):
        t = begin + tl.arange(0, TOKENS)
        inside = t < high
        slot = t.to(tl.int64)
        if PAGE:
            page = tl.load(pages + t // PAGE, mask=inside, other=-1)
            slot = page * PAGE + t % PAGE
            inside = (page >= 0) & (slot < end)
        k = tl.load(keys + slot[None] * key_t + d[:, None], mask=inside[None] & (d[:, None] < D), other=0.0)
        v = tl.load(values + slot[:, None] * value_t + c[None], mask=inside[:, None] & (c[None] < DV), other=0.0)
        visible = inside
        if HAS_VALID:
            visible = tl.load(valid + t, mask=inside, other=0) != 0
        logits = logits_of(product(q, k, tl.zeros((ROWS, TOKENS), tl.float32), HALF), scaling, softcap, CAPPED)
        if LOGITS:
            place = logits_out + (n * rows + g[:, None]) * length + t[None]
            tl.store(place, tl.where(visible[None], logits, LOWEST), mask=(g[:, None] < rows) & inside[None])
        top, total, acc = attend_tile(logits, visible[None], v, top, total, acc, HALF)
    store_split(sums, maxima, totals, top, total, acc, n, part, tl.num_programs(1), rows, c, DV, ROWS)


@dataclass(frozen=True)
class Segmented:
    """Keys and values of N segments in one tensor each.

    Attributes:
        keys, values: Tensors whose last dimension is contiguous.
        shape: Rows B and heads H.
        length: Maximum number of tokens of a segment.
        slots: Mean number of slots per segment.
        key_strides, value_strides: Elements between rows, heads and tokens.
        valid: [B, 1 or H, length] bool, or None: every slot before the end holds a token.
        starts: [N] int64, first slot of each segment, or None: given by the strides.
        ends: [1] or [N] int64, one past the last token of all or of each segment, or None: ``length``.
        pages: [N, K] int64, pages to attend to, -1 for no page, or None: all tokens. Needs ``ends``, and no ``valid``.
        page: Tokens per page.
    """

    keys: torch.Tensor
    values: torch.Tensor
    shape: tuple[int, int]
    length: int
    slots: int
    key_strides: tuple[int, int, int]
    value_strides: tuple[int, int, int]
    valid: torch.Tensor | None = None
    starts: torch.Tensor | None = None
    ends: torch.Tensor | None = None
    pages: torch.Tensor | None = None
    page: int = 0


def rectangular(
    keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor | None = None, ends: torch.Tensor | None = None
) -> Segmented:
    """Return keys [B, H, S, D] and values [B, H, S, D_v] as segments; see :class:`Segmented`."""
    keys, values = (x if x.stride(3) == 1 else x.contiguous() for x in (keys, values))
    batch, heads, length, _ = keys.shape
    key_b, key_h, key_t, _ = keys.stride()
    value_b, value_h, value_t, _ = values.stride()
    strides = (key_b, key_h, key_t), (value_b, value_h, value_t)
    return Segmented(keys, values, (batch, heads), length, length, strides[0], strides[1], valid, None, ends)


def ragged(
    keys: torch.Tensor,
    values: torch.Tensor,
    shape: tuple[int, int],
    longest: int,
    starts: torch.Tensor,
    ends: torch.Tensor,
    valid: torch.Tensor | None = None,
) -> Segmented:
    """Return keys [slots, D] and values [slots, D_v] of segments one after another; see :class:`Segmented`."""
    slots = triton.cdiv(len(keys), len(starts))
    strides = (0, 0, keys.stride(0)), (0, 0, values.stride(0))
    return Segmented(keys, values, shape, longest, slots, strides[0], strides[1], valid, starts, ends)


def paged(stored: Segmented, pages: torch.Tensor, page: int) -> Segmented:
    """Return segments of which only some pages [N, K] of ``page`` tokens are read; see :class:`Segmented`."""
    length = pages.shape[1] * page
    return replace(stored, length=length, slots=length, pages=pages.contiguous(), page=page)


def attention(
    query: torch.Tensor, stored: Segmented, rule: LogitRule, window: int | None = None, weights: str | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of one token per row.

    Args:
        query: [B, H_q, 1, D].
        stored: Keys and values.
        rule: How logits are computed.
        window: Number of last slots to attend to; None: all.
        weights: Attention weights to return: None, ``"heads"`` (of each query head) or ``"mean"`` (over the query heads
            of a KV head).

    Returns:
        (output [B, H_q, 1, D_v]; weights [B, H, rows or 1, S] float32, 0 for slots without a token, or None).
    """
    (batch, heads), length = stored.shape, stored.length
    query_heads, dim, value_dim = query.shape[1], query.shape[3], stored.values.shape[-1]
    segments, rows = batch * heads, query_heads // heads
    window = length if window is None else min(window, length)
    out = torch.empty(batch, query_heads, 1, value_dim, dtype=query.dtype, device=query.device)
    logits = None
    if weights is not None:
        logits = torch.empty(segments, rows, length, dtype=torch.float32, device=query.device)
    query = query.contiguous()

    def run(tiling: Tiling) -> Splits:
        splits = _split(query, stored, rule, window, logits, tiling)
        join(splits, rule.sinks, out, heads)
        return splits

    default = default_tiling(max(padded(dim), padded(value_dim)), query.element_size())
    optional = (x is None for x in (stored.valid, stored.starts, stored.ends, rule.softcap, weights))
    key = ("dense", query.dtype, dim, value_dim, segments, rows, triton.next_power_of_2(window), stored.page, *optional)
    with on_device(query):
        splits = run(tuned(key, default, tilings(default), run))
        if logits is None:
            return out, None
        slots = torch.empty(
            batch, heads, 1 if weights == "mean" else rows, length, dtype=torch.float32, device=out.device
        )
        parts = splits.maxima.shape[1]
        slot_weights[(segments, triton.cdiv(length, WEIGHT_TOKENS))](
            logits, splits.maxima, splits.totals, rule.sinks, stored.ends, slots,
            length, window, parts, rows, heads, _end_stride(stored),
            ROWS=triton.next_power_of_2(rows), PARTS=triton.next_power_of_2(parts), TOKENS=WEIGHT_TOKENS,
            SINKS=rule.sinks is not None, HAS_END=stored.ends is not None, MEAN=weights == "mean",
        )  # fmt: skip
    return out, slots


def _split(
    query: torch.Tensor,
    stored: Segmented,
    rule: LogitRule,
    window: int,
    logits: torch.Tensor | None,
    tiling: Tiling,
) -> Splits:
    """Attend over the splits of all segments; writes logits [N, rows, length] unless None."""
    segments, heads = stored.shape[0] * stored.shape[1], stored.shape[1]
    rows, dim, value_dim = query.shape[1] // heads, query.shape[3], stored.values.shape[-1]
    valid = None if stored.valid is None else stored.valid.view(torch.uint8)
    chunk = tiling.chunk(segments, min(window, stored.slots), window, query.device)
    splits = Splits.empty(segments, triton.cdiv(window, chunk), rows, value_dim, query.device)
    split_dense[(segments, splits.maxima.shape[1])](
        query, stored.keys, stored.values, valid, stored.starts, stored.ends, stored.pages,
        splits.sums, splits.maxima, splits.totals, logits,
        rule.scaling, rule.softcap or 1.0, stored.length, window, chunk, rows, heads,
        *stored.key_strides, *stored.value_strides, *_mask_strides(valid), _end_stride(stored),
        D=dim, DV=value_dim, ROWS=padded(rows), WIDE=padded(dim), WIDE_V=padded(value_dim), TOKENS=tiling.tokens,
        HALF=half_operands(query.dtype), HAS_VALID=valid is not None, HAS_END=stored.ends is not None,
        RAGGED=stored.starts is not None, CAPPED=rule.softcap is not None, LOGITS=logits is not None,
        PAGE=stored.page,
        num_warps=tiling.warps, num_stages=tiling.stages,
    )  # fmt: skip
    return splits


def _mask_strides(valid: torch.Tensor | None) -> tuple[int, int]:
    """Return the elements between rows and between heads of a mask [B, 1 or H, S]."""
    if valid is None:
        return 0, 0
    return valid.stride(0), valid.stride(1) if valid.shape[1] > 1 else 0


def _end_stride(stored: Segmented) -> int:
    """Return the elements between the ends of two segments."""
    return 0 if stored.ends is None or len(stored.ends) == 1 else 1
