"""A witness inside the cache: checks every attention a method computes against a naive float64 one.

The witness sees the queries, keys and values that each layer is given, remembers all of them, and finds out *which*
tokens a layer holds by looking its stored keys up in that memory. Then it computes attention over exactly those tokens
(and the new ones, causally) with plain loops in float64 and compares. Nothing of the code under test is used: a pad
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

    def attend(self, query, key, value, rule, new, use, new_kv=None):
        if not use.is_final_pass:  # a pass that will be done again
            return self._attend(query, key, value, rule, new, use, new_kv)
        reading = self.layer.in_prefill
        if self.first:
            self.held = None if reading or self.keys is None else self.held_columns()
            self.before = 0 if self.keys is None else self.keys.shape[2]
        if use.is_owner:
            self.remember(*((key, value) if new_kv is None else new_kv), new)
        out = self._attend(query, key, value, rule, new, use, new_kv)
        if not (reading and use.strictly_causal):  # while the prompt is read that is an approximation, tested elsewhere
            self.check(query, out, rule, key.shape[2], use.strictly_causal)
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
                found = []
                for s in range(keys.shape[2]):
                    if valid is not None and not valid[b, h if valid.shape[1] > 1 else 0, s]:
                        continue
                    same = (self.keys[b, h // groups] == keys[b, h, s]).all(-1).nonzero()[:, 0].tolist()
                    same = [c for c in same if self.real[b, c]]
                    assert len(same) == 1, f"slot {s} of row {b} head {h} holds no real token: {same}"
                    assert torch.equal(self.values[b, h // groups, same[0]], values[b, h, s]), "value of another token"
                    found.append(same[0])
                assert found == sorted(set(found)), f"not strictly increasing: {found}"
                per_head.append(found)
            columns.append(per_head)
        return columns

    def check(self, query, out, rule, new, strict) -> None:
        """``new`` columns have come, of which the last ones ask; ``strict``: not about themselves."""
        held, before = self.held, self.before
        groups = query.shape[1] // self.keys.shape[1]
        for b in range(query.shape[0]):
            for j in range(query.shape[1]):
                for i in range(query.shape[2]):
                    at = before + new - query.shape[2] + i
                    if at < self.real.shape[1] and not self.real[b, at]:
                        continue
                    end = at + (not strict)
                    if held is None:
                        seen = [c for c in range(end) if self.real[b, c]]
                    else:
                        stored = held[b][j * len(held[b]) // query.shape[1]]
                        seen = stored + [c for c in range(before, end) if self.real[b, c]]
                    k, v = self.keys[b, j // groups, seen].double(), self.values[b, j // groups, seen].double()
                    weights = torch.softmax(k @ query[b, j, i].double() * rule.scaling, 0)
                    error = (weights @ v - out[b, j, i].double()).abs().max().item()
                    assert error < self.tolerance, f"row {b} head {j} query {at}: off by {error}"


def watch(cache: KVCache, mask: torch.Tensor | None = None, tolerance: float = 1e-9) -> list[Witness]:
    """A witness in every layer but the sliding ones."""
    kinds = zip(cache.layers, cache.plan.layer_types, strict=True)
    return [Witness(layer, mask, tolerance) for layer, kind in kinds if kind == "full_attention"]
