"""L2 norm of keys (Devoto et al., 2024, arXiv 2406.11430, section 3): the tokens with the shortest keys stay.

Short keys tend to draw much attention, so the norm ranks tokens without a query. The paper leaves the first two layers
uncompressed; here all layers are compressed alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ...cache.prompt import Prompt
from .base import Scorer


@dataclass(frozen=True)
class KeyNorm(Scorer):
    """Minus the length of the key."""

    id: ClassVar[str] = "KeyNorm"
    name: ClassVar[str] = "key_norm"

    def score(self, prompt: Prompt, state: Any = None) -> torch.Tensor:
        return -prompt.keys.float().norm(dim=-1)  # [R, H_kv, T]
