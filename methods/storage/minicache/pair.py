"""A pair of layers: each appends its own new tokens, which are merged when the upper layer is done with a step."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from ....conf.errors import InputError
from ...cache.logits import LogitRule
from ...cache.products import exact_products
from ..buffer import Buffer, Growing
from .geometry import MergeRule
from .merged import Directions, Merged, first_slots, retained_slots


class Pair(Growing):
    """Two layers. Each appends its own new tokens; when the upper one is done with a step they are merged.

    Args:
        t, gamma, retention: see :class:`.storage.MiniCache`.
        block: tokens are merged so many at a time; those of an incomplete block wait as they are.
        new_directions: (directions [B, H, n, D], whether they are keys', tokens to make room for) -> how they are held.
    """

    def __init__(
        self,
        t: float,
        gamma: float,
        retention: str,
        block: int = 1,
        new_directions: Callable[[torch.Tensor, bool, int], Directions] = lambda x, _, room: Directions(x, room),
    ):
        self.rule = MergeRule(t, gamma, retention)
        self.block, self.new_directions = block, new_directions
        self.length = 0  # slots merged
        self.valid: torch.Tensor | None = None  # [B, 1, S], of all slots, merged and new
        self.keys: Merged | None = None
        self.values: Merged | None = None
        self.new: list[tuple[Buffer, Buffer] | None] = [None, None]  # [B, H, n, D], keys and values of each layer
        self.static: Pair | None = None  # what both layers go on with once static
        self._parts: dict[tuple[int, ...], Pair] = {}

    def append(self, layer: int, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor | None) -> None:
        """New tokens [B, H, n, D] of one layer; ``valid`` [B, 1, n] or None."""
        mine = self.new[layer]
        if layer == 0:
            self._extend_valid(keys, valid)
        spare = self.free_slots(at_rest=not self.length) if self.block > 1 else 0  # a block of one is merged at once
        if mine is None:
            capacity = keys.shape[2] + spare
            self.new[layer] = (Buffer(keys, 2, capacity), Buffer(values, 2, capacity))
            return
        for recent, new in zip(mine, (keys, values), strict=True):
            recent.append(new, recent.length + spare)

    def _extend_valid(self, keys: torch.Tensor, valid: torch.Tensor | None) -> None:
        if valid is None and self.valid is None:
            return
        batch, n = keys.shape[0], keys.shape[2]
        held = self.length + (0 if self.new[0] is None else self.new[0][0].length)
        ones = torch.ones(batch, 1, max(held, n), dtype=torch.bool, device=keys.device)
        before = ones[..., :held] if self.valid is None else self.valid
        self.valid = torch.cat([before, ones[..., :n] if valid is None else valid], dim=-1)

    def read(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(keys, values) of one layer as it sees them: merged tokens restored, new ones as they are."""
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
        more = 0 if new is None else new.shape[2]
        # One slot behind the last one takes what a row or head has fewer retained tokens of.
        x = unmerged.new_empty(*unmerged.shape[1:3], n + more + 1, unmerged.shape[4])
        merged.directions.multiply_into(merged.magnitudes.used[layer], x[:, :, :n])
        if merged.retained.shape[2]:
            at = torch.where(merged.retained >= 0, merged.retained, n + more).long()
            x.scatter_(2, at[..., None].expand(-1, -1, -1, x.shape[3]), unmerged[layer])
        if new is not None:
            x[:, :, n : n + more] = new
        return x[:, :, : n + more]

    def visible(self, layer: int) -> torch.Tensor | None:
        """Slots of :meth:`read` that hold a real token, [B, 1, S]; None: all."""
        return self.valid

    def attend(self, layer: int, query: torch.Tensor, rule: LogitRule) -> torch.Tensor:
        """Attention of one new token of one layer: [B, H, G, D] in and out.

        Over the shared directions themselves: a product with a merged vector is its magnitude times that with the
        direction, so nothing is restored. Retained tokens are put in their places among the products.
        """
        keys, values, new, visible = self.keys, self.values, self.new[layer], self.visible(layer)
        assert keys is not None and values is not None
        n = self.length
        acc_dtype = torch.promote_types(query.dtype, torch.float32)
        # One slot behind the last one takes what a row or head has fewer retained tokens of.
        logits = query.new_empty(*query.shape[:3], n + 1, dtype=acc_dtype)
        torch.mul(keys.directions.scores(query), keys.magnitudes.used[layer][:, :, None], out=logits[..., :n])
        logits.scatter_(3, retained_slots(keys, n, query), exact_products(query, keys.unmerged[layer]))
        if new is None:
            logits = logits[..., :n]
        else:
            recent = exact_products(query, new[0].used)
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

    def merge(self) -> None:
        """Both layers are done with their new tokens: keep one direction, two magnitudes, and the retained tokens."""
        lower, upper = self.new
        if lower is None and upper is None:  # a step of pads alone
            return
        assert lower is not None and upper is not None, "the upper layer is done before the lower one"
        devices = [recents[0].whole.device for recents in (lower, upper)]
        if devices[0] != devices[1]:
            where = ", ".join(map(str, devices))
            raise InputError("model.device_map", where, "splits a pair of layers that MiniCache merges")
        waiting = lower[0].length
        n = waiting // self.block * self.block
        if not n:
            return
        valid = None if self.valid is None else self.valid[..., self.length : self.length + n]
        capacity = self.capacity(self.length + n, n)
        if self.expected:
            capacity = (self.length + waiting + self.expected) // self.block * self.block
        (lower_keys, lower_values), (upper_keys, upper_values) = (
            [recent.used[:, :, :n] for recent in recents] for recents in (lower, upper)
        )
        self.keys = self._merged(self.keys, lower_keys, upper_keys, valid, True, capacity)
        self.values = self._merged(self.values, lower_values, upper_values, valid, False, capacity)
        self.length += n
        if n == waiting:
            self.new = [None, None]
        else:
            for recent in (*lower, *upper):
                recent.drop(n, self.free_slots(at_rest=True))

    def _merged(
        self,
        before: Merged | None,
        lower: torch.Tensor,
        upper: torch.Tensor,
        valid: torch.Tensor | None,
        is_keys: bool,
        capacity: int,
    ) -> Merged:
        """Merge tokens [B, H, n, D] of both layers and add them to what there was ``before``."""
        new = self.rule.merge(lower, upper)
        real = torch.ones_like(new.unmergeable) if valid is None else valid.expand_as(new.unmergeable)
        if before is not None:
            retain = self.rule.retain_later(new, real, before.threshold)
            before.retain(retain, self.length, torch.stack([lower, upper]))
            before.directions.append(new.direction, capacity)
            before.magnitudes.append(new.magnitudes, capacity)
            return before
        retain, threshold = self.rule.retain_first(new, real)
        if not self.expected:  # a prompt alone takes what it takes
            capacity = 0
        slots, is_retained = first_slots(retain)
        at = slots.long().clamp(min=0)[..., None].expand(-1, -1, -1, lower.shape[3])
        unmerged = torch.stack([x.gather(2, at) for x in (lower, upper)]) * is_retained[..., None].to(lower.dtype)
        directions = self.new_directions(new.direction, is_keys, capacity)
        return Merged(directions, Buffer(new.magnitudes, 3, capacity), slots, unmerged, threshold)

    def part(self, index: torch.Tensor) -> Pair:
        """Some of the rows, as a pair of their own; the same one for both layers, which ask one after the other."""
        key = tuple(index.tolist())
        if key not in self._parts:
            part = Pair(self.rule.t, self.rule.gamma, self.rule.retention, self.block, self.new_directions)
            part.length = self.length
            part.valid = None if self.valid is None else self.valid[index]
            part.keys, part.values = (None if m is None else m.take(index) for m in (self.keys, self.values))
            part.new = [None if x is None else _rows_of(x, index) for x in self.new]
            self._parts[key] = part
        return self._parts[key]

    @property
    def waiting(self) -> int:
        """Tokens of each layer that are not merged yet, between two steps."""
        return 0 if self.new[0] is None else self.new[0][0].length

    def example(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Unmerged keys and values [B, H, tokens, D], for their dtype, device and sizes."""
        if self.keys is not None and self.values is not None:
            return self.keys.unmerged[0], self.values.unmerged[0]
        assert self.new[0] is not None, "example before append"
        return self.new[0][0].used, self.new[0][1].used

    @property
    def head_count(self) -> int:
        """KV heads, once something is merged."""
        assert self.keys is not None
        return self.keys.magnitudes.whole.shape[2]

    def tensors(self, layer: int) -> list[torch.Tensor]:
        """What one layer holds; what they share is the lower one's (0)."""
        new = self.new[layer]
        out = [] if new is None else [recent.whole for recent in new]
        if layer == 0:
            out += [t for merged in (self.keys, self.values) if merged is not None for t in merged.tensors()]
            out += [] if self.valid is None else [self.valid]
        return out

    def logical_bytes(self, layer: int) -> int:
        """Bytes of :meth:`tensors` but for room to grow."""
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
