"""The contract between a workload and ``runner=efficiency``: token ids in, a number of tokens to generate, no scores.

What a speed or memory measurement needs of a task is lengths; the text matters only in so far as a method looks at it.
"""

from __future__ import annotations

import random
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from ..conf.errors import is_whole, require
from .base import Described


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

    what: ClassVar[str]
    new_tokens: int
    start: int
    most: int | None
    step: int
    tolerance: float

    @abstractmethod
    def at(self, value: int, batch_size: int) -> tuple[Workload, int]:
        """The requests of a size, and how many of them go together; ``batch_size`` as the user set it."""

    def within(self, positions: int) -> int | None:
        """The largest size that a model with so many positions can be asked about; None: any."""
        return None


def check_search(search: Search) -> None:
    """Raise InputError unless the fields of a search make sense."""
    require(is_whole(search.step, 1), "workload.step", search.step, "must be 1 or more")
    least = search.step
    require(is_whole(search.start, least), "workload.start", search.start, f"must be at least workload.step={least}")
    ok = search.most is None or is_whole(search.most, least)
    require(ok, "workload.most", search.most, f"must be null, or at least workload.step={least}")
    ok = isinstance(search.tolerance, int | float) and 0 <= search.tolerance < 1
    require(ok, "workload.tolerance", search.tolerance, "must be a share of the answer, 0 or more and below 1")


def random_tokens(length: int, vocab_size: int, seed: int, index: int) -> tuple[int, ...]:
    """``length`` token ids of request ``index``, uniform in ``[0, vocab_size)``; no id is left out, special or not.

    Seeding with a string and :meth:`random.Random.random` are what Python promises to keep between versions.
    """
    draw = random.Random(f"{seed}:{index}").random
    return tuple(int(draw() * vocab_size) for _ in range(length))


def check_shape(prompt_tokens: Any, new_tokens: Any) -> None:
    """Raise InputError unless these are lengths of a prompt and of an answer, in tokens."""
    require(is_whole(prompt_tokens, 1), "workload.prompt_tokens", prompt_tokens, "must be 1 or more tokens")
    allowed = "must be 2 or more tokens: time per output token needs two"
    require(is_whole(new_tokens, 2), "workload.new_tokens", new_tokens, allowed)
