"""Cache interface of transformers apart from attention: lengths, mask sizes, and the states of recurrent layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache

from ...conf.errors import InputError
from ..sharing.plan import Plan
from .attention import register_update, tag
from .forward import LayerCall
from .recurrent import RecurrentStates

if TYPE_CHECKING:
    from ..policies.policy import FurtherForwards


class TransformersCache(Cache):
    """Base class of kvbench's caches, for use in transformers' models and ``generate``.

    Attributes:
        layers: Cache layers; ``plan`` maps the layers of the model to them.
        plan: See :class:`..sharing.plan.Plan`.
        first_layer: The first layer of the model that attends in a forward.
        tokens_seen: [B] int64, real tokens of each row so far; None before the first forward.
        text_seeds: [B] int64, hashes of the prompts' tokens, set by the engine before the prefill; None: unknown.
        question_tokens: Tokens of each prompt's question, its last ones; None: unknown.
        states: States of the model's recurrent layers; None: it has none.
        further_forwards: Forwards that the compression of each row took after the prefill, if the policy makes any.
    """

    plan: Plan
    first_layer: int
    tokens_seen: torch.Tensor | None
    text_seeds: torch.Tensor | None = None
    question_tokens: Sequence[int] | None = None
    states: RecurrentStates | None
    layers: list[Any]  # not only transformers' layer classes
    further_forwards: Sequence[FurtherForwards] = ()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the new keys and values unchanged, with this cache attached to the key tensor.

        Raises:
            InputError: The previous layer bypassed the attention function, or the config gives this layer no keys.
        """
        if layer_idx not in self.plan.attending:
            raise InputError("model", f"layer {layer_idx}", "has keys and values, and the model's config gives it none")
        register_update(self, layer_idx)
        return tag(key_states, self), value_states

    def __bool__(self) -> bool:
        """Return False, because Phi-3's ``generate`` discards a truthy cache at the RoPE switch; ``_begin`` raises."""
        return False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        if layer_idx not in self.plan.attending:
            layer_idx = self.first_layer
        return self.layers[self.plan.cache_layer[layer_idx]].get_seq_length()

    # calls of recurrent layers are forwarded to transformers' own cache

    def has_previous_state(self, layer_idx: int | None = None, *args: Any, **kwargs: Any) -> bool:
        return self.states is not None and self.states.cache.has_previous_state(layer_idx, *args, **kwargs)

    def get_conv_state(self, layer_idx: int, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        return self._states.cache.get_conv_state(layer_idx, *args, **kwargs)

    def update_conv_state(self, conv_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._states.cache.update_conv_state(conv_states, layer_idx, *args, **kwargs)

    def get_recurrent_state(self, layer_idx: int, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        return self._states.cache.get_recurrent_state(layer_idx, *args, **kwargs)

    @property
    def _states(self) -> RecurrentStates:
        if self.states is None:
            raise InputError("model", "a recurrent layer", "keeps a state, and the model's config gives it none")
        return self.states

    @property
    def is_sliding(self) -> list[bool]:
        """False for all layers: transformers sizes masks by it, and every layer here counts all columns it has seen."""
        return [False] * len(self.plan.cache_layer)

    is_linear = is_dummy = is_sliding

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        if not query_length:
            raise InputError(
                "past_key_values",
                f"a cache of {self.get_seq_length()} tokens",
                "gets no new tokens: a text must be longer than what its cache has seen; make a new one",
            )
        return self.get_seq_length(layer_idx) + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    @property
    def is_initialized(self) -> bool:
        return self.tokens_seen is not None

    @property
    def batch_size(self) -> int:
        return -1 if self.tokens_seen is None else self.tokens_seen.shape[0]

    def reset(self) -> None:
        raise NotImplementedError("a kvbench cache is used once: make a new one with Method.new_cache")

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        raise NotImplementedError("beam search is not supported by kvbench caches: use num_beams=1")

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("a compressed cache cannot be cropped: evicted tokens cannot be restored")

    def attend(self, layer_idx: int, call: LayerCall, padding_mask: torch.Tensor | None) -> torch.Tensor:
        """Attend for one layer of the model; see :meth:`.cache.KVCache.attend`."""
        raise NotImplementedError
