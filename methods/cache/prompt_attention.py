"""Attention weights of a prompt's last queries, for scorers; applies the causal mask and the layers' logit rules.

Legend: R rows, H_q query heads, H_kv stored heads, g = H_q / H_kv, w observed queries, n queries of a block, T tokens.
"""

from __future__ import annotations

import torch

from .prompt import Prompt


def window_attention(prompt: Prompt) -> torch.Tensor:
    """Attention weights of the last w queries over the whole prompt: [R, H_q, w, T] float32.

    The softmax (float32) is over all T tokens, causal within the window; products are in the compute dtype.
    """
    rows, query_heads, w, dim = prompt.query.shape
    heads, length = prompt.keys.shape[1], prompt.length
    grouped = prompt.query.reshape(rows, heads, prompt.groups * w, dim)  # [R, H_kv, g * w, D]
    logits = (grouped @ prompt.keys.transpose(-1, -2)).reshape(rows, query_heads, w, length)  # [R, H_q, w, T]
    logits = prompt.rule.logits(logits.to(torch.promote_types(logits.dtype, torch.float32)))
    mask_future(logits.view(rows, heads, prompt.groups, w, length), length - w, prompt)
    return attention_from(logits, prompt)


def window_sums(prompt: Prompt, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Attention of the last w queries, summed over them: [R, H_q, T] float32.

    Args:
        prompt: Prompt with its last w queries.
        weights: [w] float32, factor of each query; None: 1.
    """
    from .prompt_kernel import kernel_sums  # not at import: a reader of a scorer does not need it

    if (sums := kernel_sums(prompt, weights, per_query_head=True)) is not None:
        return sums
    attention = prompt.cached("window_attention", window_attention)  # [R, H_q, w, T]
    return (attention if weights is None else attention * weights[:, None]).sum(dim=2)


def mask_future(logits: torch.Tensor, first: int, prompt: Prompt) -> None:
    """Apply the causal mask in place to logits [R, H_kv, g, n, columns] of the queries from position ``first``."""
    n = logits.shape[3]
    future = torch.ones(n, n, dtype=torch.bool, device=logits.device).triu(1)
    if prompt.strictly_causal is not None:
        own = torch.eye(n, dtype=torch.bool, device=logits.device)
        future = future | (prompt.strictly_causal[:, None, None] & own)  # [g, n, n]
    logits[..., first : first + n].masked_fill_(future, float("-inf"))


def attention_from(logits: torch.Tensor, prompt: Prompt) -> torch.Tensor:
    """Softmax of masked logits [R, H_q, n, T] or [R, H_kv, g, n, T], with the sinks in the normalizer.

    Fully masked rows (the first token under strictly causal masking) get zero weights instead of NaN.
    """
    weights = prompt.rule.weights(logits, head_dims=logits.dim() - 3)
    return weights if prompt.strictly_causal is None else weights.nan_to_num(0.0)
