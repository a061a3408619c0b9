"""StreamingLLM (Xiao et al., 2024, arXiv 2309.17453): keep a few first tokens (attention sinks) and the recent ones.

Section 3.2: the cache keeps the first ``sinks`` tokens and the last ``budget - sinks``. Positions are counted *inside
the cache*, so that no query-key distance exceeds the cache length. Each step appends its token, attends over the whole
cache including the new token, and then evicts the oldest token that is not a sink.

Two protocols are published under this name:

* ``mode=true_stream`` (the paper): every token, also of the prompt, attends only to the tokens in the cache at that
  time. Computed in blocks with a banded mask, which is equivalent to feeding tokens one by one; on
  CUDA by a kernel that reads only the band and the sinks (:mod:`..storage.kernels.stream`).
* ``mode=prefill_evict``: the prompt is prefilled with full attention and evicted once, so the kept tokens have attended
  to the whole prompt. Each decode step then evicts as in the paper. With ``prefill_only=true`` all generated tokens are
  kept, the protocol of kvpress and KVCache-Factory (which also leave the sinks at their true distance:
  ``reposition=false``).

Positions inside the cache do not require rotating the cached keys, because RoPE attention depends only on distances.
The recent tokens already have their true distances to the query; only the sinks are too far away, by the number of
evicted tokens. Keys therefore keep their true positions, and the query is rotated back by that number for the logits of
the sinks only.

Legend: B batch rows, H_q query heads, H stored heads, g = H_q / H, n new tokens, S slots, D channels.
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
from ..cache.band import Band, ranks
from ..cache.kernel_use import STREAM_PREFILL, attention_problem, uses_kernel_on
from ..cache.products import cached_attention, query_key_products
from ..cache.prompt import Prompt
from ..cache.rotary import Rotary
from ..storage.base import LayerStorage
from ..storage.dense import COMPACTION_INTERVAL_STEPS
from .budget import Budget, resolve_budget
from .model_layer import ModelLayer
from .policy import CachePolicy, Kept, PolicyCapabilities, Step

BLOCK, KERNEL_BLOCK = 256, 8192
"""Prompt tokens per block in ``true_stream``, in PyTorch (with logits [BLOCK, budget + BLOCK]) and with a kernel."""


@dataclass
class StreamState:
    """State of one layer for one batch.

    Attributes:
        rotary: RoPE rotation of the queries; None: no re-positioning.
        seen: [B] int64, real tokens seen so far; None before the first.
        limit: [B, 1] int64, tokens that a row may store between steps; None before the first step.
        sinks, recent: [B, 1] int64, first and last tokens that a row keeps, ``limit`` together.
        evicted: [B, 1] int64, tokens of the prompt that were evicted.
        fed: Upper bound of ``seen`` on the host.
        padded: Whether rows may differ in length, so that their sinks are in different slots.
        steps: Static steps so far.
        is_static: Whether the layer's tensors have their final shapes and are modified in place.
    """

    rotary: Rotary | None
    seen: torch.Tensor | None = None
    limit: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    recent: torch.Tensor | None = None
    evicted: torch.Tensor | None = None
    fed: int = 0
    padded: bool = False
    steps: int = 0
    is_static: bool = False

    def set_limit(self, limit: torch.Tensor, sinks: int) -> None:
        """Set the tokens [B, 1] that each row may store, of which at most ``sinks`` are first tokens."""
        self.limit, self.sinks = limit, (limit - 1).clamp(max=sinks)
        self.recent = limit - self.sinks


@dataclass(frozen=True)
class StreamingLLM(CachePolicy):
    """Attention sinks and a sliding window.

    Attributes:
        budget: Tokens to keep, sinks included; with ``prefill_evict`` also a fraction of the prompt.
        sinks: Number of first tokens that are always kept (4 in the paper); 0 is plain window attention.
        mode: ``true_stream`` or ``prefill_evict``; see the module docstring.
        reposition: Count positions inside the cache, as in the paper; False keeps the sinks at their true distance.
        prefill_only: With ``prefill_evict``, evict only once, after the prefill, and keep all generated tokens.
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
            max_step_tokens=BLOCK if self._masks else None,
            static_problem=None,
        )

    @property
    def _masks(self) -> bool:
        """Whether a step needs the mask and the positions of this module, and not plain attention."""
        return self.reposition or not self.prefill_only

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
        limit = torch.tensor([[resolve_budget(self.budget, n)] for n in lengths.tolist()], device=lengths.device)
        state.set_limit(limit, self.sinks)
        state.evicted = (lengths[:, None] - limit).clamp(min=0)

    def attend(self, state: StreamState, storage: LayerStorage, step: Step) -> torch.Tensor:
        if not self._masks:
            return super().attend(state, storage, step)
        query, n = step.query, step.query.shape[2]
        if state.seen is None:
            state.seen = torch.zeros(query.shape[0], dtype=torch.int64, device=query.device)
        if state.limit is None:
            state.set_limit(torch.full((query.shape[0], 1), int(self.budget), device=query.device), self.sinks)
        assert state.limit is not None and state.sinks is not None and state.recent is not None
        state.padded |= step.valid is not None
        keys, values, valid = storage.read()
        valid = None if valid is None else valid[:, :1]  # [B, 1, S], equal for all heads
        if not self._may_evict(state, state.fed + n):
            return cached_attention(query, keys, values, step.rule, valid)

        # Positions of the keys and of the queries.
        slots = keys.shape[2]
        rank = ranks(valid, slots, query.device)  # [1 or B, S]
        is_sink = rank < state.sinks  # [B, S]
        # Tokens evicted before this step: the difference between position and rank of the recent tokens.
        evicted = state.evicted if self.prefill_only else (state.seen[:, None] - state.limit).clamp(min=0)  # [B, 1]
        assert evicted is not None
        position = torch.where(is_sink, rank, rank + evicted)  # [B, S]
        is_real = None if step.valid is None else step.valid[:, None]  # [B, 1, n]
        query_position = state.seen[:, None] + ranks(is_real, n, query.device)  # [B, n]
        # Tokens evicted between the sinks and each query.
        shift = evicted.expand_as(query_position) if self.prefill_only else query_position - state.limit
        shift = shift.clamp(min=0)  # [B, n]

        held, recent = None if valid is None else valid[:, 0], None if self.prefill_only else state.recent
        band = Band(position, query_position, held, is_sink, self.sinks, recent)
        if n > 1 and _uses_kernel(query, values):
            from ..storage.kernels.stream import stream_attention

            rotated = query if state.rotary is None else state.rotary.rotate(query, -shift)
            return stream_attention(query, rotated, keys, values, band, step.rule)
        visible = band.visible()  # [B, n, S]
        if step.valid is not None:  # a pad attends to itself, because the softmax of a fully masked row is NaN
            visible = visible | F.pad(torch.eye(n, dtype=torch.bool, device=query.device), (slots - n, 0))
        logits = self._logits(state.rotary, query, keys, is_sink, shift, state.padded)
        logits = step.rule.logits(logits).masked_fill(~visible[:, None, None], float("-inf"))
        weights = step.rule.weights(logits, head_dims=2).to(values.dtype).flatten(2, 3)  # [B, H, g * n, S]
        return (weights @ values).reshape(*query.shape[:3], -1)  # [B, H_q, n, D]

    def max_step_tokens(self, query: torch.Tensor) -> int | None:
        if self._masks and not self.prefill_only and query.shape[2] > BLOCK and _uses_kernel(query, query):
            return KERNEL_BLOCK
        return super().max_step_tokens(query)

    def _may_evict(self, state: StreamState, fed: int) -> bool:
        """Whether a token may have been evicted once ``fed`` tokens have been seen."""
        return state.is_static or not isinstance(self.budget, int) or fed > self.budget

    def after_attention(self, state: StreamState, storage: LayerStorage, step: Step) -> None:
        """Evict the tokens that are neither sinks nor recent."""
        if not self._masks:
            return
        assert state.seen is not None and state.sinks is not None and state.recent is not None
        n = step.query.shape[2]
        if state.is_static:
            state.seen += 1
        else:
            state.seen = state.seen + (n if step.valid is None else step.valid.sum(1))
            state.fed += n
        if self.prefill_only or not self._may_evict(state, state.fed):
            return
        valid, slots, device = storage.valid, storage.slots, state.seen.device
        if valid is None:
            valid = torch.ones(len(state.seen), 1, slots, dtype=torch.bool, device=device)
        real = valid[:, 0]  # [B, S]
        rank = ranks(valid, slots, device)  # [B, S]
        keep = real & ((rank < state.sinks) | (rank > rank[:, -1:] - state.recent))  # [B, S]
        storage.drop(keep[:, None], compact_now=n > 1 or step.valid is not None)

    def _logits(
        self,
        rotary: Rotary | None,
        query: torch.Tensor,
        keys: torch.Tensor,
        is_sink: torch.Tensor,
        shift: torch.Tensor,
        padded: bool,
    ) -> torch.Tensor:
        """Return unscaled logits [B, H, g, n, S] in float32 or wider, the query rotated by -``shift`` for sinks."""
        batch, query_heads, n, dim = query.shape
        heads = keys.shape[1]

        def logits_of(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            grouped = query_key_products(q.reshape(batch, heads, -1, dim), k)
            return grouped.reshape(batch, heads, query_heads // heads, n, -1)

        logits = logits_of(query, keys)
        if rotary is not None and self.sinks:
            # Without padding the sinks are in the first slots; with padding the slots depend on the row.
            count = keys.shape[2] if padded else min(self.sinks, keys.shape[2])
            rotated = logits_of(rotary.rotate(query, -shift), keys[:, :, :count])
            sink = is_sink[:, None, None, None, :count]
            logits[..., :count] = torch.where(sink, rotated, logits[..., :count])
        return logits

    def make_static(self, state: StreamState, storage: LayerStorage, steps: int) -> None:
        if self.prefill_only:
            storage.make_static(steps)
            state.is_static = self.reposition
            return
        assert state.limit is not None
        storage.make_static_within(state.limit, COMPACTION_INTERVAL_STEPS)
        state.is_static = True

    def static_state(self, state: StreamState) -> list[torch.Tensor]:
        return [] if state.seen is None else [state.seen]

    def between_steps(self, state: StreamState, storage: LayerStorage) -> None:
        state.steps += 1
        state.fed += int(state.is_static)
        if not self.prefill_only and state.steps % COMPACTION_INTERVAL_STEPS == 0:
            storage.compact()

    def kept_tokens(self, prompt_length: int, new_tokens: int, layers: int, heads: int) -> Sequence[int]:
        budget = resolve_budget(self.budget, prompt_length)
        if self.prefill_only:
            return [min(prompt_length, budget) + new_tokens] * layers
        return [min(prompt_length + new_tokens, budget)] * layers


def _uses_kernel(query: torch.Tensor, values: torch.Tensor) -> bool:
    """Return whether a kernel attends with several tokens per row, and record it."""
    problem = attention_problem(query, query.shape[3], values.shape[3]) if query.is_cuda else None
    return uses_kernel_on(query.device, STREAM_PREFILL, problem)
