"""What each method costs in prefill and gains in decode, as ratios from one run, and its bytes against the formula.

For every method in ``conf/method`` that holds a cache, at its default settings but for the budget (where it has one;
``pyramid_infer`` has none by default and holds about three quarters of the prompt):

1. compression: time spent choosing and copying / time of the rest of the prefill, at each prompt length
2. prefill:     time of the whole prefill / that of the full cache: 1 + compression, but for a method that does not read
                the whole prompt in every layer, where the two are timed in turn
3. decode:      mean time of 64 steps after the longest prompt / that of the full cache; the two alternate. What happens
                less often than that is not in it: hf_quantized's rounding of everything, every 128 steps, and what
                pyramid_infer drops of generated tokens
4. bytes:       stored after the longest prompt and 64 further tokens, in a batch of 1 and of 4, against the formula.
                What is stored beyond it is room to grow; logical bytes leave that out. And those that the next step
                reads, by the formula

    python scripts/bench_methods.py [--lengths 4096,8000] [--budget 1024] [--repeats 2] [--only h2o,snapkv] [-o FILE]

The last line of the output is the result as JSON; it also goes to FILE. ``result_tables.py methods FILE`` prints
such a file as a table.
"""

from __future__ import annotations

import argparse
import copy
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any

import result_tables
import torch
from bench_engine import DEVICE, finish, prefill_seconds, seconds

from kvbench.conf.errors import InputError
from kvbench.methods.cache.cache import KVCache
from kvbench.methods.cache.fan_out import FanOutCache
from kvbench.methods.cache.kv_shape import kv_shape
from kvbench.methods.cache.method import Method
from kvbench.models.base import LoadedModel
from kvbench.models.embedded import Embedded
from kvbench.runners.config.methods import named_method
from kvbench.runners.engine import decode, prefill
from kvbench.runners.engine.weights import load
from kvbench.runners.records import provenance

STEPS = 64
"""Steps that are timed together: as many as pass between two times that held tokens are moved together."""
NEW_TOKENS = 64
BATCHES = (1, 4)


def methods(budget: int, only: str | None) -> dict[str, Method]:
    """Every method of ``conf/method`` that holds a cache, or those of a list with commas, by label."""
    folder = files("kvbench.conf").joinpath("method")
    names = (f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))
    made = {}
    for name in only.split(",") if only else sorted(names):
        method = named_method(name)
        if method.effective_budget is not None:
            method = named_method(f"{name} budget={budget}")
        if name != "no_cache":
            made[method.label] = method
    return made


def steps(model: Any, cache: KVCache, count: int) -> None:
    """Feed ``count`` tokens to every row."""
    token = torch.full_like(cache.next_positions(), 100)
    for _ in range(count):
        token = decode(model, cache, token).argmax(-1)


def decode_over_full(model: Any, cache: KVCache, full: KVCache, repeats: int) -> float:
    """Median over rounds of the mean time of a step / that of the full cache, the two in turn, each from its prompt."""

    def of(start: KVCache) -> float:
        mine = copy.deepcopy(start)
        steps(model, mine, 1)  # the first step makes room to grow
        return seconds(lambda: steps(model, mine, STEPS))

    rounds = [(of(cache), of(full)) for _ in range(repeats)]
    return median(ours for ours, _ in rounds) / median(theirs for _, theirs in rounds)


@torch.inference_mode()
def feed(model: Any, cache: KVCache, count: int) -> None:
    """``count`` further tokens in every row, in one forward: what is held then does not depend on how they came."""
    positions = cache.next_positions()[:, None] + torch.arange(count, device=DEVICE)
    ids = torch.full_like(positions, 1000)
    model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)


def bytes_held(loaded: LoadedModel, made: dict[str, Method], ids: torch.Tensor) -> dict[str, dict[str, int]]:
    """Stored, logical and by the formulas, after the prompts and NEW_TOKENS tokens; one prefill for many."""
    model = loaded.model
    caches = {label: m.new_cache(model, loaded.tokenizer) for label, m in made.items()}
    alone = [caches[label] for label, m in made.items() if not m.shares_prompt]
    shared = [caches[label] for label, m in made.items() if m.shares_prompt]
    for cache in [*([FanOutCache(shared)] if shared else []), *alone]:
        prefill(model, cache, ids)
        feed(model, cache, NEW_TOKENS)
    shape = kv_shape(model.config, model.dtype)
    return {
        label: {
            "stored": caches[label].kv_bytes_stored,
            "logical": caches[label].kv_bytes_logical,
            "formula": ids.shape[0] * m.bytes_formula(shape, ids.shape[1], NEW_TOKENS),
            "read": ids.shape[0] * m.read_formula(model)(ids.shape[1], NEW_TOKENS),
        }
        for label, m in made.items()
    }


def main() -> None:
    """Measure, and print or write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="4096,8000", help="prompt lengths, tokens; decode and bytes use the last")
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--only", help="names of conf/method with commas between them; all of them unless given")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    loaded = load(Embedded(), DEVICE, getattr(torch, args.dtype))
    model = loaded.model
    lengths = [int(n) for n in args.lengths.split(",")]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 40000, (max(BATCHES), max(lengths)), generator=generator).to(DEVICE)
    print(f"{DEVICE}, {args.dtype}, {torch.get_num_threads()} threads, budget {args.budget}")
    full = Method("full").new_cache(model)
    prefill(model, full, ids[:1, : lengths[-1]])
    made = methods(args.budget, args.only)
    rows: dict[str, Any] = {}
    for label in list(made):
        try:
            made[label].new_cache(model, loaded.tokenizer)
        except InputError as error:  # the model is of another architecture, or a package is not installed
            print(f"left out: {error}")
            del made[label]
    for label, method in made.items():
        row: dict[str, Any] = {"compression_over_prefill": {}, "prefill_over_full": {}, "bytes": {}}
        for length in lengths:
            mine, theirs = [], []
            for _ in range(args.repeats):
                cache = method.new_cache(model, loaded.tokenizer)
                mine.append(prefill_seconds(model, cache, ids[:1, :length]))
                if not method.shares_prompt:
                    theirs.append(prefill_seconds(model, Method("full").new_cache(model), ids[:1, :length])[0])
            share = median(spent / (total - spent) for total, spent in mine)
            row["compression_over_prefill"][str(length)] = share
            own = median(total for total, _ in mine)
            row["prefill_over_full"][str(length)] = own / median(theirs) if theirs else 1 + share
        row["decode_over_full"] = decode_over_full(model, cache, full, args.repeats)
        rows[label] = row
        shares = "  ".join(f"{n}: {share:.3f}" for n, share in row["compression_over_prefill"].items())
        print(f"{label:<26} compression {shares}   decode / full {row['decode_over_full']:.2f}", flush=True)
    for batch in BATCHES:
        for label, held in bytes_held(loaded, made, ids[:batch, : lengths[-1]]).items():
            rows[label]["bytes"][str(batch)] = held
    settings = vars(args) | {"output": None, "steps": STEPS, "new_tokens": NEW_TOKENS}
    result = {"methods": rows, "settings": settings, "provenance": provenance.collect(DEVICE)}
    print(result_tables.markdown(result_tables.methods({"": result})))
    finish(result, args.output)


if __name__ == "__main__":
    main()
