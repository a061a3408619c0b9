"""Keys and values as they are, head by head: no head takes room for the tokens of a longer one.

The storage of methods whose heads keep different numbers of tokens (Ada-KV). ``dense`` would hold the same tokens,
padded to the longest head, and count the padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .base import GROWTH, KVShape, Storage
from .dense import grown
from .segments import SegmentedLayer, Segments


class DenseSegments(Segments):
    """[N, capacity, D] buffers of which the first ``length`` tokens are in use; grows by :data:`.base.GROWTH`."""

    def __init__(self) -> None:
        self._length = 0
        self._keys: torch.Tensor | None = None
        self._values: torch.Tensor | None = None

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        start, n = self._length, keys.shape[1]
        if self._keys is None or self._values is None:
            self._keys, self._values = (x.clone(memory_format=torch.contiguous_format) for x in (keys, values))
            self._length = n
            return
        if start + n > self._keys.shape[1]:
            self._resize(start + max(n, GROWTH))
        self._keys[:, start : start + n] = keys
        self._values[:, start : start + n] = values
        self._length = start + n

    def _resize(self, capacity: int) -> None:
        assert self._keys is not None and self._values is not None
        self._keys, self._values = (grown(x, self._length, capacity, dim=1) for x in (self._keys, self._values))

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._keys is not None and self._values is not None, "read before append"
        return self._keys[:, : self._length], self._values[:, : self._length]

    def take(self, index: torch.Tensor) -> Segments:
        out = DenseSegments()
        if self._keys is not None and self._values is not None:
            out.append(self._keys[index, : self._length], self._values[index, : self._length])
        return out

    def trim(self) -> None:
        if self._keys is not None and self._keys.shape[1] > self._length:
            self._resize(self._length)

    @property
    def length(self) -> int:
        return self._length

    def tensors(self) -> list[torch.Tensor]:
        return [x for x in (self._keys, self._values) if x is not None]

    @property
    def logical_bytes(self) -> int:
        return sum(x[:, : self._length].numel() * x.element_size() for x in self.tensors())


@dataclass(frozen=True)
class Ragged(Storage):
    """Uncompressed storage, head by head; it has no options."""

    @property
    def is_exact(self) -> bool:
        return True

    def new_layers(self, num_layers: int) -> Sequence[SegmentedLayer]:
        return [SegmentedLayer(DenseSegments) for _ in range(num_layers)]

    def bytes_formula(self, tokens: Sequence[int], heads: int, shape: KVShape, new_tokens: int = 0) -> int:
        """sum over layers of 2 x heads x tokens (of the mean head) x head_dim x element_bytes."""
        return 2 * heads * shape.head_dim * shape.element_bytes * sum(tokens)
