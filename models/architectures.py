"""Every causal language model of the installed transformers, as a random model small enough to run in milliseconds.

    for name in model_types():
        for variant in variants(name):
            model = build(name, variant.settings)

The list is transformers' own mapping and sizes are set by the names of a config class's fields, so a new release brings
its new architectures along. What a config needs beyond that is data: :data:`SETTINGS`, and :data:`VARIANTS` for single
architectures that have more than one form.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 101
LAYERS = 4
COMPACTION_INTERVAL_STEPS, HEADS, KV_HEADS, HEAD_DIM, INNER, EXPERT_INNER, EXPERTS, SMALL = 64, 4, 2, 16, 96, 32, 4, 8
WEIGHT_STD = 0.3
"""Large weights make peaked attention: with the usual 0.02 each token gets the same share."""
SINK_STD = 1.5
BIAS_STD = 0.1
SOFT_CAP = 2.0
"""A cap that changes the logits of such weights."""
WINDOW, CROSSED, UNREACHED, CHUNK = 24, 68, 256, 32
"""Tokens, for a prompt of 64 and 8 steps: a window passed in the prompt, while decoding, and never; a chunk."""

_FIELDS: tuple[tuple[int, str], ...] = (
    (
        COMPACTION_INTERVAL_STEPS,
        "hidden_size d_model n_embd emb_dim embedding_dim embedding_size word_embed_proj_dim lru_width "
        "backbone_hidden_size input_embedding_size output_embedding_size adapter_in_dim adapter_input_size "
        "adapter_out_dim",
    ),
    (
        LAYERS,
        "num_hidden_layers n_layer n_layers num_layers num_blocks decoder_layers num_decoder_layers "
        "encoder_layers num_encoder_layers depth",
    ),
    (
        HEADS,
        "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads "
        "num_decoder_attention_heads encoder_attention_heads num_encoder_attention_heads swa_num_attention_heads "
        "linear_num_value_heads time_step_rank mamba_dt_rank patch_size",
    ),
    (
        KV_HEADS,
        "num_key_value_heads num_kv_heads swa_num_key_value_heads num_query_groups linear_num_heads "
        "linear_num_key_heads mamba_n_groups n_groups mamba_ngroups o_groups index_n_heads",
    ),
    (
        HEAD_DIM,
        "head_dim swa_head_dim dim_head d_head kv_channels attention_head_size linear_head_dim mamba_head_dim "
        "mamba_d_head linear_key_head_dim linear_value_head_dim index_head_dim qk_nope_head_dim v_head_dim "
        "query_pre_attn_scalar chunk_size mamba_chunk_size image_size pronunciation_embed_dim shape_embed_dim "
        "adapter_rank rel_extent hc_lowrank index_topk",
    ),
    (
        INNER,
        "intermediate_size ffn_dim n_inner dim_ff dff d_inner ffn_hidden_size decoder_ffn_dim encoder_ffn_dim "
        "feed_forward_size intermediate_size_mlp",
    ),
    (
        EXPERT_INNER,
        "dense_intermediate_size shared_intermediate_size shared_expert_intermediate_size "
        "moe_intermediate_size expert_ffn_hidden_size moe_shared_expert_intermediate_size mlp_dim "
        "shared_experts_intermediate_size prefix_dense_intermediate_size router_hidden_size ext_pw_out_channel "
        "nemo_conv_channels",
    ),
    (
        SMALL,
        "qk_rope_head_dim mamba_d_state state_size ssm_state_size mamba_n_heads mamba_num_heads n_mamba_heads "
        "hidden_size_per_layer_input laurel_rank d_rel",
    ),
    (
        512,
        "max_position_embeddings n_positions n_ctx max_seq_len model_max_length context_length max_target_positions "
        "max_source_positions",
    ),
)
SIZES: dict[str, Any] = {name: size for size, names in _FIELDS for name in names.split()} | {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "num_experts_per_token"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "n_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("zero_expert_num", "first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("kv_lora_rank", "o_lora_rank", "qk_head_dim"), 24),
    "q_lora_rank": 20,
    "initializer_range": WEIGHT_STD,
    "is_decoder": True,
}
"""What each size becomes, by the names that config classes have for it."""

SETTINGS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "codegen": {"rotary_dim": SMALL},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}}
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": KV_HEADS, "rope_theta": 1e4, "clip_qkv": 2.0},
        "ffn_config": {"ffn_hidden_size": EXPERT_INNER, "moe_num_experts": EXPERTS, "moe_top_k": 2},
    },
    "dots3_note_text": {
        f"swa_{name}": SIZES[name]
        for name in ("num_attention_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim")
    }
    | {"swa_v_head_dim": HEAD_DIM, "swa_head_dim": HEAD_DIM + SMALL, "swa_num_key_value_heads": HEADS},
    "falcon": {"new_decoder_architecture": True},
    "falcon_h1": {"mamba_d_ssm": SMALL * HEAD_DIM},
    "gemma3n_text": {"num_kv_shared_layers": 2},
    "gemma4_text": {"global_head_dim": 2 * HEAD_DIM, "num_kv_shared_layers": 2},
    "gemma4_unified_text": {"global_head_dim": 2 * HEAD_DIM, "num_kv_shared_layers": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": SMALL},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"num_layers": 2, "head_dim": SIZES["qk_rope_head_dim"]},
    "mamba2": {"num_heads": SMALL},
    "minimax_m3_vl_text": {"rotary_dim": SMALL},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD_DIM,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"axial_pos_embds_dim": (32, 32), "axial_pos_shape": (16, 32)},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}
"""What a model type needs that the names of its fields do not give."""

WINDOWS = ("sliding_window", "sliding_window_size", "attention_window_size", "local_attention", "window_size")
CHUNKS = ("attention_chunk_size",)
SOFT_CAPS = ("attn_logit_softcapping",)


@dataclass(frozen=True)
class Variant:
    """A form of an architecture.

    Attributes:
        name: what is special about it; empty: the form that its config class describes.
        settings: fields of the config.
    """

    name: str
    settings: Mapping[str, Any]


def _rope(rope_type: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 1e4, **values}}


def _longrope(original: int, **scales: float) -> dict[str, Any]:
    short, long = ([1.0 + step * i for i in range(HEAD_DIM // 2)] for step in (0.05, 0.5))
    lengths = {"original_max_position_embeddings": original}
    return _rope("longrope", short_factor=short, long_factor=long, **lengths, **scales) | lengths


VARIANTS: dict[str, tuple[Variant, ...]] = {
    "llama": (
        Variant("multi-head, biases, tied", {"num_key_value_heads": HEADS, "attention_bias": True, "mlp_bias": True}),
        Variant("multi-query", {"num_key_value_heads": 1}),
        Variant("yarn", _rope("yarn", factor=4.0, original_max_position_embeddings=32)),
        Variant(
            "llama3",
            _rope("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
        ),
        Variant("linear", _rope("linear", factor=4.0)),
        Variant("dynamic, prompt above its length", _rope("dynamic", factor=4.0) | {"max_position_embeddings": 32}),
        Variant("dynamic, passed while decoding", _rope("dynamic", factor=4.0) | {"max_position_embeddings": 68}),
    ),
    **{
        name: tuple(
            Variant(f"longrope, {where}", _longrope(original, **scales))
            for original, where in ((256, "below its length"), (32, "above its length"), (68, "passed while decoding"))
        )
        for name, scales in (
            ("phi3", {}),
            ("phi4_multimodal", {}),
            ("phimoe", {"short_mscale": 1.0, "long_mscale": 1.25}),
        )
    },
    "cohere": (Variant("norm of queries and keys", {"use_qk_norm": True}),),
    "deepseek_v3": (
        Variant("no query rank", {"q_lora_rank": None}),
        Variant("RoPE by halves", {"rope_interleave": False}),
    ),
    "falcon": (
        Variant("multi-query", {"new_decoder_architecture": False, "multi_query": True}),
        Variant(
            "ALiBi",
            {"new_decoder_architecture": False, "multi_query": False, "num_kv_heads": HEADS, "alibi": True},
        ),
    ),
    "gemma3n_text": (Variant("no shared layers", {"num_kv_shared_layers": 0}),),
    "gemma4_text": (
        Variant("no shared layers", {"num_kv_shared_layers": 0}),
        Variant("values are keys", {"num_kv_shared_layers": 0, "attention_k_eq_v": True}),
    ),
    "gpt2": (Variant("scaled by layer", {"scale_attn_by_inverse_layer_idx": True}),),
    "gpt_bigcode": (Variant("multi-head", {"multi_query": False}),),
    "gpt_neox": (Variant("serial residual", {"use_parallel_residual": False}),),
    "smollm3": (Variant("no layer with RoPE", {"no_rope_layers": [0] * LAYERS}),),
}
"""Further forms of single architectures."""


def model_types() -> list[str]:
    """Model types of transformers' causal-LM mapping."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


