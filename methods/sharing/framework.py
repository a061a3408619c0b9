"""Family of KV-sharing maps by Wu et al. (2024, arXiv 2410.14442): blocks of layers with one KV source each.

    pizza      the lowest layers own keys and values, and all layers above form one block
    sandwich   layers at both ends own keys and values, and the layers in the middle form one block
    lasagna    blocks of equal size

The source of a block is its ``bottom``, ``middle`` or ``top`` layer. CLA is lasagna-bottom, YOCO is pizza-bottom,
Layer-Condensed KV is sandwich-top. With a middle source only the layers up to it are encoded in several passes. An
explicit ``map`` defines any other architecture, such as MixAttention or the ablations of the CLA paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from ...conf.errors import InputError, require
from ...conf.options import Entries, NonNegativeInt, PositiveInt
from .base import Encoded


@dataclass(frozen=True)
class KVShare(Encoded):
    """KV sharing by blocks of layers.

    Attributes:
        kv_layers: Number of layers that own keys and values.
        partition: ``pizza``, ``sandwich`` or ``lasagna``.
        position: Position of a block's source: ``bottom``, ``middle`` or ``top``.
        force_first_kv: The first layer owns keys and values whatever the map (the paper found lower quality without).
        separate_kv_norm: Keys and values have their own RMSNorm.
        map: KV source of every layer, instead of ``partition`` and ``position``.
    """

    id: ClassVar[str] = "KVShare"
    kv_layers: PositiveInt = 3
    partition: Literal["pizza", "sandwich", "lasagna"] = "sandwich"
    position: Literal["bottom", "middle", "top"] = "middle"
    force_first_kv: bool = True
    separate_kv_norm: bool = False
    map: Annotated[Sequence[NonNegativeInt], Entries()] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.map is not None:
            object.__setattr__(self, "map", tuple(self.map))

    @property
    def label(self) -> str:
        if self.map is not None:
            return "map-" + "-".join(str(i) for i in self.map)
        return f"{self.partition}-{self.position}-{self.kv_layers}"

    def source(self, layers: int) -> list[int]:
        if self.map is not None:
            if len(self.map) != layers:
                raise InputError(
                    "method.sharing.map", list(self.map), f"must have {layers} entries, one for each layer"
                )
            return list(self.map)
        require(
            self.kv_layers <= layers,
            "method.sharing.kv_layers",
            self.kv_layers,
            f"must be at most {layers}, the layers",
        )
        source = list(range(layers))
        for first, end in self._blocks(layers):
            owner = {"bottom": first, "middle": (first + end - 1) // 2, "top": end - 1}[self.position]
            source[first:end] = [owner] * (end - first)
        if self.force_first_kv and source[0] != 0:
            source[0] = 0
        return source

    def _blocks(self, layers: int) -> list[tuple[int, int]]:
        """Return the first layer and one past the last layer of each block."""
        unblocked = self.kv_layers - 1
        if self.partition == "pizza":
            return [(unblocked, layers)]
        if self.partition == "sandwich":
            return [((unblocked + 1) // 2, layers - unblocked // 2)]
        min_size = layers // self.kv_layers
        sizes = [min_size + (i >= self.kv_layers - layers % self.kv_layers) for i in range(self.kv_layers)]
        ends = [sum(sizes[: i + 1]) for i in range(self.kv_layers)]
        return [(end - size, end) for end, size in zip(ends, sizes, strict=True)]

    def extra_config(self, shape: Mapping[str, Any]) -> dict[str, Any]:
        return super().extra_config(shape) | {"separate_kv_norm": self.separate_kv_norm}
