"""Interface of storages, which represent kept tokens in memory.

A :class:`Storage` is a configuration (a frozen dataclass, one YAML in ``conf/method/storage/``). It creates one
:class:`LayerStorage` per layer, which stores a batch's keys and values. A storage never decides *which* tokens to keep.

Legend: B batch rows, H_q query heads, H stored heads, S slots, n new tokens, C kept tokens, D channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch

from ...conf.identity import HasIdentity
from ..cache.inference_mode import under_inference_mode
from ..cache.kv_shape import KVShape
from ..cache.logits import LogitRule
from ..cache.products import cached_attention
from ..cache.rotary import Rotary
from .buffer import Growing
from .capabilities import StorageCapabilities
from .static import NextSlot


def slots_to_keep(keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Convert a mask of kept slots, bool [..., S], to indices, left-padded to the largest number C of any row or head.

    Returns:
        Slots, int64 [..., C], increasing where valid; bool [..., C], False for padding, or None: no padding.
    """
    width = int(keep.sum(-1).max())
    slots = keep.int().sort(dim=-1, stable=True).indices[..., keep.shape[-1] - width :]
    valid = keep.gather(-1, slots)
    return slots, None if bool(valid.all()) else valid


def previous_slots(tokens: torch.Tensor, width: int, first: torch.Tensor, slots: int) -> torch.Tensor:
    """Return the slots [B, H, slots] that ``tokens`` [B, H] had, padded on the left to ``width``; -1: none.

    Args:
        tokens, width: Before the move.
        first: [B, H], the slot of the first of them now.
        slots: Number of slots now.
    """
    number = torch.arange(slots, device=tokens.device) - first[..., None]  # [B, H, slots], of the token in each slot
    is_old = (number >= 0) & (number < tokens[..., None])
    return torch.where(is_old, width - tokens[..., None] + number, -1)


IN_PLACE = (
    "write",
    "append",
    "advance",
    "keep",
    "drop",
    "add_to_values",
    "make_static",
    "make_static_within",
    "compact",
    "flush",
    "between_steps",
    "shrink_to_fit",
)
"""Methods of a storage that modify its contents."""


