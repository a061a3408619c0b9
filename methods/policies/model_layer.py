"""A layer of the model as policies and scorers see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from .request import Request, request_of

if TYPE_CHECKING:
    from ..cache.rotary import Rotary

WITHOUT_TOKENIZER = partial(request_of, None)


@dataclass(frozen=True)
class ModelLayer:
    """The layer of the model that a policy works on.

    Attributes:
        index: Index in the model.
        place: Index among the layers that the method works on.
        count: Number of layers that the method works on.
        rotary: Returns the RoPE rotation of the keys, measured on the first call; raises InputError if there is none.
        output_weights: Returns the output projections [H_q, D, hidden] of the layers of the model that attend over the
            keys, one per query head, such that the output is the sum of ``head @ weight``; raises InputError if there
            are none.
        request: Encodes a request in words (:func:`.request.request_of`); raises InputError if there is no tokenizer.
    """

    index: int
    place: int
    count: int
    rotary: Callable[[], Rotary]
    output_weights: Callable[[], list[torch.Tensor]] = list
    request: Callable[[str | None, str | None], Request] = WITHOUT_TOKENIZER

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelLayer:
        """Return self: copies of a cache belong to the same model."""
        return self
