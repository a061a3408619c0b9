"""Policy of local-attention layers, which keep the tokens visible to the next token, whatever the method.

Sliding windows (Mistral, Gemma 2, gpt-oss) and chunks (Llama 4) are part of the model: a token outside the window is
never attended to again, so evicting it is lossless.

Legend: B batch rows, H stored heads, n new tokens, S slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch

from ..cache.products import masked_attention
from ..cache.prompt import Prompt
from ..sharing.plan import Span
from ..storage.base import LayerStorage
from ..storage.dense import COMPACTION_INTERVAL_STEPS
from .model_layer import ModelLayer
from .policy import CachePolicy, Kept, PolicyCapabilities, Step


@dataclass
class LocalState:
    """State of one layer for one batch.

    Attributes:
        seen: [B] int64, real tokens of each row before the current step; None before the prompt.
        max_seen: Upper bound of ``seen`` on the host.
        steps: Static steps so far.
        is_static: Whether the layer's tensors have their final shapes and are modified in place.
    """

    seen: torch.Tensor | None = None
    max_seen: int = 0
    steps: int = 0
    is_static: bool = False


@dataclass(frozen=True)
class LocalAttention(CachePolicy):
    """Keeps the tokens within the local-attention span of the next token.

    Attributes:
        span: Local attention of the model's layer.
    """

    id: ClassVar[str] = "LocalAttention"
    span: Span

    @cached_property
    def capabilities(self) -> PolicyCapabilities:
        return PolicyCapabilities(evicts_while_decoding=True, static_problem=None)

    def new_state(self, layer: ModelLayer) -> LocalState:
        return LocalState()

    def select(self, prompt: Prompt, state: Any = None) -> Kept:
        count = self.span.held(prompt.length)
        if count == prompt.length:
            return Kept()
        last = torch.arange(prompt.length - count, prompt.length, device=prompt.keys.device)  # [count]
        return Kept(last.expand(*prompt.keys.shape[:2], -1))

    def after_prompt(
        self,
        state: LocalState,
        storage: LayerStorage,
        lengths: torch.Tensor,
        scores: torch.Tensor | None,
        queries: torch.Tensor | None = None,
    ) -> None:
        state.seen, state.max_seen = lengths.clone(), int(lengths.max())

    def attend(self, state: LocalState, storage: LayerStorage, step: Step) -> torch.Tensor:
        assert state.seen is not None
        n = step.query.shape[2]
        if n == 1 and step.valid is None:  # a single token attends to all stored tokens
            return storage.attend(step.query, step.rule, None)
        return self._attend_tokens(state.seen, storage, step)

    def after_attention(self, state: LocalState, storage: LayerStorage, step: Step) -> None:
        assert state.seen is not None
        n = step.query.shape[2]
        if state.is_static:
            state.seen += 1
        else:
            state.seen = state.seen + (n if step.valid is None else step.valid.sum(1))
            state.max_seen += n
        self._drop(state, storage, compact_now=n > 1 or step.valid is not None)

    def _attend_tokens(self, seen: torch.Tensor, storage: LayerStorage, step: Step) -> torch.Tensor:
        """Attend with n new tokens, each over its own span."""
        keys, values, valid = storage.read()
        batch, n, slots = step.query.shape[0], step.query.shape[2], keys.shape[2]
        is_new = torch.ones(batch, n, dtype=torch.bool, device=keys.device) if step.valid is None else step.valid
        mask = torch.ones(batch, slots, dtype=torch.bool, device=keys.device) if valid is None else valid[:, 0]
        query_position = seen[:, None] + is_new.long().cumsum(1) - 1  # [B, n]
        rank = mask.long().cumsum(1) - 1  # [B, S], index of each stored token
        key_position = rank + (seen + is_new.sum(1) - mask.sum(1))[:, None]  # [B, S]
        at, of = query_position[..., None], key_position[:, None]  # [B, n, 1], [B, 1, S]
        visible = (of <= at) & self.span.visible(at, of) & mask[:, None]  # [B, n, S]
        visible = visible | ~visible.any(-1, keepdim=True)  # a fully masked row (a pad) would give NaN
        return masked_attention(step.query, keys, values, step.rule, visible[:, None])

    def _drop(self, state: LocalState, storage: LayerStorage, compact_now: bool) -> None:
        """Evict the tokens that are not visible to the next token."""
        assert state.seen is not None
        if not state.is_static and self.span.held(state.max_seen) == state.max_seen:
            return
        keys, _, valid = storage.read()
        if valid is None:
            valid = torch.ones(keys.shape[0], 1, keys.shape[2], dtype=torch.bool, device=keys.device)
        mask = valid[:, 0]
        rank_from_end = mask.long().flip(1).cumsum(1).flip(1)  # [B, S], 1 for the last token
        keep = mask & (rank_from_end <= self.span.held_of(state.seen)[:, None])
        storage.drop(keep[:, None], compact_now)

    def make_static(self, state: LocalState, storage: LayerStorage, steps: int) -> None:
        storage.make_static_within(self.span.size, COMPACTION_INTERVAL_STEPS)
        state.is_static = True

    def static_state(self, state: LocalState) -> list[torch.Tensor]:
        assert state.seen is not None
        return [state.seen]

    def between_steps(self, state: LocalState, storage: LayerStorage) -> None:
        state.steps += 1
        if state.steps % COMPACTION_INTERVAL_STEPS == 0:
            storage.compact()

    def kept_tokens(self, prompt_length: int, new_tokens: int, layers: int, heads: int) -> Sequence[int]:
        return [self.span.held(prompt_length + new_tokens)] * layers
