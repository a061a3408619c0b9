"""Cache plan of a model: its cache layers and the layers that use them, derived from the config.

A map (``kv_source_layers``) gives, for each layer, the layer whose keys and values it attends over. A layer that is its
own source computes and caches keys and values; other layers only have queries. A source may be a lower layer (CLA,
YOCO) or a higher one (Layer-Condensed KV). A layer with a higher source attends only to the keys of earlier tokens,
because those of the current token are not computed yet, and a prompt is encoded in several passes.
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
"""transformers' cache layer class for layers without a cache; missing in older releases."""
NO_LAYER = -1
"""Index for layers of the model that neither attend nor have a state."""
ENCODINGS = ("iterative", "exact")
UPWARD_STYLES = ("fresh", "paper")


@dataclass(frozen=True)
class KVAccess:
    """How a layer of the model accesses the cache layer that holds its keys and values.

    Attributes:
        is_owner: The layer computes the keys and values; otherwise it attends over those of another layer.
        strictly_causal: No token attends to itself.
        is_last_reader: No later layer of the model attends over this cache layer in the same forward.
        is_final_pass: The queries are used for scores; False in the warm-up passes of an iterative encoding.
    """

    is_owner: bool = True
    strictly_causal: bool = False
    is_last_reader: bool = True
    is_final_pass: bool = True


