"""KIVI storage in tensors of fixed shape; see ``kivi.py``.

    keys    codes of whole blocks  [0, packed)            recent tokens in order                [packed, length)
    values  codes                  [0, rounded)           ring buffer of residual + 1 slots     [rounded, length)

A step writes the new token after the recent keys and over the oldest slot of the ring buffer. A full block of keys is
quantized between steps. KIVI quantizes one value per step. Here the codes of a whole block of values are computed ahead
of time, but a step uses only those of tokens before ``rounded``, so that the results are equal.

Legend: N segments (heads of all rows), n segments of one length, g query heads per segment, D channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..cache.logits import LogitRule
from ..cache.products import query_key_products
from .buffer import take_slots
from .packed import Quantized, dequantize_into, quantize, query_times_keys, value_group_size, weights_times_values
from .static import ALL_ROWS, LengthGroup, StaticSegments
from .step_attention import packed_problem, uses_kernel


@dataclass(frozen=True)
class KiviHeads:
    """Contents of dynamic segments of one length, to be copied into a :class:`StaticKivi`.

    Attributes:
        index: [n] int64, indices of the segments.
        blocks: Quantized keys [n, blocks, D, residual]; None: no full block.
        old: Quantized values [n, tokens, D_v]; None: no quantized value.
        keys, values: Recent tokens [n, recent tokens, D].
    """

    index: torch.Tensor
    blocks: Quantized | None
    old: Quantized | None
    keys: torch.Tensor
    values: torch.Tensor

    @property
    def rounded(self) -> int:
        """Number of tokens with quantized values."""
        return 0 if self.old is None else self.old.codes.shape[1]

    @property
    def length(self) -> int:
        """Tokens of each segment."""
        return self.rounded + self.values.shape[1]


class StaticKivi(StaticSegments):
    """KIVI segments in tensors of fixed shape.

    Args:
        groups: Contents of all segments, grouped by length.
        shape: Rows B and heads H of the layer.
        steps: Maximum number of decode steps.
        bits, group, residual: See :class:`.kivi.Kivi`.
    """

    def __init__(
        self, groups: Sequence[KiviHeads], shape: tuple[int, int], steps: int, bits: int, group: int, residual: int
    ):
        self.shape, self.bits, self.group, self.residual = shape, bits, group, residual
        keys, values = groups[0].keys, groups[0].values
        dim, value_dim = keys.shape[2], values.shape[2]
        self._channels = value_group_size(group, value_dim, bits)
        count, device = math.prod(shape), keys.device
        blocks = (max(g.length for g in groups) + steps) // residual
        self._capacity = blocks * residual  # maximum number of quantized tokens
        # Zeros, because uninitialized memory may contain NaN, and a zero weight times NaN is NaN.
        self._blocks = _empty_codes((count, blocks, dim, residual), bits, group, device)
        self._old = _empty_codes((count, self._capacity, value_dim), bits, self._channels, device)
        self._keys = keys.new_zeros(count, residual, dim)
        self._values = values.new_zeros(count, residual + 1, value_dim)
        self.length, self._packed, self._rounded = (
            torch.zeros(count, dtype=torch.int64, device=device) for _ in range(3)
        )
        self._groups = [LengthGroup(ALL_ROWS if len(groups) == 1 else g.index, g.length) for g in groups]
        for g in groups:
            self._fill(g)

    def _fill(self, heads: KiviHeads) -> None:
        index, length, packed, rounded = heads.index, heads.length, heads.length - heads.keys.shape[1], heads.rounded
        if heads.blocks is not None:
            _write(self._blocks, heads.blocks, index, 0)
        if heads.old is not None:
            _write(self._old, heads.old, index, 0)
        if packed > rounded:
            _write(self._old, quantize(heads.values[:, : packed - rounded], self.bits, self._channels), index, rounded)
        self._keys[index, : length - packed] = heads.keys
        slots = torch.arange(rounded, length, device=index.device) % (self.residual + 1)
        self._values[index[:, None], slots] = heads.values
        for counter, value in ((self.length, length), (self._packed, packed), (self._rounded, rounded)):
            counter[index] = value

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        for recent, slot, new in (
            (self._keys, self.length - self._packed, keys),
            (self._values, self.length % (self.residual + 1), values),
        ):
            recent.scatter_(1, slot[:, None, None].expand(-1, 1, new.shape[1]), new[:, None])
        self.length += 1

    def flush(self) -> None:
        torch.sub(self.length, self.residual, out=self._rounded).clamp_(min=0)

    def between_steps(self) -> None:
        for group in self._groups:
            group.length += 1
            if group.length % self.residual == 0:
                self._flush(group.rows, group.length)

    def _flush(self, rows: torch.Tensor | slice, end: int) -> None:
        """Quantize the full block of recent tokens that ends before token ``end``."""
        start = end - self.residual
        slots = torch.arange(start, end, device=self.length.device) % (self.residual + 1)
        blocks = self._keys[rows][:, None].transpose(2, 3)  # [n, 1, D, residual]
        _write(self._blocks, quantize(blocks, self.bits, self.group), rows, start // self.residual)
        _write(self._old, quantize(self._values[rows][:, slots], self.bits, self._channels), rows, start)
        self._packed[rows] = end

    def attend(self, query: torch.Tensor, rule: LogitRule) -> torch.Tensor:
        widths = self._keys.shape[2], self._values.shape[2]
        problem = packed_problem(self.bits, self.residual, self.group, self._channels)
        if uses_kernel(query, self.shape[1], *widths, layout_problem=problem):
            from .kernels.kivi import PackedSegments, kivi_attention

            counts = self._packed, self._rounded, self.length
            tensors = self._blocks, self._old, self._keys, self._values
            return kivi_attention(query, PackedSegments(*tensors, *counts, self.shape, self.bits), rule)
        q = query.reshape(len(self.length), -1, query.shape[3])  # [N, g, D]
        slot = torch.arange(max(self._capacity, self.residual + 1), device=query.device)[None]
        capacity = self._capacity
        length, packed, rounded = (x[:, None] for x in (self.length, self._packed, self._rounded))  # [N, 1]
        logits = query_key_products(q, self._keys)  # [N, g, residual]
        visible = slot[:, : self.residual] < length - packed
        if capacity:
            logits = torch.cat([query_times_keys(q, self._blocks, self.bits), logits], dim=-1)
            visible = torch.cat([slot[:, :capacity] < packed, visible], dim=-1)
        logits = rule.logits(logits).masked_fill(~visible[:, None], -math.inf)  # [N, g, capacity + residual]
        weights = rule.weights(logits.unflatten(0, self.shape), head_dims=2).flatten(0, 1).to(query.dtype)
        # Token in each slot of the ring buffer, and the index of that token's weight.
        token = rounded + (slot[:, : self.residual + 1] - rounded) % (self.residual + 1)  # [N, residual + 1]
        column = torch.where(token < packed, token, (token - packed + capacity).clamp(max=logits.shape[-1] - 1))
        recent = weights.gather(2, column[:, None].expand(-1, q.shape[1], -1))  # [N, g, residual + 1]
        out = torch.matmul(recent.masked_fill((token >= length)[:, None], 0), self._values)
        if capacity:
            old = weights[..., :capacity].masked_fill((slot[:, :capacity] >= rounded)[:, None], 0)
            out = weights_times_values(old, self._old, self.bits) + out
        return out.to(query.dtype).reshape(*query.shape[:3], -1)

    def read(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        slots = self._capacity + self.residual
        keys, values = (x.new_zeros(x.shape[0], slots, x.shape[2]) for x in (self._keys, self._values))
        if self._capacity:
            blocks = keys[:, : self._capacity].unflatten(1, (-1, self.residual))
            dequantize_into(self._blocks, self.bits, blocks.transpose(2, 3))
            dequantize_into(self._old, self.bits, values[:, : self._capacity])
        token = torch.arange(slots, device=keys.device).expand(keys.shape[0], -1)  # [N, S]
        length, packed, rounded = (x[:, None] for x in (self.length, self._packed, self._rounded))
        key_slot, value_slot = (token - packed).clamp(0, self.residual - 1), token % (self.residual + 1)
        keys = torch.where((token < packed)[..., None], keys, take_slots(self._keys, key_slot))
        values = torch.where((token < rounded)[..., None], values, take_slots(self._values, value_slot))
        return keys, values, token < length

    def static_state(self) -> list[torch.Tensor]:
        return [self.length, self._packed, self._rounded]

    def tensors(self) -> list[torch.Tensor]:
        codes = [*self._blocks.tensors(), *self._old.tensors()]
        return [*codes, self._keys, self._values, *self.static_state()]

    @property
    def logical_bytes(self) -> int:
        length, packed, rounded = (int(x.sum()) for x in (self.length, self._packed, self._rounded))
        total = (length - packed) * self._keys[0, 0].nbytes + (length - rounded) * self._values[0, 0].nbytes
        if self._capacity:
            total += packed // self.residual * sum(t[0, 0].nbytes for t in self._blocks.tensors())
            total += rounded * sum(t[0, 0].nbytes for t in self._old.tensors())
        return total


def _empty_codes(shape: tuple[int, ...], bits: int, group: int, device: torch.device) -> Quantized:
    """Return zeros of a shape, quantized in groups along the last dimension."""
    codes = torch.zeros(*shape[:-1], shape[-1] * bits // 8, dtype=torch.uint8, device=device)
    scale, zero = (torch.zeros(*shape[:-1], shape[-1] // group, dtype=torch.float16, device=device) for _ in range(2))
    return Quantized(codes, scale, zero)


def _write(codes: Quantized, new: Quantized, rows: torch.Tensor | slice, start: int) -> None:
    """Write ``new`` [n, m, ...] to indices ``start`` .. ``start + m - 1`` of some rows."""
    for target, source in zip(codes.tensors(), new.tensors(), strict=True):
        target[rows, start : start + source.shape[1]] = source
