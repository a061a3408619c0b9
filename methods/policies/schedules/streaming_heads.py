"""Evict the oldest of the recent tokens at every decode step, but from no head that keeps the whole prompt.

DuoAttention (arXiv 2410.10819), section 2.3: a streaming head holds the first and the last tokens of all that it has
seen, a retrieval head all of them. So the number of tokens in a streaming head is constant from the compression of the
prompt on, and the others grow by every generated token. The one head that keeps a part of the prompt, where the budget
ends, is a streaming head with more first tokens. Heads of a prompt within the budget all keep it whole and grow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .ring import Ring


@dataclass(frozen=True)
class StreamingHeads(Ring):
    """A ring of the most recent tokens in each head that lost tokens of the prompt; the other heads grow."""

    id: ClassVar[str] = "streaming_heads"
    evicts_from_whole_heads = False
