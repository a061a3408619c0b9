"""Tensors that grow along one dimension, in place while there is room."""

from __future__ import annotations

import torch


def grown(x: torch.Tensor, used: int, capacity: int, dim: int = 2) -> torch.Tensor:
    """A buffer of ``capacity`` slots in dimension ``dim`` that begins with the ``used`` slots of ``x``."""
    out = x.new_empty(*x.shape[:dim], capacity, *x.shape[dim + 1 :])
    out.narrow(dim, 0, used).copy_(x.narrow(dim, 0, used))
    return out


class Buffer:
    """A tensor of which the first ``length`` slots of dimension ``dim`` are in use.

    Args:
        x: what it begins with; it is written to, so it must be nobody else's.
        dim: the dimension that grows.
    """

    def __init__(self, x: torch.Tensor, dim: int):
        self.whole, self.dim, self.length = x, dim, x.shape[dim]

    @property
    def used(self) -> torch.Tensor:
        """The slots in use, as a view."""
        return self.whole.narrow(self.dim, 0, self.length)

    def append(self, x: torch.Tensor, growth: int) -> None:
        """Add further slots; where there is no room for them, make room for ``growth`` of them or more."""
        n = x.shape[self.dim]
        if self.length + n > self.whole.shape[self.dim]:
            self.whole = grown(self.whole, self.length, self.length + max(n, growth), self.dim)
        self.whole.narrow(self.dim, self.length, n).copy_(x)
        self.length += n

    def trim(self) -> None:
        """Give back what is not in use."""
        if self.length < self.whole.shape[self.dim]:
            self.whole = grown(self.whole, self.length, self.length, self.dim)

    @property
    def room(self) -> int:
        """Bytes that hold nothing yet."""
        return self.whole.nbytes - self.used.nbytes
