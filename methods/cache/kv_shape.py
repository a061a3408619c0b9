"""Shapes of a model's keys and values, for the formulas of cache bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from ..sharing.kv_map import FULL, LINEAR
from ..sharing.plan import Span, plan_of


@dataclass(frozen=True)
class LocalShape:
    """Shape of the local-attention layers of one kind, which keep their window whatever the method.

    Attributes:
        layers: Number of layers.
        span: Tokens that each token attends to.
        kv_heads: KV heads per layer.
        channels: Channels of one key and one value together.
    """

    layers: int
    span: Span
    kv_heads: int
    channels: int


@dataclass(frozen=True)
class KVShape:
    """Shape of a model's KV cache, as the byte formulas need it.

    Attributes:
        layers: Decoder layers that own keys and values and attend over all tokens.
        kv_heads: KV heads per layer.
        head_dim: Channels of a key.
        element_bytes: Bytes of one element in the compute dtype.
        query_heads: Query heads per layer, for methods that store per query head.
        local: Local-attention layers.
        recurrent_bytes: Bytes of all fixed-size recurrent states of one sequence.
        value_channels: Channels of a value; None: as many as of a key.
        values_in_keys: The values are channels of the keys and are not stored again (:mod:`..sharing.mla`).
    """

    layers: int
    kv_heads: int
    head_dim: int
    element_bytes: int
    query_heads: int
    local: tuple[LocalShape, ...] = ()
    recurrent_bytes: int = 0
    value_channels: int | None = None
    values_in_keys: bool = False

    @property
    def value_dim(self) -> int:
        """Channels of a value."""
        return self.head_dim if self.value_channels is None else self.value_channels

    @property
    def token_channels(self) -> int:
        """Channels stored per token and head: those of one key and one value together."""
        return self.head_dim + (0 if self.values_in_keys else self.value_dim)

    def fixed_bytes(self, tokens: int) -> int:
        """Return the bytes of one sequence that no method changes (windows, states) after ``tokens`` tokens."""
        elements = sum(x.layers * x.span.held(tokens) * x.kv_heads * x.channels for x in self.local)
        return elements * self.element_bytes + self.recurrent_bytes


def kv_shape(config: PretrainedConfig, dtype: torch.dtype) -> KVShape:
    """Return the KV shape of a transformers config whose layers all have one shape.

    Use :func:`.layout.model_shape` for a loaded model of any kind.
    """
    config = config.get_text_config()
    plan = plan_of(config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    linear = 0 if plan.recurrent else plan.layer_types.count(LINEAR)
    spans = [span for span in plan.spans if span is not None]
    if plan.holds_latents:
        rank, rotated = config.kv_lora_rank, config.qk_rope_head_dim
        return KVShape(
            layers=plan.layer_types.count(FULL),
            kv_heads=1,
            head_dim=rotated + rank,
            element_bytes=dtype.itemsize,
            query_heads=config.num_attention_heads,
            value_channels=rank,
            values_in_keys=True,
        )
    return KVShape(
        layers=plan.layer_types.count(FULL),
        kv_heads=heads,
        head_dim=head_dim,
        element_bytes=dtype.itemsize,
        query_heads=config.num_attention_heads,
        local=tuple(LocalShape(spans.count(s), s, heads, 2 * head_dim) for s in dict.fromkeys(spans)),
        recurrent_bytes=linear * (config.retention_heads * head_dim**2 * max(4, dtype.itemsize) if linear else 0),
    )
