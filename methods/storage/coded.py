"""Storages that represent each key and each value by codes of its own, chosen once when the token is stored.

See :mod:`.codec` for how a vector becomes codes. On a CPU a decode step decodes a chunk of tokens at a time; on CUDA a
kernel decodes them in registers.

Legend: N segments (heads of all rows), B batch rows, H stored heads, H_q query heads, g query heads per segment,
S slots, n new tokens, D channels.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ..cache.kv_shape import KVShape
from ..cache.logits import LogitRule
from ..cache.products import CHUNK_ELEMENTS
from ..cache.rotary import Rotary
from .base import Storage
from .codec import Constants, TokenCodec
from .planes import PlaneSegments, StaticPlanes, capacities
from .segmented import SegmentedLayer
from .segments import Groups
from .static import StaticSegments
from .step_attention import uses_kernel

CUDA_CHUNK_ELEMENTS = 256 * CHUNK_ELEMENTS
"""Elements that are decoded at a time on CUDA, where a small chunk costs more time to launch than to compute."""


@dataclass(frozen=True)
class CodedTokens:
    """Codes of N segments.

    Attributes:
        codecs: Of keys and of values.
        constants: Of keys and of values.
        planes: [N, S, ...], those of keys and then those of values; empty where only the constants are needed.
    """

    codecs: tuple[TokenCodec, TokenCodec]
    constants: tuple[Constants, Constants]
    planes: Sequence[torch.Tensor] = ()

    def encode(self, keys: torch.Tensor, values: torch.Tensor, start: int | torch.Tensor) -> list[torch.Tensor]:
        """Return the planes [N, n, ...] of new tokens [N, n, D], after ``start`` others."""
        vectors = zip(self.codecs, (keys, values), self.constants, strict=True)
        return [plane for codec, x, constants in vectors for plane in codec.encode(x, constants, start)]

    def kernel_problem(self, dim: int) -> str | None:
        """Return why no kernel reads the planes of keys of ``dim`` channels; None: there is one."""
        return self.codecs[0].kernel_problem(dim)

    def take(self, index: torch.Tensor) -> CodedTokens:
        """Return some of the segments without their tokens, [M] int64."""
        keys, values = ([x[index] for x in constants] for constants in self.constants)
        return CodedTokens(self.codecs, (keys, values))

    def decode(self, part: int, slots: slice, dtype: torch.dtype) -> torch.Tensor:
        """Return the rotated keys (part 0) or values (part 1) of some slots, [N, n, D]."""
        first = self.codecs[0].planes
        planes = self.planes[:first] if part == 0 else self.planes[first:]
        return self.codecs[part].decode([x[:, slots] for x in planes], self.constants[part], dtype, slots.start or 0)

    def read(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values [N, S, D]."""
        acc_dtype = torch.promote_types(dtype, torch.float32)
        keys, values = (
            codec.unrotate(self.decode(part, slice(None), acc_dtype)).to(dtype)
            for part, codec in enumerate(self.codecs)
        )
        return keys, values

    def attend(
        self, query: torch.Tensor, rule: LogitRule, shape: tuple[int, int], visible: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attend with one query per query head, decoding a chunk of tokens at a time.

        Args:
            query: [N, g, D].
            rule: How logits are computed.
            shape: Rows and heads, of which N is the product.
            visible: [N, S] bool, True where a slot holds a token; None: everywhere.

        Returns:
            [N, g, D_v].
        """
        acc_dtype = torch.promote_types(query.dtype, torch.float32)
        q = self.codecs[0].rotate(query.to(acc_dtype))  # [N, g, D]
        chunks = list(self._chunks(query))
        products = [torch.matmul(q, self.decode(0, slots, acc_dtype).transpose(1, 2)) for slots in chunks]
        logits = rule.logits(torch.cat(products, dim=-1))  # [N, g, S]
        if visible is not None:
            logits = logits.masked_fill(~visible[:, None], float("-inf"))
        weights = rule.weights(logits.unflatten(0, shape), head_dims=2).flatten(0, 1)  # [N, g, S]
        sums = [torch.matmul(weights[..., slots], self.decode(1, slots, acc_dtype)) for slots in chunks]
        return self.codecs[1].unrotate(torch.stack(sums).sum(0)).to(query.dtype)  # [N, g, D_v]

    def attend_by_kernel(
        self,
        query: torch.Tensor,
        rule: LogitRule,
        shape: tuple[int, int],
        slots: tuple[torch.Tensor, torch.Tensor, int],
        visible: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend with one query per query head, by one kernel over planes [slots, ...] of all segments.

        Args:
            query: [B, H_q, 1, D].
            rule: How logits are computed.
            shape: Rows and heads, of which N is the product.
            slots: First slot and number of used slots of each segment, [N] int64 each, and the largest number of slots.
            visible: [N, S] bool, True where a used slot holds a token; None: everywhere.

        Returns:
            [B, H_q, 1, D_v].
        """
        first = self.codecs[0].planes
        keys, values = (
            codec.kernel_operands(planes, constants)
            for codec, planes, constants in zip(
                self.codecs, (self.planes[:first], self.planes[first:]), self.constants, strict=True
            )
        )
        out = self.codecs[0].kernel()(
            self.codecs[0].rotate(query.float()).to(query.dtype), keys, values, shape, *slots, rule, visible
        )
        return self.codecs[1].unrotate(out).to(query.dtype)

    def _chunks(self, query: torch.Tensor) -> Iterator[slice]:
        """Yield slices of slots of which few enough elements are decoded at a time."""
        slots = self.planes[0].shape[1]
        elements = CUDA_CHUNK_ELEMENTS if query.is_cuda else CHUNK_ELEMENTS
        step = max(1, elements // (query.shape[0] * query.shape[2]))
        yield from (slice(start, min(slots, start + step)) for start in range(0, slots, step))


class CodedSegments(PlaneSegments):
    """Segments of equal length, encoded.

    Args:
        coded: Codecs and constants of the segments.
        dtype: Compute dtype.
    """

    def __init__(self, coded: CodedTokens, dtype: torch.dtype):
        super().__init__()
        self._coded, self._dtype = coded, dtype

    @property
    def coded(self) -> CodedTokens:
        """The segments with their tokens."""
        return CodedTokens(self._coded.codecs, self._coded.constants, self.stored)

    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> Sequence[torch.Tensor]:
        return self._coded.encode(keys, values, self.length)

    def empty(self, index: torch.Tensor) -> PlaneSegments:
        return CodedSegments(self._coded.take(index), self._dtype)

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.coded.read(self._dtype)

    def attend(self, query: torch.Tensor, rule: LogitRule) -> torch.Tensor:
        if query.shape[2] > 1:
            return super().attend(query, rule)
        if uses_kernel(query, 1, query.shape[3], layout_problem=self._coded.kernel_problem(query.shape[3])):
            segments, room = self._buffers[0].whole.shape[:2]
            starts = torch.arange(0, segments * room, room, device=query.device)
            ends = torch.full_like(starts, self.length)
            planes = [x.whole.flatten(0, 1) for x in self._buffers]
            coded = CodedTokens(self._coded.codecs, self._coded.constants, planes)
            return coded.attend_by_kernel(query, rule, (segments, 1), (starts, ends, self.length))
        return self.coded.attend(query[:, :, 0], rule, (len(query), 1))[:, :, None]

    @classmethod
    def static(
        cls, groups: Groups, shape: tuple[int, int], steps: int, limits: torch.Tensor | None = None
    ) -> StaticSegments:
        return StaticCoded(groups, shape, capacities(groups, steps, limits), drops=limits is not None)

    def tensors(self) -> list[torch.Tensor]:
        return [*super().tensors(), *self._coded.constants[0], *self._coded.constants[1]]

    @property
    def logical_bytes(self) -> int:
        return super().logical_bytes + _constant_bytes(self._coded)


class StaticCoded(StaticPlanes):
    """Encoded segments one after another in one tensor per plane; see :class:`.planes.StaticPlanes`."""

    def __init__(self, groups: Groups, shape: tuple[int, int], capacities: torch.Tensor, drops: bool = False):
        super().__init__(groups, shape, capacities, drops)
        coded = [(index, segments) for index, segments in groups if isinstance(segments, CodedSegments)]
        self._dtype = coded[0][1]._dtype
        first = coded[0][1]._coded
        keys, values = ([x.new_empty(len(capacities), *x.shape[1:]) for x in c] for c in first.constants)
        self._coded = CodedTokens(first.codecs, (keys, values))
        for index, segments in coded:
            for whole, part in zip(self._coded.constants, segments._coded.constants, strict=True):
                for x, y in zip(whole, part, strict=True):
                    x[index] = y

    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> Sequence[torch.Tensor]:
        return self._coded.encode(keys, values, self.end)

    @property
    def coded(self) -> CodedTokens:
        """The segments with all their slots."""
        return CodedTokens(self._coded.codecs, self._coded.constants, self.stored)

    def read(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return *self.coded.read(self._dtype), self.valid

    def attend(self, query: torch.Tensor, rule: LogitRule) -> torch.Tensor:
        if uses_kernel(query, self.shape[1], query.shape[3], layout_problem=self._coded.kernel_problem(query.shape[3])):
            coded = CodedTokens(self._coded.codecs, self._coded.constants, self._planes)
            return coded.attend_by_kernel(query, rule, self.shape, (self._starts, self.end, self._width), self._valid)
        q = query.reshape(len(self.length), -1, query.shape[3])  # [N, g, D]
        return self.coded.attend(q, rule, self.shape, self.valid).reshape(*query.shape[:3], -1)

    def tensors(self) -> list[torch.Tensor]:
        return [*super().tensors(), *self._coded.constants[0], *self._coded.constants[1]]

    @property
    def logical_bytes(self) -> int:
        return super().logical_bytes + _constant_bytes(self._coded)


class CodedLayer(SegmentedLayer):
    """A layer of encoded segments.

    Args:
        codecs: Of keys and of values.
    """

    def __init__(self, codecs: tuple[TokenCodec, TokenCodec]):
        super().__init__(partial(CodedSegments, CodedTokens(codecs, ([], [])), torch.float32))  # until the first write
        self._codecs = codecs

    def bind(self, rotary: Callable[[], Rotary]) -> None:
        keys, values = (codec.of_layer(rotary) for codec in self._codecs)
        self._codecs = keys, values

    def write(self, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor | None = None) -> None:
        fitted = [codec.fit(x, valid) for codec, x in zip(self._codecs, (keys, values), strict=True)]
        self._new = partial(CodedSegments, CodedTokens(self._codecs, (fitted[0], fitted[1])), keys.dtype)
        super().write(keys, values, valid)


class CodedStorage(Storage):
    """Base class of the configurations of encoded storages."""

    @abstractmethod
    def codecs(self) -> tuple[TokenCodec, TokenCodec]:
        """Return the codecs of keys and of values."""

    def new_layers(self, num_layers: int) -> Sequence[CodedLayer]:
        codecs = self.codecs()
        return [CodedLayer(codecs) for _ in range(num_layers)]

    def bytes_formula(self, tokens: Sequence[int], heads: int, shape: KVShape, new_tokens: int = 0) -> int:
        """Return the sum over layers of heads x (tokens x bytes of a token + bytes of the constants)."""
        parts = list(zip(self.codecs(), (shape.head_dim, shape.value_dim), strict=True))
        token = sum(codec.token_bytes(dim) for codec, dim in parts)
        segment = sum(codec.segment_bytes(dim) for codec, dim in parts)
        return heads * (token * sum(tokens) + segment * len(tokens))


def _constant_bytes(coded: CodedTokens) -> int:
    return sum(x.nbytes for constants in coded.constants for x in constants)
