"""Merging while decoding: the value of an evicted token is added in equal shares to the next kept tokens.

Used by scorers whose ``merges_values`` is True (CaM). Keys and attention sums do not change. Random numbers are a hash
(SplitMix64: Steele et al., 2014) of the row's text, the layer, the head and a counter on the device, so that they
depend neither on the device nor on the batch, and a captured step draws the same ones.

Legend: B batch rows, H stored heads, S slots, W slots of a window, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F

from ..storage.base import LayerStorage
from ..storage.buffer import take_slots

SEED_STEP = 1_000_003
"""Difference of the seeds of two runs, so that layers of one are not layers of the other."""
COUNTER_STEP = 0x9E3779B97F4A7C15 - 2**64
MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
"""Constants of SplitMix64, as signed numbers."""


class MergingScorer(Protocol):
    """Members of a scorer whose ``merges_values`` is True, in addition to those of every scorer."""

    @property
    def receivers(self) -> int:
        """Maximum number of kept tokens after an evicted one that share its value."""

    @property
    def seed(self) -> int:
        """Random seed."""

    def is_merged(self, score: torch.Tensor, mean: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        """Return whether an evicted token is merged: bool, of the common shape of the arguments.

        Args:
            score: Score of the token.
            mean: Mean of the receivers' scores.
            uniform: Random number in [0, 1).
        """


@dataclass
class Merging:
    """Merging in one layer, for one batch.

    Attributes:
        scorer: Number of receivers, and the rule that says which tokens are merged.
        layer: Index of the layer.
        random: [B] int64, states of the rows' random number generators.
    """

    scorer: MergingScorer
    layer: int
    random: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    def begin(self, text_seeds: torch.Tensor) -> None:
        """Seed the generators of all rows from the hashes [B] of their prompts."""
        self.random = _mixed(text_seeds + (self.scorer.seed * SEED_STEP + self.layer) % 2**63)

    def merge_one(
        self,
        storage: LayerStorage,
        scores: torch.Tensor,
        kept: torch.Tensor,
        victim: torch.Tensor,
        is_evicted: torch.Tensor,
        in_place: bool,
    ) -> None:
        """Merge at most one evicted token of each row and head; static shapes, no device sync.

        Args:
            storage: Storage of the layer, which still holds the evicted tokens.
            scores: [B, H, S] float32.
            kept: bool [B, H, S], slots of the tokens that stay.
            victim: int64 [B, H, 1], slot of the evicted token.
            is_evicted: bool [B, 1 or H, 1], False where no token is evicted.
            in_place: Overwrite :attr:`random` instead of replacing it, in a captured step.
        """
        window = min(self.scorer.receivers, scores.shape[2])
        slot = torch.arange(scores.shape[2], device=scores.device)
        # Number the kept tokens after the victim 1, 2, ...; scatter their slots to these places, all others to place 0.
        follows = kept & (slot > victim)  # [B, H, S]
        number = follows.cumsum(-1)
        place = torch.where(follows & (number <= window), number, 0)
        receivers = place.new_zeros(*place.shape[:2], window + 1).scatter_(-1, place, slot.expand_as(place))[..., 1:]
        exists = torch.arange(1, window + 1, device=slot.device) <= number[..., -1:]  # [B, H, W - 1]
        slots = torch.cat([victim, receivers], dim=-1)  # [B, H, W]
        values = take_slots(storage.read()[1], slots)  # [B, H, W, D]
        is_evicted = is_evicted.expand_as(victim)
        uniform = self._uniform(torch.zeros_like(victim), is_evicted, in_place)
        stays = F.pad(exists, (1, 0))
        leaves = F.pad(is_evicted, (0, window))
        added = self._received(values, scores.gather(-1, slots), stays, leaves, uniform)
        storage.add_to_values(receivers, added[:, :, 1:])

    def merge(
        self, storage: LayerStorage, scores: torch.Tensor, held: torch.Tensor, kept: torch.Tensor, in_place: bool
    ) -> None:
        """Merge the tokens that are True in ``held`` and False in ``kept``, bool [B, H, S]; see :meth:`merge_one`."""
        evicted = held & ~kept
        uniform = self._uniform(held.cumsum(-1), evicted, in_place)
        slots = torch.arange(held.shape[2], device=held.device).expand_as(held)
        storage.add_to_values(slots, self._received(storage.read()[1], scores, kept, evicted, uniform))

    def _received(
        self,
        values: torch.Tensor,
        scores: torch.Tensor,
        kept: torch.Tensor,
        evicted: torch.Tensor,
        uniform: torch.Tensor,
    ) -> torch.Tensor:
        """Return the sum of the shares that each kept token receives, [B, H, W, D] in float32 or float64.

        Args:
            values: [B, H, W, D], in token order.
            scores: [B, H, W].
            kept, evicted: bool [B, H, W]; slots that are neither hold no token.
            uniform: [B, H, 1 or W] random numbers.
        """
        number = kept.cumsum(-1)  # [B, H, W], kept tokens up to each slot
        count = (number[..., -1:] - number).clamp(max=self.scorer.receivers)  # receivers of the token in the slot
        # end[k]: one past the slot of the k-th kept token, and 0 for k = 0. All other slots are scattered to place 0.
        after = torch.arange(1, kept.shape[2] + 1, device=kept.device).expand_as(number)
        end = F.pad(number.new_zeros(number.shape), (1, 0)).scatter_(-1, torch.where(kept, number, 0), after)
        end[..., 0] = 0
        # Sums over consecutive kept tokens are differences of running sums, in float64 because these become large.
        sums = F.pad((scores.double() * kept).cumsum(-1), (1, 0)).gather(-1, end)  # [B, H, W + 1]
        mean = (sums.gather(-1, number + count) - sums.gather(-1, number)) / count.clamp(min=1)
        merged = evicted & (count > 0) & self.scorer.is_merged(scores, mean, uniform)
        dtype = torch.promote_types(values.dtype, torch.float32)
        shares = values.to(dtype) / count.clamp(min=1)[..., None]
        given = F.pad(shares.masked_fill(~merged[..., None], 0).cumsum(2), (0, 0, 1, 0))  # [B, H, W + 1, D]
        # A token receives from the evicted tokens between it and the kept token `receivers` places before it.
        first = end.gather(-1, (number - self.scorer.receivers).clamp(min=0))
        received = given[:, :, 1:] - take_slots(given, first)
        return received.masked_fill(~kept[..., None], 0)

    def _uniform(self, index: torch.Tensor, evicted: torch.Tensor, in_place: bool) -> torch.Tensor:
        """Return random numbers in [0, 1), float32 [B, H, W], and advance the generators of rows with evicted tokens.

        Args:
            index: int64 [B, H, W], a number for each token that does not depend on padding.
            evicted: bool [B, H, W].
            in_place: See :meth:`merge_one`.
        """
        heads = index.shape[1]
        head = torch.arange(heads, device=index.device)[:, None]
        advanced = self.random + COUNTER_STEP
        counter = index * heads + head + 1  # [B, H, W]
        bits = _mixed(_mixed(advanced)[:, None, None] + counter * COUNTER_STEP)
        advanced = torch.where(evicted.flatten(1).any(-1), advanced, self.random)
        self.random = self.random.copy_(advanced) if in_place else advanced
        return _shifted(bits, 40).float() * 2**-24


def _mixed(x: torch.Tensor) -> torch.Tensor:
    """Return the hash of each int64 number, as the output function of SplitMix64."""
    x = (x ^ _shifted(x, 30)) * MULTIPLIERS[0]
    x = (x ^ _shifted(x, 27)) * MULTIPLIERS[1]
    return x ^ _shifted(x, 31)


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift int64 to the right and fill with zeros."""
    return (x >> bits) & (2 ** (64 - bits) - 1)
