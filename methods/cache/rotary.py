"""Rotary position embeddings (RoPE): rotation by a number of positions, for methods that re-position tokens."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

DYNAMIC_ROPE_TYPES = ("longrope", "dynamic")
"""RoPE types whose frequencies depend on the sequence length."""


def rope(x: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Apply Llama's RoPE to x [B, H, n, D] with transformers' cosines and sines [B or 1, n, D]."""
    cos, sin = (c[:, None] for c in cos_sin)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Rotary:
    """Rotation by a difference of positions: ``rotate(rope(x, p), d) == rope(x, p + d)``.

    This holds for every RoPE whose frequencies do not depend on the sequence length. A scaling factor on cos and sin is
    already part of ``x``.

    Args:
        inv_freq: [pairs] float32, radians per position; empty: the keys do not depend on positions.
        interleaved: Channel 2 i is paired with 2 i + 1 (GPT-J, Llama 4) instead of i with i + pairs (Llama).
    """

    def __init__(self, inv_freq: torch.Tensor, interleaved: bool = False):
        self._inv_freq, self.interleaved = inv_freq.detach().float().cpu(), interleaved
        self.dim = 2 * inv_freq.numel()

    def inv_freq(self, device: torch.device) -> torch.Tensor:
        """Return the frequencies on a device, [pairs] float32 in radians per position."""
        if self._inv_freq.device != device:
            self._inv_freq = self._inv_freq.to(device)
        return self._inv_freq

    def rotate(self, x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        """Rotate x [B, H, n, D] by ``by`` [B, n] or [B, H, n] positions (int64, may be negative)."""
        if not self.dim:
            return x
        by = by[:, None] if by.dim() == 2 else by
        angle = by[..., None].to(torch.float32) * self.inv_freq(x.device)  # [B, 1 or H, n, dim / 2]
        cos, sin = angle.cos(), angle.sin()
        rotary, unrotated = x[..., : self.dim], x[..., self.dim :]
        if self.interleaved:
            first, second = rotary[..., ::2], rotary[..., 1::2]  # [B, H, n, dim / 2]
        else:
            first, second = rotary.chunk(2, dim=-1)
        pair = [(first * cos - second * sin).to(x.dtype), (second * cos + first * sin).to(x.dtype)]
        rotated = torch.stack(pair, dim=-1).flatten(-2) if self.interleaved else torch.cat(pair, dim=-1)
        return torch.cat([rotated, unrotated], dim=-1)


def measured_rotary(model: PreTrainedModel, first: torch.Tensor, second: torch.Tensor, by: int) -> Rotary | None:
    """Return the rotation that maps one token's keys to its keys ``by`` positions later; None: there is none.

    The frequencies are the model's own buffers, so the rotation is exact at any distance. The keys decide which buffer
    a layer uses and how it pairs channels.

    Args:
        model: Model that computed the keys.
        first, second: [H, D] float32, keys of one layer.
        by: Difference of their positions.
    """
    tolerance = 8 * torch.finfo(model.dtype).eps * float(first.abs().max()) + 1e-12
    distance = torch.tensor([[by]])
    for rotary in _candidates(model):
        if rotary.dim <= first.shape[-1]:
            rotated = rotary.rotate(first[None, :, None], distance)[0, :, 0]  # [H, D]
            if float((rotated - second).abs().max()) <= max(tolerance, 1e-4 * float(first.abs().max())):
                return rotary
    return None


def _candidates(model: PreTrainedModel) -> Iterator[Rotary]:
    """Yield no rotation, then one for each frequency buffer of the model and each way to pair channels."""
    yield Rotary(torch.empty(0))
    for module in model.get_decoder().modules():
        kind = getattr(module, "rope_type", "default")
        for name, buffer in module.named_buffers(recurse=False):
            rope_type = kind.get(name.partition("_inv_freq")[0], "default") if isinstance(kind, dict) else kind
            if name.endswith("inv_freq") and "original" not in name and rope_type not in DYNAMIC_ROPE_TYPES:
                yield from (Rotary(buffer, interleaved) for interleaved in (False, True))
