"""Optimal scalar codebooks (Lloyd-Max) of a symmetric density, and packed codes of 2, 3 or 4 bits to look up."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .packed import pack

LLOYD_STEPS = 50
"""Steps of Lloyd's iteration before Newton's, which needs a near start."""
NEWTON_STEPS = 12

Function = Callable[[torch.Tensor], torch.Tensor]


def lloyd_max(
    bits: int, mass: Function, moment: Function, density: Function, top: float, spread: float
) -> torch.Tensor:
    """Return the levels with the smallest expected squared error: each is the mean of its cell.

    A cell ends halfway to the next level. The positive half is computed, by Lloyd's iteration and then by Newton's.

    Args:
        bits: Bits of a code.
        mass, moment: Antiderivatives of the density f(t) and of t f(t), of any scale.
        density: f(t), even.
        top: Largest number.
        spread: Largest level to start from.

    Returns:
        [2 ** bits] float64, increasing.
    """
    count = 2 ** (bits - 1)
    levels = (torch.arange(count, dtype=torch.float64) + 0.5) * (spread / count)
    zero, last = torch.zeros(1, dtype=torch.float64), torch.full((1,), top, dtype=torch.float64)
    for step in range(LLOYD_STEPS + NEWTON_STEPS):
        bounds = torch.cat([zero, (levels[1:] + levels[:-1]) / 2, last])  # [count + 1]
        cell = mass(bounds).diff()  # [count]
        means = moment(bounds).diff() / cell
        if step < LLOYD_STEPS:
            levels = means
            continue
        inner = bounds[1:-1]
        upper = density(inner) * (inner - means[:-1]) / cell[:-1] / 2  # of a mean by the two levels around its end
        lower = density(inner) * (means[1:] - inner) / cell[1:] / 2
        jacobian = torch.eye(count, dtype=torch.float64) - torch.diag(upper, 1) - torch.diag(lower, -1)
        jacobian[:-1, :-1] -= torch.diag(upper)
        jacobian[1:, 1:] -= torch.diag(lower)
        levels = levels - torch.linalg.solve(jacobian, levels - means)
    return torch.cat([-levels.flip(0), levels])


def nearest_codes(x: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Return the index of the nearest level of each number, int64."""
    return torch.bucketize(x.contiguous(), (levels[1:] + levels[:-1]) / 2)


def pack_planes(codes: torch.Tensor, bits: int) -> list[torch.Tensor]:
    """Pack codes [..., D] into one plane [..., D * bits / 8]; 3 bits into one of 2 bits and one of 1 bit."""
    codes = codes.to(torch.uint8)
    if bits != 3:
        return [pack(codes, bits)]
    return [pack(codes & 3, 2), pack(codes >> 2, 1)]  # no code crosses a byte


def lookup_table(levels: torch.Tensor) -> torch.Tensor:
    """Return the numbers [indices, codes per byte] of each index that :func:`look_up` makes of a byte."""
    bits = len(levels).bit_length() - 1
    if bits != 3:
        index = torch.arange(256)[:, None]
        return levels[(index >> torch.arange(0, 8, bits)) & (2**bits - 1)]
    index, place = torch.arange(4096)[:, None], torch.arange(4)
    return levels[((index >> (2 * place)) & 3) | (((index >> (8 + place)) & 1) << 2)]


def look_up(planes: Sequence[torch.Tensor], table: torch.Tensor) -> torch.Tensor:
    """Return the numbers [..., D] of packed codes, by the table of :func:`lookup_table`."""
    index = planes[0].int()  # [..., bytes]
    if len(planes) == 2:  # the third bits of the four codes of a byte, above its bits
        high = torch.stack([planes[1] & 15, planes[1] >> 4], dim=-1).flatten(-2)
        index = index | high.int() << 8
    return torch.nn.functional.embedding(index, table).flatten(-2)


def channels_of(codes: torch.Tensor, bits: int) -> int:
    """Return the number of channels whose codes are in the first plane of :func:`pack_planes`, [..., bytes]."""
    return codes.shape[-1] * (2 if bits == 4 else 4)  # of 3 bits, the first plane has two


def code_bytes_problem(dim: int, bits: int) -> bool:
    """Return whether the codes of ``dim`` channels leave a byte partly unused."""
    return dim % (8 if bits == 3 else 8 // bits) != 0
