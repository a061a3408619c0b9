"""Random scores: the baseline that every other scorer has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ....conf.options import NonNegativeInt
from ...cache.prompt import Prompt
from .base import Scorer


@dataclass(frozen=True)
class RandomTokens(Scorer):
    """Uniform random numbers.

    Attributes:
        seed: Random seed. The scores depend only on it, the layer, the head and the number of tokens.
    """

    id: ClassVar[str] = "RandomTokens"
    name: ClassVar[str] = "random"
    recent_recorded_as: ClassVar[str] = "window"
    default_recent: ClassVar[int | float] = 32  # SnapKV's window, so that the scores are the only difference
    seed: NonNegativeInt = 0

    def score(self, prompt: Prompt, state: Any = None) -> torch.Tensor:
        """Return random scores [R, H_kv, T], equal for all rows of a batch."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + prompt.layer_idx)
        rows, heads, length, _ = prompt.keys.shape
        candidates = max(0, length - prompt.protected)
        scores = torch.rand(heads, candidates, generator=generator)  # [H_kv, T - protected], as recorded runs drew them
        scores = torch.nn.functional.pad(scores, (0, length - candidates))
        return scores.to(prompt.keys.device).expand(rows, -1, -1)
