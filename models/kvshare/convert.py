"""From a plain Llama to one whose layers share keys and values: where uptraining begins.

A source serves the layers that attend over it, and before it was theirs each had projections of its own. Three ways to
make one of many (``how``):

* ``copy``: the source keeps its own (the converter of CLA's authors).
* ``mean``: the mean over the layers it serves (Layer-Condensed KV's converter, MLKV, SwiftKV).
* ``gain_folded_mean``: each layer feeds its projection through an RMSNorm with gains of its own, so the products are
  averaged and the source's gains divided out again (ours).

The heads of different layers are not matched to each other: nobody has a way to do so. What a method needs beyond that
(its norm before keys and values) begins as the norm that stood there.
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
NO_GAIN = 1e-6
"""A gain nearer to zero than this is not divided by."""


def shared_config(config: PretrainedConfig, sharing: Sharing, **changes: Any) -> KVShareLlamaConfig:
    """A plain Llama's config with a way of sharing.

    Raises:
        InputError: it is no Llama, or its layers do not allow it.
    """
    if config.model_type not in ("llama", KVShareLlamaConfig.model_type):
        raise InputError("model", config.model_type, "cannot share keys and values between layers: only Llama can here")
    keys = {
        k: v for k, v in config.to_dict().items() if k not in ("model_type", "architectures", "transformers_version")
    }
    keys |= changes
    made = keys | sharing.config_keys(keys)
    if config.model_type == KVShareLlamaConfig.model_type:  # what is left open is as the weights at hand have it
        made |= {key: keys[key] for key in sharing.left_open if keys.get(key) is not None}
    return KVShareLlamaConfig(**made)


@torch.no_grad()
def converted(model: PreTrainedModel, sharing: Sharing, how: str) -> KVShareLlamaForCausalLM:
    """``model`` with ``sharing``; it keeps its weights.

    Args:
        model: a plain Llama.
        sharing: the map.
        how: ``copy``, ``mean`` or ``gain_folded_mean``.
    """
    require(how in INITS, "runner.init", how, f"must be one of {', '.join(INITS)}")
    return convert_to(model, shared_config(model.config, sharing), how)


@torch.no_grad()
def convert_to(model: PreTrainedModel, config: KVShareLlamaConfig, how: str) -> KVShareLlamaForCausalLM:
    """The same with a config that is there already."""
    if config.num_key_value_heads != model.config.num_key_value_heads:
        raise InputError(
            "method.sharing.kv_heads", config.num_key_value_heads, "is not what the model's weights were made for"
        )
    out: Any = KVShareLlamaForCausalLM(config)
    out = out.to(device=model.device, dtype=model.dtype)
    weights = dict(model.state_dict())
    wanted = set(out.state_dict())
    norm = "model.layers.{}.input_layernorm.weight"
    for owner in sorted(set(config.source)):
        key = "model.layers.{}.self_attn.k_proj.weight"
        served = [i for i, s in enumerate(config.source) if s == owner and key.format(i) in weights]
        if config.types[owner] != LINEAR and key.format(owner) not in weights:
            raise InputError(
                "method.sharing",
                owner,
                "is to own keys and values, and that layer of the checkpoint has none to begin with",
            )
        for which in ("k_proj", "v_proj"):
            bias = f"model.layers.{{}}.self_attn.{which}.bias"
            if how != "copy" and bias.format(owner) in weights:
                weights[bias.format(owner)] = torch.stack([weights[bias.format(i)] for i in served]).mean(0)
            name = f"model.layers.{{}}.self_attn.{which}.weight"
            if how == "mean":
                weights[name.format(owner)] = torch.stack([weights[name.format(i)] for i in served]).mean(0)
            elif how == "gain_folded_mean":
                folded = [weights[name.format(i)].float() * weights[norm.format(i)].float() for i in served]
                gain = weights[norm.format(owner)].float()
                gain = torch.where(gain.abs() < NO_GAIN, torch.ones_like(gain), gain)
                weights[name.format(owner)] = (torch.stack(folded).mean(0) / gain).to(model.dtype)
        if config.separate_kv_norm:
            weights.setdefault(f"model.layers.{owner}.kv_layernorm.weight", weights[norm.format(owner)].clone())
    missing, _ = out.load_state_dict({k: v for k, v in weights.items() if k in wanted}, strict=False)
    if missing:
        raise InputError("method.sharing", config.types, f"needs weights that the model has not: {missing[0]}")
    return out.eval()
