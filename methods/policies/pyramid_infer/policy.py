"""PyramidInfer (Yang et al., 2024, arXiv 2405.12532): each layer forwards fewer prompt tokens to the next.

Section 4: deeper layers need fewer tokens. A layer caches all tokens that it receives. It forwards those with the
highest attention from the prompt's last tokens, averaged over the heads and weighted towards the latest queries; the
first and the last tokens are always forwarded. Dropped tokens have no hidden state, key or value in deeper layers,
which saves compute there.

While decoding, a window of ``gen_window`` generated tokens is reduced once ``recent_ratio`` of the length has been
generated after it: the tokens with the lowest attention from those later tokens are evicted, more in deeper layers.

Two choices differ from the published code (for transformers 4.46). ``trigger=own_length`` counts a layer's own tokens,
so that prompt tokens are never evicted while decoding. The published code counts all tokens seen
(``trigger=published``), so deep layers evict at every step until the prompt is gone; and its window begins one token
early, with the prompt's last one. A bug makes its linear schedule constant; here it is linear.

Decode steps can run over static shapes, with evictions between the steps. ``trigger=published`` cannot: its record of
attention has a row per recent query and a column per token, and both numbers change from step to step.

:mod:`...cache.narrowing` drops the hidden states of tokens that are not forwarded.

Legend: B batch rows, R rows of one prompt length, H stored heads, g query heads per stored head, T prompt tokens of the
layer, n queries of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from ...cache.prompt import ALL_QUERIES, Prompt
from ...cache.prompt_kernel import kernel_sums
from ...cache.prompt_sums import attention_blocks
from ...storage.base import LayerStorage
from ..decoding import attend_with_weights
from ..model_layer import ModelLayer
from ..policy import Kept, PolicyCapabilities, Step
from ..ranking import keep_slots
from .lengths import PyramidLengths
from .records import AttentionRows, WindowSums
from .state import PyramidState, SharedState

CHANGING_RECORD = "policy.trigger=published keeps a record of attention whose two sizes change from step to step"
"""Why steps with ``trigger=published`` have no fixed shapes."""


@dataclass(frozen=True)
class PyramidInfer(PyramidLengths):
    """PyramidInfer's rule; see :class:`.lengths.PyramidLengths` for the attributes."""

    id: ClassVar[str] = "PyramidInfer"

    @cached_property
    def capabilities(self) -> PolicyCapabilities:
        return PolicyCapabilities(
            observation_window=ALL_QUERIES,
            evicts_while_decoding=self.trigger != "never",
            attends_whole_prompt=False,
            narrows_prompt=True,
            ranks_tokens=True,
            spans_layers=True,
            static_problem=CHANGING_RECORD if self.trigger == "published" else None,
            max_step_tokens=None if self.trigger == "never" else 1,
        )

    def new_state(self, layer: ModelLayer) -> PyramidState:
        return PyramidState(layer.place, layer.count)

    def new_states(self, layers: Sequence[ModelLayer]) -> list[PyramidState]:
        states, shared = super().new_states(layers), SharedState()
        for state in states:
            state.shared = shared
        return states

    def select(self, prompt: Prompt, state: Any = None) -> Kept:
        """Keep all tokens that this layer received, and store in the state which are forwarded to the next layer."""
        whole, is_last = prompt.tokens_seen, prompt.layer_idx == prompt.num_layers - 1
        lengths = self.layer_lengths(whole, prompt.num_layers)
        count = prompt.length if is_last else lengths[prompt.layer_idx + 1]
        recent, chosen = 1 + self.recent(whole), None
        if count < prompt.length or self.trigger == "published":
            score, attention = self._prompt_scores(prompt, recent)
            if self.trigger == "published":
                state.rows[whole] = torch.cat(attention, dim=1)  # [R, 1 + R, T]
            if count < prompt.length:
                context = prompt.length - recent
                best = keep_slots(score[:, :context], count - recent)  # [R, count - recent]
                tail = torch.arange(context, prompt.length, device=best.device).expand(best.shape[0], -1)
                chosen = torch.cat([best, tail], dim=1)
        if not is_last:
            state.chosen.append(chosen)
        return Kept()

    def _prompt_scores(self, prompt: Prompt, recent: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Score a prompt's tokens by the attention of its last ``recent`` queries.

        Returns:
            (scores [R, T]; with ``trigger=published`` the attention in blocks [R, n, T], averaged over the heads).
        """
        weights = torch.linspace(1.0, self.distance_weight, recent, device=prompt.keys.device)
        score = torch.zeros(prompt.keys.shape[0], prompt.length, device=prompt.keys.device)
        blocks: list[torch.Tensor] = []
        if self.trigger != "published":
            sums = kernel_sums(prompt.last_queries(recent), weights, per_query_head=False)  # [R, H_kv, T]
            if sums is not None:
                return self._favor_sinks(sums.mean(dim=1), recent), blocks
        for start, block in attention_blocks(prompt, recent):
            attention = block.mean(dim=(1, 2))  # [R, H, g, n, columns] -> [R, n, columns]
            n, columns = attention.shape[1:]
            score[:, :columns] += torch.einsum("q,rqt->rt", weights[start : start + n], attention)
            if self.trigger == "published":
                blocks.append(F.pad(attention, (0, prompt.length - columns)))
        return self._favor_sinks(score, recent), blocks

    def _favor_sinks(self, score: torch.Tensor, recent: int) -> torch.Tensor:
        """Give the sinks scores [R, T] that are larger than any attention, decreasing; in place."""
        sinks = min(self.sinks, score.shape[1] - recent)
        score[:, :sinks] = 1e6 - torch.arange(sinks, device=score.device)
        return score

    def next_layer_tokens(self, state: PyramidState) -> list[torch.Tensor | None]:
        chosen, state.chosen = state.chosen, []
        return chosen

    def after_prompt(
        self,
        state: PyramidState,
        storage: LayerStorage,
        lengths: torch.Tensor,
        scores: torch.Tensor | None,
        queries: torch.Tensor | None = None,
    ) -> None:
        state.lengths = lengths.tolist()
        state.finalized = list(state.lengths)
        if state.layer_idx == 0:
            state.shared.prompts = list(state.lengths)
        state.seen = list(state.shared.prompts)
        state.limit = [self.limit(n) for n in state.seen]
        if self.trigger == "own_length":
            state.record = WindowSums.empty(len(state.lengths), lengths.device)
        elif self.trigger == "published":
            state.record = AttentionRows.of_prompt(state.rows, state.seen, max(state.lengths))
            state.rows = {}

    def attend(self, state: PyramidState, storage: LayerStorage, step: Step) -> torch.Tensor:
        if self.trigger == "never":
            return super().attend(state, storage, step)
        out, weights, valid = attend_with_weights(storage, step)  # weights [B, H, g, S]
        record, real = state.record, None if step.valid is None else step.valid[:, 0]
        # A pad adds no token to its row: compact, so that the row's tokens end at the last slot.
        if real is not None and valid is not None:
            moved = storage.drop(valid[:, :1], compact_now=True)
            if moved is not None:
                weights = weights.gather(3, moved[:, :, None].expand(*weights.shape[:3], -1))
        if not state.is_static:
            state.count(self, step.first, None if real is None else real.tolist())
        if isinstance(record, WindowSums):
            if not state.is_static:
                record.grow(max(map(state.pending, range(len(state.lengths)))))
            record.observe(self, storage, weights, real)
        else:
            assert record is not None
            record.observe(state, weights, real)
        return out

    def after_attention(self, state: PyramidState, storage: LayerStorage, step: Step) -> None:
        """Evict tokens if due; a static layer evicts between steps instead."""
        if state.record is not None and not state.is_static:
            state.record.evict_windows(self, state, storage)

    def make_static(self, state: PyramidState, storage: LayerStorage, steps: int) -> None:
        if not isinstance(state.record, WindowSums):
            super().make_static(state, storage, steps)
            return
        slots = pending = 0
        for prompt, seen in zip(state.shared.prompts, state.seen, strict=True):
            peak = self.max_progress(prompt, seen - prompt, steps, state.num_layers)
            slots = max(slots, peak.lengths[state.layer_idx])
            pending = max(pending, peak.pending[state.layer_idx])
        storage.make_static_within(slots, 0)
        state.record.ensure_columns(pending)
        state.is_static = True

    def static_state(self, state: PyramidState) -> list[torch.Tensor]:
        record = state.record
        return [record.pending, *record.tensors()] if isinstance(record, WindowSums) else []

    def between_steps(self, state: PyramidState, storage: LayerStorage) -> None:
        if state.record is not None:
            state.count(self, 0)
            state.record.evict_windows(self, state, storage)

    def state_tensors(self, state: Any) -> list[torch.Tensor]:
        return [] if state.record is None else state.record.tensors()

    def logical_state_bytes(self, state: Any, tokens: torch.Tensor) -> int:
        return 0 if state.record is None else state.record.logical_bytes(state)
