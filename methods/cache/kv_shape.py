"""Shapes of keys and values that the formulas of a cache's bytes need."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from ..sharing.kv_map import FULL, LINEAR
from ..sharing.plan import Span, plan_of


@dataclass(frozen=True)
class LocalShape:
    """Layers that own keys and values and see a span of tokens: they hold those whatever the method.

    Attributes:
        layers: how many.
        span: the tokens that they see.
        kv_heads: KV heads per layer.
        channels: channels of one key and one value together.
    """

    layers: int
    span: Span
    kv_heads: int
    channels: int


@dataclass(frozen=True)
class KVShape:
    """What the byte formulas need to know of a model.

    Attributes:
        layers: decoder layers that own keys and values and attend over all tokens.
        kv_heads: KV heads per layer.
        head_dim: channels of a key.
        element_bytes: bytes of one element in the compute dtype.
        query_heads: query heads per layer (a method that stores per query head multiplies by them).
        local: layers of local attention.
        recurrent_bytes: of the layers that hold a state of fixed size, beside keys and values or instead of them.
        value_channels: channels of a value, where they are not those of a key; None: the same.
    """

    layers: int
    kv_heads: int
    head_dim: int
    element_bytes: int
    query_heads: int
    local: tuple[LocalShape, ...] = ()
    recurrent_bytes: int = 0
    value_channels: int | None = None

    @property
    def value_dim(self) -> int:
        """Channels of a value."""
        return self.head_dim if self.value_channels is None else self.value_channels

    @property
    def token_channels(self) -> int:
        """Channels of one key and one value together."""
        return self.head_dim + self.value_dim

    def fixed_bytes(self, tokens: int) -> int:
        """Bytes of one sequence that no method changes: windows and states, after ``tokens`` tokens."""
        held = sum(x.layers * x.span.held(tokens) * x.kv_heads * x.channels for x in self.local)
        return held * self.element_bytes + self.recurrent_bytes


def kv_shape(config: PretrainedConfig, dtype: torch.dtype) -> KVShape:
    """What the byte formulas need, from a transformers config whose layers are of one shape.

    :func:`model_shape` has it of any model.
    """
    config = config.get_text_config()
    plan = plan_of(config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    linear = 0 if plan.recurrent else plan.layer_types.count(LINEAR)
    spans = [span for span in plan.spans if span is not None]
    return KVShape(
        layers=plan.layer_types.count(FULL),
        kv_heads=heads,
        head_dim=head_dim,
        element_bytes=dtype.itemsize,
        query_heads=config.num_attention_heads,
        local=tuple(LocalShape(spans.count(s), s, heads, 2 * head_dim) for s in dict.fromkeys(spans)),
        recurrent_bytes=linear * (config.retention_heads * head_dim**2 * max(4, dtype.itemsize) if linear else 0),
    )
