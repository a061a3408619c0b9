"""What the size of a model's KV cache follows from, read from its ``config.json``, and the formula.

    KV bytes = batch x layers x kv_heads x tokens x head_dim x 2 x bits/8

Layers of sliding or chunked attention hold fewer tokens; layers that share keys and values, or keep a state of fixed
size, count nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from ..conf.errors import InputError, require
from ..conf.wording import one_of

# In these a `sliding_window` without `layer_types` holds for every layer; elsewhere the file leaves open for which.
EVERY_LAYER_SLIDES = ("mistral", "mixtral", "phi3", "phimoe", "starcoder2")
# Fields that say: the formula does not describe this model.
OTHER_CACHES = {
    "global_head_dim": "head_dim differs between layers",
    "attention_head_dim": "head_dim is given in a way of its own; use --layers, --kv-heads and --head-dim",
    "block_configs": "the number of KV heads differs between layers",
    "multi_query": "the KV heads are given in a way of its own; use --layers, --kv-heads and --head-dim",
    "is_encoder_decoder": "the decoder caches keys and values of the encoder too",
    "index_topk": "the indexer of sparse attention caches a key of its own besides",
    "indexer_head_dim": "the indexer of sparse attention caches a key of its own besides",
}
# Fields of hybrids that only `layer_types` puts in a form which all models share.
NEED_LAYER_TYPES = (
    *("attn_layer_indices", "attn_layer_period", "attn_type_list", "block_types", "full_attn_idxs"),
    *("hybrid_override_pattern", "layer_group_size", "layers_block_type", "linear_attn_config"),
)
FULL, SLIDING, CHUNKED, LINEAR = "full_attention", "sliding_attention", "chunked_attention", "linear_attention"
LEGACY_TYPES = {"attention": FULL, "mamba": LINEAR}
# What a layer of each type attends over; None: it has no keys and values.
ATTENDS: dict[str, str | None] = {
    FULL: FULL,
    SLIDING: SLIDING,
    CHUNKED: CHUNKED,
    "hybrid": FULL,
    "hybrid_sliding": SLIDING,
} | dict.fromkeys((LINEAR, "conv", "recurrent", "moe", "mlp"))
FIXED_STATE = (LINEAR, "conv", "recurrent", "hybrid", "hybrid_sliding")


@dataclass(frozen=True)
class KVConfig:
    """Properties of a model that determine the size of its KV cache.

    Attributes:
        layers: Layers with keys and values of their own.
        kv_heads: KV heads of a layer.
        head_dim: Numbers in one key of a head (MLA: expanded).
        query_heads: Query heads of a layer, as many as KV heads (MHA), more (GQA), or all for one KV head (MQA). Not in
            the formula.
        name: Name shown in tables and plots.
        sliding_layers: Layers, of ``layers``, that hold only the last ``sliding_window`` tokens.
        sliding_window: Tokens of the window.
        chunked_layers: Layers, of ``layers``, that attend within chunks of ``chunk`` tokens.
        chunk: Tokens of a chunk.
        value_dim: Numbers in one value of a head; 0: as in a key.
        latent_dims: ``(kv_lora_rank, qk_rope_head_dim)`` with MLA: numbers of a token and layer before expansion.
        states: Layers with a state of fixed size, such as ``"36 linear_attention"``. Not in the formula.
    """

    layers: int
    kv_heads: int
    head_dim: int
    query_heads: int | None = None
    name: str = "this shape"
    sliding_layers: int = 0
    sliding_window: int = 0
    chunked_layers: int = 0
    chunk: int = 0
    value_dim: int = 0
    latent_dims: tuple[int, ...] = ()
    states: tuple[str, ...] = ()

    @property
    def pair_dim(self) -> int:
        """Numbers in a key and a value."""
        return self.head_dim + (self.value_dim or self.head_dim)

    @classmethod
    def from_json(cls, config: Mapping[str, Any], name: str, where: str = "config.json") -> KVConfig:
        """Read the fields of a transformers ``config.json``, or of the ``text_config`` in it.

        Raises:
            InputError: a field is missing or not a number, or the formula does not hold for the model; names ``where``.
        """
        if isinstance(config.get("text_config"), dict):
            config = config["text_config"]

        def whole(field: str, default: int | None = None) -> int:
            value = default if config.get(field) is None else config[field]
            if value is None:
                raise InputError(where, field, "the config lacks this field; it must be that of a language model")
            require(type(value) is int and value > 0, f"{where}:{field}", value, "must be a whole number of at least 1")
            return value

        for field, reason in OTHER_CACHES.items():
            if config.get(field):
                raise InputError(f"{where}:{field}", config[field], f"the formula does not hold: {reason}")
        layers, query_heads = whole("num_hidden_layers"), whole("num_attention_heads")
        types = config.get("layer_types")
        if types is None:
            types = _types_without_layer_types(config, layers, where, whole)
        kinds = [LEGACY_TYPES.get(str(kind), str(kind)) for kind in (types if isinstance(types, list) else [types])]
        others = ", ".join(sorted(set(kinds) - set(ATTENDS)))
        require(not others, f"{where}:layer_types", others, f"the formula knows {', '.join(ATTENDS)}")
        allowed = f"must be {layers} entries, as num_hidden_layers says"
        require(len(kinds) == layers, f"{where}:layer_types", f"{len(kinds)} entries", allowed)
        states = tuple(f"{kinds.count(kind)} {kind}" for kind in FIXED_STATE if kind in kinds)
        source = config.get("kv_source_layers")
        if source is not None:  # kvbench's own models: the others attend over their source's keys and values
            whole_list = isinstance(source, list) and len(source) == layers
            require(whole_list, f"{where}:kv_source_layers", source, allowed)
            kinds = [kinds[i] for i, s in enumerate(source) if s == i]
        if config.get("num_kv_shared_layers"):  # the last ones attend over those of earlier layers
            shared = whole("num_kv_shared_layers")
            require(shared < layers, f"{where}:num_kv_shared_layers", shared, f"must be below the {layers} layers")
            kinds = kinds[: layers - shared]
        held = [ATTENDS[kind] for kind in kinds if ATTENDS[kind]]
        require(bool(held), f"{where}:layer_types", ", ".join(sorted(set(kinds))), "no layer has keys and values")
        latent = bool(config.get("kv_lora_rank"))
        if latent:  # num_key_value_heads and head_dim mean other things there
            kv_heads, head_dim = query_heads, whole("qk_nope_head_dim") + whole("qk_rope_head_dim")
        else:
            kv_heads = whole("num_key_value_heads", default=query_heads)
            head_dim = whole("head_dim", default=whole("hidden_size") // query_heads)
        return cls(
            layers=len(held),
            kv_heads=kv_heads,
            head_dim=head_dim,
            query_heads=query_heads,
            name=name,
            sliding_layers=held.count(SLIDING),
            sliding_window=whole("sliding_window") if SLIDING in held else 0,
            chunked_layers=held.count(CHUNKED),
            chunk=whole("attention_chunk_size") if CHUNKED in held else 0,
            value_dim=whole("v_head_dim") if latent else 0,
            latent_dims=(whole("kv_lora_rank"), whole("qk_rope_head_dim")) if latent else (),
            states=states,
        )

    def __str__(self) -> str:
        kind = "MHA" if self.kv_heads == self.query_heads else "MQA" if self.kv_heads == 1 else "GQA"
        kind = "MLA" if self.latent_dims else kind
        query = f", {kind}: query heads {self.query_heads}" if self.query_heads else ""
        local = [(self.sliding_layers, self.sliding_window), (self.chunked_layers, self.chunk)]
        limits = ", ".join(f"{layers} hold {tokens} tokens at most" for layers, tokens in local if layers)
        limits = limits and f" ({limits})"
        sizes = f"head_dim {self.head_dim}"
        if self.latent_dims:
            latent = " + ".join(map(str, self.latent_dims))
            sizes = f"expanded keys {self.head_dim} and values {self.value_dim} wide, latent {latent}"
        fixed = f"; not counted: the states of fixed size of {', '.join(self.states)} layers" if self.states else ""
        return f"{self.name}: layers {self.layers}{limits}{query}, KV heads {self.kv_heads}, {sizes}{fixed}"


def _types_without_layer_types(
    config: Mapping[str, Any], layers: int, where: str, whole: Callable[[str, int | None], int]
) -> list[str]:
    """The layer types that the other fields of a config imply; InputError if they leave them open."""
    for field in NEED_LAYER_TYPES:
        allowed = "only some of the layers hold keys and values; layer_types must say which"
        require(not config.get(field), f"{where}:{field}", config.get(field), allowed)
    if config.get("full_attention_interval"):
        interval = whole("full_attention_interval", None)
        return [LINEAR if (i + 1) % interval else FULL for i in range(layers)]
    if config.get("attention_chunk_size"):
        allowed = "layer_types must say which layers are chunked"
        is_llama4 = config.get("model_type") in ("llama4", "llama4_text")
        require(is_llama4, f"{where}:attention_chunk_size", config["attention_chunk_size"], allowed)
        interval = whole("no_rope_layer_interval", 4)
        rotated = config.get("no_rope_layers") or [(i + 1) % interval for i in range(layers)]  # 0: without RoPE
        require(isinstance(rotated, list), f"{where}:no_rope_layers", rotated, "must be a list with an entry per layer")
        return [CHUNKED if rope else FULL for rope in rotated]
    window = None if config.get("use_sliding_window") is False else config.get("sliding_window")
    clear = window is None or config.get("model_type") in EVERY_LAYER_SLIDES
    require(clear, f"{where}:sliding_window", window, "layer_types must say which layers slide")
    return [FULL if window is None else SLIDING] * layers


def layer_tokens(config: KVConfig, tokens: int) -> int:
    """Tokens held by a sequence of ``tokens``, summed over the layers.

    A sliding layer counts min(tokens, window). A chunked layer holds tokens mod chunk between steps, none at a chunk's
    end and a whole chunk at its peak: min(tokens, chunk) is counted, the most it has held up to there.
    """
    full_layers = config.layers - config.sliding_layers - config.chunked_layers
    sliding = config.sliding_layers * min(tokens, config.sliding_window)
    return full_layers * tokens + sliding + config.chunked_layers * min(tokens, config.chunk)


def kv_bytes(config: KVConfig, batch: int, tokens: int, bits: float) -> int:
    """Bytes of the keys and values of ``batch`` sequences of ``tokens`` tokens each, rounded up to a whole byte.

        batch x layers x kv_heads x tokens x head_dim x 2 x bits/8        (2: a key and a value)

    :func:`layer_tokens` says what a sliding or chunked layer counts. With MLA these are the expanded keys and values of
    every head, head_dim + value_dim numbers. ``bits`` per number is an average: a quantised cache has scales and zero
    points besides (4-bit numbers in groups of 32, each with a 16-bit scale and zero point: 5 bits).
    """
    return math.ceil(batch * layer_tokens(config, tokens) * config.kv_heads * config.pair_dim * bits / 8)


def latent_bytes(config: KVConfig, batch: int, tokens: int, bits: float) -> int:
    """The same for MLA's latents: kv_lora_rank + qk_rope_head_dim numbers a token and layer. 0 without MLA."""
    return math.ceil(batch * layer_tokens(config, tokens) * sum(config.latent_dims) * bits / 8)


def load(model: str) -> KVConfig:
    """The model of a published name, or of a path to a config.json or to its folder; InputError if there is none."""
    files = (resources.files("kvbench.models") / "shapes").iterdir()
    published = {file.name.removesuffix(".json"): file for file in files if file.name.endswith(".json")}
    if model in published:
        return KVConfig.from_json(json.loads(published[model].read_text(encoding="utf-8")), model)
    path = Path(model)
    try:
        path = path / "config.json" if path.is_dir() else path
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        allowed = one_of(model, published, "a path to a config.json or to a folder with one, or one of")
        raise InputError("--model", model, allowed) from error
    except OSError as error:
        raise InputError("--model", path, f"cannot be read: {error}") from error
    except ValueError as error:
        raise InputError("--model", path, f"is not JSON: {error}") from error
    require(isinstance(config, dict), "--model", path, "must hold a JSON object, as a transformers config.json does")
    name = path.resolve().parent.name if path.name == "config.json" else path.stem
    return KVConfig.from_json(config, name, where=str(path))
