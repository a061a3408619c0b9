"""KeyDiff (Park et al., 2025, arXiv 2504.15364): keep the keys that are least like the others.

Section 3.2: keys that point in the same direction as most share their attention, so the distinctive ones are worth
more. A token's score is minus the cosine between its key and the mean of all keys, each brought to length one first.
No query is looked at, so the score does not depend on the question. Here the prompt is evicted once; the paper also
evicts block by block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from ...cache.prefill import Prompt
from ..base import Budget, TopKSelection


@dataclass(frozen=True)
class KeyDiff(TopKSelection):
    """KeyDiff's score.

    Attributes:
        budget: tokens kept per head, window included, or a fraction of the prompt.
        window: last tokens that are always kept; 0 in the paper's own score.
    """

    id: ClassVar[str] = "KeyDiff"
    budget: Budget = 1024
    window: int = 0

    least_window: ClassVar[int] = 0

    def score(self, prompt: Prompt, state: Any) -> torch.Tensor:
        """Minus the cosine to the mean direction: [R, H_kv, T - window]."""
        directions = F.normalize(prompt.keys.float(), dim=-1)
        anchor = F.normalize(directions.mean(dim=2, keepdim=True), dim=-1)
        scores = -(directions * anchor).sum(-1)
        return scores[..., : prompt.length - self.window]
