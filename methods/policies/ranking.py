"""Deterministic top-k over token scores: the kept tokens are the same on every device and in every batch.

Tokens are ranked by score, then by the tie-breaking score if the method has one (SnapKV's scores before pooling), then
by the lower index. Ties are common: max pooling gives a peak and its neighbours equal scores. ``topk``, ``argsort`` and
``argmin`` order equal entries differently on different devices. Scores are ranked in float32; nothing waits for a GPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

RULE = "score, unpooled score, index"
"""The ranking criteria in order. It is part of a run's identity, because another rule keeps other tokens."""
LARGEST_SUBNORMAL = torch.finfo(torch.float32).tiny - torch.finfo(torch.float32).smallest_normal * 2**-23
"""Some devices flush such numbers to zero, so they and all smaller ones rank as zero."""
HOST_TYPES = ("cpu",)  # device types whose results can be read without waiting


def keep_slots(scores: torch.Tensor, count: int, ties: torch.Tensor | None = None) -> torch.Tensor:
    """Return the indices of the ``count`` highest-ranked tokens.

    Args:
        scores: [..., N]; the largest are kept. Infinite scores are allowed; a positive NaN ranks highest.
        count: Number of tokens to keep, 0 <= count <= N.
        ties: [..., N] tie-breaking scores, of which the larger is kept; None: the lower index is kept.

    Returns:
        [..., count] int64, increasing.
    """
    return indices_of(keep_mask(scores, count, ties), count)


def indices_of(mask: torch.Tensor, count: int) -> torch.Tensor:
    """Return the indices [..., count] of the True entries of ``mask`` [..., N], exactly ``count`` in each row."""
    rows = mask.shape[:-1]
    return mask.nonzero_static(size=rows.numel() * count)[:, -1].view(*rows, count)


def keep_mask(scores: torch.Tensor, count: int | torch.Tensor, ties: torch.Tensor | None = None) -> torch.Tensor:
    """Return the mask of the highest-ranked tokens: bool [..., N].

    Args:
        scores, ties: See :func:`keep_slots`.
        count: Number of tokens to keep, or one number per ranking: int64 [...].
    """
    if isinstance(count, int) and count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    keys = sort_keys(scores, ties)
    if isinstance(count, torch.Tensor):
        count = count[..., None]
        ranked = keys.sort(dim=-1, descending=True).values
        threshold = ranked.gather(-1, (count - 1).clamp(min=0))  # [..., 1], key of the last kept token
    else:
        threshold = keys.topk(count, dim=-1, sorted=False).values.amin(-1, keepdim=True)
        if keys.device.type in HOST_TYPES and (kept := keys >= threshold).count_nonzero() == count * threshold.numel():
            return kept  # no equal keys to choose between
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


def sort_keys(scores: torch.Tensor, ties: torch.Tensor | None) -> torch.Tensor:
    """Return integer keys that sort by score, then by ``ties``: int32, or int64 with ``ties``."""
    if ties is None:
        return _ordered_bits(scores)
    high, low = _ordered_bits(torch.stack([scores.float(), ties.float().expand_as(scores)])).long()
    return low.add_(high, alpha=2**32)


def _ordered_bits(x: torch.Tensor) -> torch.Tensor:
    """Map float32 to int32 so that the order is preserved: the bits, with the magnitude inverted for negatives."""
    bits = _flushed(x).view(torch.int32)
    return bits.bitwise_xor_((bits >> 31).bitwise_and_(2**31 - 1))  # all bits but the sign


def _flushed(x: torch.Tensor) -> torch.Tensor:
    """Return a float32 copy in which subnormal numbers and -0.0 are 0.0."""
    return F.hardshrink(x.float(), LARGEST_SUBNORMAL)
