"""PyramidKV (Cai et al., 2024, arXiv 2406.02069): SnapKV's vote with more room in low layers and less in high ones.

The budget is the mean over the layers. The prefix budgets (what a layer keeps beside the window) fall in an arithmetic
progression from ``2b - b / beta`` in the first layer to ``b / beta`` in the last, with ``b = budget - window``; a
prompt shorter than ``2b`` is too short for a pyramid and every layer gets ``b``.

What the published code does differently: it rounds every layer down, so that its total is off by up to 12 %
(``rounding: published`` does the same); here the remainders go to the layers with the largest fractions and the total
is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ...conf.errors import require
from .base import resolve_budget
from .snapkv import SnapKV


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """PyramidKV's budgets on SnapKV's vote.

    Attributes:
        budget: mean over the layers of the tokens kept per head, window included, or a fraction of the prompt.
        window: observation window (8 in the paper).
        beta: how steep the pyramid is: the last layer's prefix budget is ``b / beta`` (20 in the paper); 1 is SnapKV.
        rounding: ``exact`` (the layers' budgets add up to ``layers x budget``) or ``published``.
        kernel, pooling, granularity, group_reduce, score_dtype: see :class:`.snapkv.SnapKV`.
    """

    id: ClassVar[str] = "PyramidKV"
    window: int = 8
    beta: int = 20
    rounding: str = "exact"

    def __post_init__(self) -> None:
        super().__post_init__()
        at = "method.selection."
        require(isinstance(self.beta, int) and self.beta >= 1, at + "beta", self.beta, "must be a whole number >= 1")
        require(self.rounding in ("exact", "published"), at + "rounding", self.rounding, "must be exact or published")

    def layer_budgets(self, prompt_length: int, layers: int) -> Sequence[int]:
        """Section 3.2 of the paper; the branches are the published code's."""
        budget = resolve_budget(self.budget, prompt_length)
        if prompt_length <= budget:
            return [prompt_length] * layers
        window = min(self.window, budget)
        base = budget - window
        if prompt_length < 2 * base or layers == 1:
            return [budget] * layers
        least = base // self.beta if self.rounding == "published" else max(min(1, base), base // self.beta)
        most = 2 * base - least
        if most >= prompt_length - window:
            most = prompt_length - window
            least = 2 * base - most
        if self.rounding == "published":
            step = (most - least) // (layers - 1)
            return [window + most - layer * step for layer in range(layers)]
        # In units of 1 / (layers - 1), so that the fractions are whole numbers and nothing depends on rounding.
        parts = [most * (layers - 1) - layer * (most - least) for layer in range(layers)]
        kept = [part // (layers - 1) for part in parts]
        by_fraction = sorted(range(layers), key=lambda layer: (-(parts[layer] % (layers - 1)), layer))
        for layer in by_fraction[: layers * base - sum(kept)]:
            kept[layer] += 1
        return [window + k for k in kept]
