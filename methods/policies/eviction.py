"""Token eviction as a product: a scorer ranks tokens, an allocator shares the budget out, a schedule says when.

    Method("mine", EvictionPolicy(SnapKV(window=16), budget=512, allocator=Adaptive(), schedule=EveryN(128)))

The first ``sinks`` and the last ``recent`` tokens always stay. Which of the others stay is decided by
:mod:`.ranking` alone, so that the kept set is the same on every device and in every batch.

Legend: R rows of one prompt length, B rows of a batch, H stored heads, g query heads a stored head, T tokens, S slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

from ..cache.kv_shape import KVShape
from ..cache.prompt import ALL_QUERIES
from ..storage.base import LayerStorage
from ..storage.dense import COMPACTION_INTERVAL_STEPS
from .across_layers import compress_together
from .decoding import (
    attend_and_weigh,
    evict_one,
    evict_to_limit,
    join_readers,
    score_again,
)
from .eviction_state import EvictionState, StoredPrompt
from .policy import PolicyCapabilities, Step
from .prompt_eviction import PromptEviction
from .scorers.base import DECODE_QUERIES, ModelLayer


@dataclass(frozen=True)
class EvictionPolicy(PromptEviction):
    """Scorer x allocator x schedule; see :class:`.prompt_eviction.PromptEviction` for the attributes."""

    @cached_property
    def capabilities(self) -> PolicyCapabilities:
        interval = self.schedule.interval
        return PolicyCapabilities(
            observation_window=self.scorer.observation_window,
            evicts_while_decoding=interval is not None,
            ranks_tokens=True,
            heads_differ=self.allocator.heads_differ,
            drops_stored=interval is not None or self.allocator.spans_layers,
            stores_query_heads=self.scorer.stores_query_heads,
            held_queries=self._queries_held,
            static_steps=True,
        )

    @property
    def _queries_held(self) -> int:
        """Last queries that are held to score tokens again while decoding."""
        window = self.scorer.observation_window
        if self.scorer.tracks_attention or self.schedule.interval is None:
            return 0
        return DECODE_QUERIES if window == ALL_QUERIES else window

    def new_states(self, layers: Sequence[ModelLayer]) -> list[EvictionState]:
        states = super().new_states(layers)
        for state in states:
            state.layers = states if self.allocator.spans_layers else [state]
        return states

    def after_prompt(
        self,
        state: EvictionState,
        storage: LayerStorage,
        lengths: torch.Tensor,
        scores: torch.Tensor | None,
        queries: torch.Tensor | None = None,
    ) -> None:
        state.scores, state.prompt, ready = scores, StoredPrompt(storage, lengths, queries), [state]
        if self.allocator.spans_layers:
            if any(other.prompt is None for other in state.layers):
                return
            ready = state.layers
            compress_together(self.allocator, ready)
        for one in ready:
            if self.schedule.interval is not None:
                self._begin_decoding(one)
            one.prompt = None

    def _begin_decoding(self, state: EvictionState) -> None:
        """Fix what each row may hold from now on."""
        assert state.prompt is not None
        layer, lengths = state.layer, state.prompt.lengths
        limits = [self.limits(n, layer.count)[layer.place] for n in lengths.tolist()]
        state.limit = torch.tensor(limits, device=lengths.device)[:, None]  # [B, 1]
        state.recent = torch.tensor([[self.recent_of(n)] for n in limits], device=lengths.device)
        if self.allocator.heads_differ:  # a prompt within the budget gives nothing to compare heads by
            held = state.prompt.storage.tokens  # [B, 1 or H]
            state.limit = torch.where(lengths[:, None] > state.limit, held, state.limit)
        state.max_limit = max(limits) if not self.allocator.heads_differ else int(state.limit.max())
        state.queries, state.seen = state.prompt.queries, lengths.tolist()

    def attend(self, state: EvictionState, storage: LayerStorage, step: Step) -> torch.Tensor:
        if self.schedule.interval is None:
            return super().attend(state, storage, step)
        return torch.cat([self._attend_token(state, storage, token) for token in step.tokens()], dim=2)

    def _attend_token(self, state: EvictionState, storage: LayerStorage, step: Step) -> torch.Tensor:
        """Append one token per row, attend, and let tokens leave if it is time."""
        real = None if step.valid is None else step.valid[:, 0]
        state.rule = step.rule
        if self.scorer.tracks_attention:
            out, paid, _ = attend_and_weigh(storage, step)
            weights = join_readers(state, storage, step, paid)
            if weights is None:  # further layers of the model read the same keys and values
                return out
            before = state.scores
            if before is not None:
                before = F.pad(before, (0, weights.shape[3] - before.shape[2]))
            scores = self.scorer.update(before, weights, real)
            if self._evicts_in_step:
                if self.scorer.accumulates:
                    state.hold_scores(scores)
                evict_one(state, storage, scores, self.sinks, at_once=step.valid is not None)
            else:
                state.hold_scores(scores)
        else:
            out = super().attend(state, storage, step)
            if not step.use.is_last_reader:
                return out
            if state.queries is not None:
                state.hold_queries(step.query, real)
        if not state.is_static:
            self._after_token(state, storage, real)
        return out

    @property
    def _evicts_in_step(self) -> bool:
        """One token leaves in each step, by scores that the step itself gives."""
        return self.scorer.tracks_attention and self.schedule.interval == 1

    def _after_token(self, state: EvictionState, storage: LayerStorage, real: torch.Tensor | None = None) -> None:
        """Count the step, and bring the layer back to its budget if it is time."""
        state.count(real)
        assert self.schedule.interval is not None
        if self._evicts_in_step or state.steps % self.schedule.interval:
            return
        scores, ties = state.scores, None
        if not self.scorer.tracks_attention:
            scores, ties = score_again(self.scorer, state, storage, self.capabilities.heads_differ)
        if scores is not None:
            evict_to_limit(state, storage, scores, ties, self.sinks)
        if not self.scorer.accumulates and not state.is_static:
            state.scores = None

    # static steps -------------------------------------------------------------------------------------------------

    def make_static(self, state: EvictionState, storage: LayerStorage, steps: int) -> None:
        interval = self.schedule.interval
        if interval is None:
            storage.make_static(steps)
            return
        assert state.limit is not None
        batch, heads = state.limit.shape[0], storage.read()[0].shape[1]
        mask_heads = 1 if self.scorer.scores_heads_alike else heads
        room = COMPACTION_INTERVAL_STEPS if self._evicts_in_step else interval
        state.move_scores(storage.make_static_within(state.max_limit, room, mask_heads))
        state.is_static = True
        keys = storage.read()[0]
        if self.scorer.tracks_attention and (self.scorer.accumulates or not self._evicts_in_step):
            scores = keys.new_zeros(batch, mask_heads, keys.shape[2], dtype=torch.float32)
            if state.scores is not None:
                scores[..., : state.scores.shape[2]] = state.scores
            state.scores = scores

    def static_state(self, state: EvictionState) -> list[torch.Tensor]:
        return self.state_tensors(state)

    def between_steps(self, state: EvictionState, storage: LayerStorage) -> None:
        if self.schedule.interval is None:
            return
        self._after_token(state, storage)
        if self._evicts_in_step and state.steps % COMPACTION_INTERVAL_STEPS == 0:
            state.move_scores(storage.compact())

    # bytes --------------------------------------------------------------------------------------------------------

    def kept_tokens(self, prompt_length: int, new_tokens: int, layers: int) -> Sequence[int]:
        prompt_kept = self.layer_budgets(prompt_length, layers)
        interval = self.schedule.interval
        if interval is None:
            return [kept + new_tokens for kept in prompt_kept]
        limits = self.limits(prompt_length, layers)
        since = new_tokens % interval
        return [min(kept + new_tokens - since, limit) + since for kept, limit in zip(prompt_kept, limits, strict=True)]

    def state_tensors(self, state: EvictionState) -> list[torch.Tensor]:
        return [x for x in (state.scores, state.queries) if x is not None]

    def logical_state_bytes(self, state: EvictionState, tokens: torch.Tensor) -> int:
        queries = 0 if state.queries is None else state.queries.nbytes
        if state.scores is None or not self.scorer.accumulates:
            return queries
        return queries + state.scores.element_size() * int(tokens.expand(-1, state.scores.shape[1]).sum())

    def state_bytes(self, shape: KVShape, heads: int, prompt_length: int, new_tokens: int) -> int:
        """One float32 score for each token of each head where they are accumulated; the held queries."""
        if self.schedule.interval is None:
            return 0
        tokens = sum(self.kept_tokens(prompt_length, new_tokens, shape.layers))
        scores = 4 * heads * tokens if self.scorer.accumulates else 0
        query_bytes = shape.query_heads * shape.head_dim * shape.element_bytes
        return scores + shape.layers * self._queries_held * query_bytes
