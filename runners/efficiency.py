"""Speed and memory of a method on a workload, beside the full cache on the same one.

Definitions (vLLM's and MLPerf's, so that numbers can be compared):

* TTFT: a batch is handed over -> its first token is out; prefill and compression are in it.
* TPOT: (latency - TTFT) / (output tokens - 1).
* decode throughput: output tokens without the first / decode time. Output throughput: output tokens / latency. Total
  throughput: (prompt + output tokens) / latency. Pads and tokens beyond a request's own length do not count.
* MBU: the time a decode step takes at least, which is (weights + KV) / copy bandwidth, over the time it took.

Time and memory are measured in separate passes, each in a process of its own: the first starts with nothing cached from
another method, and the second can set the allocator so that what is freed is seen to be freed.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any

import torch
from transformers import PreTrainedModel

from ..conf.errors import InputError, require
from ..methods.base import Method, full_shape, kv_shape
from ..models.base import LoadedModel, ModelSource
from ..tasks.workload import Request, Workload
from . import provenance
from .engine import decode, left_padded, prefill
from .fresh import Killed, in_fresh_process
from .measure import HONEST_MALLOC, MemoryMeter, copy_bandwidth, is_out_of_memory, now, one_at_a_time
from .runs import BASELINE, MethodRun, PairedRunner, finished_baseline, in_turns, open_run, record_head
from .settings import Settings

QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # two loads per method; a bar for each would bury what is said


@dataclass(frozen=True)
class Job:
    """What a measuring process is given.

    Attributes:
        source, method, workload: what is measured.
        device, dtype: where, as resolved.
        seed, batch_size: of the workload's requests.
        chunk_size, warmups, repeats: the runner's settings.
    """

    source: ModelSource
    method: Method
    workload: Workload
    device: str
    dtype: torch.dtype
    seed: int
    batch_size: int
    chunk_size: int | None
    warmups: int
    repeats: int


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


@dataclass
class EfficiencyRunner(PairedRunner):
    """``runner=efficiency``; every method and budget is measured by itself, one after another.

    Attributes:
        warmups: repetitions that are dropped.
        repeats: repetitions that are recorded, all of them.
    """

    warmups: int = 1
    repeats: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        at = "runner."
        for key, least in (("warmups", 0), ("repeats", 1)):
            value = getattr(self, key)
            require(isinstance(value, int) and value >= least, at + key, value, f"must be a whole number >= {least}")

    def run(
        self,
        source: ModelSource,
        methods: Sequence[Method],
        task: Workload,
        settings: Settings,
        say: Callable[[str], None],
    ) -> list[MethodRun]:
        """Measure every method and write one record each.

        Args:
            source: where the model comes from; random weights will do.
            methods: the methods asked for first, then those they are paired with.
            task: the requests.
            settings: the top-level configuration.
            say: prints a line for the person at the keyboard.

        Returns:
            The runs, in the order of ``methods``, all with a record (``done`` or ``oom``).
        """
        if not isinstance(task, Workload):
            name = getattr(task, "name", "longbench")
            raise InputError("task", name, "is scored, not timed: use task=shape or task=sharegpt, or runner=accuracy")
        data = task.source()
        say(f"workload: {data.name}")
        made_by = provenance.collect(settings.torch_device)
        hardware = made_by["hardware"]
        further = {
            "batch_size": settings.batch_size,
            "hardware": {k: hardware.get(k) for k in ("cpu", "gpu", "torch_threads")},
            "runner": {"warmups": self.warmups, "repeats": self.repeats, "chunk_size": self.chunk_size},
            # A time is that of some code: after a change the baseline is measured again with the rest.
            "code": made_by["git"]["sha"],
            "torch": made_by["packages"].get("torch"),
        }
        runs = [
            MethodRun(m, open_run("efficiency", m, s, data, task.identity(), settings, **further), s)
            for m, s in ((m, source.for_sharing(m.sharing, m.name)) for m in methods)
        ]

        def work(mine: list[MethodRun]) -> None:
            for run in mine:
                if run.folder.done:
                    say(f"{run.method.label}: already done, in {run.folder.path}")
                    continue
                with one_at_a_time(settings.torch_device, say):
                    say(f"{run.method.label}: {self.warmups} + {self.repeats} timed repetitions, then memory")
                    load = os.getloadavg()[0]
                    status, results = self._measure(run.method, run.source, task, settings)
                head = record_head(status, run.folder, run.method, data, settings)
                run.folder.finish({**head, "provenance": made_by, "load_average_before": load, **results})

        in_turns(runs, work, say)
        _pair(runs)
        return runs

    def _measure(
        self, method: Method, source: ModelSource, task: Workload, settings: Settings
    ) -> tuple[str, dict[str, Any]]:
        """(status, fields of the record)."""
        job = Job(
            source,
            method,
            task,
            settings.torch_device,
            settings.torch_dtype,
            settings.seed,
            settings.batch_size,
            self.chunk_size,
            self.warmups,
            self.repeats,
        )
        try:
            times = in_fresh_process(time_pass, job, QUIET)
            memory = in_fresh_process(memory_pass, job, QUIET | (HONEST_MALLOC if job.device == "cpu" else {}))
        except Exception as error:
            if not (isinstance(error, Killed) or is_out_of_memory(error)):
                raise
            problem = str(error).splitlines()[0]
            print(f"{method.label}: out of memory: {problem}", file=sys.stderr)
            return "oom", {"problem": problem}
        return "done", {**times, **memory, **_against_the_limit(times)}


# the measuring processes --------------------------------------------------------------------------------------------


def batches(job: Job, loaded: LoadedModel) -> list[Batch]:
    """The workload's requests in their order, ``batch_size`` at a time."""
    vocabulary = loaded.model.config.get_text_config().vocab_size
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
        ids, mask = left_padded([r.prompt for r in rows], pad, loaded.model.device)
        out.append(Batch(rows, ids, mask))
    return out


