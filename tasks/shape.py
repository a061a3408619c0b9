"""Requests of one shape: ``prompt_tokens`` in, ``new_tokens`` out, for measuring time and memory.

Random ids cost a dense model what real text costs it. A method that decides by what it reads may keep another number of
tokens on noise than on text (per-head budgets do), so ``tokens=real`` takes the text of the bundled longbench-mini.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

from ..conf.errors import InputError
from ..conf.options import PositiveInt
from .base import Source
from .longbench_data import DatasetFile, open_mini
from .longbench_spec import SPECS
from .workload import NewTokens, Request, Workload, random_tokens


@dataclass
class Shape(Workload):
    """Requests that all have the same lengths.

    Attributes:
        prompt_tokens: tokens of each prompt, 1 or more.
        new_tokens: tokens to generate, 2 or more: time per output token is taken between the first and the last.
        tokens: ``random``: uniform ids below the vocabulary's size, others in each request. ``real``: consecutive text
            without special tokens; each request starts at another place, and behind the end the text starts again.
    """

    id: ClassVar[str] = "Shape"
    name = "shape"

    prompt_tokens: PositiveInt = 2048
    new_tokens: NewTokens = 128
    tokens: Literal["random", "real"] = "random"

    def source(self) -> Source:
        """``shape-2048+128``, or ``shape-2048+128-real`` with the sha256 of the files the text is from."""
        name = f"shape-{self.prompt_tokens}+{self.new_tokens}"
        if self.tokens == "random":
            return Source(name=name, location="random token ids", revision=None, sha256={})
        hashes = {dataset: file.sha256 for dataset, file in self._files.items()}
        return Source(name=f"{name}-real", location=open_mini().location, revision=None, sha256=hashes)

    def requests(self, tokenizer: Any, vocab_size: int, seed: int, count: int) -> list[Request]:
        """Exactly ``count`` requests; see :meth:`.Workload.requests`."""
        prompts: list[tuple[int, ...]]
        if self.tokens == "random":
            prompts = [random_tokens(self.prompt_tokens, vocab_size, seed, index) for index in range(count)]
        else:
            text = self._text(tokenizer)
            prompts = [
                tuple(text[(start + i) % len(text)] for i in range(self.prompt_tokens))
                for start in _starts(len(text), seed, count)
            ]
        return [Request(f"{self.tokens}-{i}", prompt, self.new_tokens) for i, prompt in enumerate(prompts)]

    @cached_property
    def _files(self) -> dict[str, DatasetFile]:
        mini = open_mini()
        return {name: mini.read(name, SPECS[name], None) for name in mini.files}

    def _text(self, tokenizer: Any) -> list[int]:
        """Token ids of every context of longbench-mini, each once: several questions may share one."""
        if tokenizer is None:
            allowed = "this model has no tokenizer; use workload.tokens=random or another model"
            raise InputError("workload.tokens", self.tokens, allowed)
        contexts = dict.fromkeys(row["context"] for file in self._files.values() for row in file.rows)
        return list(tokenizer("\n\n".join(contexts), add_special_tokens=False, verbose=False).input_ids)


def _starts(length: int, seed: int, count: int) -> list[int]:
    """``count`` places in ``[0, length)``, all different while ``count <= length``; more of them move none.

    From a seeded place in steps of the golden section, which lie far apart for any ``count``; a step that has no
    divisor in common with ``length`` comes to every place before it repeats one.
    """
    step = max(1, round(length * (math.sqrt(5) - 1) / 2))
    while math.gcd(step, length) != 1:
        step += 1
    first = int(random.Random(f"{seed}").random() * length)
    return [(first + i * step) % length for i in range(count)]
