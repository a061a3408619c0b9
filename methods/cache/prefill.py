"""Prefill of one cache layer: full causal attention over the prompt, then one compression of the whole prompt.

A layer attends over the complete keys and values of the prompt and only then compresses its own copy. The first
generated token is therefore the full cache's, and any number of methods can share one prefill (``fan_out.py``). A
prompt may be fed in chunks; the policy still receives it whole. Left padding is removed here: rows are cut to their
real tokens before attention and before scoring, so a method never sees a pad.

Legend: B batch rows, R rows of one prompt length, H_q query heads, H_kv KV heads, g = H_q / H_kv, m queries and n new
columns of a chunk, T columns so far, W queries in the observation window, D channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace

import torch

from ...conf.errors import InputError
from ..sharing.plan import KVAccess, Span
from .compression import compression
from .forward import LayerCall, NewTokens, Rows
from .logits import LogitRule
from .products import causal_attention, flash_attention_with_logsumexp
from .prompt import ALL_QUERIES, Prompt
from .static_steps import StaticSteps


class PrefillLayer(StaticSteps, ABC):
    """Cache layer during the prefill.

    Args:
        layer_idx, num_layers: Index of the cache layer and number of cache layers of its kind.
        observation_window: Number of last prompt queries that :meth:`finish_prefill` needs.
        span: Tokens that each token attends to; None: all before it.

    Attributes:
        model_layer: Index of the layer in the model.
        seen: Columns seen so far, pads included.
        in_prefill: Whether the prompt is not complete yet.
        is_finite: Whether the prompt's keys and values are all finite, as a bool tensor on their device.
    """

    def __init__(self, layer_idx: int, num_layers: int, observation_window: int, span: Span | None = None):
        self.layer_idx, self.num_layers = layer_idx, num_layers
        self.model_layer = layer_idx
        self.observation_window, self.span = observation_window, span
        self.is_finite: torch.Tensor | None = None
        self.seen = 0
        self.in_prefill = True
        self._keys: torch.Tensor | None = None  # [B, H_kv, prompt length, D]
        self._values: torch.Tensor | None = None
        self._written = 0  # columns of _keys and _values that are filled
        self._queries: list[torch.Tensor] = []  # [B, H_q, W, D] of each layer of the model that uses this cache layer
        self._logsumexp: list[torch.Tensor | None] = []  # [B, H_q, W] of their queries, if known
        self._strictly_causal: list[bool] = []  # for each of those layers
        self._reader = 0  # index of the next of those layers in the current forward

    @abstractmethod
    def method_names(self) -> str:
        """Return the names of the methods, for error messages."""

    @abstractmethod
    def finish_prefill(self, prompts: list[tuple[Rows, Prompt]]) -> None:
        """Compress and store the whole prompt; called once, with all rows of the batch."""

    @abstractmethod
    def observe_questions(self, tokens: int) -> None:
        """Widen the observation window to questions of up to ``tokens`` tokens, if the policy needs their queries."""

    def prefill(self, call: LayerCall, new: NewTokens, use: KVAccess) -> torch.Tensor:
        """Attend over the prompt so far, and compress it after its last chunk and last reader.

        Args:
            call: Queries, keys and values of the chunk.
            new: Batch rows grouped by leading pads, and the columns of the whole prompt.
            use: How the layer of the model uses this cache layer.

        Returns:
            [B, H_q, m, D]; zero where the query is a pad.
        """
        start, end = self.seen, self.seen + call.columns
        prompt_length = end if new.prompt_length is None else new.prompt_length
        if use.is_owner and call.new_kv is None:
            self._collect(call.key, call.value, start, end, prompt_length)
        keys, values = self._keys_and_values(call, start, end, use)  # [B, H_kv, T, D]
        if use.is_owner and call.new_kv is not None:
            self._collect(*call.new_kv, start, end, prompt_length)
        out, logsumexp = self._attend_rows(call, keys, values, new.rows, use.strictly_causal)
        if use.is_final_pass:
            self._collect_queries(call.query, logsumexp, use.strictly_causal)
        if use.is_last_reader and use.is_final_pass:
            self.seen, self._reader = end, 0
            if end >= prompt_length:
                self.seen = new.columns_seen or end
                self._finish(call.rule, new.rows)
        return out

    def _collect(self, key: torch.Tensor, value: torch.Tensor, start: int, end: int, prompt_length: int) -> None:
        """Store the keys and values of columns start .. end - 1; an unchunked prompt is not copied."""
        self._written = end
        if start == 0 and end == prompt_length:
            self._keys, self._values = key, value
            return
        if self._keys is None or self._values is None:
            self._keys, self._values = (x.new_empty(*x.shape[:2], prompt_length, x.shape[3]) for x in (key, value))
        self._keys[:, :, start:end] = key
        self._values[:, :, start:end] = value

    def _keys_and_values(
        self, call: LayerCall, start: int, end: int, use: KVAccess
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of all columns up to ``end``, those of the chunk taken from ``call``."""
        key, value = call.key, call.value
        if start == 0:
            return key, value
        assert self._keys is not None and self._values is not None
        if self._written == end and not use.strictly_causal and use.is_final_pass:  # _collect has stored the chunk
            return self._keys[:, :, :end], self._values[:, :, :end]
        return torch.cat([self._keys[:, :, :start], key], dim=2), torch.cat([self._values[:, :, :start], value], dim=2)

    def _attend_rows(
        self, call: LayerCall, keys: torch.Tensor, values: torch.Tensor, rows: list[Rows], strictly_causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend over ``keys`` [B, H_kv, T, D], each group of rows without its pads.

        Returns:
            (output [B, H_q, m, D]; log-sum-exp of the logits [B, H_q, m] if a scorer of all queries can use it).
        """
        query, end = call.query, keys.shape[2]
        start = end - query.shape[2]  # column of the first query
        shape = (*query.shape[:3], values.shape[3])
        out = query.new_zeros(shape) if len(rows) > 1 or rows[0].pads else None
        has_flash = call.rule.is_plain and self.span is None and not strictly_causal
        is_known = has_flash and self.observation_window == ALL_QUERIES
        logsumexp = query.new_zeros(shape[:3], dtype=torch.float32) if is_known else None
        for r in rows:
            first = max(r.pads, start)  # column of the first real query
            if first >= end:
                continue
            tensors = (
                r.take(query)[:, :, first - start :],  # [R, H_q, end - first, D]
                r.take(keys)[:, :, r.pads :],
                r.take(values)[:, :, r.pads :],
            )
            flash = None if logsumexp is None else flash_attention_with_logsumexp(*tensors, call.rule.scaling)
            attended = causal_attention(*tensors, call.rule, strictly_causal, self.span) if flash is None else flash[0]
            index = slice(None) if r.index is None else r.index
            if out is None:
                out = attended
            else:
                out[index, :, first - start :] = attended
            if flash is None:
                logsumexp = None
            elif logsumexp is not None:
                logsumexp[index, :, first - start :] = flash[1]
        assert out is not None
        return out, logsumexp

    def _collect_queries(self, query: torch.Tensor, logsumexp: torch.Tensor | None, strictly_causal: bool) -> None:
        """Append the queries [B, H_q, m, D] of the current reader and keep the last W of them."""
        if self._reader == len(self._queries):
            self._queries.append(query)
            self._logsumexp.append(logsumexp)
            self._strictly_causal.append(strictly_causal)
        else:
            earlier = self._logsumexp[self._reader]
            if earlier is not None and logsumexp is not None:
                self._logsumexp[self._reader] = torch.cat([earlier, logsumexp], dim=2)
            else:
                self._logsumexp[self._reader] = None
            self._queries[self._reader] = torch.cat([self._queries[self._reader], query], dim=2)
        collected = self._queries[self._reader]
        self._queries[self._reader] = collected[:, :, max(0, collected.shape[2] - self.observation_window) :]
        self._reader += 1

    def _finish(self, rule: LogitRule, rows: list[Rows]) -> None:
        """End the prefill and pass the whole prompt to :meth:`finish_prefill`."""
        keys, values, queries, logsumexps = self._keys, self._values, self._queries, self._logsumexp
        assert keys is not None and values is not None
        self.in_prefill, self._keys, self._values, self._queries, self._logsumexp = False, None, None, [], []
        query, logsumexp, strictly_causal = queries[0], logsumexps[0], None
        if len(queries) > 1:
            if rule.sinks is not None:
                raise InputError("model", f"layer {self.model_layer}", "shares keys and values and has attention sinks")
            if len({q.shape[2] for q in queries}) > 1:
                raise InputError(
                    "model.generate",
                    self.method_names(),
                    "needs the prompt's last queries of every layer, and this model omits some of them in the layers "
                    "that share keys; use kvbench.runners.engine.generate",
                )
            heads = keys.shape[1]
            grouped = [q.unflatten(1, (heads, -1)) for q in queries]  # [B, H_kv, g, W, D] of each reader
            query = torch.cat(grouped, dim=2).flatten(1, 2)  # [B, H_q of all readers, W, D]
            known = [x.unflatten(1, (heads, -1)) for x in logsumexps if x is not None]
            logsumexp = torch.cat(known, dim=2).flatten(1, 2) if len(known) == len(queries) else None
        if any(self._strictly_causal):
            layers = zip(self._strictly_causal, queries, strict=True)
            flags = [strict for strict, q in layers for _ in range(q.shape[1] // keys.shape[1])]
            strictly_causal = torch.tensor(flags, device=keys.device)  # [g of all readers]
        # KVCache.check_prompt reads the flags of all layers at once, so that no layer syncs with the device here.
        self.is_finite = (keys.sum(dtype=torch.float32) + values.sum(dtype=torch.float32)).isfinite()
        whole = Prompt(query, keys, values, rule, self.layer_idx, self.num_layers, strictly_causal, logsumexp=logsumexp)
        rows = [part for r in rows for part in r.by_question(keys.device)]
        with compression(keys.device):
            self.finish_prefill([(r, _without_pads(whole, r)) for r in rows])


def _without_pads(whole: Prompt, r: Rows) -> Prompt:
    """Return the prompt of some rows, without pads."""
    keys, values, queries = (r.take(x) for x in (whole.keys, whole.values, whole.query))
    keys, values = keys[:, :, r.pads :], values[:, :, r.pads :]  # [R, H_kv, T, D]
    start = max(0, queries.shape[2] - keys.shape[2])
    logsumexp = None if whole.logsumexp is None else r.take(whole.logsumexp)[:, :, start:]
    queries = queries[:, :, start:]  # [R, H_q, min(W, T), D]
    part = replace(whole, query=queries, keys=keys, values=values, logsumexp=logsumexp, memo={})
    question_tokens = None if r.question_tokens is None else r.question_tokens[0] or None
    return replace(part, seen=r.tokens_seen, text_seeds=r.text_seeds, question_tokens=question_tokens)
