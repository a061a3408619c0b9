"""Gated retention (Sun et al., 2024, arXiv 2405.05254, section 3.1): a layer whose memory is one matrix per head.

Per head, with queries and keys turned by RoPE and keys scaled by 1 / sqrt(D):

    S_t = exp(g_t) S_{t-1} + k_t^T v_t        o_t = q_t S_t        g_t = logsigmoid(x_t W_gamma) / tau

computed in chunks: within one as attention whose weights decay, between them through S. Then each head's output is
normalised (RMS, no gain), gated by silu(x W_G) and projected. What the paper's arXiv version 2 prints as the chunk's
mask has its ratio upside down; here the three forms (parallel, chunks, step by step) agree, and a test says so.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ...methods.cache.rotary import rope

TAU = 16.0
CHUNK = 256


def retention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor,
    state: torch.Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs of all tokens and the state after the last one.

    Args:
        q, k: [B, H, n, D], keys already scaled.
        v: [B, H, n, D].
        decay: [B, H, n], g_t (<= 0).
        state: [B, H, D, D] from the tokens before; None: there are none.
        chunk: tokens taken together; the result does not depend on it.

    Returns:
        ([B, H, n, D], [B, H, D, D] in float32 or better).
    """
    with torch.autocast(q.device.type, enabled=False):  # mixed precision would round the state at every product
        return _retention(q, k, v, decay, state, chunk)


def _retention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor, state: torch.Tensor | None, chunk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    exact = torch.promote_types(q.dtype, torch.float32)
    q, k, v, decay = (x.to(exact) for x in (q, k, v, decay))
    if state is None:
        state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
    out = []
    for start in range(0, q.shape[2], chunk):
        part = slice(start, start + chunk)
        qs, ks, vs = q[:, :, part], k[:, :, part], v[:, :, part]
        since = decay[:, :, part].cumsum(-1)  # [B, H, c], decay from the chunk's start up to each token
        between = since[..., :, None] - since[..., None, :]
        weights = between.masked_fill(torch.ones_like(between, dtype=torch.bool).triu(1), float("-inf")).exp()
        inner = (qs @ ks.transpose(-1, -2) * weights) @ vs
        out.append(inner + since.exp()[..., None] * (qs @ state))
        left = (since[..., -1:] - since).exp()[..., None]  # of each token's share at the chunk's end
        state = since[..., -1, None, None].exp() * state + (ks * left).transpose(-1, -2) @ vs
    return torch.cat(out, dim=2), state


class GatedRetention(nn.Module):
    """One layer's mixer, in the place of attention.

    Args:
        hidden_size: channels in and out.
        heads: of ``head_dim`` channels each.
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
        real: torch.Tensor | None,
        state: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix new tokens with the state of those before.

        Args:
            x: [B, n, hidden], normalised.
            cos_sin: of their positions, [B or 1, n, D] each.
            real: [B, n] bool, False for a pad, which leaves no trace; None: all real.
            state: see :func:`retention`.

        Returns:
            ([B, n, hidden], the state after them).
        """
        batch, n, _ = x.shape
        q, k, v = (p(x).view(batch, n, self.heads, self.head_dim).transpose(1, 2) for p in self._qkv())
        q, k = rope(q, cos_sin), rope(k, cos_sin)
        k = k * self.head_dim**-0.5
        decay = F.logsigmoid(self.decay_proj(x).float()).transpose(1, 2) / TAU
        if real is not None:
            k, v = (y * real[:, None, :, None] for y in (k, v))
            decay = decay * real[:, None]
        out, state = retention(q, k, v, decay, state)
        out = out * torch.rsqrt(out.pow(2).mean(-1, keepdim=True) + self.eps)
        out = out.to(x.dtype).transpose(1, 2).reshape(batch, n, -1)
        return self.o_proj(F.silu(self.gate_proj(x)) * out), state

    def _qkv(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        return self.q_proj, self.k_proj, self.v_proj
