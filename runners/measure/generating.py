"""transformers' own ``generate``, measured as the engine is (``method=transformers``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, StaticCache

from ...methods.cache.cache import stored_bytes
from ...methods.cache.kernel_use import STEP_ATTENTION
from ...methods.policies.policy import FurtherForwards
from ...methods.policies.transformers_generate import TransformersGenerate
from .job import Batch, LoadedJob


class GeneratedCache:
    """A cache of transformers with the byte counts of a :class:`...methods.cache.cache.KVCache`; made for one batch."""

    further_forwards: Sequence[FurtherForwards] = ()

    def __init__(self) -> None:
        self._held: Any = None  # of transformers, whose attributes differ between versions
        self._tokens = 0

    def begin(self, held: Any) -> None:
        """Take the cache that ``generate`` fills."""
        self._held = held

    def fed(self, tokens: int) -> None:
        """Count ``tokens`` more real tokens that are held."""
        self._tokens += tokens

    @property
    def kv_bytes_stored(self) -> int:
        """Allocated bytes of keys and values, free slots included."""
        return stored_bytes(tensor for layer in self._held.layers for tensor in (layer.keys, layer.values))

    @property
    def kv_bytes_logical(self) -> int:
        """Bytes of the real tokens, without padding and free slots."""
        tensors = [tensor for layer in self._held.layers for tensor in (layer.keys, layer.values)]
        return self._tokens * sum(t.shape[1] * t.shape[3] * t.element_size() for t in tensors)  # [B, H, slots, D]


@dataclass(frozen=True)
class GeneratingJob(LoadedJob):
    """A job that transformers' ``generate`` answers, on the model as it is loaded."""

    @property
    def kernels_used(self) -> dict[str, str]:
        return {STEP_ATTENTION: f"transformers ({self._method.attention})"}

    @property
    def _method(self) -> TransformersGenerate:
        assert isinstance(self.job.method, TransformersGenerate)
        return self.job.method

    def new_cache(self) -> Any:
        return GeneratedCache()

    def answer(
        self,
        cache: Any,
        batch: Batch,
        after_token: Callable[[], None] = lambda: None,
        after_preparation: Callable[[], None] = lambda: None,
    ) -> str:
        """See :meth:`.job.LoadedJob.answer`; a step is compiled within the first repetition, which is a warm-up."""
        model: Any = self.model
        length, steps = batch.input_ids.shape[1], batch.steps
        static = self._method.cache == "static"
        held = StaticCache(model.config, length + steps - 1) if static else DynamicCache(config=model.config)
        cache.begin(held)
        cache.fed(batch.prompt_tokens)
        answered = 0

        def look(ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            """A stopping criterion that never stops; it is called after each token."""
            nonlocal answered
            if answered:
                cache.fed(len(ids))
            answered += 1
            after_token()
            if answered == 1:
                after_preparation()
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        model.generate(
            batch.input_ids,
            attention_mask=torch.ones_like(batch.input_ids) if batch.mask is None else batch.mask,
            past_key_values=held,
            max_new_tokens=steps,
            do_sample=False,
            eos_token_id=None,
            prefill_chunk_size=self.job.chunk_size,
            stopping_criteria=[look],
        )
        if answered != steps:
            raise RuntimeError(f"transformers' generate ended after {answered} of {steps} tokens")
        compiled = ", compiled" if hasattr(model, "_compiled_call") else ""
        return f"generate with a {self._method.cache} cache{compiled}"
