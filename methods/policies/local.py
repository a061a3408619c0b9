"""Layers of local attention hold the tokens that their next token will see, whatever the method.

Sliding windows (Mistral, Gemma 2, gpt-oss) and chunks (Llama 4) are a part of the model: what has left a window can
never be attended to again, so holding no more than that is exact.
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
from .policy import CachePolicy, Kept, PolicyCapabilities, Step
from .scorers.base import ModelLayer


@dataclass
class LocalState:
    """One layer and batch.

    Attributes:
        seen: real tokens of each row before the step under way, [B] int64; None before the prompt.
        most: the largest of them as a plain number, which costs no look at the device.
        steps: static steps so far.
        is_static: the layer's tensors have their final shapes, and steps change them in place.
    """

    seen: torch.Tensor | None = None
    most: int = 0
    steps: int = 0
    is_static: bool = False


@dataclass(frozen=True)
class LocalAttention(CachePolicy):
    """The tokens within a span of the next one.

    Attributes:
        span: of the model's layer.
    """

    id: ClassVar[str] = "LocalAttention"
    span: Span

    @cached_property
    def capabilities(self) -> PolicyCapabilities:
        return PolicyCapabilities(evicts_while_decoding=True, static_steps=True)

    def new_state(self, layer: ModelLayer) -> LocalState:
        return LocalState()

    def select(self, prompt: Prompt, state: Any = None) -> Kept:
        held = self.span.held(prompt.length)
        if held == prompt.length:
            return Kept()
        last = torch.arange(prompt.length - held, prompt.length, device=prompt.keys.device)
        return Kept(last.expand(*prompt.keys.shape[:2], -1))

    def after_prompt(
        self,
        state: LocalState,
        storage: LayerStorage,
        lengths: torch.Tensor,
        scores: torch.Tensor | None,
        queries: torch.Tensor | None = None,
    ) -> None:
        state.seen, state.most = lengths.clone(), int(lengths.max())

    def attend(self, state: LocalState, storage: LayerStorage, step: Step) -> torch.Tensor:
        assert state.seen is not None
        n = step.query.shape[2]
        step.append_to(storage, before_attention=True)
        if n == 1 and step.valid is None:  # what is held is what a single token sees
            out = storage.attend(step.query, step.rule, None)
        else:
            out = self._attend_several(state.seen, storage, step)
        if step.use.is_last_reader:
            if state.is_static:
                state.seen += 1
            else:
                state.seen = state.seen + (n if step.valid is None else step.valid.sum(1))
                state.most += n
            self._drop(state, storage, at_once=n > 1 or step.valid is not None)
        return out

    def _attend_several(self, seen: torch.Tensor, storage: LayerStorage, step: Step) -> torch.Tensor:
        """Attention of n new tokens, each within its own span."""
        keys, values, held = storage.read()
        batch, n, slots = step.query.shape[0], step.query.shape[2], keys.shape[2]
        real = torch.ones(batch, n, dtype=torch.bool, device=keys.device) if step.valid is None else step.valid
        there = torch.ones(batch, slots, dtype=torch.bool, device=keys.device) if held is None else held[:, 0]
        at = seen[:, None] + real.long().cumsum(1) - 1  # [B, n], positions of the new tokens
        rank = there.long().cumsum(1) - 1  # [B, S], rank of each held token
        of = rank + (seen + real.sum(1) - there.sum(1))[:, None]  # [B, S], their positions
        visible = (of[:, None] <= at[..., None]) & self.span.visible(at[..., None], of[:, None]) & there[:, None]
        visible = visible | ~visible.any(-1, keepdim=True)  # a pad sees something, for a softmax over nothing is NaN
        return masked_attention(step.query, keys, values, step.rule, visible[:, None])

    def _drop(self, state: LocalState, storage: LayerStorage, at_once: bool) -> None:
        """Let the tokens leave that the next one does not see."""
        assert state.seen is not None
        if not state.is_static and self.span.held(state.most) == state.most:
            return
        keys, _, held = storage.read()
        if held is None:
            held = torch.ones(keys.shape[0], 1, keys.shape[2], dtype=torch.bool, device=keys.device)
        there = held[:, 0]
        behind = there.long().flip(1).cumsum(1).flip(1)  # [B, S]: how many held tokens from this one to the end
        stay = there & (behind <= self.span.held_of(state.seen)[:, None])
        storage.drop(stay[:, None], at_once)

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

    def kept_tokens(self, prompt_length: int, new_tokens: int, layers: int) -> Sequence[int]:
        return [self.span.held(prompt_length + new_tokens)] * layers
