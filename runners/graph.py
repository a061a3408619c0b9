"""A decode step that is recorded once and played again: a CUDA graph over buffers of fixed size.

A step of a model is hundreds of small kernels; started one by one from Python they take longer to start than to run,
which hides what a method gains. Where no step changes a shape (``KVCache.can_freeze``) the step is recorded at the
second token and played for the rest. Methods that let tokens leave while decoding, and those whose storage changes its
shape with the tokens, run as they are; a record says which it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from ..methods.base import KVCache
from .engine import decode

EAGER, GRAPH = "eager", "cuda graph"


@dataclass
class Stepper:
    """Decode steps of one cache: call it as :func:`.engine.decode`, with the tokens alone.

    Make it when the prompt has been read.

    Attributes:
        model, cache: as for :func:`.engine.decode`.
        steps: that will be asked for at most.
        record: whether to record a step where that can be done.
        how: ``eager`` or ``cuda graph``.
    """

    model: PreTrainedModel
    cache: KVCache
    steps: int
    record: bool = True
    how: str = field(init=False)

    def __post_init__(self) -> None:
        # One step is run as it is and one is recorded; below four there is nothing to gain.
        useful = self.record and self.model.device.type == "cuda" and self.steps >= 4
        self.how = GRAPH if useful and self.cache.can_freeze and not _is_spread(self.model) else EAGER
        self._ran = 0
        self._play: Callable[[], None] | None = None
        if self.how == GRAPH:
            self.cache.freeze(self.steps)

    def __call__(self, token: torch.Tensor) -> torch.Tensor:
        """[rows] int64 -> logits [rows, vocabulary]; the next call may overwrite them."""
        self._ran += 1
        if self.how == EAGER or self._ran == 1:  # the first step also has libraries take what they need
            return decode(self.model, self.cache, token)
        if self._play is None:
            self._record(token)
        assert self._play is not None
        self._token.copy_(token)
        self._play()
        return self._logits

    def _record(self, token: torch.Tensor) -> None:
        self._token = token.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._logits = decode(self.model, self.cache, self._token)
        self.cache.advance(-1)  # it was written down, not run

        def play() -> None:
            graph.replay()
            self.cache.advance(1)

        self._play = play


def _is_spread(model: PreTrainedModel) -> bool:
    return getattr(model, "hf_device_map", None) is not None
