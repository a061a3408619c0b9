"""A pair of layers in tensors of fixed shape: what a decode step needs so that it can be captured and replayed.

    merged slots           [0, merged)        of a fixed number, which all tokens to come will fill
    new tokens, a layer    [merged, fed)      in buffers of one block

Rows have lengths of their own, in counters on the device. Where a block is one token each step merges it itself;
longer blocks, and directions that are quantized, are merged between steps, when the host's count says that one is full.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ....conf.errors import InputError
from ..buffer import Buffer
from ..static import ALL_ROWS, LengthGroup
from .merged import RETAINED_GROWTH, Merged, place_retained
from .pair import Pair

Rows = torch.Tensor | slice


def static_pair(parts: Sequence[tuple[Rows, Pair]], count: int, steps: int) -> StaticPair:
    """Pairs of one model layer and the next as one static pair; the same for both layers, which ask in turn.

    Args:
        parts: the pairs, each with the numbers of its rows; every row is in one of them.
        count: rows of all of them.
        steps: tokens to come, one at a time.
    """
    first = parts[0][1]
    if not isinstance(first.static, StaticPair):
        first.static = StaticPair(parts, count, steps)
    return first.static


class StaticPair(Pair):
    """See :func:`static_pair` and :class:`.pair.Pair`; ``length`` is the number of slots for merged tokens."""

    def __init__(self, parts: Sequence[tuple[Rows, Pair]], count: int, steps: int):
        like = parts[0][1]
        super().__init__(like.rule.t, like.rule.gamma, like.rule.retention, like.block, like.new_directions)
        block = self.block
        self.groups = [LengthGroup(rows, pair.length + pair.waiting) for rows, pair in parts]
        self.length = max((group.length + steps) // block * block for group in self.groups)
        keys, values = like.example()  # [B, H, any, D]
        device = keys.device
        # Tokens of each row [N]: given to either layer, and merged.
        *self.fed, self.merged = (torch.zeros(count, dtype=torch.int64, device=device) for _ in range(3))
        self.is_real: torch.Tensor | None = None  # [N, 1, length], False for the prompt's pads; None: there are none
        self.has_lost = torch.zeros(1, dtype=torch.bool, device=device)  # a token found no place among the retained
        self.new = [(self._zeros(keys, count), self._zeros(values, count)) for _ in range(2)]
        room = self._room(parts)
        if self.length:
            self.keys = self._empty([(rows, pair.keys) for rows, pair in parts], keys, count, room, True)
            self.values = self._empty([(rows, pair.values) for rows, pair in parts], values, count, room, False)
        self.merges_in_step = block == 1 and self.keys is not None and self.keys.directions.takes_tokens_at
        self.steps, self._steps = steps, 0
        for rows, pair in parts:
            self._fill(rows, pair)

    def _zeros(self, like: torch.Tensor, count: int) -> Buffer:
        """Buffer for the tokens of one block, all of it in use."""
        return Buffer(like.new_zeros(count, like.shape[1], self.block, like.shape[3]), 2)

    def _room(self, parts: Sequence[tuple[Rows, Pair]]) -> int:
        """Places for tokens that may be retained later.

        Where a threshold decides, or where tokens that cannot be merged are seen to be no rarity, that is all of them.
        """
        to_come = max(self.length - pair.length for _, pair in parts)
        room, gamma = RETAINED_GROWTH, self.rule.gamma
        for _, pair in parts:
            if not pair.length:  # the first tokens to be merged come yet, and the share gamma of them is retained
                room = max(room, RETAINED_GROWTH + math.ceil(gamma * self.block))
            for merged in (pair.keys, pair.values):
                if merged is not None and merged.used > math.ceil(gamma * pair.length):
                    return to_come
        return to_come if gamma == 1 or self.rule.has_threshold else min(room, to_come)

    def _empty(
        self, parts: Sequence[tuple[Rows, Merged | None]], like: torch.Tensor, count: int, room: int, is_keys: bool
    ) -> Merged:
        """Slots and places for all tokens, those of ``parts`` filled in."""
        heads, dim = like.shape[1], like.shape[3]
        directions = self.new_directions(like.new_zeros(count, heads, self.block, dim), is_keys, self.length)
        directions.fill()
        magnitudes = Buffer(like.new_zeros(2, count, heads, self.length), 3)
        used = {id(merged): 0 if merged is None else merged.used for _, merged in parts}
        places = max(used.values()) + room + 1  # the last one takes what is not retained
        retained = torch.full((count, heads, places), -1, dtype=torch.int32, device=like.device)
        unmerged = like.new_zeros(2, count, heads, places, dim)
        threshold = None
        if self.rule.has_threshold:
            dtype = torch.promote_types(like.dtype, torch.float32)
            threshold = torch.zeros(count, heads, dtype=dtype, device=like.device)
        for rows, merged in parts:
            if merged is None:
                continue
            n = used[id(merged)]
            directions.put_all(merged.directions, rows)
            magnitudes.whole[:, rows, :, : merged.magnitudes.length] = merged.magnitudes.used
            retained[rows, :, :n] = merged.retained[..., :n]
            unmerged[:, rows, :, :n] = merged.unmerged[..., :n, :]
            if threshold is not None and merged.threshold is not None:
                threshold[rows] = merged.threshold
        return Merged(directions, magnitudes, retained, unmerged, threshold)

    def _fill(self, rows: Rows, pair: Pair) -> None:
        """Take over the counts, the masks and the waiting tokens of a pair."""
        self.merged[rows] = pair.length
        for layer, recents in enumerate(pair.new):
            self.fed[layer][rows] = pair.length + pair.waiting
            for mine, theirs in zip(self.new[layer] or (), recents or (), strict=False):
                mine.whole[rows, :, : theirs.length] = theirs.used
        if pair.valid is not None:
            assert not pair.waiting, "pads among tokens that are not merged yet"
            if self.is_real is None:
                shape = (len(self.merged), 1, self.length)
                self.is_real = torch.ones(shape, dtype=torch.bool, device=self.merged.device)
            self.is_real[rows, :, : pair.length] = pair.valid

    def append(self, layer: int, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor | None) -> None:
        assert keys.shape[2] == 1 and valid is None, "a static layer takes single tokens"
        slot = (self.fed[layer] - self.merged)[:, None, None, None]  # [N, 1, 1, 1]
        for recent, new in zip(self.new[layer] or (), (keys, values), strict=True):
            recent.whole.scatter_(2, slot.expand_as(new), new)
        self.fed[layer] += 1

    def visible(self, layer: int) -> torch.Tensor:
        at = torch.arange(max(self.length, self.block), device=self.merged.device)
        waiting = (at[: self.block] < (self.fed[layer] - self.merged)[:, None])[:, None]  # [N, 1, block]
        if not self.length:
            return waiting
        merged = (at[: self.length] < self.merged[:, None])[:, None]
        return torch.cat([merged if self.is_real is None else merged & self.is_real, waiting], dim=-1)

    def merge(self) -> None:
        """The part of each step: merge its token, where a block is one token."""
        if not self.merges_in_step:
            return
        for merged, (lower, upper) in self._recent(ALL_ROWS):
            new = self.rule.merge(lower, upper)
            retain = self.rule.retain_later(new, None, merged.threshold)
            merged.directions.put_at(new.direction, self.merged)
            at = self.merged[None, :, None, None].expand_as(new.magnitudes)
            merged.magnitudes.whole.scatter_(3, at, new.magnitudes)
            self._retain(merged, ALL_ROWS, retain, self.merged.int()[:, None, None], torch.stack([lower, upper]))
        self.merged += 1

    def between_steps(self) -> None:
        """Merge blocks that are full; now and then, and after the last step of those reserved, :meth:`end_steps`."""
        self._steps += 1
        for group in self.groups:
            group.length += 1
            if not self.merges_in_step and group.length % self.block == 0:
                self._merge_block(group.rows, group.length)
        if self._steps % RETAINED_GROWTH == 0 or self._steps == self.steps:
            self.end_steps()

    def end_steps(self) -> None:
        """Look whether every retained token found a place; asks the device.

        Raises:
            InputError: one did not.
        """
        if bool(self.has_lost):
            raise InputError(
                "method/storage",
                "minicache",
                f"found more than {RETAINED_GROWTH} generated tokens that cannot be merged: their directions in two "
                "layers are opposite, or zero; use runner.cuda_graph=false",
            )

    def _merge_block(self, rows: Rows, end: int) -> None:
        """Merge the block of new tokens that ends before token ``end``."""
        start = end - self.block
        slots = torch.arange(start, end, dtype=torch.int32, device=self.merged.device)
        for merged, (lower, upper) in self._recent(rows):
            new = self.rule.merge(lower, upper)
            threshold = None if merged.threshold is None else merged.threshold[rows]
            if start:
                retain = self.rule.retain_later(new, None, threshold)
            else:
                retain, threshold = self.rule.retain_first(new, torch.ones_like(new.unmergeable))
                if merged.threshold is not None and threshold is not None:
                    merged.threshold[rows] = threshold
            merged.directions.put(new.direction, rows, start)
            merged.magnitudes.whole[:, rows, :, start:end] = new.magnitudes
            self._retain(merged, rows, retain, slots, torch.stack([lower, upper]))
        self.merged[rows] = end

    def _recent(self, rows: Rows) -> list[tuple[Merged, tuple[torch.Tensor, torch.Tensor]]]:
        """Keys and values in turn: what is merged of them, and the new tokens [n, H, block, D] of both layers."""
        lower, upper = self.new
        assert self.keys is not None and self.values is not None and lower is not None and upper is not None
        merged = (self.keys, self.values)
        return [(merged[i], (lower[i].whole[rows], upper[i].whole[rows])) for i in range(2)]

    def _retain(
        self, merged: Merged, rows: Rows, retain: torch.Tensor, slots: torch.Tensor, both: torch.Tensor
    ) -> None:
        retained, unmerged = merged.retained[rows], merged.unmerged[:, rows]  # views of all rows, or copies of some
        free = retained.shape[2] - 1 - (retained >= 0).sum(-1)
        self.has_lost |= (retain.sum(-1) > free).any()
        place_retained(retained, unmerged, retain, slots, both)
        if not isinstance(rows, slice):
            merged.retained[rows], merged.unmerged[:, rows] = retained, unmerged

    def static_state(self) -> list[torch.Tensor]:
        """See :meth:`..base.LayerStorage.static_state`; of both layers."""
        retained = [merged.retained for merged in (self.keys, self.values) if merged is not None]
        return [*self.fed, self.merged, self.has_lost, *retained]

    def tensors(self, layer: int) -> list[torch.Tensor]:
        own = [*super().tensors(layer), self.fed[layer]]
        if layer == 1:
            return own
        return [*own, self.merged, self.has_lost, *([] if self.is_real is None else [self.is_real])]

    def logical_bytes(self, layer: int) -> int:
        merged_tokens, waiting = int(self.merged.sum()), int((self.fed[layer] - self.merged).sum())
        total = sum(waiting * recent.whole[0, :, 0].nbytes for recent in self.new[layer] or ())
        for merged in (self.keys, self.values):
            if layer == 1 or merged is None:
                continue
            slots = sum(t.nbytes for t in (*merged.directions.tensors(), merged.magnitudes.whole))
            total += slots * merged_tokens // (len(self.merged) * self.length)
            if merged.threshold is not None:
                total += int((self.merged > 0).sum()) * merged.threshold[0].nbytes
            for group in self.groups:
                retained = merged.retained[group.rows]
                used = int((retained >= 0).sum(-1).max())
                total += retained[..., :used].nbytes + merged.unmerged[:, group.rows, :, :used].nbytes
        return total + (merged_tokens + waiting if layer == 0 and self.is_real is not None else 0)
