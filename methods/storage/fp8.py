"""FP8 storage: keys and values in 8-bit floating point, e4m3 or e5m2.

A code is ``cast(clamp(x / scale, -M, M))`` with the largest finite number M of the format, and stands for
``code * scale``. The scale is 1, the largest magnitude of a prompt divided by M (of all heads of a layer or of one
head; constant for the generated tokens, which are clamped), or that of each vector by itself. Serving engines call
these a scale of 1.0, per-tensor, per-head and per-token-and-head scales.

Legend: N segments (heads of all rows), B batch rows, H stored heads, S slots, n new tokens, D channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch

from ...conf.errors import require
from .base import StorageCapabilities
from .codec import Constants, KernelOperands, TokenCodec
from .coded import CodedStorage

FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
SMALLEST_TOKEN_SCALE = 2.0**-14
"""Smallest normal float16 number; below it a float16 scale loses precision."""


class Fp8Codec(TokenCodec):
    """Codec of FP8 numbers.

    Args:
        format, scale: See :class:`Fp8`.
    """

    def __init__(self, format: str, scale: str):
        self.dtype, self.scale = FORMATS[format], scale
        self.largest = torch.finfo(self.dtype).max
        self.planes = 2 if scale == "token" else 1

    def fit(self, x: torch.Tensor, valid: torch.Tensor | None) -> Constants:
        if self.scale not in ("tensor", "head"):
            return []
        largest = x.abs().amax(-1)  # [B, H, S]
        if valid is not None:
            largest = largest.masked_fill(~valid, 0)
        largest = largest.amax(-1).float()  # [B, H]
        if self.scale == "tensor":
            largest = largest.amax(1, keepdim=True).expand_as(largest)
        return [self._scale(largest).flatten()]

    def _scale(self, largest: torch.Tensor) -> torch.Tensor:
        """Return the scales of numbers up to ``largest`` in magnitude."""
        scale = largest / self.largest
        return torch.where(scale > 0, scale, torch.ones_like(scale))

    def encode(self, x: torch.Tensor, constants: Constants, start: int | torch.Tensor = 0) -> Sequence[torch.Tensor]:
        x = x.float()
        if self.scale == "one":
            return [self._codes(x)]
        if constants:
            return [self._codes(x / constants[0][:, None, None])]
        scale = self._scale(x.abs().amax(-1)).clamp(SMALLEST_TOKEN_SCALE, torch.finfo(torch.float16).max).half()
        return [self._codes(x / scale.float()[..., None]), scale]  # [N, n, D], [N, n]

    def _codes(self, x: torch.Tensor) -> torch.Tensor:
        # Clamped, because what a cast makes of larger numbers depends on the format and on the device.
        return x.clamp(-self.largest, self.largest).to(self.dtype)

    def decode(
        self, planes: Sequence[torch.Tensor], constants: Constants, dtype: torch.dtype, start: int = 0
    ) -> torch.Tensor:
        x = planes[0].to(dtype)
        if self.scale == "one":
            return x
        scale = constants[0][:, None] if constants else planes[1]  # [N, 1 or n]
        return x.mul_(scale.to(dtype)[..., None])

    def kernel_operands(self, planes: Sequence[torch.Tensor], constants: Constants) -> KernelOperands:
        scale = None if self.scale == "one" else constants[0] if constants else planes[1]
        return KernelOperands(planes[0], planes[0].shape[1], scale)

    def token_bytes(self, dim: int) -> int:
        return dim + (2 if self.scale == "token" else 0)

    def segment_bytes(self, dim: int) -> int:
        return 4 if self.scale in ("tensor", "head") else 0


@dataclass(frozen=True)
class Fp8(CodedStorage):
    """FP8 storage.

    Attributes:
        format: ``e4m3`` (3 bits of mantissa, up to 448) or ``e5m2`` (2 bits, up to 57344).
        scale: ``one``: no scale; ``tensor`` or ``head``: of the prompt's numbers of a layer or of a head, in float32;
            ``token``: of each key and each value, in float16 (e4m3 only: those of e5m2 would be subnormal numbers).
    """

    id: ClassVar[str] = "Fp8"
    format: Literal["e4m3", "e5m2"] = "e4m3"
    scale: Literal["one", "tensor", "head", "token"] = "token"

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = "must be one, tensor or head with method.storage.format=e5m2, whose token scales float16 cannot hold"
        require(self.format == "e4m3" or self.scale != "token", "method.storage.scale", self.scale, allowed)

    @property
    def name(self) -> str:
        return "_".join(["fp8", *([self.format] * (self.format != "e4m3")), *([self.scale] * (self.scale != "token"))])

    @cached_property
    def capabilities(self) -> StorageCapabilities:
        fits = self.scale in ("tensor", "head")
        needs = "scales from the prompt's largest keys and values" if fits else ""
        return StorageCapabilities(rounds_once=True, fits_prompt=fits, needs=needs)

    def codecs(self) -> tuple[TokenCodec, TokenCodec]:
        return Fp8Codec(self.format, self.scale), Fp8Codec(self.format, self.scale)
