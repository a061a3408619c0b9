"""Sizes, config fields and variants of the tiny random models of :mod:`.architectures`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

VOCABULARY = 101
LAYERS = 4
HIDDEN_SIZE, HEADS, KV_HEADS, HEAD_DIM, FFN_SIZE, EXPERT_FFN_SIZE, EXPERTS, SMALL = 64, 4, 2, 16, 96, 32, 4, 8
WEIGHT_STD = 0.3
"""Large weights give peaked attention; with the usual 0.02 the attention is nearly uniform."""
SOFT_CAP = 2.0
"""A cap that is low enough to change the logits of such weights."""
# For a prompt of 64 tokens and 8 decode steps: a window that is exceeded in the prompt, one that is exceeded while
# decoding, one that is never exceeded, and the length of a chunk.
WINDOW, WINDOW_EXCEEDED_IN_DECODE, WINDOW_NEVER_EXCEEDED, CHUNK = 24, 68, 256, 32

_FIELDS: tuple[tuple[int, str], ...] = (
    (
        HIDDEN_SIZE,
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
        FFN_SIZE,
        "intermediate_size ffn_dim n_inner dim_ff dff d_inner ffn_hidden_size decoder_ffn_dim encoder_ffn_dim "
        "feed_forward_size intermediate_size_mlp",
    ),
    (
        EXPERT_FFN_SIZE,
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
"""Value of each size, by the names that config classes give it."""

SETTINGS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "codegen": {"rotary_dim": SMALL},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}}
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": KV_HEADS, "rope_theta": 1e4, "clip_qkv": 2.0},
        "ffn_config": {"ffn_hidden_size": EXPERT_FFN_SIZE, "moe_num_experts": EXPERTS, "moe_top_k": 2},
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
"""Further config fields that a model type needs."""

WINDOW_FIELDS = ("sliding_window", "sliding_window_size", "attention_window_size", "local_attention", "window_size")
CHUNK_FIELDS = ("attention_chunk_size",)
SOFT_CAP_FIELDS = ("attn_logit_softcapping",)


@dataclass(frozen=True)
class Variant:
    """A variant of an architecture.

    Attributes:
        name: What differs from the defaults of the config class; empty: nothing.
        settings: Fields of the config.
    """

    name: str
    settings: Mapping[str, Any]


def _rope(rope_type: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 1e4, **values}}


def _longrope(original: int, **scales: float) -> dict[str, Any]:
    short, long = ([1.0 + step * i for i in range(HEAD_DIM // 2)] for step in (0.05, 0.5))
    lengths = {"original_max_position_embeddings": original}
    return _rope("longrope", short_factor=short, long_factor=long, **lengths, **scales) | lengths


LONGROPE_LENGTHS = {"below its length": 256, "above its length": 32, "passed while decoding": 68}
"""Original lengths of longrope models in tokens, by where the 64 + 8 tokens of a test are."""
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
            Variant(f"longrope, {position}", _longrope(original, **scales))
            for position, original in LONGROPE_LENGTHS.items()
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
"""Further variants of single architectures."""
