"""The time pass: TTFT, decode steps and throughput over repetitions, and the machine's bandwidth."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from statistics import fmean, median
from typing import Any

import torch
from transformers import PreTrainedModel

from ...analysis.costs import further_forwards
from ...methods.cache.compression import marked_by
from ...methods.cache.kernel_use import PYTORCH, STEP_ATTENTION, forget_implementations
from ...methods.cache.method import Method
from ...methods.policies.policy import FurtherForwards
from ..engine.step import EAGER
from .bandwidth import copy_bandwidth
from .clock import Stopwatch
from .job import Batch, Job, LoadedJob
from .memory import is_out_of_memory, release_memory
from .session import Session


@dataclass(frozen=True)
class Timed:
    """Times of one repetition of one batch, in seconds.

    Attributes:
        ttft: From handing over the prompts to the first token of every row.
        steps: Time of each decode step, in order.
        mode: Mode of the decode steps, as records name it; see :class:`..engine.step.DecodeStep`.
        preparation: Time to compile or capture a step before the first one; a server does this once when it starts,
            so it is in no other number.
        kernels: What computed each operation that has a kernel; see :mod:`...methods.cache.kernel_use`.
        compression: Part of ``ttft`` that follows the prompt's attention (:mod:`...methods.cache.compression`); None
            for a method without such a part.
        further: Forwards within ``compression``, of each row; empty for a method that makes none.
    """

    ttft: float
    steps: Sequence[float]
    mode: str = EAGER
    preparation: float = 0.0
    kernels: Mapping[str, str] = field(default_factory=dict)
    compression: float | None = None
    further: Sequence[FurtherForwards] = ()

    @property
    def decoding(self) -> float:
        """Time of all decode steps."""
        return sum(self.steps)


def time_pass(jobs: Sequence[Job], session: Session | None = None) -> list[dict[str, Any] | None]:
    """Times of every repetition and the copy bandwidth, for each job; the repetitions of the jobs are interleaved.

    On a CPU the bandwidth is measured after each repetition and its median is used, because other guests of a machine
    share its memory. A GPU's memory is not shared, and an allocation between repetitions would change their times.

    Args:
        jobs: A method, and others on the same requests to measure in turn with it. Every second round is in reverse
            order, so that none always follows the same one.
        session: What this process keeps between passes.

    Returns:
        Fields of a record for each job; None for one after the first that was out of memory.
    """
    session = session or Session()
    job, loaded = jobs[0], [session.load(job) for job in jobs]
    work = loaded[0].batches()
    copies = [copy_bandwidth(job.device)]
    repetitions: list[list[list[Timed]] | None] = [[] for _ in jobs]
    for i in range(job.warmups + job.repeats):
        for number in range(len(jobs)) if i % 2 == 0 else reversed(range(len(jobs))):
            recorded = repetitions[number]
            if recorded is None:
                continue
            timed = _time_work(loaded[number], work, may_fail=number > 0)
            if timed is None:
                repetitions[number] = None
            elif i >= job.warmups:
                recorded.append(timed)
        if i >= job.warmups and job.device == "cpu":
            copies.append(copy_bandwidth(job.device))
    pairs = zip(loaded, repetitions, strict=True)
    return [None if own is None else _fields(one, work, own, copies) for one, own in pairs]


def _time_work(loaded: LoadedJob, work: Sequence[Batch], may_fail: bool) -> list[Timed] | None:
    """One repetition: times of every batch; None if it is out of memory and ``may_fail``."""
    try:
        return [time_batch(loaded, batch) for batch in work]
    except Exception as error:
        if not may_fail or not is_out_of_memory(error):
            raise
    release_memory(loaded.job.device)  # outside the handler, because the exception keeps tensors alive
    return None


def _fields(
    loaded: LoadedJob,
    work: Sequence[Batch],
    repetitions: Sequence[Sequence[Timed]],
    copies: Sequence[float | None],
) -> dict[str, Any]:
    """The fields of a record that the time pass measures."""
    measured = [copy for copy in copies if copy is not None]
    kernels = kernels_of([timed.kernels for repetition in repetitions for timed in repetition])
    return {
        "metrics": metrics(work, repetitions),
        "repetitions": [
            [
                {
                    "ttft_s": t.ttft,
                    "compression_s": t.compression,
                    "decode_s": t.decoding,
                    "recording_s": t.preparation,
                }
                for t in timed
            ]
            for timed in repetitions
        ],
        **further_forwards([astuple(forwards) for timed in repetitions[0] for forwards in timed.further]),
        "decode": " and ".join(sorted({t.mode for timed in repetitions for t in timed})),
        "attention": kernels.get(STEP_ATTENTION, PYTORCH),
        "kernels": kernels,
        "workload": _shape_of(work),
        "bytes_read_per_step": bytes_read_per_step(work, loaded.model, loaded.job.method),
        "bandwidth": {
            "copy_bytes_per_s": median(measured) if measured else None,
            "repetitions": list(copies),
            "problem": None if measured else "no memory for the copy that measures it",
        },
    }


def kernels_of(batches: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Join what computed each operation in several batches."""
    operations = sorted({operation for batch in batches for operation in batch})
    return {o: " and ".join(sorted({batch[o] for batch in batches if o in batch})) for o in operations}


