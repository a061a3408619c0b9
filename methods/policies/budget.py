"""Budgets: tokens kept per layer, protected ones included, as a number or as a fraction of the prompt."""

from __future__ import annotations

from typing import Annotated

from ...conf.options import Bounds, NonNegativeInt, PositiveInt, Share, Wording

Budget = Annotated[
    PositiveInt | Annotated[float, Bounds(gt=0, le=1)],
    Wording("a whole number of tokens >= 1, or a fraction of the prompt in (0, 1]"),
]
"""Tokens kept per layer, protected ones included (int), or a fraction of the prompt (float in (0, 1])."""


Recent = Annotated[
    NonNegativeInt | Share,
    Wording("a whole number of tokens >= 0, or a share of the budget between 0.0 and 1.0"),
]
"""Last tokens that are always kept: their number (int), or a share of the budget (float)."""


def resolve_budget(budget: Budget, prompt_length: int) -> int:
    """Return the number of tokens to keep; a fraction of the prompt is rounded to the nearest number, at least 1."""
    if isinstance(budget, int):
        return budget
    return max(1, int(budget * prompt_length + 0.5))
