"""The whole prompt as one layer sees it: what policies and scorers are given."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from .logits import LogitRule

ALL_QUERIES = sys.maxsize
"""As an observation window: every query of the prompt."""


@dataclass(frozen=True)
class Prompt:
    """The whole prompt as one layer sees it, for rows of equal length, without pads.

    Attributes:
        query: [R, H_q, W, D], the queries of the last W tokens, after RoPE; W is what the policy asked for as
            ``observation_window``, or the prompt's length if that is shorter. Where several layers of the model attend
            over these keys, H_q counts the heads of all of them, those that share a KV head side by side.
        keys, values: [R, H_kv, T, D], keys after RoPE.
        rule: how logits are formed.
        layer_idx, num_layers: which layer of how many.
        strictly_causal: [H_q / H_kv] bool, True for the query heads of a group that do not attend to their own token;
            None: all do.
        protected: last tokens that stay whatever their scores.
        seen: tokens of the text so far, where that is more than the T tokens at hand (while decoding, or where the
            layer is given fewer than all); None: T.
        found: what has been worked out about this prompt; methods that read it together share it (:meth:`cached`).
    """

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    rule: LogitRule
    layer_idx: int
    num_layers: int
    strictly_causal: torch.Tensor | None = None
    protected: int = 0
    seen: int | None = None
    found: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict, compare=False, repr=False)

    def cached(self, what: str, work_out: Callable[[Prompt], torch.Tensor]) -> torch.Tensor:
        """``work_out(self)``, computed for the first that asks; not to be changed in place.

        Args:
            what: its name; with the number of queries in view, it must say all that the result depends on.
        """
        key = (what, self.query.shape[2])
        if key not in self.found:
            self.found[key] = work_out(self)
        return self.found[key]

    def last_queries(self, window: int) -> Prompt:
        """The same prompt with fewer queries in view."""
        query = self.query[:, :, max(0, self.query.shape[2] - window) :]
        return replace(self, query=query)

    @property
    def length(self) -> int:
        """T, tokens."""
        return self.keys.shape[2]

    @property
    def tokens_seen(self) -> int:
        """Tokens of the text so far: the position of the next one."""
        return self.length if self.seen is None else self.seen

    @property
    def groups(self) -> int:
        """Query heads per KV head."""
        return self.query.shape[1] // self.keys.shape[1]
