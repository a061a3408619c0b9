"""Decode steps through transformers' own forward, with the cache or without one."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ...methods.cache.cache import KVCache
from .step import EAGER, DecodeStep


class EagerStep(DecodeStep):
    """A step through the forward of any model."""

    mode = EAGER

    def __init__(self, model: PreTrainedModel, cache: KVCache):
        super().__init__(cache)
        self._model = model

    def forward(self, token: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._model(
            input_ids=token[:, None],
            position_ids=self.cache.next_positions()[:, None],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return logits[:, -1]


class RecomputeStep(DecodeStep):
    """A step that runs the whole sequence again (``method=no_cache``)."""

    mode = EAGER

    def __init__(self, model: PreTrainedModel, cache: KVCache):
        super().__init__(cache)
        self._model = model

    def forward(self, token: torch.Tensor) -> torch.Tensor:
        return forward_without_cache(self._model, self.cache, token[:, None], None)[:, -1]


def forward_without_cache(
    model: PreTrainedModel, cache: KVCache, ids: torch.Tensor, mask: torch.Tensor | None, last: int = 1
) -> torch.Tensor:
    """Append ``ids`` [B, n] to the sequence, and run all of it through the model.

    Args:
        model: The model that ``cache`` was made for.
        cache: The cache, which stores token ids only.
        ids: [B, n] new tokens.
        mask: [B, n], True for a real token; None: no padding.
        last: Number of positions to return logits for.

    Returns:
        Logits [B, last, vocabulary] of the last positions.
    """
    ids, mask = cache.extend(ids, torch.ones_like(ids, dtype=torch.bool) if mask is None else mask)
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    padded = None if bool(mask.all()) else mask
    out = model(input_ids=ids, attention_mask=padded, position_ids=positions, use_cache=False, logits_to_keep=last)
    logits: torch.Tensor = out.logits[:, -last:]
    return logits
