"""Numbers in few bits: packing, rounding in groups, and the two products of attention over them.

A step's attention needs ``query x keys`` and ``weights x values``. Both are taken here from the codes as they are
packed, a piece at a time, so that the numbers behind them are never all in memory: by a Triton kernel on CUDA
(``kernels.py``), in PyTorch everywhere else.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product

import torch

from ...conf.errors import InputError
from ..cache.products import PIECE
from .buffer import Buffer

CUT = 2 * PIECE
"""Numbers from which on one block is unpacked in pieces; its rows are cut for that, which costs time."""


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """[..., n] uint8 codes below 2 ** bits -> [..., n x bits / 8] uint8; n must fill whole bytes."""
    each = 8 // bits
    parts = codes.unflatten(-1, (-1, each))
    # Codes lie as they are numbered, whatever the strides of what they are of: a step reads them again and again.
    out = torch.zeros(parts.shape[:-1], dtype=parts.dtype, device=parts.device)
    for i in range(each):
        out |= parts[..., i] << (bits * i)
    return out


def channels_together(group: int, dim: int, bits: int) -> int:
    """Channels of a value that are quantised together; a head narrower than the group is one group.

    Raises:
        InputError: the group does not divide the head, or the head's codes do not fill whole bytes.
    """
    channels = min(group, dim)
    if dim % channels:
        raise InputError("method.storage.group", group, f"must divide the model's head_dim of {dim}")
    if dim * bits % 8:
        raise InputError("method.storage.bits", bits, f"does not fill whole bytes with the model's head_dim of {dim}")
    return channels


@dataclass
class Quantized:
    """Groups of numbers in few bits.

    Attributes:
        codes: [..., n x bits / 8] uint8.
        scale, zero: [..., n / group] float16, step and smallest value of each group.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor

    def tensors(self) -> list[torch.Tensor]:
        """Codes, scales and zero points."""
        return [self.codes, self.scale, self.zero]


