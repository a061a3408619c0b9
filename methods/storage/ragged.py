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
from .planes import PlaneSegments, StaticPlanes, capacities
from .segmented import SegmentedLayer
from .segments import Groups
from .static import StaticSegments
from .step_attention import ragged_step_attention


class StaticRagged(StaticPlanes):
    """All segments one after another in one tensor of keys and one of values."""

    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> Sequence[torch.Tensor]:
        return keys, values

    def read(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        keys, values = self.stored
        return keys, values, self.valid

    def attend(self, query: torch.Tensor, rule: LogitRule) -> torch.Tensor:
        places = self._starts, self.end, None if self._valid is None else self._valid.unflatten(0, self.shape)
        keys, values = self._planes
        out = ragged_step_attention(query, keys, values, *places, self.shape, self._width, rule)
        if out is not None:
            return out
        keys, values, valid = (x.unflatten(0, self.shape) for x in self.read())
        return cached_attention(query, keys, values, rule, valid)


class DenseSegments(PlaneSegments):
    """Segments of equal length in buffers [N, capacity, D]."""

    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> Sequence[torch.Tensor]:
        return keys, values

    def empty(self, index: torch.Tensor) -> PlaneSegments:
        return DenseSegments()

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.stored
        return keys, values

    @classmethod
    def static(
        cls, groups: Groups, shape: tuple[int, int], steps: int, limits: torch.Tensor | None = None
    ) -> StaticSegments:
        return StaticRagged(groups, shape, capacities(groups, steps, limits), drops=limits is not None)


@dataclass(frozen=True)
class Ragged(Storage):
    """Uncompressed storage per head; it has no options."""

    id: ClassVar[str] = "Ragged"

    @cached_property
    def capabilities(self) -> StorageCapabilities:
        return StorageCapabilities(lossless=True, separates_heads=True)

    def new_layers(self, num_layers: int) -> Sequence[SegmentedLayer]:
        return [SegmentedLayer(DenseSegments) for _ in range(num_layers)]

    def bytes_formula(self, tokens: Sequence[int], heads: int, shape: KVShape, new_tokens: int = 0) -> int:
        """Return the sum over layers of heads x tokens (of the mean head) x (key + value channels) x element_bytes."""
        return heads * shape.token_channels * shape.element_bytes * sum(tokens)
