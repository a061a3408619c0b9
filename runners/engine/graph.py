"""How decode steps are run: one by one, compiled (``compiled.py``), or recorded once and played again.

On CUDA a step of a model is hundreds of small kernels; started one by one from Python they take longer to start than to
run, which hides what a method gains. Where no step changes a shape (``KVCache.supports_static``) a step is captured
once the prompt is in, and every token is a replay: a CUDA graph over buffers of fixed size. What a storage does once
in so many steps (``KVCache.between_steps``) follows the replay it is due after. The
others run as they are; a record says which it was, and how long the capture took.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from ...methods.cache.cache import KVCache
from .compiled import MAX_ROWS, CompiledStep, can_compile
from .decoding import decode
from .model_properties import has_dynamic_rope, is_spread

EAGER, GRAPH, COMPILED = "eager", "cuda graph", "compiled"

SCARCE = 4 << 30
"""Bytes of a device's memory below which the allocator is emptied before a step is recorded."""


@dataclass
class Stepper:
    """Decode steps of one cache: call it as :func:`.engine.decode`, with the tokens alone.

    Make it when the prompt has been read: that is when a step is recorded, or compiled where
    :func:`.compiled.compile_steps` said so.

    Attributes:
        model, cache: as for :func:`.engine.decode`.
        token: [rows] int64, any tokens; the first ones will do.
        steps: that will be asked for at most.
        record: whether to record a step where that can be done.
        how: ``eager``, ``cuda graph`` or ``compiled``.
    """

    model: PreTrainedModel
    cache: KVCache
    token: torch.Tensor
    steps: int
    record: bool = True
    how: str = field(init=False)

    @torch.inference_mode()
    def __post_init__(self) -> None:
        self._compiled: CompiledStep | None = getattr(self.model, "compiled_step", None)
        rows = self.token.shape[0]
        if self._compiled is not None and rows <= MAX_ROWS and can_compile(self.model) and not self.cache.recomputes:
            self._compiled.prepare(rows)
            self.how = COMPILED
            return
        # RoPE that follows the length compares it with a limit on the host, at every step.
        alike = not is_spread(self.model) and not has_dynamic_rope(self.model)
        possible = self.model.device.type == "cuda" and alike
        self.how = GRAPH if self.record and possible and self.cache.supports_static else EAGER
        if self.how == EAGER:
            return
        self.cache.make_static(self.steps)
        self.token = self.token.clone()
        before = [(tensor, tensor.clone()) for tensor in self.cache.static_state()]
        decode(self.model, self.cache, self.token)  # libraries take what they need before anything is recorded
        for tensor, value in before:
            tensor.copy_(value)
        self.cache.skip(-1)
        self._graph = torch.cuda.CUDAGraph()
        with recording(self._graph):
            self._logits = decode(self.model, self.cache, self.token)
        self.cache.skip(-1)  # capture does not execute the kernels

    @torch.inference_mode()
    def __call__(self, token: torch.Tensor) -> torch.Tensor:
        """[rows] int64 -> logits [rows, vocabulary]; the next call may overwrite them."""
        if self.how == EAGER:
            return decode(self.model, self.cache, token)
        if self.how == COMPILED:
            assert self._compiled is not None
            return self._compiled(self.cache, token)
        self.token.copy_(token)
        self._graph.replay()
        self.cache.skip(1)
        self.cache.between_steps()
        return self._logits


@contextmanager
def recording(graph: torch.cuda.CUDAGraph) -> Iterator[None]:
    """Write down what is queued on the current device instead of running it.

    Not ``torch.cuda.graph``, which always empties the allocator first: the next prompt would pay for that.
    """
    torch.cuda.synchronize()
    if torch.cuda.mem_get_info()[0] < SCARCE:  # while recording, the allocator gives back nothing that it keeps
        torch.cuda.empty_cache()
    side = _side_stream(torch.cuda.current_device())
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        graph.capture_begin()
        try:
            yield
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(side)


@functools.cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """One stream for all recordings: libraries keep a workspace for each stream that they have seen, for ever."""
    return torch.cuda.Stream(device)
