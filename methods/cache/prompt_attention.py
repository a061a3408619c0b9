"""Attention weights of a prompt's last queries, for scorers; applies the causal mask and the layers' logit rules.

Legend: R rows, H_q query heads, H_kv stored heads, g = H_q / H_kv, w observed queries, n queries of a block, T tokens,
D channels.
"""

from __future__ import annotations

import torch

from .prompt import Prompt


def window_attention(prompt: Prompt) -> torch.Tensor:
    """Attention weights of the last w queries over the whole prompt: [R, H_q, w, T] float32.

    The softmax (float32) is over all T tokens, causal within the window; products are in the compute dtype.
    """
    logits = _window_logits(prompt, prompt.length, prompt.query.dtype)  # [R, H_kv, g, w, T]
    mask_future(logits, prompt.length - prompt.query.shape[2], prompt)
    return attention_from(logits.flatten(1, 2), prompt)


def window_attention_of_groups(prompt: Prompt, largest_logits: bool, prefix_only: bool) -> torch.Tensor:
    """Attention weights of the last w queries in a softmax of another form: [R, H_kv or H_q, w, N] float32.

    Products and softmax are in float32. Learned sinks, which belong to a head's softmax over all tokens, do not count.

    Args:
        prompt: Prompt with its last w queries.
        largest_logits: The largest logit of a KV head's query heads counts; False: one row per query head.
        prefix_only: The softmax is over the N = T - w tokens before the window; False: over all N = T, causal.
    """
    w = prompt.query.shape[2]
    end = prompt.length - w if prefix_only else prompt.length
    logits = _window_logits(prompt, end, torch.promote_types(prompt.query.dtype, torch.float32))  # [R, H_kv, g, w, N]
    if not prefix_only:
        mask_future(logits, prompt.length - w, prompt)
    weights = (logits.amax(dim=2) if largest_logits else logits.flatten(1, 2)).softmax(dim=-1)
    return weights if prompt.strictly_causal is None else weights.nan_to_num(0.0)


def _window_logits(prompt: Prompt, end: int, dtype: torch.dtype) -> torch.Tensor:
    """Unmasked logits of the last w queries over the first ``end`` tokens, [R, H_kv, g, w, end] float32 or wider.

    Args:
        prompt: Prompt with its last w queries.
        end: Number of tokens.
        dtype: Dtype in which queries and keys are multiplied.
    """
    rows, _, w, dim = prompt.query.shape
    grouped = prompt.query.to(dtype).reshape(rows, prompt.keys.shape[1], prompt.groups * w, dim)  # [R, H_kv, g * w, D]
    logits = grouped @ prompt.keys[:, :, :end].to(dtype).mT  # [R, H_kv, g * w, end]
    logits = prompt.rule.logits(logits.to(torch.promote_types(dtype, torch.float32)))
    return logits.unflatten(2, (prompt.groups, w))


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