@dataclass(frozen=True)
class Span:
    """Tokens to which a token of a local-attention layer attends.

    Attributes:
        kind: ``sliding_attention``: the last ``size`` tokens, including the token itself; ``chunked_attention``: the
            tokens of the same chunk, counted from the first real token of the row.
        size: Tokens of the window or chunk.
    """

    kind: str
    size: int

    @property
    def counts_from_start(self) -> bool:
        """Whether visibility depends on absolute positions in the row and not only on distances."""
        return self.kind == CHUNKED

    def first_visible(self, position: int) -> int:
        """Return the position of the first token to which the token at ``position`` attends."""
        if self.kind == CHUNKED:
            return position // self.size * self.size
        return max(0, position - self.size + 1)

    def visible(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Return whether key positions are in the span of query positions (int64, broadcast), without causality."""
        if self.kind == CHUNKED:
            return query.div(self.size, rounding_mode="floor") == key.div(self.size, rounding_mode="floor")
        return query - key < self.size

    def held(self, tokens: int) -> int:
        """Return the number of tokens to store after ``tokens`` tokens: those visible to the next token."""
        return tokens % self.size if self.kind == CHUNKED else min(tokens, self.size - 1)

    def held_of(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return :meth:`held` for a tensor (int64)."""
        return tokens.remainder(self.size) if self.kind == CHUNKED else tokens.clamp(max=self.size - 1)


@dataclass(frozen=True)
class Plan:
    """Cache layers of a model and the layers that use them.

    Attributes:
        owners: Layers of the model that have a cache layer, in order.
        cache_layer: Index of the cache layer of each layer of the model, or :data:`NO_LAYER`.
        uses: How each layer of the model accesses its cache layer.
        layer_types: Type of each cache layer.
        spans: Local attention of each cache layer; None: attends over all tokens, or does not attend.
        recurrent: Layers of the model with a recurrent state in transformers' layer classes.
        rope_switch: Text length in tokens at which the RoPE frequencies change (longrope); None: they do not.
        holds_latents: The cache is given latents: the values are the last channels of the keys (:mod:`.mla`).
    """

    owners: tuple[int, ...]
    cache_layer: tuple[int, ...]
    uses: tuple[KVAccess, ...]
    layer_types: tuple[str, ...]
    spans: tuple[Span | None, ...]
    recurrent: tuple[int, ...] = ()
    rope_switch: int | None = None
    holds_latents: bool = False

    @cached_property
    def attending(self) -> tuple[int, ...]:
        """Layers of the model that attend over keys and values, in order."""
        return tuple(i for i, c in enumerate(self.cache_layer) if c != NO_LAYER and self.layer_types[c] != LINEAR)

    @property
    def shares(self) -> bool:
        """Whether some layer attends over keys and values of another layer."""
        return any(not use.is_owner for use in self.uses)

    @property
    def is_uniform(self) -> bool:
        """Whether every layer attends over all tokens and owns keys and values."""
        return all(kind == FULL for kind in self.layer_types) and not self.shares and NO_LAYER not in self.cache_layer

    def consumers(self, kind: str) -> list[int]:
        """Return, for each cache layer of a type, the number of layers of the model that attend over it."""
        return [self.cache_layer.count(number) for number, k in enumerate(self.layer_types) if k == kind]

    @property
    def has_upward_kv_refs(self) -> bool:
        """Whether some layer is strictly causal, so that new tokens must be fed one by one."""
        return any(use.strictly_causal for use in self.uses)


def plan_of(config: Any) -> Plan:
    """Return the plan of a text config.

    Raises:
        InputError: A layer of the model has a state that kvbench's cache layers do not support.
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
    latents = getattr(config, "kv_lora_rank", None) is not None
    return Plan(owners, tuple(owners.index(s) for s in source), uses, types, spans, holds_latents=latents)


def _plan_of_transformers_model(config: Any) -> Plan:
    """Derive the plan from the cache layers that transformers creates for a config."""
    name = getattr(config, "model_type", type(config).__name__)
    try:
        templates = DynamicCache(config=config).layers
        count = config.num_hidden_layers
    except (AttributeError, KeyError, NotImplementedError, TypeError, ValueError) as error:
        raise InputError("model", name, f"transformers has no cache for it: {error}") from error
    modes, types = _sharing_modes(config), getattr(config, "layer_types", None)
    owners: list[int] = []
    kinds: list[str] = []
    spans: list[Span | None] = []
    sources: list[int | None] = []  # KV source of each layer of the model
    recurrent: list[int] = []
    for i in range(count):
        layer = templates[i] if i < len(templates) else None
        declared = types[i] if types is not None else None
        kind, span = FULL, None
        if modes[i] == "reuse":
            earlier = [j for j in owners if modes[j] == "store" and types is not None and types[j] == declared]
            if not earlier:
                raise InputError("model", name, f"layer {i} shares keys and values with an unknown layer")
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
    """Return the lowest ``original_max_position_embeddings`` of the layers with longrope."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope] if "rope_type" in rope else [kind for kind in rope.values() if isinstance(kind, dict)]
    lengths = [k["original_max_position_embeddings"] for k in kinds if k.get("rope_type") == "longrope"]
    return min(lengths, default=None)


def _sharing_modes(config: Any) -> list[str | None]:
    """Return, for each layer, ``reuse`` if its KV source is an earlier layer of its type, ``store`` if it is one."""
    count = config.num_hidden_layers
    modes = getattr(config, "kv_sharing_modes", None)
    if modes is not None:
        return list(modes)
    shared = getattr(config, "num_kv_shared_layers", None) or 0
    types = getattr(config, "layer_types", None) or [FULL] * count
    sources = {kind: i for i, kind in enumerate(types[: count - shared])} if shared else {}
    stores: list[str | None] = ["store" if sources.get(kind) == i else None for i, kind in enumerate(types)]
    return stores[: count - shared] + ["reuse"] * shared


_plans: dict[int, tuple[weakref.ref[Any], Plan]] = {}


def span_of(config: Any, layer_idx: int) -> Span | None:
    """Return the local attention of a layer of a model, None if it has none; plans are cached per config object."""
    entry = _plans.get(id(config))
    if entry is None or entry[0]() is not config:
        _plans[id(config)] = entry = (weakref.ref(config), plan_of(config))
    number = entry[1].cache_layer[layer_idx]
    return None if number == NO_LAYER else entry[1].spans[number]
