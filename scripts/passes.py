"""Loss on held-out data against the number of passes by which a model with sources above encodes a sequence.

    python scripts/passes.py models/tiny/text/lckv-w2 [--task text] [--sequences 64] [-o FILE]

``exact`` is as many passes as tokens: what feeding them one by one gives. The last line of the output is the result as
JSON.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_engine import DEVICE, finish

from kvbench.models.local import LocalModel
from kvbench.runners.records import provenance
from kvbench.tasks.recall import Recall
from kvbench.tasks.text import Text
from kvbench.tasks.training import IGNORED

PASSES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16)


@torch.inference_mode()
def loss(model: Any, ids: torch.Tensor, labels: torch.Tensor, passes: int) -> float:
    """Mean over the labels, nats."""
    total = count = 0.0
    for x, y in zip(ids.split(16), labels.split(16), strict=True):
        asked = y[:, 1:] != IGNORED
        logits = model(x, use_cache=False, n_iter=passes).logits[:, :-1].float()
        total += float(F.cross_entropy(logits[asked], y[:, 1:][asked], reduction="sum"))
        count += float(asked.sum())
    return total / count


def main() -> None:
    """Measure, and print or write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a trained model")
    parser.add_argument("--task", default="text", choices=["text", "recall"])
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()

    loaded = LocalModel(args.model, max_prompt_tokens=args.length).load(DEVICE, torch.float32)
    task: Any = Text() if args.task == "text" else Recall()
    length = task.sequence_length(args.length)
    ids, labels = (torch.from_numpy(x).to(DEVICE) for x in task.validation(loaded.tokenizer, length, args.sequences))
    found = {str(n): loss(loaded.model, ids, labels, n) for n in PASSES if n < length}
    found["exact"] = loss(loaded.model, ids, labels, length)
    print("| passes | loss | perplexity |\n|---:|---:|---:|")
    for passes, value in found.items():
        print(f"| {passes} | {value:.4f} | {math.exp(value):.3f} |")
    settings = vars(args) | {"output": None, "model": Path(args.model).name}
    finish({"loss": found, "settings": settings, "provenance": provenance.collect(DEVICE)}, args.output)


if __name__ == "__main__":
    main()
