"""The family of maps of Wu et al. (2024, arXiv 2410.14442).

A map divides the layers into blocks, and one layer of each block is the KV source of the block.

    pizza      the lowest layers keep their own keys and values, one block takes the rest
    sandwich   layers at both ends keep their own, one block in the middle
    lasagna    equal blocks

and the source of a block is its ``bottom``, ``middle`` or ``top`` layer. CLA is lasagna-bottom, YOCO is pizza-bottom,
Layer-Condensed KV is sandwich-top. With a source in the middle only the layers up to it are encoded in several passes.
An explicit ``map`` stands for anything else: the ablations of the CLA paper, MixAttention.
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
    """The family.

    Attributes:
        kv_layers: layers with keys and values of their own.
        partition: ``pizza``, ``sandwich`` or ``lasagna``.
        position: of a block's source: ``bottom``, ``middle`` or ``top``.
        force_first_kv: the lowest layer has its own whatever the map says (the paper found quality to drop without).
        separate_kv_norm: keys and values have an RMSNorm of their own before them.
        map: the source of every layer, instead of ``partition`` and ``position``; None: as they say.
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
            served_by = {"bottom": first, "middle": (first + end - 1) // 2, "top": end - 1}[self.position]
            source[first:end] = [served_by] * (end - first)
        if self.force_first_kv and source[0] != 0:
            source[0] = 0
        return source

    def _blocks(self, layers: int) -> list[tuple[int, int]]:
        """(first layer, one after the last) of each block."""
        own = self.kv_layers - 1
        if self.partition == "pizza":
            return [(own, layers)]
        if self.partition == "sandwich":
            return [((own + 1) // 2, layers - own // 2)]
        short = layers // self.kv_layers
        sizes = [short + (i >= self.kv_layers - layers % self.kv_layers) for i in range(self.kv_layers)]
        ends = [sum(sizes[: i + 1]) for i in range(self.kv_layers)]
        return [(end - size, end) for end, size in zip(ends, sizes, strict=True)]

    def further(self, shape: Mapping[str, Any]) -> dict[str, Any]:
        return super().further(shape) | {"separate_kv_norm": self.separate_kv_norm}
