"""Compactor (Chari and Van Durme, 2025, arXiv 2507.08143): leverage scores plus attention without a causal mask.

Section 3. Two standardized scores of each token are added, without looking at the question:

* its leverage (:mod:`.leverage`), times ``blending``;
* the attention that it receives from all tokens of its chunk of ``chunk`` consecutive tokens, later and earlier ones,
  averaged over the query heads of a group, times the norm of its value, averaged over three neighbouring tokens. As
  published, the logits are not divided by sqrt(D).

The first ``sinks`` tokens and the last ones that the policy protects are left out of both scores. kvpress pads the last
chunk with zeros, to which real queries attend and which attend to real keys (``published_padding``); here the last
chunk is shorter.

Legend: R rows of one prompt length, H_q query heads, H_kv KV heads, T tokens, N of them scored, D channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F

from ....conf.options import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from ...cache.prompt import ALL_QUERIES, Prompt
from ..own_sinks import ScorerWithSinks
from .leverage import Leverage, standardized

if TYPE_CHECKING:
    from ...cache.rotary import Rotary
    from ..model_layer import ModelLayer

POOLING_WIDTH = 3


@dataclass(frozen=True)
class Compactor(ScorerWithSinks):
    """Standardized leverage plus standardized attention within chunks.

    Attributes:
        chunk: Tokens of a chunk.
        blending: Weight of the leverage; None: the share of the prompt that is evicted.
        sinks: Number of first tokens left out of the scores, which is also the default for the policy's ``sinks``.
        sketch, ridge, seed: See :class:`.leverage.Leverage`.
        published_padding: Pad the last chunk as kvpress does, which changes the scores of its tokens.
    """

    id: ClassVar[str] = "Compactor"
    name: ClassVar[str] = "compactor"
    default_recent: ClassVar[int | float] = 4
    prefill_only: ClassVar[bool] = True
    may_be_negative: ClassVar[bool] = True
    omitted_at: ClassVar[Mapping[str, Any]] = {"published_padding": False}
    chunk: PositiveInt = 256
    blending: NonNegativeFloat | None = None
    sinks: NonNegativeInt | None = 8
    sketch: PositiveInt = 48
    ridge: PositiveFloat = 0.01
    seed: NonNegativeInt = 0
    published_padding: bool = False

    @property
    def observation_window(self) -> int:
        return ALL_QUERIES

    def new_state(self, layer: ModelLayer) -> Rotary:
        return layer.rotary()

    def score(self, prompt: Prompt, state: Rotary) -> torch.Tensor:
        start, end = self.protected_sinks(), prompt.length - prompt.protected
        if end <= start:
            return prompt.keys.new_zeros((*prompt.keys.shape[:2], prompt.length), dtype=torch.float32)
        keys, values = (x[:, :, start:end] for x in (prompt.keys, prompt.values))
        middle = replace(prompt, query=prompt.query[:, :, start:end], keys=keys, values=values, logsumexp=None)
        scored = f"{replace(self, blending=None)} to {end}"  # cache key of the scores that are blended
        leverage = prompt.cached(f"leverage of {scored}", lambda _: self._leverage(middle, state, start))
        attention = prompt.cached(f"attention of {scored}", lambda _: self._attention(middle))
        evicted = 1 - (prompt.length if prompt.kept is None else prompt.kept) / prompt.length
        scores = (evicted if self.blending is None else self.blending) * leverage + attention  # [R, H_kv, N]
        return F.pad(scores, (start, prompt.length - end))

    def _leverage(self, middle: Prompt, rotary: Rotary, start: int) -> torch.Tensor:
        position = torch.arange(start, start + middle.length, device=middle.keys.device)
        return Leverage(self.sketch, self.ridge, self.seed).standardized_leverage(middle, rotary, position)

    def _attention(self, middle: Prompt) -> torch.Tensor:
        return chunk_attention(middle, self.chunk, self.published_padding)


def chunk_attention(prompt: Prompt, chunk: int, published_padding: bool = False) -> torch.Tensor:
    """Return the standardized attention that tokens receive within chunks, times their values' norms: [R, H_kv, T]."""
    rows, _, length, dim = prompt.query.shape
    heads, received = prompt.keys.shape[1], []
    queries, keys = prompt.query.float().reshape(rows, heads, -1, length, dim), prompt.keys[:, :, None].float()
    if published_padding:
        queries, keys = (F.pad(x, (0, 0, 0, -length % chunk)) for x in (queries, keys))
    for start in range(0, length, chunk):
        q = queries[:, :, :, start : start + chunk]  # [R, H_kv, g, n, D]
        k = keys[:, :, :, start : start + chunk]  # [R, H_kv, 1, n, D]
        received.append((q @ k.mT).softmax(dim=-1).sum(dim=3).mean(dim=2))  # [R, H_kv, n]
    scores = torch.cat(received, dim=2)[..., :length] * prompt.values.float().norm(dim=-1)
    return standardized(F.avg_pool1d(scores, POOLING_WIDTH, stride=1, padding=POOLING_WIDTH // 2))
