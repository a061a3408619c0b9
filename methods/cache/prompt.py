"""The prompt of one layer: the input of policies and scorers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from .logits import LogitRule

ALL_QUERIES = sys.maxsize
"""Observation window of a method that needs every query of the prompt."""


@dataclass(frozen=True)
class Prompt:
    """The whole prompt at one layer, for batch rows of one length, without pads.

    Attributes:
        query: [R, H_q, W, D], queries of the last W tokens, after RoPE. W is the policy's ``observation_window``, or T
            if the prompt is shorter. If several layers of the model attend over these keys, H_q counts the heads of
            all of them, grouped by KV head.
        keys, values: [R, H_kv, T, D], keys after RoPE.
        rule: How logits are computed.
        layer_idx, num_layers: Index of the cache layer and number of cache layers of its kind.
        strictly_causal: [H_q / H_kv] bool, True for the query heads of a group that do not attend to their own token;
            None: all do.
        protected: Number of last tokens that are kept whatever their scores.
        kept: Number of tokens that the layer keeps, as the mean over its heads; None: T.
        seen: Tokens of the text so far, if more than T (while decoding, or if the layer gets only some); None: T.
        rows: [R] int64, places of the rows in the batch; None: they are the whole batch.
        text_seeds: [R] int64, hashes of the rows' tokens, for scorers that draw random numbers; None: unknown.
        question_tokens: Number of last tokens that are the question; None: unknown, or there is none.
        logsumexp: [R, H_q, W] float32, log-sum-exp of each query's logits over the tokens that it attends to; None: not
            known.
        memo: Results of :meth:`cached`, shared by the methods that share the prefill.
    """

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    rule: LogitRule
    layer_idx: int
    num_layers: int
    strictly_causal: torch.Tensor | None = None
    protected: int = 0
    kept: int | None = None
    seen: int | None = None
    logsumexp: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    text_seeds: torch.Tensor | None = None
    question_tokens: int | None = None
    memo: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict, compare=False, repr=False)

    def cached(self, name: str, compute: Callable[[Prompt], torch.Tensor]) -> torch.Tensor:
        """Return ``compute(self)``, computed on the first call with this name; do not modify the result in place.

        Args:
            name: Cache key. Together with W it must identify everything that the result depends on.
        """
        key = (name, self.query.shape[2])
        if key not in self.memo:
            self.memo[key] = compute(self)
        return self.memo[key]

    def last_queries(self, window: int) -> Prompt:
        """Return the prompt with only its last ``window`` queries."""
        start = max(0, self.query.shape[2] - window)
        logsumexp = None if self.logsumexp is None else self.logsumexp[:, :, start:]
        return replace(self, query=self.query[:, :, start:], logsumexp=logsumexp)

    def reduce_groups(self, scores: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
        """Reduce scores over the query heads of each KV head, by mean, max or sum: [R, H_q, N] -> [R, H_kv, N]."""
        grouped = scores.unflatten(1, (-1, self.groups))  # [R, H_kv, g, N]
        if reduction == "max":
            return grouped.amax(dim=2)
        return grouped.mean(dim=2) if reduction == "mean" else grouped.sum(dim=2)

    @property
    def length(self) -> int:
        """T, the number of tokens."""
        return self.keys.shape[2]

    @property
    def tokens_seen(self) -> int:
        """Tokens of the text so far, which is the position of the next token."""
        return self.length if self.seen is None else self.seen

    @property
    def groups(self) -> int:
        """Query heads per KV head."""
        return self.query.shape[1] // self.keys.shape[1]
