"""Attention logits and weights: scaling, soft cap (Gemma 2) and attention sinks (gpt-oss).

    S = q . k * scaling;   S <- softcap * tanh(S / softcap);   S <- S + mask;   weights = softmax([S, sink])[:-1]

The soft cap is applied before the mask, because a capped mask would get weight. A sink is a learned logit per query
head that enters the softmax normalizer and has no value.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LogitRule:
    """Scaling, soft cap and sinks of one attention layer.

    Attributes:
        scaling: Factor on the query-key products.
        softcap: Bound c of ``c * tanh(logit / c)``; None: no cap.
        sinks: [H_q] sink logit of each query head; None: no sinks.
    """

    scaling: float
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether there is neither a soft cap nor a sink, so that any attention kernel can be used."""
        return self.softcap is None and self.sinks is None

    def logits(self, products: torch.Tensor) -> torch.Tensor:
        """Return unmasked logits from query-key products in float32 or wider; overwrites ``products``."""
        products *= self.scaling
        if self.softcap is not None:
            products.div_(self.softcap).tanh_().mul_(self.softcap)
        return products

    def weights(self, logits: torch.Tensor, head_dims: int = 1) -> torch.Tensor:
        """Softmax over the last dimension with the sinks in the normalizer.

        Args:
            logits: [B, heads..., ..., S]; masked entries are -inf.
            head_dims: Number of dimensions after the first that together index the query heads.

        Returns:
            Weights of the same shape; with sinks, rows sum to less than 1.
        """
        if self.sinks is None:
            return logits.softmax(-1)
        heads = logits.shape[1 : 1 + head_dims]
        sink = self.sinks.to(logits).view(1, *heads, *[1] * (logits.dim() - 1 - head_dims))
        with_sink = torch.cat([logits, sink.expand(*logits.shape[:-1], 1)], dim=-1)  # [..., S + 1]
        return with_sink.softmax(-1)[..., :-1]
