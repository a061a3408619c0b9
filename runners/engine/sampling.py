"""Sampling of the next token: greedy, or by temperature and nucleus (top-p)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .step_operations import greedy_tokens


@dataclass(frozen=True)
class Sampling:
    """Rule by which the next token is drawn.

    Attributes:
        temperature: Softmax temperature; 0 is greedy.
        top_p: Tokens are drawn from the smallest set whose probability reaches this value.
        seeds: One seed per prompt row, or one for all. A row's draws depend only on its own seed, not on its batch,
            and the members of a fan-out use the same random numbers.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seeds: int | Sequence[int] = 0


class Sampler:
    """Draws the next token of every row from its logits.

    Args:
        sampling: The rule.
        stop_ids: Ids that end a row.
        min_new_tokens: Number of tokens before which no stop id is drawn.
        batch: Number of prompts.
        device: Device of the logits.
    """

    def __init__(
        self, sampling: Sampling, stop_ids: Sequence[int], min_new_tokens: int, batch: int, device: torch.device
    ):
        self.sampling, self.min_new_tokens = sampling, min_new_tokens
        self.stop_ids = frozenset(stop_ids)
        self._stop = torch.tensor(sorted(self.stop_ids), dtype=torch.int64, device=device)
        seeds = [sampling.seeds] * batch if isinstance(sampling.seeds, int) else sampling.seeds
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, logits: torch.Tensor, new_tokens: int) -> torch.Tensor:
        """[rows, vocabulary] -> [rows] int64; rows are members x B, each with ``new_tokens`` tokens so far."""
        if new_tokens < self.min_new_tokens and len(self._stop):
            logits = logits.index_fill(1, self._stop, float("-inf"))
        if self.sampling.temperature == 0.0:
            return greedy_tokens(logits)
        probabilities = (logits.float() / self.sampling.temperature).softmax(-1)
        ordered, index = probabilities.sort(-1, descending=True)
        mass_before = ordered.cumsum(-1) - ordered  # of the more probable tokens; 0 for the first, which is always kept
        ordered = ordered.masked_fill(mass_before >= self.sampling.top_p, 0.0)
        cumulative = ordered.cumsum(-1)
        uniform = torch.stack([torch.rand(1, generator=g) for g in self._generators]).to(logits.device)  # [B, 1]
        point = uniform.repeat(logits.shape[0] // len(self._generators), 1) * cumulative[:, -1:]  # [rows, 1]
        drawn = torch.searchsorted(cumulative, point, right=True).clamp(max=ordered.shape[-1] - 1)
        return index.gather(-1, drawn)[:, 0]
