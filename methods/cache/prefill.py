"""How a layer reads a prompt: full causal attention over all of it, then one call with the whole prompt in view.

A layer attends over the complete keys and values of the prompt and only then compresses its own copy, so the first
generated token is exactly the full cache's, and any number of methods can share one prefill (``fan_out.py``).
The prompt may arrive in chunks; the policy still sees it whole. Left padding ends here: rows are cut to their real
tokens before attention and before any method looks at them, so no method can score, keep or attend to a pad.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from ...conf.errors import InputError
from ..sharing.plan import KVAccess, Span
from .forward import LayerCall, NewTokens, Rows
from .logits import LogitRule
from .products import causal_attention
from .prompt import Prompt


class PrefillLayer(ABC):
    """A layer while it reads the prompt, chunk by chunk.

    Args:
        layer_idx, num_layers: which layer of how many.
        observation_window: how many of the prompt's last queries :meth:`finish_prefill` needs.
        span: the tokens that each token sees; None: all before it.
    """

    def __init__(self, layer_idx: int, num_layers: int, observation_window: int, span: Span | None = None):
        self.layer_idx, self.num_layers = layer_idx, num_layers
        self.model_layer = layer_idx  # the same, counted among all layers of the model
        self.observation_window, self.span = observation_window, span
        self.is_finite: torch.Tensor | None = None  # bool, of a prompt's keys and values; looked at after the prefill
        self.seen = 0  # columns fed so far, pads included
        self.in_prefill = True
        self._keys: torch.Tensor | None = None  # [B, H_kv, prompt length, D] while a chunked prompt is read
        self._values: torch.Tensor | None = None
        self._written = 0  # columns put down
        self._queries: list[torch.Tensor] = []  # of each layer that comes here, in turn
        self._strict: list[bool] = []
        self._turn = 0  # which of them comes now

    @abstractmethod
    def names(self) -> str:
        """The methods that read here, for an error."""

    @abstractmethod
    def finish_prefill(self, prompts: list[tuple[Rows, Prompt]]) -> None:
        """Take the whole prompt: compress it and keep what is kept. Called once, with all rows of the batch."""

    def prefill(self, call: LayerCall, new: NewTokens, use: KVAccess) -> torch.Tensor:
        """Attend over the prompt so far; with its last chunk and last use, compress it.

        Args:
            call: Of this chunk; its keys and values are attended over after those of the chunks before.
            new: The batch grouped by leading pads, and the columns of the whole prompt.
            use: What this layer of the model does here.

        Returns:
            [B, H_q, m, D]; zero where the query is a pad.
        """
        start, end = self.seen, self.seen + call.columns
        whole = end if new.prompt_length is None else new.prompt_length
        if use.is_owner and call.new_kv is None:
            self._collect(call.key, call.value, start, end, whole)
        keys, values = self._so_far(call, start, end, use)
        if use.is_owner and call.new_kv is not None:
            self._collect(*call.new_kv, start, end, whole)
        out = self._attend_rows(call, keys, values, new.rows, use.strictly_causal)
        if use.is_final_pass:
            self._note_queries(call.query, use.strictly_causal)
        if use.is_last_reader and use.is_final_pass:
            self.seen, self._turn = end, 0
            if end >= whole:
                self.seen = new.columns_seen or end
                self._finish(call.rule, new.rows)
        return out

    def _so_far(self, call: LayerCall, start: int, end: int, use: KVAccess) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all columns up to ``end``, the new ones as given."""
        key, value = call.key, call.value
        if start == 0:
            return key, value
        assert self._keys is not None and self._values is not None
        if (
            self._written == end and not use.strictly_causal and use.is_final_pass
        ):  # the new ones have been put down as given
            return self._keys[:, :, :end], self._values[:, :, :end]
        return torch.cat([self._keys[:, :, :start], key], dim=2), torch.cat([self._values[:, :, :start], value], dim=2)

    def _attend_rows(
        self, call: LayerCall, keys: torch.Tensor, values: torch.Tensor, rows: list[Rows], strict: bool
    ) -> torch.Tensor:
        """Attention over all columns of ``keys`` [B, H_kv, T, D], each group of rows without its pads."""
        query, end = call.query, keys.shape[2]
        start = end - query.shape[2]  # column of the first query
        shape = (*query.shape[:3], values.shape[3])
        out = query.new_zeros(shape) if len(rows) > 1 or rows[0].pads else None
        for r in rows:
            first = max(r.pads, start)  # column of the first real query
            if first >= end:
                continue
            attended = causal_attention(
                r.take(query)[:, :, first - start :],
                r.take(keys)[:, :, r.pads :],
                r.take(values)[:, :, r.pads :],
                call.rule,
                strict,
                self.span,
            )
            if out is None:
                out = attended
            else:
                out[slice(None) if r.index is None else r.index, :, first - start :] = attended
        assert out is not None
        return out

    def _note_queries(self, query: torch.Tensor, strict: bool) -> None:
        """Remember the last queries of the layer whose turn it is."""
        if self._turn == len(self._queries):
            self._queries.append(query)
            self._strict.append(strict)
        else:
            self._queries[self._turn] = torch.cat([self._queries[self._turn], query], dim=2)
        tail = self._queries[self._turn]
        self._queries[self._turn] = tail[:, :, max(0, tail.shape[2] - self.observation_window) :]
        self._turn += 1

    def _finish(self, rule: LogitRule, rows: list[Rows]) -> None:
        """The prompt is in: hand it over."""
        keys, values, queries = self._keys, self._values, self._queries
        assert keys is not None and values is not None
        self.in_prefill, self._keys, self._values, self._queries = False, None, None, []
        query, strictly_causal = queries[0], None
        if len(queries) > 1:
            if rule.sinks is not None:
                raise InputError("model", f"layer {self.model_layer}", "shares keys and values and has attention sinks")
            if len({q.shape[2] for q in queries}) > 1:
                raise InputError(
                    "model.generate",
                    self.names(),
                    "needs the prompt's last queries of every layer, and this model leaves some out of the layers that "
                    "share keys; use kvbench.runners.engine.generate",
                )
            heads = keys.shape[1]
            grouped = [q.unflatten(1, (heads, -1)) for q in queries]  # [B, H_kv, g, W, D]
            query = torch.cat(grouped, dim=2).flatten(1, 2)
        if any(self._strict):
            flags = [s for s, q in zip(self._strict, queries, strict=True) for _ in range(q.shape[1] // keys.shape[1])]
            strictly_causal = torch.tensor(flags, device=keys.device)
        # Noted here and looked at once for all layers (KVCache.check_prompt): the host does not wait in each layer.
        self.is_finite = (keys.sum(dtype=torch.float32) + values.sum(dtype=torch.float32)).isfinite()
        self.finish_prefill([(r, self._view(r, query, strictly_causal, keys, values, rule)) for r in rows])

    def _view(
        self,
        r: Rows,
        queries: torch.Tensor,
        strictly_causal: torch.Tensor | None,
        keys: torch.Tensor,
        values: torch.Tensor,
        rule: LogitRule,
    ) -> Prompt:
        keys, values, queries = (r.take(x) for x in (keys, values, queries))
        keys, values = keys[:, :, r.pads :], values[:, :, r.pads :]
        queries = queries[:, :, max(0, queries.shape[2] - keys.shape[2]) :]
        return Prompt(queries, keys, values, rule, self.layer_idx, self.num_layers, strictly_causal, seen=r.tokens_seen)

    def _collect(self, key: torch.Tensor, value: torch.Tensor, start: int, end: int, whole: int) -> None:
        """Put down the keys and values of columns start .. end - 1; a prompt that comes in one piece is not copied."""
        self._written = end
        if start == 0 and end == whole:
            self._keys, self._values = key, value
            return
        if self._keys is None or self._values is None:
            self._keys, self._values = (x.new_empty(*x.shape[:2], whole, x.shape[3]) for x in (key, value))
        self._keys[:, :, start:end] = key
        self._values[:, :, start:end] = value
