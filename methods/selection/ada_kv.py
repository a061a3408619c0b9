"""Ada-KV (Feng et al., 2024, arXiv 2407.11550): the heads of a layer share one budget, and the best tokens win it.

Algorithm 1: SnapKV's votes are ranked over all heads of a layer at once, instead of head by head, so a head whose
attention is spread out gets more room than one that looks at a few tokens. A share ``floor`` of every head's budget is
safe from the others. The window's tokens stay in every head beside that. A layer's total is SnapKV's; with ``layers:
pyramid`` it is PyramidKV's (the paper's Ada-PyramidKV).

Heads of different lengths need a storage that holds them so (``method/storage=ragged``, the default here); with
``dense`` they are padded, and the padding is counted. The published code rounds each head by itself, so that its total
is off by a few tokens (``rounding: published``); here the remainders go to the largest fractions and the total is
exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from ...conf.errors import require
from ..prompt import Prompt
from ..storage.base import slots_that_stay
from .base import Kept, TopKSelection
from .pyramidkv import PyramidKV
from .ranking import keep_mask


@dataclass(frozen=True)
class AdaKV(PyramidKV):
    """Ada-KV's sharing.

    Attributes:
        budget: mean over the heads of the tokens kept, window included, or a fraction of the prompt.
        window: observation window (32 in the paper).
        floor: share of the mean that every head keeps whatever the others have (alpha; 0.2 in the paper); 1 is SnapKV.
        layers: ``uniform``, or ``pyramid``: PyramidKV's budgets over the layers, with ``beta``.
        rounding: ``exact`` or ``published``, of the heads' budgets and of the pyramid's.
        kernel, pooling, granularity, group_reduce, score_dtype: see :class:`.snapkv.SnapKV`.
    """

    id: ClassVar[str] = "AdaKV"
    window: int = 32
    floor: float = 0.2
    layers: str = "uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        at = "method.selection."
        floor = self.floor
        require(isinstance(floor, int | float) and 0 <= floor <= 1, at + "floor", floor, "must be between 0 and 1")
        require(self.layers in ("uniform", "pyramid"), at + "layers", self.layers, "must be uniform or pyramid")

    @property
    def heads_differ(self) -> bool:
        return True

    def layer_budgets(self, prompt_length: int, layers: int) -> Sequence[int]:
        if self.layers == "pyramid":
            return super().layer_budgets(prompt_length, layers)
        return TopKSelection.layer_budgets(self, prompt_length, layers)

    def select(self, prompt: Prompt, state: Any = None) -> Kept:
        budget = self.layer_budgets(prompt.length, prompt.num_layers)[prompt.layer_idx]
        window = min(self.window, budget)
        if prompt.length <= budget or budget == window:
            return super().select(prompt, state)
        scores, ties = self._candidates(prompt, state, prompt.length - window)  # [R, H, N]
        caps = self.head_budgets(scores, budget - window, ties)
        stay = F.pad(keep_mask(scores, caps, ties), (0, window), value=True)  # [R, H, T]
        return Kept(*slots_that_stay(stay))

    def head_budgets(self, scores: torch.Tensor, base: int, ties: torch.Tensor | None = None) -> torch.Tensor:
        """Tokens that each head keeps beside the window: [R, H] int64, adding up to H x ``base``.

        Args:
            scores: [R, H, N], pooled votes.
            base: the heads' mean.
            ties: [R, H, N], decides between equal scores; then the lower head does, then the lower index.
        """
        _, heads, count = scores.shape
        best = keep_mask(scores.flatten(1), heads * base, None if ties is None else ties.flatten(1))  # [R, H * N]
        won = best.unflatten(1, (heads, count)).sum(-1).double()  # [R, H]
        if self.rounding == "published":
            return ((1 - self.floor) * won + int(self.floor * base)).round().long().clamp(max=count)
        shares = (1 - self.floor) * won + self.floor * base
        caps = shares.floor()
        missing = (heads * base - caps.sum(-1)).round().long()  # [R], below the number of heads
        place = (shares - caps).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1, stable=True)
        return (caps + (place < missing[:, None])).long()
