"""Packed codes as numbers, bit by bit."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def unpack_codes(planes: Sequence[torch.Tensor], bits: int, dim: int) -> torch.Tensor:
    """Return the codes int64 [..., dim] of one plane of bytes, or for 3 bits of a plane of 2 bits and one of 1 bit."""
    codes = torch.zeros(*planes[0].shape[:-1], dim, dtype=torch.int64)
    for plane, width, shift in zip(planes, (2, 1) if bits == 3 else (bits,), (0, 2), strict=False):
        for channel in range(dim):
            byte = plane[..., channel * width // 8].long()
            codes[..., channel] |= (byte >> channel * width % 8 & 2**width - 1) << shift
    return codes
