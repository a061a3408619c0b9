"""State of PyramidInfer's layers: one for each layer, and what they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from .records import AttentionRows, WindowSums

if TYPE_CHECKING:
    from ...cache.cache import KVCache


@dataclass
class Sequences:
    """What the layers of one cache share.

    Attributes:
        cache: gives the cache while it lives.
        layers: how many there are.
        prompts: tokens of each group of rows' whole prompt.
        recent: R of each row, for every token of the step under way.
        columns: [B, W] columns of the batch that the layer under way reads (anything in padding); None: all.
    """

    cache: Callable[[], KVCache | None]
    layers: int
    prompts: list[int] = field(default_factory=list)
    recent: list[list[int]] = field(default_factory=list)
    columns: torch.Tensor | None = None


@dataclass
class PyramidState:
    """One layer and batch.

    Attributes:
        layer_idx: of this layer.
        shared: of the whole cache.
        chosen: int64 [R, K] for each group of rows: which of this layer's tokens go on; None: all.
        rows: where published, [R, 1 + R, T] attention of each group's recent queries, until the prompt is in.
        lengths: tokens held, of each row.
        settled: how many of them need no more thinning, of each row.
        limit: tokens below which nothing leaves, of each row: a budget that holds the whole prompt.
        seen: tokens fed, of each row.
        recent: R of each row at the step under way, from the first layer's length.
        record: what is remembered of later tokens' attention.
    """

    layer_idx: int = 0
    shared: Sequences | None = None
    chosen: list[torch.Tensor | None] = field(default_factory=list)
    rows: list[torch.Tensor] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    settled: list[int] = field(default_factory=list)
    limit: list[int] = field(default_factory=list)
    seen: list[int] = field(default_factory=list)
    recent: list[int] = field(default_factory=list)
    record: WindowSums | AttentionRows | None = None

    def waiting(self) -> list[int]:
        """Generated tokens of each row that wait to be thinned out."""
        return [n - s for n, s in zip(self.lengths, self.settled, strict=True)]
