"""Attention that later tokens have paid to generated ones, which decides what stays of a window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from .lengths import PyramidLengths
    from .state import PyramidState

ROOM = 256
"""Columns added at once to the sums over generated tokens."""


@dataclass
class WindowSums:
    """For each generated token that waits: the sum of the attention that tokens after its window paid to it.

    Generated tokens are windows of ``gen_window``, one after another, so it is known beforehand after which token the
    queries that count begin. Their weights rise evenly; so two sums are enough, one of them weighted by the query's
    number, where the published code keeps a row of attention for each query.

    Attributes:
        plain, by_number: [B, C] float32; of the columns before ``end`` the last W belong to the last W slots held, and
            the ones after it are zero.
        end: columns in use.
    """

    plain: torch.Tensor
    by_number: torch.Tensor
    end: int

    @staticmethod
    def empty(batch: int, device: torch.device) -> WindowSums:
        plain, by_number = (torch.zeros(batch, 0, device=device) for _ in range(2))
        return WindowSums(plain, by_number, 0)

    def observe(
        self, rule: PyramidLengths, state: PyramidState, weights: torch.Tensor, real: torch.Tensor | None
    ) -> None:
        """Add a step's attention [B, H, g, S]; where ``real`` is False nothing is added."""
        waiting = state.waiting()
        width, window = max(waiting), rule.gen_window
        self._make_room(width)
        self.end += 1
        if real is not None:  # the row of a pad stands still, and its columns end at the new one all the same
            for sums in (self.plain, self.by_number):
                used = sums[:, : self.end]
                used[:, 1:] = torch.where(real, used[:, 1:], used[:, :-1])
        # Up to the last token, in any row, whose window was complete before this step.
        observed = max(width - n + (n - 1) // window * window if n > window else 0 for n in waiting)
        if not observed:
            return
        at = slice(self.end - width, self.end - width + observed)
        first = weights.shape[3] - width
        paid = weights[..., first : first + observed].mean(dim=(1, 2))
        if min(waiting) == width and real is None:  # rows of one length need no look at the host's numbers
            number = torch.arange(observed, device=paid.device)
            order = (width - 1 - window) - number // window * window
        else:
            count = torch.tensor(waiting, device=paid.device)[:, None]
            number = torch.arange(observed, device=paid.device) - (width - count)  # [B, observed]
            order = (count - 1 - window) - number // window * window
            counts = (number >= 0) & (order >= 0)
            paid = torch.where(counts if real is None else counts & real, paid, 0.0)
        self.plain[:, at] += paid
        self.by_number[:, at] += paid * order

    def _make_room(self, width: int) -> None:
        """For one more column; what belongs to slots whose tokens wait no longer goes."""
        if self.end < self.plain.shape[1]:
            return
        stay = min(self.end, width)
        grown = []
        for sums in (self.plain, self.by_number):
            new = sums.new_zeros(sums.shape[0], stay + ROOM)
            new[:, :stay] = sums[:, self.end - stay :]
            grown.append(new)
        self.plain, self.by_number = grown
        self.end = stay

    def score(self, rule: PyramidLengths, state: PyramidState, row: int, first: int, number: int) -> torch.Tensor:
        """Worth of ``number`` tokens from slot ``first`` of a row's tokens: [number]."""
        waiting = state.waiting()[row]
        slope = (rule.distance_weight - 1) / max(1, waiting - number - 1)
        at = self.end - waiting
        window = slice(at, at + number)
        return self.plain[row, window] + slope * self.by_number[row, window]

    def keep(self, slots: torch.Tensor) -> None:
        """Tokens have left that waited first; those that still wait are the last ones as before."""

    def logical_bytes(self, state: PyramidState) -> int:
        return 8 * sum(state.waiting())

    def tensors(self) -> list[torch.Tensor]:
        return [self.plain, self.by_number]


@dataclass
class AttentionRows:
    """As published: the attention of the last 1 + R queries to everything held.

    Attributes:
        rows: [B, P, S] float32, the newest query last, the newest token last.
    """

    rows: torch.Tensor

    @staticmethod
    def of_prompt(attention: Mapping[int, torch.Tensor], prompts: Sequence[int], slots: int) -> AttentionRows:
        """From the attention of a prompt.

        Args:
            attention: [R, P, T] of the rows of each prompt length.
            prompts: Prompt length of each row of the batch.
            slots: S.
        """
        queries = max(x.shape[1] for x in attention.values())
        first = next(iter(attention.values()))
        out = first.new_zeros(len(prompts), queries, slots)
        for length, x in attention.items():
            rows = [row for row, n in enumerate(prompts) if n == length]
            out[rows, queries - x.shape[1] :, slots - x.shape[2] :] = x
        return AttentionRows(out)

    def observe(
        self, rule: PyramidLengths, state: PyramidState, weights: torch.Tensor, real: torch.Tensor | None
    ) -> None:
        """Add a step's attention [B, H, g, S]; where ``real`` is False nothing is added."""
        attention = weights.mean(dim=(1, 2))
        if real is not None:
            attention = attention * real
        slots, queries = attention.shape[1], 1 + max(state.recent)
        longer = slots - self.rows.shape[2]
        new = torch.cat([F.pad(self.rows, (longer - 1, 1)), attention[:, None]], dim=1)
        if real is not None:
            still = F.pad(self.rows, (longer, 0, 1, 0))
            new = torch.where(real[:, :, None], new, still)
        self.rows = new[:, max(0, new.shape[1] - queries) :].clone()  # a view would keep all of it

    def score(self, rule: PyramidLengths, state: PyramidState, row: int, first: int, number: int) -> torch.Tensor:
        """Worth of ``number`` tokens from slot ``first`` of a row's tokens: [number]."""
        at = self.rows.shape[2] - state.lengths[row] + first
        last = self.rows[row, max(0, self.rows.shape[1] - 1 - state.recent[row]) :, at : at + number]
        weights = torch.linspace(1.0, rule.distance_weight, last.shape[0], device=last.device)
        return weights @ last

    def keep(self, slots: torch.Tensor) -> None:
        """Only ``slots`` [B, C] are held from now on."""
        self.rows = self.rows.gather(2, slots[:, None].expand(-1, self.rows.shape[1], -1))

    def logical_bytes(self, state: PyramidState) -> int:
        return self.rows.nbytes

    def tensors(self) -> list[torch.Tensor]:
        return [self.rows]
