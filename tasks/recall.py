"""Multi-query associative recall: pairs of a key and a value, then keys again, each to be answered by its value.

After Arora et al., "Zoology" (2023), arXiv 2312.04927: small, sharp and without any download. A sequence of ``length``
tokens begins with pairs ``k v k v ...`` of different keys; then follow keys out of these, each with its value. Recall
needs a head that looks up the token *after* the last place where a key stood, and therefore a layer below it that lets
keys know their predecessors: a map in which all keys and values come from the embeddings cannot learn it.

Training draws the number of pairs from 1 to ``pairs``; evaluation has ``pairs`` of them and asks for the last key of a
sequence. The answer is the first token after the prompt, so a method that compresses after the prompt answers as the
full cache does: this task compares architectures. With ``runner.question=after_compression`` the key that is asked for
comes after compression, and it compares the others too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, ClassVar

import numpy as np

from ..conf.errors import require
from ..conf.options import NonNegativeInt, PositiveInt
from .base import Example, Reply, Source, Task, require_fit
from .training import IGNORED, Tokens, TrainingData

PAD = "<pad>"


def word_tokenizer(words: Sequence[str]) -> Any:
    """A tokenizer with one token for each word, from 1 on, with blanks between them; 0 is :data:`PAD`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([PAD, *words])}, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, unk_token=PAD, padding_side="left")


@dataclass
class Recall(Task, TrainingData):
    """Multi-query associative recall.

    Attributes:
        keys, values: different tokens of each kind.
        pairs: pairs at the beginning.
        length: tokens of a sequence, even.
        sequences: to evaluate on.
        seed: of the evaluation's sequences.
        max_length: prompt tokens that the model may be given; nothing is ever cut.
    """

    id: ClassVar[str] = "Recall"
    name = "recall"

    keys: PositiveInt = 16
    values: PositiveInt = 16
    pairs: PositiveInt = 8
    length: PositiveInt = 64
    sequences: PositiveInt = 256
    seed: NonNegativeInt = 0
    max_length: PositiveInt | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.pairs <= self.keys, "task.pairs", self.pairs, f"must be at most task.keys={self.keys}")
        least = 2 * self.pairs + 2
        allowed = f"must be an even number of tokens >= {least}: the pairs and a question"
        require(self.length >= least and self.length % 2 == 0, "task.length", self.length, allowed)

    def source(self) -> Source:
        """Made here: its sha256 is over what it is made by."""
        made_by = f"recall {self.keys} {self.values} {self.pairs} {self.length} {self.seed} {self.sequences}"
        return Source("recall", "kvbench.tasks.recall", None, {"recall": hashlib.sha256(made_by.encode()).hexdigest()})

    # as a task -----------------------------------------------------------------------------------------------------

    def examples(self) -> list[Example]:
        """One question for each sequence: the key before its last token."""
        rng = np.random.default_rng([1, self.seed])
        examples = []
        for i in range(self.sequences):
            ids, _ = self._sequence(rng, self.pairs)
            words = [self._word(int(token)) for token in ids]
            told = int(np.flatnonzero(ids[:-2] == ids[-2])[-1]) + 1  # where the answer was given last
            example = Example("recall", f"{i:04d}", " ".join(words[:-1]), (words[-1],), 1, chat=False)
            examples.append(replace(example, question=words[-2], meta={"distance": self.length - 2 - told}))
        return examples

    def encode(self, example: Example, tokenizer: Any, max_length: int | None) -> list[int]:
        ids = list(tokenizer(example.prompt, add_special_tokens=False).input_ids)
        require_fit(ids, self.limit_of(max_length), example)
        known = len(ids) == self.length - 1 and getattr(tokenizer, "unk_token_id", None) not in ids
        allowed = "has no token of its own for each key and value: use a model trained on recall, such as model=tiny"
        require(known, "model", type(tokenizer).__name__, allowed)
        return ids

    def score(self, example: Example, prediction: str) -> float:
        return float(prediction.strip() == example.answers[0])

    def judge(self, example: Example, prediction: Any, reply: Reply | None, reference: Reply | None) -> dict[str, Any]:
        """The score, and how many tokens back the answer was given last."""
        return {"score": self.score(example, prediction), "distance": example.meta["distance"]}

    def conclude(self, rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Percent of right answers by how many tokens back the answer was given last: up to 8, up to 16 and so on."""
        scores: dict[int, list[float]] = {}
        for row in (row for row in rows if "distance" in row):  # a run that was begun by older code has rows without
            scores.setdefault(max(8, 1 << (row["distance"] - 1).bit_length()), []).append(row["score"])
        ends = sorted(scores)
        accuracy = [100 * fmean(scores[end]) for end in ends]
        counts = [len(scores[end]) for end in ends]
        return {"accuracy_by_distance": {"up_to_tokens": ends, "accuracy": accuracy, "n": counts}}, {}

    # as training data ----------------------------------------------------------------------------------------------

    def new_tokenizer(self) -> Any:
        """One token for each key and each value, with blanks between them."""
        return word_tokenizer([self._word(i) for i in range(1, 1 + self.keys + self.values)])

    def sequence_length(self, wanted: int) -> int:
        return self.length

    def batch(self, tokenizer: Any, step: int, size: int, length: int, seed: int) -> tuple[Tokens, Tokens]:
        self._refuse_other_tokens(tokenizer)
        rng = np.random.default_rng([2, seed, step])
        made = [self._sequence(rng, int(rng.integers(1, self.pairs + 1))) for _ in range(size)]
        return np.stack([ids for ids, _ in made]), np.stack([labels for _, labels in made])

    def validation(self, tokenizer: Any, length: int, sequences: int) -> tuple[Tokens, Tokens]:
        self._refuse_other_tokens(tokenizer)
        rng = np.random.default_rng([3, self.seed])
        made = [self._sequence(rng, self.pairs) for _ in range(sequences)]
        return np.stack([ids for ids, _ in made]), np.stack([labels for _, labels in made])

    def _refuse_other_tokens(self, tokenizer: Any) -> None:
        """A model whose tokens are not this task's would learn numbers that it cannot be asked for."""
        last = self.keys + self.values
        known = tokenizer.convert_tokens_to_ids([self._word(1), self._word(last)]) == [1, last]
        allowed = "has no token of its own for each key and value: use model=scratch, or a model trained on recall"
        require(known, "model", type(tokenizer).__name__, allowed)

    def _sequence(self, rng: np.random.Generator, pairs: int) -> tuple[Tokens, Tokens]:
        """Ids (1 .. keys are keys, values follow) and labels, of the answers alone."""
        keys = 1 + rng.permutation(self.keys)[:pairs]
        values = 1 + self.keys + rng.integers(self.values, size=pairs)
        asked = rng.integers(pairs, size=self.length // 2 - pairs)
        order = np.concatenate([np.arange(pairs), asked])
        ids = np.stack([keys[order], values[order]], axis=1).reshape(-1).astype(np.int64)
        labels = np.full_like(ids, IGNORED)
        labels[2 * pairs + 1 :: 2] = ids[2 * pairs + 1 :: 2]
        return ids, labels

    def _word(self, token: int) -> str:
        return f"k{token - 1}" if token <= self.keys else f"v{token - 1 - self.keys}"
