"""Attention of many new tokens over attention sinks and a band of recent tokens (StreamingLLM), as a flash kernel.

The logits of the sinks have a query of their own, rotated back to positions inside the cache, so the sinks are the
first tile of the online softmax, and those of the band follow. Tokens outside of a block's band are not read.

Legend: B rows, H KV heads, g query heads per KV head, n new tokens, S slots of which the last n hold them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...cache.band import Band
from ...cache.kernel_use import MIN_DOT_SIZE
from ...cache.logits import LogitRule
from .launch import half_operands, on_device, padded
from .online import LOG2_E, LOWEST, attend_tile, logits_of, product

BLOCK, WARPS = 128, 8
"""Queries and warps per program."""
NOWHERE = 1 << 30
"""Position of a slot that is not part of the band: a sink, or a slot without a token."""


@triton.jit
def banded_attention(
    query, rotated, keys, values, positions, query_positions, begins, sink_slots, recent, sinks, out,
    scaling, softcap, new, slots, heads, group, blocks, position_b, query_position_b,
    query_b, query_h, query_t, rotated_b, rotated_h, rotated_t, key_b, key_h, key_t, value_b, value_h, value_t,
    D: tl.constexpr, DV: tl.constexpr, WIDE: tl.constexpr, WIDE_V: tl.constexpr, ROWS: tl.constexpr,
    TOKENS: tl.constexpr, SLOTS: tl.constexpr, SINKS: tl.constexpr, HALF: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Attend with one block of queries of one query head: out [B, H * g, n, D_v]."""
    block, head = tl.program_id(0), tl.program_id(1)
    b, h = head // (heads * group), head % (heads * group)
    i, d, c = block * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDE), tl.arange(0, WIDE_V)
    is_query = (i[:, None] < new) & (d[None] < D)
    b64, h64, kv64, i64 = b.to(tl.int64), h.to(tl.int64), (h // group).to(tl.int64), i.to(tl.int64)
    keys += b64 * key_b + kv64 * key_h
    values += b64 * value_b + kv64 * value_h
    position = tl.load(query_positions + b * query_position_b + i, mask=i < new, other=0)
    top, total = tl.full((ROWS,), LOWEST, tl.float32), tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, WIDE_V), tl.float32)
    # The sinks: token s of the row is in slot sink_slots[b, s].
    s = tl.arange(0, SLOTS)
    slot = tl.load(sink_slots + b * SLOTS + s).to(tl.int64)
    q = tl.load(rotated + b64 * rotated_b + h64 * rotated_h + i64[:, None] * rotated_t + d[None],
                mask=is_query, other=0.0)  # fmt: skip
    sink_k = tl.load(keys + slot[None] * key_t + d[:, None], mask=(slot[None] >= 0) & (d[:, None] < D), other=0.0)
    sink_v = tl.load(values + slot[:, None] * value_t + c[None], mask=(slot[:, None] >= 0) & (c[None] < DV), other=0.0)
    first = logits_of(product(q, sink_k, tl.zeros((ROWS, SLOTS), tl.float32), HALF), scaling, softcap, CAPPED)
    seen = (slot[None] >= 0) & (s[None] <= position[:, None])
    top, total, acc = attend_tile(first, seen, sink_v, top, total, acc, HALF)
    # The band.
    q = tl.load(query + b64 * query_b + h64 * query_h + i64[:, None] * query_t + d[None], mask=is_query, other=0.0)
    width = tl.load(recent + b).to(tl.int32)
    end = slots - new + tl.minimum(block * ROWS + ROWS, new)
    for start in range(tl.load(begins + b * blocks + block).to(tl.int32), end, TOKENS):
        t = start + tl.arange(0, TOKENS)
        t64 = t.to(tl.int64)
        k = tl.load(keys + t64[None] * key_t + d[:, None], mask=(t[None] < end) & (d[:, None] < D), other=0.0)
        v = tl.load(values + t64[:, None] * value_t + c[None], mask=(t[:, None] < end) & (c[None] < DV), other=0.0)
        at = tl.load(positions + b * position_b + t, mask=t < end, other=1 << 30)
        distance = position[:, None] - at[None]
        x = logits_of(product(q, k, tl.zeros((ROWS, TOKENS), tl.float32), HALF), scaling, softcap, CAPPED)
        top, total, acc = attend_tile(x, (distance >= 0) & (distance <= width), v, top, total, acc, HALF)
    if SINKS:
        sink = tl.load(sinks + h).to(tl.float32) * LOG2_E
        higher = tl.maximum(top, sink)
        rescale = tl.exp2(top - higher)
        acc, total = acc * rescale[:, None], total * rescale + tl.exp2(sink - higher)
    acc = acc / tl.maximum(total, 1e-30)[:, None]  # 0 for a pad, which attends to nothing
    place = out + (head.to(tl.int64) * new + i64[:, None]) * DV + c[None]
    tl.store(place, acc.to(out.dtype.element_ty), mask=(i[:, None] < new) & (c[None] < DV))


