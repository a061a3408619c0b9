"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1); see :mod:`...methods.sharing.mla`.

Two equal forms. *Expanded*, in training and with any cache of transformers: keys and values of all heads are made from
the latents of all tokens, as transformers' DeepSeek classes do. *Absorbed*, with a kvbench cache: the matrices that
make keys and values are applied to the query and to the output instead, so that the cache attends over the latents.
Weights have the names that transformers' DeepSeek-V3 gives them; RoPE pairs channels by halves (``rope_interleave:
false`` there).

Shapes: B batch, H query heads, n new tokens, T tokens attended over, r latent rank, d_R, d_N and d_V channels of the
RoPE key, of the other part of a key, and of a value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRMSNorm, eager_attention_forward

from ...methods.cache.attention import tag
from ...methods.cache.rotary import rope
from .attention import KV
from .config import KVShareLlamaConfig


class LatentExpansion(nn.Linear):
    """Linear layer that makes keys and values of all heads from latents.

    Its own class, because the absorbed form reads the weight, so the engine must not replace the layer by one with
    another layout of weights.
    """


class LatentAttention(nn.Module):
    """Attention over latents and a RoPE key that are made for each token and shared by all heads."""

    is_causal = True
    num_key_value_groups = 1

    def __init__(self, config: KVShareLlamaConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        rank, rotated = config.kv_lora_rank, config.qk_rope_head_dim
        plain, value = config.qk_nope_head_dim, config.v_head_dim
        assert rank is not None and rotated is not None and plain is not None and value is not None
        self.rank, self.rotated, self.plain, self.value = rank, rotated, plain, value
        self.heads, bias = config.num_attention_heads, config.attention_bias
        self.scaling = (plain + rotated) ** -0.5
        self.attention_dropout = config.attention_dropout
        self.q_proj = nn.Linear(config.hidden_size, self.heads * (plain + rotated), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(config.hidden_size, rank + rotated, bias=bias)
        self.kv_a_layernorm = LlamaRMSNorm(rank, eps=config.rms_norm_eps)
        self.kv_b_proj = LatentExpansion(rank, self.heads * (plain + value), bias=False)
        self.o_proj = nn.Linear(self.heads * value, config.hidden_size, bias=bias)

    def project_kv(self, x: torch.Tensor, cos_sin: KV) -> KV:
        """Latents [B, 1, n, r] and RoPE keys [B, 1, n, d_R] of the normalized input x [B, n, hidden]."""
        latent, key = self.kv_a_proj_with_mqa(x)[:, None].split([self.rank, self.rotated], dim=-1)
        return self.kv_a_layernorm(latent), rope(key, cos_sin)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: KV,
        kv: KV,
        attention_mask: torch.Tensor | None = None,
        strictly_causal: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend over the given latents and RoPE keys, which a kvbench cache extends by those of earlier tokens.

        Args:
            hidden_states: [B, n, hidden], normalized.
            position_embeddings: cosines and sines of RoPE at the positions of the new tokens.
            kv: latents and RoPE keys, see :meth:`project_kv`.
            attention_mask: mask in the form that the attention implementation takes.
            strictly_causal: always False, since no layer has a higher source.
            **kwargs: further arguments of the attention function.

        Returns:
            The output [B, n, hidden], and the attention weights if the implementation returns them.
        """
        shape = hidden_states.shape[:-1]
        query = self.q_proj(hidden_states).view(*shape, self.heads, -1).transpose(1, 2)  # [B, H, n, d_N + d_R]
        query, rotated_query = query.split([self.plain, self.rotated], dim=-1)
        rotated_query = rope(rotated_query, position_embeddings)
        latent, rotated_key = kv  # [B, 1, T, r], [B, 1, T, d_R]
        cache = getattr(latent, "kvbench_cache", None)
        if cache is None:
            query = torch.cat([query, rotated_query], dim=-1)
            key, value = self.expand(latent, rotated_key)
        else:
            query = torch.cat([rotated_query, query @ self._expansions()[0]], dim=-1)  # [B, H, n, d_R + r]
            key, value = tag(torch.cat([rotated_key, latent], dim=-1), cache), latent  # [B, 1, n, d_R + r], its last r
        name = self.config._attn_implementation
        out, weights = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        if cache is not None:  # [B, n, H, r] -> [B, n, H, d_V]
            out = (out.transpose(1, 2) @ self._expansions()[1].transpose(1, 2)).transpose(1, 2)
        return self.o_proj(out.flatten(2)), weights

    def expand(self, latent: torch.Tensor, rotated_key: torch.Tensor) -> KV:
        """Keys [B, H, T, d_N + d_R] and values [B, H, T, d_V] of all heads."""
        expanded = self.kv_b_proj(latent[:, 0]).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = expanded.split([self.plain, self.value], dim=-1)
        return torch.cat([key, rotated_key.expand(-1, self.heads, -1, -1)], dim=-1), value

    def _expansions(self) -> tuple[torch.Tensor, torch.Tensor]:
        """W_UK [H, d_N, r] and W_UV [H, d_V, r]."""
        weight = self.kv_b_proj.weight.view(self.heads, self.plain + self.value, self.rank)
        return weight[:, : self.plain], weight[:, self.plain :]
