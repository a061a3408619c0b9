"""A decode step of a Llama-like decoder without transformers' wrappers: the same modules in the same order.

transformers' forward of one token spends time on masks, keyword arguments, decorators and a dispatch per layer, which
a step does not need. This is only its arithmetic. It is used only for classes that are known to have this arithmetic,
and only if no module that it bypasses has a hook.
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

from ...methods.cache.cache import KVCache
from ...methods.cache.forward import LayerCall
from ...methods.cache.logits import LogitRule
from .prepacked import QKVSlice
from .step import FUSED, DecodeStep

LLAMA_LIKE = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)


def supports_fused_decode(model: PreTrainedModel) -> bool:
    """Whether a :class:`FusedStep` computes what ``model(...)`` does.

    Checked for every generation, because hooks may be added or removed.
    """
    if type(model) not in LLAMA_LIKE or model.training:
        return False
    base: Any = model.model
    modules = [model, base]
    for layer in base.layers:
        attention = layer.self_attn
        # The query, key and value projections may be computed as one product, which bypasses their hooks.
        modules += (layer, attention, attention.q_proj, attention.k_proj, attention.v_proj)
    return not any(map(is_changed, modules))


def is_changed(module: torch.nn.Module) -> bool:
    """Whether a module has a hook, or a forward that was set on the instance."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


class FusedStep(DecodeStep):
    """A step of a model that :func:`supports_fused_decode`."""

    mode = FUSED

    def __init__(self, model: PreTrainedModel, cache: KVCache):
        super().__init__(cache)
        self._model = model

    def forward(self, token: torch.Tensor) -> torch.Tensor:
        return _forward(self._model, self.cache, token)


def _forward(model: PreTrainedModel, cache: KVCache, token: torch.Tensor) -> torch.Tensor:
    base: Any = model.model
    x = base.embed_tokens(token[:, None])  # [rows, 1, hidden]
    apply_rope = OneTokenRope(base.rotary_emb(x, position_ids=cache.next_positions()[:, None]))
    for number, layer in enumerate(base.layers):
        attention = layer.self_attn
        h = layer.input_layernorm(x)
        query, key, value = (part.transpose(1, 2) for part in _qkv(attention, h, apply_rope))  # [rows, heads, 1, D]
        out = cache.attend(number, LayerCall(query, key, value, LogitRule(attention.scaling)), None)
        x = x + attention.o_proj(out.transpose(1, 2).reshape(*h.shape[:-1], -1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    logits: torch.Tensor = model.lm_head(base.norm(x))
    return logits[:, -1]


class OneTokenRope:
    """Llama's RoPE (:func:`...methods.cache.rotary.rope`) of one token per row; its tensors are shared by all layers.

    Args:
        cos_sin: Cosines and sines [B or 1, 1, D], as transformers' rotary embedding returns them.
    """

    def __init__(self, cos_sin: tuple[torch.Tensor, torch.Tensor]):
        self.cos, sin = (c[:, :, None] for c in cos_sin)
        first, second = sin.chunk(2, dim=-1)
        self.sin = torch.cat([-first, second], dim=-1)  # negated here instead of half of x in every layer

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, 1, H, D], rotated."""
        first, second = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat([second, first], dim=-1) * self.sin


def _qkv(attention: Any, h: torch.Tensor, apply_rope: OneTokenRope) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value [B, 1, heads, D] of ``h`` [B, 1, hidden]; query and key are rotated."""
    heads = (*h.shape[:-1], -1, attention.head_dim)
    if not isinstance(attention.q_proj, QKVSlice) or hasattr(attention, "q_norm"):
        query, key = attention.q_proj(h).view(heads), attention.k_proj(h).view(heads)
        if hasattr(attention, "q_norm"):
            query, key = attention.q_norm(query), attention.k_norm(key)
        return apply_rope(query), apply_rope(key), attention.v_proj(h).view(heads)
    fused = attention.q_proj.fused
    sizes = [size // attention.head_dim for size in fused.sizes]
    query_and_key, value = fused.whole(h).view(heads).split([sizes[0] + sizes[1], sizes[2]], dim=2)
    query, key = apply_rope(query_and_key).split(sizes[:2], dim=2)
    return query, key, value
