"""First layers that keep the whole prompt; the others keep the budget, as in the paper of the L2 norm.

Devoto et al. (2024, arXiv 2406.11430, section 3) leave the first two layers whole. What these layers hold beyond the
budget is not taken from the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ....conf.options import PositiveInt
from .base import Allocator


@dataclass(frozen=True)
class WholeLayers(Allocator):
    """The budget everywhere but in the first layers.

    Attributes:
        first: Number of first layers that keep every token of the prompt.
    """

    id: ClassVar[str] = "whole_layers"
    first: PositiveInt = 2

    def layer_budgets(self, budget: int, protected: int, prompt_length: int, layers: int) -> Sequence[int]:
        whole = min(self.first, layers)
        return [prompt_length] * whole + [budget] * (layers - whole)
