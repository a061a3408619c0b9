"""Storage per head without padding: every head of every row is a segment with its own length.

Segments of equal length share a tensor: there is one tensor if all are equally long, and several for Ada-KV's heads or
for prompts of different lengths. No padding is stored, and attention runs once per length. A :class:`Segments` subclass
defines the representation of tokens: uncompressed (``ragged.py``) or quantized (``kivi.py``).

:mod:`.segmented` combines the segments of a layer.

Legend: N segments of one length, B batch rows, H stored heads, g query heads per stored head, S slots, n new tokens,
D channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch

from ..cache.logits import LogitRule
from ..cache.products import cached_attention
from .buffer import Growing
from .static import StaticSegments


class Segments(Growing, ABC):
    """Keys and values of N segments of equal length, [N, S, D].

    Attributes:
        static_problem: Why :meth:`static` is not implemented; None: it is.
        supports_static_drop: Whether :meth:`static` takes ``limits``.
        appends_nothing: Whether :meth:`append` takes n = 0, so that segments without tokens have a dtype and channels.
    """

    static_problem: ClassVar[str | None] = "the storage has no tensors of fixed shape"
    supports_static_drop: ClassVar[bool] = False
    appends_nothing: ClassVar[bool] = False

    @abstractmethod
    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Append copies of n tokens [N, n, D] to every segment."""

    @abstractmethod
    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values [N, S, D] in the compute dtype."""

    @property
    def stored(self) -> list[torch.Tensor]:
        """Tensors [N, S, ...] from which :meth:`append_stored` restores the tokens; by default keys and values."""
        return list(self.read())

    def append_stored(self, stored: Sequence[torch.Tensor]) -> None:
        """Append tokens as :attr:`stored` returns them."""
        self.append(*stored)

    def attend(self, query: torch.Tensor, rule: LogitRule) -> torch.Tensor:
        """Attend with the last n tokens over all tokens: [N, g, n, D] -> the same shape."""
        keys, values = self.read()
        return cached_attention(query, keys[:, None], values[:, None], rule)

    @abstractmethod
    def take(self, index: torch.Tensor) -> Segments:
        """Return a copy of some of the segments, [M] int64, bit for bit."""

    @property
    @abstractmethod
    def length(self) -> int:
        """S, the number of tokens."""

    @abstractmethod
    def tensors(self) -> list[torch.Tensor]:
        """Return every tensor that stays in memory."""

    @property
    @abstractmethod
    def logical_bytes(self) -> int:
        """Bytes without unused slots."""

    def flush(self) -> None:
        """Convert tokens that are no longer recent, after the attention of a step."""
        return

    def shrink_to_fit(self) -> None:
        """Free unused slots."""
        return

    @classmethod
    def static(
        cls, groups: Groups, shape: tuple[int, int], steps: int, limits: torch.Tensor | None = None
    ) -> StaticSegments:
        """Return all segments of a layer as tensors of fixed shape; only without a ``static_problem``.

        Args:
            groups: All segments of the layer, of this class, with their indices.
            shape: Rows B and heads H of the layer.
            steps: Maximum number of decode steps, with ``limits`` until tokens are dropped or compacted.
            limits: [N] int64, maximum number of tokens of each segment after tokens have been dropped; None: tokens are
                never dropped.
        """
        raise NotImplementedError


Groups = list[tuple[torch.Tensor, Segments]]
"""Segment indices [N] int64, and the segments in that order."""


def segment_lengths(groups: Groups) -> torch.Tensor:
    """Return the tokens of each segment, [N] int64."""
    out = torch.zeros(sum(len(index) for index, _ in groups), dtype=torch.int64, device=groups[0][0].device)
    for index, segments in groups:
        out[index] = segments.length
    return out
