"""Attention weights of a prompt's queries, for scorers; applies the causal mask and the layers' logit rules.

Sums of the weights over queries, which is all that most scorers need, are computed by a Triton kernel on CUDA
(:mod:`..storage.kernels.prompt`) that stores no weights; PyTorch computes the same in blocks of queries.

Legend: R rows, H_q query heads, H_kv stored heads, g = H_q / H_kv, w observed queries, n queries of a block, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .kernel_use import PROMPT_SCORES, attention_problem, uses_kernel_on
from .prompt import Prompt

QUERY_BLOCK = 64
"""Queries per block on a CPU, few enough for its cache; eight times as many on CUDA."""


def uses_kernel(prompt: Prompt) -> bool:
    """Return whether a kernel computes the sums, and record it."""
    problem = attention_problem(prompt.query, prompt.query.shape[3]) if prompt.query.is_cuda else None
    return uses_kernel_on(prompt.query.device, PROMPT_SCORES, problem)


def window_attention(prompt: Prompt) -> torch.Tensor:
    """Attention weights of the last w queries over the whole prompt: [R, H_q, w, T] float32.

    The softmax (float32) is over all T tokens, causal within the window; products are in the compute dtype.
    """
    rows, query_heads, w, dim = prompt.query.shape
    heads, length = prompt.keys.shape[1], prompt.length
    grouped = prompt.query.reshape(rows, heads, prompt.groups * w, dim)  # [R, H_kv, g * w, D]
    logits = (grouped @ prompt.keys.transpose(-1, -2)).reshape(rows, query_heads, w, length)  # [R, H_q, w, T]
    logits = prompt.rule.logits(logits.to(torch.promote_types(logits.dtype, torch.float32)))
    _mask_future(logits.view(rows, heads, prompt.groups, w, length), length - w, prompt.strictly_causal)
    return _attention_from(logits, prompt)


def window_sums(prompt: Prompt, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Attention of the last w queries, summed over them: [R, H_q, T] float32.

    Args:
        prompt: Prompt with its last w queries.
        weights: [w] float32, factor of each query; None: 1.
    """
    if uses_kernel(prompt):
        from ..storage.kernels.prompt import attention_sums

        return attention_sums(prompt, weights, per_query_head=True)
    attention = prompt.cached("window_attention", window_attention)  # [R, H_q, w, T]
    return (attention if weights is None else attention * weights[:, None]).sum(dim=2)


def attention_received(prompt: Prompt) -> torch.Tensor:
    """Column sums of the causal attention matrix, averaged over the query heads of a group: [R, H_kv, T] float32."""
    if uses_kernel(prompt):
        from ..storage.kernels.prompt import attention_sums

        return attention_sums(prompt, None, per_query_head=False)
    shape = (*prompt.keys.shape[:2], prompt.length)
    sums = torch.zeros(shape, dtype=torch.float32, device=prompt.query.device)
    for _, attention in attention_blocks(prompt, prompt.length):  # [R, H_kv, g, n, columns]
        sums[..., : attention.shape[-1]] += attention.sum(dim=(2, 3))
    return sums / prompt.groups


def attention_blocks(prompt: Prompt, count: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Causal attention weights of the prompt's last ``count`` queries in blocks of queries, in memory linear in T.

    Yields:
        (index of the block's first query, [R, H_kv, g, n, columns] float32), with columns up to the last query.
    """
    rows, _, w, dim = prompt.query.shape
    heads, length = prompt.keys.shape[1], prompt.length
    grouped = prompt.query.reshape(rows, heads, prompt.groups, w, dim)
    block = 8 * QUERY_BLOCK if grouped.is_cuda else QUERY_BLOCK
    for start in range(0, count, block):
        n = min(block, count - start)
        first, end = length - count + start, length - count + start + n  # positions of the block's queries
        offset = w - count + start
        queries = grouped[:, :, :, offset : offset + n].reshape(rows, heads, prompt.groups * n, dim)
        logits = prompt.rule.logits((queries @ prompt.keys[:, :, :end].transpose(-1, -2)).float())
        logits = logits.reshape(rows, heads, prompt.groups, n, end)  # [R, H_kv, g, n, columns]
        _mask_future(logits, first, prompt.strictly_causal)
        yield start, _attention_from(logits, prompt)


def _mask_future(logits: torch.Tensor, first: int, strictly_causal: torch.Tensor | None) -> None:
    """Apply the causal mask in place.

    Args:
        logits: [R, H_kv, g, n, columns], of the queries from position ``first``.
        first: Position of the first query.
        strictly_causal: [g] bool, True for query heads that do not attend to their own token; None: all do.
    """
    n = logits.shape[3]
    future = torch.ones(n, n, dtype=torch.bool, device=logits.device).triu(1)
    if strictly_causal is not None:
        future = future | (strictly_causal[:, None, None] & torch.eye(n, dtype=torch.bool, device=logits.device))
    logits[..., first : first + n].masked_fill_(future, float("-inf"))


def _attention_from(logits: torch.Tensor, prompt: Prompt) -> torch.Tensor:
    """Softmax of masked logits [R, H_q, n, T] or [R, H_kv, g, n, T], with the sinks in the normalizer.

    Fully masked rows (the first token under strictly causal masking) get zero weights instead of NaN.
    """
    weights = prompt.rule.weights(logits, head_dims=logits.dim() - 3)
    return weights if prompt.strictly_causal is None else weights.nan_to_num(0.0)
