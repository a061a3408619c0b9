"""Ranks of a prompt's tokens, by which a held budget evicts while decoding; see :mod:`.schedules.hold`.

Legend: B batch rows, R rows of one prompt length, H stored heads, N candidates, T prompt tokens, S slots.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..storage.base import LayerStorage
from .eviction_state import EvictionState
from .ranking import sort_keys


def prompt_ranks(scores: torch.Tensor, ties: torch.Tensor | None, sinks: int, recent: int) -> torch.Tensor:
    """Return the ranks of all tokens of a prompt, the lowest to be evicted first: float32 [R, H, T].

    Args:
        scores, ties: [R, H, N], see :func:`.ranking.keep_slots`.
        sinks: Number of tokens before the candidates; they are never evicted, whatever their rank.
        recent: Number of tokens after the candidates, which rank above them, the last one highest.
    """
    n = scores.shape[2]
    order = sort_keys(scores, ties).sort(dim=-1, descending=True, stable=True).indices  # of equal ones the lower first
    descending = torch.arange(n - 1, -1, -1, device=scores.device, dtype=torch.float32)
    rank = torch.empty(order.shape, device=scores.device).scatter(-1, order, descending.expand(order.shape))
    of_recent = torch.arange(n, n + recent, device=scores.device, dtype=torch.float32)
    return torch.cat([F.pad(rank, (sinks, 0)), of_recent.expand(*rank.shape[:2], -1)], dim=-1)


def with_newest(state: EvictionState, storage: LayerStorage) -> torch.Tensor:
    """Return the ranks [B, H, S] after a step of one token per row: the new one ranks above all others."""
    assert state.scores is not None
    stored = F.pad(state.scores, (0, storage.slots - state.scores.shape[2]))  # [B, H, S]
    slot = torch.arange(storage.slots, device=stored.device)
    end = storage.end
    last = end - 1 if isinstance(end, int) else end[:, : stored.shape[1], None] - 1  # of all heads if they rank alike
    return torch.where(slot == last, stored.amax(-1, keepdim=True) + 1, stored)
