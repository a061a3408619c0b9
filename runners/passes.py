"""What a measuring process does: time, memory and energy of one method on one workload, each in a pass of its own.

Every function that the runner calls here takes a :class:`Job` and runs in a fresh process (``fresh.py``): the clock
starts with nothing cached from another method, and the memory pass can set the allocator so that what is freed is seen
to be freed.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any

import torch
from transformers import PreTrainedModel

from ..conf.errors import InputError
from ..methods.cache.cache import KVCache
from ..methods.cache.layout import describe_layers, full_shape, model_shape
from ..methods.cache.method import Method
from ..methods.policies.no_cache import NoCache
from ..models.base import LoadedModel, ModelSource
from ..models.pretrained import devices_of, input_device
from ..tasks.workload import Request, Workload
from .compiled import can_compile, compile_steps
from .engine import left_padded, prefill
from .graph import EAGER, Stepper
from .measure import EnergyMeter, MemoryMeter, Peak, Stopwatch, copy_bandwidth, now
from .runs import BASELINE
from .weights import prepack_linear_weights

QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
"""Environment of a measuring process: a model is loaded in each, and a bar for each would bury what is said."""


@dataclass(frozen=True)
class Job:
    """What a measuring process is given.

    Attributes:
        source, method, workload: what is measured; no workload where a search sets it.
        device, dtype: where, as resolved.
        seed, batch_size: of the workload's requests.
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
        requests: one per row.
        input_ids: [B, T] on the device, padded on the left.
        mask: [B, T], or None: all equally long.
    """

    requests: Sequence[Request]
    input_ids: torch.Tensor
    mask: torch.Tensor | None

    @property
    def steps(self) -> int:
        """Tokens to produce: those of the request that wants most."""
        return max(r.new_tokens for r in self.requests)

    @property
    def prompt_tokens(self) -> int:
        """Real prompt tokens of all rows."""
        return sum(len(r.prompt) for r in self.requests)

    @property
    def output_tokens(self) -> int:
        """Tokens the requests asked for, of all rows."""
        return sum(r.new_tokens for r in self.requests)


@dataclass(frozen=True)
class Timed:
    """One repetition of one batch, in seconds.

    Attributes:
        ttft: from handing over the prompts to the first token of every row.
        steps: of each further token, in order.
        how: the steps were run; see :class:`.graph.Stepper`.
        recording: a step, before the first one; a server does it once when it starts, so it is in no other number.
    """

    ttft: float
    steps: Sequence[float]
    how: str = EAGER
    recording: float = 0.0

    @property
    def decoding(self) -> float:
        """All further tokens."""
        return sum(self.steps)


def batches(job: Job, loaded: LoadedModel) -> list[Batch]:
    """The workload's requests in their order, ``batch_size`` at a time."""
    vocabulary = loaded.model.config.get_text_config().vocab_size
    assert job.workload is not None
    requests = job.workload.requests(loaded.tokenizer, vocabulary, job.seed, job.batch_size)
    out = []
    for start in range(0, len(requests), job.batch_size):
        rows = requests[start : start + job.batch_size]
        longest = max(len(r.prompt) for r in rows) + max(r.new_tokens for r in rows)
        if longest > loaded.max_positions:
            raise InputError(
                "task.prompt_tokens",
                max(len(r.prompt) for r in rows),
                f"with {max(r.new_tokens for r in rows)} new tokens is beyond the {loaded.max_positions} positions of "
                f"{loaded.name}; model=random takes model.max_positions",
            )
        pad = 0 if loaded.tokenizer is None else loaded.tokenizer.pad_token_id
        ids, mask = left_padded([r.prompt for r in rows], pad, input_device(loaded.model, job.device))
        out.append(Batch(rows, ids, mask))
    return out


def use_device(device: str) -> None:
    """Make a CUDA device the current one: kernels of our own and recordings go there, whatever their tensors say."""
    if device.startswith("cuda"):
        torch.cuda.set_device(torch.device(device).index or 0)


def load(job: Job) -> LoadedModel:
    """The model, as the job would have it run; see :mod:`.compiled` and :mod:`.weights`."""
    loaded = job.source.load(job.device, job.dtype)
    if job.compile and can_compile(loaded.model) and not isinstance(job.method, NoCache):
        compile_steps(loaded.model)
    else:
        prepack_linear_weights(loaded.model)
    return loaded