class LayerStorage(Growing, ABC):
    """Keys and values of one layer for one batch.

    Slots are in token order. ``valid`` masks [B, 1 or H, S] mark the slots that hold a real token: rows (or heads) with
    fewer tokens than the longest one are left-padded, and an evicted token may leave a hole.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Run the methods in :data:`IN_PLACE` under inference mode, in every storage."""
        super().__init_subclass__(**kwargs)
        for name in IN_PLACE:
            if name in vars(cls):
                setattr(cls, name, under_inference_mode(vars(cls)[name]))

    def bind(self, rotary: Callable[[], Rotary]) -> None:
        """Prepare for a layer of a model, whose keys ``rotary()`` rotates by differences of positions."""
        return

    @abstractmethod
    def write(self, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor | None = None) -> None:
        """Replace the contents by copies of ``keys`` and ``values`` [B, H, S, D]."""

    @abstractmethod
    def append(
        self, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """Append n tokens [B, H, n, D] after the last slot; ``valid`` [B, n] or None.

        Returns:
            The previous slots of all tokens if some have moved, as :meth:`drop` returns them, negative for new tokens.
        """

    @property
    def next_slot(self) -> NextSlot | None:
        """Where the next token goes, if writing it there and :meth:`advance` are the same as :meth:`append`."""
        return None

    def advance(self) -> None:
        """Count a token that has been written into :attr:`next_slot`."""
        raise NotImplementedError

    @abstractmethod
    def read(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return keys and values [B, H, S, D] in the compute dtype, and ``valid`` [B, 1 or H, S] (None: all True)."""

    @abstractmethod
    def keep(self, slots: torch.Tensor, valid: torch.Tensor | None = None) -> None:
        """Keep only ``slots``: [C] for all rows and heads, or [B, 1 or H, C]; increasing where valid."""

    def drop(self, keep: torch.Tensor, compact_now: bool) -> torch.Tensor | None:
        """Evict the tokens that are False in ``keep``.

        Args:
            keep: bool [B, 1 or H, S].
            compact_now: Compact the kept tokens immediately; otherwise a storage may leave holes for some steps.

        Returns:
            After a compaction the previous slots of the kept tokens, int64 [B, 1 or H, C], or a negative number for an
            empty slot; None: no token has moved.
        """
        slots, valid = slots_to_keep(keep)
        if valid is None and slots.shape[-1] == keep.shape[-1]:
            return None
        self.keep(slots, valid)
        return slots

    def add_to_values(self, slots: torch.Tensor, added: torch.Tensor) -> None:
        """Add ``added`` [B, H, W, D] to the values in ``slots`` [B, H, W], in place; repeated slots get zeros."""
        raise NotImplementedError

    def attend(self, query: torch.Tensor, rule: LogitRule, valid: torch.Tensor | None) -> torch.Tensor:
        """Attend with the last n tokens, already appended, over all stored tokens.

        Storages that are not dense override this to avoid copying all tokens into one tensor.

        Args:
            query: [B, H_q, n, D].
            rule: How logits are computed.
            valid: [B, n] bool, False for pads among the new tokens; None: no pads.

        Returns:
            [B, H_q, n, D].
        """
        keys, values, stored = self.read()
        return cached_attention(query, keys, values, rule, stored)

    @property
    def static_problem(self) -> str | None:
        """Why :meth:`make_static` is not possible; None: it is."""
        return "the storage has no tensors of fixed shape"

    supports_static_drop = False
    """Whether static steps can :meth:`drop` tokens (by the validity mask) and :meth:`compact` is implemented."""

    def make_static(self, steps: int, mask_heads: int = 1) -> None:
        """Give every tensor its final shape, with free slots for ``steps`` more single tokens.

        From then on a step (``append``, ``attend``, ``flush``) only writes into these tensors. It changes no shape,
        does not sync with the device, and depends on no host value that changes between steps, so it can be captured
        once and replayed (``runners/engine/captured.py``). :meth:`between_steps` is called after each step.
        """
        raise NotImplementedError

    def make_static_within(
        self, limit: int | torch.Tensor, extra_slots: int, mask_heads: int = 1
    ) -> torch.Tensor | None:
        """Make a layer static under a policy that evicts tokens; see :meth:`make_static`.

        Args:
            limit: Maximum number of tokens after an eviction, or int64 [B, 1 or H]: of each row or head.
            extra_slots: Maximum number of tokens until the next eviction or :meth:`compact`.
            mask_heads: See :meth:`make_static`.

        Returns:
            The previous slots of the tokens if some have moved, as :meth:`drop` returns them.
        """
        moved = self.close_gaps()
        self.make_static(
            max(0, int(limit if isinstance(limit, int) else limit.max()) - self.slots) + extra_slots, mask_heads
        )
        return moved

    @property
    def slots(self) -> int:
        """S, the number of slots that :meth:`read` returns."""
        return self.read()[0].shape[2]

    @property
    def valid(self) -> torch.Tensor | None:
        """The mask of :meth:`read`, without its keys and values."""
        return self.read()[2]

    @property
    def end(self) -> int | torch.Tensor:
        """One past the last slot that may hold a token; for a static layer int64 [1 or B, 1 or H] on the device."""
        return self.slots

    def close_gaps(self) -> torch.Tensor | None:
        """Compact the tokens if there are holes; returns their previous slots, as :meth:`drop` does."""
        return None

    def compact(self) -> torch.Tensor | None:
        """Compact the tokens of a static layer in place; returns their previous slots, as :meth:`drop` does."""
        raise NotImplementedError

    def static_state(self) -> list[torch.Tensor]:
        """Return the small tensors that a static step changes: counters, slot indices, validity masks.

        Restoring copies of them undoes a step; the next step overwrites everything else that it wrote.
        """
        raise NotImplementedError

    def flush(self) -> None:
        """Convert tokens that are no longer recent, after the attention of a step (for example, quantize them).

        In a static layer only work that is the same in every step.
        """
        return

    def between_steps(self) -> None:
        """Do the uncaptured work after a static step, in place: counts on the host, and periodic work."""
        return

    def end_steps(self) -> None:
        """Check a static layer after its last step, outside of the capture.

        Raises:
            InputError: A step needed more slots than :meth:`make_static` has allocated.
        """
        return

    def shrink_to_fit(self) -> None:
        """Free unused slots; called once after the prefill."""
        return

    @abstractmethod
    def tensors(self) -> list[torch.Tensor]:
        """Return every tensor that the layer keeps in memory, with scales, indices and masks."""

    @property
    @abstractmethod
    def tokens(self) -> torch.Tensor:
        """Number of real tokens stored, [B, 1 or H] int64."""

    @property
    @abstractmethod
    def logical_bytes(self) -> int:
        """Bytes of the real tokens, without padding and unused slots."""

    @property
    def step_bytes_read(self) -> int:
        """Bytes of keys and values that the last decode step read: all, unless the storage ``reads_part``."""
        return self.logical_bytes


class Storage(HasIdentity, ABC):
    """Configuration of a storage."""

    key_prefix: ClassVar[str] = "method.storage."

    @property
    def name(self) -> str:
        """Name on the command line."""
        return type(self).__name__.lower()

    @cached_property
    def capabilities(self) -> StorageCapabilities:
        """Properties of the storage."""
        return StorageCapabilities()

    @abstractmethod
    def new_layers(self, num_layers: int) -> Sequence[LayerStorage]:
        """Return empty storage for every layer of a model, for one batch."""

    @abstractmethod
    def bytes_formula(self, tokens: Sequence[int], heads: int, shape: KVShape, new_tokens: int = 0) -> int:
        """Return the bytes of one sequence.

        Args:
            tokens: Number of tokens per head of each layer.
            heads: Stored heads per layer.
            shape: KV shape of the model.
            new_tokens: Number of tokens generated after the prompt.
        """

    def bytes_read_formula(self, tokens: Sequence[int], heads: int, shape: KVShape, new_tokens: int = 0) -> int:
        """Return the bytes of a sequence that a decode step reads; shared bytes count once per layer."""
        return self.bytes_formula(tokens, heads, shape, new_tokens)
