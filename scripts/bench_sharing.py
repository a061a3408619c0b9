"""What sharing keys and values costs and gains, as ratios from one run, and its bytes against the formula.

Random weights in the default model's shape, one model for each way of sharing; the plain model is timed in turn with
each:

1. prefill: time of the whole prefill / the plain model's. LCKV passes the shared layers several times; YOCO runs
            its upper half for the last token alone
2. decode:  mean time of 32 steps after the prompt / the plain model's
3. bytes:   stored after the prompt and 32 tokens, against the formula (the rest is room to grow); per further token

    python scripts/bench_sharing.py [--length 8000] [--shape smollm2-135m] [--dtype float32] [-o FILE]

The last line of the output is the result as JSON; it also goes to FILE. ``result_tables.py sharing FILE`` prints
such a file as a table.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import result_tables
import torch
from bench_engine import DEVICE, finish, prefill_seconds, seconds
from bench_methods import steps

from kvbench.methods.cache.kv_shape import kv_shape
from kvbench.methods.cache.layout import full_shape
from kvbench.methods.cache.method import Method
from kvbench.models.random import SHAPES, RandomModel
from kvbench.runners.config.methods import named_method
from kvbench.runners.engine.weights import load
from kvbench.runners.records import provenance
from kvbench.runners.train.output import kv_bytes_per_token

STEPS = 32
ARMS = (
    "cla",
    "cla sharing.factor=3",
    "yoco",
    "yoco sharing.mixer=gated_retention",
    "lckv",
    "lckv sharing.warmup=10",
    "kvshare sharing.kv_layers=11",
    "gqa sharing.kv_heads=3",
    "mqa",
    "mla sharing.kv_lora_rank=112",
)


def measured(model: Any, method: Method, ids: torch.Tensor) -> tuple[float, float, Any]:
    """(seconds of the prefill, of STEPS steps, the cache after them)."""
    cache = method.new_cache(model)
    whole, _ = prefill_seconds(model, cache, ids)

    steps(model, cache, 1)  # makes room to grow
    return whole, seconds(lambda: steps(model, cache, STEPS - 1)), cache


def main() -> None:
    """Measure, and print or write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=8000, help="prompt tokens")
    parser.add_argument("--shape", default="smollm2-135m", choices=sorted(SHAPES))
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100, 30000, (1, args.length), generator=generator).to(DEVICE)
    source = RandomModel(args.shape, max_positions=args.length + 2 * STEPS)
    plain, full = load(source, DEVICE, dtype).model, Method("full")
    print(f"{DEVICE}, {args.dtype}, {torch.get_num_threads()} threads, {args.length} tokens")
    rows: dict[str, Any] = {}
    for text in ARMS:
        method = named_method(text)
        model = load(source.for_sharing(method.sharing, method.name), DEVICE, dtype).model
        model.config.max_position_embeddings = args.length + 2 * STEPS
        theirs, ours = measured(plain, full, ids), measured(model, method, ids)
        config, cache = model.config, ours[2]
        rows[method.label] = {
            "prefill_over_plain": ours[0] / theirs[0],
            "decode_over_plain": ours[1] / theirs[1],
            "kv_layers": len(cache.layers),
            "bytes_per_token": kv_bytes_per_token(method, config, dtype),
            "stored": cache.kv_bytes_stored,
            "logical": cache.kv_bytes_logical,
            "formula": method.bytes_formula(kv_shape(config, dtype), args.length, STEPS),
            "plain": full.bytes_formula(full_shape(model, method.sharing), args.length, STEPS),
        }
        row = rows[method.label]
        print(
            f"{method.label:<20} prefill {row['prefill_over_plain']:.2f}  decode {row['decode_over_plain']:.2f}",
            flush=True,
        )
    settings = vars(args) | {"output": None, "steps": STEPS}
    result = {"sharing": rows, "settings": settings, "provenance": provenance.collect(DEVICE)}
    print(result_tables.markdown(result_tables.sharing({"": result})))
    finish(result, args.output)


if __name__ == "__main__":
    main()
