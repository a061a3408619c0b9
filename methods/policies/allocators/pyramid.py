"""PyramidKV (Cai et al., 2024, arXiv 2406.02069, section 4.2.1): lower layers keep more tokens than higher ones.

Let ``b`` be the budget without the protected tokens. The budgets decrease in an arithmetic progression from
``2b - b / beta`` in the first layer to ``b / beta`` in the last. For a prompt shorter than ``2b`` every layer keeps
``b``. The published code rounds every layer down, so that its total is off by up to 12 %; here the remainders go to the
layers with the largest fractions, so that the total equals the budget.

kvpress (``PyramidKVPress``) counts the protected tokens in ``b`` (``protected_tokens=counted``): the first layer keeps
at most the unprotected tokens of the prompt, and where the last one would keep less than the protected ones, every
layer keeps ``b``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ....conf.options import PositiveInt
from .base import Allocator


@dataclass(frozen=True)
class Pyramid(Allocator):
    """Budgets that decrease from layer to layer.

    Attributes:
        beta: Steepness: the last layer keeps ``b / beta`` unprotected tokens (20 in the paper); 1 is uniform.
        protected_tokens: ``added`` to the progression in every layer, as in the paper, or ``counted`` in it.
    """

    id: ClassVar[str] = "pyramid"
    omitted_at: ClassVar[Mapping[str, Any]] = {"protected_tokens": "added"}
    beta: PositiveInt = 20
    protected_tokens: Literal["added", "counted"] = "added"

    def layer_budgets(self, budget: int, protected: int, prompt_length: int, layers: int) -> Sequence[int]:
        is_added = self.protected_tokens == "added"
        base = budget - protected if is_added else budget
        first, last = self.ends(base, prompt_length - protected)
        is_flat = prompt_length < 2 * base if is_added else not first >= last >= protected
        if is_flat or layers == 1:
            return [budget] * layers
        # Integer arithmetic in units of 1 / (layers - 1), so that no result depends on floating-point rounding.
        shares = [first * (layers - 1) - layer * (first - last) for layer in range(layers)]
        budgets = [share // (layers - 1) for share in shares]
        by_fraction = sorted(range(layers), key=lambda layer: (-(shares[layer] % (layers - 1)), layer))
        for layer in by_fraction[: layers * base - sum(budgets)]:
            budgets[layer] += 1
        return [protected + budget for budget in budgets] if is_added else budgets

    def ends(self, base: int, candidates: int) -> tuple[int, int]:
        """Return the budgets of the first and the last layer, without the protected tokens.

        Args:
            base: Mean over the layers.
            candidates: Unprotected prompt tokens, the maximum of every layer's budget.
        """
        last = max(min(1, base), base // self.beta)
        first = min(2 * base - last, candidates)
        return first, 2 * base - first
