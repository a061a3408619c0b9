"""Uncompressed keys and values per head, without padding to the longest head.

The storage for methods whose heads keep different numbers of tokens (Ada-KV). ``dense`` would pad all heads to the
longest one.

Legend: N segments (heads of all rows), H_q query heads, D channels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch

from ..cache.kv_shape import KVShape
from ..cache.logits import LogitRule
from .base import Storage, StorageCapabilities
from .buffer import Buffer
from .segments import Groups, SegmentedLayer, Segments
from .static import StaticSegments, static_attention


class StaticRagged(StaticSegments):
    """All segments one after another in one buffer, each with free slots for ``steps`` more tokens."""

    def __init__(self, groups: Groups, shape: tuple[int, int], steps: int):
        self.shape = shape
        stored = [(index, *segments.read()) for index, segments in groups if segments.length]
        device = stored[0][0].device
        capacities = [steps] * math.prod(shape)
        for index, keys, _ in stored:
            for segment in index.tolist():
                capacities[segment] += keys.shape[1]
        self._width, total = max(capacities), sum(capacities)
        self._is_uniform = self._width * len(capacities) == total
        self._starts = torch.tensor([0, *itertools.accumulate(capacities[:-1])], device=device)  # [N]
        self.length = torch.tensor(capacities, device=device) - steps
        # Zeros, because uninitialized memory may contain NaN, and a zero weight times NaN is NaN.
        self._keys, self._values = (x.new_zeros(total, x.shape[2]) for x in stored[0][1:])  # [total, D]
        for index, keys, values in stored:
            slots = self._starts[index][:, None] + torch.arange(keys.shape[1], device=device)  # [segments, tokens]
            self._keys[slots], self._values[slots] = keys, values

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        slots = self._starts + self.length
        self._keys.index_copy_(0, slots, keys)
        self._values.index_copy_(0, slots, values)
        self.length += 1

    def read(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        offset = torch.arange(self._width, device=self.length.device)
        valid = offset < self.length[:, None]  # [N, width]
        if self._is_uniform:
            keys, values = (x.unflatten(0, (-1, self._width)) for x in (self._keys, self._values))
            return keys, values, valid
        # Slots beyond the capacity of a segment belong to the next one and are masked.
        slots = (self._starts[:, None] + offset).clamp_(max=len(self._keys) - 1)  # [N, width]
        return self._keys[slots], self._values[slots], valid

    def attend(self, query: torch.Tensor, rule: LogitRule) -> torch.Tensor:
        keys, values, valid = (x.unflatten(0, self.shape) for x in self.read())
        return static_attention(query, keys, values, valid, self.length.amax().view(1), rule)

    def static_state(self) -> list[torch.Tensor]:
        return [self.length]

    def tensors(self) -> list[torch.Tensor]:
        return [self._keys, self._values, self._starts, self.length]

    @property
    def logical_bytes(self) -> int:
        return int(self.length.sum()) * (self._keys[0].nbytes + self._values[0].nbytes)


class DenseSegments(Segments):
    """Segments of equal length in buffers [N, capacity, D]."""

    supports_static = True

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
    def static(cls, groups: Groups, shape: tuple[int, int], steps: int) -> StaticSegments:
        return StaticRagged(groups, shape, steps)

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
