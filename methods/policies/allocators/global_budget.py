"""One budget for all heads of all layers: scores are ranked over the whole cache, as in KVzip.

KVzip (Kim et al., 2025, arXiv 2505.23416): layers and heads with lower scores keep fewer tokens. A share ``floor`` of
the mean budget is guaranteed to every head. Scores must be comparable between layers: attention weights are, key norms
are not. No token is evicted before the last layer has prefilled, so peak memory is that of the uncompressed prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ....conf.options import Share
from .adaptive import adaptive_budgets
from .base import Allocator


@dataclass(frozen=True)
class Global(Allocator):
    """One budget for the whole cache.

    Attributes:
        floor: Share of the mean budget that every head keeps.
    """

    id: ClassVar[str] = "global"
    heads_differ: ClassVar[bool] = True
    spans_layers: ClassVar[bool] = True
    floor: Share = 0.0

    def sure_of_each_head(self, budget: int, protected: int) -> int:
        return int(self.floor * budget)

    def cache_budgets(
        self, scores: Sequence[torch.Tensor], budget: int, ties: Sequence[torch.Tensor | None]
    ) -> list[torch.Tensor]:
        heads = [s.shape[1] for s in scores]
        all_scores = torch.cat(list(scores), dim=1)  # [R, L * H, N]
        all_ties = None if ties[0] is None else torch.cat([t for t in ties if t is not None], dim=1)
        return list(adaptive_budgets(all_scores, budget, self.floor, all_ties).split(heads, dim=1))
