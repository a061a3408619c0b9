"""Attention that later tokens have paid to generated ones, which decides what stays of a window.

Legend: B rows of a batch, R rows that are thinned out, H stored heads, g query heads a stored head, S slots, W columns
of sums, P held queries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ...storage.base import LayerStorage
from ..ranking import keep_mask

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
        waiting: [B] int64, generated tokens that wait; on the device, so that a captured step can count.
        plain, by_number: [B, W] float32; column i is that of the i-th token that waits, zero where there is none.
    """

    waiting: torch.Tensor
    plain: torch.Tensor
    by_number: torch.Tensor

    @staticmethod
    def empty(batch: int, device: torch.device) -> WindowSums:
        """Sums of no tokens yet."""
        plain, by_number = (torch.zeros(batch, 0, device=device) for _ in range(2))
        return WindowSums(torch.zeros(batch, dtype=torch.int64, device=device), plain, by_number)

    def make_room(self, columns: int) -> None:
        """Have ``columns`` columns at least."""
        missing = columns - self.plain.shape[1]
        if missing > 0:
            self.plain, self.by_number = (F.pad(x, (0, missing)) for x in (self.plain, self.by_number))

    def grow(self, columns: int) -> None:
        """The same, with room for tokens to come where there is none."""
        if columns > self.plain.shape[1]:
            self.make_room(columns + ROOM)

    def observe(
        self, rule: PyramidLengths, storage: LayerStorage, weights: torch.Tensor, real: torch.Tensor | None
    ) -> None:
        """Add a step's attention, in place; there must be room for one more token.

        Args:
            rule: Settings.
            storage: Storage of the layer; the last token of each row is in its last slot.
            weights: [B, H, g, S].
            real: [B] bool, False where the token is a pad, which adds nothing; None: all real.
        """
        window = rule.gen_window
        self.waiting += 1 if real is None else real
        column = torch.arange(self.plain.shape[1], device=weights.device)  # [W]
        # Number of this query among those that count for a window; negative: the window was not complete before it.
        number = self.waiting[:, None] - 1 - window - column // window * window  # [B, W]
        counts = number >= 0 if real is None else (number >= 0) & real[:, None]
        slot = (storage.end - self.waiting[:, None] + column).clamp(max=weights.shape[3] - 1)  # [B, W]
        paid = weights.gather(3, slot[:, None, None].expand(*weights.shape[:3], -1)).mean(dim=(1, 2))  # [B, W]
        paid = paid.masked_fill(~counts, 0.0)
        self.plain += paid
        self.by_number += paid * number

    def thin_out(self, rule: PyramidLengths, state: PyramidState, storage: LayerStorage) -> None:
        """Thin out a window of each row where it is time, in place; the host's counts say where."""
        window, stay = rule.gen_window, rule.stay_of_window(state.layer_idx, state.num_layers)
        due = [row for row in range(len(state.lengths)) if state.window_to_thin(rule, row)[1]]
        if not due:
            return
        rows = torch.tensor(due, device=self.waiting.device)
        if stay < window:
            span = [max(1, state.waiting(row) - window - 1) for row in due]
            slope = (rule.distance_weight - 1) / torch.tensor(span, device=rows.device)[:, None]
            score = self.plain[rows, :window] + slope * self.by_number[rows, :window]  # [R, window]
            staying = held_slots(storage)
            slot = storage.end - self.waiting[rows, None] + torch.arange(window, device=rows.device)  # [R, window]
            staying[rows, 0] = staying[rows, 0].scatter(1, slot, keep_mask(score, stay))
            storage.drop(staying, compact_now=True)
        for sums in (self.plain, self.by_number):
            sums[rows] = F.pad(sums[rows, window:], (0, window))
        self.waiting[rows] -= window
        for row in due:
            state.lengths[row] -= window - stay
            state.settled[row] += stay

    def logical_bytes(self, state: PyramidState) -> int:
        """Bytes of the entries in use."""
        return 8 * sum(state.waiting(row) for row in range(len(state.lengths)))

    def tensors(self) -> list[torch.Tensor]:
        """Tensors that hold the record."""
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

    def observe(self, state: PyramidState, weights: torch.Tensor, real: torch.Tensor | None) -> None:
        """Add a step's attention [B, H, g, S]; where ``real`` [B] is False nothing is added."""
        attention = weights.mean(dim=(1, 2))
        if real is not None:
            attention = attention * real[:, None]
        slots, queries = attention.shape[1], 1 + max(state.recent)
        longer = slots - self.rows.shape[2]
        new = torch.cat([F.pad(self.rows, (longer - 1, 1)), attention[:, None]], dim=1)
        if real is not None:
            still = F.pad(self.rows, (longer, 0, 1, 0))
            new = torch.where(real[:, None, None], new, still)
        self.rows = new[:, max(0, new.shape[1] - queries) :].clone()  # a view would keep all of it

    def thin_out(self, rule: PyramidLengths, state: PyramidState, storage: LayerStorage) -> None:
        """Thin out the tokens before the recent ones of each row where it is time."""
        stay = rule.stay_of_window(state.layer_idx, state.num_layers)
        staying, slots = None, self.rows.shape[2]
        for row, length in enumerate(state.lengths):
            first, number = state.window_to_thin(rule, row)
            if not number:
                continue
            left = min(stay, number)
            if left < number:
                staying = held_slots(storage) if staying is None else staying
                at = slots - length + first
                staying[row, 0, at : at + number] = keep_mask(self._score(rule, state, row, at, number), left)
                state.lengths[row] -= number - left
            state.settled[row] = state.lengths[row] - state.recent[row]
        moved = None if staying is None else storage.drop(staying, compact_now=True)
        if moved is not None:
            self.rows = self.rows.gather(2, moved.expand(-1, self.rows.shape[1], -1))

    def _score(self, rule: PyramidLengths, state: PyramidState, row: int, at: int, number: int) -> torch.Tensor:
        """Scores [number] of the tokens of a row from slot ``at`` on."""
        last = self.rows[row, max(0, self.rows.shape[1] - 1 - state.recent[row]) :, at : at + number]
        weights = torch.linspace(1.0, rule.distance_weight, last.shape[0], device=last.device)
        return weights @ last

    def logical_bytes(self, state: PyramidState) -> int:
        """Bytes of the entries in use."""
        return self.rows.nbytes

    def tensors(self) -> list[torch.Tensor]:
        """Tensors that hold the record."""
        return [self.rows]


def held_slots(storage: LayerStorage) -> torch.Tensor:
    """Which slots hold a token, all heads alike: [B, 1, S] bool, a copy."""
    keys, _, held = storage.read()
    if held is None:
        return torch.ones(keys.shape[0], 1, keys.shape[2], dtype=torch.bool, device=keys.device)
    return held[:, :1].clone()
