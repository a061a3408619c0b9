"""What a pair of layers holds of merged tokens: shared directions, two magnitudes, and the tokens retained unmerged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from ...cache.products import exact_products
from ..buffer import Buffer

RETAINED_GROWTH = 32
"""Places for retained tokens made at a time in a generation; the host asks how many are taken as rarely."""


class Directions:
    """Shared directions of merged tokens, as they are: [B, H, tokens, D]; ``capacity``: tokens to make room for.

    Attributes:
        takes_tokens_at: whether :meth:`put_at` can be called.
    """

    takes_tokens_at: ClassVar[bool] = True

    def __init__(self, x: torch.Tensor, capacity: int = 0):
        self._x = Buffer(x, 2, capacity)

    def append(self, x: torch.Tensor, capacity: int) -> None:
        """Directions [B, H, n, D] of further tokens; where there is no room, make it for ``capacity`` in all."""
        self._x.append(x, capacity)

    def fill(self) -> None:
        """Take the whole room into use, for :meth:`put` and :meth:`put_at`; zeros where there is no direction yet."""
        self._x.fill()

    def put(self, x: torch.Tensor, rows: torch.Tensor | slice, start: int) -> None:
        """Write directions [n, H, m, D] of some rows over those from ``start`` on."""
        self._x.put(x, rows, start)

    def put_at(self, x: torch.Tensor, slots: torch.Tensor) -> None:
        """Write one direction [B, H, 1, D] of each row, to its slot [B] int64."""
        self._x.used.scatter_(2, slots[:, None, None, None].expand_as(x), x)

    def put_all(self, other: Directions, rows: torch.Tensor | slice) -> None:
        """Write all that another one holds over the first ones of some rows."""
        self._x.put(other._x.used, rows, 0)

    def multiply_into(self, magnitudes: torch.Tensor, out: torch.Tensor) -> None:
        """Vectors of these ``magnitudes`` [B, H, tokens] into ``out`` [B, H, tokens, D]."""
        torch.mul(self._x.used, magnitudes[..., None], out=out)

    def scores(self, query: torch.Tensor) -> torch.Tensor:
        """Products [B, H, G, tokens], float32 or wider, of queries [B, H, G, D] with the directions."""
        return exact_products(query, self._x.used)

    def weighted(self, weights: torch.Tensor) -> torch.Tensor:
        """Sums [B, H, G, D] of the directions with weights [B, H, G, tokens]."""
        return torch.matmul(weights, self._x.used)

    def take(self, index: torch.Tensor) -> Directions:
        """Those of some rows."""
        return Directions(self._x.used[index])

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor that must stay in memory."""
        return [self._x.whole]

    @property
    def slack(self) -> int:
        """Bytes that hold nothing yet."""
        return self._x.slack


@dataclass
class Merged:
    """The keys (or the values) of a pair of layers.

    Attributes:
        directions: shared by both layers.
        magnitudes: [2, B, H, tokens], of the lower and the upper layer.
        retained: [B, H, R] int32, slots of unmerged tokens; -1 where a row or head has fewer than R.
        unmerged: [2, B, H, R, D], those tokens of both layers.
        threshold: [B, H] angle that decides for later tokens; None: none of them is retained for its angle.
        spare: so many of R are surely free in every row and head, beside the last one.
    """

    directions: Directions
    magnitudes: Buffer
    retained: torch.Tensor
    unmerged: torch.Tensor
    threshold: torch.Tensor | None
    spare: int = 0

    def retain(self, retain: torch.Tensor, start: int, both: torch.Tensor) -> None:
        """Hold further tokens unmerged: those True in ``retain`` [B, H, n], of the slots from ``start`` on.

        Single-token path avoids a device sync: always scatter, writing to a dummy slot if the token is not retained.

        Args:
            retain: which.
            start: slot of the first one.
            both: [2, B, H, n, D], the tokens of both layers.
        """
        n = retain.shape[2]
        highest = 1 if n == 1 else int(retain.sum(-1).max())
        if not highest:
            return
        if self.spare < highest:
            used = self.used
            if self.retained.shape[2] - used - 1 < highest:
                room = (RETAINED_GROWTH if n == 1 else highest) + 1
                self.retained = F.pad(self.retained[..., :used], (0, room), value=-1)
                self.unmerged = F.pad(self.unmerged[..., :used, :], (0, 0, 0, room))
            self.spare = self.retained.shape[2] - used - 1
        self.spare -= highest
        slots = torch.arange(start, start + n, dtype=torch.int32, device=retain.device)
        place_retained(self.retained, self.unmerged, retain, slots, both)

    @property
    def used(self) -> int:
        """Places of ``retained`` up to the last one that any row or head uses; asks the device."""
        return int((self.retained >= 0).sum(-1).max())

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor that must stay in memory."""
        thresholds = [] if self.threshold is None else [self.threshold]
        return [*self.directions.tensors(), self.magnitudes.whole, self.retained, self.unmerged, *thresholds]

    def take(self, index: torch.Tensor) -> Merged:
        """That of some rows."""
        threshold = None if self.threshold is None else self.threshold[index]
        magnitudes, unmerged = Buffer(self.magnitudes.used[:, index], dim=3), self.unmerged[:, index]
        return Merged(self.directions.take(index), magnitudes, self.retained[index], unmerged, threshold, self.spare)


def place_retained(
    retained: torch.Tensor, unmerged: torch.Tensor, retain: torch.Tensor, slots: torch.Tensor, both: torch.Tensor
) -> None:
    """Write tokens to the next free places of each row and head; the last place takes the others, as nothing.

    Args:
        retained: [B, H, R] int32, as of :class:`Merged`.
        unmerged: [2, B, H, R, D].
        retain: bool [B, H, n], the tokens to write.
        slots: int32, broadcastable to [B, H, n]: where they stand among all tokens.
        both: [2, B, H, n, D], the tokens of both layers.
    """
    nothing = retained.shape[2] - 1
    at = (retained >= 0).sum(-1, keepdim=True) + retain.cumsum(-1) - 1
    at = torch.where(retain, at, nothing).clamp_(max=nothing)  # [B, H, n]
    is_written = at < nothing
    retained.scatter_(2, at, torch.where(is_written, slots, -1))
    unmerged.scatter_(3, at[None, ..., None].expand_as(both), both.masked_fill(~is_written[..., None], 0))


def first_slots(retain: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots that are True [B, H, n]: (int32 [B, H, R] with -1 for none, bool [B, H, R])."""
    width = int(retain.sum(-1).max())
    order = retain.int().sort(dim=-1, descending=True, stable=True).indices[..., :width]
    kept = retain.gather(-1, order)
    return torch.where(kept, order, -1).to(torch.int32), kept


def retained_slots(merged: Merged, end: int, query: torch.Tensor) -> torch.Tensor:
    """Slots of retained tokens [B, H, G, R] for the queries [B, H, G, D] of each head; ``end`` stands for none."""
    at = torch.where(merged.retained >= 0, merged.retained, end).long()
    return at[:, :, None].expand(-1, -1, query.shape[2], -1)
