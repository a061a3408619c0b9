"""KVQuant without calibration (after Hooper et al., 2024, arXiv 2401.18079): pre-RoPE keys per channel, and outliers.

Sections 3.1 to 3.5: RoPE mixes pairs of channels by amounts that depend on the position, so keys are quantized before
it, per channel, and rotated when they are read. Values are quantized per token. Levels are not uniform, the largest
deviations of a vector are stored apart, and the first token, an attention sink, is not quantized.

What differs from the paper: ranges come from the prompt at hand instead of a calibration set, and stay for generated
tokens; levels are those of a Gaussian without its outliers (Lloyd-Max), not k-means weighted by squared gradients;
every vector has the same number of outliers, its largest deviations.

Legend: N segments (heads of all rows), B batch rows, H stored heads, S slots, n tokens, D channels, m outliers.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch

from ...conf.errors import InputError, require
from ...conf.options import Bounds, OneOf, PositiveInt
from ..cache.kv_shape import KVShape
from ..cache.rotary import Rotary
from .base import StorageCapabilities
from .codec import Constants, TokenCodec
from .coded import CodedStorage
from .lloyd_max import channels_of, code_bytes_problem, lloyd_max, look_up, lookup_table, nearest_codes, pack_planes
from .packed import FLOAT16_MAX

if TYPE_CHECKING:
    from .kernels.outliers import OutlierOperands

MAX_KERNEL_OUTLIERS = 8
"""Largest number of outliers of a vector that the kernel reads: each costs it an operation for every number."""
CHANNELS_PER_OUTLIER = 100
"""Channels of which one is stored apart: the paper's share of 1 %."""


@cache
def gaussian_levels(bits: int, share: float) -> torch.Tensor:
    """Return the Lloyd-Max levels of a Gaussian without its largest deviations, in units of the largest that is left.

    Args:
        bits: Bits of a code.
        share: Share of the numbers that are left out, half of it on each side.

    Returns:
        [2 ** bits] float64, increasing, between -1 and 1.
    """
    top = float(torch.special.ndtri(torch.tensor(1 - share / 2, dtype=torch.float64)))

    def density(t: torch.Tensor) -> torch.Tensor:
        return (-(t**2) / 2).exp() / math.sqrt(2 * math.pi)

    return lloyd_max(bits, torch.special.ndtr, lambda t: -density(t), density, top, spread=top) / top


