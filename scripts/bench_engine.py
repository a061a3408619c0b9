"""How fast the engine is, as ratios from one run (absolute times on a shared machine say little).

A language model answers in two phases. *Prefill* reads the prompt in one pass and is limited by arithmetic. *Decode*
produces one token at a time; each step reads all weights and the whole KV cache once, so it is limited by memory
bandwidth. A KV-cache method costs something in prefill (deciding what to keep) and gains in decode (less to read).

Ratios, each from alternating repetitions in this process, medians of all repetitions:

1. decode      tokens/s of method=full in our engine / tokens/s of transformers' generate with its own cache
               (aim >= 1.0 for one sequence, >= 1.2 for eight)
2. compression time SnapKV spends choosing and copying / time of the prefill it is part of             (aim <= 0.04)
3. fan-out     wall time of one run of 8 budgets on a shared prompt / one run of full                   (aim <= 2.5)
4. bandwidth   bytes a decode step must read (weights + KV) per second / the bandwidth of reading      (aim >= 0.5)
               a matrix once, measured in turn with the steps; beside it the same / that of a copy.
               On a CPU also of compiled steps (runner.compile), and how much faster they are
5. gain        a step of SnapKV 512 / a step of full, four sequences of twice the prompt, over the     (aim <= 1.25)
               same ratio of the bytes that each must read

    python scripts/bench_engine.py [--prompt-tokens 4096] [--new-tokens 64] [--repeats 5] [--dtype float32] [-o FILE]

The last line of the output is the result as JSON; it also goes to FILE.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LogitsProcessorList

from kvbench.methods.cache.cache import KVCache
from kvbench.methods.cache.compression import marked_by
from kvbench.methods.cache.fan_out import FanOutCache
from kvbench.methods.cache.method import Method
from kvbench.methods.policies.eviction import EvictionPolicy
from kvbench.methods.policies.scorers.snapkv import SnapKV
from kvbench.models.embedded import Embedded
from kvbench.runners.engine import decode_step, generate, prefill
from kvbench.runners.engine.compiled import CompiledDecoder, compile_decoder
from kvbench.runners.engine.weights import prepack_linear_weights
from kvbench.runners.measure.bandwidth import copy_bandwidth, read_bandwidth
from kvbench.runners.measure.clock import Stopwatch, now
from kvbench.runners.measure.time_pass import weight_bytes_read
from kvbench.runners.records import provenance

BUDGETS = (64, 128, 192, 256, 384, 512, 768, 1024)


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def finish(result: Mapping[str, Any], output: Path | None) -> None:
    """Print a script's result as the last line, and write it where the user wants it."""
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call, all that it queued included."""
    start = now(DEVICE)
    work()
    return now(DEVICE) - start


def alternating(repeats: int, *works: Callable[[], float]) -> list[list[float]]:
    """Run the works in turn, so that a slow minute of the machine falls on all of them; the first round is warm-up."""
    times: list[list[float]] = [[] for _ in works]
    for i in range(repeats + 1):
        for mine, work in zip(times, works, strict=True):
            value = work()
            if i:
                mine.append(value)
    return times


def decode_seconds(
    model, cache: KVCache, ids: torch.Tensor, steps: int, compiled: CompiledDecoder | None = None
) -> float:
    """Seconds per decode step after a prefill, run as the runners run it."""
    token = prefill(model, cache, ids).argmax(-1)
    step = decode_step(model, cache, token, steps, compiled=compiled)

    def steps_of() -> None:
        nonlocal token
        for _ in range(steps):
            token = step(token).argmax(-1)

    taken = seconds(steps_of) / steps
    step.finish()
    return taken


def random_ids(batch: int, length: int) -> torch.Tensor:
    """Token ids of no meaning, [batch, length]."""
    return torch.randint(1000, 40000, (batch, length), generator=torch.Generator().manual_seed(0)).to(DEVICE)


def step_bytes(model, method: Method, ids: torch.Tensor, steps: int) -> float:
    """Bytes that a decode step must read, on average over the steps: the weights once, and every row's cache."""
    read = method.read_formula(model)
    first, last = (read(ids.shape[1], n) for n in (0, steps))
    return weight_bytes_read(model) + ids.shape[0] * (first + last) / 2


