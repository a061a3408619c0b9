"""Attention that each token of a prompt receives, from all queries or the last ones, in memory linear in its length."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .prompt import Prompt
from .prompt_attention import attention_from, mask_future

QUERY_BLOCK = 64
"""Queries per block on a CPU, few enough for its cache; eight times as many on CUDA."""


def attention_received(prompt: Prompt) -> torch.Tensor:
    """Column sums of the causal attention matrix, averaged over the query heads of a group: [R, H_kv, T] float32."""
    from .prompt_kernel import kernel_sums  # not at import: a reader of a scorer does not need it

    if (sums := kernel_sums(prompt, None, per_query_head=False)) is not None:
        return sums
    shape = (*prompt.keys.shape[:2], prompt.length)
    sums = torch.zeros(shape, dtype=torch.float32, device=prompt.query.device)
    for _, attention in attention_blocks(prompt, prompt.length):  # [R, H_kv, g, n, columns]
        sums[..., : attention.shape[-1]] += attention.sum(dim=(2, 3))
    return sums / prompt.groups


def attention_blocks(prompt: Prompt, count: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Causal attention weights of the prompt's last ``count`` queries in blocks of n queries.

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
        mask_future(logits, first, prompt)
        yield start, attention_from(logits, prompt)
