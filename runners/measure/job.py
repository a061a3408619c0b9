"""The job of a measuring process: a method on a workload, and how a batch of requests is answered.

The passes run in measuring processes (:mod:`.fresh`), which load a job's model with :mod:`.session`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from ...conf.errors import InputError
from ...methods.cache.cache import KVCache
from ...methods.cache.kernel_use import implementations
from ...methods.cache.method import Method
from ...methods.policies.no_cache import NoCache
from ...models.base import LoadedModel, ModelSource
from ...models.pretrained import input_device
from ...tasks.workload import Request, Workload
from ..engine import decode_step, left_padded, prefill
from ..engine.compiled import CompiledDecoder
from ..engine.step_operations import greedy_tokens


@dataclass(frozen=True)
class Job:
    """Input of a measuring process.

    Attributes:
        source, method, workload: What is measured; the workload is None in a search, which sets it.
        device, dtype: Device and compute dtype, resolved.
        seed, batch_size: Seed and batch size of the workload's requests.
        chunk_size, warmups, repeats, cuda_graph, compile, fuse_projections: The runner's settings.
    """

    source: ModelSource
    method: Method
    workload: Workload | None
    device: str
    dtype: torch.dtype
    seed: int
    batch_size: int
    chunk_size: int | None
    warmups: int
    repeats: int
    cuda_graph: bool = True
    compile: bool = False
    fuse_projections: bool = True

    @property
    def compiles(self) -> bool:
        """Whether the decode steps are compiled if the model can be."""
        return self.compile and not isinstance(self.method, NoCache)


@dataclass(frozen=True)
class Batch:
    """Requests that are answered together.

    Attributes:
        requests: One request per row.
        input_ids: [B, T] on the device, padded on the left.
        mask: [B, T], or None if all prompts are equally long.
    """

    requests: Sequence[Request]
    input_ids: torch.Tensor
    mask: torch.Tensor | None

    @property
    def steps(self) -> int:
        """Number of tokens to generate: the largest requested number."""
        return max(r.new_tokens for r in self.requests)

    @property
    def prompt_tokens(self) -> int:
        """Prompt tokens of all rows, without padding."""
        return sum(len(r.prompt) for r in self.requests)

    @property
    def output_tokens(self) -> int:
        """Number of requested output tokens of all rows."""
        return sum(r.new_tokens for r in self.requests)


@dataclass(frozen=True)
class LoadedJob:
    """A job and its model.

    Attributes:
        loaded: The model, prepared for inference.
        compiled: The model's compiled decode steps, or None.
    """

    job: Job
    loaded: LoadedModel
    compiled: CompiledDecoder | None = None

    @property
    def model(self) -> PreTrainedModel:
        """The transformers model."""
        return self.loaded.model

    @property
    def kernels_used(self) -> dict[str, str]:
        """What computed each operation of the last steps; see :mod:`...methods.cache.kernel_use`."""
        return implementations()

    def new_cache(self) -> KVCache:
        """A fresh cache of the job's method."""
        return self.job.method.new_cache(self.model, self.loaded.tokenizer)

    def with_workload(self, workload: Workload, batch_size: int) -> LoadedJob:
        """Return the job with other requests for the same model."""
        return replace(self, job=replace(self.job, workload=workload, batch_size=batch_size))

    def batches(self) -> list[Batch]:
        """The workload's requests in their order, ``batch_size`` at a time."""
        job, vocabulary = self.job, self.model.config.get_text_config().vocab_size
        assert job.workload is not None
        requests = job.workload.requests(self.loaded.tokenizer, vocabulary, job.seed, job.batch_size)
        return [self._batch(requests[i : i + job.batch_size]) for i in range(0, len(requests), job.batch_size)]

    def _batch(self, requests: Sequence[Request]) -> Batch:
        loaded = self.loaded
        prompt, new_tokens = max(len(r.prompt) for r in requests), max(r.new_tokens for r in requests)
        if prompt + new_tokens > loaded.max_positions:
            raise InputError(
                "workload.prompt_tokens",
                prompt,
                f"with {new_tokens} new tokens is beyond the {loaded.max_positions} positions of "
                f"{loaded.name}; model=random takes model.max_positions",
            )
        pad = 0 if loaded.tokenizer is None else loaded.tokenizer.pad_token_id
        ids, mask = left_padded([r.prompt for r in requests], pad, input_device(loaded.model, self.job.device))
        return Batch(requests, ids, mask)

    def answer(
        self,
        cache: KVCache,
        batch: Batch,
        after_token: Callable[[], None] = lambda: None,
        after_preparation: Callable[[], None] = lambda: None,
    ) -> str:
        """Answer a batch: prefill, then greedy tokens; no step waits for a token on the host, and no token ends a row.

        Args:
            cache: A fresh cache.
            batch: The requests.
            after_token: Called when the first tokens of all rows are queued, and after each decode step.
            after_preparation: Called when the decode steps can start, after one has been compiled or captured.

        Returns:
            Mode of the decode steps, as records name it; see :class:`..engine.step.DecodeStep`.
        """
        steps = batch.steps - 1
        cache.reserve(steps)
        token = greedy_tokens(prefill(self.model, cache, batch.input_ids, batch.mask, self.job.chunk_size))
        after_token()
        step = decode_step(self.model, cache, token, steps, capture=self.job.cuda_graph, compiled=self.compiled)
        after_preparation()
        for _ in range(steps):
            token = greedy_tokens(step(token))
            after_token()
        step.finish()
        return step.recorded_mode
