"""Tokens that are stored once and never changed, as tensors with one entry per token: planes.

Uncompressed keys and values are two planes; codes and scales are others. Tokens are appended to all planes together,
leave them together, and keep their bits until then.

Legend: N segments (heads of all rows), S slots, n new tokens, B batch rows, H stored heads, D channels.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch

from .buffer import Buffer
from .segments import Groups, Segments, segment_lengths
from .static import StaticSegments


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    """Return a view of float8 numbers as bytes, which PyTorch can index and scatter; other tensors unchanged."""
    return x.view(torch.uint8) if x.dtype.is_floating_point and x.element_size() == 1 else x


class PlaneSegments(Segments):
    """Segments of equal length, each plane in a buffer [N, capacity, ...]."""

    static_problem = None
    supports_static_drop = appends_nothing = True

    def __init__(self) -> None:
        self._buffers: list[Buffer] = []

    @abstractmethod
    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return the planes [N, n, ...] of new tokens [N, n, D]."""

    @abstractmethod
    def empty(self, index: torch.Tensor) -> PlaneSegments:
        """Return segments without tokens in place of some of these, [M] int64."""

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.append_stored(self.encode(keys, values))

    def append_stored(self, stored: Sequence[torch.Tensor]) -> None:
        if not self._buffers:
            self._buffers = [Buffer(x, 1, x.shape[1] + self.reserved) for x in stored]
            return
        n = stored[0].shape[1]
        capacity = self.capacity(self.length + n, n)
        for buffer, x in zip(self._buffers, stored, strict=True):
            buffer.append(x, capacity)

    @property
    def stored(self) -> list[torch.Tensor]:
        """The planes, [N, S, ...]."""
        assert self._buffers, "read before append"
        return [x.used for x in self._buffers]

    def take(self, index: torch.Tensor) -> Segments:
        out = self.empty(index)
        if self._buffers:
            out.append_stored([x.used[index] for x in self._buffers])
        return out

    def shrink_to_fit(self) -> None:
        for x in self._buffers:
            x.shrink_to_fit()

    @property
    def length(self) -> int:
        return self._buffers[0].length if self._buffers else 0

    def tensors(self) -> list[torch.Tensor]:
        return [x.whole for x in self._buffers]

    @property
    def logical_bytes(self) -> int:
        return sum(x.used.nbytes for x in self._buffers)


def capacities(groups: Groups, steps: int, limits: torch.Tensor | None) -> torch.Tensor:
    """Return the slots [N] int64 that each segment needs once static; see :meth:`.segments.Segments.static`."""
    tokens = segment_lengths(groups)
    return (tokens if limits is None else torch.maximum(tokens, limits)) + steps


class StaticPlanes(StaticSegments):
    """All segments one after another in one tensor per plane, each with its own number of slots.

    Tokens are appended at a segment's end. A dropped token leaves a hole until :meth:`compact`, which moves the tokens
    of every segment to its first slots.

    Args:
        groups, shape: See :meth:`.segments.Segments.static`.
        capacities: [N] int64, slots of each segment.
        drops: Whether :meth:`drop` will be called.
    """

    def __init__(self, groups: Groups, shape: tuple[int, int], capacities: torch.Tensor, drops: bool = False):
        self.shape = shape
        stored = [(index, segments.stored) for index, segments in groups]
        device = stored[0][0].device
        self._width, total = int(capacities.max()), int(capacities.sum())
        self._is_uniform = self._width * len(capacities) == total
        self._starts = capacities.cumsum(0) - capacities  # [N]
        self.length = torch.zeros_like(capacities)
        # Zeros, because uninitialized memory may contain NaN, and a zero weight times NaN is NaN.
        self._planes = [x.new_zeros(total, *x.shape[2:]) for x in stored[0][1]]  # [total, ...]
        for index, planes in stored:
            tokens = planes[0].shape[1]
            slots = self._starts[index][:, None] + torch.arange(tokens, device=device)  # [segments, tokens]
            for plane, x in zip(self._planes, planes, strict=True):
                as_bytes(plane)[slots] = as_bytes(x)
            self.length[index] = tokens
        # Without drops every slot before the end holds a token.
        self._offset = torch.arange(self._width, device=device)
        self._valid = self._offset < self.length[:, None] if drops else None  # [N, width]
        self.end = self.length.clone() if drops else self.length  # [N], offset of the next token

    @abstractmethod
    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return the planes [N, 1, ...] of one new token [N, 1, D] per segment."""

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        slots = self._starts + self.end
        for plane, x in zip(self._planes, self.encode(keys[:, None], values[:, None]), strict=True):
            as_bytes(plane).index_copy_(0, slots, as_bytes(x[:, 0]))
        self.end += 1
        if self._valid is not None:
            self._valid.scatter_(1, self.end[:, None] - 1, True)
            self.length += 1

    @property
    def stored(self) -> list[torch.Tensor]:
        """The planes of all segments, [N, width, ...]; slots that are not ``valid`` may hold anything finite."""
        if self._is_uniform:
            return [x.unflatten(0, (-1, self._width)) for x in self._planes]
        # Slots beyond the capacity of a segment belong to the next one and are masked.
        slots = (self._starts[:, None] + self._offset).clamp_(max=len(self._planes[0]) - 1)  # [N, width]
        return [as_bytes(x)[slots].view(x.dtype) for x in self._planes]

    @property
    def valid(self) -> torch.Tensor:
        return self._offset < self.end[:, None] if self._valid is None else self._valid  # [N, width]

    @property
    def slots(self) -> int:
        return self._width

    def drop(self, keep: torch.Tensor) -> None:
        assert self._valid is not None, "made static without drops"
        self._valid.copy_(keep)
        torch.sum(keep, dim=1, out=self.length)

    def compact(self) -> torch.Tensor:
        assert self._valid is not None, "made static without drops"
        offsets = self._valid.int().sort(dim=1, descending=True, stable=True).indices  # [N, width], tokens first
        is_kept = self._offset < self.length[:, None]  # [N, width]
        starts = self._starts[:, None]
        source, target = (starts + offsets)[is_kept], (starts + self._offset)[is_kept]
        for x in map(as_bytes, self._planes):
            x[target] = x[source]
        self._valid.copy_(is_kept)
        self.end.copy_(self.length)
        return offsets.masked_fill(~is_kept, -1)

    def static_state(self) -> list[torch.Tensor]:
        return [self.length] if self._valid is None else [self.length, self.end, self._valid]

    def tensors(self) -> list[torch.Tensor]:
        return [*self._planes, self._starts, self._offset, *self.static_state()]

    @property
    def logical_bytes(self) -> int:
        return int(self.length.sum()) * sum(x[0].nbytes for x in self._planes)
