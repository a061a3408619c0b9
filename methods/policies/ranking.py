"""Deterministic top-k over token scores: the kept tokens are the same on every device and in every batch.

Tokens are ranked by score, then by the tie-breaking score if the method has one (SnapKV's scores before pooling), then
by the lower index. Ties are common: max pooling gives a peak and its neighbours equal scores. ``topk``, ``argsort`` and
``argmin`` order equal entries differently on different devices.

    slots = keep_slots(scores, count)              # [..., count], increasing
    slots = keep_slots(scores, count, unpooled_scores)

Scores are ranked in float32. No function here syncs with the device.
"""

from __future__ import annotations

import torch

RULE = "score, unpooled score, index"
"""The ranking criteria in order. It is part of a run's identity, because another rule keeps other tokens."""

SMALLEST_NORMAL = torch.finfo(torch.float32).tiny
"""Some devices flush smaller numbers to zero, so they rank as zero."""
MAGNITUDE_BITS = 2**31 - 1
"""Mask of all bits of a float32 number except the sign."""


def keep_slots(scores: torch.Tensor, count: int, ties: torch.Tensor | None = None) -> torch.Tensor:
    """Return the indices of the ``count`` highest-ranked tokens.

    Args:
        scores: [..., N]; the largest are kept. Infinite scores are allowed; NaN ranks highest.
        count: Number of tokens to keep, 0 <= count <= N.
        ties: [..., N] tie-breaking scores, of which the larger is kept; None: the lower index is kept.

    Returns:
        [..., count] int64, increasing.
    """
    index = torch.arange(scores.shape[-1], device=scores.device)
    if ties is None:  # a 64-bit key has room for the score and the index, so no two keys are equal
        keys = _ordered_bits(scores).long().bitwise_left_shift_(32).sub_(index)
        return keys.topk(count, dim=-1, sorted=False).indices.sort(dim=-1).values
    kept = keep_mask(scores, count, ties)
    # Scatter the indices of kept tokens to places 1 .. count, and those of all others to place 0, which is cut off.
    place = kept.cumsum(-1, dtype=torch.int32).mul_(kept).long()  # [..., N]
    return place.new_empty(*place.shape[:-1], count + 1).scatter_(-1, place, index.expand_as(place))[..., 1:]


def keep_mask(scores: torch.Tensor, count: int | torch.Tensor, ties: torch.Tensor | None = None) -> torch.Tensor:
    """Return the mask of the highest-ranked tokens: bool [..., N].

    Args:
        scores, ties: See :func:`keep_slots`.
        count: Number of tokens to keep, or one number per ranking: int64 [...].
    """
    if isinstance(count, int) and count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    keys = _keys(scores, ties)
    if isinstance(count, torch.Tensor):
        count = count[..., None]
        ranked = keys.sort(dim=-1, descending=True).values
        threshold = ranked.gather(-1, (count - 1).clamp(min=0))  # [..., 1], key of the last kept token
    else:
        threshold = keys.topk(count, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above, equal = keys > threshold, keys == threshold  # [..., N]
    remaining = count - above.sum(-1, keepdim=True)  # [..., 1], number of equal tokens to keep
    return above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= remaining))


def lowest_ranked_slot(scores: torch.Tensor) -> torch.Tensor:
    """Return the index of the lowest-ranked token, [..., 1] int64, which :func:`keep_slots` of N - 1 tokens evicts.

    Args:
        scores: [..., N]. Of equal scores, the higher index ranks lower.
    """
    index = torch.arange(scores.shape[-1], device=scores.device)
    scores = _flushed(scores)
    lowest = scores == scores.amin(-1, keepdim=True)
    return torch.where(lowest, index, 0).amax(-1, keepdim=True)


def _keys(scores: torch.Tensor, ties: torch.Tensor | None) -> torch.Tensor:
    """Return integer keys that sort by score, then by ``ties``: int32, or int64 with ``ties``."""
    keys = _ordered_bits(scores)
    return keys if ties is None else keys.long().bitwise_left_shift_(32).add_(_ordered_bits(ties))


def _ordered_bits(x: torch.Tensor) -> torch.Tensor:
    """Map float32 to int32 so that the order is preserved: the bits, with the magnitude inverted for negatives."""
    bits = _flushed(x).view(torch.int32)
    return bits.bitwise_xor_((bits >> 31).bitwise_and_(MAGNITUDE_BITS))


def _flushed(x: torch.Tensor) -> torch.Tensor:
    """Return a float32 copy in which subnormal numbers and -0.0 are 0.0."""
    x = x.float()
    return torch.where(x.abs() < SMALLEST_NORMAL, 0.0, x)
