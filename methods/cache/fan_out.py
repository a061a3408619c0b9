"""Cache that lets several methods share one prefill and one batched decode.

Prompt attention is the same for every method that attends over the whole prompt, so a layer computes it once and each
member compresses its own copy; other methods prefill separately. Decoding then runs the rows of all members as one
batch, so that the weights are read once. A sweep over methods and budgets costs one shared prefill, one prefill for
each method that cannot share it, and one batched decode.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from ..policies.policy import PolicyCapabilities
from ..sharing.kv_map import LINEAR
from ..sharing.plan import KVAccess
from .cache import KVCache
from .forward import LayerCall, NewTokens, Rows
from .layer import CacheLayer
from .prefill import PrefillLayer
from .prompt import Prompt
from .retention import RecurrentLayer


class FanOutLayer(PrefillLayer):
    """The corresponding cache layers of all members, as one layer."""

    is_sliding = False
    is_compileable = record_past = False

    def __init__(self, members: Sequence[CacheLayer]):
        self.members = list(members)
        first = self.members[0]
        super().__init__(first.layer_idx, first.num_layers, max(m.observation_window for m in self.members), first.span)
        self.model_layer = first.model_layer

    def method_names(self) -> str:
        return ", ".join(dict.fromkeys(member.method_names() for member in self.members))

    def observe_questions(self, tokens: int) -> None:
        for member in self.members:
            member.observe_questions(tokens)
        self.observation_window = max(member.observation_window for member in self.members)

    def finish_prefill(self, prompts: list[tuple[Rows, Prompt]]) -> None:
        for member in self.members:
            member.finish_prefill([(rows, prompt.last_queries(member.observation_window)) for rows, prompt in prompts])
            member.seen, member.in_prefill = self.seen, False

    def attend(self, call: LayerCall, new: NewTokens, use: KVAccess) -> torch.Tensor:
        """Attend over the shared prompt during prefill, then over each member's own keys and values."""
        if self.in_prefill:
            return self.prefill(call, new, use)
        if use.is_last_reader:
            self.seen += call.columns
        share = call.query.shape[0] // len(self.members)
        out = []
        for i, member in enumerate(self.members):
            rows = slice(i * share, (i + 1) * share)
            tokens = NewTokens([], None if new.valid is None else new.valid[rows], new.prompt_length)
            out.append(member.attend(call.select_rows(rows), tokens, use))
        return torch.cat(out)

    def mark_prefilled(self) -> None:
        """End the prefill after the members have prefilled separately."""
        self.seen, self.in_prefill = self.members[0].seen, False

    @property
    def static_problem(self) -> str | None:
        return next((m.static_problem for m in self.members if m.static_problem is not None), None)

    def make_static(self, steps: int) -> None:
        for member in self.members:
            member.make_static(steps)

    def static_state(self) -> list[torch.Tensor]:
        return [t for member in self.members for t in member.static_state()]

    def between_steps(self) -> None:
        for member in self.members:
            member.between_steps()

    def end_steps(self) -> None:
        for member in self.members:
            member.end_steps()

    def skip(self, steps: int) -> None:
        super().skip(steps)
        for member in self.members:
            member.skip(steps)

    @property
    def capabilities(self) -> PolicyCapabilities:
        """Combined capabilities of the members."""
        each = [member.capabilities for member in self.members]
        return PolicyCapabilities(
            evicts_while_decoding=any(c.evicts_while_decoding for c in each),
            prefills_by_steps=all(c.prefills_by_steps for c in each),
            attends_whole_prompt=all(c.attends_whole_prompt for c in each),
            spans_layers=any(c.spans_layers for c in each),
            max_step_tokens=min((c.max_step_tokens for c in each if c.max_step_tokens is not None), default=None),
        )

    def get_seq_length(self) -> int:
        """Number of tokens that the layer has seen."""
        return self.seen

    def tensors(self) -> list[torch.Tensor]:
        """Tensors of all members."""
        return [t for member in self.members for t in member.tensors()]


def fan_out_layer(members: Sequence[Any]) -> FanOutLayer | RecurrentLayer:
    """Combine the members' cache layers at one index."""
    if not isinstance(members[0], CacheLayer):
        return RecurrentLayer()
    return FanOutLayer(members)


