"""What an architecture of the small family costs in time: training, prefill and decode, as ratios to the plain model.

Every member is timed in turn with the plain one, so that a slow minute falls on both; medians over the repetitions:

1. train:   one step of AdamW over a batch of what the family was trained on / the plain model's
2. prefill: a prompt of ``--length`` tokens / the plain model's
3. decode:  mean time of 32 steps behind that prompt / the plain model's

    python scripts/bench_family.py [--task text] [--length 1024] [--repeats 7] [-o FILE]

The last line of the output is the result as JSON; it also goes to FILE. ``result_tables.py family FILE`` prints
such a file as a table.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from typing import Any

import result_tables
import torch
import torch.nn.functional as F
from bench_engine import DEVICE, alternating, decode_seconds, finish, prefill_seconds, seconds
from train_family import ARMS, OF_ARM, SETTINGS

from kvbench.methods.cache.method import Method
from kvbench.models.tiny import TinyModel
from kvbench.runners.config.methods import named_method
from kvbench.runners.records import provenance
from kvbench.tasks.recall import Recall
from kvbench.tasks.text import Text
from kvbench.tasks.training import IGNORED

STEPS = 32


class Member:
    """A trained model, and the three things it is timed at."""

    def __init__(self, method: Method, task: str, data: Any, length: int):
        self.method = method
        loaded = TinyModel(trained_on=task).for_sharing(method.sharing, method.name).load(DEVICE, torch.float32)
        self.model: Any = loaded.model
        given = dict(setting.split("=", 1) for setting in SETTINGS[task])
        sequence = data.sequence_length(int(given.get("runner.sequence", 0)))
        rows = int(given["runner.batch_tokens"]) // sequence
        batch = data.batch(loaded.tokenizer, 0, rows, sequence, 0)
        self.x, self.y = (torch.from_numpy(part).to(DEVICE) for part in batch)
        generator = torch.Generator().manual_seed(0)
        self.prompt = torch.randint(3, self.model.config.vocab_size, (1, length), generator=generator).to(DEVICE)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0)

    def train(self) -> float:
        """Seconds of one optimizer step, at a learning rate of 0."""

        def step() -> None:
            logits = self.model(self.x, use_cache=False).logits[:, :-1].flatten(0, 1)
            F.cross_entropy(logits, self.y[:, 1:].flatten(), ignore_index=IGNORED).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

        self.model.train()
        spent = seconds(step)
        self.model.eval()
        return spent

    def prefill(self) -> float:
        """Seconds of one prefill."""
        return prefill_seconds(self.model, self.method.new_cache(self.model), self.prompt)[0]

    def decode(self) -> float:
        """Seconds of the decode steps."""
        return decode_seconds(self.model, self.method.new_cache(self.model), self.prompt, STEPS)


def method_of(arm: str, task: str) -> Method:
    """The method by which an arm of ``train_family.py`` is trained."""
    overrides = [o.removeprefix("method.") for o in [*ARMS[arm], *OF_ARM.get((task, arm), [])]]
    method: Method = named_method(" ".join(overrides).removeprefix("method="))
    return method


def main() -> None:
    """Measure, and print or write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="text", choices=list(SETTINGS))
    parser.add_argument("--length", type=int, default=1024, help="prompt tokens")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    data: Any = Text() if args.task == "text" else Recall()
    plain = Member(method_of("mha", args.task), args.task, data, args.length)
    there = TinyModel(trained_on=args.task).members
    print(f"{DEVICE}, {torch.get_num_threads()} threads, prompt of {args.length} tokens, batch {tuple(plain.x.shape)}")
    members: dict[str, Any] = {}
    for arm in ARMS:
        method = method_of(arm, args.task)
        assert method.sharing is not None
        if method.sharing.label not in there or method.sharing.label in members:
            continue
        member = Member(method, args.task, data, args.length)
        members[method.sharing.label] = row = {}
        for what in ("train", "prefill", "decode"):
            theirs, ours = alternating(args.repeats, getattr(plain, what), getattr(member, what))
            row[what] = median(ours) / median(theirs)
            row[f"{what}_ms"] = {"plain": [1000 * s for s in theirs], "ours": [1000 * s for s in ours]}
        print(f"{method.sharing.label:<20} " + "  ".join(f"{k} {row[k]:.2f}" for k in ("train", "prefill", "decode")))
    settings = vars(args) | {"output": None, "steps": STEPS}
    result = {"members": members, "settings": settings, "provenance": provenance.collect(DEVICE)}
    print(result_tables.markdown(result_tables.family({"": result})))
    finish(result, args.output)


if __name__ == "__main__":
    main()
