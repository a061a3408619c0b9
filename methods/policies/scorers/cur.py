"""CurDKV (Sengupta et al., 2025, arXiv 2509.15038): keep the tokens whose keys and values are long.

A CUR decomposition approximates a matrix by some of its rows, chosen by their leverage scores. The published code
replaces the leverage scores of keys and values by squared row norms, which need no decomposition. They are divided by
their sums over blocks of ``local`` tokens, so that tokens compete with their neighbours, and multiplied. Long keys are
kept, where :mod:`.key_norm` keeps short ones. No query is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F

from ....conf.options import NonNegativeInt, PositiveInt
from ...cache.prompt import Prompt
from ..own_sinks import ScorerWithSinks

SMALLEST_SUM = 1e-30
"""Sums below it are zero: a block of zero vectors has zero scores."""


@dataclass(frozen=True)
class CUR(ScorerWithSinks):
    """Squared norms of keys and values, relative to those of their neighbours.

    Attributes:
        norms: Which norms are the score: their ``product``, their ``mean``, or those of ``key`` or ``value`` alone.
        local: Tokens of a block by whose sum the norms are divided; None: no blocks.
        sinks: Default for the policy's ``sinks``.
    """

    id: ClassVar[str] = "CUR"
    name: ClassVar[str] = "cur"
    norms: Literal["product", "mean", "key", "value"] = "product"
    local: PositiveInt | None = 16
    sinks: NonNegativeInt | None = 4

    @property
    def weighs_values(self) -> str:
        return "" if self.norms == "key" else "norms=key"

    def score(self, prompt: Prompt, state: Any = None) -> torch.Tensor:
        keys, values = (self._relative(x.float().square().sum(-1)) for x in (prompt.keys, prompt.values))
        scores = {"product": keys * values, "mean": (keys + values) / 2, "key": keys, "value": values}[self.norms]
        return scores / scores.sum(-1, keepdim=True).clamp(min=SMALLEST_SUM)  # [R, H_kv, T]

    def _relative(self, norms: torch.Tensor) -> torch.Tensor:
        """Divide norms [R, H_kv, T] by the sums of their blocks; the last block may be shorter."""
        if self.local is None:
            return norms
        length = norms.shape[-1]
        padded = F.pad(norms, (0, -length % self.local)).unflatten(-1, (-1, self.local))  # [R, H_kv, blocks, local]
        return (padded / padded.sum(-1, keepdim=True).clamp(min=SMALLEST_SUM)).flatten(-2)[..., :length]
