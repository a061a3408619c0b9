"""Layer-Condensed KV Cache (Wu and Tu, 2024, arXiv 2405.10637): the middle layers attend over the top one's cache.

Section 3.1: the queries of all layers of a condensed block meet the keys and values of its top layer; ``warmup``
layers, half below and half above it, keep standard attention. A token's own keys and values do not exist yet when the
lower layers run, so those layers do not see the token itself, and the first token sees nothing.

A decode step is one ordinary pass. A prompt, or a training sequence, is encoded by repeated passes over the block
(section 3.2): ``iter_forward + iter_backward`` of them, of which the last ``iter_backward`` carry gradients. That
converges to what feeding tokens one by one gives, which ``encode=exact`` computes in full.

The published code exists in two variants (``style``): ``fresh`` (its main branch) hides a token from itself where the
source is above; ``paper`` (the paper's) does so in every layer, and the top layer attends over the pass before. Its
main branch must not be taken as an oracle: its first row sees the future, and its decoding does not match its
encoding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from ...conf.errors import InputError
from ...conf.options import NonNegativeFloat, NonNegativeInt, OneOf
from .base import Encoded
from .plan import UPWARD_STYLES


@dataclass(frozen=True)
class LCKV(Encoded):
    """The map, and how sequences are encoded.

    Attributes:
        warmup: w; layers with standard attention, half of them (rounded down) below the block.
        kv_loss_weight: of the change of the shared keys and values in the last pass (0 in the paper's main runs).
        style: ``fresh`` or ``paper``.
    """

    id: ClassVar[str] = "LCKV"
    warmup: NonNegativeInt = 2
    kv_loss_weight: NonNegativeFloat = 0.0
    style: Annotated[str, OneOf(UPWARD_STYLES)] = "fresh"

    @property
    def label(self) -> str:
        return f"lckv-w{self.warmup}" + ("-paper" if self.style == "paper" else "")

    def source(self, layers: int) -> list[int]:
        if self.warmup > layers - 2:
            raise InputError(
                "method.sharing.warmup", self.warmup, f"leaves no two of {layers} layers to share; at most {layers - 2}"
            )
        below = self.warmup // 2
        top = layers - (self.warmup - below) - 1
        return [i if i < below or i > top else top for i in range(layers)]

    def further(self, shape: Mapping[str, Any]) -> dict[str, Any]:
        own = {"kv_loss_weight": float(self.kv_loss_weight), "upward_style": self.style}
        return super().further(shape) | own