_known: dict[str, dict[str, Any]] = {}


def _defaults(cls: type[PretrainedConfig]) -> dict[str, Any]:
    """Fields of a config class with the values of its default instance, or the class's own where that is not valid."""
    key = f"{cls.__module__}.{cls.__qualname__}"
    if key not in _known:
        fields = {f.name: f.default for f in dataclasses.fields(cls)}
        try:
            given = vars(cls())
        except Exception:  # the defaults of some classes do not pass the class's own validation
            given = {}
        _known[key] = {name: given.get(name, default) for name, default in fields.items()}
    return _known[key]


def variants(name: str) -> list[Variant]:
    """The forms in which an architecture is tried; the first one is that of its config class, with small windows."""
    values = dict(_defaults(CONFIG_MAPPING[name]))
    for nested in [values.get("text_config"), values.get("decoder")]:
        if isinstance(nested, PretrainedConfig):
            values |= _defaults(type(nested))
    special: dict[str, Any] = {name: CHUNK for name in CHUNKS if name in values}
    special |= {name: SOFT_CAP for name in SOFT_CAPS if isinstance(values.get(name), float)}
    windows = [name for name in WINDOWS if name in values]
    if not windows:
        crossed = [Variant("chunk passed while decoding", special | dict.fromkeys(CHUNKS, CROSSED))] if special else []
        return [Variant("", special), *(crossed if CHUNKS[0] in special else []), *VARIANTS.get(name, ())]
    switch: dict[str, Any] = {"use_sliding_window": True} if "use_sliding_window" in values else {}
    if "max_window_layers" in values:
        switch["max_window_layers"] = LAYERS // 2

    def slide(window: int) -> dict[str, Any]:
        return special | dict.fromkeys(windows, window) | switch

    is_on = any(values[name] for name in windows) and values.get("use_sliding_window", True)
    crossed = [Variant("window passed while decoding", slide(CROSSED))]
    if is_on:
        crossed.append(Variant("window never passed", slide(UNREACHED)))
    first = [Variant("", slide(WINDOW))] if is_on else [Variant("", special), Variant("window", slide(WINDOW))]
    return [*first, *crossed, *VARIANTS.get(name, ())]


