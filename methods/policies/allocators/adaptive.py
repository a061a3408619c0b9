"""Ada-KV (Feng et al., 2024, arXiv 2407.11550, algorithm 1): the heads of a layer share one budget.

Scores are ranked over all heads of a layer together, so a head with dispersed attention keeps more tokens than one with
concentrated attention. A share ``floor`` of the mean budget is guaranteed to every head, by one of two rules:

* ``floor``, the authors': every head gets this share, and the rest of the budget is distributed in proportion to the
  numbers of tokens that the heads have among the best ones of the layer.
* ``safeguard``, kvpress' (``AdaKVPress``): the best tokens of every head, this share of the budget, are kept, and the
  rest of the budget goes to the best of all other tokens of the layer. The protected tokens count as best ones.

Use a storage for heads of different lengths (``method/storage=ragged``). With ``dense`` they are padded and the padding
counts as stored bytes. The authors' code rounds each head's budget independently, so that its total is off by a few
tokens; here the remainders go to the heads with the largest fractions, so that the total equals the budget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from ....conf.options import PositiveInt, Share
from ..ranking import indices_of, keep_mask
from .base import Allocator
from .pyramid import Pyramid


@dataclass(frozen=True)
class Adaptive(Allocator):
    """One budget for all heads of a layer.

    Attributes:
        floor: Share of the mean budget that every head keeps (alpha; 0.2 in the paper); 1 is uniform.
        layers: Allocation to layers: ``uniform``, or ``pyramid`` (Ada-PyramidKV in the paper).
        beta: Steepness of the pyramid; see :class:`.pyramid.Pyramid`.
        rule: How the share is guaranteed: ``floor`` or ``safeguard``, see above.
    """

    id: ClassVar[str] = "adaptive"
    heads_differ: ClassVar[bool] = True
    omitted_at: ClassVar[Mapping[str, Any]] = {"rule": "floor"}
    floor: Share = 0.2
    layers: Literal["uniform", "pyramid"] = "uniform"
    beta: PositiveInt = 20
    rule: Literal["floor", "safeguard"] = "floor"

    @property
    def label(self) -> str:
        return self.id if self.rule == "floor" else self.rule

    def layer_budgets(self, budget: int, protected: int, prompt_length: int, layers: int) -> Sequence[int]:
        if self.layers == "pyramid":
            return Pyramid(self.beta).layer_budgets(budget, protected, prompt_length, layers)
        return super().layer_budgets(budget, protected, prompt_length, layers)

    def head_budgets(
        self, scores: torch.Tensor, budget: int, ties: torch.Tensor | None = None, protected: int = 0
    ) -> torch.Tensor:
        if self.rule == "floor":
            return adaptive_budgets(scores, budget, self.floor, ties)
        return safeguarded_budgets(scores, budget, self.sure_of_each_head(budget, protected), ties)

    def sure_of_each_head(self, budget: int, protected: int) -> int:
        if self.rule == "floor":
            return int(self.floor * budget)
        n_safe = int(self.floor * (budget + protected))
        n_safe = max(n_safe, 1) if self.floor > 0 else 0
        return min(max(n_safe - protected, 0), budget)


def adaptive_budgets(scores: torch.Tensor, budget: int, floor: float, ties: torch.Tensor | None) -> torch.Tensor:
    """Allocate a budget to heads by ranking the tokens of all heads together.

    Args:
        scores: [R, H, N]; the largest are kept.
        budget: Mean over the heads.
        floor: Share of the mean that every head keeps.
        ties: [R, H, N] tie-breaking scores, or None.

    Returns:
        [R, H] int64 with a sum of H * ``budget`` per row. Of equal fractions, the lower head's is rounded up first.
    """
    _, heads, count = scores.shape
    best = keep_mask(scores.flatten(1), heads * budget, None if ties is None else ties.flatten(1))  # [R, H * N]
    top_counts = best.unflatten(1, (heads, count)).sum(-1).double()  # [R, H]
    shares = (1 - floor) * top_counts + floor * budget  # [R, H]
    budgets = shares.floor()
    remainder = (heads * budget - budgets.sum(-1)).round().long()  # [R], less than H
    rank = (shares - budgets).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1, stable=True)  # [R, H]
    return (budgets + (rank < remainder[:, None])).long()


def safeguarded_budgets(scores: torch.Tensor, budget: int, n_safe: int, ties: torch.Tensor | None) -> torch.Tensor:
    """Allocate a budget to heads by ranking all tokens but the ``n_safe`` best of each head together.

    Args:
        scores, budget, ties: See :func:`adaptive_budgets`.
        n_safe: Tokens that every head keeps, at most ``budget``.

    Returns:
        [R, H] int64 with a sum of H * ``budget`` per row.
    """
    _, heads, count = scores.shape
    others = indices_of(~keep_mask(scores, n_safe, ties), count - n_safe)  # [R, H, N - n_safe]
    scores = scores.gather(-1, others).flatten(1)  # [R, H * (N - n_safe)]
    ties = None if ties is None else ties.gather(-1, others).flatten(1)
    best = keep_mask(scores, heads * (budget - n_safe), ties)
    return n_safe + best.unflatten(1, (heads, -1)).sum(-1)
