"""Decode steps captured once as a CUDA graph and replayed.

On CUDA a decode step of a model is hundreds of small kernels. Launching them one by one from Python takes longer than
running them, which hides the gain of a method. If all shapes of a step are static (``KVCache.static_problem``), it is
captured after the prefill, and every token is a replay over buffers of fixed size. Periodic work
(``KVCache.between_steps``) follows the replay.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from ...methods.cache.cache import KVCache
from .model_properties import has_dynamic_rope, is_spread
from .step import CUDA_GRAPH, DecodeStep

MAX_DEVICE_COPY_BYTES = 1 << 20
"""Largest tensor that is saved on the device before the step that warms a capture up; larger ones go to the host."""
LOW_MEMORY_BYTES = 4 << 30
"""Free device memory below which the allocator's cache is emptied before a capture."""


class CapturedStep(DecodeStep):
    """A captured step; each call is a replay.

    Args:
        step: The step to capture.
        token: [rows] int64, any tokens.
        steps: Largest number of calls.
    """

    mode = CUDA_GRAPH

    @torch.inference_mode()
    def __init__(self, step: DecodeStep, token: torch.Tensor, steps: int):
        super().__init__(step.cache)
        self._token = token.clone()
        self.cache.make_static(steps)
        before = saved(self.cache.static_state())
        step.forward(self._token)  # libraries allocate their workspaces before the capture
        for tensor, value in before:  # undo the step
            tensor.copy_(value)
        del before  # the copies are not part of the capture's peak
        self.cache.skip(-1)
        self._graph = torch.cuda.CUDAGraph()
        with capturing(self._graph):
            self._logits = step.forward(self._token)
        self.cache.skip(-1)  # capture does not execute the kernels, so undo the length increment

    def forward(self, token: torch.Tensor) -> torch.Tensor:
        self._token.copy_(token)
        self._graph.replay()
        self.cache.skip(1)  # a replay runs no Python
        self.cache.between_steps()
        return self._logits


def saved(tensors: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each tensor with a copy; large ones are copied to the host, since the device may not have memory for both."""
    is_large = [tensor.nbytes > MAX_DEVICE_COPY_BYTES for tensor in tensors]
    return [(x, x.to("cpu", copy=True) if large else x.clone()) for x, large in zip(tensors, is_large, strict=True)]


def capture_problem(model: PreTrainedModel, cache: KVCache) -> str | None:
    """Why a decode step on CUDA cannot be captured; None: it has static shapes and does not wait for the device."""
    if is_spread(model):
        return "the model is spread over several devices"
    if has_dynamic_rope(model):
        return "the model's RoPE depends on the length, which the host compares with a limit at every step"
    return cache.static_problem


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph) -> Iterator[None]:
    """Capture the kernels that are queued on the current device instead of running them.

    Unlike ``torch.cuda.graph`` it does not always empty the allocator's cache, which would slow down the next prefill.
    """
    torch.cuda.synchronize()
    if torch.cuda.mem_get_info()[0] < LOW_MEMORY_BYTES:  # during a capture the allocator returns no cached memory
        torch.cuda.empty_cache()
    side = _capture_stream(torch.cuda.current_device())
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        graph.capture_begin()
        try:
            yield
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(side)


@functools.cache
def _capture_stream(device: int) -> torch.cuda.Stream:
    """One stream for all captures, because libraries keep a workspace for each stream they have been called on."""
    return torch.cuda.Stream(device)
