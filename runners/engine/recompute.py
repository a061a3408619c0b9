"""Forward passes without a KV cache: the whole sequence again at every step (``method=no_cache``)."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ...methods.cache.cache import KVCache


def forward_without_cache(
    model: PreTrainedModel, cache: KVCache, ids: torch.Tensor, mask: torch.Tensor | None, last: int = 1
) -> torch.Tensor:
    """Append ``ids`` [B, n] to the sequence, and run all of it through the model.

    Args:
        model: the model that ``cache`` was made for.
        cache: the cache, which stores token ids only.
        ids: [B, n] new tokens.
        mask: [B, n], True for a real token; None: no padding.
        last: number of positions to return logits for.

    Returns:
        Logits [B, last, vocabulary] of the last positions.
    """
    ids, mask = cache.extend(ids, torch.ones_like(ids, dtype=torch.bool) if mask is None else mask)
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    padded = None if bool(mask.all()) else mask
    out = model(input_ids=ids, attention_mask=padded, position_ids=positions, use_cache=False, logits_to_keep=last)
    logits: torch.Tensor = out.logits[:, -last:]
    return logits
