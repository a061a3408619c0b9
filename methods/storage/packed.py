"""Groupwise quantization to packed codes, and the two attention products over them.

The attention of a decode step needs ``query x keys`` and ``weights x values``. Both are computed from the packed codes,
one chunk at a time, so that the dequantized cache is never in memory. On CUDA a kernel that reads the layout computes
the whole attention instead (``kernels/``).

Legend: N segments (heads of all rows), G queries of a segment, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch

from ...conf.errors import InputError
from ..cache.products import CHUNK_ELEMENTS
from .buffer import Buffer

GROUP_CHUNK_ELEMENTS = 2 * CHUNK_ELEMENTS
"""Elements per chunk of a block's groups; larger, because splitting the rows of a block costs time."""


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes below 2 ** bits: uint8 [..., n] -> uint8 [..., n * bits / 8]; n codes must fill whole bytes."""
    codes_per_byte = 8 // bits
    unpacked = codes.unflatten(-1, (-1, codes_per_byte))
    # Contiguous whatever the strides of `codes`, because every decode step reads the result.
    out = torch.zeros(unpacked.shape[:-1], dtype=unpacked.dtype, device=unpacked.device)
    for i in range(codes_per_byte):
        out |= unpacked[..., i] << (bits * i)
    return out


def value_group_size(group: int, dim: int, bits: int) -> int:
    """Return the number of channels of a value in one group; a head narrower than ``group`` is one group.

    Raises:
        InputError: The group does not divide the head, or the head's codes do not fill whole bytes.
    """
    channels = min(group, dim)
    if dim % channels:
        raise InputError("method.storage.group", group, f"must divide the model's head_dim of {dim}")
    if dim * bits % 8:
        raise InputError("method.storage.bits", bits, f"does not fill whole bytes with the model's head_dim of {dim}")
    return channels


@dataclass
class Quantized:
    """Groupwise quantized tensor.

    Attributes:
        codes: uint8 [..., n * bits / 8].
        scale, zero: float16 [..., n / group], step and smallest value of each group.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor

    def tensors(self) -> list[torch.Tensor]:
        """Codes, scales and zero points."""
        return [self.codes, self.scale, self.zero]


