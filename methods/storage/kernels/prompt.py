"""Sums of a prompt's attention weights over its queries, for scorers, without a matrix of weights in memory.

The weight of a query on a token is exp(logit - l) with the query's log-sum-exp ``l``. The flash kernel of the prefill
gives ``l``; the sums then need one product of queries and keys and no second softmax. Where ``l`` is not known, a
first kernel computes it.

Products of 16-bit queries and keys are rounded to 16 bits, as in PyTorch, so that both rank tokens alike.

Legend: R rows, H KV heads, g query heads per KV head, w last queries of the prompt, T tokens, D channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...cache.prompt import Prompt
from .launch import MAX_SPLITS, half_operands, on_device, padded, processors
from .online import LOG2_E, LOWEST, logits_of, product

MAX_TILE_BYTES = 32768
"""Bytes of the operand that stays on the processor: 128 keys or queries of 128 channels of 16 bits."""
WARPS = 8


@triton.jit
def prompt_logits(a, b, scaling, softcap, dtype: tl.constexpr, HALF: tl.constexpr, CAPPED: tl.constexpr):
    """Return the logits, base 2, of ``a`` [M, WIDE] and ``b`` [WIDE, N], with products rounded to ``dtype``."""
    x = product(a, b, tl.zeros((a.shape[0], b.shape[1]), tl.float32), HALF)
    return logits_of(x.to(dtype).to(tl.float32), scaling, softcap, CAPPED)


@triton.jit
def query_logsumexp(
    query, keys, strict, out, scaling, softcap, count, length, chunk, heads, group,
    query_r, query_h, query_t, key_r, key_h, key_t,
    D: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, STRICT: tl.constexpr,
    HALF: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of a block of queries of one query head over one split of the keys: out [splits, R * H * g, w]."""
    n, part = tl.program_id(0), tl.program_id(2)
    first = tl.program_id(1) * ROWS
    r, h = n // (heads * group), n % (heads * group)
    i, d = first + tl.arange(0, ROWS), tl.arange(0, WIDE)
    q = tl.load(query + r.to(tl.int64) * query_r + h.to(tl.int64) * query_h + i.to(tl.int64)[:, None] * query_t
                + d[None], mask=(i[:, None] < count) & (d[None] < D), other=0.0)  # fmt: skip
    last = length - count + i  # last token that each query attends to
    if STRICT:
        last -= tl.load(strict + h % group).to(tl.int32)
    keys += r.to(tl.int64) * key_r + (h // group).to(tl.int64) * key_h
    top, total = tl.full((ROWS,), LOWEST, tl.float32), tl.zeros((ROWS,), tl.float32)
    end = tl.minimum(tl.minimum(part * chunk + chunk, length), length - count + first + ROWS)
    for start in range(part * chunk, end, TOKENS):
        t = start + tl.arange(0, TOKENS)
        k = tl.load(
            keys + t.to(tl.int64)[None] * key_t + d[:, None], mask=(t[None] < end) & (d[:, None] < D), other=0.0
        )
        x = prompt_logits(q, k, scaling, softcap, query.dtype.element_ty, HALF, CAPPED)
        visible = (t[None] <= last[:, None]) & (t[None] < end)
        x = tl.where(visible, x, LOWEST)
        higher = tl.maximum(top, tl.max(x, 1))
        total = total * tl.exp2(top - higher) + tl.sum(tl.where(visible, tl.exp2(x - higher[:, None]), 0.0), 1)
        top = higher
    lse = tl.where(total > 0, (top + tl.log2(tl.maximum(total, 1e-30))) / LOG2_E, float("-inf"))
    tl.store(out + (part * tl.num_programs(0) + n).to(tl.int64) * count + i, lse, mask=i < count)


@triton.jit
def column_sums(
    query, keys, lse, weights, strict, out, scaling, softcap, count, length, heads, group,
    query_r, query_h, query_t, key_r, key_h, key_t,
    D: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, WEIGHTED: tl.constexpr,
    STRICT: tl.constexpr, MEAN: tl.constexpr, HALF: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Sum the attention that one tile of tokens receives: from one query head, or the MEAN over those of a KV head.

    Programs of early tokens, which more queries attend to, come first. ``out`` [N, T].
    """
    n, begin = tl.program_id(1), tl.program_id(0) * TOKENS
    GROUPS = group if MEAN else 1
    h = n * GROUPS  # first query head, of all rows
    r = h // (heads * group)
    t, d = begin + tl.arange(0, TOKENS), tl.arange(0, WIDE)
    kv_head = h % (heads * group) // group
    k = tl.load(keys + r.to(tl.int64) * key_r + kv_head.to(tl.int64) * key_h + t.to(tl.int64)[:, None] * key_t
                + d[None], mask=(t[:, None] < length) & (d[None] < D), other=0.0)  # fmt: skip
    acc = tl.zeros((TOKENS,), tl.float32)
    low = tl.maximum(begin - (length - count), 0) // ROWS * ROWS  # no earlier query attends to these tokens
    for j in range(GROUPS):
        head = h + j
        place = query + r.to(tl.int64) * query_r + (head % (heads * group)).to(tl.int64) * query_h
        offset = length - count
        if STRICT:
            offset -= tl.load(strict + head % group).to(tl.int32)
        for first in range(low, count, ROWS):
            i = first + tl.arange(0, ROWS)
            q = tl.load(place + i.to(tl.int64)[None] * query_t + d[:, None],
                        mask=(i[None] < count) & (d[:, None] < D), other=0.0)  # fmt: skip
            norm = tl.load(lse + head.to(tl.int64) * count + i, mask=i < count, other=0.0) * LOG2_E
            x = prompt_logits(k, q, scaling, softcap, query.dtype.element_ty, HALF, CAPPED)  # [TOKENS, ROWS]
            visible = (t[:, None] <= offset + i[None]) & (i[None] < count)
            p = tl.where(visible, tl.exp2(x - norm[None]), 0.0)
            if WEIGHTED:
                p *= tl.load(weights + i, mask=i < count, other=0.0)[None]
            acc += tl.sum(p, 1)
    tl.store(out + n.to(tl.int64) * length + t, acc / GROUPS, mask=t < length)


def tile_sizes(dim: int, element_bytes: int) -> tuple[int, int]:
    """Return the largest numbers of tokens or queries that stay on the processor, and of those that pass by."""
    held = max(16, min(128, MAX_TILE_BYTES // (padded(dim) * element_bytes)))
    return held, min(64, held)


def attention_sums(
    prompt: Prompt, hides_own_token: torch.Tensor | None, weights: torch.Tensor | None, per_query_head: bool
) -> torch.Tensor:
    """Sum the causal attention weights of the prompt's queries, float32.

    Args:
        prompt: Prompt with its last w queries.
        hides_own_token: [g] bool, True for query heads of a group that do not attend to their own token; None: all do.
        weights: [w] float32, factor of each query; None: 1.
        per_query_head: Return the sums of each query head, [R, H * g, T]; otherwise their means over the query heads of
            a KV head, [R, H, T].
    """
    query, keys = (x if x.stride(3) == 1 else x.contiguous() for x in (prompt.query, prompt.keys))
    rows, query_heads, count, dim = query.shape
    heads, length = keys.shape[1], keys.shape[2]
    strict = None if hides_own_token is None else hides_own_token.to(torch.uint8)
    lse = prompt.logsumexp
    segments = rows * (query_heads if per_query_head else heads)
    out = torch.empty(rows, segments // rows, length, dtype=torch.float32, device=query.device)
    held, passing = tile_sizes(dim, query.element_size())
    arguments = (prompt.rule.scaling, prompt.rule.softcap or 1.0, count, length)
    layout = (heads, query_heads // heads, *query.stride()[:3], *keys.stride()[:3])
    sizes = {
        "D": dim, "WIDE": padded(dim), "HALF": half_operands(query.dtype), "CAPPED": prompt.rule.softcap is not None,
        "STRICT": strict is not None, "num_warps": WARPS,
    }  # fmt: skip
    with on_device(query):
        if lse is None:
            block = min(held, padded(count))
            blocks = triton.cdiv(count, block)
            splits = max(1, 2 * processors(query.device) // (rows * query_heads * blocks))
            chunk = triton.cdiv(triton.cdiv(length, min(splits, MAX_SPLITS)), passing) * passing
            shape = (triton.cdiv(length, chunk), rows * query_heads, count)
            parts = torch.empty(shape, dtype=torch.float32, device=query.device)
            query_logsumexp[(rows * query_heads, blocks, len(parts))](
                query, keys, strict, parts, *arguments, chunk, *layout, ROWS=block, TOKENS=passing, **sizes
            )
            lse = parts[0] if len(parts) == 1 else parts.logsumexp(0)
            if prompt.rule.sinks is not None:
                lse = torch.logaddexp(lse.view(rows, query_heads, count), prompt.rule.sinks.float()[:, None])
        column_sums[(triton.cdiv(length, held), segments)](
            query, keys, lse.contiguous(), weights, strict, out, *arguments, *layout,
            ROWS=min(passing, padded(count)), TOKENS=held, WEIGHTED=weights is not None, MEAN=not per_query_head,
            **sizes,
        )  # fmt: skip
    return out
