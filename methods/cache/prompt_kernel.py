"""Sums of a prompt's attention by a Triton kernel on CUDA that stores no weights (:mod:`..storage.kernels.prompt`)."""

from __future__ import annotations

import torch

from .kernel_use import PROMPT_SCORES, attention_problem, uses_kernel_on
from .prompt import Prompt


def uses_kernel(prompt: Prompt) -> bool:
    """Return whether a kernel computes the sums, and record it."""
    problem = attention_problem(prompt.query, prompt.query.shape[3]) if prompt.query.is_cuda else None
    return uses_kernel_on(prompt.query.device, PROMPT_SCORES, problem)


def kernel_sums(prompt: Prompt, weights: torch.Tensor | None, per_query_head: bool) -> torch.Tensor | None:
    """Sum the causal attention weights of the prompt's queries, float32, or return None where PyTorch does.

    Args:
        prompt: Prompt with its last w queries.
        weights: [w] float32, factor of each query; None: 1.
        per_query_head: Return the sums of each query head, [R, H_q, T]; otherwise their means over the query heads of
            a KV head, [R, H_kv, T].
    """
    if not uses_kernel(prompt):
        return None
    from ..storage.kernels.prompt import attention_sums

    return attention_sums(prompt, prompt.strictly_causal, weights, per_query_head=per_query_head)
