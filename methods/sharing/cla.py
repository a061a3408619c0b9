"""Cross-Layer Attention (Brandon et al., 2024, arXiv 2405.12981): neighbouring layers share keys and values.

Section 2.2: layers stand in groups of ``factor``; the first of a group computes keys and values, and the others attend
over them with queries of their own. Where the number of layers does not divide, the first group is the short one
(Figure 2: with ten layers and factor 3, layer 0 stands alone). Training and inference are those of a plain model, and
so are the bytes *read* at each step: sharing saves room, not bandwidth (section 2.3).

The authors' models normalise the input of the keys and values apart from that of the queries
(``separate_kv_norm=true``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ...conf.options import PositiveInt
from .base import Sharing


@dataclass(frozen=True)
class CLA(Sharing):
    """The map, for any factor.

    Attributes:
        factor: layers that share; 1 is the plain model.
        separate_kv_norm: keys and values have an RMSNorm of their own before them; None: as the weights at hand, and
            not in new ones.
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
        short = layers % self.factor
        return [0 if i < short else i - (i - short) % self.factor for i in range(layers)]

    def further(self, shape: Mapping[str, Any]) -> dict[str, Any]:
        return {"separate_kv_norm": bool(self.separate_kv_norm)}

    @property
    def left_open(self) -> tuple[str, ...]:
        return ("separate_kv_norm",) if self.separate_kv_norm is None else ()
