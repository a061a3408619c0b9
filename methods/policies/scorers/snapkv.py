"""SnapKV (Li et al., 2024, arXiv 2404.14469): the prompt's last queries vote for the tokens worth keeping.

Section 3 and Listing 1 of the paper: the attention that the last ``window`` queries pay to each earlier token is
summed over those queries, smoothed along the sequence by 1-D pooling (so that the neighbours of a hit stay with it),
and the ``budget - window`` best tokens of every head are kept beside the window itself. Compression happens once,
after the layer's own attention over the whole prompt; generated tokens are all kept.

What the published code does differently: it expands the KV heads to query heads before compressing, so its cache is
H_q / H_kv times larger than its token count says (``granularity=query_head`` does the same and counts those bytes).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from ....conf.errors import require
from ...cache.prefill import Prompt
from ..base import Budget, TopKSelection


@dataclass(frozen=True)
class SnapKV(TopKSelection):
    """SnapKV's vote.

    Attributes:
        budget: tokens kept per head, window included (the paper's max_capacity_prompt), or a fraction of the prompt.
        window: observation window; its queries vote and its tokens are kept (32 for LongBench, 16 for needles).
        kernel: width of the pooling, odd; 1 switches it off (7 for LongBench, 5 for needles).
        pooling: ``max`` or ``avg``. Max pooling gives a peak and its neighbours one score; the peak itself stays first.
        granularity: ``kv_head`` votes and stores per KV head; ``query_head`` is the published variant.
        group_reduce: how the query heads of a group are reduced to their KV head's vote: ``mean``, ``max`` or ``sum``.
        score_dtype: ``float32``; or ``model``, whose precision the published code rounds the attention to before it is
            summed.
    """

    id: ClassVar[str] = "SnapKV"
    budget: Budget = 1024
    window: int = 32
    kernel: int = 7
    pooling: str = "max"
    granularity: str = "kv_head"
    group_reduce: str = "mean"
    score_dtype: str = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        at = "method.selection."
        require(
            isinstance(self.kernel, int) and self.kernel >= 1 and self.kernel % 2 == 1,
            at + "kernel",
            self.kernel,
            "must be an odd number >= 1 (an even kernel would shift the votes)",
        )
        require(self.pooling in ("max", "avg"), at + "pooling", self.pooling, "must be max or avg")
        require(
            self.granularity in ("kv_head", "query_head"),
            at + "granularity",
            self.granularity,
            "must be kv_head or query_head",
        )
        require(
            self.group_reduce in ("mean", "max", "sum"),
            at + "group_reduce",
            self.group_reduce,
            "must be mean, max or sum",
        )
        dtype = self.score_dtype
        require(dtype in ("float32", "model"), at + "score_dtype", dtype, "must be float32 or model")

    @property
    def observation_window(self) -> int:
        return self.window

    @property
    def stores_query_heads(self) -> bool:
        return self.granularity == "query_head"

    def score(self, prompt: Prompt, state: Any = None) -> torch.Tensor:
        """Pooled votes of the tokens before the window: [R, H, T - w], float32, H stored heads."""
        return pool(self._head_votes(prompt), self.kernel, self.pooling)

    def tie_scores(self, prompt: Prompt, state: Any = None) -> torch.Tensor | None:
        """The votes before pooling, so that of a peak and its neighbours the peak stays."""
        return None if self.kernel == 1 else self._head_votes(prompt)

    def _head_votes(self, prompt: Prompt) -> torch.Tensor:
        """Votes before pooling, reduced to the stored heads: [R, H, T - w]."""
        votes = prompt.cached(f"votes in {self.score_dtype}", self._votes)  # [R, H_q, T]
        votes = votes[..., : prompt.length - prompt.query.shape[2]]
        if not self.stores_query_heads:
            votes = reduce_groups(votes, prompt.groups, self.group_reduce)
        return votes

    def _votes(self, prompt: Prompt) -> torch.Tensor:
        attention = prompt.cached("window_attention", window_attention)
        if self.score_dtype == "model":
            attention = attention.to(prompt.query.dtype)
        return attention.sum(dim=2).to(torch.promote_types(attention.dtype, torch.float32))


def window_attention(prompt: Prompt) -> torch.Tensor:
    """Attention probabilities of the last w queries over the whole prompt: [R, H_q, w, T], float32.

    The softmax runs over all T tokens; inside the window it is causal. Products are taken in the compute dtype, group
    by group without expanding the keys, and the softmax in float32.
    """
    rows, query_heads, w, dim = prompt.query.shape
    heads, length = prompt.keys.shape[1], prompt.length
    grouped = prompt.query.reshape(rows, heads, prompt.groups * w, dim)
    logits = (grouped @ prompt.keys.transpose(-1, -2)).reshape(rows, query_heads, w, length)
    logits = prompt.rule.logits(logits.to(torch.promote_types(logits.dtype, torch.float32)))
    hide_future(logits.view(rows, heads, prompt.groups, w, length), length - w, prompt.strictly_causal)
    return attention_from(logits, prompt)


def hide_future(logits: torch.Tensor, first: int, strictly_causal: torch.Tensor | None) -> None:
    """Mask, in place, what queries do not see.

    Args:
        logits: [R, H_kv, g, n, columns], of the queries of positions ``first`` .. ``first + n - 1``.
        first: see there; columns from there on are the queries' own.
        strictly_causal: [g] bool, query heads whose tokens do not see themselves; None: all do.
    """
    n = logits.shape[3]
    future = torch.ones(n, n, dtype=torch.bool, device=logits.device).triu(1)
    if strictly_causal is not None:
        future = future | (strictly_causal[:, None, None] & torch.eye(n, dtype=torch.bool, device=logits.device))
    logits[..., first : first + n].masked_fill_(future, float("-inf"))


def attention_from(logits: torch.Tensor, prompt: Prompt) -> torch.Tensor:
    """Softmax over the last dimension of masked logits [R, H_q, n, T] or [R, H_kv, g, n, T], sinks in the normalizer.

    Fully masked rows (the first token under strictly causal masking) get zero weights instead of NaN.
    """
    weights = prompt.rule.weights(logits, head_dims=logits.dim() - 3)
    return weights if prompt.strictly_causal is None else weights.nan_to_num(0.0)


def reduce_groups(votes: torch.Tensor, groups: int, how: str) -> torch.Tensor:
    """[R, H_q, N] -> [R, H_kv, N]: the query heads of a group reduced by ``mean``, ``max`` or ``sum``."""
    grouped = votes.unflatten(1, (-1, groups))
    if how == "max":
        return grouped.amax(dim=2)
    return grouped.mean(dim=2) if how == "mean" else grouped.sum(dim=2)


def pool(votes: torch.Tensor, kernel: int, how: str) -> torch.Tensor:
    """1-D pooling along the last dimension, same length; ``avg`` counts the zero padding in its divisor."""
    if kernel == 1:
        return votes
    pooling = F.max_pool1d if how == "max" else F.avg_pool1d
    return pooling(votes, kernel, stride=1, padding=kernel // 2)
