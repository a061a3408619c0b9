"""Which tokens stay: one ranking for every method, the same on every device and in every batch.

Tokens are ordered by their score, then by a second score where the method has one (a token's own score, before
pooling), then by the lower index. Max pooling gives a peak and its neighbours one score, so most budgets end inside
such a tie; ``topk``, ``argsort`` and ``argmin`` leave the choice among equal entries to the device.

    slots = keep_slots(scores, count)              # [..., count], increasing
    slots = keep_slots(scores, count, own_scores)

Scores are ranked in float32. Nothing here waits for the device.
"""

from __future__ import annotations

import torch

RULE = "score, unpooled score, index"
"""What decides, in this order. A part of a run's identity: runs under another rule kept other tokens."""

SIGN_BIT, MAGNITUDE_BITS = -(2**31), 2**31 - 1


def keep_slots(scores: torch.Tensor, count: int, ties: torch.Tensor | None = None) -> torch.Tensor:
    """Indices of the ``count`` first tokens of the ranking.

    Args:
        scores: [..., N]; the largest stay. Infinite scores are allowed, NaN ranks as the largest.
        count: tokens to keep, 0 <= count <= N.
        ties: [..., N]; of equal scores the one with the largest entry here stays; None: the one with the lower index.

    Returns:
        [..., count] int64, increasing.
    """
    kept = keep_mask(scores, count, ties)
    place = kept.cumsum(-1, dtype=torch.int32)  # [..., N]; 1 at the first kept token
    wanted = torch.arange(1, count + 1, dtype=torch.int32, device=scores.device)
    return torch.searchsorted(place, wanted.expand(*place.shape[:-1], count).contiguous())


def keep_mask(scores: torch.Tensor, count: int | torch.Tensor, ties: torch.Tensor | None = None) -> torch.Tensor:
    """The same as a mask: bool [..., N].

    Args:
        scores, ties: see :func:`keep_slots`.
        count: tokens to keep, or a whole number for each ranking: int64 [...].
    """
    if isinstance(count, int) and count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    keys = _keys(scores, ties)
    if isinstance(count, torch.Tensor):
        count = count[..., None]
        ranked = keys.sort(dim=-1, descending=True).values
        threshold = ranked.gather(-1, (count - 1).clamp(min=0))  # [..., 1], of the last token that stays
    else:
        threshold = keys.topk(count, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above, equal = keys > threshold, keys == threshold
    places_left = count - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= places_left))


def last_slot(scores: torch.Tensor) -> torch.Tensor:
    """Index of the last token of the ranking by ``scores`` [..., N] alone, which is the one to evict: [..., 1] int64.

    The lowest score, and of equal ones the higher index: :func:`keep_slots` of N - 1 tokens keeps the others.
    """
    index = torch.arange(scores.shape[-1], device=scores.device)
    lowest = scores == scores.amin(-1, keepdim=True)
    return torch.where(lowest, index, 0).amax(-1, keepdim=True)


def _keys(scores: torch.Tensor, ties: torch.Tensor | None) -> torch.Tensor:
    """Integers in the order of the scores, and of ``ties`` where those are equal: int32, with ``ties`` int64.

    Integers are what ``topk`` selects without a special case for NaN, and two float32 numbers fit into one int64.
    """
    high = _float_bits(scores)
    high = high.bitwise_xor_((high >> 31).bitwise_and_(MAGNITUDE_BITS))  # negative: the larger magnitude is lower
    if ties is None:
        return high
    low = _float_bits(ties)
    low = low.bitwise_xor_((low >> 31).bitwise_or_(SIGN_BIT))  # the same as an unsigned number
    return high.long().bitwise_left_shift_(32).bitwise_or_(low.long().bitwise_and_(2**32 - 1))


def _float_bits(x: torch.Tensor) -> torch.Tensor:
    """Bits of float32 numbers as int32, in memory of their own; those of -0.0 are those of 0.0."""
    return (x.float() + 0.0).view(torch.int32)
