"""StreamingLLM (Xiao et al., 2024, arXiv 2309.17453): a few first tokens as attention sinks, and the most recent ones.

Section 3.2: the cache holds the first ``sinks`` tokens and the last ``budget - sinks``; positions are counted *inside
the cache*, so that the query never stands further from any key than the cache is long. Each step appends, attends (the
query sees the whole cache and itself) and then drops the oldest token that is not a sink.

Two protocols exist under this name and both are here:

* ``mode=true_stream`` (the paper's): every token, the prompt's too, sees only what the cache held at its time. Computed
  in blocks with a banded mask, which equals feeding the tokens one by one.
* ``mode=prefill_evict``: the prompt is read with full attention and evicted once, so that the surviving tokens have
  already seen the middle of the prompt. Each step then evicts as in the paper. With ``prefill_only=true`` every
  generated token stays: the protocol of kvpress and KVCache-Factory (which also leave the sinks at their true distance:
  ``reposition=false``).

Positions inside the cache, without rotating the cache: RoPE attention depends on distances alone. The recent tokens
stand at their true distances from the query anyway; only the sinks are too far, by the number of tokens evicted. So
keys keep their true positions and, for the sinks' logits alone, the query is rotated back by that number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F

from ...conf.errors import InputError, require
from ...conf.options import NonNegativeInt
from ..cache.products import cached_attention, exact_products
from ..cache.prompt import Prompt
from ..cache.rotary import Rotary
from ..storage.base import LayerStorage
from ..storage.dense import COMPACTION_INTERVAL_STEPS
from .budget import Budget, resolve_budget
from .policy import CachePolicy, Kept, PolicyCapabilities, Step
from .scorers.base import ModelLayer

BLOCK = 256
"""Prompt tokens that pass through the cache at a time in ``true_stream``; memory is O(BLOCK x (budget + BLOCK))."""


@dataclass
class StreamState:
    """One layer and batch.

    Attributes:
        rotary: turns the query back for the sinks' logits; None: positions are left alone.
        seen: real tokens fed so far, [B] int64; None before the first.
        limit: tokens a row may hold between steps, [B, 1] int64; None until it is known.
        fed: tokens fed so far as a plain number, an upper bound of ``seen`` that costs no device sync.
        padded: rows differ in length, so that the sinks of each stand in slots of their own.
        evicted: real tokens that left before the step under way, [B, 1] int64; None between steps.
        steps: static steps so far.
        is_static: the layer's tensors have their final shapes, and steps change them in place.
    """

    rotary: Rotary | None
    seen: torch.Tensor | None = None
    limit: torch.Tensor | None = None
    fed: int = 0
    padded: bool = False
    evicted: torch.Tensor | None = None
    steps: int = 0
    is_static: bool = False


@dataclass(frozen=True)
class StreamingLLM(CachePolicy):
    """Attention sinks and a sliding window.

    Attributes:
        budget: tokens held per head, sinks included; ``prefill_evict`` also takes a fraction of the prompt.
        sinks: first tokens that are always kept (4 in the paper); 0 is plain window attention.
        mode: ``true_stream`` or ``prefill_evict``, see the module's docstring.
        reposition: count positions inside the cache (the paper); False leaves the sinks at their true distance.
        prefill_only: with ``prefill_evict``, evict once, after the prompt, and keep every generated token.
    """

    id: ClassVar[str] = "StreamingLLM"
    omitted_at: ClassVar[Mapping[str, Any]] = {"prefill_only": False}
    budget: Budget = 1024
    sinks: NonNegativeInt = 4
    mode: Literal["true_stream", "prefill_evict"] = "true_stream"
    reposition: bool = True
    prefill_only: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prefill_only and self.capabilities.prefills_by_steps:
            raise InputError(
                "method.policy.prefill_only",
                True,
                "keeps what is generated after one eviction at the prompt's end, and a stream evicts at every token: "
                "set method.policy.mode=prefill_evict",
            )
        if isinstance(self.budget, int):
            require(
                self.sinks < self.budget,
                "method.policy.sinks",
                self.sinks,
                f"must be below method.budget={self.budget}, which includes the sinks",
            )
        elif self.capabilities.prefills_by_steps:
            raise InputError(
                "method.budget",
                self.budget,
                "a stream has no length to take a fraction of: give a number of tokens, or set "
                "method.policy.mode=prefill_evict",
            )

    @cached_property
    def capabilities(self) -> PolicyCapabilities:
        is_stream = self.mode == "true_stream"
        return PolicyCapabilities(
            evicts_while_decoding=not self.prefill_only,
            prefills_by_steps=is_stream,
            attends_whole_prompt=not is_stream,
            keeps_positions=not self.reposition,
            prefill_block=BLOCK if is_stream else 1,
            static_steps=True,
        )

    def new_state(self, layer: ModelLayer) -> StreamState:
        return StreamState(layer.rotary() if self.reposition else None)

    def select(self, prompt: Prompt, state: Any = None) -> Kept:
        budget = resolve_budget(self.budget, prompt.length)
        if prompt.length <= budget:
            return Kept()
        kept = torch.arange(budget, device=prompt.keys.device)
        kept[min(self.sinks, budget - 1) :] += prompt.length - budget
        return Kept(kept.expand(prompt.keys.shape[0], prompt.keys.shape[1], -1))

    def after_prompt(
        self,
        state: StreamState,
        storage: LayerStorage,
        lengths: torch.Tensor,
        scores: torch.Tensor | None,
        queries: torch.Tensor | None = None,
    ) -> None:
        state.seen = lengths.clone()
        state.fed = int(lengths.max())
        state.padded = bool((lengths != state.fed).any())
        state.limit = torch.tensor([[resolve_budget(self.budget, n)] for n in lengths.tolist()], device=lengths.device)

    def attend(self, state: StreamState, storage: LayerStorage, step: Step) -> torch.Tensor:
        if self.prefill_only and not self.reposition:
            return super().attend(state, storage, step)
        batch, n = step.query.shape[0], step.query.shape[2]
        if state.seen is None:
            state.seen = torch.zeros(batch, dtype=torch.int64, device=step.query.device)
        if state.limit is None:
            state.limit = torch.full((batch, 1), int(self.budget), device=step.query.device)
        blocks = [slice(start, min(n, start + BLOCK)) for start in range(0, n, BLOCK)]
        if len(blocks) == 1:
            return self._attend_block(state, storage, step)
        return torch.cat([self._attend_block(state, storage, step.part(block)) for block in blocks], dim=2)

    def _attend_block(self, state: StreamState, storage: LayerStorage, step: Step) -> torch.Tensor:
        """Append one block, attend, evict down to the limit."""
        assert state.seen is not None and state.limit is not None
        query, n = step.query, step.query.shape[2]
        if state.evicted is None:
            # Real tokens that left before this block: the slots after the sinks stand that far from their rank.
            state.evicted = state.seen[:, None] - (storage.tokens[:, :1] if state.fed else 0)
        evicted, seen, fed = state.evicted, state.seen, state.fed + n
        state.padded |= step.valid is not None
        step.append_to(storage, before_attention=True)
        keys, values, held = storage.read()
        held = None if held is None else held[:, :1]  # all heads alike
        if step.use.is_last_reader:
            if state.is_static:
                seen = seen.clone()
                state.seen += 1
            else:
                state.seen = state.seen + (n if step.valid is None else step.valid.sum(1))
                state.fed = fed
            state.evicted = None
        if isinstance(self.budget, int) and fed <= self.budget and not state.is_static:  # nothing has to leave yet
            out = cached_attention(query, keys, values, step.rule, held)
            step.append_to(storage, before_attention=False)
            return out

        slots = keys.shape[2]
        if held is None:
            rank = torch.arange(slots, device=query.device)[None]  # [1, S]
        else:
            rank = held[:, 0].long().cumsum(1) - 1  # [B, S]
        sinks = (state.limit - 1).clamp(max=self.sinks)  # [B, 1]
        recent = state.limit - sinks
        is_sink = rank < sinks
        position = torch.where(is_sink, rank, rank + evicted)  # [B, S], true positions
        is_next = step.use.strictly_causal or state.is_static  # the new token is not in the last slot
        at = seen[:, None] if is_next else position[:, -n:]  # [B, n], of the queries
        age = at[:, :, None] - position[:, None, :]  # [B, n, S]
        visible = age >= 0
        if not self.prefill_only:
            visible = visible & (is_sink[:, None, :] | (age <= recent[:, :, None]))
        if held is not None:
            visible = visible & held
            if step.valid is not None:  # a pad sees itself, for a softmax over something
                visible = visible | F.pad(torch.eye(n, dtype=torch.bool, device=query.device), (slots - n, 0))
        # How much further than in the cache a sink is, per query: [B, n].
        shift = evicted.expand_as(at) if self.prefill_only else (at - state.limit).clamp(min=0)
        logits = self._logits(state.rotary, query, keys, is_sink, shift, state.padded)
        logits = step.rule.logits(logits).masked_fill(~visible[:, None, None], float("-inf"))
        weights = step.rule.weights(logits, head_dims=2).to(values.dtype).flatten(2, 3)  # [B, H, g * n, S]
        out = (weights @ values).reshape(*query.shape[:3], -1)
        step.append_to(storage, before_attention=False)
        if step.use.is_last_reader and not self.prefill_only:
            if step.use.strictly_causal:  # the new token has come since
                rank, held = F.pad(rank, (0, 1), value=slots), None if held is None else F.pad(held, (0, 1), value=True)
            self._evict(storage, held, rank, sinks, recent, at_once=n > 1 or step.valid is not None)
        return out

    def _logits(
        self,
        rotary: Rotary | None,
        query: torch.Tensor,
        keys: torch.Tensor,
        is_sink: torch.Tensor,
        shift: torch.Tensor,
        padded: bool,
    ) -> torch.Tensor:
        """[B, H, g, n, S], unscaled, float32 or wider; those of the sinks with the query turned back by ``shift``."""
        batch, query_heads, n, dim = query.shape
        heads = keys.shape[1]

        def logits_of(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            grouped = exact_products(q.reshape(batch, heads, -1, dim), k)
            return grouped.reshape(batch, heads, query_heads // heads, n, -1)

        logits = logits_of(query, keys)
        if rotary is not None and self.sinks:
            # Without padding the sinks stand in the first slots; with it, in different slots of each row.
            count = keys.shape[2] if padded else min(self.sinks, keys.shape[2])
            turned = logits_of(rotary.turn(query, -shift), keys[:, :, :count])
            sink = is_sink[:, None, None, None, :count]
            logits[..., :count] = torch.where(sink, turned, logits[..., :count])
        return logits

    def _evict(
        self,
        storage: LayerStorage,
        held: torch.Tensor | None,
        rank: torch.Tensor,
        sinks: torch.Tensor,
        recent: torch.Tensor,
        at_once: bool,
    ) -> None:
        """Drop what is neither a sink nor recent; ``at_once``: give its room back now."""
        batch, slots = recent.shape[0], rank.shape[1]
        if held is None:
            held = torch.ones(batch, 1, slots, dtype=torch.bool, device=rank.device)
        count = held[:, 0].sum(1, keepdim=True)
        stay = (held[:, 0] & ((rank < sinks) | (rank >= count - recent)))[:, None]
        storage.drop(stay, at_once)

    def make_static(self, state: StreamState, storage: LayerStorage, steps: int) -> None:
        if self.prefill_only:
            storage.make_static(steps)
            state.is_static = self.reposition
            return
        assert state.limit is not None
        storage.make_static_within(int(state.limit.max()), COMPACTION_INTERVAL_STEPS)
        state.is_static = True

    def static_state(self, state: StreamState) -> list[torch.Tensor]:
        return [] if state.seen is None else [state.seen]

    def between_steps(self, state: StreamState, storage: LayerStorage) -> None:
        state.steps += 1
        state.fed += int(state.is_static)
        if not self.prefill_only and state.steps % COMPACTION_INTERVAL_STEPS == 0:
            storage.compact()

    def kept_tokens(self, prompt_length: int, new_tokens: int, layers: int) -> Sequence[int]:
        budget = resolve_budget(self.budget, prompt_length)
        if self.prefill_only:
            return [min(prompt_length, budget) + new_tokens] * layers
        return [min(prompt_length + new_tokens, budget)] * layers
