"""State of PyramidInfer's layers: one for each layer, and what they share."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .records import AttentionRows, WindowSums


@dataclass
class SharedState:
    """What the layers of one cache share.

    Attributes:
        prompts: Prompt tokens of each row.
        recent: R of each row, for every token of the step under way.
    """

    prompts: list[int] = field(default_factory=list)
    recent: list[list[int]] = field(default_factory=list)


@dataclass
class PyramidState:
    """One layer and batch.

    Attributes:
        layer_idx: Index of the layer.
        num_layers: Number of layers.
        shared: State that all layers share.
        chosen: int64 [R, K] for each group of rows: tokens of this layer that go on; None: all.
        rows: With ``trigger=published``, [R, 1 + R, T] attention of the recent queries of the rows of each prompt
            length, until the prompt is in.
        lengths: Tokens held, of each row.
        settled: How many of them need no more thinning, of each row.
        limit: Tokens below which nothing leaves, of each row: a budget that holds the whole prompt.
        seen: Tokens fed, of each row.
        recent: R of each row at the step under way, from the first layer's length.
        record: What is remembered of later tokens' attention.
    """

    layer_idx: int
    num_layers: int
    shared: SharedState = field(default_factory=SharedState)
    chosen: list[torch.Tensor | None] = field(default_factory=list)
    rows: dict[int, torch.Tensor] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)
    settled: list[int] = field(default_factory=list)
    limit: list[int] = field(default_factory=list)
    seen: list[int] = field(default_factory=list)
    recent: list[int] = field(default_factory=list)
    record: WindowSums | AttentionRows | None = None

    def waiting(self) -> list[int]:
        """Generated tokens of each row that wait to be thinned out."""
        return [n - s for n, s in zip(self.lengths, self.settled, strict=True)]
