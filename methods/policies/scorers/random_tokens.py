"""Tokens kept at random beside the most recent ones: the baseline that any score must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ....conf.errors import require
from ...cache.prefill import Prompt
from ..base import Budget, TopKSelection


@dataclass(frozen=True)
class RandomTokens(TopKSelection):
    """Random scores.

    Attributes:
        budget: tokens kept per head, window included, or a fraction of the prompt.
        window: last tokens that are always kept; SnapKV's default, so that the vote is the only difference.
        seed: of the scores. They depend on it, the layer, the head and the prompt's length alone.
    """

    id: ClassVar[str] = "RandomTokens"
    budget: Budget = 1024
    window: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        seed, allowed = self.seed, "must be a whole number >= 0"
        require(isinstance(seed, int) and seed >= 0, "method.selection.seed", seed, allowed)

    def score(self, prompt: Prompt, state: Any) -> torch.Tensor:
        """Uniform numbers, the same for every row of a batch: [R, H_kv, T - window]."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + prompt.layer_idx)
        rows, heads, length, _ = prompt.keys.shape
        scores = torch.rand(heads, max(0, length - self.window), generator=generator)
        return scores.to(prompt.keys.device).expand(rows, -1, -1)
