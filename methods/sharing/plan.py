"""What a layer -> KV-source map says, worked out from a model's config alone.

A map lists, for each layer, the layer whose keys and values it attends over (``kv_source_layers``). A layer that is its
own source computes and caches them; the others only ask. A source may stand below its consumers (CLA, YOCO) or above
(Layer-Condensed KV): an upward reference is to keys of earlier tokens alone, since those of the token itself are not
there yet, and a prompt read in parallel takes several passes over the layers in between.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import cache_utils
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from ...conf.errors import InputError
from .kv_map import FULL, LINEAR, SLIDING

CHUNKED = "chunked_attention"
HOLDS_NOTHING = getattr(cache_utils, "DummyLayer", ())
"""transformers' cache layer of a layer that keeps nothing; older releases make none."""
NO_LAYER = -1
"""In place of a cache layer's number: the layer of the model neither attends nor keeps a state."""
ENCODINGS = ("iterative", "exact")
UPWARD_STYLES = ("fresh", "paper")


@dataclass(frozen=True)
class KVAccess:
    """How a layer of the model accesses the cache layer that holds its keys and values.

    Attributes:
        is_owner: The layer's own keys and values are written; else it reads those of another layer.
        strictly_causal: No token attends to itself.
        is_last_reader: No later layer of the model attends over this cache layer in the same forward.
        is_final_pass: The queries count for scores; False in the warm-up passes of an iterative encoding.
    """

    is_owner: bool = True
    strictly_causal: bool = False
    is_last_reader: bool = True
    is_final_pass: bool = True


