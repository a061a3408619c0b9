"""Tiny random models of all causal-LM architectures of the installed transformers, which run in milliseconds.

    for name in model_types():
        for variant in variants(name):
            model = build(name, variant.settings)

The list is transformers' own mapping, and sizes are set by the names of a config class's fields, so that a new release
adds its new architectures by itself. Further fields and variants are data, in :mod:`.architecture_settings`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .architecture_settings import (
    CHUNK,
    CHUNK_FIELDS,
    HEADS,
    LAYERS,
    SETTINGS,
    SIZES,
    SOFT_CAP,
    SOFT_CAP_FIELDS,
    VARIANTS,
    VOCABULARY,
    WEIGHT_STD,
    WINDOW,
    WINDOW_EXCEEDED_IN_DECODE,
    WINDOW_FIELDS,
    WINDOW_NEVER_EXCEEDED,
    Variant,
)

SINK_STD = 1.5
BIAS_STD = 0.1


def model_types() -> list[str]:
    """Model types of transformers' causal-LM mapping."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


_defaults_cache: dict[str, dict[str, Any]] = {}


def _defaults(cls: type[PretrainedConfig]) -> dict[str, Any]:
    """Config fields with the values of the default instance, or the class's defaults if that cannot be built."""
    key = f"{cls.__module__}.{cls.__qualname__}"
    if key not in _defaults_cache:
        fields = {f.name: f.default for f in dataclasses.fields(cls)}
        try:
            values = vars(cls())
        except Exception:  # the defaults of some classes do not pass the class's own validation
            values = {}
        _defaults_cache[key] = {name: values.get(name, default) for name, default in fields.items()}
    return _defaults_cache[key]


def variants(name: str) -> list[Variant]:
    """Variants of an architecture to test; the first has the config class's defaults, with small windows."""
    values = dict(_defaults(CONFIG_MAPPING[name]))
    for nested in [values.get("text_config"), values.get("decoder")]:
        if isinstance(nested, PretrainedConfig):
            values |= _defaults(type(nested))
    special: dict[str, Any] = {name: CHUNK for name in CHUNK_FIELDS if name in values}
    special |= {name: SOFT_CAP for name in SOFT_CAP_FIELDS if isinstance(values.get(name), float)}
    windows = [name for name in WINDOW_FIELDS if name in values]
    if not windows:
        first = [Variant("", special)]
        if any(name in special for name in CHUNK_FIELDS):
            exceeded = special | dict.fromkeys(CHUNK_FIELDS, WINDOW_EXCEEDED_IN_DECODE)
            first.append(Variant("chunk passed while decoding", exceeded))
        return [*first, *VARIANTS.get(name, ())]
    switches: dict[str, Any] = {"use_sliding_window": True} if "use_sliding_window" in values else {}
    if "max_window_layers" in values:
        switches["max_window_layers"] = LAYERS // 2

    def with_window(tokens: int) -> dict[str, Any]:
        return special | dict.fromkeys(windows, tokens) | switches

    is_on = any(values[name] for name in windows) and values.get("use_sliding_window", True)
    exceeded_in_decode = Variant("window passed while decoding", with_window(WINDOW_EXCEEDED_IN_DECODE))
    if is_on:
        never_exceeded = Variant("window never passed", with_window(WINDOW_NEVER_EXCEEDED))
        windowed = [Variant("", with_window(WINDOW)), exceeded_in_decode, never_exceeded]
    else:
        windowed = [Variant("", special), Variant("window", with_window(WINDOW)), exceeded_in_decode]
    return [*windowed, *VARIANTS.get(name, ())]


