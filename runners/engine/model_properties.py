"""Properties of a transformers model that decide how the engine can run it."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ...methods.cache.rotary import DYNAMIC_ROPE_TYPES
from ...models.kvshare.model import KVShareLlamaForCausalLM


def rope_type(model: PreTrainedModel) -> str | None:
    """RoPE type named by the model's config; None if it names none."""
    parameters = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    name: str | None = parameters.get("rope_type")
    return name


def has_dynamic_rope(model: PreTrainedModel) -> bool:
    """Whether the RoPE frequencies depend on the length of the sequence that is fed."""
    return rope_type(model) in DYNAMIC_ROPE_TYPES


def decoder_layers(model: PreTrainedModel) -> torch.nn.ModuleList | None:
    """Return the layers of a transformers decoder; None for a model class with its own loop over layers."""
    if isinstance(model, KVShareLlamaForCausalLM):
        return None
    return getattr(model.get_decoder(), "layers", None)


def is_spread(model: torch.nn.Module) -> bool:
    """Whether accelerate has spread the model over several devices."""
    return getattr(model, "hf_device_map", None) is not None
