"""KVzip (Kim et al., 2025, arXiv 2505.23416): keep what the model needs to repeat the prompt, whatever the question.

Section 3. After the prefill, the prompt is given to the model once more, behind the full cache, in chunks of ``chunk``
tokens (:mod:`..repetition`). As in the authors' code, a request to repeat it is before each chunk (:mod:`..request`):
``instruction_first`` before the first one; ``instruction_next`` and the last ``repeated`` tokens of the previous chunk
before the others. Where the prompt is in the model's chat template, the request ends as the user's turn does, so that
the chunk is the model's answer, and what the template has before the user's text is not repeated and always stays.

The score of a token of the chunk is the largest attention weight that it receives from any of the new tokens and any
query head of its group, in a softmax over the tokens before the first chunk, the chunk and the new tokens themselves.
The layers attend over the whole cache meanwhile, and nothing is appended to it. Scores are maxima of attention weights,
comparable between heads and layers (``method/allocator=global``, as published).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ....conf.options import NonNegativeInt, PositiveInt
from ....conf.versions import CURRENT_VERSIONS
from ..own_sinks import ScorerWithSinks
from ..repeated_prompt import Repetition, Repetitions

if TYPE_CHECKING:
    from ..model_layer import ModelLayer
    from ..request import Request

FIRST = "Write down the text above once more, word for word."
NEXT = "Write down the part of the text above once more, word for word, that begins with:"


@dataclass(frozen=True)
class KVzip(ScorerWithSinks):
    """Largest attention from tokens that repeat the prompt.

    Attributes:
        chunk: Prompt tokens that a forward repeats.
        repeated: Last tokens of the previous chunk that are repeated before a chunk.
        sinks: Number of first tokens that are always kept; they take part in each softmax and are not repeated.
        instruction_first: Request before the first chunk, after an empty line; None or empty: none.
        instruction_next: Request before each other chunk, followed by the ``repeated`` tokens.
    """

    id: ClassVar[str] = "KVzip"
    name: ClassVar[str] = "kvzip"
    version: ClassVar[int] = CURRENT_VERSIONS["KVzip"]
    prefill_only: ClassVar[bool] = True
    repeats_prompt: ClassVar[bool] = True
    chunk: PositiveInt = 2000
    repeated: NonNegativeInt = 8
    sinks: NonNegativeInt | None = 4
    instruction_first: str | None = FIRST
    instruction_next: str | None = NEXT

    @property
    def needs(self) -> str:  # type: ignore[override]
        """Forwards, and a tokenizer where there is a request in words."""
        texts = self.instruction_first or self.instruction_next
        return "further forwards over the prompt" + (", and a tokenizer for its request" if texts else "")

    def new_state(self, layer: ModelLayer) -> Request:
        return layer.request(self.instruction_first, self.instruction_next)

    def repetitions(self, length: int, prefix: int | None, state: Request) -> Repetitions:
        reply = () if prefix is None else state.reply
        first = max(self.protected_sinks(), prefix or 0)
        forwards: list[Repetition] = []
        for start in range(min(first, length - 1), length, self.chunk):
            scored, repeated = range(start, min(length, start + self.chunk)), range(0)
            asked = state.first
            if forwards:
                asked, repeated = state.following, range(max(0, start - self.repeated), start)
            forwards.append(Repetition(scored, asked, repeated, reply if asked else ()))
        return Repetitions(self.name, min(first, length), forwards)
