"""Storage per head without padding: every head of every row is a segment with its own length.

Segments of equal length share a tensor: there is one tensor if all are equally long, and several for Ada-KV's heads or
for prompts of different lengths. No padding is stored, and attention runs once per length. A :class:`Segments` subclass
defines the representation of tokens: uncompressed (``ragged.py``) or quantized (``kivi.py``).

Legend: N segments of one length, B batch rows, H stored heads, g query heads per stored head, S slots, n new tokens,
D channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch

from ..cache.logits import LogitRule
from ..cache.products import cached_attention
from .base import LayerStorage
from .buffer import Growing
from .static import StaticSegments


class Segments(Growing, ABC):
    """Keys and values of N segments of equal length, [N, S, D].

    Attributes:
        supports_static: Whether :meth:`static` is implemented.
    """

    supports_static: ClassVar[bool] = False

    @abstractmethod
    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Append copies of n tokens [N, n, D] to every segment."""

    @abstractmethod
    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values [N, S, D] in the compute dtype."""

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
    def static(cls, groups: Groups, shape: tuple[int, int], steps: int) -> StaticSegments:
        """Return all segments of a layer as tensors of fixed shape; only if ``supports_static``.

        Args:
            groups: All segments of the layer, of this class, with their indices.
            shape: Rows B and heads H of the layer.
            steps: Maximum number of decode steps.
        """
        raise NotImplementedError


Groups = list[tuple[torch.Tensor, Segments]]
"""Segment indices [N] int64, and the segments in that order."""


class SegmentedLayer(LayerStorage):
    """A layer as groups of segments. Segment ``b * H + h`` is head h of row b.

    Args:
        new: Creates empty segments; the first ``append`` determines their number.
    """

    def __init__(self, new: Callable[[], Segments]):
        self._new = new
        self._groups: list[tuple[torch.Tensor, Segments]] = []  # (segment indices [N], segments)
        self._shape = (0, 0, 0)  # B, H, D
        self._static: StaticSegments | None = None  # replaces the groups once static

    def write(self, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor | None = None) -> None:
        assert self._static is None, "a static layer takes single tokens"
        batch, heads, slots, dim = keys.shape
        self._shape = (batch, heads, dim)
        all_segments = torch.arange(batch * heads, device=keys.device)
        self._groups = [(all_segments, self._new())]
        self._append_real(keys, values, None if valid is None else valid.expand(batch, heads, slots))
        self.flush()

    def append(self, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor | None = None) -> None:
        if self._static is not None:
            assert keys.shape[2] == 1 and valid is None, "a static layer takes single tokens"
            self._static.append(*(x.flatten(0, 2) for x in (keys, values)))
            return
        if not self._groups:
            self.write(keys, values, None if valid is None else valid[:, None])
            return
        self.count_down(keys.shape[2])
        self._append_real(keys, values, valid)

    def _append_real(self, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor | None) -> None:
        """Append left-padded tokens [B, H, n, D] without their padding; ``valid`` [B, n] or [B, H, n]."""
        batch, heads, n, _ = keys.shape
        keys, values = keys.flatten(0, 1), values.flatten(0, 1)
        if valid is None:
            for index, segments in self._groups:
                segments.growth, segments.reserved = self.growth, self.reserved
                segments.append(_rows(keys, index), _rows(values, index))
            return
        counts = valid[:, None] if valid.dim() == 2 else valid
        counts = counts.expand(batch, heads, n).sum(-1).flatten()  # real tokens of each segment
        groups = []
        for index, segments in self._groups:
            group_counts = counts[index]
            for count in group_counts.unique().tolist():
                members = (group_counts == count).nonzero()[:, 0]
                group = segments if len(members) == len(index) else segments.take(members)
                if count:
                    group.growth, group.reserved = self.growth, self.reserved
                    group.append(keys[index[members], n - count :], values[index[members], n - count :])
                groups.append((index[members], group))
        self._groups = groups

    def read(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return keys, values and ``valid``, left-padded to the longest segment for this call."""
        batch, heads, dim = self._shape
        if self._static is not None:
            keys, values, valid = (x.unflatten(0, (batch, heads)) for x in self._static.read())
            return keys, values, valid
        if len(self._groups) == 1:
            keys, values = self._groups[0][1].read()
            return keys.unflatten(0, (batch, heads)), values.unflatten(0, (batch, heads)), None
        width = max(s.length for _, s in self._groups)
        groups = [(index, s.length, *s.read()) for index, s in self._groups]
        keys = groups[0][2].new_zeros(batch * heads, width, dim)
        values = groups[0][3].new_zeros(batch * heads, width, groups[0][3].shape[2])
        valid = torch.zeros(batch * heads, width, dtype=torch.bool, device=keys.device)
        for index, length, k, v in groups:
            keys[index, width - length :] = k
            values[index, width - length :] = v
            valid[index, width - length :] = True
        keys, values, valid = (x.unflatten(0, (batch, heads)) for x in (keys, values, valid))
        return keys, values, None if bool(valid.all()) else valid

    def attend(self, query: torch.Tensor, rule: LogitRule, valid: torch.Tensor | None) -> torch.Tensor:
        if self._static is not None:
            return self._static.attend(query, rule)
        if rule.sinks is not None:  # sinks depend on the head, and segments are grouped by length
            return super().attend(query, rule, valid)
        batch, query_heads, n, dim = query.shape
        segments = self._shape[0] * self._shape[1]
        rows = query.reshape(segments, -1, n, dim)  # [B * H, g, n, D]
        out: torch.Tensor | None = None  # [B * H, g, n, D_v]
        for index, group in self._groups:
            real = n  # new tokens without the left padding, which is not stored
            if valid is not None:
                real = int(valid[index[0] // self._shape[1]].sum())
            if not real:
                continue
            attended = group.attend(_rows(rows, index)[:, :, n - real :], rule)
            if out is None:
                out = attended.new_zeros(*rows.shape[:3], attended.shape[3])
            out[index, :, n - real :] = attended
        assert out is not None
        return out.reshape(batch, query_heads, n, -1)

    def flush(self) -> None:
        if self._static is not None:
            self._static.flush()
        for _, segments in self._groups:
            segments.flush()

    @property
    def supports_static(self) -> bool:
        return all(segments.supports_static for _, segments in self._groups)

    def make_static(self, steps: int, mask_heads: int = 1) -> None:
        self._static = type(self._groups[0][1]).static(self._groups, self._shape[:2], steps)
        self._groups = []

    def static_state(self) -> list[torch.Tensor]:
        assert self._static is not None, "static_state before make_static"
        return self._static.static_state()

    def between_steps(self) -> None:
        assert self._static is not None, "between_steps before make_static"
        self._static.between_steps()

    def end_steps(self) -> None:
        assert self._static is not None, "end_steps before make_static"
        self._static.end_steps()

    def keep(self, slots: torch.Tensor, valid: torch.Tensor | None = None) -> None:
        keys, values, stored = self.read()
        batch, heads, _ = self._shape
        if slots.dim() == 1:
            slots = slots.expand(batch, 1, -1)
        slots = slots.expand(-1, heads, -1)  # [B, H, C]
        real = None if stored is None else stored.gather(2, slots)
        if valid is not None:
            real = valid.expand_as(slots) if real is None else real & valid
        keys, values = (x.gather(2, slots[..., None].expand(-1, -1, -1, x.shape[3])) for x in (keys, values))
        self.write(keys, values, real)

    def shrink_to_fit(self) -> None:
        for _, segments in self._groups:
            segments.shrink_to_fit()

    def tensors(self) -> list[torch.Tensor]:
        if self._static is not None:
            return self._static.tensors()
        return [t for _, segments in self._groups for t in segments.tensors()]

    @property
    def tokens(self) -> torch.Tensor:
        batch, heads, _ = self._shape
        if self._static is not None:
            return self._static.length.unflatten(0, (batch, heads)).clone()
        out = torch.zeros(batch * heads, dtype=torch.int64, device=self._groups[0][0].device)
        for index, segments in self._groups:
            out[index] = segments.length
        return out.unflatten(0, (batch, heads))

    @property
    def logical_bytes(self) -> int:
        if self._static is not None:
            return self._static.logical_bytes
        return sum(segments.logical_bytes for _, segments in self._groups)


def _rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return ``x[index]``, without a copy if it contains all rows."""
    return x if len(index) == x.shape[0] else x[index]
