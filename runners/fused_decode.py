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

from ..methods.cache.cache import KVCache
from ..methods.cache.forward import LayerCall
from ..methods.cache.logits import LogitRule

BUILT_ALIKE = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)


def supports_fused_decode(model: PreTrainedModel) -> bool:
    """Whether :func:`fused_decode_step` is what ``model(...)`` does.

    Re-checked every step, because hooks may be added or removed.
    """
    if type(model) not in BUILT_ALIKE or model.training:
        return False
    base: Any = model.model
    parts = [model, base]
    for layer in base.layers:
        attention = layer.self_attn
        # its first projections may be taken as one product
        parts += (layer, attention, attention.q_proj, attention.k_proj, attention.v_proj)
    return not any(map(is_changed, parts))


def is_changed(module: torch.nn.Module) -> bool:
    """Whether a hook, or a forward of its own, sits on a module."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def fused_decode_step(model: PreTrainedModel, cache: KVCache, token: torch.Tensor) -> torch.Tensor:
    """Logits [rows, vocabulary] for one token [rows] of each row."""
    base: Any = model.model
    x = base.embed_tokens(token[:, None])
    turned = Turn(base.rotary_emb(x, position_ids=cache.next_positions()[:, None]))
    for number, layer in enumerate(base.layers):
        attention = layer.self_attn
        h = layer.input_layernorm(x)
        query, key, value = (part.transpose(1, 2) for part in _projected(attention, h, turned))
        out = cache.attend(number, LayerCall(query, key, value, LogitRule(attention.scaling)), None)
        x = x + attention.o_proj(out.transpose(1, 2).reshape(*h.shape[:-1], -1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    logits: torch.Tensor = model.lm_head(base.norm(x))
    return logits[:, -1]


class Turn:
    """Llama's rotation (:func:`.methods.rotary.rope`) of one token a row, with what all layers share done once.

    Args:
        cos_sin: cosines and sines [B or 1, 1, D], as transformers' embedding gives them.
    """

    def __init__(self, cos_sin: tuple[torch.Tensor, torch.Tensor]):
        self.cos, sin = (c[:, :, None] for c in cos_sin)
        first, second = sin.chunk(2, dim=-1)
        self.sin = torch.cat([-first, second], dim=-1)  # so that no half of x has to be negated

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, 1, H, D], turned."""
        first, second = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat([second, first], dim=-1) * self.sin


def _projected(attention: Any, h: torch.Tensor, turned: Turn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value [B, 1, heads, D] of ``h`` [B, 1, hidden], turned where they are to be."""
    heads = (*h.shape[:-1], -1, attention.head_dim)
    shared = getattr(attention.q_proj, "shared", None)  # of weights.py: all three are one product
    if shared is None or hasattr(attention, "q_norm"):
        query, key = attention.q_proj(h).view(heads), attention.k_proj(h).view(heads)
        if hasattr(attention, "q_norm"):
            query, key = attention.q_norm(query), attention.k_norm(key)
        return turned(query), turned(key), attention.v_proj(h).view(heads)
    sizes = [size // attention.head_dim for size in shared.sizes]
    query_and_key, value = shared.whole(h).view(heads).split([sizes[0] + sizes[1], sizes[2]], dim=2)
    query, key = turned(query_and_key).split(sizes[:2], dim=2)
    return query, key, value
