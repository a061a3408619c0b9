"""The contract between a workload and ``runner=efficiency``: token ids in, a number of tokens to generate, no scores.

What a speed or memory measurement needs of a task is lengths; the text matters only in so far as a method looks at it.
"""

from __future__ import annotations

import random
from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from ..conf.errors import require
from ..conf.options import Bounds, PositiveInt, Wording
from .base import Described

NewTokens = Annotated[int, Bounds(ge=2), Wording("a whole number of tokens >= 2: time per output token needs two")]


@dataclass(frozen=True)
class Request:
    """One prompt and the length of its answer.

    Attributes:
        id: unique among the requests of a run.
        prompt: token ids, ``(prompt_tokens,)``, without padding.
        new_tokens: tokens to generate, 1 or more; an end-of-sequence token does not stop the generation.
    """

    id: str
    prompt: tuple[int, ...]
    new_tokens: int


class Workload(Described):
    """Requests to measure: see the module docstring."""

    key_prefix: ClassVar[str] = "workload."

    @abstractmethod
    def requests(self, tokenizer: Any, vocab_size: int, seed: int, count: int) -> list[Request]:
        """The requests, in a fixed order; the same arguments give the same requests on every machine.

        Args:
            tokenizer: a transformers tokenizer, or None for a model that has none (random weights).
            vocab_size: random token ids are below it.
            seed: of everything that is drawn.
            count: number of requests. A workload of one shape returns exactly ``count``, and the first of them do not
                depend on ``count``; a sample of a data set (``sharegpt``) has a size of its own, ``workload.limit``,
                and ignores ``count``: the runner splits it into batches.

        Raises:
            InputError: real text is asked for and there is no tokenizer; the data is missing or too small.
        """


class Search(Described):
    """A workload whose size is the answer: the largest that fits into memory.

    Attributes:
        what: what is varied, ``batch_size`` or ``prompt_tokens``.
        start: the first size to try; it is doubled for as long as it fits.
        most: never try more; None: until memory or the model's positions end it.
        step: sizes are multiples of it.
        tolerance: share of the answer that it may be too small by; 0: exact to the step.
        new_tokens: to generate for each request.
    """

    key_prefix: ClassVar[str] = "workload."

    what: ClassVar[str]
    new_tokens: NewTokens
    start: PositiveInt
    most: PositiveInt | None
    step: PositiveInt
    tolerance: Annotated[float, Bounds(ge=0, lt=1)]

    def __post_init__(self) -> None:
        super().__post_init__()
        least = self.step
        require(self.start >= least, "workload.start", self.start, f"must be at least workload.step={least}")
        is_allowed = self.most is None or self.most >= least
        require(is_allowed, "workload.most", self.most, f"must be null, or at least workload.step={least}")

    @abstractmethod
    def at(self, value: int, batch_size: int) -> tuple[Workload, int]:
        """The requests of a size, and how many of them go together; ``batch_size`` as the user set it."""

    def within(self, positions: int) -> int | None:
        """The largest size that a model with so many positions can be asked about; None: any."""
        return None


def random_tokens(length: int, vocab_size: int, seed: int, index: int) -> tuple[int, ...]:
    """``length`` token ids of request ``index``, uniform in ``[0, vocab_size)``; no id is left out, special or not.

    Seeding with a string and :meth:`random.Random.random` are what Python promises to keep between versions.
    """
    draw = random.Random(f"{seed}:{index}").random
    return tuple(int(draw() * vocab_size) for _ in range(length))
