"""Uncompressed keys and values in the compute dtype: the storage of the full cache and of token methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch

from ..cache.kv_shape import KVShape
from ..cache.logits import LogitRule
from .base import LayerStorage, Storage, StorageCapabilities, slots_to_keep
from .buffer import grown, take_slots
from .static import NextSlot
from .step_attention import step_attention, write_token

COMPACTION_INTERVAL_STEPS = 64
"""Decode steps with evictions between two compactions; in between evicted tokens leave holes."""


class DenseLayer(LayerStorage):
    """Buffers [B, H, capacity, D] of which the first ``length`` slots are in use.

    ``write`` allocates slots for its tokens and for the ``reserved`` ones; ``append`` to a full buffer adds ``growth``
    slots. If all rows are equally long, these slots are the only difference between stored and logical bytes.
    """

    def __init__(self) -> None:
        self.length = 0
        self._keys: torch.Tensor | None = None
        self._values: torch.Tensor | None = None
        self._valid: torch.Tensor | None = None
        self._drops = 0  # since the last compaction
        self._next: torch.Tensor | None = None  # [1] int64, slot of the next token, once static

    def write(self, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor | None = None) -> None:
        # Always copy: a slice or a view of a fused projection would keep its whole base tensor in memory.
        self.length = keys.shape[2]
        self._keys, self._values, self._valid = (
            None if x is None else grown(x, self.length, self.length + self.reserved) for x in (keys, values, valid)
        )

    def append(self, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor | None = None) -> None:
        n, start = keys.shape[2], self.length
        if self._keys is None or self._values is None:
            self.write(keys, values, None if valid is None else valid[:, None])
            return
        slot = self.next_slot
        if slot is not None:
            assert n == 1 and valid is None, "a static layer takes single tokens"
            write_token(keys, values, slot.keys, slot.values, slot.valid, slot.slot)
            self.advance()
            return
        self.count_down(n)
        if start + n > self._keys.shape[2]:
            capacity = self.capacity(start + n, n)
            self._keys = grown(self._keys, start, capacity)
            self._values = grown(self._values, start, capacity)
            if self._valid is not None:
                self._valid = grown(self._valid, start, capacity)
        if valid is not None and self._valid is None:
            self._valid = torch.ones(keys.shape[0], 1, self._keys.shape[2], dtype=torch.bool, device=keys.device)
        self._keys[:, :, start : start + n] = keys
        self._values[:, :, start : start + n] = values
        if self._valid is not None:
            self._valid[:, :, start : start + n] = True if valid is None else valid[:, None]
        self.length = start + n

    @property
    def next_slot(self) -> NextSlot | None:
        if self._next is None:
            return None
        assert self._keys is not None and self._values is not None and self._valid is not None
        return NextSlot(self._keys, self._values, self._valid, self._next)

    def advance(self) -> None:
        assert self._next is not None
        self._next += 1

    def drop(self, keep: torch.Tensor, compact_now: bool) -> torch.Tensor | None:
        if self._next is not None:
            assert self._valid is not None
            self._valid.copy_(keep.expand_as(self._valid))
            return self.compact() if compact_now else None
        self._drops += 1
        if compact_now or self._drops >= COMPACTION_INTERVAL_STEPS:
            self._drops = 0
            return super().drop(keep, compact_now)
        assert self._keys is not None, "drop before write"
        if self._valid is None or self._valid.shape[1] != keep.shape[1]:
            self._valid = torch.ones(*keep.shape[:2], self._keys.shape[2], dtype=torch.bool, device=keep.device)
        self._valid[:, :, : self.length] = keep
        return None

    def read(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        assert self._keys is not None and self._values is not None, "read before write"
        n = self.length
        valid = None if self._valid is None else self._valid[:, :, :n]
        return self._keys[:, :, :n], self._values[:, :, :n], valid

    def keep(self, slots: torch.Tensor, valid: torch.Tensor | None = None) -> None:
        keys, values, _ = self.read()
        if slots.dim() == 1:
            keys, values = keys.index_select(2, slots), values.index_select(2, slots)
        else:
            keys, values = take_slots(keys, slots), take_slots(values, slots)
        count = keys.shape[2]
        assert self._keys is not None and self._values is not None
        if self._keys.shape[2] > count + self.growth:  # shrink the buffers
            self._keys, self._values = keys, values
        else:
            self._keys[:, :, :count] = keys
            self._values[:, :, :count] = values
        self._valid = None
        if valid is not None:
            self._valid = torch.ones(*valid.shape[:2], self._keys.shape[2], dtype=torch.bool, device=valid.device)
            self._valid[:, :, :count] = valid
        self.length = count

    def add_to_values(self, slots: torch.Tensor, added: torch.Tensor) -> None:
        assert self._values is not None, "add_to_values before write"
        index = slots[..., None].expand_as(added)
        self._values.scatter_(2, index, (self._values.gather(2, index) + added).to(self._values.dtype))

    supports_static_drop = True

    @property
    def static_problem(self) -> str | None:
        return None

    def make_static(self, steps: int, mask_heads: int = 1) -> None:
        keys, values, valid = self.read()
        assert self._keys is not None and self._values is not None
        capacity = max(self.length + steps, self._keys.shape[2])
        heads = mask_heads if valid is None else max(mask_heads, valid.shape[1])
        mask = torch.zeros(keys.shape[0], heads, capacity, dtype=torch.bool, device=keys.device)
        mask[:, :, : self.length] = True if valid is None else valid
        # Zeros, because uninitialized memory may contain NaN, and a zero weight times NaN is NaN.
        if self._keys.shape[2] < capacity:
            self._keys, self._values = (grown(x, self.length, capacity) for x in (keys, values))
        self._keys[:, :, self.length :], self._values[:, :, self.length :] = 0, 0
        self._valid, self._next = mask, torch.tensor([self.length], device=keys.device)
        self.length = capacity

    @property
    def end(self) -> int | torch.Tensor:
        return self.length if self._next is None else self._next[None]

    def close_gaps(self) -> torch.Tensor | None:
        _, _, valid = self.read()
        if not self._drops or valid is None:
            return None
        self._drops = 0
        return super().drop(valid, compact_now=True)

    def compact(self) -> torch.Tensor | None:
        assert self._keys is not None and self._values is not None
        assert self._valid is not None and self._next is not None
        slots, valid = slots_to_keep(self._valid)
        count = slots.shape[-1]
        for x in (self._keys, self._values):
            x[:, :, :count] = take_slots(x, slots)
        self._valid.zero_()
        self._valid[:, :, :count] = True if valid is None else valid
        self._next.fill_(count)
        return slots

    def static_state(self) -> list[torch.Tensor]:
        assert self._next is not None and self._valid is not None, "static_state before make_static"
        return [self._next, self._valid]

    def attend(self, query: torch.Tensor, rule: LogitRule, valid: torch.Tensor | None) -> torch.Tensor:
        if query.shape[2] > 1:
            return super().attend(query, rule, valid)
        keys, values, stored = self.read()
        return step_attention(query, keys, values, rule, stored, self._next)

    def shrink_to_fit(self) -> None:
        keys, values, valid = self.read()
        if self._keys is not None and self._keys.shape[2] > self.length:
            self.write(keys, values, valid)

    def tensors(self) -> list[torch.Tensor]:
        return [x for x in (self._keys, self._values, self._valid) if x is not None]

    @property
    def tokens(self) -> torch.Tensor:
        keys, _, valid = self.read()
        if valid is None:
            return torch.full((keys.shape[0], 1), self.length, dtype=torch.int64, device=keys.device)
        return valid.sum(-1)

    @property
    def logical_bytes(self) -> int:
        keys, values, _ = self.read()
        heads = keys.shape[1]
        slots = int(self.tokens.expand(-1, heads).sum())
        return slots * (keys.shape[3] + values.shape[3]) * keys.element_size()


@dataclass(frozen=True)
class Dense(Storage):
    """Uncompressed storage; it has no options."""

    id: ClassVar[str] = "Dense"

    @cached_property
    def capabilities(self) -> StorageCapabilities:
        return StorageCapabilities(lossless=True, adds_to_values=True)

    def new_layers(self, num_layers: int) -> Sequence[DenseLayer]:
        return [DenseLayer() for _ in range(num_layers)]

    def bytes_formula(self, tokens: Sequence[int], heads: int, shape: KVShape, new_tokens: int = 0) -> int:
        """Return the sum over layers of heads x tokens x (key + value channels) x element_bytes."""
        return heads * shape.token_channels * shape.element_bytes * sum(tokens)
