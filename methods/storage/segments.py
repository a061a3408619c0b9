"""Storage head by head: every head of every row is a segment with a length of its own, and takes room for no more.

Where all segments are equally long they are one tensor; where they are not (Ada-KV's heads, prompts of different
lengths in one batch) the segments of one length share a tensor. No padding is ever stored, and attention runs once for
each length. What a segment's tokens look like in memory is up to the :class:`Segments` behind it: as they are
(``ragged.py``), or in few bits (``kivi.py``).
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
    """Equally long segments: keys and values of N heads, [N, S, D].

    Attributes:
        supports_static: whether :meth:`static` can be called.
    """

    supports_static: ClassVar[bool] = False

    @abstractmethod
    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Add n tokens [N, n, D] to every segment; must not keep the given tensors alive."""

    @abstractmethod
    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(keys, values) [N, S, D] in the compute dtype."""

    def attend(self, query: torch.Tensor, rule: LogitRule) -> torch.Tensor:
        """Attention of the last n tokens over all: [N, g, n, D] -> the same shape."""
        keys, values = self.read()
        return cached_attention(query, keys[:, None], values[:, None], rule)

    @abstractmethod
    def take(self, index: torch.Tensor) -> Segments:
        """Some of the segments, [M] int64, as segments of their own: bit for bit the same tokens."""

    @property
    @abstractmethod
    def length(self) -> int:
        """S, tokens."""

    @abstractmethod
    def tensors(self) -> list[torch.Tensor]:
        """Every tensor that must stay in memory."""

    @property
    @abstractmethod
    def logical_bytes(self) -> int:
        """Bytes without room to grow."""

    def flush(self) -> None:
        """A step's attention is done: represent what has become old in the way of old tokens."""
        return

    def shrink_to_fit(self) -> None:
        """Give back room to grow."""
        return

    @classmethod
    def static(cls, groups: Groups, shape: tuple[int, int], steps: int) -> StaticSegments:
        """All segments of a layer, with room for further tokens; where ``supports_static``.

        Args:
            groups: the segments, of this class, and their numbers; every segment of the layer is in one of them.
            shape: rows B and heads H of the layer.
            steps: tokens to come, one at a time.
        """
        raise NotImplementedError


Groups = list[tuple[torch.Tensor, Segments]]
"""Segment numbers [N] int64, and the segments in that order."""


class SegmentedLayer(LayerStorage):
    """A layer as groups of segments. Segment ``b * H + h`` is head h of row b.

    Args:
        new: makes empty segments; the first ``append`` says how many.
    """

    def __init__(self, new: Callable[[], Segments]):
        self._new = new
        self._groups: list[tuple[torch.Tensor, Segments]] = []  # (segment numbers [N], segments)
        self._shape = (0, 0, 0)  # B, H, D
        self._static: StaticSegments | None = None  # in place of the groups, once static

    def write(self, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor | None = None) -> None:
        assert self._static is None, "a static layer takes single tokens"
        batch, heads, slots, dim = keys.shape
        self._shape = (batch, heads, dim)
        everything = torch.arange(batch * heads, device=keys.device)
        self._groups = [(everything, self._new())]
        self._add(keys, values, None if valid is None else valid.expand(batch, heads, slots))
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
        self._add(keys, values, valid)

    def _add(self, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor | None) -> None:
        """``valid`` [B, n], or [B, H, n]; real tokens are the last of their row."""
        batch, heads, n, _ = keys.shape
        keys, values = keys.flatten(0, 1), values.flatten(0, 1)
        if valid is None:
            for index, segments in self._groups:
                segments.growth, segments.expected = self.growth, self.expected
                segments.append(_rows(keys, index), _rows(values, index))
            return
        counts = valid[:, None] if valid.dim() == 2 else valid
        counts = counts.expand(batch, heads, n).sum(-1).flatten()  # real tokens of each segment
        groups = []
        for index, segments in self._groups:
            mine = counts[index]
            for count in mine.unique().tolist():
                within = (mine == count).nonzero()[:, 0]
                part = segments if len(within) == len(index) else segments.take(within)
                if count:
                    part.growth, part.expected = self.growth, self.expected
                    part.append(keys[index[within], n - count :], values[index[within], n - count :])
                groups.append((index[within], part))
        self._groups = groups

    def read(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Padded on the left to the longest segment, for this call only."""
        batch, heads, dim = self._shape
        if self._static is not None:
            keys, values, valid = (x.unflatten(0, (batch, heads)) for x in self._static.read())
            return keys, values, valid
        if len(self._groups) == 1:
            keys, values = self._groups[0][1].read()
            return keys.unflatten(0, (batch, heads)), values.unflatten(0, (batch, heads)), None
        width = max(s.length for _, s in self._groups)
        parts = [(index, s.length, *s.read()) for index, s in self._groups]
        keys = parts[0][2].new_zeros(batch * heads, width, dim)
        values = parts[0][3].new_zeros(batch * heads, width, parts[0][3].shape[2])
        valid = torch.zeros(batch * heads, width, dtype=torch.bool, device=keys.device)
        for index, length, k, v in parts:
            keys[index, width - length :] = k
            values[index, width - length :] = v
            valid[index, width - length :] = True
        keys, values, valid = (x.unflatten(0, (batch, heads)) for x in (keys, values, valid))
        return keys, values, None if bool(valid.all()) else valid

    def attend(self, query: torch.Tensor, rule: LogitRule, valid: torch.Tensor | None) -> torch.Tensor:
        if self._static is not None:
            return self._static.attend(query, rule)
        if rule.sinks is not None:  # they belong to heads, and segments are grouped by their length
            return super().attend(query, rule, valid)
        batch, query_heads, n, dim = query.shape
        segments = self._shape[0] * self._shape[1]
        rows = query.reshape(segments, -1, n, dim)  # [B * H, g, n, D]
        out: torch.Tensor | None = None  # [B * H, g, n, D_v]
        for index, group in self._groups:
            real = n  # a row's pads, if any, are its first new columns, and are not stored
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
        keys, values, held = self.read()
        batch, heads, _ = self._shape
        if slots.dim() == 1:
            slots = slots.expand(batch, 1, -1)
        slots = slots.expand(-1, heads, -1)
        real = None if held is None else held.gather(2, slots)
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
    """x[index], without a copy when that is all of it."""
    return x if len(index) == x.shape[0] else x[index]