@dataclass(frozen=True)
class Span:
    """The tokens that a layer of local attention sees.

    Attributes:
        kind: ``sliding_attention``: the last ``size`` tokens, its own included; ``chunked_attention``: those of its own
            chunk of ``size`` tokens, counted from the first real token of the row.
        size: tokens.
    """

    kind: str
    size: int

    @property
    def counts_from_start(self) -> bool:
        """Whether it matters at which position a row begins, not only how far apart two tokens are."""
        return self.kind == CHUNKED

    def first_visible(self, position: int) -> int:
        """Position of the first token that the one at ``position`` sees."""
        if self.kind == CHUNKED:
            return position // self.size * self.size
        return max(0, position - self.size + 1)

    def visible(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Whether keys at some positions lie within reach of queries at others (int64, broadcast); causality apart."""
        if self.kind == CHUNKED:
            return query.div(self.size, rounding_mode="floor") == key.div(self.size, rounding_mode="floor")
        return query - key < self.size

    def held(self, tokens: int) -> int:
        """Tokens to hold between steps of a row that has seen ``tokens``: those that its next token will see."""
        return tokens % self.size if self.kind == CHUNKED else min(tokens, self.size - 1)

    def held_of(self, tokens: torch.Tensor) -> torch.Tensor:
        """The same for many rows (int64)."""
        return tokens.remainder(self.size) if self.kind == CHUNKED else tokens.clamp(max=self.size - 1)


@dataclass(frozen=True)
class Plan:
    """The cache layers of a model and who uses them.

    Attributes:
        owners: the model's layers that have a cache layer, in order.
        cache_layer: for each layer of the model, the number of its cache layer, or :data:`NO_LAYER`.
        uses: for each layer of the model, how it uses that.
        layer_types: for each cache layer.
        spans: for each cache layer, the tokens that it sees; None: all (or it does not attend).
        recurrent: the model's layers whose state transformers' own layer classes hold, beside keys and values or
            instead of them.
        rope_switch: tokens of a text up to which RoPE has other frequencies than beyond (longrope); None: none.
    """

    owners: tuple[int, ...]
    cache_layer: tuple[int, ...]
    uses: tuple[KVAccess, ...]
    layer_types: tuple[str, ...]
    spans: tuple[Span | None, ...]
    recurrent: tuple[int, ...] = ()
    rope_switch: int | None = None

    @cached_property
    def attending(self) -> tuple[int, ...]:
        """The model's layers that attend over keys and values, in order."""
        return tuple(i for i, c in enumerate(self.cache_layer) if c != NO_LAYER and self.layer_types[c] != LINEAR)

    @property
    def shares(self) -> bool:
        """Some layer attends over keys and values that are not its own."""
        return any(not use.is_owner for use in self.uses)

    @property
    def is_uniform(self) -> bool:
        """Every layer attends over all tokens and has keys and values of its own."""
        return all(kind == FULL for kind in self.layer_types) and not self.shares and NO_LAYER not in self.cache_layer

    def consumers(self, kind: str) -> list[int]:
        """For each cache layer of a type, how many layers of the model attend over it."""
        return [self.cache_layer.count(number) for number, k in enumerate(self.layer_types) if k == kind]

    @property
    def has_upward_kv_refs(self) -> bool:
        """Some layer does not see its own token, so that further tokens have to come one by one."""
        return any(use.strictly_causal for use in self.uses)


def plan_of(config: Any) -> Plan:
    """The plan of a text config.

    Raises:
        InputError: the model's layers keep something for which there is no cache layer here.
    """
    if getattr(config, "upward_style", None) is None:
        return _plan_of_transformers_model(config)
    source = config.kv_source_layers
    paper = config.upward_style == "paper" and any(s > i for i, s in enumerate(source))
    owners = tuple(i for i, s in enumerate(source) if s == i)
    last = {s: i for i, s in enumerate(source)}
    uses = tuple(KVAccess(s == i, s > i or paper, last[s] == i) for i, s in enumerate(source))
    types = tuple(config.layer_types[i] for i in owners)
    spans = tuple(Span(SLIDING, config.sliding_window) if kind == SLIDING else None for kind in types)
    return Plan(owners, tuple(owners.index(s) for s in source), uses, types, spans)


def _plan_of_transformers_model(config: Any) -> Plan:
    """What transformers' own cache would hold for each layer, read off the cache layers that it makes."""
    name = getattr(config, "model_type", type(config).__name__)
    try:
        held = DynamicCache(config=config).layers
        count = config.num_hidden_layers
    except (AttributeError, KeyError, NotImplementedError, TypeError, ValueError) as error:
        raise InputError("model", name, f"transformers has no cache for it: {error}") from error
    modes, types = _sharing_modes(config), getattr(config, "layer_types", None)
    owners: list[int] = []
    kinds: list[str] = []
    spans: list[Span | None] = []
    sources: list[int | None] = []  # for each layer of the model, the layer whose cache layer it uses
    recurrent: list[int] = []
    for i in range(count):
        layer = held[i] if i < len(held) else None
        declared = types[i] if types is not None else None
        kind, span = FULL, None
        if modes[i] == "reuse":
            earlier = [j for j in owners if modes[j] == "store" and types is not None and types[j] == declared]
            if not earlier:
                raise InputError("model", name, f"layer {i} shares keys and values with a layer that cannot be told")
            sources.append(earlier[-1])
            continue
        if layer is None or isinstance(layer, HOLDS_NOTHING):
            sources.append(None)
            continue
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            recurrent.append(i)
        if isinstance(layer, DynamicSlidingWindowLayer):
            chunked = declared == CHUNKED or (declared is None and getattr(config, "attention_chunk_size", None))
            kind = CHUNKED if chunked else SLIDING
            span = Span(kind, layer.sliding_window)
        elif isinstance(layer, LinearAttentionCacheLayerMixin) and not isinstance(layer, DynamicLayer):
            kind = LINEAR
        elif type(layer) is not DynamicLayer and not isinstance(layer, LinearAttentionCacheLayerMixin):
            raise InputError(
                "model",
                name,
                f"layer {i} is of type {declared}, which keeps more than keys and values ({type(layer).__name__}); "
                "use a model whose layers are of full, sliding, chunked or linear attention",
            )
        owners.append(i)
        kinds.append(kind)
        spans.append(span)
        sources.append(i)
    last = {s: i for i, s in enumerate(sources)}
    uses = tuple(KVAccess(is_owner=s in (i, None), is_last_reader=last[s] == i) for i, s in enumerate(sources))
    cache_layer = tuple(NO_LAYER if s is None else owners.index(s) for s in sources)
    return Plan(tuple(owners), cache_layer, uses, tuple(kinds), tuple(spans), tuple(recurrent), _rope_switch(config))


def _rope_switch(config: Any) -> int | None:
    """The shortest of its layers' ``original_max_position_embeddings`` under longrope."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope] if "rope_type" in rope else [kind for kind in rope.values() if isinstance(kind, dict)]
    lengths = [k["original_max_position_embeddings"] for k in kinds if k.get("rope_type") == "longrope"]
    return min(lengths, default=None)


def _sharing_modes(config: Any) -> list[str | None]:
    """For each layer ``reuse``: it takes keys and values of an earlier layer of its type; ``store``: it gives them."""
    count = config.num_hidden_layers
    modes = getattr(config, "kv_sharing_modes", None)
    if modes is not None:
        return list(modes)
    shared = getattr(config, "num_kv_shared_layers", None) or 0
    types = getattr(config, "layer_types", None) or [FULL] * count
    givers = {kind: i for i, kind in enumerate(types[: count - shared])} if shared else {}
    stores: list[str | None] = ["store" if givers.get(kind) == i else None for i, kind in enumerate(types)]
    return stores[: count - shared] + ["reuse"] * shared


_plans: dict[int, tuple[weakref.ref[Any], Plan]] = {}


def span_of(config: Any, layer_idx: int) -> Span | None:
    """The tokens that a layer of a model sees; None: all. The plan is worked out once for a config object."""
    known = _plans.get(id(config))
    if known is None or known[0]() is not config:
        _plans[id(config)] = known = (weakref.ref(config), plan_of(config))
    number = known[1].cache_layer[layer_idx]
    return None if number == NO_LAYER else known[1].spans[number]
