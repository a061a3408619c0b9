"""Merged tokens of a pair of layers: shared directions, two magnitudes, and tokens retained unmerged.

Legend: B batch rows, H KV heads, G query heads per KV head, n new tokens, R capacity for retained tokens, D channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from ...cache.products import query_key_products
from ..buffer import Buffer

RETAINED_GROWTH = 32
"""Slots for retained tokens added at a time while decoding, and the interval of device syncs to count them."""


class Directions:
    """Shared directions of merged tokens, uncompressed [B, H, tokens, D], with ``capacity`` tokens allocated."""

    takes_tokens_at: ClassVar[bool] = True
    """Whether :meth:`put_at` is implemented."""

    def __init__(self, x: torch.Tensor, capacity: int = 0):
        self._x = Buffer(x, 2, capacity)

    def append(self, x: torch.Tensor, capacity: int) -> None:
        """Append directions [B, H, n, D]; a full buffer is reallocated for ``capacity`` tokens."""
        self._x.append(x, capacity)

    def fill(self) -> None:
        """Take all slots into use for :meth:`put` and :meth:`put_at`, with zeros in the new ones."""
        self._x.fill()

    def put(self, x: torch.Tensor, rows: torch.Tensor | slice, start: int) -> None:
        """Overwrite directions of some rows from slot ``start`` with x [rows, H, tokens, D]."""
        self._x.put(x, rows, start)

    def put_at(self, x: torch.Tensor, slots: torch.Tensor) -> None:
        """Write one direction [B, H, 1, D] per row to its slot [B] int64."""
        self._x.used.scatter_(2, slots[:, None, None, None].expand_as(x), x)

    def put_all(self, other: Directions, rows: torch.Tensor | slice) -> None:
        """Copy all directions of ``other`` to the first slots of some rows."""
        self._x.put(other._x.used, rows, 0)

    def multiply_into(self, magnitudes: torch.Tensor, out: torch.Tensor) -> None:
        """Restore vectors with ``magnitudes`` [B, H, tokens] into ``out`` [B, H, tokens, D]."""
        torch.mul(self._x.used, magnitudes[..., None], out=out)

    def scores(self, query: torch.Tensor) -> torch.Tensor:
        """Multiply queries [B, H, G, D] with the directions: [B, H, G, tokens], float32 or wider."""
        return query_key_products(query, self._x.used)

    def weighted(self, weights: torch.Tensor) -> torch.Tensor:
        """Sum the directions with weights [B, H, G, tokens]: [B, H, G, D]."""
        return torch.matmul(weights, self._x.used)

    def kernel_problem(self, block: int) -> str | None:
        """Return why no kernel reads these directions, merged ``block`` tokens at a time; None: one does."""
        return None

    def kernel(self, block: int) -> Callable[..., torch.Tensor]:
        """Return the kernel that reads these directions, merged ``block`` tokens at a time."""
        from ..kernels.merged import merged_attention

        return merged_attention

    def first(self, length: int) -> Any:
        """Return the first ``length`` directions as the kernel reads them."""
        return self._x.whole[:, :, :length]

    def take(self, index: torch.Tensor) -> Directions:
        """Return a copy of some rows."""
        return Directions(self._x.used[index])

    def tensors(self) -> list[torch.Tensor]:
        """Return every tensor that stays in memory."""
        return [self._x.whole]

    @property
    def slack(self) -> int:
        """Bytes of unused slots."""
        return self._x.slack


@dataclass
class Merged:
    """Merged keys (or values) of a pair of layers.

    Attributes:
        directions: Directions shared by both layers.
        magnitudes: [2, B, H, tokens], of the lower and the upper layer.
        retained: [B, H, R] int32, slots of retained tokens, -1 for unused entries; the last entry is a dummy slot.
        unmerged: [2, B, H, R, D], retained tokens of both layers.
        threshold: [B, H], angle beyond which later tokens are retained; None: no threshold.
        free_slots: Lower bound on the unused entries of ``retained`` in every row and head, without the dummy slot.
    """

    directions: Directions
    magnitudes: Buffer
    retained: torch.Tensor
    unmerged: torch.Tensor
    threshold: torch.Tensor | None
    free_slots: int = 0

    def retain(self, retain: torch.Tensor, start: int, both: torch.Tensor) -> None:
        """Store new tokens unmerged.

        Single-token path avoids a device sync: always scatter, writing to a dummy slot if the token is not retained.

        Args:
            retain: [B, H, n] bool, the new tokens to retain.
            start: Slot of the first new token.
            both: [2, B, H, n, D], the new tokens of both layers.
        """
        n = retain.shape[2]
        max_count = 1 if n == 1 else int(retain.sum(-1).max())
        if not max_count:
            return
        if self.free_slots < max_count:
            used = self.used
            if self.retained.shape[2] - used - 1 < max_count:
                extra = (RETAINED_GROWTH if n == 1 else max_count) + 1
                self.retained = F.pad(self.retained[..., :used], (0, extra), value=-1)
                self.unmerged = F.pad(self.unmerged[..., :used, :], (0, 0, 0, extra))
            self.free_slots = self.retained.shape[2] - used - 1
        self.free_slots -= max_count
        slots = torch.arange(start, start + n, dtype=torch.int32, device=retain.device)
        place_retained(self.retained, self.unmerged, retain, slots, both)

    @property
    def used(self) -> int:
        """Maximum number of retained tokens of any row and head; syncs with the device."""
        return int((self.retained >= 0).sum(-1).max())

    def tensors(self) -> list[torch.Tensor]:
        """Return every tensor that stays in memory."""
        thresholds = [] if self.threshold is None else [self.threshold]
        return [*self.directions.tensors(), self.magnitudes.whole, self.retained, self.unmerged, *thresholds]

    def take(self, index: torch.Tensor) -> Merged:
        """Return a copy of some rows."""
        threshold = None if self.threshold is None else self.threshold[index]
        magnitudes, unmerged = Buffer(self.magnitudes.used[:, index], dim=3), self.unmerged[:, index]
        directions, retained = self.directions.take(index), self.retained[index]
        return Merged(directions, magnitudes, retained, unmerged, threshold, self.free_slots)


def place_retained(
    retained: torch.Tensor, unmerged: torch.Tensor, retain: torch.Tensor, slots: torch.Tensor, both: torch.Tensor
) -> None:
    """Write tokens in place to the next free entries of each row and head, and all others to the dummy slot.

    Args:
        retained, unmerged: See :class:`Merged`.
        retain: bool [B, H, n], the tokens to write.
        slots: int32, broadcastable to [B, H, n], slots of the tokens.
        both: [2, B, H, n, D], the tokens of both layers.
    """
    dummy = retained.shape[2] - 1
    entry = (retained >= 0).sum(-1, keepdim=True) + retain.cumsum(-1) - 1
    entry = torch.where(retain, entry, dummy).clamp_(max=dummy)  # [B, H, n]
    is_written = entry < dummy
    retained.scatter_(2, entry, torch.where(is_written, slots, -1))
    unmerged.scatter_(3, entry[None, ..., None].expand_as(both), both.masked_fill(~is_written[..., None], 0))


def first_slots(retain: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Convert a mask [B, H, n] to slots, right-padded: (int32 [B, H, R] with -1 for padding, bool [B, H, R])."""
    width = int(retain.sum(-1).max())
    order = retain.int().sort(dim=-1, descending=True, stable=True).indices[..., :width]
    kept = retain.gather(-1, order)
    return torch.where(kept, order, -1).to(torch.int32), kept


def retained_slots(merged: Merged, dummy: int, query: torch.Tensor) -> torch.Tensor:
    """Return the slots of retained tokens for queries [B, H, G, D]: [B, H, G, R], ``dummy`` for unused entries."""
    slots = torch.where(merged.retained >= 0, merged.retained, dummy).long()
    return slots[:, :, None].expand(-1, -1, query.shape[2], -1)
