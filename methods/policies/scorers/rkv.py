"""R-KV (Cai et al., 2025, arXiv 2505.24133): keep important tokens that no later one repeats, for long reasoning.

Section 3. The score of a token is ``weight * I - (1 - weight) * U``, with

* the importance I: attention of the last ``window`` queries. The largest logit of the query heads of a group counts,
  the softmax is over the tokens before the window only, and its mean over the queries is max-pooled;
* the redundancy U: the softmax over all tokens of the mean cosine of a token's key with the other keys. For each key,
  the last of the keys more similar to it than ``similarity`` is left out, so that of several similar tokens the most
  recent one is not held to be redundant. In the published code a key without similar ones leaves out the first token.

The authors compress every 128 tokens while decoding, and the prompt. The products of all pairs of keys are computed in
blocks, in memory linear in the number of tokens; the time is quadratic.

Legend: R rows of one prompt length, H_kv KV heads, g query heads per KV head, w window, T tokens, D channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from ....conf.errors import require
from ....conf.options import PositiveInt, Share
from ....conf.versions import CURRENT_VERSIONS
from ...cache.prompt import Prompt
from ...cache.prompt_attention import window_attention_of_groups
from ..pooling import pool
from ..schedules.base import Schedule
from ..schedules.every_n import EveryN
from .base import Scorer

BLOCK_KEYS = 512
"""Rows of the matrix of cosines that are computed at once."""
SMALLEST_NORM = 1e-8


@dataclass(frozen=True)
class RKV(Scorer):
    """Importance minus redundancy.

    Attributes:
        window: Number of last queries whose attention counts; a policy protects as many last tokens.
        kernel: Width of the max-pooling, odd; 1 disables it.
        weight: Weight of the importance (lambda); the redundancy has the rest.
        similarity: Cosine above which two keys are similar.
        shields_first: Keys without similar ones leave out the first token, as in the published code.
    """

    id: ClassVar[str] = "RKV"
    name: ClassVar[str] = "rkv"
    version: ClassVar[int] = CURRENT_VERSIONS["RKV"]
    omitted_at: ClassVar[Mapping[str, Any]] = {"shields_first": False}
    default_schedule: ClassVar[Schedule] = EveryN()
    may_be_negative: ClassVar[bool] = True
    window: PositiveInt = 8
    kernel: PositiveInt = 7
    weight: Share = 0.07
    similarity: Share = 0.5
    shields_first: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = "must be an odd number >= 1 (an even kernel would shift the scores)"
        require(self.kernel % 2 == 1, "method.scorer.kernel", self.kernel, allowed)

    @property
    def observation_window(self) -> int:
        return self.window

    def protected_recent(self) -> int:
        return self.window

    def score(self, prompt: Prompt, state: Any = None) -> torch.Tensor:
        observed = prompt.query.shape[2]
        importance = prompt.cached(f"importance {self.kernel}", self._importance)  # [R, H_kv, T - w]
        redundancy = prompt.cached(f"redundancy {self.similarity} {self.shields_first}", self._redundancy)
        scores = self.weight * importance - (1 - self.weight) * redundancy[..., : prompt.length - observed]
        return F.pad(scores, (0, observed))  # [R, H_kv, T]

    def _importance(self, prompt: Prompt) -> torch.Tensor:
        """Return the pooled attention of the window to the tokens before it, [R, H_kv, T - w]."""
        attention = window_attention_of_groups(prompt, largest_logits=True, prefix_only=True)  # [R, H_kv, w, T - w]
        return pool(attention.mean(dim=2), self.kernel, "max")

    def _redundancy(self, prompt: Prompt) -> torch.Tensor:
        """Return the redundancy of all tokens, [R, H_kv, T]."""
        keys = prompt.keys.float()
        directions = keys / (keys.norm(dim=-1, keepdim=True) + SMALLEST_NORM)  # [R, H_kv, T, D]
        length = prompt.length
        column = torch.arange(length, device=keys.device)
        sums = torch.zeros(keys.shape[:3], device=keys.device)  # [R, H_kv, T]
        for start in range(0, length, BLOCK_KEYS):
            rows = directions[:, :, start : start + BLOCK_KEYS]
            cosines = rows @ directions.mT  # [R, H_kv, n, T]
            diagonal = torch.arange(rows.shape[2], device=keys.device)
            cosines[:, :, diagonal, start + diagonal] = 0.0
            is_similar = cosines > self.similarity
            last_similar = (is_similar * column).amax(dim=-1, keepdim=True)  # [R, H_kv, n, 1], 0 without one
            remaining = torch.zeros_like(cosines[..., :1])
            if not self.shields_first:  # without a similar key, the first token keeps its cosine
                remaining = cosines[..., :1].masked_fill(is_similar.any(dim=-1, keepdim=True), 0.0)
            sums += cosines.scatter(-1, last_similar, remaining).sum(dim=2)
        return (sums / length).softmax(dim=-1)
