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
    """Buffers [B, H, capacity, D] of which the first ``length`` slots are in use: one of keys and one of values.

    ``write`` allocates slots for its tokens and for the ``reserved`` ones; ``append`` to a full buffer adds ``growth``
    slots. If all rows are equally long, these slots are the only difference between stored and logical bytes.
    """

    def __init__(self) -> None:
        self.length = 0
        self._planes: list[torch.Tensor] = []  # keys and values; empty before the first token
        self._valid: torch.Tensor | None = None
        self._drops = 0  # since the last compaction
        self._next: torch.Tensor | None = None  # [1] int64, slot of the next token, once static

    def planes_of(self, keys: torch.Tensor, values: torch.Tensor) -> list[torch.Tensor]:
        """Return the tensors to store for new tokens."""
        return [keys, values]

    def keys_and_values(self, planes: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values of stored tensors."""
        keys, values = planes
        return keys, values

    @property
    def _used(self) -> list[torch.Tensor]:
        """The stored tensors without their unused slots."""
        assert self._planes, "read before write"
        return [x[:, :, : self.length] for x in self._planes]

    def write(self, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor | None = None) -> None:
        # Always copy: a slice or a view of a fused projection would keep its whole base tensor in memory.
        self.length = keys.shape[2]
        capacity = self.length + self.reserved
        self._planes = [grown(x, self.length, capacity) for x in self.planes_of(keys, values)]
        self._valid = None if valid is None else grown(valid, self.length, capacity)

    def append(self, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor | None = None) -> None:
        n, start = keys.shape[2], self.length
        if not self._planes:
            self.write(keys, values, None if valid is None else valid[:, None])
            return
        new = self.planes_of(keys, values)
        if self._next is not None:
            assert self._valid is not None and n == 1 and valid is None, "a static layer takes single tokens"
            # A single plane is both: its token is written twice to the same slot.
            write_token(new[0], new[-1], self._planes[0], self._planes[-1], self._valid, self._next)
            self.advance()
            return
        self.count_down(n)
        if start + n > self._planes[0].shape[2]:
            capacity = self.capacity(start + n, n)
            self._planes = [grown(x, start, capacity) for x in self._planes]
            if self._valid is not None:
                self._valid = grown(self._valid, start, capacity)
        if valid is not None and self._valid is None:
            shape = (keys.shape[0], 1, self._planes[0].shape[2])
            self._valid = torch.ones(shape, dtype=torch.bool, device=keys.device)
        for plane, x in zip(self._planes, new, strict=True):
            plane[:, :, start : start + n] = x
        if self._valid is not None:
            self._valid[:, :, start : start + n] = True if valid is None else valid[:, None]
        self.length = start + n

    @property
    def next_slot(self) -> NextSlot | None:
        if self._next is None or len(self._planes) == 1:
            return None
        assert self._valid is not None
        keys, values = self._planes
        return NextSlot(keys, values, self._valid, self._next)

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
        assert self._planes, "drop before write"
        if self._valid is None or self._valid.shape[1] != keep.shape[1]:
            self._valid = torch.ones(*keep.shape[:2], self._planes[0].shape[2], dtype=torch.bool, device=keep.device)
        self._valid[:, :, : self.length] = keep
        return None

    def read(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        return *self.keys_and_values(self._used), self.valid

    @property
    def valid(self) -> torch.Tensor | None:
        return None if self._valid is None else self._valid[:, :, : self.length]

    def keep(self, slots: torch.Tensor, valid: torch.Tensor | None = None) -> None:
        planes = self._used
        if slots.dim() == 1:
            planes = [x.index_select(2, slots) for x in planes]
        else:
            planes = [take_slots(x, slots) for x in planes]
        count = planes[0].shape[2]
        if self._planes[0].shape[2] > count + self.growth:  # shrink the buffers
            self._planes = planes
        else:
            for plane, x in zip(self._planes, planes, strict=True):
                plane[:, :, :count] = x
        self._valid = None
        if valid is not None:
            self._valid = torch.ones(*valid.shape[:2], self._planes[0].shape[2], dtype=torch.bool, device=valid.device)
            self._valid[:, :, :count] = valid
        self.length = count

    def add_to_values(self, slots: torch.Tensor, added: torch.Tensor) -> None:
        _, values = self._planes
        index = slots[..., None].expand_as(added)
        values.scatter_(2, index, (values.gather(2, index) + added).to(values.dtype))

    supports_static_drop = True

    @property
    def static_problem(self) -> str | None:
        return None

    def make_static(self, steps: int, mask_heads: int = 1) -> None:
        used, valid = self._used, self.valid
        capacity = max(self.length + steps, self._planes[0].shape[2])
        heads = mask_heads if valid is None else max(mask_heads, valid.shape[1])
        mask = torch.zeros(used[0].shape[0], heads, capacity, dtype=torch.bool, device=used[0].device)
        mask[:, :, : self.length] = True if valid is None else valid
        # Zeros, because uninitialized memory may contain NaN, and a zero weight times NaN is NaN.
        if self._planes[0].shape[2] < capacity:
            self._planes = [grown(x, self.length, capacity) for x in used]
        for plane in self._planes:
            plane[:, :, self.length :] = 0
        self._valid, self._next = mask, torch.tensor([self.length], device=mask.device)
        self.length = capacity

    @property
    def end(self) -> int | torch.Tensor:
        return self.length if self._next is None else self._next[None]

    def close_gaps(self) -> torch.Tensor | None:
        if not self._drops or self.valid is None:
            return None
        self._drops = 0
        return super().drop(self.valid, compact_now=True)

    def compact(self) -> torch.Tensor | None:
        assert self._planes and self._valid is not None and self._next is not None
        slots, valid = slots_to_keep(self._valid)
        count = slots.shape[-1]
        for x in self._planes:
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
        if self._planes and self._planes[0].shape[2] > self.length:
            self.write(*self.read())

    def tensors(self) -> list[torch.Tensor]:
        return self._planes + ([] if self._valid is None else [self._valid])

    @property
    def tokens(self) -> torch.Tensor:
        keys, valid = self._used[0], self.valid
        if valid is None:
            return torch.full((keys.shape[0], 1), self.length, dtype=torch.int64, device=keys.device)
        return valid.sum(-1)

    @property
    def logical_bytes(self) -> int:
        used = self._used
        slots = int(self.tokens.expand(-1, used[0].shape[1]).sum())
        return slots * sum(x.shape[3] * x.element_size() for x in used)


class LatentLayer(DenseLayer):
    """Buffer [B, H, capacity, D] of keys whose last D_v channels are the values (:mod:`..sharing.mla`)."""

    _value_channels = 0

    def planes_of(self, keys: torch.Tensor, values: torch.Tensor) -> list[torch.Tensor]:
        self._value_channels = values.shape[3]
        return [keys]

    def keys_and_values(self, planes: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        (keys,) = planes
        return keys, keys[..., keys.shape[3] - self._value_channels :]


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
        """Return the sum over layers of heads x tokens x channels stored per token x element_bytes."""
        return heads * shape.token_channels * shape.element_bytes * sum(tokens)
