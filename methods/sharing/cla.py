"""Cross-Layer Attention (Brandon et al., 2024, arXiv 2405.12981): adjacent layers share keys and values.

Section 2.2: layers form groups of ``factor``. The first layer of a group computes keys and values, and the others
attend over them with their own queries. If ``factor`` does not divide the number of layers, the first group is smaller
(Figure 2: with ten layers and factor 3, layer 0 is a group). Training and inference are those of a plain
model, and so are the bytes *read* at each step: sharing saves memory, not bandwidth (section 2.3).

The authors' models normalize the input of keys and values separately (``separate_kv_norm=true``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ...conf.options import PositiveInt
from .base import Sharing


@dataclass(frozen=True)
class CLA(Sharing):
    """Groups of adjacent layers with one KV source each.

    Attributes:
        factor: Layers per group; 1 is the plain model.
        separate_kv_norm: Keys and values have their own RMSNorm; None: as in the weights, False for new weights.
    """

    id: ClassVar[str] = "CLA"
    factor: PositiveInt = 2
    separate_kv_norm: bool | None = None

    @property
    def label(self) -> str:
        return f"cla{self.factor}"

    @property
    def shares(self) -> bool:
        return self.factor > 1

    def source(self, layers: int) -> list[int]:
        first_group = layers % self.factor
        return [0 if i < first_group else i - (i - first_group) % self.factor for i in range(layers)]

    def extra_config(self, shape: Mapping[str, Any]) -> dict[str, Any]:
        return {"separate_kv_norm": bool(self.separate_kv_norm)}

    @property
    def optional_keys(self) -> tuple[str, ...]:
        return ("separate_kv_norm",) if self.separate_kv_norm is None else ()
