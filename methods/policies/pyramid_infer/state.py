"""State of PyramidInfer's layers: one for each layer, and what they share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from .records import AttentionRows, WindowSums

if TYPE_CHECKING:
    from .lengths import PyramidLengths


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
        is_static: The layer's tensors have their final shapes, and steps change them in place.
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
    is_static: bool = False

    def waiting(self, row: int) -> int:
        """Generated tokens of a row that wait to be thinned out."""
        return self.lengths[row] - self.settled[row]

    def window_to_thin(self, rule: PyramidLengths, row: int) -> tuple[int, int]:
        """See :meth:`.lengths.PyramidLengths.window_to_thin`."""
        counts = (self.lengths, self.settled, self.seen, self.recent, self.limit)
        return rule.window_to_thin(*(count[row] for count in counts))

    def count(self, rule: PyramidLengths, number: int, real: list[bool] | None = None) -> None:
        """Count a token of each row on the host, the first layer before the others.

        Args:
            rule: Settings.
            number: Number of the token in the step under way.
            real: False where the token of a row is a pad; None: all real.
        """
        for row in range(len(self.lengths)):
            more = 1 if real is None else int(real[row])
            self.lengths[row] += more
            self.seen[row] += more
        if self.layer_idx == 0:
            self.shared.recent[number:] = [[rule.recent(n) for n in self.lengths]]
        self.recent = self.shared.recent[number]