class QuantizedBuffer:
    """Growing quantized tensor.

    Args:
        first: Initial contents.
        dim: Dimension of the tokens.
        tokens: Number of tokens in ``first``.
        capacity: Tokens to allocate, the first ones included.
    """

    def __init__(self, first: Quantized, dim: int, tokens: int, capacity: int = 0):
        self._buffers = [Buffer(x, dim, -(-capacity * x.shape[dim] // tokens)) for x in first.tensors()]
        self.dim, self.tokens = dim, tokens

    @property
    def used(self) -> Quantized:
        """Views of the parts in use."""
        return Quantized(*(x.used for x in self._buffers))

    def append(self, new: Quantized, tokens: int, capacity: int) -> None:
        """Append ``tokens`` tokens; a full buffer is reallocated for ``capacity`` tokens."""
        for buffer, x in zip(self._buffers, new.tensors(), strict=True):
            buffer.append(x, -(-capacity * x.shape[self.dim] // tokens))
        self.tokens += tokens

    def fill(self) -> None:
        """Take all slots into use, with zeros in the new ones."""
        length = self._buffers[0].length
        for x in self._buffers:
            x.fill()
        self.tokens = self.tokens * self._buffers[0].length // length

    def put(self, x: Quantized, rows: torch.Tensor | slice, tokens: int, start: int) -> None:
        """Overwrite ``tokens`` tokens of some rows from token ``start``."""
        for buffer, new in zip(self._buffers, x.tensors(), strict=True):
            buffer.put(new, rows, start * new.shape[self.dim] // tokens)

    def take(self, index: torch.Tensor) -> QuantizedBuffer:
        """Return a copy of some rows."""
        return QuantizedBuffer(Quantized(*(x.used[index] for x in self._buffers)), self.dim, self.tokens)

    def shrink_to_fit(self) -> None:
        """Free the unused slots."""
        for x in self._buffers:
            x.shrink_to_fit()

    def tensors(self) -> list[torch.Tensor]:
        """Return every tensor that stays in memory."""
        return [x.whole for x in self._buffers]

    @property
    def slack(self) -> int:
        """Bytes of unused slots."""
        return sum(x.slack for x in self._buffers)


FLOAT16_MAX = torch.finfo(torch.float16).max


def quantize(x: torch.Tensor, bits: int, group: int) -> Quantized:
    """Quantize [..., n] in groups of ``group`` along the last dimension, with float16 scale and zero for every dtype.

    The zero is rounded down and the scale up, so that the codes cover the range of a group and the error is at most
    half a step. A bfloat16 or float16 zero between 6e-5 and 65504 is exact; otherwise its rounding error widens the
    scale. Numbers beyond float16's range are clamped, so none becomes infinite.
    """
    acc_dtype = torch.promote_types(x.dtype, torch.float32)
    groups = x.to(acc_dtype).unflatten(-1, (-1, group))  # [..., n / group, group]
    zero = _round_toward(groups.amin(-1).clamp(-FLOAT16_MAX, FLOAT16_MAX), float("-inf"))  # [..., n / group]
    width = groups.amax(-1) - zero.to(acc_dtype)
    scale = _round_toward((width / (2**bits - 1)).clamp(0, FLOAT16_MAX), float("inf"))
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # a group of equal values: all codes are 0
    codes = ((groups - zero.to(acc_dtype)[..., None]) / scale.to(acc_dtype)[..., None]).round().clamp(0, 2**bits - 1)
    return Quantized(pack(codes.to(torch.uint8).flatten(-2), bits), scale.contiguous(), zero.contiguous())


def _round_toward(x: torch.Tensor, bound: float) -> torch.Tensor:
    """Round to float16 toward ``bound``, plus or minus infinity."""
    nearest = x.to(torch.float16)
    restored = nearest.to(x.dtype)
    is_wrong_side = restored < x if bound > 0 else restored > x
    return torch.where(is_wrong_side, torch.nextafter(nearest, torch.full_like(nearest, bound)), nearest)


def dequantize_into(q: Quantized, bits: int, out: torch.Tensor) -> None:
    """Dequantize into ``out`` [..., n], in its dtype and with any strides."""
    codes_per_byte, mask = 8 // bits, 2**bits - 1
    acc_dtype = torch.promote_types(out.dtype, torch.float32)
    numbers = torch.empty(*q.codes.shape, codes_per_byte, dtype=acc_dtype, device=out.device)
    for i in range(codes_per_byte):
        numbers[..., i] = (q.codes >> (bits * i)) & mask
    groups = numbers.flatten(-2).unflatten(-1, (q.scale.shape[-1], -1))  # [..., n / group, group]
    groups.mul_(q.scale[..., None]).add_(q.zero[..., None])
    out.copy_(groups.flatten(-2))


def query_times_keys(query: torch.Tensor, keys: Quantized, bits: int) -> torch.Tensor:
    """Multiply queries with quantized keys.

    Args:
        query: [N, G, D].
        keys: Codes [N, blocks, D, n * bits / 8] of blocks of n tokens, in groups of tokens of one channel.
        bits: Bits per code.

    Returns:
        [N, G, blocks * n], float32 or wider.
    """
    acc_dtype = torch.promote_types(query.dtype, torch.float32)
    query = query.to(acc_dtype)
    segments, blocks, dim, width = keys.codes.shape
    codes_per_byte, groups = 8 // bits, keys.scale.shape[-1]
    out = torch.empty(segments, query.shape[1], blocks, width, codes_per_byte, dtype=acc_dtype, device=query.device)
    group = width // groups  # bytes per group
    block_chunks = _chunks(blocks, segments * dim * width, CHUNK_ELEMENTS)
    group_chunks = _chunks(groups, segments * dim * group, GROUP_CHUNK_ELEMENTS)
    for b, c in product(block_chunks, group_chunks):
        columns = slice(c.start * group, c.stop * group)
        scale, zero = (x[:, b, :, c].to(acc_dtype) for x in (keys.scale, keys.zero))  # [N, blocks, D, groups]
        zero_products = torch.matmul(query[:, None], zero)[..., None]  # [N, blocks, G, groups, 1]
        # Unpack the codes at one bit offset of all bytes together, as a contiguous tensor.
        for place in range(codes_per_byte):
            numbers = _unpacked(keys.codes[:, b, :, columns], bits, place, acc_dtype).unflatten(-1, (-1, group))
            products = torch.matmul(query[:, None], numbers.mul_(scale[..., None]).flatten(-2))
            products.unflatten(-1, (-1, group)).add_(zero_products)
            out[:, :, b, columns, place] = products.transpose(1, 2)
    return out.flatten(2)


def weights_times_values(weights: torch.Tensor, values: Quantized, bits: int) -> torch.Tensor:
    """Compute weighted sums of quantized values.

    Args:
        weights: [N, G, n].
        values: Codes [N, n or more, D * bits / 8], in groups of channels of one token.
        bits: Bits per code.

    Returns:
        [N, G, D], float32 or wider.
    """
    acc_dtype = torch.promote_types(weights.dtype, torch.float32)
    weights = weights.to(acc_dtype)
    segments, _, width = values.codes.shape
    codes_per_byte, groups = 8 // bits, values.scale.shape[-1]
    shape = (segments, weights.shape[1], groups, width // groups, codes_per_byte)
    sums = torch.zeros(shape, dtype=acc_dtype, device=weights.device)
    for chunk in _chunks(weights.shape[2], segments * width, CHUNK_ELEMENTS):
        w = weights[:, :, chunk]  # [N, G, tokens]
        scale, zero = (x[:, chunk].to(acc_dtype) for x in (values.scale, values.zero))  # [N, tokens, groups]
        sums += torch.matmul(w, zero)[..., None, None]
        for place in range(codes_per_byte):
            numbers = _unpacked(values.codes[:, chunk], bits, place, acc_dtype).unflatten(-1, (groups, -1))
            products = torch.matmul(w, numbers.mul_(scale[..., None]).flatten(-2))
            sums[..., place] += products.unflatten(-1, (groups, -1))
    return sums.flatten(2)


def _unpacked(codes: torch.Tensor, bits: int, place: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the codes at one position within their bytes, as numbers."""
    shifted = codes >> (bits * place) if place else codes
    if place < 8 // bits - 1:
        shifted = shifted & (2**bits - 1)
    return shifted.to(dtype)


def _chunks(count: int, elements_each: int, max_elements: int) -> list[slice]:
    """Divide ``count`` items of ``elements_each`` elements into slices of at most ``max_elements``, or of one item."""
    step = max(1, max_elements // elements_each)
    return [slice(start, min(count, start + step)) for start in range(0, count, step)]
