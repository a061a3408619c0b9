"""A pair of layers whose new tokens are merged after the upper layer's step.

Legend: B batch rows, H KV heads, G query heads per KV head, n new or merged tokens, S slots, D channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from ....conf.errors import InputError
from ...cache.logits import LogitRule
from ...cache.products import query_key_products
from ..buffer import Buffer, Growing, take_slots
from ..step_attention import uses_kernel
from .geometry import MergeRule
from .merged import Directions, Merged, first_slots, retained_slots


class Pair(Growing):
    """Two layers with merged and new (not yet merged) tokens.

    Args:
        t, gamma, retention: See :class:`.storage.MiniCache`.
        block: Number of tokens that are merged together; an incomplete block is not merged.
        new_directions: Creates a :class:`.merged.Directions` from directions [B, H, n, D], whether they are directions
            of keys, and the number of tokens to allocate.
    """

    def __init__(
        self,
        t: float,
        gamma: float,
        retention: str,
        block: int = 1,
        new_directions: Callable[[torch.Tensor, bool, int], Directions] = lambda x, _, count: Directions(x, count),
    ):
        self.rule = MergeRule(t, gamma, retention)
        self.block, self.new_directions = block, new_directions
        self.length = 0  # number of merged slots
        self.valid: torch.Tensor | None = None  # [B, 1, S], merged and new slots
        self.keys: Merged | None = None
        self.values: Merged | None = None
        self.new: list[tuple[Buffer, Buffer] | None] = [None, None]  # [B, H, n, D], keys and values of each layer
        self.static: Pair | None = None  # replacement of this pair once static
        self._selections: dict[tuple[int, ...], Pair] = {}  # results of select_rows

    def append(self, layer: int, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor | None) -> None:
        """Append new tokens [B, H, n, D] of one layer; ``valid`` [B, 1, n] or None."""
        buffers = self.new[layer]
        if layer == 0:
            self._extend_valid(keys, valid)
        # Blocks of one token are merged at once and need no free slots.
        free = self.free_slots(only_reserved=not self.length) if self.block > 1 else 0
        if buffers is None:
            capacity = keys.shape[2] + free
            self.new[layer] = (Buffer(keys, 2, capacity), Buffer(values, 2, capacity))
            return
        for recent, new in zip(buffers, (keys, values), strict=True):
            recent.append(new, recent.length + free)

    def _extend_valid(self, keys: torch.Tensor, valid: torch.Tensor | None) -> None:
        if valid is None and self.valid is None:
            return
        batch, n = keys.shape[0], keys.shape[2]
        slots = self.length + (0 if self.new[0] is None else self.new[0][0].length)
        ones = torch.ones(batch, 1, max(slots, n), dtype=torch.bool, device=keys.device)
        previous = ones[..., :slots] if self.valid is None else self.valid
        self.valid = torch.cat([previous, ones[..., :n] if valid is None else valid], dim=-1)

    def read(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values [B, H, S, D] of one layer, with merged tokens restored."""
        new = self.new[layer]
        if self.keys is None or self.values is None:
            assert new is not None, "read before append"
            return new[0].used, new[1].used
        return (
            self._restored(self.keys, layer, None if new is None else new[0].used),
            self._restored(self.values, layer, None if new is None else new[1].used),
        )

    def _restored(self, merged: Merged, layer: int, new: torch.Tensor | None) -> torch.Tensor:
        n, unmerged = self.length, merged.unmerged
        length = n + (0 if new is None else new.shape[2])
        # The extra last slot is a dummy target for unused entries (-1) of `retained`.
        x = unmerged.new_empty(*unmerged.shape[1:3], length + 1, unmerged.shape[4])  # [B, H, S + 1, D]
        merged.directions.multiply_into(merged.magnitudes.used[layer], x[:, :, :n])
        if merged.retained.shape[2]:
            slots = torch.where(merged.retained >= 0, merged.retained, length).long()
            x.scatter_(2, slots[..., None].expand(-1, -1, -1, x.shape[3]), unmerged[layer])
        if new is not None:
            x[:, :, n:length] = new
        return x[:, :, :length]

    def visible(self, layer: int) -> torch.Tensor | None:
        """Return the mask of the slots of :meth:`read` that hold a real token, [B, 1, S]; None: all."""
        return self.valid

    def attend(self, layer: int, query: torch.Tensor, rule: LogitRule) -> torch.Tensor:
        """Attend with one new token of one layer: [B, H, G, D] -> the same shape.

        Merged vectors are not restored: the product with one is its magnitude times the product with its direction.
        The products of retained tokens then replace those of their slots.
        """
        keys, values, new, visible = self.keys, self.values, self.new[layer], self.visible(layer)
        assert keys is not None and values is not None
        kernel = self._attend_by_kernel(layer, query, rule)
        if kernel is not None:
            return kernel
        n = self.length
        acc_dtype = torch.promote_types(query.dtype, torch.float32)
        # The extra last slot is a dummy target for unused entries (-1) of `retained`.
        logits = query.new_empty(*query.shape[:3], n + 1, dtype=acc_dtype)
        torch.mul(keys.directions.scores(query), keys.magnitudes.used[layer][:, :, None], out=logits[..., :n])
        logits.scatter_(3, retained_slots(keys, n, query), query_key_products(query, keys.unmerged[layer]))
        if new is None:
            logits = logits[..., :n]
        else:
            recent = query_key_products(query, new[0].used)
            logits = torch.cat([logits[..., :n], recent], dim=-1)
        logits = rule.logits(logits.contiguous())
        if visible is not None:
            logits = logits.masked_fill(~visible[:, :, None], -math.inf)
        weights = rule.weights(logits, head_dims=2)  # rounded once, when multiplied with the magnitudes
        merged = F.pad(weights[..., :n], (0, 1))
        slots = retained_slots(values, n, query)
        retained = merged.gather(3, slots)
        merged = merged.scatter(3, slots, 0.0)[..., :n] * values.magnitudes.used[layer][:, :, None]
        out = values.directions.weighted(merged.to(query.dtype)).to(acc_dtype)
        out += torch.matmul(retained.to(query.dtype), values.unmerged[layer])
        if new is not None:
            out += torch.matmul(weights[..., n:].to(query.dtype), new[1].used)
        return out.to(query.dtype)

    def _attend_by_kernel(self, layer: int, query: torch.Tensor, rule: LogitRule) -> torch.Tensor | None:
        """Compute :meth:`attend` by one kernel; None: no kernel supports it."""
        keys, values, new = self.keys, self.values, self.new[layer]
        assert keys is not None and values is not None
        widths = keys.unmerged.shape[4], values.unmerged.shape[4]
        flat = query.flatten(1, 2)[:, :, None]  # [B, H * G, 1, D]
        problem = keys.directions.kernel_problem(self.block) or values.directions.kernel_problem(self.block)
        if not uses_kernel(flat, query.shape[1], *widths, layout_problem=problem):
            return None
        from ..kernels.merged import MergedVectors

        stored = [
            MergedVectors(m.directions.first(self.length), m.magnitudes.used[layer], m.retained, m.unmerged[layer])
            for m in (keys, values)
        ]
        recent = None if new is None else (new[0].used, new[1].used)
        kernel = keys.directions.kernel(self.block)
        out = kernel(flat, *stored, recent, self.visible(layer), rule)
        return out[:, :, 0].unflatten(1, query.shape[1:3])

    def merge(self) -> None:
        """Merge the new tokens of both layers, in full blocks, after the upper layer's attention."""
        lower, upper = self.new
        if lower is None and upper is None:  # a step of pads only
            return
        assert lower is not None and upper is not None, "the upper layer finished before the lower one"
        devices = [recents[0].whole.device for recents in (lower, upper)]
        if devices[0] != devices[1]:
            where = ", ".join(map(str, devices))
            raise InputError("model.device_map", where, "splits a pair of layers that MiniCache merges")
        unmerged = lower[0].length
        n = unmerged // self.block * self.block
        if not n:
            return
        valid = None if self.valid is None else self.valid[..., self.length : self.length + n]
        capacity = self.capacity(self.length + n, n)
        if self.reserved:
            capacity = (self.length + unmerged + self.reserved) // self.block * self.block
        (lower_keys, lower_values), (upper_keys, upper_values) = (
            [recent.used[:, :, :n] for recent in recents] for recents in (lower, upper)
        )
        self.keys = self._merge_into(self.keys, lower_keys, upper_keys, valid, True, capacity)
        self.values = self._merge_into(self.values, lower_values, upper_values, valid, False, capacity)
        self.length += n
        if n == unmerged:
            self.new = [None, None]
        else:
            for recent in (*lower, *upper):
                recent.drop(n, self.free_slots(only_reserved=True))

    def _merge_into(
        self,
        merged: Merged | None,
        lower: torch.Tensor,
        upper: torch.Tensor,
        valid: torch.Tensor | None,
        is_keys: bool,
        capacity: int,
    ) -> Merged:
        """Merge tokens [B, H, n, D] of both layers and append them to ``merged``, created if None."""
        new = self.rule.merge(lower, upper)
        real = torch.ones_like(new.unmergeable) if valid is None else valid.expand_as(new.unmergeable)
        if merged is not None:
            retain = self.rule.retain_later(new, real, merged.threshold)
            merged.retain(retain, self.length, torch.stack([lower, upper]))
            merged.directions.append(new.direction, capacity)
            merged.magnitudes.append(new.magnitudes, capacity)
            return merged
        retain, threshold = self.rule.retain_first(new, real)
        if not self.reserved:  # allocate no free slots
            capacity = 0
        slots, is_retained = first_slots(retain)  # [B, H, R]
        index = slots.long().clamp(min=0)
        unmerged = torch.stack([take_slots(x, index) for x in (lower, upper)])
        unmerged *= is_retained[..., None].to(lower.dtype)
        directions = self.new_directions(new.direction, is_keys, capacity)
        return Merged(directions, Buffer(new.magnitudes, 3, capacity), slots, unmerged, threshold)

    def select_rows(self, index: torch.Tensor) -> Pair:
        """Return a copy of some rows; the second layer that calls it gets the same copy."""
        key = tuple(index.tolist())
        if key not in self._selections:
            pair = Pair(self.rule.t, self.rule.gamma, self.rule.retention, self.block, self.new_directions)
            pair.length = self.length
            pair.valid = None if self.valid is None else self.valid[index]
            pair.keys, pair.values = (None if m is None else m.take(index) for m in (self.keys, self.values))
            pair.new = [None if x is None else _rows_of(x, index) for x in self.new]
            self._selections[key] = pair
        return self._selections[key]

    @property
    def unmerged_tokens(self) -> int:
        """Number of new tokens of each layer between two steps."""
        return 0 if self.new[0] is None else self.new[0][0].length

    def example(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return unmerged keys and values [B, H, any, D], for their dtype, device and sizes."""
        if self.keys is not None and self.values is not None:
            return self.keys.unmerged[0], self.values.unmerged[0]
        assert self.new[0] is not None, "example before append"
        return self.new[0][0].used, self.new[0][1].used

    @property
    def head_count(self) -> int:
        """Number of KV heads, after the first merge."""
        assert self.keys is not None
        return self.keys.magnitudes.whole.shape[2]

    def tensors(self, layer: int) -> list[torch.Tensor]:
        """Return the tensors of one layer; shared tensors belong to the lower layer (0)."""
        new = self.new[layer]
        out = [] if new is None else [recent.whole for recent in new]
        if layer == 0:
            out += [t for merged in (self.keys, self.values) if merged is not None for t in merged.tensors()]
            out += [] if self.valid is None else [self.valid]
        return out

    def logical_bytes(self, layer: int) -> int:
        """Return the bytes of :meth:`tensors` without unused slots."""
        total = sum(t.nbytes for t in self.tensors(layer)) - sum(recent.slack for recent in self.new[layer] or ())
        for merged in (self.keys, self.values):
            if layer == 0 and merged is not None:
                total -= merged.directions.slack + merged.magnitudes.slack
                used = merged.used
                total -= merged.retained[..., used:].nbytes + merged.unmerged[..., used:, :].nbytes
        return total


def _rows_of(recent: tuple[Buffer, Buffer], index: torch.Tensor) -> tuple[Buffer, Buffer]:
    keys, values = recent
    return Buffer(keys.used[index], 2), Buffer(values.used[index], 2)
