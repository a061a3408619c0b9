"""KeyDiff (Park et al., 2025, arXiv 2504.15364, section 3.2): the keys that are least like the others stay.

Keys that point in the same direction as most share their attention, so the distinctive ones are worth more. A token's
score is minus the cosine between its key and the mean of all keys, each normalized first. No query is looked at, so the
score does not depend on the question. The paper evicts block by block; here the prompt is evicted once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from ...cache.prompt import Prompt
from .base import Scorer


@dataclass(frozen=True)
class KeyDiff(Scorer):
    """Minus the cosine to the mean direction."""

    id: ClassVar[str] = "KeyDiff"
    name: ClassVar[str] = "key_diff"
    recent_recorded_as: ClassVar[str] = "window"

    def score(self, prompt: Prompt, state: Any = None) -> torch.Tensor:
        directions = F.normalize(prompt.keys.float(), dim=-1)  # [R, H_kv, T, D]
        anchor = F.normalize(directions.mean(dim=2, keepdim=True), dim=-1)  # [R, H_kv, 1, D]
        return -(directions * anchor).sum(-1)  # [R, H_kv, T]
