"""Storage of fixed shape for decode steps that are captured once and replayed.

Legend: N segments (heads of all rows), B rows, H stored heads, H_q query heads, S slots, D or D_v channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from ..cache.logits import LogitRule


@dataclass(frozen=True)
class NextSlot:
    """Where a static layer stores its next token, for a kernel that writes it there.

    Attributes:
        keys, values: [B, H, S, D] and [B, H, S, D_v].
        valid: [B, 1 or H, S] bool, to be set.
        slot: [1] int64, on the device.
    """

    keys: torch.Tensor
    values: torch.Tensor
    valid: torch.Tensor
    slot: torch.Tensor


@dataclass
class LengthGroup:
    """Rows of one length, counted on the host to find full blocks without a device sync.

    Attributes:
        rows: Row indices [n] int64, or a slice of all rows.
        length: Tokens of each row.
    """

    rows: torch.Tensor | slice
    length: int


ALL_ROWS = slice(None)


class StaticSegments(ABC):
    """All segments of a layer in tensors of fixed shape, with their lengths on the device.

    Attributes:
        shape: B rows and H heads; N = B * H segments.
        length: [N] int64, tokens of each segment.
        end: [N] int64, one past the last slot of each segment that may hold a token; only if tokens can be dropped.
    """

    shape: tuple[int, int]
    length: torch.Tensor
    end: torch.Tensor

    @abstractmethod
    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Append one token [N, D] to every segment."""

    @abstractmethod
    def attend(self, query: torch.Tensor, rule: LogitRule) -> torch.Tensor:
        """Attend with one token per row: [B, H_q, 1, D] -> the same shape."""

    @abstractmethod
    def read(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return keys and values [N, S, D] in the compute dtype and the mask of used slots [N, S], padded right."""

    @property
    def slots(self) -> int:
        """S, the number of slots that :meth:`read` returns."""
        return self.read()[0].shape[1]

    @property
    def valid(self) -> torch.Tensor:
        """The mask of :meth:`read`, without its keys and values."""
        return self.read()[2]

    def drop(self, keep: torch.Tensor) -> None:
        """Evict the tokens that are False in ``keep`` [N, S]; only if the segments ``supports_static_drop``."""
        raise NotImplementedError

    def compact(self) -> torch.Tensor:
        """Compact every segment in place; returns the previous slots [N, S], see :meth:`.base.LayerStorage.drop`."""
        raise NotImplementedError

    def flush(self) -> None:
        """See :meth:`.base.LayerStorage.flush`."""
        return

    def between_steps(self) -> None:
        """See :meth:`.base.LayerStorage.between_steps`."""
        return

    def end_steps(self) -> None:
        """See :meth:`.base.LayerStorage.end_steps`."""
        return

    @abstractmethod
    def static_state(self) -> list[torch.Tensor]:
        """See :meth:`.base.LayerStorage.static_state`."""

    @abstractmethod
    def tensors(self) -> list[torch.Tensor]:
        """Return every tensor that stays in memory."""

    @property
    @abstractmethod
    def logical_bytes(self) -> int:
        """Bytes of the tokens without unused slots; syncs with the device."""
