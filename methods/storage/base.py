"""The contract of a storage: how kept tokens are represented.

A :class:`Storage` is the configuration (a frozen dataclass, one YAML in ``conf/method/storage/``); it makes one
:class:`LayerStorage` per layer, which holds a batch's keys and values. A storage never decides *which* tokens stay.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

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


IN_PLACE = ("write", "append", "keep", "drop", "make_static", "rollback", "settle", "trim")
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
    def can_freeze(self) -> bool:
        """Whether :meth:`freeze` can be called."""
        return False

    def make_static(self, room: int) -> None:
        """Give every tensor its last shape, with room for so many tokens.

        From then on single tokens come, each to a slot whose number is on the device: no step looks at a number on the
        host, so one step can be captured and replayed (``runners/engine/captured.py``).
        """
        raise NotImplementedError

    def rollback(self) -> None:
        """Of a frozen layer: empty the last slot again."""
        raise NotImplementedError

    def settle(self) -> None:
        """A step's attention is done: represent what has become old in the way of old tokens."""
        return

    def trim(self) -> None:
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


class Storage(HasIdentity, ABC):
    """Configuration of a storage."""

    @property
    def name(self) -> str:
        """Name as typed on the command line."""
        return type(self).__name__.lower()

    @property
    def is_exact(self) -> bool:
        """What is read back is bit for bit what was written."""
        return False

    @property
    def requires_same_tokens_across_layers(self) -> bool:
        """Layers share what they hold, so all of them must hold the same tokens."""
        return False

    @property
    def padding_bytes(self) -> int:
        """Bytes that a layer of a batch may take beyond the formula because it packs whole units."""
        return 0

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
