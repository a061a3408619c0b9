"""Recurrent states of hybrid models, whose layers are partly linear attention, Mamba or convolutions.

A state has a fixed size whatever the number of tokens, so no method changes it. It is stored in transformers' own cache
layers, to which :class:`.cache.KVCache` forwards the calls of the recurrent layers.
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
from .static_steps import StaticSteps

STATES = ("conv_states", "recurrent_states")


class StateLayer(StaticSteps, LinearAttentionLayer):
    """transformers' state of one recurrent layer as a cache layer; :class:`RecurrentStates` counts its bytes."""

    is_sliding = is_compileable = False  # read by transformers
    in_prefill = False
    observation_window = 0
    capabilities = PolicyCapabilities(keeps_everything=True)

    @property
    def tokens(self) -> torch.Tensor:
        """Number of tokens stored: none, [1, 1] zero."""
        return torch.zeros(1, 1, dtype=torch.int64)

    def tensors(self) -> list[torch.Tensor]:
        """No tensors of its own."""
        return []

    @property
    def static_problem(self) -> str | None:
        return "the model's recurrent layers run transformers' own code, which may wait for the device"


class RecurrentStates:
    """States of a model's recurrent layers for one batch.

    Attributes:
        cache: Transformers cache with a state at each recurrent layer and empty layers elsewhere.
    """

    def __init__(self, config: PretrainedConfig, recurrent: Sequence[int]):
        templates: list[Any] = DynamicCache(config=config).layers
        layers: list[Any] = [DynamicLayer() for _ in range(config.num_hidden_layers)]
        for i in recurrent:
            layers[i] = StateLayer(number_of_states=templates[i].number_of_states)
        self.cache = Cache(layers=layers)

    def _items(self) -> Iterator[tuple[dict[int, Any], int]]:
        for layer in self.cache.layers:
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                for name in STATES:
                    states = getattr(layer, name)
                    yield from ((states, i) for i in states if states[i] is not None)

    def tensors(self) -> list[torch.Tensor]:
        """Return every state tensor, batch dimension first."""
        return [states[i] for states, i in self._items()]

    def apply(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace every state tensor by ``function`` of it."""
        for states, i in self._items():
            states[i] = function(states[i])

    def join(self, others: Sequence[RecurrentStates]) -> None:
        """Replace the states by the concatenated rows of ``others``."""
        first = others[0]
        for layer, source in zip(self.cache.layers, first.cache.layers, strict=True):
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                layer.__dict__.update({key: dict(x) if isinstance(x, dict) else x for key, x in vars(source).items()})
        tensors = zip(*(other.tensors() for other in others), strict=True)
        for (states, i), rows in zip(list(self._items()), tensors, strict=True):
            states[i] = torch.cat(rows)

    @property
    def nbytes(self) -> int:
        """Bytes of all states."""
        return sum(t.nbytes for t in self.tensors())
