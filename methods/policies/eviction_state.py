"""State of one layer under an eviction policy.

Legend: B batch rows, R rows of one prompt length, H stored heads, N candidates, T tokens, S slots, w stored queries.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ..cache.logits import LogitRule
from ..cache.prompt import Prompt
from ..storage.base import LayerStorage
from .merging import Merging
from .model_layer import ModelLayer


@dataclass(frozen=True)
class Candidates:
    """Unprotected tokens of one layer, for rows of one prompt length.

    Attributes:
        rows: [R] int64, places of the rows in the batch; None: they are the whole batch.
        scores: [R, H, N].
        ties: [R, H, N] tie-breaking scores, or None.
        free: Number of candidates to keep, as the mean over layers and heads.
        sinks, recent: Number of protected tokens before and after the candidates.
    """

    rows: torch.Tensor | None
    scores: torch.Tensor
    ties: torch.Tensor | None
    free: int
    sinks: int
    recent: int

    @property
    def length(self) -> int:
        """T, the number of prompt tokens."""
        return self.sinks + self.scores.shape[2] + self.recent


@dataclass(frozen=True)
class StoredPrompt:
    """Stored prompt of a layer, as for :meth:`.policy.CachePolicy.after_prompt`."""

    storage: LayerStorage
    lengths: torch.Tensor
    queries: torch.Tensor | None


@dataclass
class EvictionState:
    """State of one layer for one batch.

    Attributes:
        layer: The layer of the model.
        scorer_state: State of the scorer for the layer.
        limit: [B, 1 or H] int64, tokens that each row (or head) may store after an eviction.
        max_limit: The largest limit of a head that evicts tokens, on the host.
        recent: [B, 1] int64, number of last tokens that are never evicted.
        position: [B, 1, 1] float32, position of the next token of each row, if ranks are stored.
        scores: [B, H, S] float32, running scores of a scorer that accumulates, or ranks (:mod:`.prompt_ranks`); None:
            neither.
        queries: [B, H_q, w, D], last queries for re-scoring, the newest last; None: not stored.
        windows: Number of the last queries that re-score each row.
        intervals: Number of decode steps between evictions of each row.
        seen: Number of real tokens that each row has seen.
        prompt_seeds: Places [R] of rows in the batch (None: all of it) and hashes [R] of their prompts, until
            :meth:`begin_texts`.
        text_seeds: [B] int64, hashes of all prompts, 0 where unknown.
        steps: Decode steps so far.
        is_static: Whether the layer's tensors have their final shapes and are modified in place.
        rule: How the layer's logits are computed; known after the first step.
        merging: Merging of evicted values into kept ones; None: they are dropped.
        layers: States of all layers that share one budget, including this one.
        prompt: The stored prompt, until all of those layers have prefilled.
        candidates: Candidates of this layer, for each prompt length of the batch.
        weights: Attention weights of the current step, one tensor [B, H, g, S] per layer of the model that attends.
    """

    layer: ModelLayer
    scorer_state: Any = None
    limit: torch.Tensor | None = None
    max_limit: int = 0
    recent: torch.Tensor | None = None
    position: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    queries: torch.Tensor | None = None
    windows: list[int] = field(default_factory=list)
    intervals: list[int] = field(default_factory=list)
    seen: list[int] = field(default_factory=list)
    prompt_seeds: list[tuple[torch.Tensor | None, torch.Tensor]] = field(default_factory=list)
    text_seeds: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    steps: int = 0
    is_static: bool = False
    rule: LogitRule | None = None
    merging: Merging | None = None
    layers: list[EvictionState] = field(default_factory=list, repr=False)
    prompt: StoredPrompt | None = None
    candidates: list[Candidates] = field(default_factory=list)
    weights: list[torch.Tensor] = field(default_factory=list)

    def add_prompts(self, prompt: Prompt) -> None:
        """Note the hashes of some of the prompts, if they are known."""
        if prompt.text_seeds is not None:
            self.prompt_seeds.append((prompt.rows, prompt.text_seeds))

    def begin_texts(self, lengths: torch.Tensor) -> None:
        """Count the tokens of all prompts, whose lengths are ``lengths`` [B], and put their hashes in order."""
        self.seen, self.text_seeds = lengths.tolist(), torch.zeros_like(lengths)
        for rows, seeds in self.prompt_seeds:
            self.text_seeds[slice(None) if rows is None else rows] = seeds.to(lengths.device)
        self.prompt_seeds = []

    def store_scores(self, scores: torch.Tensor) -> None:
        """Store the scores [B, 1 or H, S] of a step, in place if static."""
        if self.is_static and self.scores is not None:
            self.scores.copy_(scores)
        else:
            self.scores = scores

    def store_prompt_queries(self, queries: torch.Tensor | None, windows: list[int]) -> None:
        """Store the last queries [B, H_q, w, D] of the prompt, as many as the row with the largest window needs."""
        self.windows = windows
        if queries is not None:
            first = queries.shape[2] - max(windows)
            self.queries = queries[:, :, first:].clone() if first else queries  # frees what is not stored

    @property
    def unused_query_bytes(self) -> int:
        """Bytes of stored queries of rows with smaller windows than others."""
        if self.queries is None:
            return 0
        unused = sum(self.queries.shape[2] - window for window in self.windows)
        return unused * self.queries[0, :, :1].nbytes

    def is_due(self) -> list[bool]:
        """Return whether each row has reached the end of an interval with the current step."""
        return [self.steps % interval == 0 for interval in self.intervals]

    def store_queries(self, query: torch.Tensor, real: torch.Tensor | None) -> None:
        """Append the query [B, H_q, 1, D] of a step, except in rows whose token is a pad (``real`` [B] False)."""
        assert self.queries is not None
        shifted = torch.cat([self.queries[:, :, 1:], query.to(self.queries.dtype)], dim=2)  # [B, H_q, w, D]
        if real is not None:
            shifted = torch.where(real[:, None, None, None], shifted, self.queries)
        if self.is_static:
            self.queries.copy_(shifted)
        else:
            self.queries = shifted

    def count(self, real: torch.Tensor | None = None) -> None:
        """Count a step on the host; ``real`` [B] is False for a row whose token is a pad."""
        self.steps += 1
        new_tokens = [1] * len(self.seen) if real is None else real.int().tolist()
        self.seen = [n + new for n, new in zip(self.seen, new_tokens, strict=True)]

    def evict(self, storage: LayerStorage, keep: torch.Tensor, compact_now: bool) -> None:
        """Evict the tokens that are False in ``keep`` [B, 1 or H, S]; see :meth:`LayerStorage.drop`."""
        self.move_scores(storage.drop(keep, compact_now))

    def move_scores(self, slots: torch.Tensor | None) -> None:
        """Move running scores with their tokens, given the result of :meth:`LayerStorage.drop`."""
        if slots is None or self.scores is None:
            return
        heads = self.scores.shape[1]  # 1 if all heads have the same scores, and so the same tokens
        slots = slots[:, :heads].expand(-1, heads, -1)
        scores = self.scores.gather(-1, slots.clamp(min=0)).masked_fill(slots < 0, 0.0)
        if self.is_static:
            self.scores.zero_()
            self.scores[..., : scores.shape[-1]] = scores
        else:
            self.scores = scores


def slots_in_use(storage: LayerStorage, heads: int) -> torch.Tensor:
    """Return the mask of slots that hold a token, bool [B, H, S]; H is ``heads``, or the mask's heads if more."""
    valid = storage.valid
    if valid is None:
        keys, _, _ = storage.read()
        return torch.ones(keys.shape[0], heads, keys.shape[2], dtype=torch.bool, device=keys.device)
    return valid.expand(-1, max(heads, valid.shape[1]), -1)
