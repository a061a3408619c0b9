"""FINCH (Corallo and Papotti, TACL 2024): the attention of the question's tokens scores the tokens before them.

The prompt ends with the question, whose ``window`` queries score all tokens before it. A query at a low
position shares its attention among fewer tokens, so each query's attention is multiplied by its position
(``normalize``), and then averaged over the queries and the query heads of a group. Scores are not pooled.

The published code reads the prompt in segments, scores what it holds again with each segment, keeps the same tokens in
all heads, and moves the kept keys to consecutive positions; the normalization in it is without effect. Here, as in
kvpress, the whole prompt is scored once and per KV head, and keys keep their positions. With the heads of a layer
alike: ``method=chunkkv`` over this scorer, ``method.scorer.chunk=1``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ....conf.options import PositiveInt
from ...cache.prompt import Prompt
from ...cache.prompt_attention import window_sums
from .base import Scorer


@dataclass(frozen=True)
class FINCH(Scorer):
    """Attention of the question, each query's weighted by its position.

    Attributes:
        window: Tokens of the question, at the end of the prompt. They are what a policy protects unless it says
            otherwise.
        normalize: Multiply the attention of a query by its position.
    """

    id: ClassVar[str] = "FINCH"
    name: ClassVar[str] = "finch"
    window: PositiveInt = 32
    normalize: bool = True

    @property
    def observation_window(self) -> int:
        return self.window

    def protected_recent(self) -> int:
        return self.window

    def score(self, prompt: Prompt, state: Any = None) -> torch.Tensor:
        w, position = prompt.query.shape[2], None
        if self.normalize:
            position = torch.arange(prompt.length - w, prompt.length, dtype=torch.float32, device=prompt.query.device)
        scores = window_sums(prompt, position) / w  # [R, H_q, T]
        return prompt.reduce_groups(scores)  # [R, H_kv, T]