def transformers_decode_seconds(model, ids: torch.Tensor, steps: int) -> float:
    """Seconds per decode step of ``generate``, between the logits of its first token and those of its last."""
    marks: list[float] = []

    def look(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        marks.append(now(DEVICE))
        return logits

    how = {"do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}
    model.generate(ids, max_new_tokens=1 + steps, logits_processor=LogitsProcessorList([look]), **how)
    return (marks[-1] - marks[0]) / (len(marks) - 1)


def prefill_seconds(model, cache: KVCache, ids: torch.Tensor) -> tuple[float, float]:
    """(seconds of the whole prefill into a fresh cache, seconds of it spent in compressing)."""
    compressions = Stopwatch(DEVICE)
    with marked_by(compressions.mark):
        total = seconds(lambda: prefill(model, cache, ids))
    return total, compressions.seconds_between_pairs() or 0.0


def main() -> None:
    """Measure, and print or write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt-tokens", type=int, default=4096)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()

    dtype = getattr(torch, args.dtype)
    ours = Embedded().load(DEVICE, dtype).model
    theirs = AutoModelForCausalLM.from_config(ours.config, attn_implementation="sdpa", dtype=dtype).to(DEVICE).eval()
    theirs.load_state_dict(ours.state_dict())
    compiled = compile_decoder(copy.deepcopy(ours)) if DEVICE == "cpu" else None
    prepack_linear_weights(ours)
    ids = random_ids(1, args.prompt_tokens)
    full, snapkv = Method("full"), Method("snapkv", EvictionPolicy(SnapKV(), 512))
    members = [Method("snapkv", EvictionPolicy(SnapKV(), b)) for b in BUDGETS]
    steps = args.new_tokens

    def run_full() -> float:
        return seconds(lambda: generate(ours, full.new_cache(ours), ids, max_new_tokens=steps))

    def run_fan_out() -> float:
        cache = FanOutCache([m.new_cache(ours) for m in members])
        return seconds(lambda: generate(ours, cache, ids, max_new_tokens=steps))

    print(f"{DEVICE}, {args.dtype}, {torch.get_num_threads()} threads, {args.prompt_tokens} + {steps} tokens")

    def compiled_seconds(ids: torch.Tensor) -> float:
        if compiled is None:
            return math.nan
        return decode_seconds(compiled.model, full.new_cache(compiled.model), ids, steps, compiled)

    engine, readings, copies, by_compiler, library = alternating(
        args.repeats,
        lambda: decode_seconds(ours, full.new_cache(ours), ids, steps),
        lambda: read_bandwidth(DEVICE),
        lambda: copy_bandwidth(DEVICE),
        lambda: compiled_seconds(ids),
        lambda: transformers_decode_seconds(theirs, ids, steps),
    )
    print(f"decode: {1e3 * median(engine):.1f} ms, transformers {1e3 * median(library):.1f} ms per token", flush=True)
    short = random_ids(1, args.prompt_tokens // 8)
    engine_short, readings_short, by_compiler_short = alternating(
        args.repeats,
        lambda: decode_seconds(ours, full.new_cache(ours), short, steps),
        lambda: read_bandwidth(DEVICE),
        lambda: compiled_seconds(short),
    )
    print(f"an eighth of the prompt: {1e3 * median(engine_short):.1f} ms per token", flush=True)
    if compiled is not None:
        print(f"compiled: {1e3 * median(by_compiler):.1f} ms, {1e3 * median(by_compiler_short):.1f} ms", flush=True)
    rows = random_ids(8, args.prompt_tokens // 8)
    engine_8, library_8 = alternating(
        args.repeats,
        lambda: decode_seconds(ours, full.new_cache(ours), rows, steps),
        lambda: transformers_decode_seconds(theirs, rows, steps),
    )
    print(f"batch 8: {1e3 * median(engine_8):.1f} ms, transformers {1e3 * median(library_8):.1f} ms", flush=True)
    long = random_ids(4, 2 * args.prompt_tokens)
    full_4, snapkv_4 = alternating(
        min(args.repeats, 3),
        lambda: decode_seconds(ours, full.new_cache(ours), long, steps),
        lambda: decode_seconds(ours, snapkv.new_cache(ours), long, steps),
    )
    predicted = step_bytes(ours, snapkv, long, steps) / step_bytes(ours, full, long, steps)
    gain = median(snapkv_4) / median(full_4)
    print(f"SnapKV 512 / full, batch 4: {gain:.3f}, by bytes {predicted:.3f}", flush=True)
    prefills = [prefill_seconds(ours, snapkv.new_cache(ours), ids) for _ in range(args.repeats + 1)][1:]
    shares = [spent / (total - spent) for total, spent in prefills]
    print(f"prefill: {median(t for t, _ in prefills):.2f} s, of it compressing {median(s for _, s in prefills):.3f} s")
    one, eight = alternating(args.repeats, run_full, run_fan_out)
    print(f"run: full {median(one):.2f} s, 8 budgets on one prompt {median(eight):.2f} s", flush=True)

    read, read_short = (step_bytes(ours, full, some, steps) for some in (ids, short))
    bandwidth, reading, reading_short = (median(some) for some in (copies, readings, readings_short))
    result = {
        "decode_speed_full_over_transformers": median(library) / median(engine),
        "decode_speed_full_over_transformers_batch_8": median(library_8) / median(engine_8),
        "compression_over_prefill": median(shares),
        "fan_out_8_budgets_over_full": median(eight) / median(one),
        "decode_bandwidth_over_read_bandwidth": read / median(engine) / reading,
        "decode_bandwidth_over_read_bandwidth_short": read_short / median(engine_short) / reading_short,
        "decode_bandwidth_over_copy_bandwidth": read / median(engine) / bandwidth,
        "snapkv_512_step_over_full_over_bytes": gain / predicted,
        "snapkv_512_step_over_full": gain,
        "snapkv_512_bytes_over_full": predicted,
        "decode_speed_compiled_over_full": median(engine) / median(by_compiler),
        "decode_speed_compiled_over_full_short": median(engine_short) / median(by_compiler_short),
        "decode_bandwidth_over_read_bandwidth_compiled": read / median(by_compiler) / reading,
        "decode_bandwidth_over_read_bandwidth_compiled_short": read_short / median(by_compiler_short) / reading_short,
        "copy_bandwidth_gb_per_s": bandwidth / 1e9,
        "read_bandwidth_gb_per_s": reading / 1e9,
        "repetitions": {
            "decode_step_engine": engine,
            "decode_step_compiled": by_compiler,
            "decode_step_transformers": library,
            "read_bandwidth_gb_per_s": [r / 1e9 for r in readings],
            "copy_bandwidth_gb_per_s": [c / 1e9 for c in copies],
            "decode_step_engine_short": engine_short,
            "decode_step_compiled_short": by_compiler_short,
            "read_bandwidth_short_gb_per_s": [r / 1e9 for r in readings_short],
            "decode_step_engine_batch_8": engine_8,
            "decode_step_transformers_batch_8": library_8,
            "decode_step_full_batch_4": full_4,
            "decode_step_snapkv_512_batch_4": snapkv_4,
            "prefill_and_compression": prefills,
            "run_full": one,
            "run_fan_out": eight,
        },
        "settings": {"prompt_tokens": args.prompt_tokens, "new_tokens": steps, "dtype": args.dtype, "device": DEVICE},
        "provenance": provenance.collect(DEVICE),
    }
    if compiled is None:
        result = {key: value for key, value in result.items() if "compiled" not in key}
    for key in [key for key, value in result.items() if isinstance(value, float)]:
        print(f"{key:<52} {result[key]:.3f}")
    finish(result, args.output)


if __name__ == "__main__":
    main()
