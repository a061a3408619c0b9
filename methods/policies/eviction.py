"""Token eviction policy: a scorer scores tokens, an allocator distributes the budget, a schedule triggers eviction.

    Method("mine", EvictionPolicy(SnapKV(window=16), budget=512, allocator=Adaptive(), schedule=EveryN(128)))

The first ``sinks`` and the last ``recent`` tokens are always kept. All other tokens are ranked by :mod:`.ranking`, so
that the kept tokens do not depend on the device or the batch.

The base class :class:`.prompt_eviction.PromptEviction` compresses the prompt. This class evicts tokens while decoding,
if the schedule has an ``interval``:

1. One token per step, if the interval is 1 and the scorer follows the attention (H2O, TOVA), or the oldest or the
   lowest-ranked of the prompt is evicted.
2. Otherwise down to the limit after every ``interval`` steps: by the running scores of a scorer that follows the
   attention, or by scoring the stored tokens again (``rescores``).

Legend: B batch rows, H stored heads, g query heads per stored head, S slots, w queries, D channels.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from ...conf.errors import InputError
from ..cache.kv_shape import KVShape
from ..storage.base import LayerStorage
from ..storage.dense import COMPACTION_INTERVAL_STEPS
from .across_layers import compress_stored
from .budget import resolve_budget
from .decoding import attend_with_weights, evict_one, evict_to_limit, limit_each_head, rescore, step_weights
from .eviction_state import Candidates, EvictionState, StoredPrompt
from .model_layer import ModelLayer
from .policy import FurtherForwards, PolicyCapabilities, Step
from .prompt_eviction import PromptEviction
from .prompt_ranks import evict_by_rank
from .repetition import RepetitionResult, scores_by_repetition, stored_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..sharing.plan import Plan


@dataclass(frozen=True)
class EvictionPolicy(PromptEviction):
    """Eviction by scorer x allocator x schedule; see :class:`.prompt_eviction.PromptEviction` for the attributes."""

    @cached_property
    def capabilities(self) -> PolicyCapabilities:
        interval = self.schedule.interval
        return PolicyCapabilities(
            observation_window=self.scorer.observation_window,
            evicts_while_decoding=interval is not None,
            observes_question=self.scorer.observes_question,
            ranks_tokens=True,
            keeps_positions=not self.scorer.repositions,
            heads_differ=self.allocator.heads_differ,
            heads_part=not self.schedule.evicts_from_whole_heads,
            merges_values=self.scorer.merges_values,
            drops_stored=interval is not None or self.allocator.spans_layers or self.scorer.repeats_prompt,
            stores_query_heads=self.scorer.stores_query_heads,
            stored_queries=self.scorer.queries_while_decoding(sys.maxsize) if self.rescores else 0,
            max_step_tokens=None if interval is None else 1,
            static_problem=None,
            needs=self._needs,
        )

    def _steps_between(self, prompt_length: int) -> int:
        """Return the decode steps between evictions after a prompt; only if the schedule evicts while decoding."""
        return self.schedule.steps_between(resolve_budget(self.budget, prompt_length))

    def _queries_held(self, prompt_length: int) -> int:
        """Return the number of last queries that are stored to re-score tokens after a prompt."""
        return self.scorer.queries_while_decoding(self._steps_between(prompt_length)) if self.rescores else 0

    def new_states(self, layers: Sequence[ModelLayer]) -> list[EvictionState]:
        states = super().new_states(layers)
        for state in states:
            state.layers = states if self.allocator.spans_layers else [state]  # layers that share one budget
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
        if self.scorer.repeats_prompt:  # KVzip: compressed in after_prefill, when all layers are stored
            return
        if self.allocator.spans_layers:
            if any(other.prompt is None for other in state.layers):  # wait for the last layer that shares the budget
                return
            ready = state.layers
            compress_stored(self.allocator, self.scorer, ready, self.keeps_ranks)
        self._end_prefill(ready)

    def after_prefill(
        self,
        model: PreTrainedModel,
        plan: Plan,
        layers: Sequence[tuple[Any, LayerStorage]],
        prompts: Sequence[torch.Tensor],
        earlier: list[RepetitionResult] | None = None,
    ) -> list[FurtherForwards]:
        if not self.scorer.repeats_prompt:
            return []
        # Score the stored tokens by further forwards; the rows of one prompt length are one batch.
        states = [state for state, _ in layers]
        lengths, forwards = [len(prompt) for prompt in prompts], [FurtherForwards()] * len(prompts)
        for length in sorted(set(lengths)):
            budgets = self.layer_budgets(length, len(states))
            if length <= resolve_budget(self.budget, length):
                continue
            rows = [row for row, n in enumerate(lengths) if n == length]
            stored = stored_prompts([storage for _, storage in layers], rows, length)
            ids = torch.stack([prompts[row] for row in rows])  # [R, T]
            index = torch.tensor(rows, device=ids.device)
            request = states[0].scorer_state
            layer_scores, of_rows = scores_by_repetition(self.scorer, request, model, plan, stored, ids, earlier)
            for row, one in zip(rows, of_rows, strict=True):
                forwards[row] = one
            for state, scores, budget in zip(states, layer_scores, budgets, strict=True):
                sinks, recent = self.protected_of(budget)
                candidates = scores[..., sinks : length - recent]  # [R, H, N]
                state.candidates.append(Candidates(index, candidates, None, budget - sinks - recent, sinks, recent))
        compress_stored(self.allocator, self.scorer, states, self.keeps_ranks)
        for _, storage in layers:
            storage.write(*storage.read())  # copy into buffers sized for the kept and the reserved tokens
        self._end_prefill(states)
        return forwards

    def _end_prefill(self, states: Sequence[EvictionState]) -> None:
        """Prepare layers whose prompt is compressed for the decode steps."""
        for state in states:
            if self.schedule.interval is not None:
                self._begin_decoding(state)
            state.prompt = None

    def _begin_decoding(self, state: EvictionState) -> None:
        """Set the limits of each row for the decode steps."""
        assert state.prompt is not None
        layer, lengths = state.layer, state.prompt.lengths
        limits = [self.limits(n, layer.count)[layer.place] for n in lengths.tolist()]
        state.limit = torch.tensor(limits, device=lengths.device)[:, None]  # [B, 1]
        state.recent = torch.tensor([[self.recent_of(n)] for n in limits], device=lengths.device)
        state.max_limit = max(limits)
        if self.keeps_ranks:
            state.position = lengths[:, None, None].float()
        elif self.allocator.heads_differ:
            limit_each_head(state, self.schedule.evicts_from_whole_heads)
        state.begin_texts(lengths)
        state.intervals = [self._steps_between(n) for n in state.seen]
        state.store_prompt_queries(state.prompt.queries, [self._queries_held(n) for n in state.seen])
        if state.merging is not None:
            state.merging.begin(state.text_seeds)

    def after_append(self, state: EvictionState, slots: torch.Tensor) -> None:
        state.move_scores(slots)

    def attend(self, state: EvictionState, storage: LayerStorage, step: Step) -> torch.Tensor:
        state.rule = step.rule
        if state.prompt is not None and self.scorer.repeats_prompt:
            raise InputError(
                "method/scorer",
                self.scorer.name,
                "gives the prompt to the model again, which kvbench's own engine does and model.generate does not: use "
                "kvbench.generate, or kvbench.prefill",
            )
        if not self.follows_attention:
            return super().attend(state, storage, step)
        out, weights, _ = attend_with_weights(storage, step, self.scorer.averages_query_heads)
        state.weights.append(weights)
        return out

    def after_attention(self, state: EvictionState, storage: LayerStorage, step: Step) -> None:
        """Evict tokens if the schedule says so, after a step of one token per row."""
        if self.schedule.interval is None:
            return
        real = None if step.valid is None else step.valid[:, 0]  # [B]
        if self.schedule.evicts_by == "age":
            assert state.limit is not None and state.recent is not None
            shape = (*state.limit.shape, storage.slots)
            equal_scores = state.limit.new_zeros(shape, dtype=torch.float32)  # [B, 1 or H, S]
            n_evictable = (state.limit - state.recent)[..., None]  # [B, 1 or H, 1], tokens before the ring
            evict_one(state, storage, equal_scores, n_evictable, compact_now=step.valid is not None)
        elif self.keeps_ranks:
            evict_by_rank(state, storage, self.sinks, real, self.allocator.heads_differ)
        elif self.follows_attention:
            # Score by the attention weights of this step: the running scores get an entry for the new token.
            weights, previous = step_weights(state, storage), state.scores  # weights [B, H, g, S]
            if previous is not None:
                previous = F.pad(previous, (0, weights.shape[3] - previous.shape[2]))  # [B, H, S]
            scores = self.scorer.update(previous, weights, real)
            if self._evicts_in_step:
                if self.scorer.accumulates:
                    state.store_scores(scores)
                evict_one(state, storage, scores, self.sinks, compact_now=step.valid is not None)
            else:
                state.store_scores(scores)
        elif state.queries is not None:
            state.store_queries(step.query, real)
        if not state.is_static:
            self._after_token(state, storage, real)

    @property
    def _evicts_in_step(self) -> bool:
        """Whether each step evicts one token: by its attention weights, by age or by the prompt's ranking."""
        return self.schedule.evicts_every_step and not self.rescores

    def _after_token(self, state: EvictionState, storage: LayerStorage, real: torch.Tensor | None = None) -> None:
        """Count the step and evict tokens down to the limit from the rows for which it is the last of an interval."""
        state.count(real)
        if self._evicts_in_step or not any(state.is_due()):
            return
        scores, ties = state.scores, None
        if self.rescores:
            scores, ties = rescore(self.scorer, state, storage, self.capabilities.heads_differ)
        if scores is not None:
            evict_to_limit(state, storage, scores, ties, self.sinks)
        if not self.scorer.accumulates and not state.is_static:
            state.scores = None

    # static steps -------------------------------------------------------------------------------------------------

    def make_static(self, state: EvictionState, storage: LayerStorage, steps: int) -> None:
        if self.schedule.interval is None:
            storage.make_static(steps)
            return
        assert state.limit is not None
        batch, heads = state.limit.shape[0], storage.read()[0].shape[1]
        mask_heads = 1 if self.scorer.scores_heads_alike else heads
        extra_slots = COMPACTION_INTERVAL_STEPS if self._evicts_in_step else max(state.intervals)
        limit = state.limit
        if self.keeps_ranks and self.allocator.heads_differ:  # tokens leave other heads than the new ones enter
            limit = storage.tokens + limit.clamp(max=steps)
        elif not self.schedule.evicts_from_whole_heads:
            limit = torch.minimum(limit, storage.tokens + steps)
        state.move_scores(storage.make_static_within(limit, extra_slots, mask_heads))
        state.is_static = True
        if self.stores_scores or (self.follows_attention and not self._evicts_in_step):
            scores = torch.zeros(batch, mask_heads, storage.slots, device=state.limit.device)
            if state.scores is not None:
                scores[..., : state.scores.shape[2]] = state.scores
            state.scores = scores

    def static_state(self, state: EvictionState) -> list[torch.Tensor]:
        return self.state_tensors(state) + ([] if state.position is None else [state.position])

    def between_steps(self, state: EvictionState, storage: LayerStorage) -> None:
        if self.schedule.interval is None:
            return
        self._after_token(state, storage)
        if self._evicts_in_step and state.steps % COMPACTION_INTERVAL_STEPS == 0:
            state.move_scores(storage.compact())

    # bytes --------------------------------------------------------------------------------------------------------

    def kept_tokens(self, prompt_length: int, new_tokens: int, layers: int, heads: int) -> Sequence[int | Fraction]:
        prompt_kept = self.layer_budgets(prompt_length, layers)
        if self.schedule.interval is None:
            return [kept + new_tokens for kept in prompt_kept]
        if not self.schedule.evicts_from_whole_heads:
            growing_share = self.share_of_whole_heads(prompt_length, layers, heads)
            return [kept + growing_share * new_tokens for kept in prompt_kept]
        limits = self.limits(prompt_length, layers)
        n_unevicted = new_tokens % self._steps_between(prompt_length)  # generated since the last eviction
        evicted = [min(kept + new_tokens - n_unevicted, limit) for kept, limit in zip(prompt_kept, limits, strict=True)]
        return [kept + n_unevicted for kept in evicted]

    def state_tensors(self, state: EvictionState) -> list[torch.Tensor]:
        random = None if state.merging is None else state.merging.random
        return [x for x in (state.scores, state.queries, random) if x is not None]

    def logical_state_bytes(self, state: EvictionState, tokens: torch.Tensor) -> int:
        fixed = sum(x.nbytes for x in self.state_tensors(state) if x is not state.scores) - state.unused_query_bytes
        if state.scores is None or not self.stores_scores:
            return fixed
        heads = state.scores.shape[1]
        return fixed + state.scores.element_size() * int(tokens[:, :heads].expand(-1, heads).sum())

    def state_bytes(self, shape: KVShape, heads: int, prompt_length: int, new_tokens: int) -> int:
        """Return the bytes of stored scores, one float32 per token and head, of stored queries and of generators."""
        if self.schedule.interval is None:
            return 0
        tokens = int(sum(self.kept_tokens(prompt_length, new_tokens, shape.layers, heads)))
        scores = 4 * (1 if self.scorer.scores_heads_alike else heads) * tokens if self.stores_scores else 0
        query_bytes = shape.query_heads * shape.head_dim * shape.element_bytes
        generators = 8 * shape.layers if self.scorer.merges_values else 0
        return scores + generators + shape.layers * self._queries_held(prompt_length) * query_bytes
