"""Correctness and speed of every method on one CUDA device, written down as they come; see gpu_check.sh.

    python scripts/gpu_check.py smoke [KEY=VALUE...]
    python scripts/gpu_check.py correct|sdpa|kernels|profile [--seconds 120] [--match minicache]
    python scripts/gpu_check.py table speed.json...     a Markdown table of such files; later rows replace earlier ones

``correct``: errors of logits against the CPU for each method, eager and captured, as
tests/integration/test_cuda.py runs them.
``sdpa``: host and device time of attention by cuDNN and without it, at shapes that are new and at the same ones again.
``kernels``: attention of one decode step over one layer of each storage, and its share of the bandwidth of a copy.
``profile``: which kernels take the time of a prefill and of a decode step, on random weights of a 7B shape.
``smoke``: ``experiment=gpu_smoke``, every method on random weights of a 7B shape, with records in ``$RESULTS``.

The first four write ``$OUT/<part>.json`` (``gpu_check/`` by default) after every row, and begin no row after
``--seconds``; the last repeats nothing that has a record.
``DEV=cpu`` rehearses it at toy size on any machine. Exit status: 0 done, 1 a row failed or there was no time for it.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

DEVICE = os.environ.get("DEV", "cuda")
IS_CUDA = DEVICE.startswith("cuda")
OUT = Path(os.environ.get("OUT") or "gpu_check")
PROMPT_TOKENS = 4096 if IS_CUDA else 200

Row = dict[str, Any]
Task = tuple[Row, Callable[[], Row]]
"""What a row is about, and what measures it."""


def synchronize() -> None:
    """Wait for the CUDA device, if there is one."""
    if IS_CUDA:
        torch.cuda.synchronize()


def correct() -> Iterator[Task]:
    """Errors as shares of the largest logit; float32 and bfloat16, eager and captured."""
    os.environ["KVBENCH_CUDA_TEST_DEVICE"] = DEVICE
    sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("tests", "tests/integration")]
    import test_cuda as tests

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    def compare(text: str) -> Row:
        expected, row = tests.on_the_cpu(text), {}
        for dtype in (torch.float32, torch.bfloat16):
            for capture in (False, True):
                found = tests.run(text, "device", dtype, capture)
                if capture and not found.captured:
                    continue
                close = 1e-3 if dtype == torch.float32 else 0.05
                row[f"{str(dtype).removeprefix('torch.')} {'captured' if capture else 'eager'}"] = {
                    "error": float((found.logits - expected.logits).abs().max() / expected.logits.abs().max()),
                    "relative_norm": float((found.logits - expected.logits).norm() / expected.logits.norm()),
                    "same_tokens": tests.same_tokens(found.prompt_keys, expected.prompt_keys, close),
                    "top_equal": float((found.logits.argmax(-1) == expected.logits.argmax(-1)).float().mean()),
                }
        return row

    for text in tests.METHODS:
        if not text.startswith("hf_quantized"):  # another library compiles its kernels when they are first used
            yield {"method": text}, functools.partial(compare, text)


def sdpa() -> Iterator[Task]:
    """Milliseconds until a call returns to the host, and until it is done; the first call at a shape and later ones."""
    from kvbench.methods.cache.sdpa import sdpa_without_cudnn

    dtype = torch.bfloat16 if IS_CUDA else torch.float32
    heads, dim = (32, 128) if IS_CUDA else (2, 16)

    def measure(call: Callable[..., torch.Tensor], queries: int, length: int) -> Row:
        calls = []
        for _ in range(4):  # other tensors of the same shape, as the next layer has them
            query = torch.randn(1, heads, queries, dim, device=DEVICE, dtype=dtype)
            key, value = (torch.randn(1, heads, length, dim, device=DEVICE, dtype=dtype) for _ in range(2))
            synchronize()
            start = time.perf_counter()
            call(query, key, value, is_causal=queries == length)
            returned = time.perf_counter()
            synchronize()
            calls.append({"host_ms": 1e3 * (returned - start), "done_ms": 1e3 * (time.perf_counter() - start)})
        return {"calls": calls}

    for kind, lengths in (
        ("prefill", (PROMPT_TOKENS // 2, PROMPT_TOKENS // 2 + 40, PROMPT_TOKENS)),
        ("one token", (PROMPT_TOKENS, PROMPT_TOKENS + 1, PROMPT_TOKENS + 2)),
    ):
        for name, call in (("any", F.scaled_dot_product_attention), ("without cuDNN", sdpa_without_cudnn)):
            for length in lengths:
                about = {"kind": kind, "kernels": name, "keys": length}
                yield about, functools.partial(measure, call, length if kind == "prefill" else 1, length)


@torch.inference_mode()
def kernels() -> Iterator[Task]:
    """Microseconds of the attention of one token in a layer of 32 heads, of what it reads; replayed on CUDA."""
    from kvbench.methods.cache.logits import LogitRule
    from kvbench.runners.config.methods import named_method
    from kvbench.runners.measure.bandwidth import copy_bandwidth
    from kvbench.runners.measure.clock import Stopwatch

    dtype = torch.bfloat16 if IS_CUDA else torch.float32
    heads, dim, tokens = (32, 128, 4 * PROMPT_TOKENS) if IS_CUDA else (2, 64, PROMPT_TOKENS)
    bandwidth = copy_bandwidth(DEVICE)

    @torch.inference_mode()
    def measure(storage: str) -> Row:
        layer = named_method(f"full storage={storage}").storage.new_layers(1)[0]
        layer.write(*(torch.randn(1, heads, tokens, dim, device=DEVICE, dtype=dtype) for _ in range(2)))
        layer.make_static(2)
        layer.append(*(torch.randn(1, heads, 1, dim, device=DEVICE, dtype=dtype) for _ in range(2)))
        query, rule = torch.randn(1, heads, 1, dim, device=DEVICE, dtype=dtype), LogitRule(dim**-0.5)
        work = functools.partial(layer.attend, query, rule, None)
        for _ in range(3):
            work()
        if IS_CUDA:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                work()
            work = graph.replay
        watch = Stopwatch(DEVICE)
        watch.mark()
        for _ in range(50 if IS_CUDA else 2):
            work()
            watch.mark()
        seconds = statistics.median(watch.seconds())
        moved = layer.logical_bytes
        share = None if bandwidth is None else round(moved / seconds / bandwidth, 3)
        return {"us": round(1e6 * seconds, 1), "bytes": moved, "share_of_copy": share}

    for storage in ("dense", "ragged", "kivi2", "kivi4", "kivi8", "fp8", "turboquant"):
        yield {"method": storage, "tokens": tokens}, functools.partial(measure, storage)


@torch.inference_mode()
def profile() -> Iterator[Task]:
    """Milliseconds of the prefill, of a decode step, and of each kernel in them; the first prefill is not counted."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiling

    from kvbench.models.random import RandomModel
    from kvbench.runners.config.methods import named_method
    from kvbench.runners.engine import decode_step, prefill
    from kvbench.runners.measure.job import Job
    from kvbench.runners.measure.session import Session

    tokens, steps = 4 * PROMPT_TOKENS, 8
    source = RandomModel("llama2-7b" if IS_CUDA else "tiny", max_positions=tokens + 64)
    dtype = torch.bfloat16 if IS_CUDA else torch.float32
    activity = ProfilerActivity.CUDA if IS_CUDA else ProfilerActivity.CPU
    session = Session()

    @torch.inference_mode()
    def kernels_of(work: Callable[[], Any], times: int) -> Row:
        with profiling(activities=[activity]) as profiler:
            synchronize()
            start = time.perf_counter()
            for _ in range(times):
                work()
            synchronize()
            seconds = (time.perf_counter() - start) / times
        spent: dict[str, float] = {}
        for event in profiler.key_averages():
            own = event.self_device_time_total if IS_CUDA else event.self_cpu_time_total
            if own:
                spent[event.key[:100]] = spent.get(event.key[:100], 0.0) + own / times / 1e3
        slowest = sorted(spent.items(), key=lambda item: -item[1])[:20]
        kernels = {name: round(ms, 4) for name, ms in slowest}
        return {"ms": round(1e3 * seconds, 3), "kernels_ms": round(sum(spent.values()), 3), "kernels": kernels}

    @torch.inference_mode()
    def measure(text: str) -> Row:
        method = named_method(text)
        model = session.load(Job(source, method, None, DEVICE, dtype, 0, 1, None, 0, 1)).model
        ids = torch.randint(1, model.config.vocab_size, (1, tokens), device=DEVICE)
        prefill(model, method.new_cache(model), ids)
        cache = method.new_cache(model)
        cache.reserve(2 * steps)
        row = {"prefill": kernels_of(lambda: prefill(model, cache, ids), 1)}
        token = torch.ones(1, dtype=torch.int64, device=DEVICE)
        step = decode_step(model, cache, token, 2 * steps)
        step(token)
        return row | {"step": kernels_of(lambda: step(token), steps), "decode": step.recorded_mode}

    budget = PROMPT_TOKENS // 2
    evicting = ("snapkv", "h2o", "ada_kv", "tova", "streaming_llm", "snapkv_kivi4", "quest")
    texts = ["full", "kivi storage=kivi4", "kivi storage=kivi2", "minicache", "minicache_kivi4"]
    texts += [f"{name} budget={budget}" for name in evicting]
    texts += [f"streaming_llm budget={budget} policy.mode=prefill_evict", "fp8", "turboquant", "kvquant"]
    for text in texts:
        yield {"method": text, "tokens": tokens}, functools.partial(measure, text)


