"""Attention of one token per row of one layer of a MiniCache pair: shared directions, magnitudes and retained tokens.

A merged token's logit is its magnitude times the product of the query with its direction, and its weight is multiplied
by the magnitude of its value. A retained token is read from the retained tokens instead, with magnitude 1, so every
token is read once. Keys and values are retained independently of each other.

Legend: N segments (heads of all rows), B rows, H heads, rows: query heads per KV head, R retained tokens, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
import triton
import triton.language as tl

from ...cache.logits import LogitRule
from .launch import Tiling, default_tiling, half_operands, on_device, padded, tilings, tuned
from .online import LOWEST, attend_tile, logits_of, product, softmax_step, store_split
from .splits import Splits, join

Layout = TypeVar("Layout")


@triton.jit
def merged_tile(directions, magnitudes, unmerged, entries, t, inside, c, D: tl.constexpr):
    """Return pointers to the vectors of tokens ``t`` [TOKENS, WIDE], and their magnitudes [TOKENS] float32."""
    entry = tl.load(entries + t, mask=inside, other=-1)
    is_retained = entry >= 0
    magnitude = tl.load(magnitudes + t, mask=inside & (entry < 0), other=1.0).to(tl.float32)
    merged = directions + t.to(tl.int64)[:, None] * D + c[None]
    retained = unmerged + entry.to(tl.int64)[:, None] * D + c[None]
    return tl.where(is_retained[:, None], retained, merged), magnitude


@triton.jit
def attend_new(q, keys, values, valid, length, count, scaling, softcap, top, total, acc, D: tl.constexpr,
               DV: tl.constexpr, TOKENS: tl.constexpr, HALF: tl.constexpr, HAS_VALID: tl.constexpr,
               CAPPED: tl.constexpr):  # fmt: skip
    """Add ``count`` new tokens, after ``length`` merged ones, to an online softmax with sums ``acc`` [ROWS, WIDE_V]."""
    ROWS: tl.constexpr = q.shape[0]
    d, c = tl.arange(0, q.shape[1]), tl.arange(0, acc.shape[1])
    for start in range(0, count, TOKENS):
        t = start + tl.arange(0, TOKENS)
        inside = t < count
        k = tl.load(keys + t[None] * D + d[:, None], mask=inside[None] & (d[:, None] < D), other=0.0)
        v = tl.load(values + t[:, None] * DV + c[None], mask=inside[:, None] & (c[None] < DV), other=0.0)
        visible = inside
        if HAS_VALID:
            visible = tl.load(valid + length + t, mask=inside, other=0) != 0
        x = product(q, k, tl.zeros((ROWS, TOKENS), tl.float32), HALF)
        top, total, acc = attend_tile(logits_of(x, scaling, softcap, CAPPED), visible[None], v, top, total, acc, HALF)
    return top, total, acc


@triton.jit
def split_merged(
    query, key_directions, value_directions, key_magnitudes, value_magnitudes, key_unmerged, value_unmerged,
    key_entries, value_entries, new_keys, new_values, valid, sums, maxima, totals,
    scaling, softcap, length, new_count, chunk, rows, heads,
    key_n, value_n, key_magnitude_n, value_magnitude_n, key_unmerged_n, value_unmerged_n, key_entry_n, value_entry_n,
    new_key_n, new_value_n, valid_b,
    D: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, WIDE_V: tl.constexpr,
    TOKENS: tl.constexpr, HALF: tl.constexpr, HAS_VALID: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Attend over one split of the merged tokens; the last program over the new tokens, which are not merged yet."""
    n, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    g, d, c = tl.arange(0, ROWS), tl.arange(0, WIDE), tl.arange(0, WIDE_V)
    q = tl.load(query + (n * rows + g[:, None]) * D + d[None], mask=(g[:, None] < rows) & (d[None] < D), other=0.0)
    top, total = tl.full((ROWS,), LOWEST, tl.float32), tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, WIDE_V), tl.float32)
    if HAS_VALID:
        valid += (n // heads) * valid_b
    is_last = part == parts - 1
    high = tl.where(is_last, 0, tl.minimum(part * chunk + chunk, length))
    for start in range(part * chunk, high, TOKENS):
        t = start + tl.arange(0, TOKENS)
        inside = t < high
        places, magnitude = merged_tile(key_directions + n * key_n, key_magnitudes + n * key_magnitude_n,
                                        key_unmerged + n * key_unmerged_n, key_entries + n * key_entry_n,
                                        t, inside, d, D)  # fmt: skip
        k = tl.load(places, mask=inside[:, None] & (d[None] < D), other=0.0)  # [TOKENS, WIDE]
        x = product(q, tl.trans(k), tl.zeros((ROWS, TOKENS), tl.float32), HALF) * magnitude[None]
        visible = inside
        if HAS_VALID:
            visible = tl.load(valid + t, mask=inside, other=0) != 0
        weights, rescale, top, total = softmax_step(logits_of(x, scaling, softcap, CAPPED), visible[None], top, total)
        places, magnitude = merged_tile(value_directions + n * value_n, value_magnitudes + n * value_magnitude_n,
                                        value_unmerged + n * value_unmerged_n, value_entries + n * value_entry_n,
                                        t, inside, c, DV)  # fmt: skip
        v = tl.load(places, mask=inside[:, None] & (c[None] < DV), other=0.0)
        acc = product((weights * magnitude[None]).to(v.dtype), v, acc * rescale[:, None], HALF)
    top, total, acc = attend_new(
        q, new_keys + n * new_key_n, new_values + n * new_value_n, valid, length, tl.where(is_last, new_count, 0),
        scaling, softcap, top, total, acc, D, DV, TOKENS, HALF, HAS_VALID, CAPPED)  # fmt: skip
    store_split(sums, maxima, totals, top, total, acc, n, part, parts, rows, c, DV, ROWS)


@dataclass(frozen=True)
class MergedVectors(Generic[Layout]):
    """Merged keys (or values) of one layer.

    Attributes:
        directions: [B, H, S, D]; or codes, for :mod:`.merged_codes`.
        magnitudes: [B, H, S].
        retained: [B, H, R] int32, slots of the retained tokens, -1 for unused entries.
        unmerged: [B, H, R, D], the retained tokens.
    """

    directions: Layout
    magnitudes: torch.Tensor
    retained: torch.Tensor
    unmerged: torch.Tensor

    def entries(self, slots: int) -> torch.Tensor:
        """Return the index of each slot's retained token, [N, S + 1] int32, or -1; the last slot is a dummy."""
        retained = self.retained.flatten(0, 1)  # [N, R]
        index = torch.where(retained >= 0, retained, slots).long()
        entry = torch.arange(retained.shape[1], dtype=torch.int32, device=retained.device).expand_as(retained)
        empty = torch.full((len(retained), slots + 1), -1, dtype=torch.int32, device=retained.device)
        return empty.scatter_(1, index, entry)


def merged_attention(
    query: torch.Tensor,
    keys: MergedVectors[torch.Tensor],
    values: MergedVectors[torch.Tensor],
    new: tuple[torch.Tensor, torch.Tensor] | None,
    valid: torch.Tensor | None,
    rule: LogitRule,
) -> torch.Tensor:
    """Attention of one new token per row over one layer of a pair.

    Args:
        query: [B, H_q, 1, D].
        keys, values: Merged tokens.
        new: Keys [B, H, n, D] and values [B, H, n, D_v] that are not merged yet, or None.
        valid: [B, 1, S + n] bool, False for slots without a token; None: all slots have one.
        rule: How logits are computed.

    Returns:
        [B, H_q, 1, D_v].
    """
    batch, heads, length, dim = keys.directions.shape
    value_dim, device = values.directions.shape[3], query.device
    query, segments, rows = query.contiguous(), batch * heads, query.shape[1] // heads
    out = torch.empty(batch, query.shape[1], 1, value_dim, dtype=query.dtype, device=device)
    mask = None if valid is None else valid.contiguous().view(torch.uint8)
    tensors = [flat(keys.directions), flat(values.directions), *operands(keys, values, new, length)]
    new_count = tensors[-1].shape[1]

    def run(tiling: Tiling) -> None:
        chunk = tiling.chunk(segments, length, length, device)
        splits = Splits.empty(segments, triton.cdiv(length, chunk) + 1, rows, value_dim, device)
        split_merged[(segments, splits.maxima.shape[1])](
            query, *tensors, mask, splits.sums, splits.maxima, splits.totals,
            rule.scaling, rule.softcap or 1.0, length, new_count, chunk, rows, heads,
            *(x.stride(0) for x in tensors), 0 if mask is None else mask.stride(0),
            D=dim, DV=value_dim, ROWS=padded(rows), WIDE=padded(dim), WIDE_V=padded(value_dim), TOKENS=tiling.tokens,
            HALF=half_operands(query.dtype), HAS_VALID=mask is not None, CAPPED=rule.softcap is not None,
            num_warps=tiling.warps, num_stages=tiling.stages,
        )  # fmt: skip
        join(splits, rule.sinks, out, heads)

    default = default_tiling(max(padded(dim), padded(value_dim)), query.element_size())
    size = triton.next_power_of_2(length)
    key = ("merged", query.dtype, dim, value_dim, segments, rows, size, mask is None, rule.softcap is None)
    with on_device(query):
        run(tuned(key, default, tilings(default), run))
    return out


def operands(
    keys: MergedVectors[Any], values: MergedVectors[Any], new: tuple[torch.Tensor, torch.Tensor] | None, length: int
) -> list[torch.Tensor]:
    """Return magnitudes, retained tokens, their entries, and new tokens, of keys and of values each: [N, ...]."""
    new_keys, new_values = (x[:, :, :0] for x in (keys.unmerged, values.unmerged)) if new is None else new
    stored = (keys.magnitudes, values.magnitudes, keys.unmerged, values.unmerged)
    return [*map(flat, stored), keys.entries(length), values.entries(length), flat(new_keys), flat(new_values)]


def flat(x: torch.Tensor) -> torch.Tensor:
    """Return x [B, H, ...] as [N, ...] with contiguous segments; a view if the layout allows."""
    x = x.flatten(0, 1)
    return x if len(x) == 0 or x[0].is_contiguous() else x.contiguous()
