"""Uniform allocation: every layer and head keeps the same number of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import Allocator


@dataclass(frozen=True)
class Uniform(Allocator):
    """The same budget everywhere."""

    id: ClassVar[str] = "uniform"
