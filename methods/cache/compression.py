"""Callbacks before and after the compression of a prompt, to measure its time.

Compression is what follows a prompt's attention: scoring its tokens, choosing those to keep, and storing them. The full
cache stores all of them. Where tokens leave within the prompt's attention there is no such part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

Mark = Callable[[torch.device], None]
"""Called with the device of the prompt's keys before and after each compression, in turn."""

_marks: list[Mark] = []


@contextmanager
def marked_by(mark: Mark) -> Iterator[None]:
    """Call ``mark`` around every :func:`compression` within the block."""
    _marks.append(mark)
    try:
        yield
    finally:
        _marks.remove(mark)


@contextmanager
def compression(device: torch.device) -> Iterator[None]:
    """Call all marks before and after the compression of one layer's prompt, or of all layers' prompts; not nested."""
    for mark in _marks:
        mark(device)
    try:
        yield
    finally:
        for mark in _marks:
            mark(device)
