"""KIVI (Liu et al., 2024, arXiv 2402.02750): keys quantized per channel, values quantized per token.

Section 3: keys have channels that are much larger than others for all tokens, so they are quantized in groups of tokens
of one channel. Values have no such channels and are quantized in groups of channels of one token. Each group has its
own zero point and scale (asymmetric, round to nearest). Recent tokens are stored unquantized: keys until a block of
``residual`` tokens is full, values for exactly ``residual`` tokens. A step attends before it quantizes. The prompt's
attention uses the original keys and values, so the first generated token is that of the full cache.

Codes are packed, and no token is stored twice. A decode step multiplies with the packed codes (``packed.py``); a
multi-token forward dequantizes one layer at a time.

Legend: N segments (heads of all rows), g query heads per segment, D channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import torch

from ...conf.errors import require
from ...conf.options import OneOf, PositiveInt
from ...conf.versions import CURRENT_VERSIONS
from ..cache.kv_shape import KVShape
from ..cache.logits import LogitRule
from ..cache.products import query_key_products, softmax_of
from .base import Storage
from .buffer import FREE_SLOTS, Buffer
from .packed import (
    Quantized,
    QuantizedBuffer,
    dequantize_into,
    quantize,
    query_times_keys,
    value_group_size,
    weights_times_values,
)
from .segmented import SegmentedLayer
from .segments import Groups, Segments
from .static import StaticSegments
from .static_kivi import KiviHeads, StaticKivi
from .step_attention import packed_problem, uses_kernel


class KiviSegments(Segments):
    """Segments of equal length: quantized blocks of keys, quantized values, and unquantized recent tokens."""

    static_problem = None

    def __init__(self, bits: int, group: int, residual: int):
        self.bits, self.group, self.residual = bits, group, residual
        self._blocks: QuantizedBuffer | None = None  # quantized keys [N, blocks, D, residual] in groups of tokens
        self._old: QuantizedBuffer | None = None  # quantized values [N, tokens, D] in groups of channels
        self._keys: Buffer | None = None  # recent keys [N, recent tokens, D]
        self._values: Buffer | None = None  # recent values

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        if self._keys is None or self._values is None:
            self._keys, self._values = (
                Buffer(x, 1, x.shape[1] + self.free_slots(only_reserved=True)) for x in (keys, values)
            )
            return
        for recent, new in ((self._keys, keys), (self._values, values)):
            recent.append(new, recent.length + self.free_slots())

    def flush(self) -> None:
        if self._keys is None or self._values is None:  # no token of these heads was kept
            return
        # After the prefill the buffers shrink to the recent tokens; after a step they keep free slots.
        max_free = self.free_slots(only_reserved=True) if self._old is None else FREE_SLOTS
        full = self._keys.length // self.residual * self.residual  # tokens in full blocks
        if full:
            blocks = self._keys.used[:, :full].unflatten(1, (-1, self.residual)).transpose(2, 3)
            final_tokens = (self.length + self.reserved) // self.residual * self.residual
            self._blocks = self._appended(self._blocks, quantize(blocks, self.bits, self.group), full, final_tokens)
            self._keys.drop(full, max_free)
        excess = self._values.length - self.residual
        if excess > 0:
            old = self._values.used[:, :excess]
            group = value_group_size(self.group, old.shape[2], self.bits)
            final_tokens = self.length + self.reserved - self.residual
            self._old = self._appended(self._old, quantize(old, self.bits, group), excess, final_tokens)
            self._values.drop(excess, max_free)

    def _appended(
        self, buffer: QuantizedBuffer | None, new: Quantized, tokens: int, final_tokens: int
    ) -> QuantizedBuffer:
        """Append ``tokens`` new tokens; ``final_tokens`` is the number after all reserved tokens."""
        if buffer is None:
            return QuantizedBuffer(new, 1, tokens, final_tokens)
        buffer.append(new, tokens, final_tokens if self.reserved else buffer.tokens + max(tokens, self.growth))
        return buffer

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
        segments, widths = len(query), (query.shape[3], self._values.used.shape[2])
        groups = self.residual, self.group, value_group_size(self.group, widths[1], self.bits)
        if uses_kernel(query, 1, *widths, layout_problem=packed_problem(self.bits, *groups)):
            from .kernels.kivi import PackedSegments, kivi_attention

            tensors = self._blocks.used, self._old.used, self._keys.used, self._values.used
            counts = self.length - self._keys.length, self._old.tokens, self.length
            return kivi_attention(query, PackedSegments(*tensors, *counts, (segments, 1), self.bits), rule)
        q = query[:, :, 0]  # [N, g, D]
        old = query_times_keys(q, self._blocks.used, self.bits)  # [N, g, quantized keys]
        recent = query_key_products(q, self._keys.used)  # [N, g, recent keys]
        weights = softmax_of(rule.logits(torch.cat([old, recent], dim=-1)), query.dtype)  # [N, g, tokens]
        n = self._old.tokens
        out = weights_times_values(weights[..., :n], self._old.used, self.bits)  # [N, g, D]
        out += torch.matmul(weights[..., n:], self._values.used)
        return out[:, :, None].to(query.dtype)

    def take(self, index: torch.Tensor) -> Segments:
        out = KiviSegments(self.bits, self.group, self.residual)
        if self._keys is not None and self._values is not None:
            out._keys, out._values = (Buffer(q.used[index], 1) for q in (self._keys, self._values))
            out._blocks, out._old = (None if q is None else q.take(index) for q in (self._blocks, self._old))
        return out

    def shrink_to_fit(self) -> None:
        for buffer in self._buffers:
            buffer.shrink_to_fit()

    @classmethod
    def static(
        cls, groups: Groups, shape: tuple[int, int], steps: int, limits: torch.Tensor | None = None
    ) -> StaticSegments:
        assert limits is None, "quantized tokens are never dropped"
        kivi = [(index, segments) for index, segments in groups if isinstance(segments, KiviSegments)]
        longest = max((segments for _, segments in kivi), key=lambda segments: segments.length)
        heads = [segments._heads(index, longest) for index, segments in kivi]
        return StaticKivi(heads, shape, steps, longest.bits, longest.group, longest.residual)

    def _heads(self, index: torch.Tensor, template: KiviSegments) -> KiviHeads:
        """Return the contents of segments ``index``; empty segments have the channels of ``template``."""
        if self._keys is None or self._values is None:
            keys, values = (x.used.new_empty(len(index), 0, x.used.shape[2]) for x in template._recent)
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
    def _buffers(self) -> list[QuantizedBuffer | Buffer]:
        return [*self._quantized, *self._recent]

    def tensors(self) -> list[torch.Tensor]:
        return [t for q in self._quantized for t in q.tensors()] + [q.whole for q in self._recent]

    @property
    def logical_bytes(self) -> int:
        return sum(t.nbytes for t in self.tensors()) - sum(buffer.slack for buffer in self._buffers)


@dataclass(frozen=True)
class Kivi(Storage):
    """KIVI storage.

    Attributes:
        bits: Bits per code: 2, 4 or 8.
        group: Elements that share a scale and a zero point (32 in the paper). Values of a narrower head are one group.
        residual: Number of unquantized recent tokens, a multiple of ``group`` (128 in the paper).
    """

    id: ClassVar[str] = "Kivi"
    bits: Annotated[int, OneOf((2, 4, 8))] = 4
    group: PositiveInt = 32
    residual: PositiveInt = 128

    version: ClassVar[int] = CURRENT_VERSIONS["Kivi"]

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
        """Return the bytes of codes, a 16-bit scale and zero point per group, and unquantized recent tokens.

        If heads have different lengths it is an approximation by their mean, because each has its own last block.
        """
        return sum(heads * self._head_bytes(n, shape) for n in tokens)

    def _head_bytes(self, tokens: int, shape: KVShape) -> int:
        wide, narrow = shape.head_dim, shape.value_dim
        keys, values = tokens - tokens % self.residual, max(0, tokens - self.residual)
        codes = (keys * wide + values * narrow) * self.bits // 8
        groups = keys // self.group * wide + values * (narrow // min(self.group, narrow))
        recent = (tokens - keys) * wide + (tokens - values) * narrow
        return codes + 2 * 2 * groups + recent * shape.element_bytes