@torch.inference_mode()
def time_batch(loaded: LoadedJob, batch: Batch) -> Timed:
    """Times of one batch."""
    gc.collect()  # free the previous batch's cache before the clock starts
    cache = loaded.new_cache()
    watch, compressions = Stopwatch(loaded.job.device), Stopwatch(loaded.job.device)
    forget_implementations()
    watch.mark()
    with marked_by(compressions.mark):
        mode = loaded.answer(cache, batch, watch.mark, watch.mark)
    ttft, preparation, *steps = watch.seconds()
    in_attention = loaded.job.method.policy.capabilities.prefills_by_steps
    compression = None if in_attention else compressions.seconds_between_pairs()
    return Timed(ttft, steps, mode, preparation, loaded.kernels_used, compression, cache.further_forwards)


def metrics(work: Sequence[Batch], repetitions: Sequence[Sequence[Timed]]) -> dict[str, dict[str, Any] | None]:
    """Summary of each metric over the repetitions; ``step_ms`` is over single decode steps.

    None for the compression of a method that has no such part of its prefill.

    Args:
        work: The batches.
        repetitions: Times of each batch, repetition by repetition.
    """
    prompt, output = sum(b.prompt_tokens for b in work), sum(b.output_tokens for b in work)
    later = sum(b.output_tokens - len(b.requests) for b in work)  # output tokens that are not a request's first
    steps = sum(b.steps - 1 for b in work)

    def of_requests(seconds: Sequence[float]) -> float:
        return 1e3 * fmean(s for s, b in zip(seconds, work, strict=True) for _ in b.requests)

    def of_repetition(timed: Sequence[Timed]) -> Iterator[tuple[str, float]]:
        ttft, decoding = sum(t.ttft for t in timed), sum(t.decoding for t in timed)
        yield "ttft_ms", of_requests([t.ttft for t in timed])
        yield "tpot_ms", 1e3 * decoding / steps
        yield "prefill_tokens_per_s", prompt / ttft
        yield "decode_tokens_per_s", later / decoding
        yield "output_tokens_per_s", output / (ttft + decoding)
        yield "total_tokens_per_s", (prompt + output) / (ttft + decoding)

    rows = [dict(of_repetition(timed)) for timed in repetitions]
    out: dict[str, dict[str, Any] | None] = {key: spread([row[key] for row in rows]) for key in rows[0]}
    compressions = [[t.compression for t in timed if t.compression is not None] for timed in repetitions]
    known = all(len(each) == len(work) for each in compressions)
    out["compression_ms"] = spread([of_requests(each) for each in compressions]) if known else None
    single = torch.tensor([1e3 * s for timed in repetitions for t in timed for s in t.steps], dtype=torch.float64)
    quantiles = torch.quantile(single, torch.tensor([0.5, 0.9, 0.99], dtype=torch.float64)).tolist()
    named = dict(zip(("median", "p90", "p99"), quantiles, strict=True))
    out["step_ms"] = {**named, "min": float(single.min()), "max": float(single.max()), "steps": len(single)}
    return out


def weight_bytes_read(model: PreTrainedModel) -> int:
    """Bytes of the weights that a decode step reads, prepacked (:mod:`..engine.weights`) or not.

    A step looks up single rows of the embedding; the whole table is read only if it is the output layer too.
    """
    table: Any = model.get_input_embeddings()
    tied = table.weight is model.get_output_embeddings().weight
    return sum(p.nbytes for p in model.parameters()) - (0 if tied else table.weight.nbytes)


def bytes_read_per_step(work: Sequence[Batch], model: PreTrainedModel, method: Method) -> float:
    """Lower bound of the bytes that a decode step reads, averaged over all steps: the weights and the batch's caches.

    The caches are counted by the formula (each layer reads K/V that it shares), halfway between the first and the last
    step of a batch.
    """
    weights, read = weight_bytes_read(model), method.read_formula(model)
    total = 0.0
    for batch in work:
        lengths = [len(r.prompt) for r in batch.requests]
        first = sum(read(n) for n in lengths)
        last = sum(read(n, batch.steps - 1) for n in lengths)
        total += (batch.steps - 1) * (weights + (first + last) / 2)
    return total / sum(batch.steps - 1 for batch in work)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Summarize one metric over the repetitions."""
    return {"median": median(values), "min": min(values), "max": max(values), "repetitions": list(values)}


def _shape_of(work: Sequence[Batch]) -> dict[str, Any]:
    """The field ``workload`` of a record: token counts of the batches."""
    return {
        "batches": [
            {
                "requests": len(b.requests),
                "prompt_tokens": b.prompt_tokens,
                "output_tokens": b.output_tokens,
                "longest_prompt": b.input_ids.shape[1],
                "steps": b.steps,
            }
            for b in work
        ],
        "prompt_tokens": sum(b.prompt_tokens for b in work),
        "output_tokens": sum(b.output_tokens for b in work),
    }
