"""SnapKV (Li et al., 2024, arXiv 2404.14469): the attention of the prompt's last queries scores the tokens before them.

Section 3 and Listing 1 of the paper. For each earlier token, the attention that the last ``window`` queries pay to it
is summed over those queries and smoothed along the sequence by 1-D pooling, so that the neighbours of a peak stay with
it. The best tokens of every head are kept together with the window itself. Compression happens once, after the layer's
own attention over the whole prompt; generated tokens are all kept.

The published code expands the KV heads to query heads before it compresses, so its cache is H_q / H_kv times larger
than its token count says. ``granularity=query_head`` does the same and counts those bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F

from ....conf.errors import require
from ....conf.options import PositiveInt
from ...cache.prompt import Prompt
from ...cache.prompt_attention import window_attention
from .base import Scorer


@dataclass(frozen=True)
class SnapKV(Scorer):
    """Pooled attention of an observation window.

    Attributes:
        window: Last queries whose attention scores the tokens (32 for LongBench, 16 for needles). Their own tokens are
            what a policy protects unless it says otherwise.
        kernel: Width of the pooling, odd; 1 switches it off (7 for LongBench, 5 for needles).
        pooling: ``max`` or ``avg``. Max pooling gives a peak and its neighbours one score; the peak itself stays first.
        granularity: ``kv_head`` scores and stores per KV head; ``query_head`` is the published variant.
        group_reduce: Reduction of the scores of a group's query heads to their KV head: ``mean``, ``max`` or ``sum``.
        score_dtype: ``float32``; or ``model``, whose precision the published code rounds the attention to before it is
            summed.
    """

    id: ClassVar[str] = "SnapKV"
    name: ClassVar[str] = "snapkv"
    window: PositiveInt = 32
    kernel: PositiveInt = 7
    pooling: Literal["max", "avg"] = "max"
    granularity: Literal["kv_head", "query_head"] = "kv_head"
    group_reduce: Literal["mean", "max", "sum"] = "mean"
    score_dtype: Literal["float32", "model"] = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = "must be an odd number >= 1 (an even kernel would shift the scores)"
        require(self.kernel % 2 == 1, "method.scorer.kernel", self.kernel, allowed)

    @property
    def observation_window(self) -> int:
        return self.window

    @property
    def stores_query_heads(self) -> bool:
        return self.granularity == "query_head"

    def protected_recent(self) -> int:
        return self.window

    def score(self, prompt: Prompt, state: Any = None) -> torch.Tensor:
        observed = prompt.query.shape[2]
        return F.pad(pool(self._unpooled(prompt), self.kernel, self.pooling), (0, observed))  # [R, H, T]

    def tie_scores(self, prompt: Prompt, state: Any = None) -> torch.Tensor | None:
        """The scores before pooling, so that of a peak and its neighbours the peak stays."""
        return None if self.kernel == 1 else F.pad(self._unpooled(prompt), (0, prompt.query.shape[2]))

    def _unpooled(self, prompt: Prompt) -> torch.Tensor:
        """Attention received by the tokens before the window, reduced to the stored heads: [R, H, T - w]."""
        scores = prompt.cached(f"window sums in {self.score_dtype}", self._window_sums)  # [R, H_q, T]
        scores = scores[..., : prompt.length - prompt.query.shape[2]]
        return scores if self.stores_query_heads else reduce_groups(scores, prompt.groups, self.group_reduce)

    def _window_sums(self, prompt: Prompt) -> torch.Tensor:
        attention = prompt.cached("window_attention", window_attention)  # [R, H_q, w, T]
        if self.score_dtype == "model":
            attention = attention.to(prompt.query.dtype)
        return attention.sum(dim=2).to(torch.promote_types(attention.dtype, torch.float32))


def reduce_groups(scores: torch.Tensor, groups: int, how: str) -> torch.Tensor:
    """[R, H_q, N] -> [R, H_kv, N]: the query heads of a group reduced by ``mean``, ``max`` or ``sum``."""
    grouped = scores.unflatten(1, (-1, groups))
    if how == "max":
        return grouped.amax(dim=2)
    return grouped.mean(dim=2) if how == "mean" else grouped.sum(dim=2)


def pool(scores: torch.Tensor, kernel: int, how: str) -> torch.Tensor:
    """1-D pooling along the last dimension, same length; ``avg`` counts the zero padding in its divisor."""
    if kernel == 1:
        return scores
    pooling = F.max_pool1d if how == "max" else F.avg_pool1d
    return pooling(scores, kernel, stride=1, padding=kernel // 2)
