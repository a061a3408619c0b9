"""Interface of a cache layer for decode steps over tensors of fixed shape."""

from __future__ import annotations

import torch

from ..storage.static import NextSlot


class StaticSteps:
    """What :class:`.cache.KVCache` calls on its layers for static steps; by default a state of fixed size.

    Attributes:
        seen: Columns seen so far, pads included.
        static_problem: Why further decode steps cannot run over tensors of fixed shape; None: they can.
    """

    seen = 0

    @property
    def logical_bytes(self) -> int:
        """Bytes of the contents, without padding and unused slots; 0 where another object counts them."""
        return 0

    @property
    def step_bytes_read(self) -> int:
        """Bytes that the last decode step read, if one layer of the model attended over this layer."""
        return self.logical_bytes

    @property
    def static_problem(self) -> str | None:
        """See the class."""
        return None

    @property
    def next_slot(self) -> NextSlot | None:
        """Where the next token is stored once static, for a kernel that writes it there; None: ``attend`` stores it."""
        return None

    def make_static(self, steps: int) -> None:
        """See :meth:`..storage.base.LayerStorage.make_static`."""

    def static_state(self) -> list[torch.Tensor]:
        """See :meth:`..storage.base.LayerStorage.static_state`."""
        return []

    def between_steps(self) -> None:
        """See :meth:`..storage.base.LayerStorage.between_steps`."""

    def end_steps(self) -> None:
        """See :meth:`..storage.base.LayerStorage.end_steps`."""

    def skip(self, steps: int) -> None:
        """Advance the sequence length by ``steps`` that were replayed as a graph."""
        self.seen += steps
