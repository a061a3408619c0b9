"""Decoding without a KV cache: every step recomputes the whole sequence.

Attention time per token grows with the square of the length, against linearly with the ``full`` cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..cache.attention import use_kvbench_attention
from ..cache.cache import KVCache
from ..cache.kv_shape import KVShape
from ..cache.layout import layout_of, reset_rope
from ..cache.method import Method
from ..sharing.plan import Plan


class NoCacheState(KVCache):
    """Token ids of the sequence, stored instead of keys and values.

    Only the engine can use it; for ``model.generate`` pass ``use_cache=False``, which is equivalent.
    """

    recomputes = True
    static_problem = "every step runs the whole sequence again, which is one token longer each time"

    def __init__(self, plan: Plan) -> None:
        super().__init__([], plan)
        self._ids: torch.Tensor | None = None
        self._mask: torch.Tensor | None = None

    def extend(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append columns [B, n] of ids and padding mask and return the whole sequence, [B, T] each."""
        self._ids = ids if self._ids is None else torch.cat([self._ids, ids], dim=1)
        self._mask = mask if self._mask is None else torch.cat([self._mask, mask], dim=1)
        self.tokens_seen = self._mask.sum(1)
        return self._ids, self._mask

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self._ids is None else self._ids.shape[1]

    def update(self, *args: object, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError("method=no_cache stores no keys: call model.generate(..., use_cache=False) instead")


@dataclass(frozen=True)
class NoCache(Method):
    """The method ``no_cache``, the baseline that shows what a KV cache saves."""

    @property
    def needs(self) -> str:
        return "a forward over the whole text for each token"

    @property
    def shares_prompt(self) -> bool:
        return False

    @property
    def shares_steps(self) -> bool:
        return False

    def new_cache(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> KVCache:
        use_kvbench_attention(model)
        reset_rope(model)
        return NoCacheState(layout_of(model).plan)

    def read_formula(self, model: PreTrainedModel) -> Callable[..., int]:
        return lambda prompt_length, new_tokens=0: 0

    def bytes_formula(self, shape: KVShape, prompt_length: int, new_tokens: int = 0) -> int:
        return 0
