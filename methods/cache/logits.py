"""How attention logits are formed from queries and keys, as one value that travels with every attention call.

    S = q . k * scaling;   S <- softcap * tanh(S / softcap);   S <- S + mask;   weights = softmax([S, sink])[:-1]

The soft cap is Gemma 2's; it comes before the mask, for a capped mask would get weight. The sinks are gpt-oss's: one
learned logit for each query head that takes part in the normalizer and has no value.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LogitRule:
    """Scaling, soft cap and sinks of one attention layer.

    Attributes:
        scaling: factor on the products of queries and keys.
        softcap: bound c of ``c * tanh(logit / c)``; None: no cap.
        sinks: [H_q] logit that each query head adds to its normalizer; None: none.
    """

    scaling: float
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether scaled dot products and a softmax are all there is, so that any attention kernel computes it."""
        return self.softcap is None and self.sinks is None

    def logits(self, products: torch.Tensor) -> torch.Tensor:
        """Logits before the mask, of products q . k in float32 or wider, which are overwritten."""
        products *= self.scaling
        if self.softcap is not None:
            products.div_(self.softcap).tanh_().mul_(self.softcap)
        return products

    def weights(self, logits: torch.Tensor, head_dims: int = 1) -> torch.Tensor:
        """Softmax over the last dimension with the sinks in the normalizer.

        Args:
            logits: [B, heads..., ..., S]; masked entries are -inf.
            head_dims: how many dimensions after the first make up the query heads, in order.

        Returns:
            The same shape; rows add up to less than 1 where there are sinks.
        """
        if self.sinks is None:
            return logits.softmax(-1)
        heads = logits.shape[1 : 1 + head_dims]
        sink = self.sinks.to(logits).view(1, *heads, *[1] * (logits.dim() - 1 - head_dims))
        whole = torch.cat([logits, sink.expand(*logits.shape[:-1], 1)], dim=-1)
        return whole.softmax(-1)[..., :-1]