def shrink(cls: type[PretrainedConfig], settings: Mapping[str, Any]) -> PretrainedConfig:
    """A tiny config of a class: every known size, every list of one entry a layer, and every config nested in it."""
    default = _defaults(cls)
    values: dict[str, Any] = {name: size for name, size in SIZES.items() if name in default}
    if "qk_rope_head_dim" in default:  # MLA: a key for every head, whose width follows from its parts
        values.pop("head_dim", None)
        values["num_key_value_heads"] = HEADS
    settings = dict(settings)
    for name, value in default.items():
        if name in settings and not isinstance(value, PretrainedConfig):
            continue
        if name.endswith(("token_id", "token_index")):
            values[name] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}.get(name, VOCABULARY - 1)
        elif isinstance(value, PretrainedConfig):
            of_text = not name.startswith(("vision", "audio"))
            known = _defaults(type(value))
            own = {key: settings[key] for key in settings if of_text and key in known}
            own |= settings.pop(name, {})
            values[name] = shrink(type(value), SETTINGS.get(value.model_type, {}) | own)
            settings = {key: v for key, v in settings.items() if key in default or key not in own}
        elif isinstance(value, int) and "vocab" in name and value > VOCABULARY:
            values[name] = VOCABULARY
        elif isinstance(value, list | tuple) and len(value) == default.get("num_hidden_layers") and name not in SIZES:
            kinds = list(dict.fromkeys(value))
            if len(kinds) > LAYERS:  # numbers of layers
                values[name] = [layer for layer in value if isinstance(layer, int) and layer < LAYERS]
            elif len(kinds) > 1:
                values[name] = type(value)(kinds[i % len(kinds)] for i in range(LAYERS))
    return cls(**values | settings)


def build(name: str, settings: Mapping[str, Any] | None = None, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A random model.

    Args:
        name: model type.
        settings: fields of the config beyond the sizes.
        dtype: of its weights.
    """
    config = shrink(CONFIG_MAPPING[name], SETTINGS.get(name, {}) | dict(settings or {}))
    torch.manual_seed(0)
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}  # the other experts lack float64
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, **eager)
    draw_weights(model)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.double().eval() if dtype == torch.float64 else model.eval()  # some parts ignore ``dtype``


@torch.no_grad()
def draw_weights(model: torch.nn.Module) -> None:
    """Weights with which every part of the model counts: peaked attention, biases, sinks."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        last = name.rsplit(".", 1)[-1]
        if "sink" in last:
            std = SINK_STD
        elif last in ("A_log", "D", "dt_bias", "A", "e_score_correction_bias") or not parameter.is_floating_point():
            continue  # of recurrent layers and routers: they decide what is stable
        elif parameter.ndim > 1:
            std = WEIGHT_STD
        elif "bias" in last:
            std = BIAS_STD
        else:
            continue
        parameter.normal_(0.0, std, generator=generator)


def kinds_of_layers(model: PreTrainedModel) -> Counter[str]:
    """How many of its layers hold what, by the cache that transformers makes for it.

    Keys: ``full``, ``window`` (chunks too), ``recurrent``, ``both`` (a state beside full attention), ``shared`` (the
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
    """What is special about a model's attention, for a reader."""
    config = model.config.get_text_config(decoder=True)
    kinds, values = kinds_of_layers(model), vars(config)
    parameters = [name for name, _ in model.named_parameters()]
    chunked = any(values.get(name) for name in CHUNKS)
    marks = {
        "windows": bool(kinds["window"]) and not chunked,
        "chunks": bool(kinds["window"]) and chunked,
        "soft-cap": any(values.get(name) for name in SOFT_CAPS),
        "sinks": any("sink" in name.rsplit(".", 1)[-1] for name in parameters),
        "MLA": values.get("kv_lora_rank") is not None,
        "indexed attention": any("indexer" in name for name in parameters),
        "recurrent layers": bool(kinds["recurrent"] or kinds["both"]),
        "shared keys and values": "reuse" in (getattr(config, "kv_sharing_modes", None) or ()),
    }
    return [mark for mark, has in marks.items() if has]
