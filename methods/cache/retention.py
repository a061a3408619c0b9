"""Cache layer of a gated-retention layer: one matrix per head, whatever the number of tokens."""

from __future__ import annotations

import torch

from ..policies.policy import PolicyCapabilities
from .static_steps import StaticSteps


class RecurrentLayer(StaticSteps):
    """Recurrent state of one retention layer, replaced after each forward, in place once static."""

    is_sliding = False  # read by transformers
    is_compileable = record_past = False
    in_prefill = False
    observation_window = 0
    capabilities = PolicyCapabilities(keeps_everything=True)

    def __init__(self) -> None:
        self.recurrent_states: list[torch.Tensor | None] = [None]
        self._is_static = False

    def update(self, state: torch.Tensor) -> None:
        """Replace the state by ``state`` [B, H, D, D]."""
        if self._is_static:
            self.tensors()[0].copy_(state)
        else:
            self.recurrent_states[0] = state.detach()

    def make_static(self, steps: int) -> None:
        self._is_static = True

    def static_state(self) -> list[torch.Tensor]:
        return self.tensors()

    @property
    def tokens(self) -> torch.Tensor:
        """Number of tokens stored: none, [B, 1] zeros."""
        state = self.recurrent_states[0]
        return torch.zeros(0 if state is None else state.shape[0], 1, dtype=torch.int64)

    def tensors(self) -> list[torch.Tensor]:
        """The state, once there is one."""
        return [state for state in self.recurrent_states if state is not None]

    @property
    def logical_bytes(self) -> int:
        """Bytes of the state."""
        return sum(t.nbytes for t in self.tensors())
