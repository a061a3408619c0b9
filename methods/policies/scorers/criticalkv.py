"""CriticalKV (Feng et al., 2025, arXiv 2502.03805): weigh a scorer's scores by what each value adds to the output.

Section 4, algorithm 1. A token that is evicted changes a layer's output by at most its attention times the L1 norm of
its projected value. Selection has two stages:

1. The share ``first_stage`` of the budget is filled with the best tokens of the other scorer, so that the attention
   that is kept is large.
2. The rest is filled with the tokens of the largest ``(score + epsilon) * N``, where N is the L1 norm of the value
   after the output projection, averaged over the query heads of a group.

An allocator compares heads by the other scorer's scores. A scorer with negative scores is refused: their product would
prefer small values; so is one whose scores have the norm of the value as a factor, which would count twice.

Legend: R rows of one prompt length, H_q query heads, H_kv KV heads, H stored heads, T tokens, D value channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ....conf.errors import InputError
from ....conf.options import NonNegativeFloat, Share
from ...cache.prompt import Prompt
from ..ranking import keep_mask
from ..wrapping import WrappingScorer

if TYPE_CHECKING:
    from ..model_layer import ModelLayer


@dataclass(frozen=True)
class CriticalKV(WrappingScorer):
    """Scores of another scorer, times the norm of the projected value in a second stage.

    Attributes:
        first_stage: Share of the budget that is filled by the other scorer alone.
        epsilon: Added to the scores before they are multiplied.
    """

    id: ClassVar[str] = "CriticalKV"
    name: ClassVar[str] = "criticalkv"
    prefill_only: ClassVar[bool] = True
    ranks_in_stages: ClassVar[bool] = True
    needs: ClassVar[str] = "the weights of the output projections"
    first_stage: Share = 0.5
    epsilon: NonNegativeFloat = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = {
            "has negative scores": self.scorer.may_be_negative,
            "ranks tokens in two stages already": self.scorer.ranks_in_stages,
            "has no score during the prefill": self.scorer.repeats_prompt,
            "merges values while decoding": self.scorer.merges_values,
        }
        for problem in (text for text, holds in problems.items() if holds):
            allowed = f"{problem}; method/scorer=criticalkv multiplies scores that are attention, such as snapkv's"
            raise InputError("method/scorer@method.scorer.scorer", self.scorer.name, allowed)
        if setting := self.scorer.weighs_values:
            problem = "weighs tokens by their values, as method/scorer=criticalkv does; add method.scorer.scorer."
            raise InputError("method/scorer@method.scorer.scorer", self.scorer.name, problem + setting)

    def new_state(self, layer: ModelLayer) -> tuple[Any, ModelLayer]:
        return self.scorer.new_state(layer), layer

    def score(self, prompt: Prompt, state: tuple[Any, ModelLayer]) -> torch.Tensor:
        scores = self.scorer.score(prompt, state[0]).float()  # [R, H or 1, T]
        return scores.expand(-1, (prompt.query if self.stores_query_heads else prompt.keys).shape[1], -1)

    def tie_scores(self, prompt: Prompt, state: tuple[Any, ModelLayer]) -> torch.Tensor:
        """Return the scores of the second stage, which also order equal scores of the first one."""
        norms = prompt.cached("norms of projected values", lambda prompt: self._norms(prompt, state[1]))
        norms = norms if self.stores_query_heads else prompt.reduce_groups(norms)  # [R, H, T]
        return (self.score(prompt, state) + self.epsilon) * norms

    def ranking_scores(
        self, scores: torch.Tensor, ties: torch.Tensor | None, count: int | torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        assert ties is not None
        share = self.first_stage * count
        first = share.long() if isinstance(share, torch.Tensor) else int(share)
        in_first = keep_mask(scores, first)
        return ties.masked_fill(in_first, float("inf")), scores.masked_fill(~in_first, 0.0)

    def _norms(self, prompt: Prompt, layer: ModelLayer) -> torch.Tensor:
        """Return the L1 norms of the projected values for each query head: [R, H_q, T] float32."""
        heads, of_readers = prompt.values.shape[1], []
        for weight in layer.output_weights():  # [H_q of one layer of the model, D, hidden]
            groups = weight.shape[0] // heads
            norms = []
            for j, w in enumerate(weight):  # |v W|_1 of one head: [R, T]
                blocks = prompt.values[:, j // groups].split(4096, dim=1)  # not all tokens at once, for the memory
                norms.append(torch.cat([(v @ w).abs().sum(dim=-1, dtype=torch.float32) for v in blocks], dim=1))
            of_readers.append(torch.stack(norms, dim=1).unflatten(1, (heads, groups)))  # [R, H_kv, g, T]
        return torch.cat(of_readers, dim=2).flatten(1, 2)
