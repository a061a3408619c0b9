"""Partial results of the splits of each segment, and their join.

Legend: N segments (heads of all rows), parts: splits per segment, rows: query heads per stored head, D_v channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from .online import join_splits

JOIN_STEP = 16
"""Splits that are joined at a time."""


@dataclass(frozen=True)
class Splits:
    """Partial results of a split kernel, in float32.

    Attributes:
        sums: [N, parts, rows, D_v], weighted sums of the values.
        maxima, totals: [N, parts, rows], largest logit (base 2) and sum of the weights relative to it.
    """

    sums: torch.Tensor
    maxima: torch.Tensor
    totals: torch.Tensor

    @classmethod
    def empty(cls, segments: int, parts: int, rows: int, value_dim: int, device: torch.device) -> Splits:
        """Allocate the partial results."""
        sums = torch.empty(segments, parts, rows, value_dim, dtype=torch.float32, device=device)
        maxima, totals = torch.empty(2, segments, parts, rows, dtype=torch.float32, device=device)
        return cls(sums, maxima, totals)


def join(splits: Splits, sinks: torch.Tensor | None, out: torch.Tensor, heads: int) -> None:
    """Join the splits of each query head by log-sum-exp, with a sink in the normalizer.

    Args:
        splits: Partial results.
        sinks: [heads * rows] logits of the sinks, or None.
        out: Output, contiguous: N * rows rows of D_v channels.
        heads: Stored heads per batch row.
    """
    segments, parts, rows, value_dim = splits.sums.shape
    join_splits[(segments, rows)](
        splits.sums, splits.maxima, splits.totals, sinks, out, parts, rows, heads,
        DV=value_dim, WIDE_V=triton.next_power_of_2(value_dim), PARTS=triton.next_power_of_2(parts), STEP=JOIN_STEP,
        SINKS=sinks is not None,
    )  # fmt: skip
