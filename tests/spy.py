"""A witness inside the cache: checks every attention a method computes against a naive float64 one.

The witness sees the queries, keys and values that each layer is given, remembers all of them, and finds out *which*
tokens a layer holds by looking its stored keys up in that memory. Then it computes attention over exactly those tokens
(and the new ones, causally) in float64 and compares. Nothing of the code under test is used: a pad
that is kept, a key with another token's value, a mask that is off by one or a head that reads its neighbour all fail.
"""

from __future__ import annotations

import torch

from kvbench.methods.cache.cache import KVCache
from kvbench.methods.cache.layer import CacheLayer


class Witness:
    """Watch one layer of a cache (plain-attention methods with an exact storage only)."""

    def __init__(self, layer: CacheLayer, mask: torch.Tensor | None, tolerance: float = 1e-9):
        self.layer, self.tolerance = layer, tolerance
        self.prompt_mask = mask
        self.keys: torch.Tensor | None = None  # everything the layer was ever given, [B, H_kv, columns, D]
        self.values: torch.Tensor | None = None
        self.real: torch.Tensor | None = None  # [B, columns]
        self.steps = 0
        self.first = True  # the next use is the first one of a forward
        self.before = 0  # columns before that forward
        self.held = None  # columns held before it, or None: all, in the prompt
        self._attend = layer.attend
        layer.attend = self.attend  # type: ignore[method-assign]

    def attend(self, call, new, use):
        if not use.is_final_pass:  # a pass that will be done again
            return self._attend(call, new, use)
        reading = self.layer.in_prefill
        if self.first:
            self.held = None if reading or self.keys is None else self.held_columns()
            self.before = 0 if self.keys is None else self.keys.shape[2]
        if use.is_owner:
            self.remember(*call.written, new)
        out = self._attend(call, new, use)
        if not (reading and use.strictly_causal):  # while the prompt is read that is an approximation, tested elsewhere
            self.check(call.query, out, call.rule, call.columns, use.strictly_causal)
        self.first = use.is_last_reader
        self.steps += use.is_last_reader
        return out

    def remember(self, key, value, new):
        batch, _, n, _ = key.shape
        if self.keys is None:
            real = (
                torch.ones(batch, n, dtype=torch.bool) if self.prompt_mask is None else self.prompt_mask[:, :n].bool()
            )
            self.keys, self.values, self.real = key, value, real
            return
        more = torch.ones(batch, n, dtype=torch.bool)
        if self.layer.in_prefill and self.prompt_mask is not None:
            more = self.prompt_mask[:, self.before : self.before + n].bool()
        elif new.valid is not None:
            more = new.valid
        self.keys = torch.cat([self.keys, key], 2)
        self.values = torch.cat([self.values, value], 2)
        self.real = torch.cat([self.real, more], 1)

    def held_columns(self) -> list[list[list[int]]]:
        """Columns held by each row and stored head, in slot order; every one a real token, key and value aligned."""
        keys, values, valid = self.layer.storage.read()
        groups = keys.shape[1] // self.keys.shape[1]
        columns = []
        for b in range(keys.shape[0]):
            per_head = []
            for h in range(keys.shape[1]):
                slots = torch.arange(keys.shape[2])
                if valid is not None:
                    slots = valid[b, h if valid.shape[1] > 1 else 0].nonzero()[:, 0]
                seen_keys, seen_values = self.keys[b, h // groups], self.values[b, h // groups]
                same = (keys[b, h, slots, None] == seen_keys).all(-1) & self.real[b]  # [slots, columns]
                wrong = slots[same.sum(1) != 1].tolist()
                assert not wrong, f"slots {wrong} of row {b} head {h} hold no real token"
                found = same.int().argmax(1)
                assert torch.equal(seen_values[found], values[b, h, slots]), "value of another token"
                assert (found.diff() > 0).all(), f"not strictly increasing: {found.tolist()}"
                per_head.append(found.tolist())
            columns.append(per_head)
        return columns

    def check(self, query, out, rule, new, strict) -> None:
        """``new`` columns have come, of which the last ones ask; ``strict``: not about themselves."""
        held, before, n = self.held, self.before, query.shape[2]
        groups = query.shape[1] // self.keys.shape[1]
        at = before + new - n + torch.arange(n)  # columns of the queries
        for b in range(query.shape[0]):
            asks = torch.cat([self.real[b], torch.ones(n, dtype=torch.bool)])[at]
            for j in range(query.shape[1]):
                there = self.real[b].clone()
                if held is not None:
                    there[:before] = False
                    there[held[b][j * len(held[b]) // query.shape[1]]] = True
                seen = there & (torch.arange(len(there)) < at[:, None] + (not strict))  # [queries, columns]
                k, v = self.keys[b, j // groups].double(), self.values[b, j // groups].double()
                logits = (query[b, j].double() @ k.T * rule.scaling).masked_fill(~seen, -torch.inf)
                expected = torch.softmax(logits, 1).nan_to_num() @ v  # nothing of nothing
                error = (expected - out[b, j].double()).abs().amax(1)[asks]
                assert (error < self.tolerance).all(), f"row {b} head {j} queries {at[asks]}: off by {error}"


def watch(cache: KVCache, mask: torch.Tensor | None = None, tolerance: float = 1e-9) -> list[Witness]:
    """A witness in every layer but the sliding ones."""
    kinds = zip(cache.layers, cache.plan.layer_types, strict=True)
    return [Witness(layer, mask, tolerance) for layer, kind in kinds if kind == "full_attention"]
