"""Score tokens by position, so that the most recent are kept.

With ``method.sinks=4`` these are the tokens of StreamingLLM (arXiv 2309.17453). Keys keep their true positions;
``method=streaming_llm`` also re-positions them, as in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ...cache.prompt import Prompt
from .base import Scorer


@dataclass(frozen=True)
class Position(Scorer):
    """Index of the token in the prompt."""

    id: ClassVar[str] = "Position"
    name: ClassVar[str] = "position"
    scores_heads_alike: ClassVar[bool] = True

    def score(self, prompt: Prompt, state: Any = None) -> torch.Tensor:
        order = torch.arange(prompt.length, dtype=torch.float32, device=prompt.keys.device)
        return order.expand(prompt.keys.shape[0], 1, -1)  # [R, 1, T]