def shrink(cls: type[PretrainedConfig], settings: Mapping[str, Any]) -> PretrainedConfig:
    """Tiny config of a class.

    Sets all known sizes, shortens lists that have one entry for each layer, and shrinks nested configs.

    Args:
        cls: config class.
        settings: further fields; a nested config takes the ones that it has.
    """
    default = _defaults(cls)
    values: dict[str, Any] = {name: size for name, size in SIZES.items() if name in default}
    if "qk_rope_head_dim" in default:  # MLA: each head has a key, whose width is the sum of its parts
        values.pop("head_dim", None)
        values["num_key_value_heads"] = HEADS
    settings = dict(settings)
    for name, value in default.items():
        if name in settings and not isinstance(value, PretrainedConfig):
            continue
        if name.endswith(("token_id", "token_index")):
            values[name] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}.get(name, VOCABULARY - 1)
        elif isinstance(value, PretrainedConfig):
            is_text = not name.startswith(("vision", "audio"))
            known = _defaults(type(value))
            own = {key: settings[key] for key in settings if is_text and key in known}
            own |= settings.pop(name, {})
            values[name] = shrink(type(value), SETTINGS.get(value.model_type, {}) | own)
            settings = {key: v for key, v in settings.items() if key in default or key not in own}
        elif isinstance(value, int) and "vocab" in name and value > VOCABULARY:
            values[name] = VOCABULARY
        elif isinstance(value, list | tuple) and len(value) == default.get("num_hidden_layers") and name not in SIZES:
            kinds = list(dict.fromkeys(value))
            if len(kinds) > LAYERS:  # indices of layers
                values[name] = [layer for layer in value if isinstance(layer, int) and layer < LAYERS]
            elif len(kinds) > 1:
                values[name] = type(value)(kinds[i % len(kinds)] for i in range(LAYERS))
    return cls(**values | settings)


def build(name: str, settings: Mapping[str, Any] | None = None, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """Build a random model of an architecture.

    Args:
        name: model type.
        settings: config fields beyond the sizes.
        dtype: dtype of the weights.
    """
    config = shrink(CONFIG_MAPPING[name], SETTINGS.get(name, {}) | dict(settings or {}))
    torch.manual_seed(0)
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}  # the other experts lack float64
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, **eager)
    draw_weights(model)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.double().eval() if dtype == torch.float64 else model.eval()  # some modules ignore ``dtype``


@torch.no_grad()
def draw_weights(model: torch.nn.Module) -> None:
    """Draw weights under which every part of the model affects the output: peaked attention, biases, sinks."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        last = name.rsplit(".", 1)[-1]
        if "sink" in last:
            std = SINK_STD
        elif last in ("A_log", "D", "dt_bias", "A", "e_score_correction_bias") or not parameter.is_floating_point():
            continue  # of recurrent layers and routers: other values can be unstable
        elif parameter.ndim > 1:
            std = WEIGHT_STD
        elif "bias" in last:
            std = BIAS_STD
        else:
            continue
        parameter.normal_(0.0, std, generator=generator)


def kinds_of_layers(model: PreTrainedModel) -> Counter[str]:
    """Number of layers of each kind, by the cache that transformers makes for the model.

    Keys: ``full``, ``window`` (also chunks), ``recurrent``, ``both`` (a state beside full attention), ``shared`` (the
    keys of another layer), ``other``; empty for a model without such a cache.
    """
    try:
        layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    except Exception:
        return Counter()
    return Counter(_KINDS.get(type(layer).__name__, "other") for layer in layers)


_KINDS = {
    "DynamicLayer": "full",
    "DynamicSlidingWindowLayer": "window",
    "LinearAttentionLayer": "recurrent",
    "LinearAttentionAndFullAttentionLayer": "both",
    "DummyLayer": "shared",
}


def features(model: PreTrainedModel) -> list[str]:
    """Features of a model's attention, as words for a table."""
    config = model.config.get_text_config(decoder=True)
    kinds, values = kinds_of_layers(model), vars(config)
    parameters = [name for name, _ in model.named_parameters()]
    chunked = any(values.get(name) for name in CHUNK_FIELDS)
    marks = {
        "windows": bool(kinds["window"]) and not chunked,
        "chunks": bool(kinds["window"]) and chunked,
        "soft-cap": any(values.get(name) for name in SOFT_CAP_FIELDS),
        "sinks": any("sink" in name.rsplit(".", 1)[-1] for name in parameters),
        "MLA": values.get("kv_lora_rank") is not None,
        "indexed attention": any("indexer" in name for name in parameters),
        "recurrent layers": bool(kinds["recurrent"] or kinds["both"]),
        "shared keys and values": "reuse" in (getattr(config, "kv_sharing_modes", None) or ()),
    }
    return [mark for mark, has in marks.items() if has]
