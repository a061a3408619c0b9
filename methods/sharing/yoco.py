"""YOCO (Sun et al., 2024, arXiv 2405.05254): one set of keys and values for the upper half of the model.

Section 2: the lower half (the self-decoder) has a memory of constant size, a sliding window or gated retention; the
layer above it makes keys and values once, from its own input through a norm of their own, and all upper layers (the
cross-decoder) attend over those. While a prompt is read only the self-decoder and those keys and values are needed for
all of its tokens; the upper layers run for the last one alone, which is exact.

The authors' code has RoPE frequencies of its own; here they are Llama's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from ...conf.errors import require
from ...conf.options import Bounds, OneOf, PositiveInt
from .base import Sharing
from .kv_map import FULL, LINEAR, SLIDING

WINDOW = 1024
MIXERS = {"swa": SLIDING, "gated_retention": LINEAR, "full": FULL}


@dataclass(frozen=True)
class YOCO(Sharing):
    """The map and the layer types.

    Attributes:
        self_layers: layers of the self-decoder; None: half of them.
        mixer: of the self-decoder: ``swa`` (sliding window), ``gated_retention``, or ``full`` (plain attention, a stage
            of converting a plain model).
        window: tokens that a sliding layer sees, the newest included; None: as the weights at hand, and 1024, as in the
            paper, in new ones.
        separate_kv_norm: keys and values have an RMSNorm of their own before them, in every layer that makes some.
    """

    id: ClassVar[str] = "YOCO"
    self_layers: PositiveInt | None = None
    mixer: Annotated[str, OneOf(MIXERS)] = "swa"
    window: Annotated[int, Bounds(ge=2)] | None = None
    separate_kv_norm: bool = True

    @property
    def label(self) -> str:
        return {"swa": "yoco", "gated_retention": "yoco-gret", "full": "yoco-full"}[self.mixer]

    def below(self, layers: int) -> int:
        """Layers of the self-decoder, of ``layers``."""
        below = layers // 2 if self.self_layers is None else self.self_layers
        require(1 <= below < layers, "method.sharing.self_layers", below, f"must be between 1 and {layers - 1}")
        return below

    def source(self, layers: int) -> list[int]:
        return [min(i, self.below(layers)) for i in range(layers)]

    def layer_types(self, layers: int) -> list[str]:
        return [MIXERS[self.mixer] if i < self.below(layers) else FULL for i in range(layers)]

    def further(self, shape: Mapping[str, Any]) -> dict[str, Any]:
        window = (self.window or WINDOW) if self.mixer == "swa" else None
        return {"sliding_window": window, "separate_kv_norm": self.separate_kv_norm}

    @property
    def left_open(self) -> tuple[str, ...]:
        return ("sliding_window",) if self.window is None else ()
