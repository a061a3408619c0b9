"""Methods that hold a fixed number of tokens: after each step, once its attention is computed, the worst one leaves.

A subclass says what a token is worth (:meth:`EvictingSelection.observe`) and how many of the last tokens are safe.
Rows of a batch may hold different numbers of tokens; with several tokens in one step each is fed by itself, so that a
step of n tokens is n steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from ...conf.errors import require
from ..cache.products import exact_products
from ..storage.base import LayerStorage
from .base import Budget, ModelLayer, Selection, Step, check_budget, resolve_budget
from .ranking import last_slot


@dataclass
class EvictingState:
    """One layer and batch.

    Attributes:
        scores: [B, H, S] float32, what each held token is worth so far; None where a method keeps no account.
        limit: [B, 1] int64, tokens that each row may hold.
        safe: [B, 1] int64, how many of the last tokens may not leave.
        most: the largest limit as a plain number, which costs no look at the device.
        weights: attention that the layers of the model which share these tokens have paid in the step under way.
    """

    scores: torch.Tensor | None = None
    limit: torch.Tensor | None = None
    safe: torch.Tensor | None = None
    most: int = 0
    weights: list[torch.Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class EvictingSelection(Selection):
    """Attend, then let go of what is worth least.

    Attributes:
        budget: tokens held per head, or a fraction of the prompt.
        prefill_only: evict once, after the prompt, and keep every generated token (kvpress' and KVCache-Factory's
            protocol); False: evict after every step too (the papers').
    """

    omitted_at: ClassVar[Mapping[str, Any]] = {"prefill_only": False}
    budget: Budget = 1024
    prefill_only: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        check_budget(self.budget)
        only = self.prefill_only
        require(isinstance(only, bool), "method.selection.prefill_only", only, "must be true or false")

    @property
    def evicts_while_decoding(self) -> bool:
        return not self.prefill_only

    @property
    def ranks_tokens(self) -> bool:
        return True

    def recent(self, limit: int) -> int:
        """How many of the last tokens may not leave, of ``limit`` held ones."""
        return 0

    def observe(self, state: EvictingState, weights: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
        """Take account of a step's attention.

        Args:
            state: the layer's state; ``scores`` does not hold the new token yet.
            weights: [B, H, g, S] float32, attention of the new token's g query heads per stored head over all S slots,
                its own the last.
            real: [B] bool, False for a row whose new token is a pad; None: all real.

        Returns:
            [B, 1 or H, S] float32: what each token is worth; the least leaves (of all heads alike where it is 1).
        """
        raise NotImplementedError

    def new_state(self, layer: ModelLayer) -> EvictingState:
        return EvictingState()

    def after_prompt(self, state: EvictingState, lengths: torch.Tensor, scores: torch.Tensor | None) -> None:
        if self.prefill_only:
            return
        limits = [resolve_budget(self.budget, n) for n in lengths.tolist()]
        state.limit = torch.tensor([[n] for n in limits], device=lengths.device)
        state.safe = torch.tensor([[self.recent(n)] for n in limits], device=lengths.device)
        state.most = max(limits)
        state.scores = scores

    def attend(self, state: EvictingState, storage: LayerStorage, step: Step) -> torch.Tensor:
        if self.prefill_only:
            return super().attend(state, storage, step)
        return torch.cat([self._attend_one(state, storage, token) for token in step.tokens()], dim=2)

    def _attend_one(self, state: EvictingState, storage: LayerStorage, step: Step) -> torch.Tensor:
        out, weights, held = attend_and_weigh(storage, step)
        if (
            not step.use.is_last_reader or step.use.strictly_causal or state.weights
        ):  # several layers of the model: what leaves is decided by all of them
            state.weights.append(weights)
            if not step.use.is_last_reader:
                return out
            keys, _, held = storage.read()
            slots = keys.shape[2]  # a layer that came before the new token was written paid it nothing
            weights = torch.cat([F.pad(w, (0, slots - w.shape[3])) for w in state.weights], dim=2)
            state.weights = []
        worth = self.observe(state, weights, None if step.valid is None else step.valid[:, 0])
        self._evict(state, storage, held, worth, at_once=step.valid is not None)
        return out

    def _evict(
        self,
        state: EvictingState,
        storage: LayerStorage,
        held: torch.Tensor | None,
        worth: torch.Tensor,
        at_once: bool,
    ) -> None:
        """Let the least worthy token leave where more are held than the limit; its slot is used again later.

        ``at_once``: close the gaps now, so that the real tokens end at the last slot again (a pad was appended).
        """
        assert state.limit is not None and state.safe is not None
        slots = worth.shape[-1]
        if slots <= state.most and held is None:  # padding is on the left: more slots than tokens, never fewer
            return
        limit = state.limit[:, :, None]  # [B, 1, 1]
        count = torch.full_like(limit, slots) if held is None else held.sum(-1, keepdim=True)  # [B, 1 or H, 1]
        stay = torch.ones_like(worth, dtype=torch.bool) if held is None else held.expand_as(worth)
        rank = torch.arange(slots, device=worth.device)
        protected = rank >= slots - state.safe[:, :, None]  # the last slots hold the last tokens, without a gap
        victim = last_slot(worth.masked_fill(protected | ~stay, float("inf")))  # [B, 1 or H, 1]
        stay = stay.scatter(-1, victim, stay.gather(-1, victim) & (count <= limit))
        moved = storage.drop(stay, at_once)
        if moved is not None and state.scores is not None:
            state.scores = state.scores.gather(-1, moved.expand(*state.scores.shape[:2], -1))

    def kept_tokens(self, prompt_length: int, new_tokens: int, layers: int) -> Sequence[int]:
        budget = resolve_budget(self.budget, prompt_length)
        if self.prefill_only:
            return [min(prompt_length, budget) + new_tokens] * layers
        return [min(prompt_length + new_tokens, budget)] * layers

    def logical_state_bytes(self, state: Any, tokens: torch.Tensor) -> int:
        if state.scores is None:
            return 0
        return state.scores.element_size() * int(tokens.expand(-1, state.scores.shape[1]).sum())

    def state_tensors(self, state: Any) -> list[torch.Tensor]:
        return [] if state.scores is None else [state.scores]


def attend_and_weigh(storage: LayerStorage, step: Step) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Append one token per row and attend, with the weights in view.

    Returns:
        (output [B, H_q, 1, D]; weights [B, H, g, S] float32 over all slots seen, the new token's the last unless it
        does not see itself; which slots hold a real token [B, 1 or H, S], or None: all).
    """
    step.append_to(storage, before_attention=True)
    keys, values, held = storage.read()
    batch, query_heads, _, dim = step.query.shape
    grouped = step.query.reshape(batch, keys.shape[1], -1, dim)  # [B, H, g, D]
    logits = step.rule.logits(exact_products(grouped, keys))
    if held is not None:
        visible = held
        if step.valid is not None:
            visible = held.clone()
            visible[..., -1] = True  # a pad sees itself, for a softmax over something
        logits = logits.masked_fill(~visible[:, :, None], float("-inf"))
    weights = step.rule.weights(logits, head_dims=2)
    out = (weights.to(values.dtype) @ values).reshape(batch, query_heads, 1, -1)
    step.append_to(storage, before_attention=False)
    return out, weights.float(), held
