"""A witness inside the cache: checks every attention a method computes against a naive float64 one.

The witness sees the queries, keys and values that each layer is given, remembers all of them, and finds out *which*
tokens a layer holds by looking its stored keys up in that memory. Then it computes attention over exactly those tokens
(and the new ones, causally) with plain loops in float64 and compares. Nothing of the code under test is used: a pad
that is kept, a key with another token's value, a mask that is off by one or a head that reads its neighbour all fail.
"""

from __future__ import annotations

import torch

from kvbench.methods.base import CacheLayer, KVCache


class Witness:
    """Watch one layer of a cache (plain-attention methods with an exact storage only)."""

    def __init__(self, layer: CacheLayer, mask: torch.Tensor | None, tolerance: float = 1e-9):
        self.layer, self.tolerance = layer, tolerance
        self.prompt_mask = mask
        self.keys: torch.Tensor | None = None  # everything the layer was ever given, [B, H_kv, columns, D]
        self.values: torch.Tensor | None = None
        self.real: torch.Tensor | None = None  # [B, columns]
        self.steps = 0
        self._attend = layer.attend
        layer.attend = self.attend  # type: ignore[method-assign]

    def attend(self, query, key, value, scaling, new):
        batch, _, n, _ = query.shape
        held = None if self.layer.reading or self.keys is None else self.held_columns()
        before = 0 if self.keys is None else self.keys.shape[2]
        if self.keys is None:
            real = (
                torch.ones(batch, n, dtype=torch.bool) if self.prompt_mask is None else self.prompt_mask[:, :n].bool()
            )
            self.keys, self.values, self.real = key, value, real
        else:
            more = torch.ones(batch, n, dtype=torch.bool)
            if self.layer.reading and self.prompt_mask is not None:
                more = self.prompt_mask[:, before : before + n].bool()
            elif new.valid is not None:
                more = new.valid
            self.keys = torch.cat([self.keys, key], 2)
            self.values = torch.cat([self.values, value], 2)
            self.real = torch.cat([self.real, more], 1)
        out = self._attend(query, key, value, scaling, new)
        self.check(query, out, scaling, held, before)
        self.steps += 1
        return out

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

    def check(self, query, out, scaling, held, before) -> None:
        groups = query.shape[1] // self.keys.shape[1]
        for b in range(query.shape[0]):
            for j in range(query.shape[1]):
                for i in range(query.shape[2]):
                    at = before + i
                    if not self.real[b, at]:
                        continue
                    if held is None:
                        seen = [c for c in range(at + 1) if self.real[b, c]]
                    else:
                        stored = held[b][j * len(held[b]) // query.shape[1]]
                        seen = stored + [c for c in range(before, at + 1) if self.real[b, c]]
                    k, v = self.keys[b, j // groups, seen].double(), self.values[b, j // groups, seen].double()
                    weights = torch.softmax(k @ query[b, j, i].double() * scaling, 0)
                    error = (weights @ v - out[b, j, i].double()).abs().max().item()
                    assert error < self.tolerance, f"row {b} head {j} query {at}: off by {error}"


def watch(cache: KVCache, mask: torch.Tensor | None = None, tolerance: float = 1e-9) -> list[Witness]:
    """A witness in every layer."""
    return [Witness(layer, mask, tolerance) for layer in cache.layers]
