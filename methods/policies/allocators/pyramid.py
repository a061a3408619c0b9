"""PyramidKV's budgets (Cai et al., 2024, arXiv 2406.02069, section 3.2): low layers keep more tokens than high ones.

With ``b`` the budget beside the protected tokens, the layers' budgets fall in an arithmetic progression from
``2b - b / beta`` in the first layer to ``b / beta`` in the last. A prompt shorter than ``2b`` is too short for a
pyramid, and every layer keeps ``b``. The published code rounds every layer down, so that its total is off by up to
12 %; here the remainders go to the layers with the largest fractions, and the total is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ....conf.options import PositiveInt
from .base import Allocator


@dataclass(frozen=True)
class Pyramid(Allocator):
    """Budgets that fall from layer to layer.

    Attributes:
        beta: Steepness: the last layer keeps ``b / beta`` beside the protected tokens (20 in the paper); 1 is uniform.
    """

    id: ClassVar[str] = "pyramid"
    beta: PositiveInt = 20

    def layer_budgets(self, budget: int, protected: int, prompt_length: int, layers: int) -> Sequence[int]:
        base = budget - protected
        if prompt_length < 2 * base or layers == 1:
            return [budget] * layers
        first, last = self.ends(base, prompt_length - protected)
        # In units of 1 / (layers - 1), so that the fractions are whole numbers and nothing depends on rounding.
        parts = [first * (layers - 1) - layer * (first - last) for layer in range(layers)]
        kept = [part // (layers - 1) for part in parts]
        by_fraction = sorted(range(layers), key=lambda layer: (-(parts[layer] % (layers - 1)), layer))
        for layer in by_fraction[: layers * base - sum(kept)]:
            kept[layer] += 1
        return [protected + k for k in kept]

    def ends(self, base: int, candidates: int) -> tuple[int, int]:
        """Budgets of the first and the last layer beside the protected tokens.

        Args:
            base: mean over the layers.
            candidates: tokens there are to keep, which no layer can exceed.
        """
        last = max(min(1, base), base // self.beta)
        first = min(2 * base - last, candidates)
        return first, 2 * base - first
