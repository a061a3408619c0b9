"""Copying: a string of symbols, a mark, and the same string again, said from memory.

The hardest test of a compressed cache that has no language in it: every symbol is needed once, none more than another,
and nothing tells which is asked for next. For small models trained on it; after the copying task of Jelassi et al.,
"Repeat After Me" (2024), arXiv 2402.01032, section 2.

The whole second half is generated, so symbols that left the cache are missed where they stood.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..conf.errors import require
from ..conf.options import NonNegativeInt, PositiveInt
from .base import Example, Source, Task, require_fit
from .recall import word_tokenizer
from .training import IGNORED, Tokens, TrainingData

MARK = "="
"""Between the string and its copy; token 1."""


@dataclass
class Copying(Task, TrainingData):
    """Copying.

    Attributes:
        symbols: different ones.
        span: symbols of the string; a sequence has twice as many tokens, and the mark.
        sequences: to evaluate on.
        seed: of the evaluation's strings.
        max_length: prompt tokens that the model may be given; nothing is ever cut.
    """

    id: ClassVar[str] = "Copying"
    name = "copying"

    symbols: PositiveInt = 32
    span: PositiveInt = 32
    sequences: PositiveInt = 64
    seed: NonNegativeInt = 0
    max_length: PositiveInt | None = None

    def source(self) -> Source:
        """Made here: its sha256 is over what it is made by."""
        made_by = f"copying {self.symbols} {self.span} {self.seed} {self.sequences}"
        sha256 = hashlib.sha256(made_by.encode()).hexdigest()
        return Source("copying", "kvbench.tasks.copying", None, {"copying": sha256})

    # as a task -----------------------------------------------------------------------------------------------------

    def examples(self) -> list[Example]:
        """Strings with their mark, to be said again."""
        strings = self._strings(np.random.default_rng([1, self.seed]), self.sequences)
        examples = []
        for i, string in enumerate(strings):
            words = " ".join(self._word(int(token)) for token in string)
            examples.append(Example("copying", f"{i:04d}", f"{words} {MARK}", (words,), self.span, chat=False))
        return examples

    def encode(self, example: Example, tokenizer: Any, max_length: int | None) -> list[int]:
        ids = list(tokenizer(example.prompt, add_special_tokens=False).input_ids)
        require_fit(ids, self.limit_of(max_length), example)
        self._refuse_other_tokens(tokenizer)
        return ids

    def score(self, example: Example, prediction: str) -> float:
        """Share of the string that is right before the first wrong symbol."""
        right = 0
        for ours, theirs in zip(prediction.split(), example.answers[0].split(), strict=False):
            if ours != theirs:
                break
            right += 1
        return right / self.span

    # as training data ----------------------------------------------------------------------------------------------

    def new_tokenizer(self) -> Any:
        """One token for the mark and one for each symbol."""
        return word_tokenizer([MARK, *(self._word(token) for token in range(2, 2 + self.symbols))])

    def sequence_length(self, wanted: int) -> int:
        return 2 * self.span + 1

    def batch(self, tokenizer: Any, step: int, size: int, length: int, seed: int) -> tuple[Tokens, Tokens]:
        return self._sequences(tokenizer, np.random.default_rng([2, seed, step]), size)

    def validation(self, tokenizer: Any, length: int, sequences: int) -> tuple[Tokens, Tokens]:
        return self._sequences(tokenizer, np.random.default_rng([3, self.seed]), sequences)

    def _sequences(self, tokenizer: Any, rng: np.random.Generator, size: int) -> tuple[Tokens, Tokens]:
        """Ids, and labels of the second half alone."""
        self._refuse_other_tokens(tokenizer)
        strings = self._strings(rng, size)
        ids = np.concatenate([strings, np.ones((size, 1), dtype=np.int64), strings], axis=1)
        labels = ids.copy()
        labels[:, : self.span + 1] = IGNORED
        return ids, labels

    def _strings(self, rng: np.random.Generator, count: int) -> Tokens:
        return rng.integers(2, 2 + self.symbols, size=(count, self.span)).astype(np.int64)

    def _refuse_other_tokens(self, tokenizer: Any) -> None:
        """A model whose tokens are not this task's would be asked for what it cannot say."""
        last = 1 + self.symbols
        known = tokenizer.convert_tokens_to_ids([MARK, self._word(last)]) == [1, last]
        allowed = "has no token of its own for each symbol: use model=scratch, or a model trained on copying"
        require(known, "model", type(tokenizer).__name__, allowed)

    def _word(self, token: int) -> str:
        return f"s{token - 2}"
