"""YOCO (Sun et al., 2024, arXiv 2405.05254): one set of keys and values for the upper half of the model.

Section 2: the lower half (the self-decoder) has a cache of constant size, a sliding window or gated retention. The next
layer computes keys and values once, from its own input with a separate norm, and all upper layers (the cross-decoder)
attend over them. In the prefill only the self-decoder and these keys and values are computed for all tokens; the upper
layers run only for the last token, which gives the same result.

The authors' code uses other RoPE frequencies; here they are Llama's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from ...conf.errors import require
from ...conf.options import Bounds, OneOf, PositiveInt
from .base import Sharing
from .kv_map import FULL, LINEAR, SLIDING

DEFAULT_WINDOW = 1024
MIXERS = {"swa": SLIDING, "gated_retention": LINEAR, "full": FULL}


@dataclass(frozen=True)
class YOCO(Sharing):
    """Self-decoder and cross-decoder.

    Attributes:
        self_layers: Layers of the self-decoder; None: half of the layers.
        mixer: Attention of the self-decoder: ``swa`` (sliding window), ``gated_retention``, or ``full`` (an
            intermediate stage when converting a plain model).
        window: Sliding-window size, including the current token; None: as in the weights, 1024 (paper) for new weights.
        separate_kv_norm: Keys and values have their own RMSNorm.
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
        """Return the number of layers of the self-decoder."""
        below = layers // 2 if self.self_layers is None else self.self_layers
        require(1 <= below < layers, "method.sharing.self_layers", below, f"must be between 1 and {layers - 1}")
        return below

    def source(self, layers: int) -> list[int]:
        return [min(i, self.below(layers)) for i in range(layers)]

    def layer_types(self, layers: int) -> list[str]:
        return [MIXERS[self.mixer] if i < self.below(layers) else FULL for i in range(layers)]

    def extra_config(self, shape: Mapping[str, Any]) -> dict[str, Any]:
        window = (self.window or DEFAULT_WINDOW) if self.mixer == "swa" else None
        return {"sliding_window": window, "separate_kv_norm": self.separate_kv_norm}

    @property
    def optional_keys(self) -> tuple[str, ...]:
        return ("sliding_window",) if self.window is None else ()
