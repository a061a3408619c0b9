"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): one latent in place of keys and values.

For each token a layer makes a latent ``c = RMSNorm(W_DKV x)`` of ``kv_lora_rank`` numbers, and one key
``k_R = RoPE(W_KR x)`` of ``qk_rope_head_dim`` numbers that all heads share (the decoupled RoPE key). Keys and values of
head i are linear in the latent: ``k_i = [W_UK,i c; k_R]``, ``v_i = W_UV,i c``. Only ``[k_R; c]`` is cached.

Attention needs no keys and values: ``q_i . k_i = (W_UK,i^T q_i) . c + q_R,i . k_R``, and the weighted sum of values is
``W_UV,i`` times the weighted sum of latents. In this *absorbed* form a layer is multi-query attention whose single key
is ``[k_R; c]`` and whose value is the last ``kv_lora_rank`` channels of that key. A cache therefore stores one tensor,
and a decode step reads each number once for all heads. The model class is in ``models/kvshare/latent.py``.

The queries are not compressed (DeepSeek-V2 does so to save memory in training; V2-Lite does not).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ...conf.errors import require
from ...conf.options import PositiveInt
from .base import SharingWithinLayers


@dataclass(frozen=True)
class MLA(SharingWithinLayers):
    """Latent attention in every layer.

    Attributes:
        kv_lora_rank: Numbers of a latent.
        qk_rope_head_dim: Numbers of the RoPE key that all heads share; even.
        qk_nope_head_dim: Channels of a head's key that are made from the latent.
        v_head_dim: Channels of a head's value.
    """

    id: ClassVar[str] = "MLA"
    kv_lora_rank: PositiveInt = 48
    qk_rope_head_dim: PositiveInt = 16
    qk_nope_head_dim: PositiveInt = 48
    v_head_dim: PositiveInt = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        rotated = self.qk_rope_head_dim
        require(rotated % 2 == 0, "method.sharing.qk_rope_head_dim", rotated, "must be even: RoPE rotates pairs")

    @property
    def label(self) -> str:
        return f"mla-r{self.kv_lora_rank}"

    def extra_config(self, shape: Mapping[str, Any]) -> dict[str, Any]:
        # As in transformers' configs of such models, head_dim is what RoPE rotates.
        return {
            "kv_lora_rank": self.kv_lora_rank,
            "qk_rope_head_dim": self.qk_rope_head_dim,
            "qk_nope_head_dim": self.qk_nope_head_dim,
            "v_head_dim": self.v_head_dim,
            "head_dim": self.qk_rope_head_dim,
            "num_key_value_heads": shape["num_attention_heads"],
        }
