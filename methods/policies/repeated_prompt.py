"""Forwards after a prefill that give a prompt to the model again, as a scorer asks for them; see :mod:`.repetition`.

Legend: R rows of one prompt length, T prompt tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Repetition:
    """A forward after the prefill that gives tokens of the prompt to the model again (:mod:`.repetition`).

    Attributes:
        scored: Positions of the prompt tokens that are given again, last, and scored.
        request: Token ids before all others.
        repeated: Positions of prompt tokens that follow the request and are not scored.
        reply: Token ids between these and the scored tokens.
    """

    scored: range
    request: Sequence[int] = ()
    repeated: range = range(0)
    reply: Sequence[int] = ()

    @property
    def tokens(self) -> int:
        """Number of tokens of the forward."""
        return len(self.request) + len(self.repeated) + len(self.reply) + len(self.scored)

    def input_ids(self, prompts: torch.Tensor) -> torch.Tensor:
        """Return the tokens of the forward, [R, tokens], for prompts [R, T]."""
        request, reply = (prompts.new_tensor(x).expand(len(prompts), -1) for x in (self.request, self.reply))
        repeated, scored = (prompts[:, x.start : x.stop] for x in (self.repeated, self.scored))
        return torch.cat([request, repeated, reply, scored], dim=1)


@dataclass(frozen=True)
class Repetitions:
    """All further forwards for prompts of one length.

    Attributes:
        name: Name of the scorer.
        sinks: Number of first tokens that no forward gives again and that are in the softmax of each.
        forwards: The forwards.
    """

    name: str
    sinks: int
    forwards: Sequence[Repetition]