def time_pass(job: Job) -> dict[str, Any]:
    """Every repetition's times, and the yardstick measured between the same walls.

    On a CPU the yardstick is measured in turn with the repetitions, and its median counts: other guests of a machine
    share its memory. A GPU's is not shared, and what is allocated between its repetitions would show in their times.
    """
    use_device(job.device)
    loaded = load(job)
    work = batches(job, loaded)
    copies = [copy_bandwidth(job.device)]
    repetitions = []
    for i in range(job.warmups + job.repeats):
        timed = [time_batch(loaded.model, batch, job) for batch in work]
        if i >= job.warmups:
            repetitions.append(timed)
            if job.device == "cpu":
                copies.append(copy_bandwidth(job.device))
    measured = [copy for copy in copies if copy is not None]
    return {
        "metrics": metrics(work, repetitions),
        "repetitions": [
            [{"ttft_s": t.ttft, "decode_s": t.decoding, "recording_s": t.recording} for t in timed]
            for timed in repetitions
        ],
        "decode": " and ".join(sorted({t.how for timed in repetitions for t in timed})),
        "workload": {
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
        },
        "bytes_read_per_step": bytes_read_per_step(work, loaded.model, job.method),
        "bandwidth": {
            "copy_bytes_per_s": median(measured) if measured else None,
            "repetitions": copies,
            "problem": None if measured else "no memory for the copy that measures it",
        },
    }


def answer(
    model: PreTrainedModel,
    cache: KVCache,
    batch: Batch,
    job: Job,
    after_token: Callable[[], None] = lambda: None,
    after_recording: Callable[[], None] = lambda: None,
) -> str:
    """What every pass does with a batch: prompts in, greedy tokens out; nothing waits for a token and none stops it.

    Args:
        model, cache: see :func:`.engine.prefill`.
        batch: the requests.
        job: the settings.
        after_token: called when the first tokens of all rows are queued, and after each further step.
        after_recording: called when the steps can begin.

    Returns:
        How the steps were run; see :class:`.graph.Stepper`.
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


@torch.inference_mode()
def time_batch(model: PreTrainedModel, batch: Batch, job: Job) -> Timed:
    """Times of one batch."""
    gc.collect()  # the last batch's cache is gone before this one's clock starts
    cache = job.method.new_cache(model)
    watch = Stopwatch(job.device)
    watch.mark()
    how = answer(model, cache, batch, job, watch.mark, watch.mark)
    ttft, recording, *steps = watch.seconds()
    return Timed(ttft, steps, how, recording)


def metrics(work: Sequence[Batch], repetitions: Sequence[Sequence[Timed]]) -> dict[str, dict[str, Any]]:
    """Each metric's median, least, greatest and single values over the repetitions; ``step_ms`` over single steps.

    Args:
        work: the batches.
        repetitions: times of each batch, repetition by repetition.
    """
    prompt, output = sum(b.prompt_tokens for b in work), sum(b.output_tokens for b in work)
    later = sum(b.output_tokens - len(b.requests) for b in work)  # output tokens that are not a request's first
    steps = sum(b.steps - 1 for b in work)

    def of_one(timed: Sequence[Timed]) -> Iterator[tuple[str, float]]:
        ttft, decoding = sum(t.ttft for t in timed), sum(t.decoding for t in timed)
        yield "ttft_ms", 1e3 * fmean(t.ttft for t, b in zip(timed, work, strict=True) for _ in b.requests)
        yield "tpot_ms", 1e3 * decoding / steps
        yield "prefill_tokens_per_s", prompt / ttft
        yield "decode_tokens_per_s", later / decoding
        yield "output_tokens_per_s", output / (ttft + decoding)
        yield "total_tokens_per_s", (prompt + output) / (ttft + decoding)

    rows = [dict(of_one(timed)) for timed in repetitions]
    out = {key: spread([row[key] for row in rows]) for key in rows[0]}
    single = torch.tensor([1e3 * s for timed in repetitions for t in timed for s in t.steps], dtype=torch.float64)
    at = torch.quantile(single, torch.tensor([0.5, 0.9, 0.99], dtype=torch.float64)).tolist()
    named = dict(zip(("median", "p90", "p99"), at, strict=True))
    out["step_ms"] = {**named, "min": float(single.min()), "max": float(single.max()), "steps": len(single)}
    return out


def weight_bytes_read(model: PreTrainedModel) -> int:
    """Bytes of the weights that a step reads, in either form of :mod:`.weights`.

    A step looks up single rows of the embedding; only where it is the output layer too is the table read whole.
    """
    table: Any = model.get_input_embeddings()
    tied = table.weight is model.get_output_embeddings().weight
    return sum(p.nbytes for p in model.parameters()) - (0 if tied else table.weight.nbytes)


def bytes_read_per_step(work: Sequence[Batch], model: PreTrainedModel, method: Method) -> float:
    """Bytes that a decode step must read at least, on average over all steps: the weights, and the batch's caches.

    The caches by the formula (what layers share is read by each of them), halfway between a batch's first step and its
    last.
    """
    weights = weight_bytes_read(model)
    total = 0.0
    for batch in work:
        lengths = [len(r.prompt) for r in batch.requests]
        first = sum(method.bytes_read_formula(model, n) for n in lengths)
        last = sum(method.bytes_read_formula(model, n, batch.steps - 1) for n in lengths)
        total += (batch.steps - 1) * (weights + (first + last) / 2)
    return total / sum(batch.steps - 1 for batch in work)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Of one number over the repetitions."""
    return {"median": median(values), "min": min(values), "max": max(values), "repetitions": list(values)}


