"""Maps of layers to KV sources, the layers whose keys and values they attend over, and their validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
LAYER_TYPES = (FULL, SLIDING, LINEAR)


def check_map(source: Sequence[int], layer_types: Sequence[str], layers: int, window: int | None) -> None:
    """Check that a map (the KV source of each layer) defines a valid model.

    Raises:
        ValueError: A rule is violated; names the rule and the layer.
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
            raise ValueError(f"kv_source_layers[{i}] is {s}, and layer {s} does not own keys and values")
        if layer_types[s] != kind:
            raise ValueError(
                f"layer {i} is {kind} and its source, layer {s}, is {layer_types[s]}: a window has dropped what a full "
                "layer needs, so both must be of one type"
            )
        if s != i and kind == LINEAR:
            raise ValueError(f"layer {i} is {LINEAR}, which has no keys and values to share with layer {s}")
        if s > i and kind != FULL:
            raise ValueError(f"layer {i} has the higher layer {s} as its source; only {FULL} layers can")
    for segment in segments(source):
        for i in segment.layers if segment.cyclic else ():
            if layer_types[i] != FULL:
                raise ValueError(
                    f"layer {i} is {layer_types[i]} and between layer {segment.first} and its higher source, layer "
                    f"{segment.last}, which are encoded in several passes: only {FULL} layers can"
                )
    if SLIDING in layer_types and not (isinstance(window, int) and window >= 2):
        raise ValueError(f"sliding_window is {window} and layer {layer_types.index(SLIDING)} slides: it must be >= 2")


@dataclass(frozen=True)
class Segment:
    """Layers ``first`` to ``last``; ``cyclic`` if some have a higher KV source and are encoded in several passes."""

    first: int
    last: int
    cyclic: bool

    @property
    def layers(self) -> range:
        """Indices of the layers."""
        return range(self.first, self.last + 1)


def segments(source: Sequence[int]) -> list[Segment]:
    """Partition the layers, in order, into plain and cyclic segments."""
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
