"""Small random models of every way of sharing, for tests."""

from __future__ import annotations

import torch
from transformers import LlamaConfig

from kvbench.methods.sharing.base import RUN_KEYS, Sharing
from kvbench.methods.sharing.cla import CLA
from kvbench.methods.sharing.framework import KVShare
from kvbench.methods.sharing.heads import Heads
from kvbench.methods.sharing.lckv import LCKV
from kvbench.methods.sharing.mla import MLA
from kvbench.methods.sharing.yoco import YOCO
from kvbench.models.kvshare.config import KVShareLlamaConfig
from kvbench.models.kvshare.model import KVShareLlamaForCausalLM

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
"""Six layers, two query heads for each KV head."""

DOWNWARD: list[Sharing] = [
    Heads(2),
    Heads(1),
    CLA(2),
    CLA(4, separate_kv_norm=True),
    YOCO(window=8),
    YOCO(mixer="full", self_layers=2),
    KVShare(4, "pizza", "bottom"),
    KVShare(map=[0, 1, 1, 0, 4, 4]),
]
"""Whose sources stand below their consumers, without retention."""

UPWARD: list[Sharing] = [
    LCKV(2),
    LCKV(0),
    LCKV(3, style="paper"),
    KVShare(3, "sandwich", "middle"),
    KVShare(2, "lasagna", "top"),
]
"""Whose consumers refer up."""

RETENTION = YOCO(mixer="gated_retention")

LATENT = MLA(kv_lora_rank=12, qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=8)


def name_of(sharing: Sharing) -> str:
    return f"{sharing.label}{'-norm' if getattr(sharing, 'separate_kv_norm', False) else ''}"


def config_of(sharing: Sharing, attention: str = "sdpa", **changes: object) -> KVShareLlamaConfig:
    keys = SHAPE | changes
    encoding = {key: value for key, value in changes.items() if key in RUN_KEYS}
    window = {"sliding_window": 8} if getattr(sharing, "window", 0) is None else {}
    keys = keys | sharing.config_keys(keys) | window | encoding
    return KVShareLlamaConfig(**keys, attn_implementation=attention)


def shared_model(
    sharing: Sharing,
    attention: str = "sdpa",
    dtype: torch.dtype | None = None,
    seed: int = 0,
    std: float = 0.15,
    **changes: object,
) -> KVShareLlamaForCausalLM:
    """Random weights, large enough that attention is not flat; float64, or float32 for eager attention."""
    dtype = dtype or (torch.float32 if attention == "eager" else torch.float64)
    torch.manual_seed(seed)
    model = KVShareLlamaForCausalLM(config_of(sharing, attention, **changes)).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, std)
            else:
                parameter.uniform_(0.7, 1.3)
    return model


def plain_config(**changes: object) -> LlamaConfig:
    return LlamaConfig(**(SHAPE | changes))
