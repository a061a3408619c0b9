"""The tokens that new tokens attend to under StreamingLLM: the first tokens of a row and a band of recent ones.

Legend: B rows, n new tokens, S slots of which the last n hold them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Band:
    """Positions of tokens, and which of them each new token attends to.

    Attributes:
        positions: [1 or B, S] int64, non-decreasing over the slots that hold a token.
        query_positions: [B, n] int64.
        valid: [B, S] bool, True where a slot holds a token; None: everywhere.
        is_sink: [B, S] bool, True for the first tokens of each row, which all tokens after them attend to.
        sinks: Largest number of sinks of a row.
        recent: [B, 1] int64, largest distance to another token; None: any.
    """

    positions: torch.Tensor
    query_positions: torch.Tensor
    valid: torch.Tensor | None
    is_sink: torch.Tensor
    sinks: int
    recent: torch.Tensor | None

    def visible(self) -> torch.Tensor:
        """Return the mask [B, n, S], True where a new token attends to a slot."""
        distance = self.query_positions[:, :, None] - self.positions[:, None, :]  # [B, n, S]
        visible = distance >= 0
        if self.recent is not None:
            visible = visible & (self.is_sink[:, None, :] | (distance <= self.recent[:, :, None]))
        return visible if self.valid is None else visible & self.valid[:, None]


def ranks(valid: torch.Tensor | None, slots: int, device: torch.device) -> torch.Tensor:
    """Return the index of each stored token among those of its row: [1 or B, S]; ``valid`` [B, 1, S]."""
    if valid is None:
        return torch.arange(slots, device=device)[None]
    return valid[:, 0].long().cumsum(1) - 1
