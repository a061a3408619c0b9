"""PyramidInfer (Yang et al., 2024, arXiv 2405.12532): fewer tokens go on to each next layer, already in the prompt.

Section 4: deeper layers need fewer tokens. A layer reads the tokens that the layer before passed on and caches all of
them; then the attention that the prompt's last tokens pay to each, averaged over the heads and weighted towards the
latest, decides which go on. What does not has no hidden state, no key and no value in any deeper layer, so that the
later layers also compute less. The first tokens and the last ones always go on.

While tokens are generated, a window of ``gen_window`` generated tokens is thinned out once ``recent_ratio`` of the
length has been generated after it, by the attention that those later tokens paid to it; deeper layers keep fewer.

Two choices differ from the published code, which has them as options or faults. ``trigger=own_length`` counts a layer's
own tokens: prompt tokens never leave while decoding. The published code for transformers 4.46 counts all tokens seen
(``trigger=published``), so that the deep layers thin out at every step and eat up the prompt; and its window begins one
token early, with the prompt's last one. Its linear schedule is constant by a fault; here it is linear.

Steps can run over tensors of fixed shape, and windows are then thinned out between steps; not with
``trigger=published``, whose record of attention has a row for each recent query and a column for each token, so that
both of its sizes change from step to step.

The hidden states are the model's; :mod:`...cache.narrowing` leaves out those of tokens that do not go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from ...cache.prompt import ALL_QUERIES, Prompt
from ...cache.prompt_attention import attention_blocks
from ...storage.base import LayerStorage
from ..decoding import attend_with_weights
from ..policy import Kept, PolicyCapabilities, Step
from ..ranking import keep_slots
from ..scorers.base import ModelLayer
from .lengths import PyramidLengths
from .records import AttentionRows, WindowSums
from .state import PyramidState, SharedState


@dataclass(frozen=True)
class PyramidInfer(PyramidLengths):
    """PyramidInfer's rule; its settings are those of :class:`.lengths.PyramidLengths`."""

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
            static_steps=self.trigger != "published",
        )

    # the prompt --------------------------------------------------------------------------------------------------

    def new_state(self, layer: ModelLayer) -> PyramidState:
        return PyramidState(layer.place, layer.count)

    def new_states(self, layers: Sequence[ModelLayer]) -> list[PyramidState]:
        states, shared = super().new_states(layers), SharedState()
        for state in states:
            state.shared = shared
        return states

    def select(self, prompt: Prompt, state: Any = None) -> Kept:
        """Keep everything that came to this layer; note what goes on to the next one."""
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
        """Scores [R, T] of a prompt's tokens by its last ``recent`` queries; ``published``: their attention, in blocks.

        The attention of a block is [R, n, T], averaged over the heads.
        """
        weights = torch.linspace(1.0, self.distance_weight, recent, device=prompt.keys.device)
        score = torch.zeros(prompt.keys.shape[0], prompt.length, device=prompt.keys.device)
        blocks = []
        for start, block in attention_blocks(prompt, recent):
            attention = block.mean(dim=(1, 2))  # [R, n, columns]
            n, columns = attention.shape[1:]
            score[:, :columns] += torch.einsum("q,rqt->rt", weights[start : start + n], attention)
            if self.trigger == "published":
                blocks.append(F.pad(attention, (0, prompt.length - columns)))
        sinks = min(self.sinks, prompt.length - recent)
        score[:, :sinks] = 1e6 - torch.arange(sinks, device=score.device)  # above any attention; the earliest first
        return score, blocks

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
        state.settled = list(state.lengths)
        if state.layer_idx == 0:
            state.shared.prompts = list(state.lengths)
        state.seen = list(state.shared.prompts)
        state.limit = [self.limit(n) for n in state.seen]
        if self.trigger == "own_length":
            state.record = WindowSums.empty(len(state.lengths), lengths.device)
        elif self.trigger == "published":
            state.record = AttentionRows.of_prompt(state.rows, state.seen, max(state.lengths))
            state.rows = {}

    # steps -------------------------------------------------------------------------------------------------------

    def attend(self, state: PyramidState, storage: LayerStorage, step: Step) -> torch.Tensor:
        if self.trigger == "never":
            return super().attend(state, storage, step)
        return torch.cat([self._attend_one(state, storage, token, i) for i, token in enumerate(step.tokens())], dim=2)

    def _attend_one(self, state: PyramidState, storage: LayerStorage, step: Step, number: int) -> torch.Tensor:
        """Attend with one token of each row; thin out afterwards, in a static layer between steps instead."""
        out, weights, held = attend_with_weights(storage, step)
        record, real = state.record, None if step.valid is None else step.valid[:, 0]
        if real is not None and held is not None:  # the row of a pad stands still: put its tokens at the end again
            moved = storage.drop(held[:, :1], compact_now=True)
            if moved is not None:
                weights = weights.gather(3, moved[:, :, None].expand(*weights.shape[:3], -1))
        if not state.is_static:
            state.count(self, number, None if real is None else real.tolist())
        if isinstance(record, WindowSums):
            if not state.is_static:
                record.grow(max(map(state.waiting, range(len(state.lengths)))))
            record.observe(self, storage, weights, real)
        else:
            assert record is not None
            record.observe(state, weights, real)
        if not state.is_static:
            record.thin_out(self, state, storage)
        return out

    def make_static(self, state: PyramidState, storage: LayerStorage, steps: int) -> None:
        if not isinstance(state.record, WindowSums):
            super().make_static(state, storage, steps)
            return
        held = waiting = 0
        for prompt, seen in zip(state.shared.prompts, state.seen, strict=True):
            most = self.most_during(prompt, seen - prompt, steps, state.num_layers)
            held = max(held, most.lengths[state.layer_idx])
            waiting = max(waiting, most.pending[state.layer_idx])
        storage.make_static_within(held, 0)
        state.record.make_room(waiting)
        state.is_static = True

    def static_state(self, state: PyramidState) -> list[torch.Tensor]:
        record = state.record
        return [record.waiting, *record.tensors()] if isinstance(record, WindowSums) else []

    def between_steps(self, state: PyramidState, storage: LayerStorage) -> None:
        if state.record is not None:
            state.count(self, 0)
            state.record.thin_out(self, state, storage)

    # bytes -------------------------------------------------------------------------------------------------------

    def state_tensors(self, state: Any) -> list[torch.Tensor]:
        return [] if state.record is None else state.record.tensors()

    def logical_state_bytes(self, state: Any, tokens: torch.Tensor) -> int:
        return 0 if state.record is None else state.record.logical_bytes(state)
