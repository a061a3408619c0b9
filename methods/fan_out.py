"""Many methods on one reading of the prompt.

Attention over the prompt is the same for every method that reads it whole, so a layer computes it once and lets each
member compress its own copy. Decoding then runs the members' rows as one batch: the weights are read once for all of
them, and each layer hands every member its own rows. A sweep over methods and budgets costs one prefill and one batched
decode.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .base import KVCache, NewTokens
from .prompt import Prompt, PromptReader, Rows


class FanOutLayer(PromptReader):
    """The same layer of every member."""

    is_sliding = False
    is_compileable = False

    def __init__(self, layer_idx: int, num_layers: int, members: Sequence[KVCache]):
        self.members = [m.layers[layer_idx] for m in members]
        super().__init__(layer_idx, num_layers, max(m.observation_window for m in self.members))

    def names(self) -> str:
        return ", ".join(dict.fromkeys(member.names() for member in self.members))

    def absorb(self, prompts: list[tuple[Rows, Prompt]]) -> None:
        for member in self.members:
            member.absorb([(rows, prompt.last_queries(member.observation_window)) for rows, prompt in prompts])
            member.seen, member.reading = self.seen, False

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        new: NewTokens,
    ) -> torch.Tensor:
        if self.reading:
            return self.read_prompt(query, key, value, scaling, new.rows, new.prompt_length)
        self.seen += query.shape[2]
        share = query.shape[0] // len(self.members)
        out = []
        for i, member in enumerate(self.members):
            mine = slice(i * share, (i + 1) * share)
            theirs = NewTokens([], None if new.valid is None else new.valid[mine], new.prompt_length)
            out.append(member.attend(query[mine], key[mine], value[mine], scaling, theirs))
        return torch.cat(out)

    def get_seq_length(self) -> int:
        return self.seen

    def tensors(self) -> list[torch.Tensor]:
        return [t for member in self.members for t in member.tensors()]


class FanOutCache(KVCache):
    """A cache whose members each hold the same prompts in their own way.

    After the prompt, a decode step has ``copies`` x B rows, member by member: rows 0 .. B - 1 are the first member's.

    Args:
        members: fresh caches of methods with ``shares_prompt``; at least one.
    """

    def __init__(self, members: Sequence[KVCache]):
        if not all(layer.selection.reads_whole_prompt for m in members for layer in m.layers):
            raise ValueError("a method that does not read the prompt whole cannot share a reading of it")
        num_layers = len(members[0].layers)
        super().__init__([FanOutLayer(i, num_layers, members) for i in range(num_layers)])
        self.members = list(members)

    @property
    def copies(self) -> int:  # type: ignore[override]
        return len(self.members)

    def drop(self, member: int) -> None:
        """Leave out a member whose rows have all ended; later steps have B rows fewer."""
        del self.members[member]
        for layer in self.layers:
            del layer.members[member]

    @property
    def kv_bytes_logical(self) -> int:
        return sum(m.kv_bytes_logical for m in self.members)
