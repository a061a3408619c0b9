"""Cache layer: attends over the whole prompt, stores the tokens that the policy keeps, then appends the decoded tokens.

The prefill is in :mod:`.prefill`. It ends with :meth:`CacheLayer.finish_prefill`: the policy selects the tokens and the
storage holds them. From then on :meth:`CacheLayer.attend` appends the new tokens, attends over the stored
ones and lets the policy evict.

Legend: B batch rows, H_q query heads, H stored heads, T prompt tokens, C kept tokens, w queries, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ..policies.policy import CachePolicy, PolicyCapabilities, Step
from ..sharing.plan import KVAccess, Span
from ..storage.base import LayerStorage
from ..storage.buffer import take_slots
from ..storage.dense import COMPACTION_INTERVAL_STEPS
from ..storage.static import NextSlot
from .forward import LayerCall, NewTokens, Rows
from .prefill import PrefillLayer
from .products import repeat_heads
from .prompt import Prompt


@dataclass(frozen=True)
class KeptRows:
    """Kept tokens [R, H, C, D] of the rows that have ``length`` prompt tokens; see :class:`..policies.policy.Kept`."""

    rows: Rows
    length: int
    keys: torch.Tensor
    values: torch.Tensor
    valid: torch.Tensor | None
    scores: torch.Tensor | None


class CacheLayer(PrefillLayer):
    """Cache layer: one policy, the policy's ``state`` for this layer, and one storage."""

    is_sliding = False  # read by transformers
    is_compileable = record_past = False

    def __init__(
        self,
        layer_idx: int,
        num_layers: int,
        policy: CachePolicy,
        state: Any,
        storage: LayerStorage,
        span: Span | None = None,
    ):
        super().__init__(layer_idx, num_layers, policy.capabilities.observation_window, span)
        self.policy, self.state, self.storage = policy, state, storage
        if policy.capabilities.evicts_while_decoding:  # slots to allocate ahead: a compaction then frees them again
            storage.growth = COMPACTION_INTERVAL_STEPS
        self.in_prefill = not policy.capabilities.prefills_by_steps

    @property
    def capabilities(self) -> PolicyCapabilities:
        """Capabilities of the policy."""
        return self.policy.capabilities

    @property
    def static_problem(self) -> str | None:
        if self.in_prefill:
            return "the prompt is not complete"
        problem = self.capabilities.static_problem or self.storage.static_problem
        if problem is None and self.capabilities.evicts_while_decoding and not self.storage.supports_static_drop:
            return "tokens leave while decoding, and the storage cannot drop them in place"
        return problem

    def make_static(self, steps: int) -> None:
        self.policy.make_static(self.state, self.storage, steps)

    def static_state(self) -> list[torch.Tensor]:
        values = [self.storage.read()[1]] if self.capabilities.merges_values else []  # merging changes stored values
        return self.storage.static_state() + self.policy.static_state(self.state) + values

    def between_steps(self) -> None:
        self.storage.between_steps()
        self.policy.between_steps(self.state, self.storage)

    def end_steps(self) -> None:
        self.storage.end_steps()

    @property
    def next_slot(self) -> NextSlot | None:
        return None if self.policy.capabilities.stores_query_heads else self.storage.next_slot

    def method_names(self) -> str:
        return type(self.policy).__name__

    def observe_questions(self, tokens: int) -> None:
        if self.capabilities.observes_question:
            self.observation_window = max(self.observation_window, tokens)

    def finish_prefill(self, prompts: list[tuple[Rows, Prompt]]) -> None:
        """Select the tokens to keep in each group of rows, then store all groups as one batch."""
        groups = []
        for rows, prompt in prompts:
            keys, values = prompt.keys, prompt.values  # [R, H_kv, T, D]
            kept = self.policy.select(replace(prompt, rows=rows.index), self.state)
            if self.policy.capabilities.stores_query_heads:
                keys, values = repeat_heads(keys, prompt.groups), repeat_heads(values, prompt.groups)  # [R, H_q, T, D]
            if kept.slots is not None:
                keys, values = (take_slots(x, kept.slots) for x in (keys, values))
                keys = self.policy.stored_keys(keys, kept.slots, prompt.length, self.state)
            groups.append(KeptRows(rows, prompt.length, keys, values, kept.valid, kept.scores))  # [R, H, C, D]
        lengths, scores = self._store(groups)
        queries = self._last_queries(prompts) if self.policy.capabilities.stored_queries else None
        self.policy.after_prompt(self.state, self.storage, lengths, scores, queries)

    def _last_queries(self, prompts: list[tuple[Rows, Prompt]]) -> torch.Tensor:
        """Return the last w queries of all rows, [B, H_q, w, D], zero-padded on the left for shorter prompts."""
        batch = sum(prompt.query.shape[0] for _, prompt in prompts)
        _, first = prompts[0]
        w = self.policy.capabilities.stored_queries
        out = first.query.new_zeros(batch, first.query.shape[1], w, first.query.shape[3])
        for rows, prompt in prompts:
            query = prompt.query[:, :, max(0, prompt.query.shape[2] - w) :]
            out[slice(None) if rows.index is None else rows.index, :, w - query.shape[2] :] = query
        return out

    def _store(self, groups: list[KeptRows]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Store the groups as one left-padded batch and return the prompt lengths [B] and the scores [B, H, C]."""
        first = groups[0]
        if len(groups) == 1:
            self.storage.write(first.keys, first.values, first.valid)
            lengths = torch.full((first.keys.shape[0],), first.length, dtype=torch.int64, device=first.keys.device)
            return lengths, first.scores
        batch = sum(g.keys.shape[0] for g in groups)
        width = max(g.keys.shape[2] for g in groups)
        heads = max(1 if g.valid is None else g.valid.shape[1] for g in groups)
        keys, values = (x.new_zeros(batch, x.shape[1], width, x.shape[3]) for x in (first.keys, first.values))
        valid = torch.zeros(batch, heads, width, dtype=torch.bool, device=keys.device)
        lengths = torch.zeros(batch, dtype=torch.int64, device=keys.device)
        scores = None if first.scores is None else first.scores.new_zeros(batch, first.scores.shape[1], width)
        for g in groups:
            start = width - g.keys.shape[2]
            keys[g.rows.index, :, start:] = g.keys
            values[g.rows.index, :, start:] = g.values
            valid[g.rows.index, :, start:] = True if g.valid is None else g.valid
            lengths[g.rows.index] = g.length
            if scores is not None and g.scores is not None:
                scores[g.rows.index, :, start:] = g.scores
        self.storage.write(keys, values, None if bool(valid.all()) else valid)
        return lengths, scores

    def attend(self, call: LayerCall, new: NewTokens, use: KVAccess) -> torch.Tensor:
        """Append the new tokens of one layer of the model and attend: [B, H_q, n, D] -> the same shape."""
        if self.in_prefill:
            return self.prefill(call, new, use)
        key, value = call.written
        if self.policy.capabilities.stores_query_heads:
            groups = call.query.shape[1] // key.shape[1]
            key, value = repeat_heads(key, groups), repeat_heads(value, groups)
        n = key.shape[2]
        size = self.policy.max_step_tokens(call.query) or n
        if n <= size:
            out = self._step(Step(call.query, call.rule, new.valid), key, value, use, call.is_stored)
        else:
            outputs = []
            for start in range(0, n, size):
                query, k, v = (x[:, :, start : start + size] for x in (call.query, key, value))
                valid = None if new.valid is None else new.valid[:, start : start + size]
                outputs.append(self._step(Step(query, call.rule, valid, start), k, v, use))
            out = torch.cat(outputs, dim=2)
        if use.is_last_reader:
            self.seen += key.shape[2]
            self.storage.flush()
            if self.seen == new.prompt_length:
                self.storage.shrink_to_fit()
        return out

    def _step(
        self, step: Step, key: torch.Tensor, value: torch.Tensor, use: KVAccess, is_stored: bool = False
    ) -> torch.Tensor:
        """Append the new tokens and attend.

        Several layers of the model may share this cache layer (KV sharing): only the owner appends, and the policy
        evicts after the last of them has attended. The owner appends before its attention. If no token
        attends to itself (``strictly_causal``), it appends afterwards.

        Args:
            step: Queries of the new tokens.
            key, value: [B, H, n, D], to be stored.
            use: How the layer of the model uses this cache layer.
            is_stored: Whether key and value are already in the storage's next slot.

        Returns:
            [B, H_q, n, D].
        """
        if is_stored:
            self.storage.advance()
        elif use.is_owner and not use.strictly_causal:
            moved = self.storage.append(key, value, step.valid)
            if moved is not None:
                self.policy.after_append(self.state, moved)
        out = self.policy.attend(self.state, self.storage, step)
        if use.is_owner and use.strictly_causal:
            self.storage.append(key, value, step.valid)
        if use.is_last_reader:
            self.policy.after_attention(self.state, self.storage, step)
        return out

    def get_seq_length(self) -> int:
        """Return the number of columns seen, pads included; transformers derives positions and masks from it."""
        return self.seen

    @property
    def tokens(self) -> torch.Tensor:
        """Number of real tokens stored, [B, 1 or H] int64."""
        return self.storage.tokens

    def tensors(self) -> list[torch.Tensor]:
        """Return all tensors that this layer keeps in memory."""
        return self.storage.tensors() + self.policy.state_tensors(self.state)

    @property
    def logical_bytes(self) -> int:
        """Bytes of the real tokens and of the policy's state for them."""
        return self.storage.logical_bytes + self.policy.logical_state_bytes(self.state, self.storage.tokens)

    @property
    def step_bytes_read(self) -> int:
        return self.storage.step_bytes_read + self.policy.logical_state_bytes(self.state, self.storage.tokens)
