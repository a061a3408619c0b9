"""The interface of a decode step; :mod:`.decoding` chooses the implementation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch

from ...methods.cache.cache import KVCache

EAGER, FUSED, COMPILED, CUDA_GRAPH = "eager", "fused", "compiled", "cuda graph"


class DecodeStep(ABC):
    """One way of running the decode steps of a model with one cache.

    Attributes:
        mode: ``eager`` (transformers' forward), ``fused``, ``compiled`` or ``cuda graph``.
        cache: The cache, after its prompt has been compressed.
        capture_problem: Why a step on CUDA is not captured; None: it is, or it was not tried.
    """

    mode: ClassVar[str]
    capture_problem: str | None = None

    def __init__(self, cache: KVCache):
        self.cache = cache

    @property
    def recorded_mode(self) -> str:
        """Mode for records, with the reason if a step could not be captured; a fused step is eager without wrappers."""
        mode = EAGER if self.mode == FUSED else self.mode
        return mode if self.capture_problem is None else f"{mode}: {self.capture_problem}"

    @torch.inference_mode()
    def __call__(self, token: torch.Tensor) -> torch.Tensor:
        """Feed one token per row: [rows] int64 -> logits [rows, vocabulary]; the next call may overwrite the logits."""
        return self.forward(token)

    def finish(self) -> None:
        """Check the cache after the last step, outside the timed region.

        Raises:
            InputError: A static step ran out of slots, so its logits are wrong.
        """
        self.cache.end_steps()

    @abstractmethod
    def forward(self, token: torch.Tensor) -> torch.Tensor:
        """The part of a step that can be captured: [rows] int64 -> logits [rows, vocabulary]."""
