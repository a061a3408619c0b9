"""Strings and tokens at which a reply ends."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from ..models.base import LoadedModel


def stops(tokens: Sequence[int], strings: Sequence[str], tokenizer: Any) -> bool:
    """Return whether the text of the tokens contains one of the strings, possibly completed by the last token.

    The whole text is decoded only if the last few tokens contain a string. A string that ends with the last token began
    at most as many tokens before as it has bytes, because a visible token has at least one byte. If the first of these
    tokens is inside a character their text may be invalid, so they are decoded from four positions.
    """
    hidden = set(tokenizer.all_special_ids)
    count = 4 + max((len(string.encode()) for string in strings), default=0)
    visible = list(itertools.islice((t for t in reversed(tokens) if t not in hidden), count))[::-1]

    def contains_string(ids: Sequence[int]) -> bool:
        text = tokenizer.decode(ids, skip_special_tokens=True)
        return any(string in text for string in strings)

    return any(contains_string(visible[k:]) for k in range(4)) and contains_string(tokens)


def stop_ids(loaded: LoadedModel, stop_tokens: Sequence[str]) -> list[int]:
    """Return the ids that end a generation: the model's end-of-sequence ids and the last token of each stop token."""
    assert loaded.tokenizer is not None
    own = loaded.model.generation_config.eos_token_id
    ids = set(own if isinstance(own, list) else [own]) | {loaded.tokenizer.eos_token_id}
    for text in stop_tokens:
        ids.add(loaded.tokenizer.encode(text, add_special_tokens=False)[-1])
    return sorted(i for i in ids if i is not None)
