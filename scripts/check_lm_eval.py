"""Compare task=lm_eval with lm-eval's own model, request for request, and show what a tenth of the cache changes.

    python scripts/check_lm_eval.py hellaswag=FILE piqa=FILE arc_easy=FILE gsm8k=FILE [--requests 200] -o report.json

Files hold the split that each task evaluates, as for ``task.data_files``. Both sides run the default model on the CPU,
in batches. What is compared: every log-likelihood, whether greedy decoding would give the answer, and every text.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from kvbench.models.embedded import Embedded
from kvbench.runners.records import provenance
from kvbench.tasks.lm_eval import GENERATE, LmEval

ROOT = Path(__file__).resolve().parents[1]
REQUESTS = {"hellaswag": 4, "piqa": 2, "arc_easy": 4, "arc_challenge": 4, "winogrande": 2, "openbookqa": 4}
"""Of a document."""
BUDGET = 0.1


def ours(name: str, file: str, limit: int, results: str, batch: int) -> dict[str, dict[str, Any]]:
    """``{method: {document: row}}`` of the full cache and of SnapKV with a tenth of it."""
    command = [sys.executable, "run.py", "method=snapkv", f"method.budget={BUDGET}", "task=lm_eval", "task.fewshot=0"]
    command += [f"task.names=[{name}]", f"task.data_files={{{name}:{Path(file).resolve()}}}", f"task.limit={limit}"]
    subprocess.run([*command, f"batch_size={batch}", f"results_dir={results}"], cwd=ROOT, check=True)
    found = {}
    for method in ("full", "snapkv"):
        (path,) = Path(results).glob(f"lm_eval/*/{method}/*/samples.jsonl")
        found[method] = {row["id"]: row for row in map(json.loads, path.read_text().splitlines())}
    return found


def compared(theirs: Mapping[str, Any], rows: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """How far our answers are from ``theirs``: {document: list of (log-likelihood, greedy), or text}."""
    pairs = [(answer, rows[document]["prediction"]) for document, answer in theirs.items()]
    if isinstance(pairs[0][0], str):
        return {"texts": len(pairs), "different": sum(a != b for a, b in pairs)}
    flat = [(a, b) for answers, found in pairs for a, b in zip(answers, found, strict=True)]
    return {
        "requests": len(flat),
        "largest_difference": max(abs(a[0] - b[0]) for a, b in flat),
        "smallest_difference": min(abs(a[0] - b[0]) for a, b in flat),
        "greedy_differs": sum(a[1] != b[1] for a, b in flat),
    }


def main() -> None:
    """Compare the scores with lm-eval's own, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="TASK=FILE")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    loaded = Embedded().load("cpu", torch.float32)
    stock = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=args.batch)
    report: dict[str, Any] = {"kind": "check_lm_eval", "provenance": provenance.collect("cpu"), "tasks": {}}
    for name, _, file in (text.partition("=") for text in args.files):
        limit = -(-args.requests // REQUESTS.get(name, 1))
        task = LmEval(names=[name], data_files={name: file}, fewshot=0, limit=limit)
        requests = {e.id: e.meta["requests"] for e in task.examples()}
        flat = [request for mine in requests.values() for request in mine]
        kind = flat[0].request_type
        answers = iter(getattr(stock, kind)(flat))
        theirs = {document: [next(answers) for _ in mine] for document, mine in requests.items()}
        if kind == GENERATE:
            theirs = {document: texts[0] for document, texts in theirs.items()}
        with tempfile.TemporaryDirectory() as results:
            found = ours(name, file, limit, results, args.batch)
        report["tasks"][name] = {
            "documents": len(requests),
            "tokens_together": args.batch,
            "full": compared(theirs, found["full"]),
            f"snapkv {BUDGET}": compared(theirs, found["snapkv"]),
        }
        print(name, json.dumps(report["tasks"][name], indent=1), flush=True)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
