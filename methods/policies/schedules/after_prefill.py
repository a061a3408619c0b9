"""Compress the prompt once and keep every generated token (the protocol of SnapKV, kvpress and KVCache-Factory)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import Schedule


@dataclass(frozen=True)
class AfterPrefill(Schedule):
    """One eviction, after the prefill."""

    id: ClassVar[str] = "after_prefill"

    @property
    def interval(self) -> None:
        return None
