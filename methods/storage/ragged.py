"""Uncompressed keys and values per head, without padding to the longest head.

The storage for methods whose heads keep different numbers of tokens (Ada-KV). ``dense`` would pad all heads to the
longest one.

Legend: N segments (heads of all rows), H_q query heads, D channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch

from ..cache.kv_shape import KVShape
from ..cache.logits import LogitRule
from ..cache.products import cached_attention
from .base import Storage, StorageCapabilities
from .buffer import Buffer
from .segmented import SegmentedLayer
from .segments import Groups, Segments, segment_lengths
from .static import StaticSegments
from .step_attention import ragged_step_attention


class StaticRagged(StaticSegments):
    """All segments one after another in one buffer, each with its own number of slots.

    Tokens are appended at a segment's end. A dropped token leaves a hole until :meth:`compact`, which moves the tokens
    of every segment to its first slots.

    Args:
        groups, shape: See :meth:`.segments.Segments.static`.
        capacities: [N] int64, slots of each segment.
        drops: Whether :meth:`drop` will be called.
    """

    def __init__(self, groups: Groups, shape: tuple[int, int], capacities: torch.Tensor, drops: bool = False):
        self.shape = shape
        stored = [(index, *segments.read()) for index, segments in groups]
        device = stored[0][0].device
        self._width, total = int(capacities.max()), int(capacities.sum())
        self._is_uniform = self._width * len(capacities) == total
        self._starts = capacities.cumsum(0) - capacities  # [N]
        self.length = torch.zeros_like(capacities)
        # Zeros, because uninitialized memory may contain NaN, and a zero weight times NaN is NaN.
        self._keys, self._values = (x.new_zeros(total, x.shape[2]) for x in stored[0][1:])  # [total, D]
        for index, keys, values in stored:
            slots = self._starts[index][:, None] + torch.arange(keys.shape[1], device=device)  # [segments, tokens]
            self._keys[slots], self._values[slots] = keys, values
            self.length[index] = keys.shape[1]
        # Without drops every slot before the end holds a token.
        self._offset = torch.arange(self._width, device=device)
        self._valid = self._offset < self.length[:, None] if drops else None  # [N, width]
        self.end = self.length.clone() if drops else self.length  # [N], offset of the next token

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        slots = self._starts + self.end
        self._keys.index_copy_(0, slots, keys)
        self._values.index_copy_(0, slots, values)
        self.end += 1
        if self._valid is not None:
            self._valid.scatter_(1, self.end[:, None] - 1, True)
            self.length += 1

    def read(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if self._is_uniform:
            keys, values = (x.unflatten(0, (-1, self._width)) for x in (self._keys, self._values))
            return keys, values, self.valid
        # Slots beyond the capacity of a segment belong to the next one and are masked.
        slots = (self._starts[:, None] + self._offset).clamp_(max=len(self._keys) - 1)  # [N, width]
        return self._keys[slots], self._values[slots], self.valid

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
        for x in (self._keys, self._values):
            x[target] = x[source]
        self._valid.copy_(is_kept)
        self.end.copy_(self.length)
        return offsets.masked_fill(~is_kept, -1)

    def attend(self, query: torch.Tensor, rule: LogitRule) -> torch.Tensor:
        places = self._starts, self.end, None if self._valid is None else self._valid.unflatten(0, self.shape)
        out = ragged_step_attention(query, self._keys, self._values, *places, self.shape, self._width, rule)
        if out is not None:
            return out
        keys, values, valid = (x.unflatten(0, self.shape) for x in self.read())
        return cached_attention(query, keys, values, rule, valid)

    def static_state(self) -> list[torch.Tensor]:
        return [self.length] if self._valid is None else [self.length, self.end, self._valid]

    def tensors(self) -> list[torch.Tensor]:
        return [self._keys, self._values, self._starts, self._offset, *self.static_state()]

    @property
    def logical_bytes(self) -> int:
        return int(self.length.sum()) * (self._keys[0].nbytes + self._values[0].nbytes)


class DenseSegments(Segments):
    """Segments of equal length in buffers [N, capacity, D]."""

    static_problem = None
    supports_static_drop = appends_nothing = True

    def __init__(self) -> None:
        self._keys: Buffer | None = None
        self._values: Buffer | None = None

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        if self._keys is None or self._values is None:
            self._keys, self._values = (Buffer(x, 1, keys.shape[1] + self.reserved) for x in (keys, values))
            return
        capacity = self.capacity(self._keys.length + keys.shape[1], keys.shape[1])
        self._keys.append(keys, capacity)
        self._values.append(values, capacity)

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._keys is not None and self._values is not None, "read before append"
        return self._keys.used, self._values.used

    def take(self, index: torch.Tensor) -> Segments:
        out = DenseSegments()
        if self._keys is not None and self._values is not None:
            out.append(self._keys.used[index], self._values.used[index])
        return out

    def shrink_to_fit(self) -> None:
        for x in self._buffers:
            x.shrink_to_fit()

    @classmethod
    def static(
        cls, groups: Groups, shape: tuple[int, int], steps: int, limits: torch.Tensor | None = None
    ) -> StaticSegments:
        tokens = segment_lengths(groups)
        if limits is None:
            return StaticRagged(groups, shape, tokens + steps)
        return StaticRagged(groups, shape, torch.maximum(tokens, limits) + steps, drops=True)

    @property
    def length(self) -> int:
        return 0 if self._keys is None else self._keys.length

    @property
    def _buffers(self) -> list[Buffer]:
        return [x for x in (self._keys, self._values) if x is not None]

    def tensors(self) -> list[torch.Tensor]:
        return [x.whole for x in self._buffers]

    @property
    def logical_bytes(self) -> int:
        return sum(x.used.nbytes for x in self._buffers)


@dataclass(frozen=True)
class Ragged(Storage):
    """Uncompressed storage per head; it has no options."""

    id: ClassVar[str] = "Ragged"

    @cached_property
    def capabilities(self) -> StorageCapabilities:
        return StorageCapabilities(lossless=True)

    def new_layers(self, num_layers: int) -> Sequence[SegmentedLayer]:
        return [SegmentedLayer(DenseSegments) for _ in range(num_layers)]

    def bytes_formula(self, tokens: Sequence[int], heads: int, shape: KVShape, new_tokens: int = 0) -> int:
        """Return the sum over layers of heads x tokens (of the mean head) x (key + value channels) x element_bytes."""
        return heads * shape.token_channels * shape.element_bytes * sum(tokens)
