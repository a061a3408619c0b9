"""What the choice among equally scored tokens changes by itself: SnapKV under three rules, on the bundled set.

Max pooling gives a peak and its neighbours one score, so that most budgets end inside such a tie. The rule of kvbench
keeps the token with the largest own score, then the lower index (``kvbench.methods.policies.ranking``). Here it stands
beside two that look at the index alone, the lower or the higher one first, as a device's ``topk`` may do. All rules and
budgets share one prefill of each prompt; the full cache is not run.

    python scripts/measure_ties.py [--limit 4] [--budgets 64 128 256] [--datasets hotpotqa,trec,...] [-o FILE]
    python scripts/measure_ties.py --time [-o FILE]      # how long the ranking takes, against topk

The last line of the output is the result as JSON; it also goes to FILE. Scores are on the small bundled set, not
LongBench scores. Their differences are paired: the same examples, and the same votes, under each rule.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from bench_engine import finish
from tqdm import tqdm

from kvbench.analysis.stats import paired_difference
from kvbench.methods.cache.method import Method
from kvbench.methods.cache.prompt import Prompt
from kvbench.methods.policies import ranking
from kvbench.methods.policies.eviction import EvictionPolicy
from kvbench.methods.policies.policy import Kept
from kvbench.methods.policies.pooling import pool
from kvbench.methods.policies.scorers.snapkv import SnapKV
from kvbench.models.embedded import Embedded
from kvbench.runners.engine import Sampling
from kvbench.runners.engine.weights import load
from kvbench.runners.evaluate_batch import encode, evaluate_batch
from kvbench.runners.records import provenance
from kvbench.tasks.longbench import LongBench

DATASETS = "hotpotqa,lcc,multifieldqa_en,narrativeqa,passage_retrieval_en,trec"
"""Those of the bundled set that have short answers."""

kept: list[torch.Tensor] = []
"""Slots kept by the policies below, in the order of their calls: [1, H, C] int64."""


class Recorded(EvictionPolicy):
    """A policy that notes what it keeps."""

    def select(self, prompt: Prompt, state: Any = None) -> Kept:
        found = super().select(prompt, state)
        if found.slots is not None:
            kept.append(found.slots)
        return found


class LowerIndex(SnapKV):
    """Of equal scores the lower index stays."""

    def tie_scores(self, prompt: Prompt, state: Any = None) -> torch.Tensor | None:
        return None


class HigherIndex(SnapKV):
    """Of equal scores the higher index stays."""

    def tie_scores(self, prompt: Prompt, state: Any = None) -> torch.Tensor | None:
        scores = self.score(prompt, state)
        return torch.arange(scores.shape[-1], device=scores.device, dtype=scores.dtype).expand_as(scores)


RULES: dict[str, type[SnapKV]] = {
    ranking.RULE: SnapKV,
    "score, lower index": LowerIndex,
    "score, higher index": HigherIndex,
}


def changed_share(ours: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> float:
    """Share of the kept tokens, window included, that the other rule does not keep."""
    changed = total = 0
    for a, b in zip(ours, others, strict=True):  # one layer of one prompt
        same = (a[..., :, None] == b[..., None, :]).any(-1)
        changed += int((~same).sum())
        total += same.numel()
    return changed / total


def time_ranking(tokens: int = 32768, heads: int = 8, repeats: int = 30) -> list[dict[str, float]]:
    """Least time of the ranking over that of ``topk`` for one layer, in one thread, by the number of kept tokens."""
    torch.set_num_threads(1)
    votes = (3 * torch.randn(1, heads, tokens, generator=torch.Generator().manual_seed(0))).softmax(-1)
    scores = pool(votes, 7, "max")

    def two_sorts(count: int) -> torch.Tensor:
        order = votes.argsort(dim=-1, descending=True, stable=True)
        order = order.gather(-1, scores.gather(-1, order).argsort(dim=-1, descending=True, stable=True))
        return order[..., :count].sort(dim=-1).values

    rows = []
    for count in (512, 1024, 2048, 4096, 8192):
        works = {
            "topk": lambda count=count: scores.topk(count, dim=-1, sorted=False),
            "topk, indices sorted": lambda count=count: scores.topk(count, dim=-1, sorted=False).indices.sort(dim=-1),
            "score, index": lambda count=count: ranking.keep_slots(scores, count),
            ranking.RULE: lambda count=count: ranking.keep_slots(scores, count, votes),
            "two stable sorts": lambda count=count: two_sorts(count),
        }
        least = dict.fromkeys(works, float("inf"))
        for _ in range(repeats):  # in turn, so that a slow minute of the machine falls on all of them
            for name, work in works.items():
                start = time.perf_counter()
                work()
                least[name] = min(least[name], time.perf_counter() - start)
        row = {"kept": count, "topk_ms": round(1000 * least["topk"], 2)}
        row |= {name: round(seconds / least["topk"], 2) for name, seconds in least.items() if name != "topk"}
        rows.append(row)
        print(row)
    return rows


def main() -> None:
    """Measure, and print or write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=4, help="examples of each data set")
    parser.add_argument("--budgets", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--datasets", default=DATASETS)
    parser.add_argument("--time", action="store_true", help="time the ranking instead, against topk")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    if args.time:
        finish({"ranking": time_ranking(), "provenance": provenance.collect("cpu")}, args.output)
        return

    task = LongBench(datasets=args.datasets, limit=args.limit, source="mini")
    examples, start = task.examples(), time.perf_counter()
    loaded = load(Embedded(), "cpu", torch.float32)
    arms = [(budget, rule) for budget in args.budgets for rule in RULES]
    methods = [Method("snapkv", Recorded(RULES[rule](), budget)) for budget, rule in arms]
    scores: dict[tuple[int, str], dict[str, dict[str, float]]] = {arm: {} for arm in arms}
    texts: dict[tuple[int, str], list[str]] = {arm: [] for arm in arms}
    slots: dict[tuple[int, str], list[torch.Tensor]] = {arm: [] for arm in arms}
    for example in tqdm(examples):
        item = encode(task, example, loaded, loaded.max_prompt_tokens, split=False)
        kept.clear()
        answers = evaluate_batch(methods, [item], task, loaded, "cpu", Sampling(0.0, 1.0, [0]), None)
        if len(item.prompt) > max(args.budgets):  # every layer asks the methods in turn
            for call, found in enumerate(kept):
                slots[arms[call % len(arms)]].append(found)
        for arm, (answer,) in zip(arms, answers, strict=True):
            text = answer.fields["prediction"]
            texts[arm].append(text)
            by_id = scores[arm].setdefault(example.dataset, {})
            by_id[f"{example.dataset}/{example.id}"] = 100 * task.score(example, text)
    rows: list[dict[str, Any]] = []
    for budget, rule in arms:
        row: dict[str, Any] = {"budget": budget, "rule": rule}
        row["mean_score"] = fmean(fmean(of_set.values()) for of_set in scores[budget, rule].values())
        if rule != ranking.RULE:
            ours = budget, ranking.RULE
            row["difference"] = asdict(paired_difference(scores[budget, rule], scores[ours]))
            row["kept_tokens_changed"] = changed_share(slots[ours], slots[budget, rule])
            row["texts_changed"] = sum(a != b for a, b in zip(texts[ours], texts[budget, rule], strict=True))
            flat = {k: v for by_id in scores[ours].values() for k, v in by_id.items()}
            row["scores_changed"] = sum(
                flat[k] != v for by_id in scores[budget, rule].values() for k, v in by_id.items()
            )
        rows.append(row)
        print({k: v for k, v in row.items() if k != "difference"})
    result = {
        "model": loaded.name,
        "dtype": "float32",
        "task": task.source().name,
        "datasets": args.datasets.split(","),
        "examples": len(examples),
        "method": {"name": "snapkv", "pooling": "max", "kernel": SnapKV().kernel, "window": SnapKV().window},
        "rows": rows,
        "seconds": round(time.perf_counter() - start, 1),
        "provenance": provenance.collect("cpu"),
    }
    finish(result, args.output)


if __name__ == "__main__":
    main()
