"""What a layer -> KV-source map says, worked out from a model's config alone.

A map lists, for each layer, the layer whose keys and values it attends over (``kv_source_layers``). A layer that is its
own source computes and caches them; the others only ask. A source may stand below its consumers (CLA, YOCO) or above
(Layer-Condensed KV): an upward reference is to keys of earlier tokens alone, since those of the token itself are not
there yet, and a prompt read in parallel takes several passes over the layers in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
LAYER_TYPES = (FULL, SLIDING, LINEAR)
ENCODINGS = ("iterative", "exact")


def check_map(source: Sequence[int], layer_types: Sequence[str], layers: int, window: int | None) -> None:
    """Refuse a map that no model can be built from.

    Raises:
        ValueError: which rule is broken, and at which layer.
    """
    if len(source) != layers:
        raise ValueError(f"kv_source_layers has {len(source)} entries for {layers} layers")
    if len(layer_types) != layers:
        raise ValueError(f"layer_types has {len(layer_types)} entries for {layers} layers")
    for i, (s, kind) in enumerate(zip(source, layer_types, strict=True)):
        if kind not in LAYER_TYPES:
            raise ValueError(f"layer_types[{i}] is {kind!r}; known are {', '.join(LAYER_TYPES)}")
        if not isinstance(s, int) or not 0 <= s < layers:
            raise ValueError(f"kv_source_layers[{i}] is {s}, which is no layer of {layers}")
        if source[s] != s:
            raise ValueError(f"kv_source_layers[{i}] is {s}, and layer {s} has no keys and values of its own")
        if layer_types[s] != kind:
            raise ValueError(
                f"layer {i} is {kind} and its source, layer {s}, is {layer_types[s]}: a window has dropped what a full "
                "layer needs, so both must be of one type"
            )
        if s != i and kind == LINEAR:
            raise ValueError(f"layer {i} is {LINEAR}, which has no keys and values to share with layer {s}")
        if s > i and kind != FULL:
            raise ValueError(f"layer {i} refers up to layer {s}; only {FULL} layers can")
    for segment in segments(source):
        for i in segment.layers if segment.cyclic else ():
            if layer_types[i] != FULL:
                raise ValueError(
                    f"layer {i} is {layer_types[i]} and stands between layer {segment.first} and a source above it, "
                    f"layer {segment.last}, which are passed several times: only {FULL} layers can"
                )
    if SLIDING in layer_types and not (isinstance(window, int) and window >= 2):
        raise ValueError(f"sliding_window is {window} and layer {layer_types.index(SLIDING)} slides: it must be >= 2")


@dataclass(frozen=True)
class Segment:
    """Layers ``first`` .. ``last``; ``cyclic``: some refer up to one of them, so they are passed several times."""

    first: int
    last: int
    cyclic: bool

    @property
    def layers(self) -> range:
        return range(self.first, self.last + 1)


def segments(source: Sequence[int]) -> list[Segment]:
    """The layers in order, cut into plain and cyclic stretches; every layer is in exactly one."""
    out: list[Segment] = []
    i = 0
    while i < len(source):
        first, last, cyclic = i, i, source[i] > i
        if cyclic:
            last = source[i]
            while (top := max(source[first : last + 1])) > last:
                last = top
        else:
            while last + 1 < len(source) and source[last + 1] <= last + 1:
                last += 1
        out.append(Segment(first, last, cyclic))
        i = last + 1
    return out


@dataclass(frozen=True)
class Use:
    """How a layer of the model uses the cache layer that holds its keys and values.

    Attributes:
        writes: the keys and values that come with the queries are new and stay.
        strict: no token sees itself.
        last: no other layer of the model comes to this cache layer in the same forward.
        counts: the queries count for whoever chooses tokens by them; not in a pass that is done again.
    """

    writes: bool = True
    strict: bool = False
    last: bool = True
    counts: bool = True


@dataclass(frozen=True)
class Plan:
    """The cache layers of a model and who uses them.

    Attributes:
        owners: the model's layers that have a cache layer, in order.
        cache_layer: for each layer of the model, the number of its cache layer.
        uses: for each layer of the model, how it uses that.
        layer_types: for each cache layer.
        window: of the sliding ones.
    """

    owners: tuple[int, ...]
    cache_layer: tuple[int, ...]
    uses: tuple[Use, ...]
    layer_types: tuple[str, ...]
    window: int | None

    @property
    def shares(self) -> bool:
        """Some layer has no keys and values of its own."""
        return len(self.owners) < len(self.cache_layer)

    def consumers(self, kind: str) -> list[int]:
        """For each cache layer of a type, how many layers of the model attend over it."""
        return [self.cache_layer.count(number) for number, k in enumerate(self.layer_types) if k == kind]

    @property
    def looks_up(self) -> bool:
        """Some layer does not see its own token, so that further tokens have to come one by one."""
        return any(use.strict for use in self.uses)


def plan_of(config: Any) -> Plan:
    """The plan of a text config; one without ``kv_source_layers`` has a cache layer for each of its layers."""
    layers = config.num_hidden_layers
    source = getattr(config, "kv_source_layers", None)
    if source is None:
        return Plan(tuple(range(layers)), tuple(range(layers)), (Use(),) * layers, (FULL,) * layers, None)
    paper = config.upward_style == "paper" and any(s > i for i, s in enumerate(source))
    owners = tuple(i for i, s in enumerate(source) if s == i)
    last = {s: i for i, s in enumerate(source)}
    uses = tuple(Use(s == i, s > i or paper, last[s] == i) for i, s in enumerate(source))
    return Plan(
        owners,
        tuple(owners.index(s) for s in source),
        uses,
        tuple(config.layer_types[i] for i in owners),
        config.sliding_window,
    )
