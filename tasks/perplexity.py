"""Perplexity of a text when what came before is compressed.

A stretch of the text is read as a prompt and compressed; the tokens behind it are then scored through what is left.
``protocol=sliding``: many stretches over the whole text, ``chunk`` tokens scored behind ``context`` tokens each, all at
once. ``protocol=streaming``: ``chunk`` is long and the tokens come as in decoding, so that methods whose tokens leave
while decoding keep their budget to the end, and the others' caches grow: the setting of StreamingLLM (Xiao et al.,
2024, arXiv 2309.17453, section 4.1). The two differ in what is usual, not in how they are computed.

With the full cache the sliding protocol gives the perplexity of a forward over each stretch. Every scored token has
``context`` tokens before it or more; the loss by distance from the compressed context is kept as well.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, ClassVar

from ..conf.errors import InputError, require
from ..conf.options import Bounds, OneOf, PositiveInt
from .base import NATS, Continuations, Example, Likelihood, Source, Task
from .hub import fetch_or_refuse

HUB_REPO = "Salesforce/wikitext"
HUB_REVISION = "b08601e04326c79dfdd32d625aee71d232d685c3"
HUB_FILE = "wikitext-2-raw-v1/test-00000-of-00001.parquet"
WIKITEXT_SHA256 = "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"
"""Of ``wiki.test.raw`` as published (1,290,590 bytes)."""

PROTOCOLS = {"sliding": 512, "streaming": 4096}
"""And the tokens that are scored behind one context, where ``task.chunk`` does not say."""

BUCKETS = 16
"""Parts of a chunk whose mean loss is kept."""


@dataclass
class Perplexity(Task):
    """Perplexity of a text.

    Attributes:
        path: text file, gzipped or not; None: the test part of wikitext-2, from the hub.
        protocol: ``sliding`` or ``streaming``, see the module docstring.
        context: tokens read and compressed first.
        chunk: tokens scored behind them; None: 512 sliding, 4096 streaming.
        stretches: number of stretches of the text, evenly spaced.
        max_length: tokens of a stretch that the model may be given; a longer one is an error.
    """

    id: ClassVar[str] = "Perplexity"
    name = "perplexity"
    unit = NATS
    writes = False
    shown = ("context", "chunk", "stretches")
    location_fields = ("path",)

    path: str | None = None
    protocol: Annotated[str, OneOf(PROTOCOLS)] = "sliding"
    context: Annotated[int, Bounds(ge=2)] = 1536
    chunk: PositiveInt | None = None
    stretches: PositiveInt = 64
    max_length: PositiveInt | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunk is None:
            self.chunk = PROTOCOLS[self.protocol]
        self._tokenised: tuple[Any, list[int]] | None = None

    def source(self) -> Source:
        """``perplexity-`` and the protocol; for the user's text, behind it the first 6 digits of its sha256."""
        sha256 = hashlib.sha256(self._text.encode()).hexdigest()
        name = f"{self.name}-{self.protocol}"
        if sha256 == WIKITEXT_SHA256:
            return Source(name, self.path or f"{HUB_REPO}/{HUB_FILE}", HUB_REVISION, {"wikitext-2": sha256})
        assert self.path is not None
        return Source(f"{name}-{sha256[:6]}", self.path, None, {"text": sha256})

    def examples(self) -> list[Example]:
        """One for each stretch; ``meta["part"]`` is where it begins, in [0, 1]."""
        (dataset,) = self.source().sha256
        parts = [i / max(1, self.stretches - 1) for i in range(self.stretches)]
        return [
            Example(dataset, f"{i:05d}", "", (), 0, chat=False, meta={"part": part}) for i, part in enumerate(parts)
        ]

    def encode(self, example: Example, tokenizer: Any, max_length: int | None) -> list[Continuations]:
        """The stretch's context, but for its last token, and the chunk behind it.

        That last token is fed after compression: what is scored has seen the compressed cache alone. Where the
        tokenizer begins a text with a token of its own, so does every stretch.

        Raises:
            InputError: the stretch is longer than the model takes, or the text shorter than the stretches with chunks
                of their own.
        """
        assert self.chunk is not None
        ids = self._ids(tokenizer)
        begin = list(tokenizer("").input_ids)
        room, length = self.context - len(begin), self.context + self.chunk
        limit = self.limit_of(max_length)
        if limit is not None and length > limit:
            allowed = f"and task.chunk={self.chunk} are {length} tokens, and the model takes {limit}; use fewer"
            raise InputError("task.context", self.context, allowed)
        most = (len(ids) - room) // self.chunk
        allowed = f"has {len(ids)} tokens, too few for task.context={self.context} and task.chunk={self.chunk}"
        require(most > 0, "task.path", self.path or "wikitext-2", allowed)
        allowed = f"must be at most {most}: the text has {len(ids)} tokens, and no chunk shall be scored twice"
        require(self.stretches <= most, "task.stretches", self.stretches, allowed)
        start = round(example.meta["part"] * (len(ids) - room - self.chunk))
        stretch = [*begin, *ids[start : start + room + self.chunk]]
        cut = self.context - 1
        return [Continuations(stretch[:cut], ((stretch[cut : cut + 1], stretch[cut + 1 :]),))]

    def read_off(self, example: Example, likelihoods: Sequence[Likelihood]) -> list[float]:
        """Mean loss of each of up to :data:`BUCKETS` parts of the chunk, by distance from the context."""
        losses = [-x for x in likelihoods[0].log_probs]
        ends = _ends(len(losses))
        return [fmean(losses[a:b]) for a, b in zip([0, *ends], ends, strict=False)]

    def score(self, example: Example, prediction: list[float]) -> float:
        """Mean loss of the chunk, in nats per token."""
        assert self.chunk is not None
        ends = _ends(self.chunk)
        sizes = [b - a for a, b in zip([0, *ends], ends, strict=False)]
        return sum(mean * size for mean, size in zip(prediction, sizes, strict=True)) / self.chunk

    def conclude(self, rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Perplexity by distance: mean over stretches for each part of the chunk."""
        assert self.chunk is not None
        means = [fmean(part) for part in zip(*(row["prediction"] for row in rows), strict=True)]
        return {"by_distance": {"up_to_tokens": _ends(self.chunk), "nats": means}}, {}

    def _ids(self, tokenizer: Any) -> list[int]:
        if self._tokenised is None or self._tokenised[0] is not tokenizer:
            ids = tokenizer(self._text, add_special_tokens=False, truncation=False, verbose=False).input_ids
            self._tokenised = tokenizer, list(ids)
        return self._tokenised[1]

    @cached_property
    def _text(self) -> str:
        if self.path is None:
            return _wikitext()
        file = Path(self.path).expanduser()
        there = "it is a folder" if file.is_dir() else "it does not exist"
        require(file.is_file(), "task.path", self.path, f"must be a text file; {there}")
        try:
            data = file.read_bytes()
            text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8-sig")
        except (UnicodeDecodeError, OSError, EOFError, zlib.error) as error:
            raise InputError("task.path", self.path, f"must be UTF-8 text: {error}") from None
        require(text.strip() != "", "task.path", self.path, "must hold text; it is empty")
        return text


def _ends(size: int) -> list[int]:
    """Where the parts of a chunk of ``size`` tokens end."""
    count = min(BUCKETS, size)
    return [size * (i + 1) // count for i in range(count)]


def _wikitext() -> str:
    """The test part of wikitext-2 from the hub."""
    import pandas as pd

    how = {"what": "wikitext-2", "key": "task.path", "instead": "give a text file as task.path"}
    file, _ = fetch_or_refuse((HUB_REPO,), HUB_FILE, HUB_REVISION, **how)
    text = "".join(line or " \n" for line in pd.read_parquet(file)["text"])  # the hub's blank lines have lost theirs
    found = hashlib.sha256(text.encode()).hexdigest()
    require(found == WIKITEXT_SHA256, str(file), found, f"the sha256 must be {WIKITEXT_SHA256}; delete the file")
    return text