class OutlierCodec(TokenCodec):
    """Codec whose vectors have m outliers: codes, the outliers in float16, and their channels.

    Args:
        bits, outliers, sinks: See :class:`KVQuant`.
    """

    def __init__(self, bits: int, outliers: int | None, sinks: int):
        self.bits, self.outliers, self.sinks = bits, outliers, sinks
        self.code_planes = 2 if bits == 3 else 1
        self.planes = self.code_planes + 2
        self._on_device: dict[tuple[object, ...], torch.Tensor] = {}

    def fit(self, x: torch.Tensor, valid: torch.Tensor | None) -> Constants:
        rows, heads, slots, dim = x.shape
        self._check(dim)
        for dtype in {torch.float32, torch.promote_types(x.dtype, torch.float32)}:  # before a step is captured
            for name in ("levels", "table"):
                self._constant(name, x.device, dim, dtype)
        first = torch.zeros(rows, heads, dtype=torch.int64, device=x.device)  # slot of the first token
        if valid is not None:
            first = valid.int().argmax(-1).expand(rows, heads)
        position = torch.arange(slots, device=x.device) - first[..., None]  # [B, H, S]; negative: padding
        sink = x.gather(2, first[..., None, None].expand(-1, -1, 1, dim))[:, :, : self.sinks]
        return [sink.flatten(0, 1).clone(), *self.ranges(x.flatten(0, 1), position.flatten(0, 1))]

    def _check(self, dim: int) -> None:
        if code_bytes_problem(dim, self.bits):
            allowed = f"does not fill whole bytes with the model's head_dim of {dim}"
            raise InputError("method.storage.bits", self.bits, allowed)
        allowed = f"must be below the model's head_dim of {dim}, which must be at most 256"
        require(self._count(dim) < dim <= 256, "method.storage.outliers", self.outliers, allowed)

    def _count(self, dim: int) -> int:
        """Return m, the number of outliers of vectors of ``dim`` channels."""
        return -(-dim // CHANNELS_PER_OUTLIER) if self.outliers is None else self.outliers

    @abstractmethod
    def ranges(self, x: torch.Tensor, position: torch.Tensor) -> Constants:
        """Return further constants from prompt vectors [N, S, D] at positions [N, S]; negative: padding."""

    def encode_numbers(self, x: torch.Tensor, normalized: torch.Tensor, channels: torch.Tensor) -> list[torch.Tensor]:
        """Return the planes of vectors [N, n, D], whose outliers are in ``channels`` [N, n, m]."""
        levels = self._constant("levels", x.device, x.shape[-1], torch.float32)
        codes = pack_planes(nearest_codes(normalized, levels), self.bits)
        outliers = x.gather(-1, channels).clamp(-FLOAT16_MAX, FLOAT16_MAX).half()
        return [*codes, outliers, channels.to(torch.uint8)]

    def decode_numbers(
        self, planes: Sequence[torch.Tensor], middle: torch.Tensor, half: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """Return vectors [N, n, D] with their outliers, of ranges that broadcast to them."""
        table = self._constant("table", planes[0].device, channels_of(planes[0], self.bits), dtype)
        x = look_up(planes[: self.code_planes], table)
        x = x.mul_(half.to(dtype)).add_(middle.to(dtype))
        outliers, channels = planes[self.code_planes : self.code_planes + 2]
        return x.scatter_(-1, channels.long(), outliers.to(dtype))

    def with_sink(self, x: torch.Tensor, constants: Constants, start: int) -> torch.Tensor:
        """Overwrite the first token of vectors [N, n, D] that begin at slot ``start``, in place."""
        if start == 0 and self.sinks:
            x[:, :1] = constants[0].to(x.dtype)
        return x

    def _constant(self, name: str, device: torch.device, dim: int, dtype: torch.dtype) -> torch.Tensor:
        key = (name, device, dim, dtype)
        if key not in self._on_device:
            levels = gaussian_levels(self.bits, self._count(dim) / dim)
            self._on_device[key] = (levels if name == "levels" else lookup_table(levels)).to(device, dtype)
        return self._on_device[key]

    def kernel(self) -> Callable[..., torch.Tensor]:
        from .kernels.outliers import outlier_attention

        return outlier_attention

    def operands(
        self,
        planes: Sequence[torch.Tensor],
        constants: Constants,
        middle: torch.Tensor,
        half: torch.Tensor,
        inv_freq: torch.Tensor | None = None,
    ) -> OutlierOperands:
        """Return what the kernel reads; arguments as in :class:`.kernels.outliers.OutlierOperands`."""
        from .kernels.outliers import OutlierOperands

        dim, high = channels_of(planes[0], self.bits), planes[1] if self.bits == 3 else None
        outliers, channels = planes[self.code_planes : self.code_planes + 2]
        levels = self._constant("levels", planes[0].device, dim, torch.float32)
        return OutlierOperands(dim, planes[0], high, outliers, channels, middle, half, constants[0], levels, inv_freq)

    def token_bytes(self, dim: int) -> int:
        return dim * self.bits // 8 + 3 * self._count(dim)


def largest(deviation: torch.Tensor, count: int) -> torch.Tensor:
    """Return the indices of the ``count`` largest deviations, the lower index of equal ones first."""
    return deviation.sort(dim=-1, descending=True, stable=True).indices[..., :count]


class KeyCodec(OutlierCodec):
    """Codec of keys: per channel, before RoPE.

    Args:
        rotary: Rotation of a layer's keys; None: not known yet.
    """

    def __init__(self, bits: int, outliers: int | None, sinks: int, rotary: Rotary | None = None):
        super().__init__(bits, outliers, sinks)
        self.rotary = rotary

    def of_layer(self, rotary: Callable[[], Rotary]) -> TokenCodec:
        return KeyCodec(self.bits, self.outliers, self.sinks, rotary())

    def _rotated(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Rotate vectors [N, n, D] by positions [1 or N, n]."""
        return x if self.rotary is None else self.rotary.rotate(x[:, None], position)[:, 0]

    def ranges(self, x: torch.Tensor, position: torch.Tensor) -> Constants:
        """Return middle and half of the range of each channel, [N, D]: between the quantiles m / D / 2 at both ends."""
        is_counted = position >= self.sinks  # [N, S]
        raw = self._rotated(x.float(), -position).masked_fill(~is_counted[..., None], float("inf"))
        raw = raw.sort(dim=1).values  # [N, S, D], padding last
        last = is_counted.sum(1, keepdim=True).clamp(min=1) - 1  # [N, 1]
        tail = self._count(x.shape[-1]) / x.shape[-1] / 2
        ends = ((tail * last).floor().long(), ((1 - tail) * last).ceil().long())
        low, high = (raw.gather(1, i[..., None].expand(-1, -1, x.shape[-1]))[:, 0] for i in ends)  # [N, D]
        low, high = (torch.where(x.isfinite(), x, 0) for x in (low, high))  # a prompt without further tokens
        return list(_ranges_of(low, high))

    def encode(self, x: torch.Tensor, constants: Constants, start: int | torch.Tensor = 0) -> Sequence[torch.Tensor]:
        position = torch.arange(x.shape[1], device=x.device) + torch.as_tensor(start, device=x.device).reshape(-1, 1)
        raw = self._rotated(x.float(), -position)  # [N, n, D]
        middle, half = (c.float()[:, None] for c in constants[1:])  # [N, 1, D]
        normalized = (raw - middle) / half
        return self.encode_numbers(raw, normalized, largest(normalized.abs(), self._count(x.shape[-1])))

    def decode(
        self, planes: Sequence[torch.Tensor], constants: Constants, dtype: torch.dtype, start: int = 0
    ) -> torch.Tensor:
        middle, half = (c[:, None] for c in constants[1:])
        raw = self.decode_numbers(planes, middle, half, dtype)
        position = torch.arange(start, start + raw.shape[1], device=raw.device)[None]
        return self.with_sink(self._rotated(raw, position), constants, start)

    def kernel_problem(self, dim: int) -> str | None:
        if self._count(dim) > MAX_KERNEL_OUTLIERS:
            return f"more than {MAX_KERNEL_OUTLIERS} outliers"
        if code_bytes_problem(dim // 2, self.bits) or dim % 2:
            return f"half a key ({dim / 2:g} codes of {self.bits} bits) does not fill whole bytes"
        rotary = self.rotary
        if rotary is not None and rotary.dim and (rotary.interleaved or rotary.dim < dim):
            return "RoPE that is interleaved or of some channels alone"
        return None

    def kernel_operands(self, planes: Sequence[torch.Tensor], constants: Constants) -> OutlierOperands:
        rotary = self.rotary
        inv_freq = None if rotary is None or not rotary.dim else rotary.inv_freq(planes[0].device)
        return self.operands(planes, constants, constants[1], constants[2], inv_freq)

    def segment_bytes(self, dim: int) -> int:
        return 4 * dim


class ValueCodec(OutlierCodec):
    """Codec of values: per token, over the channels that are no outliers."""

    def __init__(self, bits: int, outliers: int | None, sinks: int):
        super().__init__(bits, outliers, sinks)
        self.planes += 2

    def ranges(self, x: torch.Tensor, position: torch.Tensor) -> Constants:
        return []

    def encode(self, x: torch.Tensor, constants: Constants, start: int | torch.Tensor = 0) -> Sequence[torch.Tensor]:
        x = x.float()
        # In float64, so that the order of a sum, which depends on the batch, decides no outlier.
        deviation = (x - x.double().mean(-1, keepdim=True)).abs()
        channels = largest(deviation, self._count(x.shape[-1]))  # [N, n, m]
        low = x.scatter(-1, channels, float("inf")).amin(-1)  # [N, n]
        high = x.scatter(-1, channels, float("-inf")).amax(-1)
        middle, half = _ranges_of(low, high)
        normalized = (x - middle.float()[..., None]) / half.float()[..., None]
        return [*self.encode_numbers(x, normalized, channels), middle, half]

    def decode(
        self, planes: Sequence[torch.Tensor], constants: Constants, dtype: torch.dtype, start: int = 0
    ) -> torch.Tensor:
        middle, half = (p[..., None] for p in planes[-2:])
        return self.with_sink(self.decode_numbers(planes, middle, half, dtype), constants, start)

    def kernel_operands(self, planes: Sequence[torch.Tensor], constants: Constants) -> OutlierOperands:
        return self.operands(planes, constants, planes[-2], planes[-1])

    def token_bytes(self, dim: int) -> int:
        return super().token_bytes(dim) + 4


def _ranges_of(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return middle and half of ranges in float16; the half of a range without width is 1."""
    middle, half = ((x / 2).clamp(-FLOAT16_MAX, FLOAT16_MAX).half() for x in (low + high, high - low))
    return middle, torch.where(half > 0, half, torch.ones_like(half))


@dataclass(frozen=True)
class KVQuant(CodedStorage):
    """KVQuant-like storage.

    Attributes:
        bits: Bits per code: 2, 3 or 4.
        outliers: Numbers of each key and each value that are stored apart, m; None: 1 % of its channels, the paper's
            share, rounded up (1 of 64 channels, 2 of 128).
        sinks: 1: the first token is not quantized; 0: it is.
    """

    id: ClassVar[str] = "KVQuant"
    bits: Annotated[int, OneOf((2, 3, 4))] = 4
    outliers: PositiveInt | None = None
    sinks: Annotated[int, Bounds(ge=0, le=1)] = 1

    @property
    def name(self) -> str:
        return f"kvquant{self.bits}"

    @cached_property
    def capabilities(self) -> StorageCapabilities:
        needs = "ranges of the prompt's keys before RoPE"
        return StorageCapabilities(rounds_once=True, fits_prompt=True, counts_positions=True, needs=needs)

    def codecs(self) -> tuple[TokenCodec, TokenCodec]:
        parts = self.bits, self.outliers, self.sinks
        return KeyCodec(*parts), ValueCodec(*parts)

    def bytes_formula(self, tokens: Sequence[int], heads: int, shape: KVShape, new_tokens: int = 0) -> int:
        """Return the bytes of codes, outliers and ranges, and of an unquantized first token per head."""
        sinks = heads * len(tokens) * self.sinks * shape.token_channels * shape.element_bytes
        return super().bytes_formula(tokens, heads, shape, new_tokens) + sinks
