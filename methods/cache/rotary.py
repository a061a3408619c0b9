"""Rotary position embeddings (RoPE) turned by a number of positions, for methods that re-position tokens."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

DYNAMIC_ROPE_TYPES = ("longrope", "dynamic")
"""Kinds of RoPE whose frequencies depend on the length of what is fed together."""


def rope(x: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Llama's rotation of x [B, H, n, D], by cosines and sines [B or 1, n, D] as transformers' embedding gives them."""
    cos, sin = (c[:, None] for c in cos_sin)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Rotary:
    """Rotation by a difference of positions: ``turn(rope(x, p), d) == rope(x, p + d)``.

    Holds for every RoPE whose frequencies do not depend on the sequence length; a scaling factor on cos and sin is in
    ``x`` already.

    Args:
        inv_freq: [pairs] float32, radians a position; empty: positions leave no trace in the keys.
        interleaved: channels are paired as 2 i with 2 i + 1 (GPT-J, Llama 4); else as i with i + pairs (Llama).
    """

    def __init__(self, inv_freq: torch.Tensor, interleaved: bool = False):
        self._inv_freq, self.interleaved = inv_freq.detach().float().cpu(), interleaved
        self.dim = 2 * inv_freq.numel()

    def turn(self, x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        """Rotate x [B, H, n, D] by ``by`` [B, n] positions (int64, may be negative)."""
        if not self.dim:
            return x
        if self._inv_freq.device != x.device:
            self._inv_freq = self._inv_freq.to(x.device)
        angle = by[:, None, :, None].to(torch.float32) * self._inv_freq  # [B, 1, n, dim / 2]
        cos, sin = angle.cos(), angle.sin()
        turned, rest = x[..., : self.dim], x[..., self.dim :]
        if self.interleaved:
            first, second = turned[..., ::2], turned[..., 1::2]
        else:
            first, second = turned.chunk(2, dim=-1)
        pair = [(first * cos - second * sin).to(x.dtype), (second * cos + first * sin).to(x.dtype)]
        whole = torch.stack(pair, dim=-1).flatten(-2) if self.interleaved else torch.cat(pair, dim=-1)
        return torch.cat([whole, rest], dim=-1)


def measured_rotary(model: PreTrainedModel, first: torch.Tensor, second: torch.Tensor, by: int) -> Rotary | None:
    """The rotation that turns one token's keys at a position into those ``by`` positions on; None: there is none.

    Frequencies are those that the model itself holds, so they are exact at any distance; which of them a layer uses,
    and how it pairs its channels, is decided by the keys.

    Args:
        model: whose keys they are.
        first, second: [H, D] float32, keys of one layer.
        by: positions between them.
    """
    tolerance = 8 * torch.finfo(model.dtype).eps * float(first.abs().max()) + 1e-12
    away = torch.tensor([[by]])
    for rotary in _candidates(model):
        if rotary.dim <= first.shape[-1]:
            turned = rotary.turn(first[None, :, None], away)[0, :, 0]
            if float((turned - second).abs().max()) <= max(tolerance, 1e-4 * float(first.abs().max())):
                return rotary
    return None


def _candidates(model: PreTrainedModel) -> Iterator[Rotary]:
    """No rotation, and those by each set of frequencies that a module of the model holds, paired in both ways."""
    yield Rotary(torch.empty(0))
    for module in model.get_decoder().modules():
        kind = getattr(module, "rope_type", "default")
        for name, buffer in module.named_buffers(recurse=False):
            of = kind.get(name.partition("_inv_freq")[0], "default") if isinstance(kind, dict) else kind
            if name.endswith("inv_freq") and "original" not in name and of not in DYNAMIC_ROPE_TYPES:
                yield from (Rotary(buffer, interleaved) for interleaved in (False, True))
