"""Prompts of one layer with random queries, keys and values, and what a scorer keeps of them."""

from __future__ import annotations

import torch

from kvbench.methods.cache.logits import LogitRule
from kvbench.methods.cache.prompt import Prompt
from kvbench.methods.policies.eviction import EvictionPolicy
from kvbench.methods.policies.scorers.base import Scorer

D = 16


def random_prompt(length: int = 45, window: int = 8, heads: int = 2, groups: int = 2) -> Prompt:
    """One row, float64."""
    g = torch.Generator().manual_seed(length)
    query, keys, values = (
        torch.randn(1, n, t, D, generator=g, dtype=torch.float64)
        for n, t in ((heads * groups, min(window, length)), (heads, length), (heads, length))
    )
    return Prompt(2 * query, keys, values, LogitRule(D**-0.5), 0, 1)


def kept(scorer: Scorer, prompt: Prompt, budget: int, **protected: int) -> list[list[int]]:
    """Tokens that each head of the only row keeps."""
    slots = EvictionPolicy(scorer, budget, **protected).select(prompt).slots
    assert slots is not None
    sets: list[list[int]] = slots[0].tolist()
    return sets
