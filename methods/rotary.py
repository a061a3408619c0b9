"""Turning rotary position embeddings (RoPE) by a number of positions, for methods that re-position tokens."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..conf.errors import InputError

_RELATIVE = ("default", "linear", "llama3", "yarn")
_INTERLEAVED = ("cohere", "cohere2", "glm", "glm4", "ernie4_5", "deepseek_v2", "deepseek_v3", "gptj", "codegen")


def rope(x: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Llama's rotation of x [B, H, n, D], by cosines and sines [B or 1, n, D] as transformers' embedding gives them."""
    cos, sin = (c[:, None] for c in cos_sin)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Rotary:
    """Rotation by a difference of positions: ``turn(rope(x, p), d) == rope(x, p + d)``.

    Holds for every RoPE whose frequencies do not depend on the sequence length; a scaling factor on cos and sin is in
    ``x`` already. Channels are paired as in Llama: i with i + D / 2.

    Args:
        config: the model's configuration.
        key, value: the setting that asks for it, for the error.

    Raises:
        InputError: the model's RoPE changes its frequencies with the length, or pairs its channels in another way.
    """

    def __init__(self, config: PretrainedConfig, key: str = "method.selection.reposition", value: object = True):
        rope = getattr(config, "rope_parameters", None) or {}
        kind = rope.get("rope_type", "default")
        if "rope_theta" not in rope or kind not in _RELATIVE or config.model_type in _INTERLEAVED:
            raise InputError(
                key,
                value,
                f"needs RoPE that can be turned, and that of model type {config.model_type} (type {kind}) cannot be",
            )
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        if kind == "default":
            dim = int(head_dim * rope.get("partial_rotary_factor", 1.0))
            inv_freq = 1.0 / (rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float) / dim))
        else:
            inv_freq, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        self._inv_freq = inv_freq.float().cpu()
        self.dim = 2 * self._inv_freq.numel()

    def turn(self, x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        """Rotate x [B, H, n, D] by ``by`` [B, n] positions (int64, may be negative)."""
        if self._inv_freq.device != x.device:
            self._inv_freq = self._inv_freq.to(x.device)
        angle = by[:, None, :, None].to(torch.float32) * self._inv_freq  # [B, 1, n, dim / 2]
        cos, sin = angle.cos(), angle.sin()
        first, second, rest = x.split([self.dim // 2, self.dim // 2, x.shape[-1] - self.dim], dim=-1)
        turned = [first * cos - second * sin, second * cos + first * sin]
        return torch.cat([t.to(x.dtype) for t in turned] + [rest], dim=-1)
