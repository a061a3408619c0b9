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

SMALLEST = torch.finfo(torch.float32).tiny
"""Numbers below it (a softmax of far lower logits) are zero on some devices, and so they are here."""
MAGNITUDE_BITS = 2**31 - 1
"""All bits of a float32 number but its sign."""


def keep_slots(scores: torch.Tensor, count: int, ties: torch.Tensor | None = None) -> torch.Tensor:
    """Indices of the ``count`` first tokens of the ranking.

    Args:
        scores: [..., N]; the largest stay. Infinite scores are allowed, NaN ranks as the largest.
        count: tokens to keep, 0 <= count <= N.
        ties: [..., N]; of equal scores the one with the largest entry here stays; None: the one with the lower index.

    Returns:
        [..., count] int64, increasing.
    """
    index = torch.arange(scores.shape[-1], device=scores.device)
    if ties is None:  # the index fits beside one score, so no two keys are equal
        keys = _ordered_bits(scores).long().bitwise_left_shift_(32).sub_(index)
        return keys.topk(count, dim=-1, sorted=False).indices.sort(dim=-1).values
    kept = keep_mask(scores, count, ties)
    # Write each kept token's index to its place from 1 on, and all others' to place 0, which is cut off.
    place = kept.cumsum(-1, dtype=torch.int32).mul_(kept).long()  # [..., N]
    return place.new_empty(*place.shape[:-1], count + 1).scatter_(-1, place, index.expand_as(place))[..., 1:]


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
    scores = _flushed(scores)
    lowest = scores == scores.amin(-1, keepdim=True)
    return torch.where(lowest, index, 0).amax(-1, keepdim=True)


def _keys(scores: torch.Tensor, ties: torch.Tensor | None) -> torch.Tensor:
    """Integers in the order of the scores, and of ``ties`` where those are equal: int32, with ``ties`` int64."""
    keys = _ordered_bits(scores)
    return keys if ties is None else keys.long().bitwise_left_shift_(32).add_(_ordered_bits(ties))


def _ordered_bits(x: torch.Tensor) -> torch.Tensor:
    """Int32 numbers in the order of float32 ones: their bits, with a larger magnitude lower where they are negative."""
    bits = _flushed(x).view(torch.int32)
    return bits.bitwise_xor_((bits >> 31).bitwise_and_(MAGNITUDE_BITS))


def _flushed(x: torch.Tensor) -> torch.Tensor:
    """A float32 copy with 0.0 in place of -0.0 and of what a device may flush to zero."""
    x = x.float()
    return torch.where(x.abs() < SMALLEST, 0.0, x)
