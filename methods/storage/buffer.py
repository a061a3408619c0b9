"""Tensors that grow along one dimension, in place while there are free slots."""

from __future__ import annotations

import torch

GROWTH = 128
"""Slots added when a buffer is full, so that most steps write in place instead of copying the whole layer."""

FREE_SLOTS = 8
"""Free slots after the recent tokens, which are converted later, so that they are moved only once in 8 steps."""


class Growing:
    """Base class of objects that store tokens in buffers.

    Attributes:
        reserved: Remaining number of tokens announced by :meth:`.cache.KVCache.reserve`.
        growth: Slots to add if no tokens are announced.
    """

    reserved: int = 0
    growth: int = GROWTH

    def capacity(self, length: int, n: int) -> int:
        """Return the new capacity of a buffer that must grow to ``length`` tokens, of which ``n`` are new."""
        return length + self.reserved if self.reserved else max(length, length - n + self.growth)

    def free_slots(self, only_reserved: bool = False) -> int:
        """Return the number of free slots to keep after recent tokens; ``only_reserved``: 0 if none are announced."""
        return min(FREE_SLOTS, self.reserved) if self.reserved or only_reserved else FREE_SLOTS

    def count_down(self, n: int) -> None:
        """Subtract ``n`` appended tokens from ``reserved``."""
        self.reserved = max(0, self.reserved - n)


def grown(x: torch.Tensor, used: int, capacity: int, dim: int = 2) -> torch.Tensor:
    """Return a copy of the first ``used`` slots of ``x`` in a buffer of ``capacity`` slots in dimension ``dim``."""
    out = x.new_empty(*x.shape[:dim], capacity, *x.shape[dim + 1 :])
    out.narrow(dim, 0, used).copy_(x.narrow(dim, 0, used))
    return out


def take_slots(x: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Return the entries of ``x`` [..., S, D] at ``slots`` [..., C], whose leading sizes may be 1: [..., C, D].

    Rows of D numbers are copied whole; ``gather`` would read an index for each number.
    """
    leading, width = x.dim() - 2, x.shape[-1]
    strides = x.stride()[:-1]
    if x.numel() == 0 or x.stride(-1) != 1 or any(stride == 0 or stride % width for stride in strides):
        index = [torch.arange(n, device=x.device).view(-1, *[1] * (leading - d)) for d, n in enumerate(x.shape[:-2])]
        return x[(*index, slots)]
    # The memory of x is a list of rows, whatever the order of its dimensions.
    steps = [stride // width for stride in strides]  # rows from one index of a dimension to the next
    rows = slots if steps[-1] == 1 else slots * steps[-1]
    for d, (n, step) in enumerate(zip(x.shape[:-2], steps, strict=False)):
        if n > 1:
            rows = rows + torch.arange(0, n * step, step, device=x.device).view(-1, *[1] * (leading - d))
    last_row = sum((n - 1) * step for n, step in zip(x.shape[:-1], steps, strict=True))
    picked = x.as_strided((last_row + 1, width), (width, 1)).index_select(0, rows.flatten())
    return picked.view(*rows.shape, width)


class Buffer:
    """Queue of slots along one dimension of a tensor: appended at the end, dropped at the front.

    Args:
        x: Initial contents; copied.
        dim: Dimension of the slots.
        capacity: Slots to allocate, those of ``x`` included.
    """

    def __init__(self, x: torch.Tensor, dim: int, capacity: int = 0):
        self.dim, self._begin, self.length = dim, 0, x.shape[dim]
        self.whole = grown(x, self.length, max(capacity, self.length), dim)

    @property
    def used(self) -> torch.Tensor:
        """View of the slots in use."""
        return self.whole.narrow(self.dim, self._begin, self.length)

    def append(self, x: torch.Tensor, capacity: int) -> None:
        """Append slots; a full buffer is reallocated with at least ``capacity`` slots."""
        n = x.shape[self.dim]
        if self._begin + self.length + n > self.whole.shape[self.dim]:
            self._move(max(self.length + n, capacity))
        self.whole.narrow(self.dim, self._begin + self.length, n).copy_(x)
        self.length += n

    def drop(self, n: int, max_free: int) -> None:
        """Drop the first ``n`` slots, and reallocate if more than ``max_free`` slots are unused."""
        self._begin, self.length = self._begin + n, self.length - n
        if self.whole.shape[self.dim] - self.length > max_free:
            self._move(self.length + max_free)

    def fill(self) -> None:
        """Take all slots into use, with zeros in the new ones."""
        free = self.whole.narrow(self.dim, self._begin + self.length, self.whole.shape[self.dim] - self.length)
        free.zero_()
        self.length = self.whole.shape[self.dim]

    def put(self, x: torch.Tensor, rows: torch.Tensor | slice, start: int) -> None:
        """Overwrite the slots of some rows (dimension 0) from ``start``."""
        begin = self._begin + start
        slots = (slice(None),) * (self.dim - 1) + (slice(begin, begin + x.shape[self.dim]),)
        self.whole[(rows, *slots)] = x

    def shrink_to_fit(self) -> None:
        """Free the unused slots."""
        if self.length < self.whole.shape[self.dim]:
            self._move(self.length)

    def _move(self, slots: int) -> None:
        self.whole, self._begin = grown(self.used, self.length, slots, self.dim), 0

    @property
    def slack(self) -> int:
        """Bytes of unused slots."""
        return self.whole.nbytes - self.used.nbytes
