"""L2 norm of keys (Devoto et al., 2024, arXiv 2406.11430, section 3): keep the tokens whose keys have the lowest norm.

Keys of low norm tend to receive much attention, so the norm ranks tokens without queries. The paper leaves the first
two layers uncompressed, which is the allocator ``whole_layers``; by default all layers are compressed in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ...cache.prompt import Prompt
from .base import Scorer


@dataclass(frozen=True)
class KeyNorm(Scorer):
    """Negative L2 norm of the key."""

    id: ClassVar[str] = "KeyNorm"
    name: ClassVar[str] = "key_norm"
    may_be_negative: ClassVar[bool] = True

    def score(self, prompt: Prompt, state: Any = None) -> torch.Tensor:
        return -prompt.keys.float().norm(dim=-1)  # [R, H_kv, T]
