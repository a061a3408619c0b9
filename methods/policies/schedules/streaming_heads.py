"""Evict the oldest of the recent tokens at every decode step, but from no head that keeps the whole prompt.

DuoAttention (arXiv 2410.10819), section 2.3: a streaming head holds the first and the last tokens of all that it has
seen, a retrieval head all of them. So the streaming heads stay as long as the prompt's compression has left them, and
the others grow by every generated token. Heads of a prompt within the budget all keep it whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .ring import Ring


@dataclass(frozen=True)
class StreamingHeads(Ring):
    """A ring of the most recent tokens in each head that lost tokens of the prompt; the other heads grow."""

    id: ClassVar[str] = "streaming_heads"
    bounds_whole_heads = False
