"""Expected attention (Devoto et al., 2025, arXiv 2510.00636): score tokens by the attention expected of future queries.

Section 3: a head's queries before RoPE are assumed to be normally distributed with the mean and covariance of the
prompt's queries. Averaging the RoPE rotation over the next ``future`` positions gives the mean m and covariance S of
future queries. For a key k, the expectation of exp(q.k / sqrt(D)) is exp(m.k / sqrt(D) + k.S.k / (2 D)). Normalized
over the prompt and averaged over the query heads of a KV head, this is the token's expected attention a. Its score is
(a + ``epsilon``) times the norm of its value. The first tokens (attention sinks) are left out of the statistics and
always kept.

The mean of a is 1 / T. At 2,000 tokens an ``epsilon`` of 0.01 is 20 times that mean, so most tokens are ranked by the
norm of their value and only the peaks of a by a. This is the setting of the authors' evaluation; their class defaults
to 0.

The paper uses the norm of the value after the output projection. Here, as in the authors' library, it is the norm of
the value itself, so that only the cache is needed. Their evaluation also distributes a layer's budget over its heads,
by kvpress' rule (``method/allocator=safeguard``); ``method=expected_attention`` does so by Ada-KV's. With the same
budget for every head it is ``method/allocator=uniform method/storage=dense``. Their library also compresses while
decoding (``method/schedule=every_n``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ....conf.options import NonNegativeFloat, NonNegativeInt, PositiveInt
from ...cache.prompt import ALL_QUERIES, Prompt
from ..own_sinks import ScorerWithSinks

if TYPE_CHECKING:
    from ...cache.rotary import Rotary
    from ..model_layer import ModelLayer


@dataclass(frozen=True)
class ExpectedAttention(ScorerWithSinks):
    """Expected attention in closed form.

    Attributes:
        future: Number of positions after the prompt over which the rotation is averaged.
        sinks: Number of first tokens left out of the statistics, which is also the default for the policy's ``sinks``.
        epsilon: Added to the attention before it is multiplied by the norm of the value.
        value_norm: Multiply by the norm of the value; False: the score is the expected attention.
    """

    id: ClassVar[str] = "ExpectedAttention"
    name: ClassVar[str] = "expected_attention"
    recent_recorded_as: ClassVar[str] = "window"
    labelled_parameters: ClassVar[tuple[str, ...]] = ("epsilon",)
    omitted_at: ClassVar[Mapping[str, Any]] = {"value_norm": True}
    future: PositiveInt = 512
    sinks: NonNegativeInt | None = 4
    epsilon: NonNegativeFloat = 0.01
    value_norm: bool = True

    @property
    def observation_window(self) -> int:
        return ALL_QUERIES

    @property
    def weighs_values(self) -> str:
        return "value_norm=false" if self.value_norm else ""

    def new_state(self, layer: ModelLayer) -> Rotary:
        return layer.rotary()

    def score(self, prompt: Prompt, state: Rotary) -> torch.Tensor:
        return prompt.cached(repr(self), lambda prompt: self._scores(prompt, state))

    def _scores(self, prompt: Prompt, state: Rotary) -> torch.Tensor:
        """Return the scores [R, H_kv, T]."""
        rows, _, observed, dim = prompt.query.shape
        sinks = min(self.protected_sinks(), prompt.length - 1)
        first = prompt.tokens_seen - observed  # position of the first observed query
        position = torch.arange(first, prompt.tokens_seen, device=prompt.query.device).expand(rows, -1)  # [R, W]
        queries = state.rotate(prompt.query.float(), -position)[:, :, max(0, sinks - first) :]  # before RoPE
        mean = queries.mean(dim=2)  # [R, H_q, D]
        centred = queries - mean[:, :, None]
        covariance = centred.transpose(-1, -2) @ centred / queries.shape[2]  # [R, H_q, D, D]
        rotation = self._mean_rotation(state, prompt.tokens_seen, dim, prompt.query.device)
        mean = mean @ rotation  # of future queries, after RoPE
        covariance = rotation.T @ covariance @ rotation

        keys = prompt.keys.float().repeat_interleave(prompt.groups, dim=1)  # [R, H_q, T, D]
        logits = (keys @ mean[..., None])[..., 0] * prompt.rule.scaling  # [R, H_q, T]
        logits = logits + (keys @ covariance * keys).sum(-1) * prompt.rule.scaling**2 / 2
        logits[..., :sinks] = float("-inf")
        attention = prompt.reduce_groups(logits.softmax(dim=-1))  # [R, H_kv, T]
        if not self.value_norm:
            return attention
        return (attention + self.epsilon) * prompt.values.float().norm(dim=-1)

    def _mean_rotation(self, rotary: Rotary, start: int, dim: int, device: torch.device) -> torch.Tensor:
        """Return the mean rotation [D, D] over the ``future`` positions from ``start``, to be applied as ``x @ it``."""
        unit = torch.eye(dim, device=device)[None, :, None]  # [1, D, 1, D], one unit vector per "head"
        steps = torch.arange(start, start + self.future, device=device)[None]  # [1, future]
        return rotary.rotate(unit.expand(-1, -1, self.future, -1), steps).mean(dim=2)[0]
