"""Scissorhands (Liu et al., 2023, arXiv 2305.17118): evict the tokens that are below the mean attention most often.

Algorithm 2. A token loses a point for each of the last ``history`` queries whose attention weight for it is below
1 / t, where t is the number of tokens that the query sees. The tokens with the fewest lost points are kept; of equal
ones, the more recent. Half of a budget is evicted at once (``method/schedule=every_n method.schedule.n=0.5``). While
decoding the history reaches back to the last eviction: earlier queries saw tokens that have left since. With grouped
queries the weights are averaged over the query heads of a group.

Legend: R rows of one prompt length, H_kv KV heads, g query heads per KV head, n queries of a block, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ....conf.options import PositiveInt
from ...cache.prompt import Prompt
from ...cache.prompt_sums import attention_blocks
from .base import Scorer


@dataclass(frozen=True)
class Scissorhands(Scorer):
    """Minus the number of queries that attend to a token less than on average.

    Attributes:
        history: Number of last queries that are looked at; while decoding, at most those since the last eviction.
    """

    id: ClassVar[str] = "Scissorhands"
    name: ClassVar[str] = "scissorhands"
    default_recent: ClassVar[int | float] = 10
    may_be_negative: ClassVar[bool] = True
    history: PositiveInt = 400

    @property
    def observation_window(self) -> int:
        return self.history

    def queries_while_decoding(self, steps: int) -> int:
        return min(self.history, steps)

    def score(self, prompt: Prompt, state: Any = None) -> torch.Tensor:
        return prompt.cached("times below the mean attention", _times_below_mean)  # [R, H_kv, T]

    def tie_scores(self, prompt: Prompt, state: Any = None) -> torch.Tensor:
        """Return the positions: the more recent of equal tokens is kept."""
        index = torch.arange(prompt.length, dtype=torch.float32, device=prompt.keys.device)
        return index.expand(*prompt.keys.shape[:2], -1)


def _times_below_mean(prompt: Prompt) -> torch.Tensor:
    """Return minus the number of observed queries that attend to each token less than 1 / t: [R, H_kv, T]."""
    observed = prompt.query.shape[2]
    scores = torch.zeros(*prompt.keys.shape[:2], prompt.length, device=prompt.keys.device)
    for start, attention in attention_blocks(prompt, observed):  # [R, H_kv, g, n, columns]
        weights = attention.mean(dim=2)  # [R, H_kv, n, columns]
        first, columns = prompt.length - observed + start, weights.shape[3]
        seen = 1 + torch.arange(first, first + weights.shape[2], device=weights.device)[:, None]  # [n, 1]
        is_visible = torch.arange(columns, device=weights.device) < seen  # [n, columns]
        scores[..., :columns] -= ((weights < 1 / seen) & is_visible).sum(dim=2)
    return scores
