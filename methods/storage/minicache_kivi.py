"""MiniCache with KIVI quantization, the "4-bit MiniCache" of Liu et al. (2024, arXiv 2405.14366).

Layers below ``start`` use KIVI. In a pair of layers, blocks of ``residual`` tokens are merged and quantized together:
the shared directions as in KIVI (of keys per channel, of values per token), magnitudes and retained tokens in 16 bits.
Tokens of an incomplete block are stored unmerged and unquantized in both layers. The paper does not describe the
combination; with blocks of the same size every number is quantized only once.

Legend: N segments (heads of all rows), B rows and H heads of a pair (of segments: B = N, H = 1), g or G query heads per
KV head, D channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import torch

from ...conf.options import OneOf, PositiveInt
from ...conf.versions import CURRENT_VERSIONS
from ..cache.kv_shape import KVShape
from ..cache.logits import LogitRule
from ..cache.products import cached_attention
from .base import LayerStorage
from .kivi import Kivi
from .minicache.merged import Directions
from .minicache.pair import Pair
from .minicache.static import StaticPair, static_pair
from .minicache.storage import MiniCache
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
from .static import ALL_ROWS, StaticSegments
from .step_attention import packed_problem


class QuantizedDirections(Directions):
    """Quantized shared directions: of keys in groups of tokens, of values in groups of channels.

    Args:
        x: Initial directions [B, H, n, D]; for keys, n is a multiple of the group size.
        bits, group: See :class:`.kivi.Kivi`.
        is_keys: Whether they are directions of keys.
        capacity: Number of tokens to allocate.
    """

    takes_tokens_at = False

    def __init__(self, x: torch.Tensor, bits: int, group: int, is_keys: bool, capacity: int = 0):
        self.bits, self.is_keys = bits, is_keys
        self.group = group if is_keys else value_group_size(group, x.shape[3], bits)  # tokens or channels
        self._codes = QuantizedBuffer(self._quantized(x), 3 if is_keys else 2, x.shape[2], capacity)

    def _quantized(self, x: torch.Tensor) -> Quantized:
        """Quantize x [B, H, n, D]; the result is [B, H, D, n] for keys and [B, H, n, D] for values."""
        return quantize(x.transpose(2, 3) if self.is_keys else x, self.bits, self.group)

    def append(self, x: torch.Tensor, capacity: int) -> None:
        self._codes.append(self._quantized(x), x.shape[2], capacity)

    def fill(self) -> None:
        self._codes.fill()

    def put(self, x: torch.Tensor, rows: torch.Tensor | slice, start: int) -> None:
        self._codes.put(self._quantized(x), rows, x.shape[2], start)

    def put_all(self, other: Directions, rows: torch.Tensor | slice) -> None:
        assert isinstance(other, QuantizedDirections)
        self._codes.put(other._codes.used, rows, other._codes.tokens, 0)

    def multiply_into(self, magnitudes: torch.Tensor, out: torch.Tensor) -> None:
        dequantize_into(self._codes.used, self.bits, out.transpose(2, 3) if self.is_keys else out)
        out.mul_(magnitudes[..., None])

    def scores(self, query: torch.Tensor) -> torch.Tensor:
        batch, heads = query.shape[:2]
        codes = Quantized(*(t.flatten(0, 1)[:, None] for t in self._codes.used.tensors()))  # one block
        return query_times_keys(query.flatten(0, 1), codes, self.bits).unflatten(0, (batch, heads))

    def weighted(self, weights: torch.Tensor) -> torch.Tensor:
        batch, heads = weights.shape[:2]
        codes = Quantized(*(t.flatten(0, 1) for t in self._codes.used.tensors()))
        return weights_times_values(weights.flatten(0, 1), codes, self.bits).unflatten(0, (batch, heads))

    def kernel_problem(self, block: int) -> str | None:
        return packed_problem(self.bits, block, self.group)

    def kernel(self, block: int) -> Callable[..., torch.Tensor]:
        from .kernels.merged_codes import merged_codes_attention

        return partial(merged_codes_attention, bits=self.bits, block=block)

    def first(self, length: int) -> Quantized:
        assert length == self._codes.tokens, "quantized directions are those of whole blocks"
        return self._codes.used

    def take(self, index: torch.Tensor) -> Directions:
        out = object.__new__(QuantizedDirections)
        out.bits, out.group, out.is_keys = self.bits, self.group, self.is_keys
        out._codes = self._codes.take(index)
        return out

    def tensors(self) -> list[torch.Tensor]:
        return self._codes.tensors()

    @property
    def slack(self) -> int:
        return self._codes.slack


class StaticPairSegments(StaticSegments):
    """One layer of a static pair whose rows are segments."""

    def __init__(self, pair: StaticPair, layer: int, shape: tuple[int, int]):
        self.pair, self.layer, self.shape = pair, layer, shape
        self.length = pair.fed[layer]

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.pair.append(self.layer, keys[:, None, None], values[:, None, None], None)

    def read(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        keys, values = self.pair.read(self.layer)
        return keys[:, 0], values[:, 0], self.pair.visible(self.layer)[:, 0]

    def attend(self, query: torch.Tensor, rule: LogitRule) -> torch.Tensor:
        if rule.sinks is not None or not self.pair.length:  # sinks depend on the head
            keys, values, valid = (x.unflatten(0, self.shape) for x in self.read())
            return cached_attention(query, keys, values, rule, valid)
        q = query.reshape(len(self.length), 1, -1, query.shape[3])  # [N, 1, g, D]
        return self.pair.attend(self.layer, q, rule).reshape(*query.shape[:3], -1)

    def flush(self) -> None:
        if self.layer == 1:
            self.pair.merge()

    def between_steps(self) -> None:
        if self.layer == 1:
            self.pair.between_steps()

    def end_steps(self) -> None:
        if self.layer == 1:
            self.pair.end_steps()

    def static_state(self) -> list[torch.Tensor]:
        return self.pair.static_state() if self.layer == 0 else []

    def tensors(self) -> list[torch.Tensor]:
        return self.pair.tensors(self.layer)

    @property
    def logical_bytes(self) -> int:
        return self.pair.logical_bytes(self.layer)


class PairSegments(Segments):
    """One layer of a pair whose rows are segments: [N, 1, S, D] in the pair."""

    static_problem = None

    def __init__(self, pair: Pair, layer: int):
        self.pair, self.layer = pair, layer

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.pair.growth, self.pair.reserved = self.growth, self.reserved
        self.pair.append(self.layer, keys[:, None], values[:, None], None)

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.pair.read(self.layer)
        return keys[:, 0], values[:, 0]

    def attend(self, query: torch.Tensor, rule: LogitRule) -> torch.Tensor:
        if query.shape[2] > 1 or not self.pair.length:
            return super().attend(query, rule)
        return self.pair.attend(self.layer, query[:, None, :, 0], rule)[:, 0, :, None]

    def take(self, index: torch.Tensor) -> Segments:
        return PairSegments(self.pair.select_rows(index), self.layer)

    def flush(self) -> None:
        if self.layer == 1:
            self.pair.merge()

    @classmethod
    def static(
        cls, groups: Groups, shape: tuple[int, int], steps: int, limits: torch.Tensor | None = None
    ) -> StaticSegments:
        assert limits is None, "quantized tokens are never dropped"
        members = [(index, segments) for index, segments in groups if isinstance(segments, PairSegments)]
        pairs: list[tuple[torch.Tensor | slice, Pair]] = [(index, segments.pair) for index, segments in members]
        if len(pairs) == 1:
            pairs = [(ALL_ROWS, members[0][1].pair)]
        return StaticPairSegments(static_pair(pairs, math.prod(shape), steps), members[0][1].layer, shape)

    @property
    def length(self) -> int:
        new = self.pair.new[self.layer]
        return self.pair.length + (0 if new is None else new[0].length)

    def tensors(self) -> list[torch.Tensor]:
        return self.pair.tensors(self.layer)

    @property
    def logical_bytes(self) -> int:
        return self.pair.logical_bytes(self.layer)


@dataclass(frozen=True)
class MiniCacheKivi(MiniCache):
    """MiniCache with quantized directions and quantized unmerged layers.

    Attributes:
        start, t, gamma, retention: See :class:`.minicache.storage.MiniCache`.
        bits, group, residual: See :class:`.kivi.Kivi`.
    """

    id: ClassVar[str] = "MiniCacheKivi"
    bits: Annotated[int, OneOf((2, 4, 8))] = 4
    group: PositiveInt = 32
    residual: PositiveInt = 128

    version: ClassVar[int] = CURRENT_VERSIONS["MiniCacheKivi"]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.kivi  # noqa: B018  the bits' settings are checked there

    @property
    def kivi(self) -> Kivi:
        """Storage of the layers that are not merged."""
        return Kivi(self.bits, self.group, self.residual)

    @property
    def name(self) -> str:
        return f"minicache_kivi{self.bits}"

    def new_layers(self, num_layers: int) -> Sequence[LayerStorage]:
        start, unmerged = self.first_pair(num_layers), self.kivi.new_layers(num_layers)
        layers: list[LayerStorage] = list(unmerged[:start])
        while len(layers) + 1 < num_layers:
            layers += self._new_pair()
        return layers + list(unmerged[len(layers) :])

    def _new_pair(self) -> list[LayerStorage]:
        pairs: list[Pair] = []  # the current pair, created by the lower layer, which is written first

        def directions(x: torch.Tensor, is_keys: bool, capacity: int) -> Directions:
            return QuantizedDirections(x, self.bits, self.group, is_keys, capacity)

        def lower() -> Segments:
            pairs[:] = [Pair(self.t, self.gamma, self.retention, self.residual, directions)]
            return PairSegments(pairs[0], 0)

        return [SegmentedLayer(lower), SegmentedLayer(lambda: PairSegments(pairs.pop(), 1))]

    def bytes_formula(self, tokens: Sequence[int], heads: int, shape: KVShape, new_tokens: int = 0) -> int:
        """Return the bytes of KIVI layers and of pairs: codes of one layer, four magnitudes per token, retained tokens.

        With ``top_ratio`` the share ``gamma`` of the first merged tokens, usually the prompt's, is retained. For the
        range rules the number depends on the data, and the formula counts no retained tokens.
        """
        return self._bytes(tokens, heads, shape, new_tokens, readers=1)

    def _bytes(self, tokens: Sequence[int], heads: int, shape: KVShape, new_tokens: int, readers: int) -> int:
        size, wide, narrow = shape.element_bytes, shape.head_dim, shape.value_dim
        start = self.first_pair(len(tokens))
        pairs = (len(tokens) - start) // 2
        single = [*tokens[:start], *tokens[start + 2 * pairs :]]
        total = self.kivi.bytes_formula(single, heads, shape, new_tokens)
        for count in tokens[start : start + 2 * pairs : 2]:
            merged, prompt = count - count % self.residual, count - new_tokens
            first_merged = prompt - prompt % self.residual or min(merged, self.residual)
            retained = merged
            if self.gamma < 1:
                retained = math.ceil(self.gamma * first_merged) if self.retention == "top_ratio" else 0
            groups = merged // self.group * wide + merged * (narrow // min(self.group, narrow))
            codes = merged * (wide + narrow) * self.bits // 8 + 2 * 2 * groups
            unmerged = 2 * (count - merged) * (wide + narrow) * size
            shared = codes + 2 * retained * 4
            total += heads * (readers * shared + 4 * merged * size + 2 * retained * (wide + narrow) * size + unmerged)
        return total