@dataclass(frozen=True)
class Held:
    """What one batch took.

    Attributes:
        at_rest, peak_prefill, peak_decode: highest marks, see :class:`.measure.Peak`; None where there is no meter.
        stored, logical: bytes of the cache when the prompt had been compressed, and after the last step.
    """

    at_rest: Peak | None
    peak_prefill: Peak | None
    peak_decode: Peak | None
    stored: tuple[int, int]
    logical: tuple[int, int]


@torch.inference_mode()
def memory_of(model: PreTrainedModel, batch: Batch, meter: MemoryMeter, job: Job) -> Held:
    """Peaks of memory while a batch is answered, phase by phase, and the bytes of its cache."""
    meter.reset()
    at_rest = meter.peak()
    cache = job.method.new_cache(model)
    stored, logical, peaks = [], [], []

    def look() -> None:
        peaks.append(meter.peak())
        stored.append(cache.kv_bytes_stored)
        logical.append(cache.kv_bytes_logical)

    def after_first() -> None:
        if not peaks:
            look()
            meter.reset()

    answer(model, cache, batch, job, after_first)
    look()
    return Held(at_rest, peaks[0], peaks[1], (stored[0], stored[1]), (logical[0], logical[1]))


@torch.inference_mode()
def take_workspaces(model: PreTrainedModel, batch: Batch, job: Job) -> None:
    """Answer a few tokens: libraries take their workspaces with the first call of each kind, and keep them."""
    few = [Request(r.id, r.prompt[-4:], 3) for r in batch.requests]
    answer(model, job.method.new_cache(model), Batch(few, batch.input_ids[:, -4:], None), job)


def memory_pass(job: Job) -> dict[str, Any]:
    """Bytes of the cache and peaks of memory, of the batch that holds most tokens."""
    use_device(job.device)
    loaded = load(job)
    model = loaded.model
    batch = max(batches(job, loaded), key=lambda b: b.input_ids.numel() + b.steps * len(b.requests))
    meter = MemoryMeter(job.device, devices_of(model, job.device))
    take_workspaces(model, batch, job)
    held = memory_of(model, batch, meter, job)
    shape, full = model_shape(model), full_shape(model, job.method.sharing)
    lengths, steps = [len(r.prompt) for r in batch.requests], batch.steps - 1
    return {
        "cache_layers": describe_layers(model),
        "bytes": {
            "kv_bytes_stored": held.stored[0],
            "kv_bytes_stored_end": held.stored[1],
            "kv_bytes_logical": held.logical[0],
            "kv_bytes_logical_end": held.logical[1],
            "kv_bytes_formula": sum(job.method.bytes_formula(shape, n) for n in lengths),
            "kv_bytes_formula_end": sum(job.method.bytes_formula(shape, n, steps) for n in lengths),
            "kv_bytes_full": sum(BASELINE.bytes_formula(full, n) for n in lengths),
            "weight_bytes": sum(p.nbytes for p in model.parameters()),
            "requests": len(lengths),
        },
        "memory": {
            "what": "allocator" if job.device.startswith("cuda") else "resident set",
            "problem": meter.problem,
            **{
                key: None if peak is None else asdict(peak)
                for key, peak in (
                    ("at_rest", held.at_rest),
                    ("peak_prefill", held.peak_prefill),
                    ("peak_decode", held.peak_decode),
                )
            },
        },
    }


ENERGY_SECONDS = 2.0
"""The workload is repeated for at least so long: drivers renew their counters a few times a second."""


@torch.inference_mode()
def energy_pass(job: Job) -> dict[str, Any]:
    """Joules of the workload, by the driver's counter, and of the idle device just before."""
    use_device(job.device)
    meter = EnergyMeter(job.device)
    if meter.problem is not None:
        return {"energy": {"problem": meter.problem}}
    loaded = load(job)
    work = batches(job, loaded)
    meter = EnergyMeter(job.device, devices_of(loaded.model, job.device))

    def once() -> None:
        for batch in work:
            answer(loaded.model, job.method.new_cache(loaded.model), batch, job)
            gc.collect()

    once()
    idle = meter.over(lambda: time.sleep(ENERGY_SECONDS))
    times = 0

    def long_enough() -> None:
        nonlocal times
        start = now(job.device)
        while not times or now(job.device) - start < ENERGY_SECONDS:
            once()
            times += 1

    used = meter.over(long_enough)
    output = sum(b.output_tokens for b in work)
    return {
        "energy": {
            "problem": None,
            "what": meter.what,
            "joules": used.joules / times,
            "joules_per_output_token": used.joules / times / output,
            "watts": used.joules / used.seconds,
            "watts_idle": idle.joules / idle.seconds,
            "repetitions": times,
        }
    }
