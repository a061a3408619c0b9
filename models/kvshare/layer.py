"""Decoder layer with shared keys and values, and the state of a forward that passes through the layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

from ...methods.cache.cache import KVCache
from ...methods.sharing.kv_map import LINEAR
from .attention import KV, KVShareAttention
from .config import KVShareLlamaConfig
from .latent import LatentAttention
from .masks import STRICTLY_CAUSAL
from .retention import GatedRetention


@dataclass
class ForwardState:
    """Tensors of one forward between two layers.

    Attributes:
        hidden: [B, n, hidden].
        cos_sin: cosines and sines of RoPE at the positions of the new tokens.
        masks: attention masks by layer type, see :func:`.masks.attention_masks`.
        past: the cache, or None.
        is_real: [B, n] bool, False for padding; None: no padding.
        n_passes: passes over a cyclic segment.
        options: further arguments of the attention function.
        hidden_states: input of the first layer and output of each layer; None: not collected.
        attentions: attention weights of each layer; None: not collected.
        shared_kv: keys and values by source layer, with those of earlier tokens if the cache returns them.
        kv_loss: see :class:`.model.KVShareModelOutput`.
    """

    hidden: torch.Tensor
    cos_sin: KV
    masks: dict[str, torch.Tensor | None]
    past: Any
    is_real: torch.Tensor | None
    n_passes: int
    options: dict[str, Any]
    hidden_states: list[torch.Tensor] | None
    attentions: list[torch.Tensor | None] | None
    shared_kv: dict[int, KV]
    kv_loss: torch.Tensor | None = None

    def append_kv(self, i: int, kv: KV) -> None:
        """Append the keys and values of source layer i to the cache, and share what the cache returns."""
        self.shared_kv[i] = kv if self.past is None else self.past.update(*kv, i)

    def drop_all_but_last(self, n: int) -> None:
        """Drop all but the last ``n`` of the new tokens."""
        self.hidden = self.hidden[:, -n:]
        self.cos_sin = (self.cos_sin[0][:, -n:], self.cos_sin[1][:, -n:])
        for kind, mask in self.masks.items():
            if mask is not None and mask.dim() == 4:
                self.masks[kind] = mask[:, :, -n:]


@dataclass
class Recurrence:
    """Input and output state of a retention layer.

    Attributes:
        is_real: [B, n] bool, False for padding; None: no padding.
        before: state before the new tokens. It is not overwritten, since a checkpointed layer is run again from it.
        after: state after the new tokens.
    """

    is_real: torch.Tensor | None
    before: torch.Tensor | None
    after: torch.Tensor | None = None


class KVShareDecoderLayer(LlamaDecoderLayer):
    """Llama layer whose attention takes given keys and values, or that has gated retention in place of attention."""

    def __init__(self, config: KVShareLlamaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.layer_idx, self.layer_type = layer_idx, config.types[layer_idx]
        self.mixer: GatedRetention | None = None
        is_source = config.source[layer_idx] == layer_idx
        if self.layer_type == LINEAR:
            del self.self_attn
            assert config.retention_heads is not None and config.head_dim is not None
            eps = config.rms_norm_eps
            self.mixer = GatedRetention(config.hidden_size, config.retention_heads, config.head_dim, eps)
            return
        attention = KVShareAttention if config.kv_lora_rank is None else LatentAttention
        self.self_attn = attention(config, layer_idx)  # type: ignore[assignment]
        if is_source and config.separate_kv_norm:
            self.kv_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def project_kv(self, hidden_states: torch.Tensor, cos_sin: KV) -> KV:
        """Keys and values, or latents and RoPE keys, of the layer's input [B, n, hidden]."""
        norm = getattr(self, "kv_layernorm", self.input_layernorm)
        attention: KVShareAttention | LatentAttention = self.self_attn  # type: ignore[assignment]
        return attention.project_kv(norm(hidden_states), cos_sin)

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        position_embeddings: KV,
        kv: KV | None = None,
        attention_mask: torch.Tensor | None = None,
        strictly_causal: bool = False,
        recurrence: Recurrence | None = None,
        attentions: list[torch.Tensor | None] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Map [B, n, hidden] to the same shape.

        Args:
            hidden_states: [B, n, hidden].
            position_embeddings: cosines and sines of RoPE.
            kv: keys and values to attend over; None for a retention layer.
            attention_mask: see :meth:`.KVShareAttention.forward`.
            strictly_causal: no token attends to itself.
            recurrence: state of a retention layer; its ``after`` is set.
            attentions: list to which the attention weights are appended.
            **kwargs: further arguments of the attention function.
        """
        x = self.input_layernorm(hidden_states)
        if self.mixer is not None:
            assert recurrence is not None
            mixed, recurrence.after = self.mixer(x, position_embeddings, recurrence.is_real, recurrence.before)
        else:
            assert kv is not None
            mixed, weights = self.self_attn(x, position_embeddings, kv, attention_mask, strictly_causal, **kwargs)
            if attentions is not None:
                attentions.append(weights)
        hidden_states = hidden_states + mixed
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


def run_layer(
    layer: KVShareDecoderLayer, state: ForwardState, kv: KV | None, strictly_causal: bool, **options: Any
) -> None:
    """Run one layer on the state, over the given keys and values (None: a retention layer)."""
    recurrence = None
    if layer.mixer is not None:
        before = _recurrent_state(state.past, layer.layer_idx, state.hidden.shape[0])
        recurrence = Recurrence(state.is_real, before)
    state.hidden = layer(
        state.hidden,
        position_embeddings=state.cos_sin,
        kv=kv,
        attention_mask=state.masks.get(STRICTLY_CAUSAL if strictly_causal else layer.layer_type),
        strictly_causal=strictly_causal,
        recurrence=recurrence,
        attentions=state.attentions,
        **options,
        **state.options,
    )
    if recurrence is not None and state.past is not None:
        state.past.update_recurrent_state(recurrence.after, layer.layer_idx)
    if state.hidden_states is not None:
        state.hidden_states.append(state.hidden)


def _recurrent_state(past: Any, i: int, rows: int) -> torch.Tensor | None:
    """State of retention layer i; transformers' own getter requires a convolution state, which there is none of."""
    if past is None:
        return None
    if isinstance(past, KVCache):
        return past.recurrent_state(i, rows)
    layer = past.layers[i]
    return layer.recurrent_states[0] if layer.is_recurrent_states_initialized[0] else None
