"""One budget for all heads of all layers: scores are ranked over the whole cache at once.

KVzip (Kim et al., 2025, arXiv 2505.23416) evicts so: a layer or head whose scores are low keeps less. A share ``floor``
of every head's budget is safe from the others. Scores have to be comparable between layers; attention is, norms of keys
are not. Nothing can leave before the last layer has seen the prompt, so the peak of memory is that of the whole prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ....conf.options import Share
from .adaptive import shares_of
from .base import Allocator


@dataclass(frozen=True)
class Global(Allocator):
    """One budget for the cache.

    Attributes:
        floor: Share of the mean that every head keeps whatever the others score.
    """

    id: ClassVar[str] = "global"
    heads_differ: ClassVar[bool] = True
    spans_layers: ClassVar[bool] = True
    floor: Share = 0.2

    def cache_budgets(
        self, scores: Sequence[torch.Tensor], budget: int, ties: Sequence[torch.Tensor | None]
    ) -> list[torch.Tensor]:
        heads = [s.shape[1] for s in scores]
        whole = torch.cat(list(scores), dim=1)  # [R, L * H, N]
        second = None if ties[0] is None else torch.cat([t for t in ties if t is not None], dim=1)
        return list(shares_of(whole, budget, self.floor, second).split(heads, dim=1))
