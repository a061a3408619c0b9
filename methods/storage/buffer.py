"""Tensors that grow along one dimension, in place while there is room."""

from __future__ import annotations

import torch

GROWTH = 128
"""Slots added at a time when a layer grows, so that a step writes in place instead of copying the whole layer."""

FREE_SLOTS = 8
"""Slots behind recent tokens, which leave again, so that they move once in so many steps."""


class Growing:
    """What holds tokens in buffers.

    Attributes:
        expected: tokens known to come beside those held, counted down as they come.
        growth: slots to add where nothing is known of that.
    """

    expected: int = 0
    growth: int = GROWTH

    def capacity(self, length: int, n: int) -> int:
        """Slots of a buffer that is full when the last ``n`` of ``length`` tokens come."""
        return length + self.expected if self.expected else max(length, length - n + self.growth)

    def free_slots(self, at_rest: bool = False) -> int:
        """Slots to have behind recent tokens; ``at_rest``: none, where nothing is known of tokens to come."""
        return min(FREE_SLOTS, self.expected) if self.expected or at_rest else FREE_SLOTS

    def count_down(self, n: int) -> None:
        """``n`` tokens come now."""
        self.expected = max(0, self.expected - n)


def grown(x: torch.Tensor, used: int, capacity: int, dim: int = 2) -> torch.Tensor:
    """A buffer of ``capacity`` slots in dimension ``dim`` that begins with the ``used`` slots of ``x``."""
    out = x.new_empty(*x.shape[:dim], capacity, *x.shape[dim + 1 :])
    out.narrow(dim, 0, used).copy_(x.narrow(dim, 0, used))
    return out


class Buffer:
    """A tensor of which ``length`` slots of dimension ``dim`` are in use; they come at its end and leave at its front.

    Args:
        x: what it begins with; copied.
        dim: the dimension that grows.
        capacity: slots to make room for, those of ``x`` included.
    """

    def __init__(self, x: torch.Tensor, dim: int, capacity: int = 0):
        self.dim, self._begin, self.length = dim, 0, x.shape[dim]
        self.whole = grown(x, self.length, max(capacity, self.length), dim)

    @property
    def used(self) -> torch.Tensor:
        """The slots in use, as a view."""
        return self.whole.narrow(self.dim, self._begin, self.length)

    def append(self, x: torch.Tensor, capacity: int) -> None:
        """Add further slots; where there is no room for them, make it a buffer of ``capacity`` slots or more."""
        n = x.shape[self.dim]
        if self._begin + self.length + n > self.whole.shape[self.dim]:
            self._move(max(self.length + n, capacity))
        self.whole.narrow(self.dim, self._begin + self.length, n).copy_(x)
        self.length += n

    def drop(self, n: int, most: int) -> None:
        """Let the first ``n`` slots go, and their memory too where more than ``most`` would be empty."""
        self._begin, self.length = self._begin + n, self.length - n
        if self.whole.shape[self.dim] - self.length > most:
            self._move(self.length + most)

    def fill(self) -> None:
        """Take all slots into use; those that hold nothing are zero."""
        free = self.whole.narrow(self.dim, self._begin + self.length, self.whole.shape[self.dim] - self.length)
        free.zero_()
        self.length = self.whole.shape[self.dim]

    def put(self, x: torch.Tensor, rows: torch.Tensor | slice, start: int) -> None:
        """Write ``x`` over slots that are in use, from ``start`` on, of some rows (dimension 0)."""
        begin = self._begin + start
        slots = (slice(None),) * (self.dim - 1) + (slice(begin, begin + x.shape[self.dim]),)
        self.whole[(rows, *slots)] = x

    def shrink_to_fit(self) -> None:
        """Give back what is not in use."""
        if self.length < self.whole.shape[self.dim]:
            self._move(self.length)

    def _move(self, slots: int) -> None:
        self.whole, self._begin = grown(self.used, self.length, slots, self.dim), 0

    @property
    def slack(self) -> int:
        """Bytes that hold nothing: not yet, or no more."""
        return self.whole.nbytes - self.used.nbytes
