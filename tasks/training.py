"""The contract between data and ``runner=train``: batches by step number, so that a run goes on where it stopped.

A batch depends on the seed and the number of the step alone. Labels are those of transformers: the token at each
position, to be predicted from those before it, and :data:`IGNORED` where a prediction is not asked for.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .base import Described

IGNORED = -100

Tokens = NDArray[np.int64]


class TrainingData(Described):
    """Data to train on, with some held out."""

    @abstractmethod
    def new_tokenizer(self) -> Any:
        """The tokenizer of a model that is trained on this from scratch (transformers' kind)."""

    @abstractmethod
    def sequence_length(self, wanted: int) -> int:
        """Tokens of a sequence, where ``wanted`` are asked for and the task has no length of its own."""

    @abstractmethod
    def batch(self, tokenizer: Any, step: int, size: int, length: int, seed: int) -> tuple[Tokens, Tokens]:
        """(ids, labels) [size, length] of one optimizer step.

        Raises:
            InputError: there is less text than one sequence.
        """

    @abstractmethod
    def validation(self, tokenizer: Any, length: int, sequences: int) -> tuple[Tokens, Tokens]:
        """(ids, labels) [at most ``sequences``, length] that no batch holds; always the same."""