def stream_attention(
    query: torch.Tensor,
    rotated: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    band: Band,
    rule: LogitRule,
) -> torch.Tensor:
    """Attention of new tokens over the sinks and a band.

    Args:
        query: [B, H * g, n, D], of the tokens in the last n slots.
        rotated: [B, H * g, n, D], the queries for the sinks.
        keys: [B, H, S, D].
        values: [B, H, S, D_v].
        band: The visible tokens.
        rule: How logits are computed.

    Returns:
        [B, H * g, n, D_v]; zero for a token that attends to nothing.
    """
    query, rotated, keys, values = (x if x.stride(3) == 1 else x.contiguous() for x in (query, rotated, keys, values))
    batch, query_heads, new, dim = query.shape
    heads, slots, value_dim = keys.shape[1], keys.shape[2], values.shape[3]
    blocks, wide = triton.cdiv(new, BLOCK), max(padded(dim), padded(value_dim))
    tokens = max(16, min(64, 16384 // (wide * query.element_size())))
    is_sink = band.is_sink if band.valid is None else band.is_sink & band.valid
    in_band = ~is_sink if band.valid is None else ~is_sink & band.valid
    recent = torch.full((batch, 1), NOWHERE - 1, device=query.device) if band.recent is None else band.recent
    positions = torch.where(in_band, band.positions, NOWHERE).to(torch.int32).contiguous()  # [B, S]
    query_positions = band.query_positions.expand(batch, new).to(torch.int32).contiguous()
    # The first slot of each block: positions do not decrease, so that of the block's first query decides.
    lowest = query_positions[:, ::BLOCK] - recent  # [B, blocks]
    reached = torch.where(in_band, band.positions, -1).cummax(dim=1).values  # [B, S]
    begins = torch.searchsorted(reached.expand(batch, slots).contiguous(), lowest.contiguous())
    sinks = max(MIN_DOT_SIZE, triton.next_power_of_2(band.sinks))
    rank = torch.where(is_sink, is_sink.long().cumsum(1) - 1, sinks).expand(batch, slots)  # [B, S]
    sink_slots = torch.full((batch, sinks + 1), -1, dtype=torch.int64, device=query.device)
    slot = torch.arange(slots, device=query.device).expand(batch, slots)
    sink_slots = sink_slots.scatter_(1, rank, slot)[:, :sinks].contiguous()
    out = query.new_empty(batch, query_heads, new, value_dim)
    with on_device(query):
        banded_attention[(blocks, batch * query_heads)](
            query, rotated, keys, values, positions, query_positions, begins, sink_slots, recent, rule.sinks, out,
            rule.scaling, rule.softcap or 1.0, new, slots, heads, query_heads // heads, blocks, slots, new,
            *query.stride()[:3], *rotated.stride()[:3], *keys.stride()[:3], *values.stride()[:3],
            D=dim, DV=value_dim, WIDE=padded(dim), WIDE_V=padded(value_dim), ROWS=BLOCK, TOKENS=tokens, SLOTS=sinks,
            SINKS=rule.sinks is not None, HALF=half_operands(query.dtype), CAPPED=rule.softcap is not None,
            num_warps=WARPS,
        )  # fmt: skip
    return out
