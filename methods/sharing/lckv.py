"""Layer-Condensed KV Cache (Wu and Tu, 2024, arXiv 2405.10637): middle layers attend over the top layer's cache.

Section 3.1: all layers of a condensed block attend over the keys and values of its top layer; ``warmup`` layers, half
below and half above the block, keep standard attention. A token's keys and values are not computed yet when the lower
layers run, so these layers do not attend to the token itself, and their output for the first token is zero.

A decode step is one ordinary pass. A prompt or a training sequence is encoded in ``iter_forward + iter_backward``
passes over the block (section 3.2), of which the last ``iter_backward`` have gradients. This converges to the result of
feeding tokens one by one, which ``encode=exact`` computes.

The published code has two variants (``style``). ``fresh`` (its main branch) is strictly causal where the source is a
higher layer. ``paper`` is strictly causal in every layer, and the top layer attends over the previous pass. The main
branch is not a reference for tests: its first row attends to future tokens, and its decoding does not match its
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
    """Condensed block with its top layer as KV source.

    Attributes:
        warmup: Layers with standard attention (w in the paper), half of them (rounded down) below the block.
        kv_loss_weight: Weight of the loss on the change of keys and values in the last pass (paper's main runs: 0).
        style: ``fresh`` or ``paper``.
    """

    id: ClassVar[str] = "LCKV"
    warmup: NonNegativeInt = 2
    kv_loss_weight: NonNegativeFloat = 0.0
    style: Annotated[str, OneOf(UPWARD_STYLES)] = "fresh"

    @property
    def label(self) -> str:
        return f"lckv-w{self.warmup}" + ("-paper" if self.style == "paper" else "")

    @property
    def needs(self) -> str:
        passes = f"{self.passes} passes" if self.passes else "a pass for each token"
        return f"{passes} over a prompt in the layers that share keys and values"

    def source(self, layers: int) -> list[int]:
        if self.warmup > layers - 2:
            raise InputError(
                "method.sharing.warmup", self.warmup, f"leaves no two of {layers} layers to share; at most {layers - 2}"
            )
        below = self.warmup // 2
        top = layers - (self.warmup - below) - 1
        return [i if i < below or i > top else top for i in range(layers)]

    def extra_config(self, shape: Mapping[str, Any]) -> dict[str, Any]:
        keys = {"kv_loss_weight": float(self.kv_loss_weight), "upward_style": self.style}
        return super().extra_config(shape) | keys