def time_pass(job: Job) -> dict[str, Any]:
    """Every repetition's times, and the yardstick measured between the same walls."""
    loaded = job.source.load(job.device, job.dtype)
    work = batches(job, loaded)
    bandwidth = copy_bandwidth(job.device)
    repetitions = []
    for i in range(job.warmups + job.repeats):
        timed = [time_batch(loaded.model, job.method, batch, job.device, job.chunk_size) for batch in work]
        if i >= job.warmups:
            repetitions.append(timed)
    return {
        "metrics": metrics(work, repetitions),
        "repetitions": [[{"ttft_s": a, "decode_s": b} for a, b in timed] for timed in repetitions],
        "decode": "eager",
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
            "copy_bytes_per_s": bandwidth,
            "problem": None if bandwidth is not None else "no memory for the copy that measures it",
        },
    }


@torch.inference_mode()
def time_batch(
    model: PreTrainedModel, method: Method, batch: Batch, device: str, chunk_size: int | None
) -> tuple[float, float]:
    """(TTFT, time of all further tokens) of one batch, seconds."""
    gc.collect()  # the last batch's cache is gone before this one's clock starts
    cache = method.new_cache(model)
    start = now(device)
    token = prefill(model, cache, batch.input_ids, batch.mask, chunk_size).argmax(-1)
    first = now(device)
    for _ in range(batch.steps - 1):
        token = decode(model, cache, token).argmax(-1)
    return first - start, now(device) - first


def metrics(work: Sequence[Batch], repetitions: Sequence[Sequence[tuple[float, float]]]) -> dict[str, dict[str, Any]]:
    """Each metric's median, least, greatest and single values over the repetitions.

    Args:
        work: the batches.
        repetitions: (TTFT, decode) in seconds of each batch, repetition by repetition.
    """
    prompt, output = sum(b.prompt_tokens for b in work), sum(b.output_tokens for b in work)
    later = sum(b.output_tokens - len(b.requests) for b in work)  # output tokens that are not a request's first
    steps = sum(b.steps - 1 for b in work)

    def of_one(timed: Sequence[tuple[float, float]]) -> Iterator[tuple[str, float]]:
        ttft, decoding = sum(t for t, _ in timed), sum(d for _, d in timed)
        yield "ttft_ms", 1e3 * fmean(t for (t, _), b in zip(timed, work, strict=True) for _ in b.requests)
        yield "tpot_ms", 1e3 * decoding / steps
        yield "prefill_tokens_per_s", prompt / ttft
        yield "decode_tokens_per_s", later / decoding
        yield "output_tokens_per_s", output / (ttft + decoding)
        yield "total_tokens_per_s", (prompt + output) / (ttft + decoding)

    rows = [dict(of_one(timed)) for timed in repetitions]
    return {key: _spread([row[key] for row in rows]) for key in rows[0]}


def bytes_read_per_step(work: Sequence[Batch], model: PreTrainedModel, method: Method) -> float:
    """Bytes that a decode step must read at least, on average over all steps: the weights, and the batch's caches.

    The caches by the formula (what layers share is read by each of them), halfway between a batch's first step and its
    last. A step looks up single rows of the embedding; only where it is the output layer too is the table read whole.
    """
    table: Any = model.get_input_embeddings()
    tied = table.weight is model.get_output_embeddings().weight
    weights = sum(p.nbytes for p in model.parameters()) - (0 if tied else table.weight.nbytes)
    total = 0.0
    for batch in work:
        lengths = [len(r.prompt) for r in batch.requests]
        first = sum(method.bytes_read_formula(model.config, model.dtype, n) for n in lengths)
        last = sum(method.bytes_read_formula(model.config, model.dtype, n, batch.steps - 1) for n in lengths)
        total += (batch.steps - 1) * (weights + (first + last) / 2)
    return total / sum(batch.steps - 1 for batch in work)


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return {"median": median(values), "min": min(values), "max": max(values), "repetitions": list(values)}


