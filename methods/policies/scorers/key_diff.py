"""KeyDiff (Park et al., 2025, arXiv 2504.15364, section 3.2): keep the tokens whose keys differ most from the others.

The score of a token is minus the cosine between its key and the mean of all normalized keys. Similar keys share their
attention, so distinctive keys are more important. The score uses no queries, so it does not depend on the question. The
paper evicts block by block; here the prompt is compressed once.
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
    """Negative cosine similarity to the mean key direction."""

    id: ClassVar[str] = "KeyDiff"
    name: ClassVar[str] = "key_diff"
    may_be_negative: ClassVar[bool] = True
    recent_recorded_as: ClassVar[str] = "window"

    def score(self, prompt: Prompt, state: Any = None) -> torch.Tensor:
        directions = F.normalize(prompt.keys.float(), dim=-1)  # [R, H_kv, T, D]
        anchor = F.normalize(directions.mean(dim=2, keepdim=True), dim=-1)  # [R, H_kv, 1, D]
        return -(directions * anchor).sum(-1)  # [R, H_kv, T]
