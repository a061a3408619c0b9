"""Random scores: the baseline that every other scorer has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ....conf.options import NonNegativeInt
from ....conf.versions import CURRENT_VERSIONS
from ...cache.prompt import Prompt
from .base import Scorer

EVICTED_SEED_STEP = 15_485_863
"""Difference of the seeds of two draws between which one token is evicted."""


@dataclass(frozen=True)
class RandomTokens(Scorer):
    """Uniform random numbers.

    Attributes:
        seed: Random seed. The scores depend only on it, the prompt's tokens (where the engine has passed them on;
            ``model.generate`` does not), the layer, the head, the number of tokens and, while decoding, the number of
            tokens evicted so far.
    """

    id: ClassVar[str] = "RandomTokens"
    name: ClassVar[str] = "random"
    version: ClassVar[int] = CURRENT_VERSIONS["RandomTokens"]
    recent_recorded_as: ClassVar[str] = "window"
    default_recent: ClassVar[int | float] = 32  # SnapKV's window, so that the scores are the only difference
    seed: NonNegativeInt = 0

    def score(self, prompt: Prompt, state: Any = None) -> torch.Tensor:
        """Return random scores [R, H_kv, T]."""
        rows, heads, length, _ = prompt.keys.shape
        texts = [0] * rows if prompt.text_seeds is None else prompt.text_seeds.tolist()
        evicted = prompt.tokens_seen - length
        offset = self.seed * 1_000_003 + prompt.layer_idx + EVICTED_SEED_STEP * evicted
        seeds = [(text + offset) % 2**63 for text in texts]
        drawn = [torch.rand(heads, length, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(drawn).to(prompt.keys.device)
