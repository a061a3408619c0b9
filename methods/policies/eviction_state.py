"""State of one layer under an eviction policy, and the one way in which tokens leave it.

Legend: B rows of a batch, R rows of one prompt length, H stored heads, N candidates, T tokens, S slots, w held queries.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ..cache.logits import LogitRule
from ..storage.base import LayerStorage
from .scorers.base import ModelLayer


@dataclass(frozen=True)
class Candidates:
    """Tokens of one layer that compete, for the rows of one prompt length.

    Attributes:
        scores: [R, H, N].
        ties: [R, H, N] second scores, or None.
        free: Mean over layers and heads of the candidates that stay.
        sinks, recent: Protected tokens before and after the candidates.
    """

    scores: torch.Tensor
    ties: torch.Tensor | None
    free: int
    sinks: int
    recent: int

    @property
    def length(self) -> int:
        """T, tokens of the prompt."""
        return self.sinks + self.scores.shape[2] + self.recent


@dataclass(frozen=True)
class StoredPrompt:
    """A layer's whole prompt until all layers have theirs; ``lengths`` [B] int64, ``queries`` as for the policy."""

    storage: LayerStorage
    lengths: torch.Tensor
    queries: torch.Tensor | None


@dataclass
class EvictionState:
    """One layer and batch.

    Attributes:
        layer: The layer of the model.
        of_scorer: What the scorer's ``new_state`` made for it.
        limit: [B, 1 or H] int64, tokens that each row (or head) may hold after an eviction.
        max_limit: The largest limit as a number of the host.
        recent: [B, 1] int64, last tokens that may not leave.
        scores: [B, H, S] float32, running scores of a scorer that accumulates; None: there are none.
        queries: [B, H_q, w, D], the last queries of a scorer that scores again, the newest last; None: none are held.
        seen: Real tokens that each row has seen.
        steps: Decode steps so far.
        is_static: The layer's tensors have their final shapes, and steps change them in place.
        rule: How the layer's logits are formed; known once a step has been.
        layers: The states of all layers whose budgets are shared out together, this one among them.
        prompt: What is stored of the prompt, until all of them have theirs.
        waiting: Candidates of this layer, for each prompt length of the batch.
        pending: Attention that layers of the model which share these tokens have paid in the step under way.
    """

    layer: ModelLayer
    of_scorer: Any = None
    limit: torch.Tensor | None = None
    max_limit: int = 0
    recent: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    queries: torch.Tensor | None = None
    seen: list[int] = field(default_factory=list)
    steps: int = 0
    is_static: bool = False
    rule: LogitRule | None = None
    layers: list[EvictionState] = field(default_factory=list, repr=False)
    prompt: StoredPrompt | None = None
    waiting: list[Candidates] = field(default_factory=list)
    pending: list[torch.Tensor] = field(default_factory=list)

    def hold_scores(self, scores: torch.Tensor) -> None:
        """Take the scores [B, 1 or H, S] of a step; a static layer's go into the tensor that is there."""
        if self.is_static and self.scores is not None:
            self.scores.copy_(scores)
        else:
            self.scores = scores

    def hold_queries(self, query: torch.Tensor, real: torch.Tensor | None) -> None:
        """Take in the queries of one step, [B, H_q, 1, D]; rows whose token is a pad (``real`` False) stay."""
        assert self.queries is not None
        moved = torch.cat([self.queries[:, :, 1:], query.to(self.queries.dtype)], dim=2)  # [B, H_q, w, D]
        if real is not None:
            moved = torch.where(real[:, None, None, None], moved, self.queries)
        if self.is_static:
            self.queries.copy_(moved)
        else:
            self.queries = moved

    def count(self, real: torch.Tensor | None = None) -> None:
        """Count a step on the host."""
        self.steps += 1
        came = [1] * len(self.seen) if real is None else real.int().tolist()
        self.seen = [n + more for n, more in zip(self.seen, came, strict=True)]

    def evict(self, storage: LayerStorage, stay: torch.Tensor, at_once: bool) -> None:
        """Let the tokens leave that are False in ``stay`` [B, 1 or H, S]; see :meth:`LayerStorage.drop`."""
        self.move_scores(storage.drop(stay, at_once))

    def move_scores(self, moved: torch.Tensor | None) -> None:
        """Move running scores with their tokens, from the slots [B, 1 or H, C] that a storage has moved together."""
        if moved is None or self.scores is None:
            return
        scores = self.scores.gather(-1, moved.expand(*self.scores.shape[:2], -1))
        if self.is_static:
            self.scores.zero_()
            self.scores[..., : scores.shape[-1]] = scores
        else:
            self.scores = scores


def slots_in_use(storage: LayerStorage, heads: int) -> torch.Tensor:
    """Which slots hold a token: bool [B, H, S], H being ``heads`` or what the storage's masks have, if that is more."""
    keys, _, held = storage.read()
    if held is None:
        return torch.ones(keys.shape[0], heads, keys.shape[2], dtype=torch.bool, device=keys.device)
    return held.expand(-1, max(heads, held.shape[1]), -1)
