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

The hidden states are the model's, not the cache's. So this policy hooks the model's layers when its cache is made
and lets go of them when the last layer has read the prompt; a forward with another cache passes through untouched.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from ....conf.errors import InputError
from ...cache.prompt import ALL_QUERIES, Prompt
from ...cache.prompt_attention import attention_blocks
from ...storage.base import LayerStorage, slots_that_stay
from ..decoding import attend_and_weigh
from ..policy import Kept, PolicyCapabilities, Step
from ..ranking import keep_mask, keep_slots
from ..scorers.base import ModelLayer
from .hidden_states import hook_layers
from .lengths import PyramidLengths
from .records import AttentionRows, WindowSums
from .state import PyramidState, Sequences

if TYPE_CHECKING:
    from ...cache.cache import KVCache


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
            ranks_tokens=True,
            spans_layers=True,
        )

    # the prompt --------------------------------------------------------------------------------------------------

    def new_state(self, layer: ModelLayer) -> PyramidState:
        return PyramidState()

    def attach(self, model: PreTrainedModel, cache: KVCache) -> None:
        if not hasattr(model.get_decoder(), "layers") or not hasattr(model.get_decoder(), "rotary_emb"):
            raise InputError(
                "method",
                "pyramid_infer",
                f"drops tokens between decoder layers that share one RoPE, and {type(model).__name__} is not built so",
            )
        shared = Sequences(weakref.ref(cache), len(cache.layers))
        for i, layer in enumerate(cache.layers):
            layer.state.layer_idx, layer.state.shared = i, shared
        hook_layers(model, shared)

    def select(self, prompt: Prompt, state: Any = None) -> Kept:
        """Everything that came here stays here; notes what goes on to the next layer."""
        group = len(state.chosen)
        if state.layer_idx == 0:
            state.shared.prompts.append(prompt.length)
        whole = state.shared.prompts[group]
        lengths = self.layer_lengths(whole, prompt.num_layers)
        recent = 1 + self.recent(whole)
        last = prompt.layer_idx == prompt.num_layers - 1
        going_on = prompt.length if last else lengths[prompt.layer_idx + 1]
        published = self.trigger == "published"
        if going_on == prompt.length and not published:
            state.chosen.append(None)
            return Kept()
        weights = torch.linspace(1.0, self.distance_weight, recent, device=prompt.keys.device)
        score = torch.zeros(prompt.keys.shape[0], prompt.length, device=prompt.keys.device)
        rows = []
        for start, block in attention_blocks(prompt, recent):
            attention = block.mean(dim=(1, 2))  # [R, n, columns]
            n, columns = attention.shape[1:]
            score[:, :columns] += torch.einsum("q,rqt->rt", weights[start : start + n], attention)
            if published:
                rows.append(F.pad(attention, (0, prompt.length - columns)))
        if published:
            state.rows.append(torch.cat(rows, dim=1))
        if going_on == prompt.length:
            state.chosen.append(None)
            return Kept()
        context = prompt.length - recent
        sinks = min(self.sinks, context)
        score[:, :sinks] = 1e6 - torch.arange(sinks, device=score.device)  # above any attention; the earliest first
        best = keep_slots(score[:, :context], going_on - recent)  # [R, going_on - recent]
        tail = torch.arange(context, prompt.length, device=best.device).expand(best.shape[0], -1)
        state.chosen.append(torch.cat([best, tail], dim=1))
        return Kept()

    def after_prompt(
        self,
        state: PyramidState,
        storage: LayerStorage,
        lengths: torch.Tensor,
        scores: torch.Tensor | None,
        queries: torch.Tensor | None = None,
    ) -> None:
        assert state.shared is not None
        cache = state.shared.cache()
        assert cache is not None and cache.new_tokens is not None
        rows = cache.new_tokens.rows
        state.lengths = lengths.tolist()
        state.settled = list(state.lengths)
        state.seen = [0] * len(state.lengths)
        for group, whole in zip(rows, state.shared.prompts, strict=True):
            for row in range(len(state.seen)) if group.index is None else group.index.tolist():
                state.seen[row] = whole
        state.limit = [self.limit(n) for n in state.seen]
        if self.trigger == "own_length":
            state.record = WindowSums.empty(len(state.lengths), lengths.device)
        elif self.trigger == "published":
            state.record = AttentionRows.of_prompt(rows, state.rows, max(state.lengths))
            state.rows = []

    # steps -------------------------------------------------------------------------------------------------------

    def attend(self, state: PyramidState, storage: LayerStorage, step: Step) -> torch.Tensor:
        if self.trigger == "never":
            return super().attend(state, storage, step)
        assert state.shared is not None
        if state.layer_idx == 0:
            state.shared.recent = []
        return torch.cat([self._attend_one(state, storage, token, i) for i, token in enumerate(step.tokens())], dim=2)

    def _attend_one(self, state: PyramidState, storage: LayerStorage, step: Step, number: int) -> torch.Tensor:
        out, weights, held = attend_and_weigh(storage, step)
        assert state.shared is not None and state.record is not None
        real = [True] * len(state.lengths) if step.valid is None else step.valid[:, 0].tolist()
        for row, is_real in enumerate(real):
            state.lengths[row] += is_real
            state.seen[row] += is_real
        if state.layer_idx == 0:
            state.shared.recent.append([self.recent(n) for n in state.lengths])
        state.recent = state.shared.recent[number]
        if step.valid is not None:  # the row of a pad stands still: put its tokens at the end again
            assert held is not None
            kept, valid = slots_that_stay(held[:, :1])
            storage.keep(kept, valid)
            weights = weights.gather(3, kept[:, :, None].expand(*weights.shape[:3], -1))
            held = valid
        state.record.observe(self, state, weights, step.valid)
        self._thin_out(state, storage, weights.shape[3], held)
        return out

    def _thin_out(self, state: PyramidState, storage: LayerStorage, slots: int, held: torch.Tensor | None) -> None:
        assert state.shared is not None and state.record is not None
        stay = self.stay_of_window(state.layer_idx, state.shared.layers)
        staying = None
        for row, length in enumerate(state.lengths):
            settled, recent = state.settled[row], state.recent[row]
            first, number = self.window_to_thin(length, settled, state.seen[row], recent, state.limit[row])
            if not number:
                continue
            left = min(stay, number)
            if left < number:
                worth = state.record.score(self, state, row, first, number)
                if staying is None:
                    every = torch.ones(len(state.lengths), 1, slots, dtype=torch.bool, device=worth.device)
                    staying = every if held is None else held[:, :1].clone()
                at = slots - length + first
                staying[row, 0, at : at + number] = keep_mask(worth, left)
                state.lengths[row] -= number - left
            state.settled[row] = self.settled_after(state.lengths[row], settled, recent, left)
        if staying is not None:
            kept, valid = slots_that_stay(staying)
            storage.keep(kept, valid)
            state.record.keep(kept[:, 0])

    def state_tensors(self, state: Any) -> list[torch.Tensor]:
        return [] if state.record is None else state.record.tensors()

    def logical_state_bytes(self, state: Any, tokens: torch.Tensor) -> int:
        return 0 if state.record is None else state.record.logical_bytes(state)
