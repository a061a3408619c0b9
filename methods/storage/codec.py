"""Interface of codecs, which represent single keys or values by planes: codes, and a scale.

A codec may rotate vectors before it encodes them: a decode step then rotates its query and its output instead of every
stored vector.

Legend: N segments (heads of all rows), B batch rows, H stored heads, S slots, n tokens, D channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..cache.rotary import Rotary

Constants = list[torch.Tensor]
"""Tensors [N, ...] with one entry per segment."""


@dataclass(frozen=True)
class KernelOperands:
    """Keys or values of all slots, as the kernel for decode steps reads them.

    Attributes:
        codes: [slots, bytes] uint8 or float8, contiguous.
        dim: Channels.
        scale: [slots] float16, of each vector; [N] float32, of each segment; None: 1.
        table: [2 ** bits] float32, number of each index; None: FP8.
        high: [slots, D / 8] uint8, third bits of 3-bit codes; None: other codes.
    """

    codes: torch.Tensor
    dim: int
    scale: torch.Tensor | None = None
    table: torch.Tensor | None = None
    high: torch.Tensor | None = None


class TokenCodec(ABC):
    """Representation of single vectors by planes.

    Attributes:
        planes: Number of planes.
    """

    planes: int

    def __deepcopy__(self, memo: dict[int, object]) -> TokenCodec:
        """Return the codec itself, which has no state of a cache."""
        return self

    def of_layer(self, rotary: Callable[[], Rotary]) -> TokenCodec:
        """Return the codec for one layer of a model, whose keys ``rotary()`` rotates by positions."""
        return self

    def fit(self, x: torch.Tensor, valid: torch.Tensor | None) -> Constants:
        """Return the constants of all segments from a prompt [B, H, S, D]; ``valid`` [B, 1 or H, S] or None."""
        return []

    @abstractmethod
    def encode(self, x: torch.Tensor, constants: Constants, start: int | torch.Tensor = 0) -> Sequence[torch.Tensor]:
        """Return the planes [N, n, ...] of vectors [N, n, D], the first of which is number ``start`` (or [N])."""

    @abstractmethod
    def decode(
        self, planes: Sequence[torch.Tensor], constants: Constants, dtype: torch.dtype, start: int = 0
    ) -> torch.Tensor:
        """Return the rotated vectors [N, n, D] of planes, the first of which is number ``start``."""

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate vectors [..., D] into the coordinates of the codes."""
        return x

    def unrotate(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate vectors [..., D] back."""
        return x

    def kernel_problem(self, dim: int) -> str | None:
        """Return why no kernel reads the planes of vectors of ``dim`` channels; None: there is one."""
        return None

    @abstractmethod
    def kernel_operands(self, planes: Sequence[torch.Tensor], constants: Constants) -> Any:
        """Return what :meth:`kernel` reads, of planes [slots, ...]."""

    def kernel(self) -> Callable[..., torch.Tensor]:
        """Return the attention of a decode step over keys of this codec and values of its storage's other codec."""
        from .kernels.coded import coded_attention

        return coded_attention

    @abstractmethod
    def token_bytes(self, dim: int) -> int:
        """Return the bytes of a vector of ``dim`` channels."""

    def segment_bytes(self, dim: int) -> int:
        """Return the bytes of the constants of a segment."""
        return 0
