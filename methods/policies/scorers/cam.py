"""CaM (Zhang et al., ICML 2024, openreview LCTmppB165): merge the values of evicted tokens into kept ones.

Tokens are scored and evicted as by H2O. Before a token leaves while decoding, its value is added, in equal shares, to
those of the next ``receivers`` kept tokens, with probability clamp(A / mean of the receivers' A, 0, 1), A the attention
received so far. Neither keys nor tokens evicted from the prompt are merged, as in the authors' code for generation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ....conf.options import NonNegativeInt, PositiveInt
from .attention_sums import AttentionSums


@dataclass(frozen=True)
class CaM(AttentionSums):
    """Accumulated attention of each token, and the rule of merging; see :class:`..merging.MergingScorer`.

    Attributes:
        receivers: Maximum number of kept tokens that share an evicted value.
        bernoulli: Merge with the probability above; False: if A is above the receivers' mean.
        seed: Random seed. The draws depend only on it, the prompt's tokens, the layer, the head and the eviction.
    """

    id: ClassVar[str] = "CaM"
    name: ClassVar[str] = "cam"
    merges_values: ClassVar[bool] = True
    receivers: PositiveInt = 32
    bernoulli: bool = True
    seed: NonNegativeInt = 0

    def is_merged(self, score: torch.Tensor, mean: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        """Return whether an evicted token is merged: bool [B, H, S]."""
        return score > (uniform * mean if self.bernoulli else mean)
