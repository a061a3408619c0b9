"""How a layer reads a prompt: full causal attention over all of it, then one call with the whole prompt in view.

A layer attends over the complete keys and values of the prompt and only then compresses its own copy, so the first
generated token is exactly the full cache's, and any number of methods can ride on one reading (``fan_out.py``).
The prompt may arrive in chunks; the selection still sees it whole. Left padding ends here: rows are cut to their real
tokens before attention and before any method looks at them, so no method can score, keep or attend to a pad.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from ..conf.errors import InputError
from .attention import causal_attention


@dataclass(frozen=True)
class Rows:
    """Rows of a batch that have the same number of leading pads.

    Attributes:
        pads: leading pad columns of these rows.
        index: row numbers [R], or None for the whole batch.
    """

    pads: int
    index: torch.Tensor | None

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """These rows of a batch-first tensor."""
        return x if self.index is None else x[self.index]


@dataclass(frozen=True)
class Prompt:
    """The whole prompt as one layer sees it, for rows of equal length, without pads.

    Attributes:
        query: [R, H_q, W, D], the queries of the last W tokens, after RoPE; W is what the selection asked for as
            ``observation_window``, or the prompt's length if that is shorter.
        keys, values: [R, H_kv, T, D], keys after RoPE.
        scaling: factor on the logits.
        layer_idx, num_layers: which layer of how many.
        found: what has been worked out about this prompt; methods that read it together share it (:meth:`once`).
    """

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    scaling: float
    layer_idx: int
    num_layers: int
    found: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict, compare=False, repr=False)

    def once(self, what: str, work_out: Callable[[Prompt], torch.Tensor]) -> torch.Tensor:
        """``work_out(self)``, computed for the first that asks; not to be changed in place.

        Args:
            what: its name; with the number of queries in view, it must say all that the result depends on.
        """
        key = (what, self.query.shape[2])
        if key not in self.found:
            self.found[key] = work_out(self)
        return self.found[key]

    def last_queries(self, window: int) -> Prompt:
        """The same prompt with fewer queries in view."""
        query = self.query[:, :, max(0, self.query.shape[2] - window) :]
        return replace(self, query=query)

    @property
    def length(self) -> int:
        """T, tokens."""
        return self.keys.shape[2]

    @property
    def groups(self) -> int:
        """Query heads per KV head."""
        return self.query.shape[1] // self.keys.shape[1]


class PromptReader(ABC):
    """A layer while it reads the prompt, chunk by chunk.

    Args:
        layer_idx, num_layers: which layer of how many.
        observation_window: how many of the prompt's last queries :meth:`absorb` needs.
    """

    def __init__(self, layer_idx: int, num_layers: int, observation_window: int):
        self.layer_idx, self.num_layers = layer_idx, num_layers
        self.observation_window = observation_window
        self.seen = 0  # columns fed so far, pads included
        self.reading = True
        self._keys: torch.Tensor | None = None  # [B, H_kv, prompt length, D] while a chunked prompt is read
        self._values: torch.Tensor | None = None
        self._queries: torch.Tensor | None = None

    @abstractmethod
    def names(self) -> str:
        """The methods that read here, for an error."""

    @abstractmethod
    def absorb(self, prompts: list[tuple[Rows, Prompt]]) -> None:
        """Take the whole prompt: compress it and keep what is kept. Called once, with all rows of the batch."""

    def read_prompt(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        rows: list[Rows],
        prompt_length: int | None,
    ) -> torch.Tensor:
        """Attend over the prompt so far; with its last chunk, absorb it.

        Args:
            query: [B, H_q, n, D], key and value: [B, H_kv, n, D], of this chunk.
            scaling: factor on the logits.
            rows: the batch, grouped by leading pads.
            prompt_length: columns of the whole prompt, or None: this chunk is all of it.

        Returns:
            [B, H_q, n, D]; zero where the query is a pad.
        """
        start, end = self.seen, self.seen + query.shape[2]
        whole = end if prompt_length is None else prompt_length
        keys, values = self._collect(key, value, start, end, whole)
        out = torch.zeros_like(query) if len(rows) > 1 or rows[0].pads else None
        for r in rows:
            first = max(r.pads, start)  # column of the first real query of this chunk
            if first >= end:
                continue
            attended = causal_attention(
                r.take(query)[:, :, first - start :],
                r.take(keys)[:, :, r.pads :],
                r.take(values)[:, :, r.pads :],
                scaling,
            )
            if out is None:
                out = attended
            else:
                out[slice(None) if r.index is None else r.index, :, first - start :] = attended
        assert out is not None
        self.seen = end
        tail = query if self._queries is None else torch.cat([self._queries, query], dim=2)
        self._queries = tail[:, :, max(0, tail.shape[2] - self.observation_window) :]
        if end >= whole:
            self.reading = False
            queries, self._keys, self._values, self._queries = self._queries, None, None, None
            self._refuse_what_is_not_finite(keys, values)
            self.absorb([(r, self._view(r, queries, keys, values, scaling)) for r in rows])
        return out

    def _refuse_what_is_not_finite(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """One NaN would win every vote and stay, and the text would be garbage without a word."""
        total = keys.sum(dtype=torch.float32) + values.sum(dtype=torch.float32)
        if not bool(total.isfinite()):
            raise InputError(
                "model",
                f"layer {self.layer_idx}",
                f"gave {self.names()} keys or values that are NaN or infinite; try dtype=float32",
            )

    def _view(self, r: Rows, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float) -> Prompt:
        keys, values, queries = (r.take(x) for x in (keys, values, queries))
        keys, values = keys[:, :, r.pads :], values[:, :, r.pads :]
        queries = queries[:, :, max(0, queries.shape[2] - keys.shape[2]) :]
        return Prompt(queries, keys, values, scaling, self.layer_idx, self.num_layers)

    def _collect(
        self, key: torch.Tensor, value: torch.Tensor, start: int, end: int, whole: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of columns 0 .. end - 1; a prompt that comes in one piece is not copied."""
        if start == 0 and end == whole:
            return key, value
        if self._keys is None or self._values is None:
            shape = (key.shape[0], key.shape[1], whole, key.shape[3])
            self._keys, self._values = key.new_empty(shape), value.new_empty(shape)
        self._keys[:, :, start:end] = key
        self._values[:, :, start:end] = value
        return self._keys[:, :, :end], self._values[:, :, :end]
