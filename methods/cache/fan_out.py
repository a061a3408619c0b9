"""Many methods that share one prefill and one batched decode.

Attention over the prompt is the same for every method that reads it whole, so a layer computes it once and lets each
member compress its own copy; a method that reads it in its own way does so by itself. Decoding then runs all members'
rows as one batch: the weights are read once for all of them, and each layer hands every member its own rows. A sweep
over methods and budgets costs one prefill for all that read alike, one for each of the others, and one batched decode.
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
    """The same layer of every member."""

    is_sliding = False
    is_compileable = record_past = False

    def __init__(self, members: Sequence[CacheLayer]):
        self.members = list(members)
        first = self.members[0]
        super().__init__(first.layer_idx, first.num_layers, max(m.observation_window for m in self.members), first.span)
        self.model_layer = first.model_layer

    def names(self) -> str:
        return ", ".join(dict.fromkeys(member.names() for member in self.members))

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
            out.append(member.attend(call.part(rows), tokens, use))
        return torch.cat(out)

    def go_on(self) -> None:
        """The members have read the prompt, each by itself."""
        self.seen, self.in_prefill = self.members[0].seen, False

    @property
    def capabilities(self) -> PolicyCapabilities:
        """What holds for all members together."""
        each = [member.capabilities for member in self.members]
        return PolicyCapabilities(
            evicts_while_decoding=any(c.evicts_while_decoding for c in each),
            prefills_by_steps=all(c.prefills_by_steps for c in each),
            attends_whole_prompt=all(c.attends_whole_prompt for c in each),
            spans_layers=any(c.spans_layers for c in each),
            prefill_block=min(c.prefill_block for c in each),
        )

    def get_seq_length(self) -> int:
        """Number of tokens that the layer has seen."""
        return self.seen

    def tensors(self) -> list[torch.Tensor]:
        """Tensors of all members."""
        return [t for member in self.members for t in member.tensors()]


def fan_out_layer(members: Sequence[Any]) -> FanOutLayer | RecurrentLayer:
    """The members' cache layers of one place as one."""
    if not isinstance(members[0], CacheLayer):
        return RecurrentLayer()
    return FanOutLayer(members)


class FanOutCache(KVCache):
    """A cache whose members each hold the same prompts in their own way.

    After the prompt, a decode step has ``copies`` x B rows, member by member: rows 0 .. B - 1 are the first member's.

    Args:
        members: fresh caches, at least one; of the same number of ``passes``, and none that ``recomputes``.

    Attributes:
        separate_prefills: caches that have to prefill one after another before the members go on together
            (:meth:`join`); empty where all members read them as one, or have done so.
    """

    def __init__(self, members: Sequence[KVCache]):
        if any(m.recomputes for m in members):
            raise ValueError("a method without a cache computes its steps by itself")
        if len({m.passes for m in members}) > 1:
            raise ValueError("methods that encode a prompt in different numbers of passes cannot share a prefill")
        together = zip(*(m.layers for m in members), strict=True)
        super().__init__([fan_out_layer(layers) for layers in together], members[0].plan, members[0].passes)
        self.members = list(members)
        self.requantizes_on_append = any(m.requantizes_on_append for m in members)
        self.states = copy.deepcopy(members[0].states)  # empty as yet; the members' own are for their bytes
        if self.states is not None:
            for number, (owner, kind) in enumerate(zip(self.plan.owners, self.plan.layer_types, strict=True)):
                if kind == LINEAR:
                    self.layers[number] = self.states.cache.layers[owner]
        alike = [m for m in members if m.attends_whole_prompt]
        if len(alike) < len(members):
            shared = [FanOutCache(alike)] if len(alike) > 1 else alike
            self.separate_prefills = [*shared, *(m for m in members if not m.attends_whole_prompt)]

    def join(self, logits: Sequence[torch.Tensor]) -> torch.Tensor:
        """Go on together, once every one of ``separate_prefills`` has read the prompts.

        Args:
            logits: what each of them ended with, rows as in a decode step of its own.

        Returns:
            The same as rows of this cache.
        """
        rows: dict[int, torch.Tensor] = {}  # of each member
        for one, ended in zip(self.separate_prefills, logits, strict=True):
            its = one.members if isinstance(one, FanOutCache) else [one]
            rows |= {id(m): share for m, share in zip(its, ended.chunk(len(its)), strict=True)}
        first = self.separate_prefills[0]
        self.tokens_seen, self.prompt_length = first.tokens_seen, first.prompt_length
        for number, layer in enumerate(self.layers):
            if isinstance(layer, FanOutLayer):
                layer.go_on()
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

    def end_prompt(self) -> None:
        """Give every member rows of its own in the recurrent layers' states, once all have read the prompt as one."""
        super().end_prompt()
        if self.states is not None:
            for member in self.members:
                member.states = copy.deepcopy(self.states)
            self.states.change(lambda t: t.repeat(self.copies, *[1] * (t.dim() - 1)))

    def drop(self, member: int) -> None:
        """Leave out a member whose rows have all ended; later steps have B rows fewer."""
        if self.states is not None:
            rows, count = self.batch_size, self.copies
            keep = [row for row in range(rows * count) if row // rows != member]
            self.states.change(lambda t: t[keep])
        for layer in self.layers:
            if isinstance(layer, FanOutLayer):
                del layer.members[member]
            elif layer.tensors():
                shares = list(layer.tensors()[0].chunk(self.copies))
                del shares[member]
                layer.update(torch.cat(shares))
        del self.members[member]

    def recurrent_state(self, layer_idx: int, rows: int) -> torch.Tensor | None:
        """The prompt's state once for each member, when the members have rows of their own."""
        state = super().recurrent_state(layer_idx, rows)
        return state if state is None or state.shape[0] == rows else state.repeat(self.copies, 1, 1, 1)

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Keep the state; each member holds its own rows of it."""
        if self.states is not None:
            return super().update_recurrent_state(recurrent_states, layer_idx, *args, **kwargs)
        super().update_recurrent_state(recurrent_states, layer_idx)
        number = self.plan.cache_layer[layer_idx]
        together = recurrent_states.shape[0] == self.batch_size or self.tokens_seen is None
        shares = [recurrent_states] * self.copies if together else recurrent_states.chunk(self.copies)
        for member, share in zip(self.members, shares, strict=True):
            member.layers[number].update(share)
        return recurrent_states

    @property
    def kv_bytes_logical(self) -> int:
        return sum(m.kv_bytes_logical for m in self.members)
