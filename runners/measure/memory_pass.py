"""The memory pass: bytes of the cache, and peaks of memory in prefill and in decoding."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from ...conf.errors import InputError
from ...methods.cache.layout import describe_layers, full_shape, model_shape
from ...models.pretrained import devices_of
from ...tasks.workload import Request
from ..records.runs import BASELINE
from .job import Batch, Job, LoadedJob
from .memory import MemoryMeter, Peak
from .session import Session


@dataclass(frozen=True)
class BatchMemory:
    """Memory that answering one batch took.

    Attributes:
        at_rest, peak_prefill, peak_decode: See :class:`.memory.Peak`; None if this machine cannot measure it.
        stored, logical: Bytes of the cache after the prompt was compressed, and after the last step.
        read: Bytes of the cache that the last step read, if the method reads a part of it; None: it reads all.
    """

    at_rest: Peak | None
    peak_prefill: Peak | None
    peak_decode: Peak | None
    stored: tuple[int, int]
    logical: tuple[int, int]
    read: int | None


@torch.inference_mode()
def memory_of(loaded: LoadedJob, batch: Batch, meter: MemoryMeter) -> BatchMemory:
    """Peaks of memory while a batch is answered, phase by phase, and the bytes of its cache."""
    meter.reset()
    at_rest = meter.peak()
    cache = loaded.new_cache()
    stored, logical, peaks = [], [], []

    def measure() -> None:
        peaks.append(meter.peak())
        stored.append(cache.kv_bytes_stored)
        logical.append(cache.kv_bytes_logical)

    def after_token() -> None:
        if not peaks:
            measure()
            meter.reset()

    loaded.answer(cache, batch, after_token)
    measure()
    read = cache.kv_bytes_read_per_step if loaded.job.method.storage.capabilities.reads_part else None
    return BatchMemory(at_rest, peaks[0], peaks[1], (stored[0], stored[1]), (logical[0], logical[1]), read)


@torch.inference_mode()
def warm_up(loaded: LoadedJob, batch: Batch) -> None:
    """Answer a few tokens: libraries allocate their workspaces at the first call of each kind, and keep them."""
    try:
        _answer_few(loaded, batch, 4)
    except InputError:  # a budget that so short a prompt cannot meet
        _answer_few(loaded, batch, batch.input_ids.shape[1])


def _answer_few(loaded: LoadedJob, batch: Batch, prompt_tokens: int) -> None:
    requests = [Request(r.id, r.prompt[-prompt_tokens:], 3) for r in batch.requests]
    loaded.answer(loaded.new_cache(), Batch(requests, batch.input_ids[:, -prompt_tokens:], None))


def memory_pass(job: Job, session: Session | None = None) -> dict[str, Any]:
    """Bytes of the cache and peaks of memory, of the batch with the most tokens.

    Args:
        job: The method and its requests.
        session: What this process keeps between passes.
    """
    loaded = (session or Session()).load(job)
    model = loaded.model
    batch = max(loaded.batches(), key=lambda b: b.input_ids.numel() + b.steps * len(b.requests))
    meter = MemoryMeter(job.device, devices_of(model, job.device))
    warm_up(loaded, batch)
    memory = memory_of(loaded, batch, meter)
    shape, full = model_shape(model), full_shape(model, job.method.sharing)
    lengths, steps = [len(r.prompt) for r in batch.requests], batch.steps - 1
    read = job.method.read_formula(model)
    formula = sum(read(n, steps) for n in lengths)
    peaks = {"at_rest": memory.at_rest, "peak_prefill": memory.peak_prefill, "peak_decode": memory.peak_decode}
    return {
        "cache_layers": describe_layers(model),
        "bytes": {
            "kv_bytes_stored": memory.stored[0],
            "kv_bytes_stored_end": memory.stored[1],
            "kv_bytes_logical": memory.logical[0],
            "kv_bytes_logical_end": memory.logical[1],
            "kv_bytes_formula": sum(job.method.bytes_formula(shape, n) for n in lengths),
            "kv_bytes_formula_end": sum(job.method.bytes_formula(shape, n, steps) for n in lengths),
            "kv_bytes_read_per_step": formula if memory.read is None else memory.read,
            "kv_bytes_full": sum(BASELINE.bytes_formula(full, n) for n in lengths),
            "weight_bytes": sum(p.nbytes for p in model.parameters()),
            "requests": len(lengths),
        },
        "memory": {
            "what": "allocator" if job.device.startswith("cuda") else "resident set",
            "problem": meter.problem,
            **{key: None if peak is None else asdict(peak) for key, peak in peaks.items()},
        },
    }
