"""Budgets: tokens kept per layer, the protected ones included, as a number or as a fraction of the prompt."""

from __future__ import annotations

from typing import Any

from ...conf.errors import is_whole, require

Budget = int | float
"""Tokens kept per layer, the protected ones included (int), or a fraction of the prompt (float in (0, 1])."""


def check_budget(budget: Any, key: str = "method.budget") -> None:
    """Raise InputError unless ``budget`` is an int >= 1 or a float in (0, 1]."""
    allowed = "must be a whole number of tokens >= 1, or a fraction of the prompt in (0, 1]"
    if is_whole(budget):
        require(budget >= 1, key, budget, allowed)
    else:
        require(isinstance(budget, float) and 0.0 < budget <= 1.0, key, budget, allowed)


def resolve_budget(budget: Budget, prompt_length: int) -> int:
    """Tokens to keep of a prompt of ``prompt_length`` tokens; a fraction is rounded to the nearest, never to 0."""
    if isinstance(budget, int):
        return budget
    return max(1, int(budget * prompt_length + 0.5))
