"""Gated retention (YOCO, arXiv 2405.05254, section 3.1): a recurrent layer with one state matrix per head.

Per head, with queries and keys rotated by RoPE and keys scaled by 1 / sqrt(D):

    S_t = exp(g_t) S_{t-1} + k_t^T v_t        o_t = q_t S_t        g_t = logsigmoid(x_t W_gamma) / tau

computed in chunks: attention with decaying weights within a chunk, the state S between chunks. Each head's output is
then normalized (RMS, no gain), gated by silu(x W_G) and projected. In version 2 of the paper on arXiv, the ratio in the
chunk's decay mask is inverted; here the parallel, the chunkwise and the recurrent form agree (tested).

Shapes: B batch, H heads, n new tokens, c tokens of a chunk, D head dimension.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ...methods.cache.rotary import rope

TAU = 16.0
CHUNK_TOKENS = 256


def retention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor,
    state: torch.Tensor | None = None,
    chunk: int = CHUNK_TOKENS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs of the new tokens, and the state after the last one.

    Args:
        q: [B, H, n, D].
        k: [B, H, n, D], scaled.
        v: [B, H, n, D].
        decay: [B, H, n], g_t (<= 0).
        state: [B, H, D, D] after the earlier tokens; None: there are none.
        chunk: tokens of a chunk; the result does not depend on it.

    Returns:
        ([B, H, n, D], [B, H, D, D] in float32 or better).
    """
    with torch.autocast(q.device.type, enabled=False):  # autocast would round the state at every product
        return _retention(q, k, v, decay, state, chunk)


def _retention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor, state: torch.Tensor | None, chunk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    acc_dtype = torch.promote_types(q.dtype, torch.float32)
    q, k, v, decay = (x.to(acc_dtype) for x in (q, k, v, decay))
    if state is None:
        state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
    out = []
    for start in range(0, q.shape[2], chunk):
        at = slice(start, start + chunk)
        qs, ks, vs = q[:, :, at], k[:, :, at], v[:, :, at]
        log_decay = decay[:, :, at].cumsum(-1)  # [B, H, c], from the chunk's start to each token
        log_ratio = log_decay[..., :, None] - log_decay[..., None, :]  # [B, H, c, c]
        weights = log_ratio.masked_fill(torch.ones_like(log_ratio, dtype=torch.bool).triu(1), float("-inf")).exp()
        within = (qs @ ks.transpose(-1, -2) * weights) @ vs  # [B, H, c, D]
        out.append(within + log_decay.exp()[..., None] * (qs @ state))
        decay_to_end = (log_decay[..., -1:] - log_decay).exp()[..., None]  # [B, H, c, 1]
        state = log_decay[..., -1, None, None].exp() * state + (ks * decay_to_end).transpose(-1, -2) @ vs
    return torch.cat(out, dim=2), state


class GatedRetention(nn.Module):
    """Gated retention, which takes the place of attention in a layer.

    Args:
        hidden_size: channels of the input and the output.
        heads: heads.
        head_dim: channels of a head.
        eps: added to the mean square of a head's output before normalization.
    """

    def __init__(self, hidden_size: int, heads: int, head_dim: int, eps: float):
        super().__init__()
        self.heads, self.head_dim, self.eps = heads, head_dim, eps
        width = heads * head_dim
        self.q_proj = nn.Linear(hidden_size, width, bias=False)
        self.k_proj = nn.Linear(hidden_size, width, bias=False)
        self.v_proj = nn.Linear(hidden_size, width, bias=False)
        self.decay_proj = nn.Linear(hidden_size, heads, bias=False)
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.o_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(
        self,
        x: torch.Tensor,
        cos_sin: tuple[torch.Tensor, torch.Tensor],
        is_real: torch.Tensor | None,
        state: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Apply retention to the new tokens.

        Args:
            x: [B, n, hidden], normalized.
            cos_sin: cosines and sines of RoPE at the tokens' positions, [B or 1, n, D] each.
            is_real: [B, n] bool, False for padding, which does not change the state; None: no padding.
            state: [B, H, D, D] after the earlier tokens; None: there are none.

        Returns:
            The output [B, n, hidden], and the state after the new tokens.
        """
        batch, n, _ = x.shape
        shape = (batch, n, self.heads, self.head_dim)
        q, k, v = (p(x).view(shape).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))  # [B, H, n, D]
        q, k = rope(q, cos_sin), rope(k, cos_sin)
        k = k * self.head_dim**-0.5
        decay = F.logsigmoid(self.decay_proj(x).float()).transpose(1, 2) / TAU  # [B, H, n]
        if is_real is not None:
            k, v = (y * is_real[:, None, :, None] for y in (k, v))
            decay = decay * is_real[:, None]
        out, state = retention(q, k, v, decay, state)
        out = out * torch.rsqrt(out.pow(2).mean(-1, keepdim=True) + self.eps)
        out = out.to(x.dtype).transpose(1, 2).reshape(batch, n, -1)
        return self.o_proj(F.silu(self.gate_proj(x)) * out), state
