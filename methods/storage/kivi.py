"""KIVI (Liu et al., 2024, arXiv 2402.02750): keys in few bits per channel, values in few bits per token.

Section 3: some channels of the keys are far larger than others for all tokens, so keys are quantised in groups of
tokens of one channel; values have no such channels and are quantised in groups of channels of one token. Each group
has its own smallest value and step (asymmetric, round to nearest). The most recent tokens stay as they are: keys until
a block of ``residual`` tokens is full and can be quantised as one, values for exactly ``residual`` tokens. A step's
attention reads them before they are rounded, and the prompt's attention is computed on full keys and values, so the
first token is exact.

The bytes are real: codes are packed, and kept tokens are not held twice. A decode step multiplies with the packed codes
(``packed.py``); several tokens at once expand one layer at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import torch

from ...conf.errors import require
from ...conf.options import OneOf, PositiveInt
from ..cache.kv_shape import KVShape
from ..cache.logits import LogitRule
from ..cache.products import exact_products, softmax_of
from .base import Storage
from .buffer import FREE_SLOTS, Buffer
from .packed import (
    Quantized,
    QuantizedBuffer,
    channels_together,
    dequantize_into,
    quantize,
    query_times_keys,
    weights_times_values,
)
from .segments import Groups, SegmentedLayer, Segments
from .static import StaticSegments
from .static_kivi import KiviHeads, StaticKivi


class KiviSegments(Segments):
    """N heads of equal length: quantised blocks of keys, quantised values, and the recent ones of both as they are."""

    supports_static = True

    def __init__(self, bits: int, group: int, residual: int):
        self.bits, self.group, self.residual = bits, group, residual
        self._blocks: QuantizedBuffer | None = None  # keys: [N, blocks, D, residual] tokens last, in groups of tokens
        self._old: QuantizedBuffer | None = None  # values: [N, tokens, D] in groups of channels
        self._keys: Buffer | None = None  # [N, recent, D]
        self._values: Buffer | None = None

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        if self._keys is None or self._values is None:
            self._keys, self._values = (
                Buffer(x, 1, x.shape[1] + self.free_slots(at_rest=True)) for x in (keys, values)
            )
            return
        for recent, new in ((self._keys, keys), (self._values, values)):
            recent.append(new, recent.length + self.free_slots())

    def flush(self) -> None:
        if self._keys is None or self._values is None:  # heads of which nothing was kept
            return
        # After a prompt nothing is left of what it took; after a step recent tokens stay where they are if they can.
        most = self.free_slots(at_rest=True) if self._old is None else FREE_SLOTS
        full = self._keys.length // self.residual * self.residual
        if full:
            blocks = self._keys.used[:, :full].unflatten(1, (-1, self.residual)).transpose(2, 3)
            in_blocks = (self.length + self.expected) // self.residual * self.residual
            self._blocks = self._added(self._blocks, quantize(blocks, self.bits, self.group), full, in_blocks)
            self._keys.drop(full, most)
        over = self._values.length - self.residual
        if over > 0:
            old = self._values.used[:, :over]
            channels = channels_together(self.group, old.shape[2], self.bits)
            rounded = self.length + self.expected - self.residual
            self._old = self._added(self._old, quantize(old, self.bits, channels), over, rounded)
            self._values.drop(over, most)

    def _added(self, before: QuantizedBuffer | None, more: Quantized, tokens: int, in_the_end: int) -> QuantizedBuffer:
        """``in_the_end``: tokens that this will hold once the expected ones have come."""
        if before is None:
            return QuantizedBuffer(more, 1, tokens, in_the_end)
        before.append(more, tokens, in_the_end if self.expected else before.tokens + max(tokens, self.growth))
        return before

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._keys is not None and self._values is not None, "read before append"
        recent = self._keys.used
        shape = (recent.shape[0], self.length)
        keys, values = (recent.new_empty(*shape, x.used.shape[2]) for x in (self._keys, self._values))
        keys[:, self.length - self._keys.length :] = recent
        values[:, self.length - self._values.length :] = self._values.used
        if self._blocks is not None:
            blocks = keys[:, : self._blocks.tokens].unflatten(1, (-1, self.residual))
            dequantize_into(self._blocks.used, self.bits, blocks.transpose(2, 3))
        if self._old is not None:
            dequantize_into(self._old.used, self.bits, values[:, : self._old.tokens])
        return keys, values

    def attend(self, query: torch.Tensor, rule: LogitRule) -> torch.Tensor:
        if query.shape[2] > 1 or self._blocks is None or self._old is None:
            return super().attend(query, rule)
        assert self._keys is not None and self._values is not None
        one = query[:, :, 0]  # [N, g, D]
        old = query_times_keys(one, self._blocks.used, self.bits)
        recent = exact_products(one, self._keys.used)
        weights = softmax_of(rule.logits(torch.cat([old, recent], dim=-1)), query.dtype)
        n = self._old.tokens
        out = weights_times_values(weights[..., :n], self._old.used, self.bits)
        out += torch.matmul(weights[..., n:], self._values.used)
        return out[:, :, None].to(query.dtype)

    def take(self, index: torch.Tensor) -> Segments:
        out = KiviSegments(self.bits, self.group, self.residual)
        if self._keys is not None and self._values is not None:
            out._keys, out._values = (Buffer(q.used[index], 1) for q in (self._keys, self._values))
            out._blocks, out._old = (None if q is None else q.take(index) for q in (self._blocks, self._old))
        return out

    def shrink_to_fit(self) -> None:
        for part in self._parts:
            part.shrink_to_fit()

    @classmethod
    def static(cls, groups: Groups, shape: tuple[int, int], steps: int) -> StaticSegments:
        held = [(index, segments) for index, segments in groups if isinstance(segments, KiviSegments)]
        like = max((segments for _, segments in held), key=lambda segments: segments.length)
        heads = [segments._heads(index, like) for index, segments in held]
        return StaticKivi(heads, shape, steps, like.bits, like.group, like.residual)

    def _heads(self, index: torch.Tensor, like: KiviSegments) -> KiviHeads:
        """These segments, which have the numbers ``index``; without tokens, but of the widths of others."""
        if self._keys is None or self._values is None:
            keys, values = (x.used.new_empty(len(index), 0, x.used.shape[2]) for x in like._recent)
            return KiviHeads(index, None, None, keys, values)
        blocks, old = (None if q is None else q.used for q in (self._blocks, self._old))
        return KiviHeads(index, blocks, old, self._keys.used, self._values.used)

    @property
    def length(self) -> int:
        if self._values is None:
            return 0
        return (0 if self._old is None else self._old.tokens) + self._values.length

    @property
    def _quantized(self) -> list[QuantizedBuffer]:
        return [q for q in (self._blocks, self._old) if q is not None]

    @property
    def _recent(self) -> list[Buffer]:
        return [q for q in (self._keys, self._values) if q is not None]

    @property
    def _parts(self) -> list[QuantizedBuffer | Buffer]:
        return [*self._quantized, *self._recent]

    def tensors(self) -> list[torch.Tensor]:
        return [t for q in self._quantized for t in q.tensors()] + [q.whole for q in self._recent]

    @property
    def logical_bytes(self) -> int:
        return sum(t.nbytes for t in self.tensors()) - sum(part.slack for part in self._parts)


@dataclass(frozen=True)
class Kivi(Storage):
    """KIVI's storage.

    Attributes:
        bits: of a code: 2, 4 or 8.
        group: numbers that share a scale and a zero (32 in the paper); a narrower head is one group for its values.
        residual: recent tokens kept as they are, a multiple of ``group`` (128 in the paper).
    """

    id: ClassVar[str] = "Kivi"
    bits: Annotated[int, OneOf((2, 4, 8))] = 4
    group: PositiveInt = 32
    residual: PositiveInt = 128

    version: ClassVar[int] = 2  # 2: scales in float16 for every dtype

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = f"must be a whole number whose {self.bits}-bit codes fill whole bytes"
        require(self.group * self.bits % 8 == 0, "method.storage.group", self.group, allowed)
        allowed = f"must be a multiple of method.storage.group={self.group}"
        require(self.residual % self.group == 0, "method.storage.residual", self.residual, allowed)

    @property
    def name(self) -> str:
        return f"kivi{self.bits}"

    def new_layers(self, num_layers: int) -> Sequence[SegmentedLayer]:
        new = partial(KiviSegments, self.bits, self.group, self.residual)
        return [SegmentedLayer(new) for _ in range(num_layers)]

    def bytes_formula(self, tokens: Sequence[int], heads: int, shape: KVShape, new_tokens: int = 0) -> int:
        """Per head and layer: codes, a 16-bit scale and zero per group, and the recent tokens as they are.

        With heads of different lengths it is the formula of their mean, because each has its own last block.
        """
        return sum(heads * self._head_bytes(n, shape) for n in tokens)

    def _head_bytes(self, tokens: int, shape: KVShape) -> int:
        wide, narrow = shape.head_dim, shape.value_dim
        keys, values = tokens - tokens % self.residual, max(0, tokens - self.residual)
        codes = (keys * wide + values * narrow) * self.bits // 8
        groups = keys // self.group * wide + values * (narrow // min(self.group, narrow))
        recent = (tokens - keys) * wide + (tokens - values) * narrow
        return codes + 2 * 2 * groups + recent * shape.element_bytes
