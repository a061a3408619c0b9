"""The contract of a storage: how kept tokens are represented.

A :class:`Storage` is the configuration (a frozen dataclass, one YAML in ``conf/method/storage/``); it makes one
:class:`LayerStorage` per layer, which holds a batch's keys and values. A storage never decides *which* tokens stay.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch

from ...conf.identity import HasIdentity
from ..cache.inference_mode import under_inference_mode
from ..cache.kv_shape import KVShape
from ..cache.logits import LogitRule
from ..cache.products import cached_attention
from .buffer import Growing


def slots_that_stay(stay: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Slots marked True in ``stay`` [..., S], in their order and ending at the right: (int64 [..., C], valid or None).

    C is the most that any row or head has; ``valid`` is False where one has fewer, None where all have as many.
    """
    width = int(stay.sum(-1).max())
    slots = stay.int().sort(dim=-1, stable=True).indices[..., stay.shape[-1] - width :]
    valid = stay.gather(-1, slots)
    return slots, None if bool(valid.all()) else valid


IN_PLACE = ("write", "append", "keep", "drop", "make_static", "compact", "flush", "between_steps", "shrink_to_fit")
"""Methods of a storage that change what it holds."""


class LayerStorage(Growing, ABC):
    """Keys and values of one layer for one batch.

    Slots are in the order of the tokens. ``valid`` masks [B, 1 or H, S] mark the slots that hold a real token: rows
    (or heads) of a batch that keep fewer tokens than the longest one are padded on the left, and a token that was
    dropped may leave a hole.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Have what changes a layer in place run under inference mode, in every storage."""
        super().__init_subclass__(**kwargs)
        for name in IN_PLACE:
            if name in vars(cls):
                setattr(cls, name, under_inference_mode(vars(cls)[name]))

    @abstractmethod
    def write(self, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor | None = None) -> None:
        """Replace everything by ``keys`` and ``values`` [B, H, S, D]; must not keep the given tensors alive."""

    @abstractmethod
    def append(self, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor | None = None) -> None:
        """Add n tokens [B, H, n, D] after the last slot; ``valid`` [B, n] or None."""

    @abstractmethod
    def read(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(keys, values) [B, H, S, D] in the compute dtype, and ``valid`` [B, 1 or H, S] or None: all real."""

    @abstractmethod
    def keep(self, slots: torch.Tensor, valid: torch.Tensor | None = None) -> None:
        """Keep only ``slots``: [C] for all rows and heads alike, or [B, 1 or H, C]; increasing where valid."""

    def drop(self, stay: torch.Tensor, at_once: bool) -> torch.Tensor | None:
        """Let the tokens that are False in ``stay`` [B, 1 or H, S] leave.

        A storage may leave holes for a while instead of moving the others together; ``at_once``: not this time.

        Returns:
            The slots that were moved together, int64 [B, 1 or H, C], for whoever counts something for each slot; None:
            no token has moved.
        """
        slots, valid = slots_that_stay(stay)
        if valid is None and slots.shape[-1] == stay.shape[-1]:
            return None
        self.keep(slots, valid)
        return slots

    def attend(self, query: torch.Tensor, rule: LogitRule, valid: torch.Tensor | None) -> torch.Tensor:
        """Attention of n new tokens, already appended, over everything held: [B, H_q, n, D] -> the same shape.

        A storage that does not hold its tokens as one tensor can do better than read them all into one.

        Args:
            query: of the last n tokens.
            rule: how logits are formed.
            valid: [B, n], False for pads among the new tokens; None: all real.
        """
        keys, values, held = self.read()
        return cached_attention(query, keys, values, rule, held)

    @property
    def supports_static(self) -> bool:
        """Whether :meth:`make_static` can be called."""
        return False

    supports_static_drop = False
    """Whether tokens can :meth:`drop` in a static step, by their validity alone, and :meth:`compact` is there."""

    def make_static(self, steps: int, mask_heads: int = 1) -> None:
        """Give every tensor its final shape, with room for ``steps`` further tokens, which come one at a time.

        From then on a step (``append``, ``attend``, ``flush``) writes into these tensors alone. It changes no shape,
        reads nothing back from the device, and depends on no number of the host that changes from step to step, so it
        can be captured once and replayed (``runners/engine/captured.py``). After each step, run or replayed,
        :meth:`between_steps` is called.
        """
        raise NotImplementedError

    def make_static_within(self, limit: int, room: int, mask_heads: int = 1) -> torch.Tensor | None:
        """Make a layer static that tokens leave: see :meth:`make_static`.

        Args:
            limit: Tokens that it may hold after an eviction.
            room: Further tokens until the next eviction or :meth:`compact`.
            mask_heads: See :meth:`make_static`.

        Returns:
            The slots moved by :meth:`close_gaps`, which comes first.
        """
        moved = self.close_gaps()
        self.make_static(max(0, limit - self.read()[0].shape[2]) + room, mask_heads)
        return moved

    @property
    def end(self) -> int | torch.Tensor:
        """Number of slots from which on none holds a token: of a static layer [1] int64 on the device."""
        return self.read()[0].shape[2]

    def close_gaps(self) -> torch.Tensor | None:
        """Move the tokens together now if some have left gaps; returns the slots moved, as :meth:`drop` does."""
        return None

    def compact(self) -> torch.Tensor | None:
        """Move the tokens of a static layer together, in place; returns the slots moved, as :meth:`drop` does."""
        raise NotImplementedError

    def static_state(self) -> list[torch.Tensor]:
        """The small tensors of a static layer that a step changes: counters, slot numbers, validity masks.

        With copies of them put back, a step has not been: what it wrote elsewhere is overwritten by the next one.
        """
        raise NotImplementedError

    def flush(self) -> None:
        """Represent old tokens as old tokens are, once a step's attention is done.

        A static layer does here only what each step does in the same way.
        """
        return

    def between_steps(self) -> None:
        """Work of a static layer after each step, outside of what is captured.

        Counts the steps on the host, and does what is due once in so many of them (KIVI quantizes a full block of
        recent tokens), in place: no tensor is replaced.
        """
        return

    def end_steps(self) -> None:
        """Called after the last step of a static layer, outside of what is captured.

        Raises:
            InputError: a step could not hold a token in the places that :meth:`make_static` made.
        """
        return

    def shrink_to_fit(self) -> None:
        """Give back room to grow; called once the prompt is in. A storage without such room has nothing to do."""
        return

    @abstractmethod
    def tensors(self) -> list[torch.Tensor]:
        """Every tensor that must stay in memory for this layer (scales, indices and masks too)."""

    @property
    @abstractmethod
    def tokens(self) -> torch.Tensor:
        """Real tokens held, [B, 1 or H], int64."""

    @property
    @abstractmethod
    def logical_bytes(self) -> int:
        """Bytes of the real tokens alone: no padding, no room to grow."""


@dataclass(frozen=True)
class StorageCapabilities:
    """What the cache and other parts need to know of a storage.

    Attributes:
        lossless: What is read back is bit for bit what was written.
        requires_same_tokens_across_layers: Layers share what they hold, so all of them must hold the same tokens.
        padding_bytes: Bytes that a layer of a batch may take beyond the formula because it packs whole units.
    """

    lossless: bool = False
    requires_same_tokens_across_layers: bool = False
    padding_bytes: int = 0


class Storage(HasIdentity, ABC):
    """Configuration of a storage."""

    key_prefix: ClassVar[str] = "method.storage."

    @property
    def name(self) -> str:
        """Name as typed on the command line."""
        return type(self).__name__.lower()

    @cached_property
    def capabilities(self) -> StorageCapabilities:
        """See there."""
        return StorageCapabilities()

    @abstractmethod
    def new_layers(self, num_layers: int) -> Sequence[LayerStorage]:
        """Empty storage for every layer of a model, for one batch."""

    @abstractmethod
    def bytes_formula(self, tokens: Sequence[int], heads: int, shape: KVShape, new_tokens: int = 0) -> int:
        """Bytes of one sequence.

        Args:
            tokens: ``tokens[l]`` are held in each head of layer l.
            heads: stored heads per layer.
            shape: the model's.
            new_tokens: how many tokens came after the prompt.
        """

    def bytes_read_formula(self, tokens: Sequence[int], heads: int, shape: KVShape, new_tokens: int = 0) -> int:
        """Bytes that a decode step reads of it: what several layers share, as often as they do."""
        return self.bytes_formula(tokens, heads, shape, new_tokens)
