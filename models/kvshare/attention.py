"""Attention over keys and values that the model passes in.

Shapes: B batch, H query heads, G KV heads, D head dimension, n new tokens, T tokens attended over.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, eager_attention_forward

from ...methods.cache.attention import ATTENTION_NAME
from ...methods.cache.rotary import rope
from ...methods.sharing.kv_map import SLIDING
from .config import KVShareLlamaConfig

KV = tuple[torch.Tensor, torch.Tensor]
"""Keys after RoPE and values, [B, G, tokens, D] each."""


class KVShareAttention(LlamaAttention):
    """Attention with given keys and values; only a KV source has projections for its own."""

    def __init__(self, config: KVShareLlamaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        if config.source[layer_idx] != layer_idx:
            del self.k_proj, self.v_proj
        slides = config.types[layer_idx] == SLIDING
        self.sliding_window = config.sliding_window if slides else None

    def project_kv(self, x: torch.Tensor, cos_sin: KV) -> KV:
        """Keys, rotated by RoPE at their own positions, and values of the normalized input x [B, n, hidden]."""
        shape = (*x.shape[:-1], -1, self.head_dim)
        keys, values = (p(x).view(shape).transpose(1, 2) for p in (self.k_proj, self.v_proj))  # [B, G, n, D]
        return rope(keys, cos_sin), values

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        position_embeddings: KV,
        kv: KV,
        attention_mask: torch.Tensor | None = None,
        strictly_causal: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend over the given keys and values.

        Args:
            hidden_states: [B, n, hidden], normalized.
            position_embeddings: cosines and sines of RoPE at the positions of the new tokens.
            kv: keys and values of all visible tokens; those of the new tokens only if the cache attends itself.
            attention_mask: mask in the form that the attention implementation takes.
            strictly_causal: no token attends to itself; see :func:`.masks.strictly_causal_mask`.
            **kwargs: further arguments of the attention function.

        Returns:
            The output [B, n, hidden], and the attention weights if the implementation returns them.
        """
        shape = hidden_states.shape[:-1]
        query = self.q_proj(hidden_states).view(*shape, -1, self.head_dim).transpose(1, 2)  # [B, H, n, D]
        query = rope(query, position_embeddings)
        name = self.config._attn_implementation
        n_empty = 0  # leading queries that no key is visible to; their output is zero and is not computed
        if name == ATTENTION_NAME:
            kwargs["strictly_causal"] = strictly_causal
        elif strictly_causal and attention_mask is None:  # causal attention over the sequence without its last key
            n_empty, query, kv = 1, query[:, :, 1:], (kv[0][:, :, :-1], kv[1][:, :, :-1])
        elif strictly_causal:  # column 0 of the mask
            zeros = kv[0].new_zeros(*kv[0].shape[:2], 1, kv[0].shape[3])
            kv = (torch.cat([zeros, kv[0]], dim=2), torch.cat([zeros, kv[1]], dim=2))  # [B, G, 1 + T, D]
        if n_empty and not query.shape[2]:
            out, weights = hidden_states.new_zeros(*shape, self.o_proj.in_features), None
        else:
            out, weights = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)(
                self,
                query,
                *kv,
                attention_mask,
                dropout=self.attention_dropout if self.training else 0.0,
                scaling=self.scaling,
                sliding_window=self.sliding_window,
                **kwargs,
            )
            out = out.flatten(2)  # [B, n, H * D]
            if n_empty:
                out = torch.cat([out.new_zeros(out.shape[0], 1, out.shape[2]), out], dim=1)
        return self.o_proj(out), weights