def smoke(overrides: list[str]) -> int:
    """``experiment=gpu_smoke``, and the table of its records, also if it is cut off.

    Not by the command, which asks for packages that only other tasks and models use.
    """
    from kvbench.analysis.tables import main as table
    from kvbench.runners.cli import run
    from kvbench.runners.config.loader import compose

    results = os.environ.get("RESULTS") or str(OUT / "results")
    toy = [] if IS_CUDA else ["model.shape=tiny", "workload.prompt_tokens=1000", "workload.new_tokens=4"]
    toy += [] if IS_CUDA else ["dtype=float32", "runner.budgets=[100]", "runner.warmups=0", "runner.repeats=1"]
    given = ["experiment=gpu_smoke", f"device={DEVICE}", f"results_dir={results}", *toy, *overrides]
    try:
        run(compose(given))
    finally:
        table([results])
    return 0


PARTS = {"correct": correct, "sdpa": sdpa, "kernels": kernels, "profile": profile}


def print_table(paths: list[str]) -> None:
    """TTFT, TPOT and MBU by method, and TPOT over the full cache's."""
    rows: dict[str, Row] = {}
    for path in paths:
        header, *measured = json.loads(Path(path).read_text())
        rows |= {row["method"]: row | {"commit": header.get("commit", "")} for row in measured}
    full = rows["full"]["tpot_ms"]
    print("| method | TTFT ms | TPOT ms | / full | MBU | step | commit |\n|---|---:|---:|---:|---:|---|---|")
    for name, row in rows.items():
        numbers = (row["ttft_ms"], row["tpot_ms"], row["tpot_ms"] / full, row["mbu"])
        ttft, tpot, ratio, mbu = (f"{n:.{digits}f}" for n, digits in zip(numbers, (0, 1, 2, 2), strict=True))
        print(f"| `{name}` | {ttft} | {tpot} | {ratio} | {mbu} | {row['decode']} | {row['commit']} |")


def main() -> int:
    """Run one part or print the table, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=[*PARTS, "smoke", "table"])
    parser.add_argument("words", nargs="*", help="files of the table, or overrides of the smoke run")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--match", default="", help="only rows whose method contains this text")
    args = parser.parse_args()
    if args.part == "table":
        print_table(args.words)
        return 0
    if args.part == "smoke":
        return smoke(args.words)
    OUT.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    name = torch.cuda.get_device_name() if IS_CUDA else "cpu"
    rows: list[Row] = [{"device": name, "torch": torch.__version__}]
    for about, measure in PARTS[args.part]():
        row = dict(about)
        if args.match not in row.get("method", ""):
            continue
        try:
            row |= measure() if time.perf_counter() - start < args.seconds else {"problem": "no time left"}
        except Exception as error:  # the other rows are still wanted
            row["problem"] = f"{type(error).__name__}: {str(error)[:300]}"
        gc.collect()
        row["at_s"] = round(time.perf_counter() - start, 1)
        rows.append(row)
        (OUT / f"{args.part}.json").write_text(json.dumps(rows, indent=1) + "\n")
        print(json.dumps(row), flush=True)
    return int(any("problem" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
