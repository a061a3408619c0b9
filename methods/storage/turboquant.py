"""TurboQuant (Zandieh et al., 2025, arXiv 2504.19874): a fixed rotation, and the optimal scalar codebook for it.

Section 3, the variant for mean squared error: after a random rotation R the coordinates of x / ||x|| have a known
distribution whatever the data, so one codebook (Lloyd-Max) fits all vectors and nothing is calibrated. Each coordinate
is stored as the index of its nearest level, each vector has one float16 gain, and tokens are independent. A decode step
rotates its query and its output, no stored vector.

The paper stores ||x|| as the gain, which shrinks inner products; the other gains correct this at the same bytes. Its
variant with one bit per coordinate for the residual has more variance at equal bits and is not implemented.

Legend: N segments (heads of all rows), n tokens, D channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Annotated, ClassVar, Literal

import torch

from ...conf.errors import InputError
from ...conf.options import OneOf
from .base import StorageCapabilities
from .codec import Constants, KernelOperands, TokenCodec
from .coded import CodedStorage
from .lloyd_max import channels_of, code_bytes_problem, lloyd_max, look_up, lookup_table, nearest_codes, pack_planes
from .packed import FLOAT16_MAX

Gain = Literal["norm", "unit", "least_squares", "unbiased"]
Rotation = Literal["hadamard", "dense", "none"]


def _mass(t: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the integral of (1 - s^2)^((D - 3) / 2) over s from 0 to t, by the recursion for powers of the cosine."""
    angle = t.asin()
    out = angle if dim % 2 == 0 else t.clone()  # of cos^0 or cos^1
    for power in range(2 + dim % 2, dim - 1, 2):
        out = (angle.cos() ** (power - 1) * t + (power - 1) * out) / power
    return out


@cache
def codebook(dim: int, bits: int) -> torch.Tensor:
    """Return the Lloyd-Max levels of a coordinate of a random unit vector in ``dim`` dimensions.

    The density is f(t) ~ (1 - t^2)^((D - 3) / 2).

    Returns:
        [2 ** bits] float64, increasing.
    """
    return lloyd_max(
        bits,
        mass=lambda t: _mass(t, dim),
        moment=lambda t: -((1 - t**2) ** ((dim - 1) / 2)) / (dim - 1),
        density=lambda t: (1 - t**2) ** ((dim - 3) / 2),
        top=1.0,
        spread=2.5 / math.sqrt(dim + 8),
    )


@cache
def rotation_matrix(dim: int, kind: Rotation) -> torch.Tensor:
    """Return the orthogonal matrix of a rotation, [D, D] float64; the same for all models, layers and heads.

    ``hadamard`` has random signs before Sylvester's matrix: without them a common offset of all channels would become
    one large coordinate.
    """
    generator = torch.Generator().manual_seed(0)
    if kind == "none":
        return torch.eye(dim, dtype=torch.float64)
    if kind == "dense":
        q, r = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))
        return q * r.diagonal().sign()
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < dim:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    signs = torch.where(torch.rand(dim, generator=generator) < 0.5, -1.0, 1.0).double()
    return hadamard * signs / math.sqrt(dim)


