"""State of PyramidInfer: per layer, and shared by the layers of a cache.

Legend: R rows of one prompt length, K forwarded tokens, P recent queries, T prompt tokens of the layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from .records import AttentionRows, WindowSums

if TYPE_CHECKING:
    from .lengths import PyramidLengths


@dataclass
class SharedState:
    """State that the layers of one cache share.

    Attributes:
        prompts: Number of prompt tokens of each row.
        recent: Number of recent tokens besides the last, for each token of the current forward and each row.
    """

    prompts: list[int] = field(default_factory=list)
    recent: list[list[int]] = field(default_factory=list)


@dataclass
class PyramidState:
    """State of one layer for one batch.

    Attributes:
        layer_idx: Index of the layer.
        num_layers: Number of layers.
        shared: State that all layers share.
        chosen: Per group of rows int64 [R, K], tokens of this layer that are forwarded to the next; None: all.
        rows: With ``trigger=published`` in the prefill: prompt length -> attention [R, P, T] of the recent queries.
        lengths: Number of stored tokens of each row.
        finalized: Number of stored tokens of each row that are exempt from further eviction.
        limit: Length of each row up to which no token is evicted.
        seen: Number of tokens seen of each row.
        recent: Number of recent tokens of each row in the current step, computed from the first layer's length.
        record: Attention that later tokens have paid to the stored ones.
        is_static: Tensors have their final shapes and are changed in place.
    """

    layer_idx: int
    num_layers: int
    shared: SharedState = field(default_factory=SharedState)
    chosen: list[torch.Tensor | None] = field(default_factory=list)
    rows: dict[int, torch.Tensor] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)
    finalized: list[int] = field(default_factory=list)
    limit: list[int] = field(default_factory=list)
    seen: list[int] = field(default_factory=list)
    recent: list[int] = field(default_factory=list)
    record: WindowSums | AttentionRows | None = None
    is_static: bool = False

    def pending(self, row: int) -> int:
        """Return the number of generated tokens of a row that may still be evicted."""
        return self.lengths[row] - self.finalized[row]

    def window_to_evict(self, rule: PyramidLengths, row: int) -> tuple[int, int]:
        """See :meth:`.lengths.PyramidLengths.window_to_evict`."""
        counts = (self.lengths, self.finalized, self.seen, self.recent, self.limit)
        return rule.window_to_evict(*(count[row] for count in counts))

    def count(self, rule: PyramidLengths, number: int, real: list[bool] | None = None) -> None:
        """Count one new token per row on the host; must be called for the first layer before the others.

        Args:
            rule: Settings.
            number: Index of the token in the current forward.
            real: False for rows whose token is a pad; None: no pads.
        """
        for row in range(len(self.lengths)):
            added = 1 if real is None else int(real[row])
            self.lengths[row] += added
            self.seen[row] += added
        if self.layer_idx == 0:
            self.shared.recent[number:] = [[rule.recent(n) for n in self.lengths]]
        self.recent = self.shared.recent[number]
