"""Expected attention (Devoto et al., 2025, arXiv 2510.00636): a key is worth what queries to come will pay to it.

Section 3: the queries of a head, before RoPE, are taken to be normally distributed with the mean and covariance of the
prompt's. Averaging RoPE's rotation over the next ``future`` positions gives the mean m and covariance S of the queries
to come, and for a key k the expectation of exp(q.k / sqrt(D)) is exp(m.k / sqrt(D) + k.S.k / (2 D)). Normalized over
the prompt and averaged over a group's query heads it is the token's expected attention a, and its score is
(a + ``epsilon``) times the length of its value. The first tokens (attention sinks) take no part in the statistics and
are always kept.

The mean of a is 1 / T, so ``epsilon`` decides by its size beside that: at 2,000 tokens 0.01 is 20 times the mean, most
tokens are ranked by the length of their value, and only the peaks of a by a. It is the authors' evaluation's setting;
the default of their class is 0.

The paper multiplies by the length of the value after the output projection; here it is the value's own, so that a
method needs nothing of the model but its cache (the authors' library does the same). Their evaluation shares a layer's
budget between its heads (``method/allocator=adaptive``); the default here is the same budget for every head. Their
library also compresses while decoding (``method/schedule=every_n``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ....conf.options import NonNegativeFloat, NonNegativeInt, PositiveInt
from ...cache.prompt import ALL_QUERIES, Prompt
from ...cache.rotary import Rotary
from .base import ModelLayer, Scorer


@dataclass(frozen=True)
class ExpectedAttention(Scorer):
    """The expectation in closed form.

    Attributes:
        future: Positions after the prompt over which the rotation is averaged.
        sinks: First tokens that are left out of the statistics; what a policy protects unless it says otherwise.
        epsilon: Added to the attention before it is multiplied by the value's length.
    """

    id: ClassVar[str] = "ExpectedAttention"
    name: ClassVar[str] = "expected_attention"
    recent_recorded_as: ClassVar[str] = "window"
    future: PositiveInt = 512
    sinks: NonNegativeInt = 4
    epsilon: NonNegativeFloat = 0.01

    @property
    def observation_window(self) -> int:
        return ALL_QUERIES

    def protected_sinks(self) -> int:
        return self.sinks

    def new_state(self, layer: ModelLayer) -> Rotary:
        return layer.rotary()

    def score(self, prompt: Prompt, state: Rotary) -> torch.Tensor:
        return prompt.cached(repr(self), lambda prompt: self._scores(prompt, state))

    def _scores(self, prompt: Prompt, state: Rotary) -> torch.Tensor:
        """[R, H_kv, T]."""
        rows, _, observed, dim = prompt.query.shape
        sinks = min(self.sinks, prompt.length - 1)
        first = prompt.tokens_seen - observed  # position of the first query in view
        at = torch.arange(first, prompt.tokens_seen, device=prompt.query.device).expand(rows, -1)
        queries = state.turn(prompt.query.float(), -at)[:, :, max(0, sinks - first) :]  # before RoPE
        mean = queries.mean(dim=2)  # [R, H_q, D]
        centred = queries - mean[:, :, None]
        covariance = centred.transpose(-1, -2) @ centred / queries.shape[2]  # [R, H_q, D, D]
        rotation = self._mean_rotation(state, prompt.tokens_seen, dim, prompt.query.device)
        mean = mean @ rotation
        covariance = rotation.T @ covariance @ rotation

        keys = prompt.keys.float().repeat_interleave(prompt.groups, dim=1)  # [R, H_q, T, D]
        logits = (keys @ mean[..., None])[..., 0] * prompt.rule.scaling
        logits = logits + (keys @ covariance * keys).sum(-1) * prompt.rule.scaling**2 / 2
        logits[..., :sinks] = float("-inf")
        attention = logits.softmax(dim=-1).unflatten(1, (-1, prompt.groups)).mean(dim=2)  # [R, H_kv, T]
        return (attention + self.epsilon) * prompt.values.float().norm(dim=-1)

    def _mean_rotation(self, rotary: Rotary, start: int, dim: int, device: torch.device) -> torch.Tensor:
        """[D, D]: ``x @ rotation`` is the mean of x turned to each of the ``future`` positions from ``start`` on."""
        unit = torch.eye(dim, device=device)[None, :, None]  # [1, D, 1, D], one unit vector a "head"
        steps = torch.arange(start, start + self.future, device=device)[None]  # [1, future]
        return rotary.turn(unit.expand(-1, -1, self.future, -1), steps).mean(dim=2)[0]