class TurboCodec(TokenCodec):
    """Codec of rotated vectors.

    Args:
        bits, gain, rotation: See :class:`TurboQuant`.
    """

    def __init__(self, bits: int, gain: Gain, rotation: Rotation):
        self.bits, self.gain, self.rotation = bits, gain, rotation
        self.planes = 3 if bits == 3 else 2
        self._on_device: dict[tuple[object, ...], torch.Tensor] = {}

    def fit(self, x: torch.Tensor, valid: torch.Tensor | None) -> Constants:
        dim = x.shape[-1]
        if self.rotation == "hadamard" and dim & (dim - 1):
            allowed = f"needs a head_dim that is a power of two, and the model's is {dim}; use dense"
            raise InputError("method.storage.rotation", self.rotation, allowed)
        if code_bytes_problem(dim, self.bits):
            allowed = f"does not fill whole bytes with the model's head_dim of {dim}"
            raise InputError("method.storage.bits", self.bits, allowed)
        for dtype in {torch.float32, torch.float64}:  # before a step is captured
            for name in ("rotation", "levels", "table"):
                self._constant(name, x.device, dim, dtype)
        return []

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.rotation == "none" else torch.matmul(x, self._matrix(x).T)

    def unrotate(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.rotation == "none" else torch.matmul(x, self._matrix(x))

    def encode(self, x: torch.Tensor, constants: Constants, start: int | torch.Tensor = 0) -> Sequence[torch.Tensor]:
        x = x.double()  # so that the order of a sum, which depends on the batch, decides no code and no gain
        norm = x.norm(dim=-1)  # [N, n]
        unit = self.rotate(x / torch.where(norm > 0, norm, torch.ones_like(norm))[..., None])  # [N, n, D]
        levels = self._constant("levels", x.device, x.shape[-1], torch.float64)
        codes = nearest_codes(unit, levels)
        gain = norm * self._correction(unit, levels[codes])
        return [*pack_planes(codes, self.bits), gain.clamp(max=FLOAT16_MAX).half()]

    def _correction(self, unit: torch.Tensor, nearest: torch.Tensor) -> torch.Tensor:
        """Return gain / ||x|| [N, n] for rotated unit vectors y and their levels c."""
        if self.gain == "norm":
            return torch.ones_like(unit[..., 0])
        if self.gain == "unit":
            return 1 / nearest.norm(dim=-1)
        product = (unit * nearest).sum(-1)
        return product / nearest.square().sum(-1) if self.gain == "least_squares" else 1 / product.clamp(min=1e-6)

    def decode(
        self, planes: Sequence[torch.Tensor], constants: Constants, dtype: torch.dtype, start: int = 0
    ) -> torch.Tensor:
        table = self._constant("table", planes[0].device, channels_of(planes[0], self.bits), dtype)
        numbers = look_up(planes[:-1], table)  # [N, n, D]
        return numbers.mul_(planes[-1].to(dtype)[..., None])

    def kernel_operands(self, planes: Sequence[torch.Tensor], constants: Constants) -> KernelOperands:
        dim = channels_of(planes[0], self.bits)
        levels = self._constant("levels", planes[0].device, dim, torch.float32)
        return KernelOperands(planes[0], dim, planes[-1], levels, planes[1] if self.bits == 3 else None)

    def _matrix(self, x: torch.Tensor) -> torch.Tensor:
        return self._constant("rotation", x.device, x.shape[-1], x.dtype)

    def _constant(self, name: str, device: torch.device, dim: int, dtype: torch.dtype) -> torch.Tensor:
        """Return the rotation, the levels or the numbers of each index, on a device; made once."""
        key = (name, device, dim, dtype)
        if key not in self._on_device:
            if name == "rotation":
                x = rotation_matrix(dim, self.rotation)
            else:
                x = codebook(dim, self.bits)
                if name == "table":
                    x = lookup_table(x)
            self._on_device[key] = x.to(device, dtype)
        return self._on_device[key]

    def token_bytes(self, dim: int) -> int:
        return dim * self.bits // 8 + 2


@dataclass(frozen=True)
class TurboQuant(CodedStorage):
    """TurboQuant storage.

    Attributes:
        bits: Bits per coordinate of keys, and of values unless ``value_bits`` is given: 2, 3 or 4.
        value_bits: Bits per coordinate of values; None: ``bits``.
        gain: Factor of a key's levels c for its rotated unit vector y: ``norm`` ||x|| (the paper's); ``unit``
            ||x|| / ||c||, which restores the norm; ``least_squares`` ||x|| <y, c> / ||c||^2, the smallest error;
            ``unbiased`` ||x|| / <y, c>, which restores the product of x with itself.
        value_gain: The same for values.
        rotation: ``hadamard``, with random signs, for a power of two; ``dense``, random, for any head_dim; ``none``.
    """

    id: ClassVar[str] = "TurboQuant"
    bits: Annotated[int, OneOf((2, 3, 4))] = 4
    value_bits: Annotated[int, OneOf((2, 3, 4))] | None = None
    gain: Gain = "unbiased"
    value_gain: Gain = "least_squares"
    rotation: Rotation = "hadamard"

    @property
    def name(self) -> str:
        values = "" if self.value_bits in (None, self.bits) else f"v{self.value_bits}"
        return f"turboquant{self.bits}{values}"

    @cached_property
    def capabilities(self) -> StorageCapabilities:
        needs = "a head_dim that is a power of two" if self.rotation == "hadamard" else ""
        return StorageCapabilities(rounds_once=True, needs=needs)

    def codecs(self) -> tuple[TokenCodec, TokenCodec]:
        values = TurboCodec(self.value_bits or self.bits, self.value_gain, self.rotation)
        return TurboCodec(self.bits, self.gain, self.rotation), values
