"""A decode step of a plain decoder without the library's wrappers: the same modules in the same order.

transformers' forward of one token spends time on what a step does not need: masks, keyword arguments, decorators, a
dispatch for each layer. This is its arithmetic alone, for the decoders built like Llama. It is used where it is known
to be that model's arithmetic, and nothing (a hook, a spread model) sits where it would be passed by.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from ..methods.base import KVCache
from ..methods.rotary import rope

BUILT_ALIKE = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)


def is_plain(model: PreTrainedModel) -> bool:
    """Whether :func:`lean_step` is what ``model(...)`` does; looked at anew for each step, for hooks come and go."""
    if type(model) not in BUILT_ALIKE or model.training:
        return False
    base: Any = model.model
    parts = [model, base]
    for layer in base.layers:
        if getattr(layer.self_attn, "sliding_window", None) is not None:
            return False
        parts += (layer, layer.self_attn)
    return not any(p._forward_hooks or p._forward_pre_hooks or "forward" in p.__dict__ for p in parts)


def lean_step(model: PreTrainedModel, cache: KVCache, token: torch.Tensor) -> torch.Tensor:
    """Logits [rows, vocabulary] for one token [rows] of each row."""
    base: Any = model.model
    x = base.embed_tokens(token[:, None])
    positions = base.rotary_emb(x, position_ids=cache.next_positions()[:, None])
    for number, layer in enumerate(base.layers):
        attention = layer.self_attn
        h = layer.input_layernorm(x)
        heads = (*h.shape[:-1], -1, attention.head_dim)
        query, key = attention.q_proj(h).view(heads), attention.k_proj(h).view(heads)
        if hasattr(attention, "q_norm"):
            query, key = attention.q_norm(query), attention.k_norm(key)
        query, key = (rope(part.transpose(1, 2), positions) for part in (query, key))
        value = attention.v_proj(h).view(heads).transpose(1, 2)
        out = cache.attend(number, query, key, value, attention.scaling, None)
        x = x + attention.o_proj(out.transpose(1, 2).reshape(*h.shape[:-1], -1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    logits: torch.Tensor = model.lm_head(base.norm(x))
    return logits[:, -1]
