"""Ada-KV's budgets (Feng et al., 2024, arXiv 2407.11550, algorithm 1): the heads of a layer share one budget.

Scores are ranked over all heads of a layer at once instead of head by head, so a head whose attention is spread out
keeps more tokens than one that looks at a few. A share ``floor`` of every head's budget is safe from the others.

Heads of different lengths need a storage that holds them so (``method/storage=ragged``); with ``dense`` they are
padded, and the padding is counted. The published code rounds each head by itself, so that its total is off by a few
tokens; here the remainders go to the heads with the largest fractions, and the total is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ....conf.options import PositiveInt, Share
from ..ranking import keep_mask
from .base import Allocator
from .pyramid import Pyramid


@dataclass(frozen=True)
class Adaptive(Allocator):
    """One budget for all heads of a layer.

    Attributes:
        floor: Share of the mean that every head keeps whatever the others score (alpha; 0.2 in the paper); 1 is
            uniform.
        layers: Budgets of the layers: ``uniform``, or ``pyramid`` (the paper's Ada-PyramidKV).
        beta: Steepness of the pyramid, see :class:`.pyramid.Pyramid`.
    """

    id: ClassVar[str] = "adaptive"
    heads_differ: ClassVar[bool] = True
    floor: Share = 0.2
    layers: Literal["uniform", "pyramid"] = "uniform"
    beta: PositiveInt = 20

    def layer_budgets(self, budget: int, protected: int, prompt_length: int, layers: int) -> Sequence[int]:
        if self.layers == "pyramid":
            return Pyramid(self.beta).layer_budgets(budget, protected, prompt_length, layers)
        return super().layer_budgets(budget, protected, prompt_length, layers)

    def head_budgets(self, scores: torch.Tensor, budget: int, ties: torch.Tensor | None = None) -> torch.Tensor:
        return shares_of(scores, budget, self.floor, ties)


def shares_of(scores: torch.Tensor, budget: int, floor: float, ties: torch.Tensor | None) -> torch.Tensor:
    """Tokens of each head when all heads are ranked together.

    Args:
        scores: [R, H, N], the largest stay.
        budget: Mean over the heads.
        floor: Share of it that every head keeps.
        ties: [R, H, N], second scores, or None.

    Returns:
        [R, H] int64, adding up to H x ``budget``; of equal fractions the lower head's is rounded up first.
    """
    _, heads, count = scores.shape
    best = keep_mask(scores.flatten(1), heads * budget, None if ties is None else ties.flatten(1))  # [R, H * N]
    won = best.unflatten(1, (heads, count)).sum(-1).double()  # [R, H]
    shares = (1 - floor) * won + floor * budget
    budgets = shares.floor()
    missing = (heads * budget - budgets.sum(-1)).round().long()  # [R], below the number of heads
    place = (shares - budgets).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1, stable=True)
    return (budgets + (place < missing[:, None])).long()