class FanOutCache(KVCache):
    """Cache of several methods for the same prompts.

    After the prefill a decode step has ``copies`` * B rows, member by member: rows 0 .. B - 1 belong to the first one.

    Args:
        members: New caches, at least one, with equal ``passes`` and none of which ``recomputes``.

    Attributes:
        separate_prefills: Caches that prefill one after another before :meth:`join`; empty if all members share one
            prefill, and after the join.
    """

    def __init__(self, members: Sequence[KVCache]):
        if any(m.recomputes for m in members):
            raise ValueError("a method without a cache cannot share decode steps")
        if len({m.passes for m in members}) > 1:
            raise ValueError("methods that encode a prompt in different numbers of passes cannot share a prefill")
        corresponding = zip(*(m.layers for m in members), strict=True)
        super().__init__([fan_out_layer(layers) for layers in corresponding], members[0].plan, members[0].passes)
        self.members = list(members)
        self.requantizes_on_append = any(m.requantizes_on_append for m in members)
        self.states = copy.deepcopy(members[0].states)  # still empty; the members' own only count their bytes
        if self.states is not None:
            for number, (owner, kind) in enumerate(zip(self.plan.owners, self.plan.layer_types, strict=True)):
                if kind == LINEAR:
                    self.layers[number] = self.states.cache.layers[owner]
        sharing = [m for m in members if m.attends_whole_prompt]
        if len(sharing) < len(members):
            shared = [FanOutCache(sharing)] if len(sharing) > 1 else sharing
            self.separate_prefills = [*shared, *(m for m in members if not m.attends_whole_prompt)]

    def join(self, logits: Sequence[torch.Tensor]) -> torch.Tensor:
        """Merge the ``separate_prefills`` into this cache once all of them have prefilled.

        Args:
            logits: Last logits of each of them, with rows as in its own decode steps.

        Returns:
            The logits as rows of this cache.
        """
        rows: dict[int, torch.Tensor] = {}  # id of the member -> [B, vocabulary]
        for cache, last in zip(self.separate_prefills, logits, strict=True):
            members = cache.members if isinstance(cache, FanOutCache) else [cache]
            rows |= {id(m): share for m, share in zip(members, last.chunk(len(members)), strict=True)}
        first = self.separate_prefills[0]
        self.tokens_seen, self.prompt_length = first.tokens_seen, first.prompt_length
        for number, layer in enumerate(self.layers):
            if isinstance(layer, FanOutLayer):
                layer.mark_prefilled()
            elif self.states is None:
                layer.update(torch.cat([m.layers[number].recurrent_states[0] for m in self.members]))
        if self.states is not None:
            self.states.join([m._states for m in self.members])
        self.separate_prefills = []
        return torch.cat([rows[id(m)] for m in self.members])

    @property
    def copies(self) -> int:  # type: ignore[override]
        """Number of methods that share the prefill."""
        return len(self.members)

    def finish_prefill(self) -> None:
        """Repeat the recurrent states after a shared prefill, so that every member has its own rows."""
        super().finish_prefill()
        if self.states is not None:
            for member in self.members:
                member.states = copy.deepcopy(self.states)
            self.states.apply(lambda t: t.repeat(self.copies, *[1] * (t.dim() - 1)))

    def drop(self, member: int) -> None:
        """Remove a member whose rows have all finished; later steps have B rows fewer.

        Raises:
            ValueError: The cache is static: its captured step has the rows of all members.
        """
        if self.is_static:
            raise ValueError("a member of a static fan-out cannot be dropped")
        if self.states is not None:
            rows, count = self.batch_size, self.copies
            keep = [row for row in range(rows * count) if row // rows != member]
            self.states.apply(lambda t: t[keep])
        for layer in self.layers:
            if isinstance(layer, FanOutLayer):
                del layer.members[member]
            elif layer.tensors():
                shares = list(layer.tensors()[0].chunk(self.copies))
                del shares[member]
                layer.update(torch.cat(shares))
        del self.members[member]

    def recurrent_state(self, layer_idx: int, rows: int) -> torch.Tensor | None:
        """Return the state with ``rows`` rows, repeating the prompt's state for each member if needed."""
        state = super().recurrent_state(layer_idx, rows)
        return state if state is None or state.shape[0] == rows else state.repeat(self.copies, 1, 1, 1)

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Store the state, split by member."""
        if self.states is not None:
            return super().update_recurrent_state(recurrent_states, layer_idx, *args, **kwargs)
        super().update_recurrent_state(recurrent_states, layer_idx)
        number = self.plan.cache_layer[layer_idx]
        is_shared = recurrent_states.shape[0] == self.batch_size or self.tokens_seen is None
        shares = [recurrent_states] * self.copies if is_shared else recurrent_states.chunk(self.copies)
        for member, share in zip(self.members, shares, strict=True):
            member.layers[number].update(share)
        return recurrent_states

    @property
    def kv_bytes_logical(self) -> int:
        return sum(m.kv_bytes_logical for m in self.members)
