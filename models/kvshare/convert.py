"""Conversion of a plain Llama into one whose layers share keys and values, the starting point of uptraining.

A KV source serves several layers, each of which had key and value projections of its own. ``init`` says how their
weights become those of the source:

* ``copy``: the source keeps its own (as the converter of CLA's authors does).
* ``mean``: the mean over the layers that the source serves (as Layer-Condensed KV's converter, MLKV and SwiftKV do).
* ``gain_folded_mean``: the mean over the products of each projection with the gains of the RMSNorm before it, divided
  by the source's gains (ours).

Heads of different layers are not matched to each other. A separate norm before keys and values starts as a copy of the
layer's input norm.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ...conf.errors import InputError, require
from ...methods.sharing.base import Sharing
from ...methods.sharing.kv_map import LINEAR
from .config import KVShareLlamaConfig
from .model import KVShareLlamaForCausalLM

INITS = ("copy", "mean", "gain_folded_mean")
MIN_GAIN = 1e-6
"""Gains of a smaller magnitude are not divided by."""

_PROJECTION = "model.layers.{}.self_attn.{}.{}"
_NORM = "model.layers.{}.input_layernorm.weight"


def shared_config(config: PretrainedConfig, sharing: Sharing, **changes: Any) -> KVShareLlamaConfig:
    """Config of a plain Llama with the given sharing of keys and values.

    Args:
        config: config of the plain model, or of one that shares already.
        sharing: which layers own keys and values.
        **changes: further keys of the config.

    Raises:
        InputError: the model is no Llama, or its layers do not allow the sharing.
    """
    if config.model_type not in ("llama", KVShareLlamaConfig.model_type):
        raise InputError("model", config.model_type, "cannot share keys and values between layers: only Llama can here")
    dropped = ("model_type", "architectures", "transformers_version")
    keys = {k: v for k, v in config.to_dict().items() if k not in dropped} | changes
    shared = keys | sharing.config_keys(keys)
    if config.model_type == KVShareLlamaConfig.model_type:  # keys that the sharing leaves open are those of the weights
        shared |= {key: keys[key] for key in sharing.optional_keys if keys.get(key) is not None}
    return KVShareLlamaConfig(**shared)


@torch.no_grad()
def convert(model: PreTrainedModel, sharing: Sharing, init: str) -> KVShareLlamaForCausalLM:
    """Convert a model to share keys and values; the given model is not changed.

    Args:
        model: a plain Llama, or one that shares already.
        sharing: which layers own keys and values.
        init: ``copy``, ``mean`` or ``gain_folded_mean``.

    Raises:
        InputError: ``init`` is unknown, or the model cannot be converted.
    """
    require(init in INITS, "runner.init", init, f"must be one of {', '.join(INITS)}")
    return convert_to_config(model, shared_config(model.config, sharing), init)


@torch.no_grad()
def convert_to_config(model: PreTrainedModel, config: KVShareLlamaConfig, init: str) -> KVShareLlamaForCausalLM:
    """Convert a model to a given config; see :func:`convert`."""
    rank, allowed = getattr(model.config, "kv_lora_rank", None), "differs from the model's"
    allowed += f" {rank}, and keys and values are not converted to latents or back; train with model=scratch"
    require(config.kv_lora_rank == rank, "method.sharing.kv_lora_rank", config.kv_lora_rank, allowed)
    if config.num_key_value_heads != model.config.num_key_value_heads:
        raise InputError(
            "method.sharing.kv_heads", config.num_key_value_heads, "is not what the model's weights were made for"
        )
    converted: Any = KVShareLlamaForCausalLM(config)
    converted = converted.to(device=model.device, dtype=model.dtype)
    weights = dict(model.state_dict())
    for source in sorted(set(config.source)) if config.kv_lora_rank is None else []:
        if config.types[source] != LINEAR and _PROJECTION.format(source, "k_proj", "weight") not in weights:
            raise InputError(
                "method.sharing",
                source,
                "is to own keys and values, but the checkpoint has no projections in this layer",
            )
        if init != "copy":
            _merge_projections(weights, config.source, source, init, model.dtype)
        if config.separate_kv_norm:
            norm = weights[_NORM.format(source)].clone()
            weights.setdefault(f"model.layers.{source}.kv_layernorm.weight", norm)
    names = set(converted.state_dict())
    missing, _ = converted.load_state_dict({k: v for k, v in weights.items() if k in names}, strict=False)
    if missing:
        raise InputError("method.sharing", config.types, f"needs weights that the model does not have: {missing[0]}")
    return converted.eval()


def _merge_projections(
    weights: dict[str, torch.Tensor], source_map: list[int], source: int, init: str, dtype: torch.dtype
) -> None:
    """Replace the projections of a source by the mean over the layers that it serves."""
    served = [
        i for i, s in enumerate(source_map) if s == source and _PROJECTION.format(i, "k_proj", "weight") in weights
    ]
    for projection in ("k_proj", "v_proj"):
        bias = _PROJECTION.format(source, projection, "bias")
        if bias in weights:
            biases = [weights[_PROJECTION.format(i, projection, "bias")] for i in served]
            weights[bias] = torch.stack(biases).mean(0)
        layers = [weights[_PROJECTION.format(i, projection, "weight")] for i in served]
        if init == "gain_folded_mean":
            folded = [w.float() * weights[_NORM.format(i)].float() for i, w in zip(served, layers, strict=True)]
            gain = weights[_NORM.format(source)].float()
            gain = torch.where(gain.abs() < MIN_GAIN, torch.ones_like(gain), gain)
            merged = (torch.stack(folded).mean(0) / gain).to(dtype)
        else:
            merged = torch.stack(layers).mean(0)
        weights[_PROJECTION.format(source, projection, "weight")] = merged
