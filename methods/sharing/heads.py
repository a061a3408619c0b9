"""Fewer KV heads: grouped-query (Ainslie et al., 2023, arXiv 2305.13245) and multi-query attention (Shazeer, 2019).

Keys and values are shared between the query heads of one layer, not between layers. The model class is the same, with
every layer as its own KV source. This is the baseline of the CLA paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ...conf.errors import require
from ...conf.options import PositiveInt
from .base import SharingWithinLayers


@dataclass(frozen=True)
class Heads(SharingWithinLayers):
    """Number of KV heads.

    Attributes:
        kv_heads: KV heads per layer; None: as many as query heads (multi-head attention).
    """

    id: ClassVar[str] = "Heads"
    kv_heads: PositiveInt | None = None

    @property
    def label(self) -> str:
        return {None: "mha", 1: "mqa"}.get(self.kv_heads, f"gqa{self.kv_heads}")

    def extra_config(self, shape: Mapping[str, Any]) -> dict[str, Any]:
        heads, allowed = shape["num_attention_heads"], self.kv_heads
        require(allowed is None or heads % allowed == 0, "method.sharing.kv_heads", allowed, f"must divide {heads}")
        return {"num_key_value_heads": allowed or heads}
