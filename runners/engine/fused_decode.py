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
from .step import FUSED, DecodeStep
from .step_operations import StepOperations, is_changed, step_operations

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


class FusedStep(DecodeStep):
    """A step of a model that :func:`supports_fused_decode`."""

    mode = FUSED

    def __init__(self, model: PreTrainedModel, cache: KVCache):
        super().__init__(cache)
        self._model, self._operations = model, step_operations(model)

    def forward(self, token: torch.Tensor) -> torch.Tensor:
        return _forward(self._model, self.cache, token, self._operations)


def _forward(model: PreTrainedModel, cache: KVCache, token: torch.Tensor, operations: StepOperations) -> torch.Tensor:
    base: Any = model.model
    x = base.embed_tokens(token[:, None])  # [rows, 1, hidden]
    rope = operations.rope(base.rotary_emb(x, position_ids=cache.next_positions()[:, None]))
    next_norms = [layer.input_layernorm for layer in base.layers[1:]] + [base.norm]
    h = operations.norm(x, base.layers[0].input_layernorm)
    for number, (layer, next_norm) in enumerate(zip(base.layers, next_norms, strict=True)):
        attention = layer.self_attn
        slot = operations.next_slot(cache, number)
        parts = operations.qkv(attention, h, rope, slot)
        query, key, value = (part.transpose(1, 2) for part in parts)  # [rows, heads, 1, D]
        call = LayerCall(query, key, value, LogitRule(attention.scaling), is_stored=slot is not None)
        out = cache.attend(number, call, None)
        out = attention.o_proj(out.transpose(1, 2).reshape(*h.shape[:-1], -1))
        x, h = operations.add_norm(x, out, layer.post_attention_layernorm)
        x, h = operations.add_norm(x, operations.mlp(layer.mlp, h), next_norm)
    logits: torch.Tensor = model.lm_head(h)
    return logits[:, -1]
