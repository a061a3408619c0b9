"""Recurrent state beside the KV cache: models whose layers are partly linear attention, Mamba or convolutions.

The state has a fixed size whatever the number of tokens, so no method changes it. transformers' own cache layers hold
it, and :class:`.cache.KVCache` passes its layers' calls on to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from ..policies.policy import PolicyCapabilities

STATES = ("conv_states", "recurrent_states")


class StateLayer(LinearAttentionLayer):
    """transformers' state of one recurrent layer, as a layer of a kvbench cache; its bytes are RecurrentStates'."""

    is_sliding = is_compileable = False  # read by transformers
    in_prefill = False
    observation_window = 0
    capabilities = PolicyCapabilities(keeps_everything=True)

    @property
    def tokens(self) -> torch.Tensor:
        """No token is held, [1, 1] zero."""
        return torch.zeros(1, 1, dtype=torch.int64)

    def tensors(self) -> list[torch.Tensor]:
        """No tensors of its own."""
        return []

    logical_bytes = 0


class RecurrentStates:
    """The states of a model's recurrent layers, for one batch.

    Attributes:
        cache: a transformers cache with a state at each recurrent layer and nothing at the others.
    """

    def __init__(self, config: PretrainedConfig, recurrent: Sequence[int]):
        made: list[Any] = DynamicCache(config=config).layers
        layers: list[Any] = [DynamicLayer() for _ in range(config.num_hidden_layers)]
        for i in recurrent:
            layers[i] = StateLayer(number_of_states=made[i].number_of_states)
        self.cache = Cache(layers=layers)

    def _each(self) -> Iterator[tuple[dict[int, Any], int]]:
        for layer in self.cache.layers:
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                for name in STATES:
                    states = getattr(layer, name)
                    yield from ((states, i) for i in states if states[i] is not None)

    def tensors(self) -> list[torch.Tensor]:
        """Every state tensor, rows first."""
        return [states[i] for states, i in self._each()]

    def change(self, rows_of: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace every state tensor by what ``rows_of`` makes of it."""
        for states, i in self._each():
            states[i] = rows_of(states[i])

    def join(self, others: Sequence[RecurrentStates]) -> None:
        """Take the rows of several, one after another."""
        first = others[0]
        for mine, theirs in zip(self.cache.layers, first.cache.layers, strict=True):
            if isinstance(mine, LinearAttentionCacheLayerMixin):
                mine.__dict__.update({key: dict(x) if isinstance(x, dict) else x for key, x in vars(theirs).items()})
        every = zip(*(other.tensors() for other in others), strict=True)
        for (states, i), rows in zip(list(self._each()), every, strict=True):
            states[i] = torch.cat(rows)

    @property
    def nbytes(self) -> int:
        """Bytes of all states."""
        return sum(t.nbytes for t in self.tensors())
