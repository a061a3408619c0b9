"""Pooling of scores along the sequence."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def pool(scores: torch.Tensor, kernel: int, pooling: str) -> torch.Tensor:
    """Pool along the last dimension (``max`` or ``avg``), keeping its length; ``avg`` includes the zero padding."""
    if kernel == 1 or not scores.shape[-1]:  # no token before the window
        return scores
    pool1d = F.max_pool1d if pooling == "max" else F.avg_pool1d
    return pool1d(scores, kernel, stride=1, padding=kernel // 2)
