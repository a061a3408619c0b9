"""How alike the keys, and the values, of neighbouring layers are: what MiniCache's merging rests on.

For every layer but the first: the cosine between a head's vector and the same head's in the layer below, averaged over
tokens and then over heads, with its sign and without; over the start of the needle task's haystack, on the embedded
model.

    python scripts/layer_similarity.py [--tokens 2048] [-o FILE]

The last line of the output is the result as JSON; it also goes to FILE.
"""

from __future__ import annotations

import argparse
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_engine import finish

from kvbench.methods.cache.method import Method
from kvbench.models.embedded import Embedded
from kvbench.runners.engine import prefill
from kvbench.runners.records import provenance


def main() -> None:
    """Measure, and print or write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()

    loaded = Embedded().load("cpu", torch.float32)
    assert loaded.tokenizer is not None
    text = files("kvbench.tasks").joinpath("data", "needle", "haystack.txt").read_text(encoding="utf-8")
    ids = torch.tensor([loaded.tokenizer(text[: 8 * args.tokens]).input_ids[: args.tokens]])
    cache = Method("full").new_cache(loaded.model)
    prefill(loaded.model, cache, ids)
    held = [layer.storage.read()[:2] for layer in cache.layers]
    rows: list[dict[str, Any]] = []
    for i in range(1, len(held)):
        row: dict[str, Any] = {"layer": i}
        for name, below, above in zip(("keys", "values"), held[i - 1], held[i], strict=True):
            by_head = F.cosine_similarity(below, above, dim=-1)[0].mean(1)
            row[name] = by_head.mean().item()
            row[f"{name}_size"] = by_head.abs().mean().item()
        rows.append(row)
        print(f"layer {i:>2}   keys {row['keys']:+.3f}   values {row['values']:+.3f}")
    mean = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0] if key != "layer"}
    result = {"tokens": ids.shape[1], "mean": mean, "layers": rows, "provenance": provenance.collect("cpu")}
    finish(result, args.output)


if __name__ == "__main__":
    main()
