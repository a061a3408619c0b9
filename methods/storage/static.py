"""Storage of fixed shape: what a decode step needs so that it can be captured once and replayed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from ..cache.logits import LogitRule
from ..cache.products import cached_attention
from .packed import has_kernels


@dataclass
class LengthGroup:
    """Rows of one length, which the host counts: it knows without asking the device when a block of them is full.

    Attributes:
        rows: [n] int64, their numbers, or a slice that is all of them.
        length: tokens of each.
    """

    rows: torch.Tensor | slice
    length: int


ALL_ROWS = slice(None)


class StaticSegments(ABC):
    """All segments of a layer in tensors of fixed shape, each with a length of its own on the device.

    Attributes:
        shape: B rows and H heads; N = B * H segments.
        length: [N] int64, tokens of each segment.
    """

    shape: tuple[int, int]
    length: torch.Tensor

    @abstractmethod
    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Add one token to every segment: [N, D]."""

    @abstractmethod
    def attend(self, query: torch.Tensor, rule: LogitRule) -> torch.Tensor:
        """Attention of one token a row: [B, H_q, 1, D] -> the same shape."""

    @abstractmethod
    def read(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(keys, values) [N, S, D] in the compute dtype, and which slots hold a token [N, S]; the others end a row."""

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
        """Every tensor that must stay in memory."""

    @property
    @abstractmethod
    def logical_bytes(self) -> int:
        """Bytes of the tokens alone; asks the device."""


def static_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    valid: torch.Tensor,
    end: torch.Tensor,
    rule: LogitRule,
) -> torch.Tensor:
    """Attention of one token a row over buffers of fixed size.

    Args:
        query: [B, H_q, 1, D].
        keys: [B, H, capacity, D], contiguous.
        values: [B, H, capacity, D_v], contiguous.
        valid: [B, 1 or H, capacity] bool, slots that hold a token.
        end: [1] int64 on the device; no slot from there on holds a token.
        rule: how logits are formed.

    Returns:
        [B, H_q, 1, D_v].
    """
    same_widths = keys.shape[3] == values.shape[3]
    if not (rule.is_plain and same_widths and query.is_cuda and has_kernels()):
        return cached_attention(query, keys, values, rule, valid)
    from .kernels import attention_of_one_token

    return attention_of_one_token(query, keys, values, valid, end, rule.scaling)
