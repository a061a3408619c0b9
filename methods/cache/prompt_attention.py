"""Attention that a prompt's queries pay, as scorers use it: the causal mask and what layers share are dealt with here.

Legend: R rows, H_q query heads, H_kv stored heads, g = H_q / H_kv, w queries in view, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .prompt import Prompt

BLOCK = 64
"""Queries whose attention is computed at a time on a CPU, so that it stays in its cache; on CUDA eight times more."""


def window_attention(prompt: Prompt) -> torch.Tensor:
    """Attention probabilities of the last w queries over the whole prompt: [R, H_q, w, T], float32.

    The softmax runs over all T tokens; inside the window it is causal. Products are taken in the compute dtype, group
    by group without expanding the keys, and the softmax in float32.
    """
    rows, query_heads, w, dim = prompt.query.shape
    heads, length = prompt.keys.shape[1], prompt.length
    grouped = prompt.query.reshape(rows, heads, prompt.groups * w, dim)
    logits = (grouped @ prompt.keys.transpose(-1, -2)).reshape(rows, query_heads, w, length)
    logits = prompt.rule.logits(logits.to(torch.promote_types(logits.dtype, torch.float32)))
    _hide_future(logits.view(rows, heads, prompt.groups, w, length), length - w, prompt.strictly_causal)
    return _attention_from(logits, prompt)


def attention_received(prompt: Prompt) -> torch.Tensor:
    """Column sums of the causal attention matrix, averaged over the query heads of a group: [R, H_kv, T], float32."""
    shape = (*prompt.keys.shape[:2], prompt.length)
    sums = torch.zeros(shape, dtype=torch.float32, device=prompt.query.device)
    for _, attention in attention_blocks(prompt, prompt.length):
        sums[..., : attention.shape[-1]] += attention.sum(dim=(2, 3))
    return sums / prompt.groups


def attention_blocks(prompt: Prompt, count: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Causal attention of the prompt's last ``count`` queries, in blocks of queries, so that memory grows with T alone.

    Yields:
        (number of the block's first query, [R, H_kv, g, n, columns] float32); a block has columns up to its last query.
    """
    rows, _, held, dim = prompt.query.shape
    heads, length = prompt.keys.shape[1], prompt.length
    grouped = prompt.query.reshape(rows, heads, prompt.groups, held, dim)
    block = 8 * BLOCK if grouped.is_cuda else BLOCK
    for start in range(0, count, block):
        n = min(block, count - start)
        first, end = length - count + start, length - count + start + n  # positions of the block's queries
        at = held - count + start
        queries = grouped[:, :, :, at : at + n].reshape(rows, heads, prompt.groups * n, dim)
        logits = prompt.rule.logits((queries @ prompt.keys[:, :, :end].transpose(-1, -2)).float())
        logits = logits.reshape(rows, heads, prompt.groups, n, end)
        _hide_future(logits, first, prompt.strictly_causal)
        yield start, _attention_from(logits, prompt)


def _hide_future(logits: torch.Tensor, first: int, strictly_causal: torch.Tensor | None) -> None:
    """Mask, in place, what queries do not see.

    Args:
        logits: [R, H_kv, g, n, columns], of the queries of positions ``first`` .. ``first + n - 1``.
        first: See there; columns from there on are the queries' own.
        strictly_causal: [g] bool, query heads whose tokens do not see themselves; None: all do.
    """
    n = logits.shape[3]
    future = torch.ones(n, n, dtype=torch.bool, device=logits.device).triu(1)
    if strictly_causal is not None:
        future = future | (strictly_causal[:, None, None] & torch.eye(n, dtype=torch.bool, device=logits.device))
    logits[..., first : first + n].masked_fill_(future, float("-inf"))


def _attention_from(logits: torch.Tensor, prompt: Prompt) -> torch.Tensor:
    """Softmax over the last dimension of masked logits [R, H_q, n, T] or [R, H_kv, g, n, T], sinks in the normalizer.

    Fully masked rows (the first token under strictly causal masking) get zero weights instead of NaN.
    """
    weights = prompt.rule.weights(logits, head_dims=logits.dim() - 3)
    return weights if prompt.strictly_causal is None else weights.nan_to_num(0.0)
