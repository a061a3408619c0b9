"""LagKV (Liang et al., 2025, arXiv 2504.04704): tokens that differ from those that follow them stay.

Section 3. After the first ``sinks`` tokens the sequence is cut into partitions of ``lag`` tokens. The keys and the
values of a partition are scaled, channel by channel, by the smallest and the largest entry of the next partition. The
standard deviation of a scaled token over its channels, in a softmax over its partition, says how much it stands out;
the score of a token is the rank of this number within its partition. So each partition keeps equally many tokens. The
last complete partition and the tokens after it have no next one: they have the largest score. No query is looked at.

The authors' code compresses each partition once, also while decoding, when the one after the next is complete. Here
the prompt is compressed as a whole, and a schedule that evicts while decoding cuts what is left into new partitions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ....conf.options import NonNegativeFloat, NonNegativeInt, PositiveInt
from ...cache.prompt import Prompt
from ..own_sinks import ScorerWithSinks


@dataclass(frozen=True)
class LagKV(ScorerWithSinks):
    """Rank of a token's spread, relative to the partition that follows its own.

    Attributes:
        lag: Tokens of a partition.
        sinks: First tokens, which are in no partition; what a policy protects unless it says otherwise.
        value_weight: Weight of the values' spread beside that of the keys.
        cross_scoring: The spread itself is the score, so that partitions and heads compete. In float32 and over long
            partitions these numbers are close to each other.
    """

    id: ClassVar[str] = "LagKV"
    name: ClassVar[str] = "lagkv"
    lag: PositiveInt = 128
    sinks: NonNegativeInt | None = 4
    value_weight: NonNegativeFloat = 1.0
    cross_scoring: bool = False

    def score(self, prompt: Prompt, state: Any = None) -> torch.Tensor:
        return prompt.cached(repr(self), self._scores)

    def tie_scores(self, prompt: Prompt, state: Any = None) -> torch.Tensor:
        """The position: of equal ranks in several partitions, and of the last tokens, the later one stays."""
        return _positions(prompt)

    def _scores(self, prompt: Prompt) -> torch.Tensor:
        """[R, H_kv, T]."""
        start = min(self.protected_sinks(), prompt.length)
        count = (prompt.length - start) // self.lag  # P, complete partitions
        if count < 2:  # no partition has a next one: the most recent tokens stay
            return _positions(prompt)
        end = start + count * self.lag
        keys, values = (
            x[:, :, start:end].float().unflatten(2, (count, self.lag))  # [R, H_kv, P, lag, D]
            for x in (prompt.keys, prompt.values)
        )
        spread = _relative_spread(keys) + self.value_weight * _relative_spread(values)  # [R, H_kv, P - 1, lag]
        if not self.cross_scoring:
            spread = spread.argsort(dim=-1, stable=True).argsort(dim=-1).float()  # 0 for the smallest of a partition
        largest = 1 + max(self.lag, self.value_weight)  # above every rank and spread
        scores = keys.new_full((*prompt.keys.shape[:2], prompt.length), largest)
        scores[:, :, start : end - self.lag] = spread.flatten(2)
        return scores


def _relative_spread(x: torch.Tensor) -> torch.Tensor:
    """Softmax within a partition of how its tokens spread over their channels: [..., P, lag, D] -> [..., P - 1, lag].

    A channel that has the same value in all tokens of the next partition does not count.
    """
    low = x[..., 1:, :, :].amin(dim=-2, keepdim=True)  # [..., P - 1, 1, D], of the next partition
    width = x[..., 1:, :, :].amax(dim=-2, keepdim=True) - low
    scaled = torch.where(width > 0, (x[..., :-1, :, :] - low) / width, 0.0)
    return scaled.std(dim=-1).softmax(dim=-1)


def _positions(prompt: Prompt) -> torch.Tensor:
    """[R, H_kv, T], the index of each token."""
    index = torch.arange(prompt.length, dtype=torch.float32, device=prompt.keys.device)
    return index.expand(*prompt.keys.shape[:2], -1)
