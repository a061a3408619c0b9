"""A pair of layers in tensors of fixed shape, for decode steps that are captured and replayed.

    merged tokens             [0, merged)        allocated for all tokens of the generation
    new tokens per layer      [merged, fed)      in buffers of one block

The lengths of the rows are counters on the device. A block of one token is merged within the step. Longer blocks and
quantized directions are merged between steps, when the host's count says that a block is full.

Legend: N rows of the pair, n rows of one length, H KV heads, D channels.
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


def static_pair(pairs: Sequence[tuple[Rows, Pair]], count: int, steps: int) -> StaticPair:
    """Combine pairs of the same two layers into one static pair; the second layer that calls it gets the same one.

    Args:
        pairs: Pairs with the indices of their rows; every row is in one of them.
        count: Total number of rows.
        steps: Maximum number of decode steps.
    """
    first = pairs[0][1]
    if not isinstance(first.static, StaticPair):
        first.static = StaticPair(pairs, count, steps)
    return first.static


class StaticPair(Pair):
    """Pair of fixed shape; see :func:`static_pair`. ``length`` is the number of slots for merged tokens."""

    def __init__(self, pairs: Sequence[tuple[Rows, Pair]], count: int, steps: int):
        first = pairs[0][1]
        super().__init__(first.rule.t, first.rule.gamma, first.rule.retention, first.block, first.new_directions)
        block = self.block
        self.groups = [LengthGroup(rows, pair.length + pair.unmerged_tokens) for rows, pair in pairs]
        self.length = max((group.length + steps) // block * block for group in self.groups)
        keys, values = first.example()  # [B, H, any, D]
        device = keys.device
        # Number of tokens of each row [N]: appended in the lower and in the upper layer, and merged.
        *self.fed, self.merged = (torch.zeros(count, dtype=torch.int64, device=device) for _ in range(3))
        self.is_real: torch.Tensor | None = None  # [N, 1, length], False for the prompt's pads; None: no pads
        self.has_overflow = torch.zeros(1, dtype=torch.bool, device=device)  # more retained tokens than allocated
        self.new = [(self._zeros(keys, count), self._zeros(values, count)) for _ in range(2)]
        extra = self._extra_retained(pairs)
        if self.length:
            self.keys = self._allocate([(rows, pair.keys) for rows, pair in pairs], keys, count, extra, True)
            self.values = self._allocate([(rows, pair.values) for rows, pair in pairs], values, count, extra, False)
        self.merges_in_step = block == 1 and self.keys is not None and self.keys.directions.takes_tokens_at
        self._steps = 0
        for rows, pair in pairs:
            self._fill(rows, pair)

    def _zeros(self, like: torch.Tensor, count: int) -> Buffer:
        """Return a buffer for the tokens of one block, all slots in use."""
        return Buffer(like.new_zeros(count, like.shape[1], self.block, like.shape[3]), 2)

    def _extra_retained(self, pairs: Sequence[tuple[Rows, Pair]]) -> int:
        """Return the number of entries to allocate for tokens retained while decoding.

        All further tokens may be retained if a threshold decides, or if the prompt has many unmergeable tokens.
        """
        remaining = max(self.length - pair.length for _, pair in pairs)
        extra, gamma = RETAINED_GROWTH, self.rule.gamma
        for _, pair in pairs:
            if not pair.length:  # the first block is not merged yet and retains the share gamma
                extra = max(extra, RETAINED_GROWTH + math.ceil(gamma * self.block))
            for merged in (pair.keys, pair.values):
                if merged is not None and merged.used > math.ceil(gamma * pair.length):
                    return remaining
        return remaining if gamma == 1 or self.rule.has_threshold else min(extra, remaining)

    def _allocate(
        self, parts: Sequence[tuple[Rows, Merged | None]], like: torch.Tensor, count: int, extra: int, is_keys: bool
    ) -> Merged:
        """Allocate merged keys or values for all tokens, and copy those of ``parts``."""
        heads, dim = like.shape[1], like.shape[3]
        directions = self.new_directions(like.new_zeros(count, heads, self.block, dim), is_keys, self.length)
        directions.fill()
        magnitudes = Buffer(like.new_zeros(2, count, heads, self.length), 3)
        used = {id(merged): 0 if merged is None else merged.used for _, merged in parts}
        entries = max(used.values()) + extra + 1  # the last one is the dummy slot
        retained = torch.full((count, heads, entries), -1, dtype=torch.int32, device=like.device)
        unmerged = like.new_zeros(2, count, heads, entries, dim)
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
        """Copy the counts, the masks and the new tokens of a pair."""
        self.merged[rows] = pair.length
        for layer, buffers in enumerate(pair.new):
            self.fed[layer][rows] = pair.length + pair.unmerged_tokens
            for target, source in zip(self.new[layer] or (), buffers or (), strict=False):
                target.whole[rows, :, : source.length] = source.used
        if pair.valid is not None:
            assert not pair.unmerged_tokens, "pads among tokens that are not merged yet"
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
        slot = torch.arange(max(self.length, self.block), device=self.merged.device)
        new = (slot[: self.block] < (self.fed[layer] - self.merged)[:, None])[:, None]  # [N, 1, block]
        if not self.length:
            return new
        merged = (slot[: self.length] < self.merged[:, None])[:, None]  # [N, 1, length]
        return torch.cat([merged if self.is_real is None else merged & self.is_real, new], dim=-1)

    def merge(self) -> None:
        """Merge the token of a step, if a block is one token."""
        if not self.merges_in_step:
            return
        for merged, (lower, upper) in self._recent(ALL_ROWS):
            new = self.rule.merge(lower, upper)
            retain = self.rule.retain_later(new, None, merged.threshold)
            merged.directions.put_at(new.direction, self.merged)
            index = self.merged[None, :, None, None].expand_as(new.magnitudes)
            merged.magnitudes.whole.scatter_(3, index, new.magnitudes)
            self._retain(merged, ALL_ROWS, retain, self.merged.int()[:, None, None], torch.stack([lower, upper]))
        self.merged += 1

    def between_steps(self) -> None:
        """Merge full blocks, and call :meth:`end_steps` periodically."""
        self._steps += 1
        for group in self.groups:
            group.length += 1
            if not self.merges_in_step and group.length % self.block == 0:
                self._merge_block(group.rows, group.length)
        if self._steps % RETAINED_GROWTH == 0:
            self.end_steps()

    def end_steps(self) -> None:
        """Check that all retained tokens were stored; syncs with the device.

        Raises:
            InputError: More tokens had to be retained than were allocated.
        """
        if bool(self.has_overflow):
            raise InputError(
                "method/storage",
                "minicache",
                f"generated more than {RETAINED_GROWTH} tokens that cannot be merged, because their directions in two "
                "layers are opposite or zero; use runner.cuda_graph=false",
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
        """Return, for keys and for values, the merged tokens and the new tokens [n, H, block, D] of both layers."""
        lower, upper = self.new
        assert self.keys is not None and self.values is not None and lower is not None and upper is not None
        merged = (self.keys, self.values)
        return [(merged[i], (lower[i].whole[rows], upper[i].whole[rows])) for i in range(2)]

    def _retain(
        self, merged: Merged, rows: Rows, retain: torch.Tensor, slots: torch.Tensor, both: torch.Tensor
    ) -> None:
        retained, unmerged = merged.retained[rows], merged.unmerged[:, rows]  # views if a slice, else copies
        free = retained.shape[2] - 1 - (retained >= 0).sum(-1)  # [n, H]
        self.has_overflow |= (retain.sum(-1) > free).any()
        place_retained(retained, unmerged, retain, slots, both)
        if not isinstance(rows, slice):
            merged.retained[rows], merged.unmerged[:, rows] = retained, unmerged

    def static_state(self) -> list[torch.Tensor]:
        """Return the static state of both layers; see :meth:`..base.LayerStorage.static_state`."""
        retained = [merged.retained for merged in (self.keys, self.values) if merged is not None]
        return [*self.fed, self.merged, self.has_overflow, *retained]

    def tensors(self, layer: int) -> list[torch.Tensor]:
        own = [*super().tensors(layer), self.fed[layer]]
        if layer == 1:
            return own
        return [*own, self.merged, self.has_overflow, *([] if self.is_real is None else [self.is_real])]

    def logical_bytes(self, layer: int) -> int:
        merged_tokens, new_tokens = int(self.merged.sum()), int((self.fed[layer] - self.merged).sum())
        total = sum(new_tokens * recent.whole[0, :, 0].nbytes for recent in self.new[layer] or ())
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
        return total + (merged_tokens + new_tokens if layer == 0 and self.is_real is not None else 0)
