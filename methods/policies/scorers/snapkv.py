"""SnapKV (Li et al., 2024, arXiv 2404.14469): score tokens by the attention of the prompt's last queries.

Section 4.1 and Listing 1 of the paper:

1. Compute the attention weights of the last ``window`` queries over the whole prompt.
2. Sum them over the queries: one score for each earlier token and head.
3. Pool the scores along the sequence, so that the neighbours of a peak are kept with it.
4. Keep the top-scoring tokens of each head and the window itself (:class:`..prompt_eviction.PromptEviction`).

By default the prompt is compressed once and all generated tokens are kept. The published code repeats each KV
head for its query heads before compression, so a token takes H_q / H_kv times the bytes that it takes here.
``granularity=query_head`` reproduces this and counts those bytes.

SnapKV-D (arXiv 2512.12008) applies the same scores at every decode step. The baseline of that kind in the R-KV
repository has another softmax: ``group_reduce=max_logits softmax=prefix``, the importance of :mod:`.rkv`.

Legend: R rows of one prompt length, H_q query heads, H_kv KV heads, H stored heads, w window, T prompt tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F

from ....conf.errors import require
from ....conf.options import PositiveInt
from ...cache.prompt import Prompt
from ...cache.prompt_attention import window_attention, window_attention_of_groups, window_sums
from ..pooling import pool
from .base import Scorer


@dataclass(frozen=True)
class SnapKV(Scorer):
    """Pooled attention of an observation window.

    Attributes:
        window: Number of last queries whose attention scores the tokens (paper: 32 for LongBench, 16 for needles). By
            default the policy protects the tokens of these queries.
        kernel: Pooling width, odd; 1 disables pooling (paper: 7 for LongBench, 5 for needles).
        pooling: ``max`` or ``avg``.
        granularity: ``kv_head``: one score per KV head; ``query_head``: one per query head, as in the published code.
        group_reduce: Reduction of scores over the query heads of a KV head: ``mean``, ``max`` or ``sum``; or
            ``max_logits``: the largest of their logits, before the softmax.
        score_dtype: Precision of the attention before the sum: ``float32``, or ``model``: the model's dtype, as in
            the published code.
        softmax: Tokens in the softmax: ``all`` that a query sees, or ``prefix``: those before the window only.
    """

    id: ClassVar[str] = "SnapKV"
    name: ClassVar[str] = "snapkv"
    omitted_at: ClassVar[Mapping[str, Any]] = {"softmax": "all"}
    window: PositiveInt = 32
    kernel: PositiveInt = 7
    pooling: Literal["max", "avg"] = "max"
    granularity: Literal["kv_head", "query_head"] = "kv_head"
    group_reduce: Literal["mean", "max", "sum", "max_logits"] = "mean"
    score_dtype: Literal["float32", "model"] = "float32"
    softmax: Literal["all", "prefix"] = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = "must be an odd number >= 1 (an even kernel would shift the scores)"
        require(self.kernel % 2 == 1, "method.scorer.kernel", self.kernel, allowed)
        allowed = "must be mean, max or sum: with granularity=query_head no heads share their logits"
        shares = self.group_reduce == "max_logits" and self.stores_query_heads
        require(not shares, "method.scorer.group_reduce", self.group_reduce, allowed)

    @property
    def observation_window(self) -> int:
        return self.window

    @property
    def stores_query_heads(self) -> bool:
        return self.granularity == "query_head"

    def protected_recent(self) -> int:
        return self.window

    def score(self, prompt: Prompt, state: Any = None) -> torch.Tensor:
        return prompt.cached(f"scores of {self}", self._pooled_scores)  # once for all budgets of one prefill

    def tie_scores(self, prompt: Prompt, state: Any = None) -> torch.Tensor | None:
        """Return the scores before pooling: max pooling gives a peak and its neighbours equal scores."""
        return None if self.kernel == 1 else prompt.cached(f"unpooled scores of {self}", self._unpooled_scores)

    def _pooled_scores(self, prompt: Prompt) -> torch.Tensor:
        """Return the pooled scores, [R, H, T], zero for the window."""
        w = prompt.query.shape[2]
        unpooled = prompt.cached(f"unpooled scores of {self}", self._unpooled_scores)[..., : prompt.length - w]
        return F.pad(pool(unpooled, self.kernel, self.pooling), (0, w))

    def _unpooled_scores(self, prompt: Prompt) -> torch.Tensor:
        """Return the attention that tokens receive from the window, per stored head: [R, H, T], zero for the window."""
        largest_logits, w = self.group_reduce == "max_logits", prompt.query.shape[2]
        form = f"{'largest logits, ' if largest_logits else ''}softmax over {self.softmax}"
        sums = prompt.cached(f"window sums in {self.score_dtype}, {form}", self._window_sums)
        sums = sums[..., : prompt.length - w]  # [R, H_q, T - w], or one row per KV head
        is_reduced = self.stores_query_heads or largest_logits
        return F.pad(sums if is_reduced else prompt.reduce_groups(sums, self.group_reduce), (0, w))

    def _window_sums(self, prompt: Prompt) -> torch.Tensor:
        """Return the attention weights summed over the window's queries: [R, H_q, T], or per KV head, or only T - w."""
        largest_logits = self.group_reduce == "max_logits"
        if self.softmax == "prefix" or largest_logits:
            attention = window_attention_of_groups(prompt, largest_logits, self.softmax == "prefix")
        elif self.score_dtype == "float32":
            return window_sums(prompt)
        else:
            attention = prompt.cached("window_attention", window_attention)  # [R, H_q, w, T]
        if self.score_dtype == "model":
            attention = attention.to(prompt.query.dtype)
        return attention.sum(dim=2).to(torch.promote_types(attention.dtype, torch.float32))
