"""Keys and values as they are, head by head: no head takes room for the tokens of a longer one.

The storage of methods whose heads keep different numbers of tokens (Ada-KV). ``dense`` would hold the same tokens,
padded to the longest head, and count the padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..cache.kv_shape import KVShape
from .base import Storage
from .buffer import Buffer
from .segments import SegmentedLayer, Segments


class DenseSegments(Segments):
    """[N, capacity, D] buffers of which the first ``length`` tokens are in use."""

    def __init__(self) -> None:
        self._keys: Buffer | None = None
        self._values: Buffer | None = None

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        if self._keys is None or self._values is None:
            self._keys, self._values = (Buffer(x, 1, keys.shape[1] + self.expected) for x in (keys, values))
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

    def trim(self) -> None:
        for x in self._buffers:
            x.trim()

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
    """Uncompressed storage, head by head; it has no options."""

    id: ClassVar[str] = "Ragged"

    @property
    def is_exact(self) -> bool:
        return True

    def new_layers(self, num_layers: int) -> Sequence[SegmentedLayer]:
        return [SegmentedLayer(DenseSegments) for _ in range(num_layers)]

    def bytes_formula(self, tokens: Sequence[int], heads: int, shape: KVShape, new_tokens: int = 0) -> int:
        """sum over layers of heads x tokens (of the mean head) x (key's + value's channels) x element_bytes."""
        return heads * shape.token_channels * shape.element_bytes * sum(tokens)