@torch.inference_mode()
def memory_pass(job: Job) -> dict[str, Any]:
    """Bytes of the cache and peaks of memory, of the batch that holds most tokens."""
    loaded = job.source.load(job.device, job.dtype)
    model = loaded.model
    batch = max(batches(job, loaded), key=lambda b: b.input_ids.numel() + b.steps * len(b.requests))
    meter = MemoryMeter(job.device)
    # A few tokens first: libraries take their workspaces with the first call of each kind, and keep them.
    warm = job.method.new_cache(model)
    token = prefill(model, warm, batch.input_ids[:, -4:]).argmax(-1)
    decode(model, warm, token)
    del warm

    meter.reset()
    at_rest = meter.peak()
    cache = job.method.new_cache(model)
    token = prefill(model, cache, batch.input_ids, batch.mask, job.chunk_size).argmax(-1)
    peak_prefill = meter.peak()
    stored, logical = cache.kv_bytes_stored, cache.kv_bytes_logical
    meter.reset()
    for _ in range(batch.steps - 1):
        token = decode(model, cache, token).argmax(-1)
    peak_decode = meter.peak()

    shape, full = kv_shape(model.config, job.dtype), full_shape(model.config, job.dtype, job.method.sharing)
    return {
        "bytes": {
            "kv_bytes_stored": stored,
            "kv_bytes_stored_end": cache.kv_bytes_stored,
            "kv_bytes_logical": logical,
            "kv_bytes_logical_end": cache.kv_bytes_logical,
            "kv_bytes_formula": sum(job.method.bytes_formula(shape, len(r.prompt)) for r in batch.requests),
            "kv_bytes_full": sum(BASELINE.bytes_formula(full, len(r.prompt)) for r in batch.requests),
            "weight_bytes": sum(p.nbytes for p in model.parameters()),
            "requests": len(batch.requests),
        },
        "memory": {
            "what": "allocator" if job.device.startswith("cuda") else "resident set",
            "problem": meter.problem,
            **{
                key: None if peak is None else asdict(peak)
                for key, peak in (("at_rest", at_rest), ("peak_prefill", peak_prefill), ("peak_decode", peak_decode))
            },
        },
    }


# what the numbers mean ----------------------------------------------------------------------------------------------


def _against_the_limit(times: dict[str, Any]) -> dict[str, Any]:
    """How near a decode step came to the time that reading the weights and the cache once takes."""
    read = times["bytes_read_per_step"]
    bandwidth = times["bandwidth"]["copy_bytes_per_s"]
    floor_ms = None if bandwidth is None else 1e3 * read / bandwidth
    tpots = times["metrics"]["tpot_ms"]["repetitions"]
    return {
        "limit": {
            "bytes_read_per_step": read,
            "tpot_ms_floor": floor_ms,
            "mbu": None if floor_ms is None else _spread([floor_ms / t for t in tpots]),
        }
    }


def _pair(runs: Sequence[MethodRun]) -> None:
    """Add to every record what its method gains over the full cache: by its bytes, and as measured."""
    baseline = finished_baseline(runs)
    if baseline is None:
        return
    full = baseline.folder.record()
    for run in runs:
        if run is baseline or not run.folder.done or "paired" in (record := run.folder.record()):
            continue
        paired = {
            "with": baseline.method.label,
            "hash": baseline.folder.hash,
            "decode_speed_up_by_bytes": full["limit"]["bytes_read_per_step"] / record["limit"]["bytes_read_per_step"],
            "decode_speed_up": full["metrics"]["tpot_ms"]["median"] / record["metrics"]["tpot_ms"]["median"],
            "prefill_slow_down": record["metrics"]["ttft_ms"]["median"] / full["metrics"]["ttft_ms"]["median"],
            "kv_bytes_saved_end": full["bytes"]["kv_bytes_stored_end"] - record["bytes"]["kv_bytes_stored_end"],
            "peak_decode_bytes_saved": _peak_saved(full, record, "peak_decode"),
            "peak_prefill_bytes_saved": _peak_saved(full, record, "peak_prefill"),
        }
        with run.folder:
            run.folder.amend("paired", paired)


def _peak_saved(full: dict[str, Any], record: dict[str, Any], phase: str) -> int | None:
    """Bytes; None where a machine cannot measure the peak."""
    if full["memory"][phase] is None or record["memory"][phase] is None:
        return None
    return full["memory"][phase]["allocated"] - record["memory"][phase]["allocated"]
