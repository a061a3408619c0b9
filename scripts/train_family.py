"""Train the family of small models, one for each way of sharing keys and values, at equal data, tokens and parameters.

Each architecture is tried at the same learning rates with seed 0, on recall also at half of the least where none has
solved the task. The best rate is then trained with further seeds, and tables report only these: seed 0's loss at the
rate that it chose is biased low. What is done already is not done again, so the command can be stopped and given again.

    python scripts/train_family.py recall RESULTS [--only yoco,lckv] [--seeds 3]
    python scripts/train_family.py text RESULTS
    python scripts/train_family.py recall RESULTS --install      # copy the models of seed 0 to models/tiny/recall

Two processes with OMP_NUM_THREADS=1, each with its share of ``--only``, use two cores better than one with both.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from kvbench.analysis.load import Run, load
from kvbench.analysis.tables import at_best_rate

ROOT = Path(__file__).resolve().parents[1]

ARMS = {
    "mha": ["method=mha"],
    "gqa": ["method=gqa"],
    "mqa": ["method=mqa"],
    "cla2": ["method=cla"],
    "cla3": ["method=cla", "method.sharing.factor=3"],
    "yoco": ["method=yoco"],
    "lckv": ["method=lckv"],
    "mla48": ["method=mla"],
    "mla112": ["method=mla", "method.sharing.kv_lora_rank=112"],
    "sandwich": ["method=kvshare", "method.sharing.partition=sandwich", "method.sharing.position=middle"],
}
SETTINGS = {
    "recall": [
        *("task=recall", "model=scratch", "model.layers=4", "model.heads=2"),
        *("runner.steps=2000", "runner.batch_tokens=2048"),
    ],
    "text": [
        *("task=text", "model=scratch", "model.layers=6", "runner.steps=800", "runner.batch_tokens=2048"),
        *("runner.sequence=128", "runner.weight_decay=0.1"),
    ],
}
OF_ARM = {  # windows well below the sequences' length, and three layers of six or two of four with keys of their own
    ("recall", "yoco"): ["method.sharing.window=16"],
    ("text", "yoco"): ["method.sharing.window=32"],
    ("recall", "sandwich"): ["method.sharing.kv_layers=2"],
    ("text", "sandwich"): ["method.sharing.kv_layers=3"],
}
RATES = {"recall": (2.5e-4, 5e-4, 1e-3), "text": (1e-3, 1.5e-3, 2.25e-3)}
FALLBACK_RATE = {"recall": 1.25e-4}
SOLVED_NATS = 1e-4  # a loss below it leaves nothing to learn
NOT_ON_RECALL = ("gqa", "mla112")
"""With two query heads grouped-query attention is multi-query attention; one size of latents is enough there."""


def train(task: str, arm: str, lr: float, seed: int, results: str) -> None:
    """One run, in a process of its own; one that is done already is only read."""
    overrides = [*SETTINGS[task], *ARMS[arm], *OF_ARM.get((task, arm), [])]
    overrides += [f"runner.lr={lr}", f"seed={seed}", f"results_dir={results}"]
    command = [sys.executable, "run.py", "runner=train", *overrides]
    print(" ".join(command[1:]), flush=True)
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def best(task: str, results: str) -> dict[str, list[Run]]:
    """Finished trainings on a task by label, each at the learning rate that suits it, seed 0 first."""
    runs = [run for run in load(Path(results))[0] if run.record["kind"] == "train"]
    return at_best_rate([run for run in runs if run.record["task"].split("-")[0] == task])


def lower_rate_may_help(task: str, record: dict[str, Any]) -> bool:
    """Whether the training of seed 0 that is the best so far calls for ``FALLBACK_RATE``."""
    return task in FALLBACK_RATE and record["validation"]["loss"] >= SOLVED_NATS


def label_of(arm: str, task: str) -> str:
    """The label under which an arm is recorded."""
    own = {
        "gqa": "gqa2",
        "mla48": "mla-r48",
        "mla112": "mla-r112",
        "lckv": "lckv-w2",
        "sandwich": f"sandwich-middle-{2 if task == 'recall' else 3}",
    }
    return own.get(arm, arm)


def install(task: str, arms: list[str], results: str) -> None:
    """Copy each architecture's model, seed 0 at its best learning rate, into the repository; one without it stays."""
    trained = best(task, results)
    for label in [label_of(arm, task) for arm in arms]:
        if label not in trained or not (trained[label][0].path / "model").is_dir():
            print(f"{label}: {results} has no model of seed 0 at the best rate; models/tiny/{task}/{label} stays")
            continue
        run = trained[label][0]
        lr = run.record["training"]["lr"]
        target = ROOT / "models" / "tiny" / task / label
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(run.path / "model", target)
        (target / "training.json").write_text(json.dumps(run.whole_record(), indent=1) + "\n", encoding="utf-8")
        print(f"{label}: lr {lr:g}, loss {run.record['validation']['loss']:.4f} -> {target.relative_to(ROOT)}")


def main() -> None:
    """Train the members that are missing, and copy the best ones to ``models/tiny``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=list(SETTINGS))
    parser.add_argument("results")
    parser.add_argument("--only", help="of " + ", ".join(ARMS))
    parser.add_argument("--seeds", type=int, default=3, help="seeds to report, beside seed 0")
    parser.add_argument("--install", action="store_true", help="train nothing; copy what is done to models/tiny")
    args = parser.parse_args()
    results = str(Path(args.results).resolve())
    all_arms = [arm for arm in ARMS if args.task != "recall" or arm not in NOT_ON_RECALL]
    arms = args.only.split(",") if args.only else all_arms
    if args.install:
        install(args.task, arms, results)
        return
    for arm in arms:
        for lr in RATES[args.task]:
            train(args.task, arm, lr, 0, results)
        if lower_rate_may_help(args.task, best(args.task, results)[label_of(arm, args.task)][0].record):
            train(args.task, arm, FALLBACK_RATE[args.task], 0, results)
    for seed in range(1, args.seeds + 1):
        for arm in arms:
            (first, *_) = best(args.task, results)[label_of(arm, args.task)]
            train(args.task, arm, first.record["training"]["lr"], seed, results)


if __name__ == "__main__":
    main()
