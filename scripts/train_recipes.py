"""The larger trainings: from scratch at 50M and 110M parameters, and uptraining of the default model.

Each is made for one GPU and 25 minutes. What is done already is not done again, and what was cut off goes on, so the
command can be stopped and given again. The text is wikitext-103 from the hub, or a folder of yours.

    python scripts/train_recipes.py RESULTS [50m 110m uptrain] [--text FOLDER] [--tokenizer FOLDER]
    python scripts/train_recipes.py RESULTS --rehearse        # two steps of each at toy size, on any machine
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from kvbench.analysis.load import load

ROOT = Path(__file__).resolve().parents[1]

MINUTES = 25
YOCO = "method=yoco method.sharing.window=256"
RECIPES = {
    "50m": (
        "experiment=train_50m",
        [
            *("method=full", "method=cla", "method=cla method.sharing.factor=3", YOCO, "method=lckv"),
            "method=kvshare method.sharing.partition=pizza method.sharing.position=bottom method.sharing.kv_layers=4",
            "method=kvshare method.sharing.kv_layers=3",
        ],
    ),
    "110m": ("experiment=train_110m", ["method=full", "method=lckv"]),
    "uptrain": (
        "experiment=uptrain",
        [
            *("method=cla", "method=cla method.sharing.factor=3", "method=yoco method.sharing.mixer=full"),
            *("method=yoco", "method=lckv", "method=lckv method.sharing.warmup=10"),
        ],
    ),
}
TOY_MODEL = [
    *("model.hidden_size=32", "model.heads=2", "model.kv_heads=1", "model.head_dim=16"),
    *("model.intermediate_size=32", "model.max_positions=64"),
]
TOY_TRAINING = [
    *("task.path=stdlib", "task.dataset=null", "task.limit_bytes=400000", "runner.steps=2", "runner.batch_tokens=128"),
    *("runner.sequence=64", "runner.micro_batch=null", "runner.validate_sequences=2", "device=cpu", "dtype=float32"),
]


def command(recipe: str, arm: str, args: argparse.Namespace) -> list[str]:
    """One run's command line."""
    experiment, _ = RECIPES[recipe]
    overrides = [experiment, *arm.split(), f"results_dir={Path(args.results).resolve()}"]
    if args.text:
        overrides += [f"task.path={Path(args.text).resolve()}", "task.dataset=null"]
    if args.tokenizer and recipe != "uptrain":
        overrides.append(f"task.tokenizer={Path(args.tokenizer).resolve()}")
    if args.rehearse:
        model = [*TOY_MODEL, "task.tokenizer=bytes"]
        if recipe == "uptrain":
            model = ["model=local", f"model.path={toy_checkpoint(args.results)}", "model.max_prompt_tokens=32"]
        overrides += [*model, *TOY_TRAINING]
    return [sys.executable, "run.py", *overrides]


def toy_checkpoint(results: str) -> Path:
    """A plain model of twelve layers to rehearse the uptraining with; trained when it is first asked for."""
    folder = Path(results).resolve() / "checkpoint"
    line = ["runner=train", "task=text", "model=scratch", "model.layers=12", "method=full", f"results_dir={folder}"]
    subprocess.run([sys.executable, "run.py", *line, *TOY_MODEL, *TOY_TRAINING], cwd=ROOT, check=True)
    (run,) = load(folder)[0]
    return run.path / "model"


def main() -> None:
    """Run the recipes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results")
    parser.add_argument("recipes", nargs="*", default=[], help="of " + ", ".join(RECIPES))
    parser.add_argument("--text", help="folder of *.txt to train on instead of wikitext-103")
    parser.add_argument("--tokenizer", help="folder with the tokenizer of the models from scratch")
    parser.add_argument("--rehearse", action="store_true", help="two steps of each at toy size")
    args = parser.parse_args()
    unknown = set(args.recipes) - set(RECIPES)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: must be of {', '.join(RECIPES)}")
    for recipe in args.recipes or RECIPES:
        for arm in RECIPES[recipe][1]:
            line = command(recipe, arm, args)
            print(" ".join(line[1:]), flush=True)
            try:
                subprocess.run(line, cwd=ROOT, check=True, timeout=60 * MINUTES)
            except subprocess.TimeoutExpired:
                print(f"cut off after {MINUTES} minutes; the same command goes on from the last checkpoint", flush=True)


if __name__ == "__main__":
    main()
