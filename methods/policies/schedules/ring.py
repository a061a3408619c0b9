"""Evict the oldest of the recent tokens at every decode step; what the prompt's compression kept before them stays.

SnapStream (arXiv 2511.03092): the cache holds the tokens that a scorer has chosen from the prompt, and a ring of the
last ``method.recent`` tokens, in which each generated token takes the place of the oldest one. A prompt shorter than
the budget fills the free slots first. No token is scored while decoding, so that a step costs no more than attention
over the budget, and no queries are stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import Schedule


@dataclass(frozen=True)
class Ring(Schedule):
    """A ring of the most recent tokens after the tokens that the prompt's compression has kept."""

    id: ClassVar[str] = "ring"
    evicts_by = "age"

    @property
    def interval(self) -> int:
        return 1
