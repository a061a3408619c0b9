"""KVzip (Kim et al., 2025, arXiv 2505.23416): keep what the model needs to repeat the prompt, whatever the question.

Section 3. After the prefill, the prompt is given to the model once more, behind the full cache, in chunks of ``chunk``
tokens (:mod:`..repetition`). Each forward begins with ``instruction`` and the last ``repeated`` tokens of the previous
chunk. The score of a token of the chunk is the largest attention weight that it receives from any of the repeated
tokens and any query head of its group, in a softmax over the first ``sinks`` tokens, the chunk and the repeated tokens
themselves. The layers attend over the whole cache meanwhile, and nothing is appended to it.

Scores are maxima of attention weights, comparable between heads and layers (``method/allocator=global``, as
published). The authors precede the chunks by a request in words, to repeat the context. A cache knows token ids only,
so that ``instruction`` is a list of ids, empty by default.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ....conf.options import NonNegativeInt, PositiveInt
from .base import Scorer


@dataclass(frozen=True)
class Repetition:
    """A forward after the prefill that gives tokens of the prompt to the model again (:mod:`..repetition`).

    Attributes:
        tokens: Positions of the tokens that are repeated.
        scored: Positions of the tokens that are scored by it.
        instruction: Token ids before the repeated ones.
    """

    tokens: range
    scored: range
    instruction: Sequence[int] = ()


@dataclass(frozen=True)
class KVzip(Scorer):
    """Largest attention from tokens that repeat the prompt.

    Attributes:
        chunk: Prompt tokens that a forward repeats.
        repeated: Last tokens of the previous chunk with which a forward begins.
        sinks: Number of first tokens that are always kept; they take part in each softmax and are not repeated.
        instruction: Token ids with which a forward begins.
    """

    id: ClassVar[str] = "KVzip"
    name: ClassVar[str] = "kvzip"
    prefill_only: ClassVar[bool] = True
    repeats_prompt: ClassVar[bool] = True
    chunk: PositiveInt = 2000
    repeated: NonNegativeInt = 8
    sinks: NonNegativeInt = 4
    instruction: Sequence[NonNegativeInt] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "instruction", tuple(self.instruction))

    def protected_sinks(self) -> int:
        return self.sinks

    def repetitions(self, length: int) -> list[Repetition]:
        out: list[Repetition] = []
        for start in range(min(self.sinks, length - 1), length, self.chunk):
            end = min(length, start + self.chunk)
            first = max(0, start - self.repeated) if out else start
            out.append(Repetition(range(first, end), range(start, end), self.instruction))
        return out
