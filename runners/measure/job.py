"""The job of a measuring process: a method on a workload, and how a batch of requests is answered.

Every pass runs in a fresh process (:mod:`.fresh`): nothing is cached from another method, and the memory pass can set
the allocator so that freed memory is returned to the system at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ...conf.errors import InputError
from ...methods.cache.cache import KVCache
from ...methods.cache.method import Method
from ...methods.policies.no_cache import NoCache
from ...models.base import LoadedModel, ModelSource
from ...models.pretrained import input_device
from ...tasks.workload import Request, Workload
from ..engine import left_padded, prefill
from ..engine.compiled import can_compile, compile_steps
from ..engine.graph import Stepper
from ..engine.weights import prepack_linear_weights


@dataclass(frozen=True)
class Job:
    """Input of a measuring process.

    Attributes:
        source, method, workload: what is measured; the workload is None in a search, which sets it.
        device, dtype: device and compute dtype, resolved.
        seed, batch_size: seed and batch size of the workload's requests.
        chunk_size, warmups, repeats, cuda_graph, compile: the runner's settings.
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


@dataclass(frozen=True)
class Batch:
    """Requests that are answered together.

    Attributes:
        requests: one request per row.
        input_ids: [B, T] on the device, padded on the left.
        mask: [B, T], or None if all prompts are equally long.
    """

    requests: Sequence[Request]
    input_ids: torch.Tensor
    mask: torch.Tensor | None

    @property
    def steps(self) -> int:
        """Tokens to generate: the largest number that a request asks for."""
        return max(r.new_tokens for r in self.requests)

    @property
    def prompt_tokens(self) -> int:
        """Prompt tokens of all rows, without padding."""
        return sum(len(r.prompt) for r in self.requests)

    @property
    def output_tokens(self) -> int:
        """Tokens that the requests ask for, all rows together."""
        return sum(r.new_tokens for r in self.requests)


def batches(job: Job, loaded: LoadedModel) -> list[Batch]:
    """The workload's requests in their order, ``batch_size`` at a time."""
    vocabulary = loaded.model.config.get_text_config().vocab_size
    assert job.workload is not None
    requests = job.workload.requests(loaded.tokenizer, vocabulary, job.seed, job.batch_size)
    return [_batch(job, loaded, requests[i : i + job.batch_size]) for i in range(0, len(requests), job.batch_size)]


def _batch(job: Job, loaded: LoadedModel, requests: Sequence[Request]) -> Batch:
    prompt, new_tokens = max(len(r.prompt) for r in requests), max(r.new_tokens for r in requests)
    if prompt + new_tokens > loaded.max_positions:
        raise InputError(
            "task.prompt_tokens",
            prompt,
            f"with {new_tokens} new tokens is beyond the {loaded.max_positions} positions of "
            f"{loaded.name}; model=random takes model.max_positions",
        )
    pad = 0 if loaded.tokenizer is None else loaded.tokenizer.pad_token_id
    ids, mask = left_padded([r.prompt for r in requests], pad, input_device(loaded.model, job.device))
    return Batch(requests, ids, mask)


def use_device(device: str) -> None:
    """Make a CUDA device the current one: Triton kernels and graph captures run on the current device."""
    if device.startswith("cuda"):
        torch.cuda.set_device(torch.device(device).index or 0)


def load(job: Job) -> LoadedModel:
    """Load the model as the job runs it; see :mod:`..engine.compiled` and :mod:`..engine.weights`."""
    loaded = job.source.load(job.device, job.dtype)
    if job.compile and can_compile(loaded.model) and not isinstance(job.method, NoCache):
        compile_steps(loaded.model)
    else:
        prepack_linear_weights(loaded.model)
    return loaded


def answer(
    model: PreTrainedModel,
    cache: KVCache,
    batch: Batch,
    job: Job,
    after_token: Callable[[], None] = lambda: None,
    after_recording: Callable[[], None] = lambda: None,
) -> str:
    """Answer a batch: prefill, then greedy tokens; no step waits for a token on the host, and no token ends a row.

    Args:
        model, cache: see :func:`..engine.prefill`.
        batch: the requests.
        job: the settings.
        after_token: called when the first tokens of all rows are queued, and after each decode step.
        after_recording: called when the decode steps can start.

    Returns:
        Mode of the decode steps; see :class:`..engine.graph.Stepper`.
    """
    cache.reserve(batch.steps - 1)
    token = prefill(model, cache, batch.input_ids, batch.mask, job.chunk_size).argmax(-1)
    after_token()
    step = Stepper(model, cache, token, batch.steps - 1, job.cuda_graph)
    after_recording()
    for _ in range(batch.steps - 1):
        token = step(token).argmax(-1)
        after_token()
    return step.how
