"""FINCH (Corallo and Papotti, TACL 2024): the attention of the question's tokens scores the tokens before them.

The prompt ends with the question, whose queries score all tokens before it. A query at a low position shares its
attention among fewer tokens, so each query's attention is multiplied by its position (``normalize``), and then averaged
over the queries and the query heads of a group. Scores are not pooled. With ``chunk_length`` every chunk of the prompt
keeps the same share of its tokens.

The kept tokens are moved together (``reposition``): in the paper their keys get the positions 0 .. C - 1 and the text
goes on at position C. RoPE attention depends only on distances, so here the keys get the positions T - C .. T - 1 and
the text goes on at T, as for every other method.

The published code reads the prompt in segments, scores what it holds again with each segment, and keeps the same tokens
in all heads; the normalization in it is without effect. Here, as in kvpress, the whole prompt is scored once and per KV
head. With the heads of a layer alike: ``method=chunkkv`` over this scorer, ``method.scorer.chunk=1``.

Legend: R rows of one prompt length, H stored heads, H_q query heads, T prompt tokens, C kept tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ....conf.options import PositiveInt
from ...cache.prompt import Prompt
from ...cache.prompt_attention import window_sums
from .base import Scorer


@dataclass(frozen=True)
class FINCH(Scorer):
    """Attention of the question, each query's weighted by its position.

    Attributes:
        window: Tokens at the end of a prompt that are taken for its question where the question's length is unknown:
            a task without questions, ``runner.question=after_compression``, or while decoding. They are what a policy
            protects unless it says otherwise.
        normalize: Multiply the attention of a query by its position.
        question: Take the question's own length instead of ``window`` where it is known.
        reposition: Store the keys of kept tokens at consecutive positions.
        chunk_length: Tokens of a chunk, each of which keeps the same share of its tokens; None: no chunks.
    """

    id: ClassVar[str] = "FINCH"
    name: ClassVar[str] = "finch"
    omitted_at: ClassVar[Mapping[str, Any]] = {"question": False, "reposition": False, "chunk_length": None}
    window: PositiveInt = 32
    normalize: bool = True
    question: bool = True
    reposition: bool = True
    chunk_length: PositiveInt | None = None

    @property
    def observation_window(self) -> int:
        return self.window

    @property
    def observes_question(self) -> bool:  # type: ignore[override]
        """As ``question`` says."""
        return self.question

    @property
    def repositions(self) -> bool:  # type: ignore[override]
        """As ``reposition`` says."""
        return self.reposition

    def protected_recent(self) -> int:
        return self.window

    def score(self, prompt: Prompt, state: Any = None) -> torch.Tensor:
        asked = prompt.question_tokens if self.question else None
        prompt = prompt.last_queries(self.window if asked is None else asked)
        w, position = prompt.query.shape[2], None
        if self.normalize:
            position = torch.arange(prompt.length - w, prompt.length, dtype=torch.float32, device=prompt.query.device)
        scores = prompt.reduce_groups(window_sums(prompt, position) / w)  # [R, H_q, T] -> [R, H, T]
        if self.chunk_length is None or prompt.kept is None or prompt.kept >= prompt.length:
            return scores
        return scores + self._is_best_of_chunk(scores, prompt) * (1 + scores.amax(dim=-1, keepdim=True))

    def _is_best_of_chunk(self, scores: torch.Tensor, prompt: Prompt) -> torch.Tensor:
        """Return the tokens [R, H, T] that rank within their chunk's share of the budget, protected tokens left out."""
        assert self.chunk_length is not None and prompt.kept is not None
        length, end = prompt.length, prompt.length - prompt.protected
        starts = range(0, length, self.chunk_length)
        sizes = [min(self.chunk_length, length - start) for start in starts]
        shares = [divmod(size * prompt.kept, length) for size in sizes]  # tokens of each chunk, and the remainder
        by_remainder = sorted(range(len(sizes)), key=lambda chunk: -shares[chunk][1])
        rounded_up = set(by_remainder[: prompt.kept - sum(count for count, _ in shares)])
        best = torch.zeros_like(scores, dtype=torch.bool)
        for chunk, (start, size) in enumerate(zip(starts, sizes, strict=True)):
            stop = min(start + size, end)  # of the candidates
            n_protected = start + size - max(stop, start)
            count = shares[chunk][0] + (chunk in rounded_up) - n_protected
            if count > 0:  # of equal scores the lower index is first
                order = scores[..., start:stop].argsort(dim=-1, descending=True, stable=True)
                best[..., start:stop].scatter_(-1, order[..., :count], True)
        return best
