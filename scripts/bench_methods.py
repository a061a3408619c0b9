"""What each method costs in prefill and gains in decode, as ratios from one run, and its bytes against the formula.

For every method in ``conf/method`` that holds a cache, at its default settings but for the budget:

1. compression: time spent choosing and copying / time of the rest of the prefill, at each prompt length
2. decode:      time per step / that of the full cache, at the longest prompt; the two alternate
3. bytes:       stored after the longest prompt and 64 further tokens, in a batch of 1 and of 4, against the formula
                (what is stored beyond it is room to grow, named beside it)

    python scripts/bench_methods.py [--lengths 4096,8000] [--budget 1024] [--repeats 3] [--dtype float32] [-o FILE]

The last line of the output is the result as JSON; it also goes to FILE.
"""

from __future__ import annotations

import argparse
import json
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench_engine import DEVICE, alternating, decode_seconds, prefill_seconds

from kvbench.methods.base import Method, kv_shape
from kvbench.models.embedded import Embedded
from kvbench.runners import provenance
from kvbench.runners.cli import named_method
from kvbench.runners.engine import decode, prefill

STEPS = 16
NEW_TOKENS = 64


def methods(budget: int) -> dict[str, Method]:
    """Every method of ``conf/method`` that holds a cache, by label."""
    folder = files("kvbench.conf").joinpath("method")
    names = sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))
    made = [named_method(f"{name} budget={budget}") for name in names if name != "no_cache"]
    return {m.label: m for m in made}


def bytes_held(model: Any, method: Method, ids: torch.Tensor) -> dict[str, int]:
    """Stored, logical and by the formula, after a prompt and NEW_TOKENS tokens."""
    cache = method.new_cache(model)
    token = prefill(model, cache, ids).argmax(-1)
    for _ in range(NEW_TOKENS):
        token = decode(model, cache, token).argmax(-1)
    shape = kv_shape(model.config, model.dtype)
    formula = ids.shape[0] * method.bytes_formula(shape, ids.shape[1], NEW_TOKENS)
    return {"stored": cache.kv_bytes_stored, "logical": cache.kv_bytes_logical, "formula": formula}


def decode_over_full(model: Any, method: Method, ids: torch.Tensor, repeats: int) -> float:
    """Median time of a step / that of the full cache, the two in turn."""
    full = Method("full")
    ours, theirs = alternating(
        repeats,
        lambda: decode_seconds(model, method.new_cache(model), ids, STEPS),
        lambda: decode_seconds(model, full.new_cache(model), ids, STEPS),
    )
    return median(ours) / median(theirs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="4096,8000", help="prompt lengths, tokens; decode and bytes use the last")
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()

    model = Embedded().load(DEVICE, getattr(torch, args.dtype)).model
    lengths = [int(n) for n in args.lengths.split(",")]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 40000, (4, max(lengths)), generator=generator).to(DEVICE)
    rows: dict[str, Any] = {}
    print(f"{DEVICE}, {args.dtype}, {torch.get_num_threads()} threads, budget {args.budget}")
    for label, method in methods(args.budget).items():
        row: dict[str, Any] = {"compression_over_prefill": {}, "bytes": {}}
        for length in lengths:
            timed = [prefill_seconds(model, method, ids[:1, :length]) for _ in range(args.repeats + 1)][1:]
            row["compression_over_prefill"][length] = median(spent / (total - spent) for total, spent in timed)
        row["decode_over_full"] = decode_over_full(model, method, ids[:1, : lengths[-1]], args.repeats)
        for batch in (1, 4):
            row["bytes"][batch] = bytes_held(model, method, ids[:batch, : lengths[-1]])
        rows[label] = row
        shares = "  ".join(f"{n}: {share:.3f}" for n, share in row["compression_over_prefill"].items())
        one = row["bytes"][1]
        print(
            f"{label:<26} compression {shares}   decode / full {row['decode_over_full']:.2f}   "
            f"stored {one['stored'] / 2**20:.2f} MiB, formula {one['formula'] / 2**20:.2f} MiB",
            flush=True,
        )
    result = {"methods": rows, "settings": vars(args) | {"output": None}, "provenance": provenance.collect(DEVICE)}
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