class QuantizedBuffer:
    """Groups of numbers in few bits, to which further ones are added along one dimension.

    Args:
        first: what it begins with, which stands for so many ``tokens``.
        dim: the dimension that grows.
        capacity: tokens to make room for, the first ones included.
    """

    def __init__(self, first: Quantized, dim: int, tokens: int, capacity: int = 0):
        self._parts = [Buffer(x, dim, -(-capacity * x.shape[dim] // tokens)) for x in first.tensors()]
        self.dim, self.tokens = dim, tokens

    @property
    def used(self) -> Quantized:
        """What is held, as views."""
        return Quantized(*(x.used for x in self._parts))

    def append(self, more: Quantized, tokens: int, capacity: int) -> None:
        """Add what stands for so many ``tokens``; where there is no room, make it a buffer of ``capacity`` tokens."""
        for mine, theirs in zip(self._parts, more.tensors(), strict=True):
            mine.append(theirs, -(-capacity * theirs.shape[self.dim] // tokens))
        self.tokens += tokens

    def fill(self) -> None:
        """Take all of it into use; groups that hold nothing are zero."""
        before = self._parts[0].length
        for x in self._parts:
            x.fill()
        self.tokens = self.tokens * self._parts[0].length // before

    def put(self, x: Quantized, rows: torch.Tensor | slice, tokens: int, start: int) -> None:
        """Write what stands for so many ``tokens`` over those from token ``start`` on, of some rows."""
        for mine, theirs in zip(self._parts, x.tensors(), strict=True):
            mine.put(theirs, rows, start * theirs.shape[self.dim] // tokens)

    def take(self, index: torch.Tensor) -> QuantizedBuffer:
        """Some of the rows, as a buffer of their own."""
        return QuantizedBuffer(Quantized(*(x.used[index] for x in self._parts)), self.dim, self.tokens)

    def shrink_to_fit(self) -> None:
        """Give back what is not in use."""
        for x in self._parts:
            x.shrink_to_fit()

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor that must stay in memory."""
        return [x.whole for x in self._parts]

    @property
    def slack(self) -> int:
        """Bytes that hold nothing yet."""
        return sum(x.slack for x in self._parts)


LARGEST = torch.finfo(torch.float16).max


def quantize(x: torch.Tensor, bits: int, group: int) -> Quantized:
    """Round [..., n] in groups of ``group`` along the last dimension; scale and zero in float16 whatever the dtype.

    The zero is rounded down and the step up, so that a group lies within what its codes reach: no number is further
    off than half a step as stored. Every bfloat16 or float16 zero between 6e-5 and 65504 is exact; elsewhere the step
    grows by what the zero was rounded. Beyond float16's range numbers are clamped: none becomes infinite.
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    groups = x.to(exact).unflatten(-1, (-1, group))
    zero = _rounded(groups.amin(-1).clamp(-LARGEST, LARGEST), float("-inf"))
    reach = groups.amax(-1) - zero.to(exact)
    scale = _rounded((reach / (2**bits - 1)).clamp(0, LARGEST), float("inf"))
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # a group of one value: every code is 0
    codes = ((groups - zero.to(exact)[..., None]) / scale.to(exact)[..., None]).round().clamp(0, 2**bits - 1)
    return Quantized(pack(codes.to(torch.uint8).flatten(-2), bits), scale.contiguous(), zero.contiguous())


def _rounded(x: torch.Tensor, toward: float) -> torch.Tensor:
    """x in float16: the nearest number that is not on the other side of it from ``toward``."""
    near = x.to(torch.float16)
    back = near.to(x.dtype)
    passed = back < x if toward > 0 else back > x
    return torch.where(passed, torch.nextafter(near, torch.full_like(near, toward)), near)


def dequantize_into(q: Quantized, bits: int, out: torch.Tensor) -> None:
    """Restore into ``out`` [..., n], in its dtype and whatever its strides: every number is written once."""
    each, mask = 8 // bits, 2**bits - 1
    exact = torch.promote_types(out.dtype, torch.float32)
    numbers = torch.empty(*q.codes.shape, each, dtype=exact, device=out.device)
    for i in range(each):
        numbers[..., i] = (q.codes >> (bits * i)) & mask
    groups = numbers.flatten(-2).unflatten(-1, (q.scale.shape[-1], -1))
    groups.mul_(q.scale[..., None]).add_(q.zero[..., None])
    out.copy_(groups.flatten(-2))


def query_times_keys(query: torch.Tensor, keys: Quantized, bits: int) -> torch.Tensor:
    """Products of queries with quantised keys.

    Args:
        query: [N, G, D].
        keys: codes [N, blocks, D, n x bits / 8] of blocks of n tokens, in groups of tokens of one channel.
        bits: of a code.

    Returns:
        [N, G, blocks x n], float32 or wider.
    """
    if query.is_cuda and has_kernels():
        from .kernels import query_times_keys as kernel

        return kernel(query, keys, bits)
    exact = torch.promote_types(query.dtype, torch.float32)
    query = query.to(exact)
    segments, blocks, dim, width = keys.codes.shape
    each, groups = 8 // bits, keys.scale.shape[-1]
    out = torch.empty(segments, query.shape[1], blocks, width, each, dtype=exact, device=query.device)
    group = width // groups  # bytes of a row of codes that share a scale
    in_block, in_group = segments * dim * width, segments * dim * group
    for part, some in product(_pieces(blocks, in_block, PIECE), _pieces(groups, in_group, CUT)):
        columns = slice(some.start * group, some.stop * group)
        scale, zero = (x[:, part, :, some].to(exact) for x in (keys.scale, keys.zero))
        at_zero = torch.matmul(query[:, None], zero)[..., None]  # [N, b, G, groups, 1]
        # Codes that share their place in a byte go together: they unpack into whole rows.
        for place in range(each):
            numbers = _unpacked(keys.codes[:, part, :, columns], bits, place, exact).unflatten(-1, (-1, group))
            products = torch.matmul(query[:, None], numbers.mul_(scale[..., None]).flatten(-2))
            products.unflatten(-1, (-1, group)).add_(at_zero)
            out[:, :, part, columns, place] = products.transpose(1, 2)
    return out.flatten(2)


def weights_times_values(weights: torch.Tensor, values: Quantized, bits: int) -> torch.Tensor:
    """Weighted sums of quantised values.

    Args:
        weights: [N, G, n].
        values: codes [N, n or more, D x bits / 8], in groups of channels of one token.
        bits: of a code.

    Returns:
        [N, G, D], float32 or wider.
    """
    if weights.is_cuda and has_kernels():
        from .kernels import weights_times_values as kernel

        return kernel(weights, values, bits)
    exact = torch.promote_types(weights.dtype, torch.float32)
    weights = weights.to(exact)
    segments, _, width = values.codes.shape
    each, groups = 8 // bits, values.scale.shape[-1]
    sums = torch.zeros(segments, weights.shape[1], groups, width // groups, each, dtype=exact, device=weights.device)
    for part in _pieces(weights.shape[2], segments * width, PIECE):
        mine = weights[:, :, part]
        scale, zero = (x[:, part].to(exact) for x in (values.scale, values.zero))
        sums += torch.matmul(mine, zero)[..., None, None]
        for place in range(each):
            numbers = _unpacked(values.codes[:, part], bits, place, exact).unflatten(-1, (groups, -1))
            products = torch.matmul(mine, numbers.mul_(scale[..., None]).flatten(-2))
            sums[..., place] += products.unflatten(-1, (groups, -1))
    return sums.flatten(2)


def _unpacked(codes: torch.Tensor, bits: int, place: int, dtype: torch.dtype) -> torch.Tensor:
    """The codes at one place of their bytes, as numbers."""
    shifted = codes >> (bits * place) if place else codes
    if place < 8 // bits - 1:
        shifted = shifted & (2**bits - 1)
    return shifted.to(dtype)


def _pieces(count: int, numbers_each: int, most: int) -> list[slice]:
    step = max(1, most // numbers_each)
    return [slice(start, min(count, start + step)) for start in range(0, count, step)]


def has_kernels() -> bool:
    """Whether Triton is installed, which CUDA builds of torch bring along."""
    return find_spec("triton") is not None
