"""ChunkKV (Liu et al., 2025, arXiv 2502.00299): chunks of consecutive tokens stay or leave together.

The scores of another scorer, summed over the heads of a layer and averaged over chunks of ``chunk`` tokens, rank the
chunks; the tokens of a chunk have its score, so all heads keep the same tokens and whole chunks stay. Of the last chunk
that a budget has room for, the first tokens stay. Tokens that the other scorer protects (an observation window) count
with the largest score, so that the rest of their chunk stays with them.

The paper's scores are the attention of the prompt's last queries (SnapKV's), and it uses the tokens that one layer
keeps in the next layers, too (layer-wise index reuse), which is not done here. kvpress keeps a number of whole chunks,
so that its caches have different lengths; here the budget is met exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from ....conf.errors import InputError
from ....conf.options import PositiveInt
from ...cache.prompt import Prompt
from ..wrapping import WrappingScorer


@dataclass(frozen=True)
class ChunkKV(WrappingScorer):
    """Scores of another scorer, averaged over chunks.

    Attributes:
        chunk: Tokens of a chunk, counted from the first token of the prompt; the last chunk may be shorter. The tokens
            of a prompt that is shorter than a chunk are ranked one by one.
    """

    id: ClassVar[str] = "ChunkKV"
    name: ClassVar[str] = "chunkkv"
    scores_heads_alike: ClassVar[bool] = True
    chunk: PositiveInt = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scorer.ranks_in_stages or self.scorer.repeats_prompt or self.scorer.merges_values:
            problem = "is more than a score of each token of a prompt; use snapkv or another one"
            raise InputError("method/scorer@method.scorer.scorer", self.scorer.name, problem)

    def score(self, prompt: Prompt, state: Any) -> torch.Tensor:
        scores = self.scorer.score(prompt, state).float().sum(dim=1, keepdim=True)  # [R, 1, T]
        length, chunk = prompt.length, self.chunk if prompt.length >= self.chunk else 1
        is_question = self.observes_question and prompt.question_tokens is not None
        recent = prompt.question_tokens if is_question else self.protected_recent()
        first, end = self.protected_sinks(), length - (recent if isinstance(recent, int) else 0)
        if end <= first:  # the other scorer protects all tokens
            return scores
        largest = scores[..., first:end].amax(dim=-1, keepdim=True)
        index = torch.arange(length, device=scores.device)
        scores = torch.where((index >= first) & (index < end), scores, largest)
        count = -(-length // chunk)
        sums = F.pad(scores, (0, count * chunk - length)).unflatten(-1, (count, chunk)).sum(dim=-1)  # [R, 1, count]
        sizes = (length - chunk * torch.arange(count, device=scores.device)).clamp(max=chunk)
        return (sums / sizes).repeat_interleave(chunk, dim=-1)[..., :length]
