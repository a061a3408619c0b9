"""The contract between a workload and ``runner=efficiency``: token ids in, a number of tokens to generate, no scores.

What a speed or memory measurement needs of a task is lengths; the text matters only in so far as a method looks at it.
"""

from __future__ import annotations

import random
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

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
            count: requests wanted. A workload of one shape gives exactly ``count``, and the first of them do not depend
                on ``count``; a workload that is a sample of a data set (``sharegpt``) has its own size, ``task.limit``,
                and gives that many whatever ``count`` is: the runner cuts it into batches.

        Raises:
            InputError: real text is asked for and there is no tokenizer; the data is missing or too small.
        """


def random_tokens(length: int, vocab_size: int, seed: int, index: int) -> tuple[int, ...]:
    """``length`` token ids of request ``index``, uniform in ``[0, vocab_size)``; no id is left out, special or not.

    Seeding with a string and :meth:`random.Random.random` are what Python promises to keep between versions.
    """
    draw = random.Random(f"{seed}:{index}").random
    return tuple(int(draw() * vocab_size) for _ in range(length))


def check_shape(prompt_tokens: Any, new_tokens: Any) -> None:
    """Raise InputError unless these are lengths of a prompt and of an answer, in tokens."""
    require(is_whole(prompt_tokens, 1), "task.prompt_tokens", prompt_tokens, "must be 1 or more tokens")
    allowed = "must be 2 or more tokens: time per output token needs two"
    require(is_whole(new_tokens, 2), "task.new_tokens", new_tokens, allowed)
