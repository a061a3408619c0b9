"""Records of the attention that later tokens pay to generated ones, by which windows are reduced.

Legend: B batch rows, R rows with an eviction, H stored heads, g query heads per stored head, S slots, W columns of
sums, P stored queries, T prompt tokens of the layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ...storage.base import LayerStorage
from ..eviction_state import slots_in_use
from ..ranking import keep_mask

if TYPE_CHECKING:
    from .lengths import PyramidLengths
    from .state import PyramidState

GROWTH_COLUMNS = 256
"""Extra columns per reallocation of the sums over generated tokens."""


@dataclass
class WindowSums:
    """Sums of the attention that each pending token has received from the tokens after its window.

    Generated tokens form consecutive windows of ``gen_window``, so the first query that scores a window is known in
    advance. Query weights increase linearly, so a plain sum and a sum weighted by query index suffice, where the
    published code stores a row of attention per query.

    Attributes:
        pending: [B] int64, number of pending tokens; on the device, so that a captured step can count.
        plain, by_index: [B, W] float32, the two sums; column i is for the i-th pending token, zero if there is none.
    """

    pending: torch.Tensor
    plain: torch.Tensor
    by_index: torch.Tensor

    @staticmethod
    def empty(batch: int, device: torch.device) -> WindowSums:
        """Return sums without columns."""
        plain, by_index = (torch.zeros(batch, 0, device=device) for _ in range(2))
        return WindowSums(torch.zeros(batch, dtype=torch.int64, device=device), plain, by_index)

    def ensure_columns(self, columns: int) -> None:
        """Reallocate with ``columns`` columns if there are fewer."""
        missing = columns - self.plain.shape[1]
        if missing > 0:
            self.plain, self.by_index = (F.pad(x, (0, missing)) for x in (self.plain, self.by_index))

    def grow(self, columns: int) -> None:
        """Reallocate with GROWTH_COLUMNS extra columns if there are fewer than ``columns``."""
        if columns > self.plain.shape[1]:
            self.ensure_columns(columns + GROWTH_COLUMNS)

    def observe(
        self, rule: PyramidLengths, storage: LayerStorage, weights: torch.Tensor, real: torch.Tensor | None
    ) -> None:
        """Add a step's attention in place; there must be a column for the new token.

        Args:
            rule: Settings.
            storage: Storage of the layer; the last token of each row is in its last slot.
            weights: [B, H, g, S].
            real: [B] bool, False for a pad, which adds nothing; None: no pads.
        """
        window = rule.gen_window
        self.pending += 1 if real is None else real
        column = torch.arange(self.plain.shape[1], device=weights.device)  # [W]
        # Index of this query among those that score the column's window; negative if the window was not yet complete.
        index = self.pending[:, None] - 1 - window - column // window * window  # [B, W]
        counts = index >= 0 if real is None else (index >= 0) & real[:, None]  # [B, W]
        first = (storage.end - self.pending[:, None])[:, :1]  # [B, 1], slot of the first pending token
        slot = (first + column).clamp(max=weights.shape[3] - 1)  # [B, W]
        paid = weights.gather(3, slot[:, None, None].expand(*weights.shape[:3], -1)).mean(dim=(1, 2))  # [B, W]
        paid = paid.masked_fill(~counts, 0.0)
        self.plain += paid
        self.by_index += paid * index

    def evict_windows(self, rule: PyramidLengths, state: PyramidState, storage: LayerStorage) -> None:
        """Evict the lowest-scored tokens of the first window of each row that is due, by the counts on the host."""
        window, keep_count = rule.gen_window, rule.window_keep_count(state.layer_idx, state.num_layers)
        due = [row for row in range(len(state.lengths)) if state.window_to_evict(rule, row)[1]]
        if not due:
            return
        rows = torch.tensor(due, device=self.pending.device)
        if keep_count < window:
            span = [max(1, state.pending(row) - window - 1) for row in due]
            slope = (rule.distance_weight - 1) / torch.tensor(span, device=rows.device)[:, None]
            score = self.plain[rows, :window] + slope * self.by_index[rows, :window]  # [R, window]
            keep = slots_in_use(storage, 1)[:, :1].clone()  # [B, 1, S]
            first = (storage.end - self.pending[:, None])[rows, :1]  # [R, 1]
            slot = first + torch.arange(window, device=rows.device)  # [R, window]
            keep[rows, 0] = keep[rows, 0].scatter(1, slot, keep_mask(score, keep_count))
            storage.drop(keep, compact_now=True)
        for sums in (self.plain, self.by_index):
            sums[rows] = F.pad(sums[rows, window:], (0, window))
        self.pending[rows] -= window
        for row in due:
            state.lengths[row] -= window - keep_count
            state.finalized[row] += keep_count

    def logical_bytes(self, state: PyramidState) -> int:
        """Return the bytes of the entries in use."""
        return 8 * sum(state.pending(row) for row in range(len(state.lengths)))

    def tensors(self) -> list[torch.Tensor]:
        """Return the tensors of the record."""
        return [self.plain, self.by_index]


@dataclass
class AttentionRows:
    """Attention of the last queries to all stored tokens, as in the published code.

    Attributes:
        rows: [B, P, S] float32, queries and tokens in the order of the text, padded at the front.
    """

    rows: torch.Tensor

    @staticmethod
    def of_prompt(attention: Mapping[int, torch.Tensor], prompts: Sequence[int], slots: int) -> AttentionRows:
        """Return the record after the prefill.

        Args:
            attention: Prompt length -> [R, P, T], attention of the rows of this length.
            prompts: Prompt length of each batch row.
            slots: S, number of slots.
        """
        queries = max(x.shape[1] for x in attention.values())
        first = next(iter(attention.values()))
        out = first.new_zeros(len(prompts), queries, slots)
        for length, x in attention.items():
            rows = [row for row, n in enumerate(prompts) if n == length]
            out[rows, queries - x.shape[1] :, slots - x.shape[2] :] = x
        return AttentionRows(out)

    def observe(self, state: PyramidState, weights: torch.Tensor, real: torch.Tensor | None) -> None:
        """Add a step's attention [B, H, g, S], except in rows where ``real`` [B] is False (None: no pads)."""
        attention = weights.mean(dim=(1, 2))  # [B, S]
        if real is not None:
            attention = attention * real[:, None]
        slots, queries = attention.shape[1], 1 + max(state.recent)
        added = slots - self.rows.shape[2]
        new = torch.cat([F.pad(self.rows, (added - 1, 1)), attention[:, None]], dim=1)  # [B, P + 1, S]
        if real is not None:
            unchanged = F.pad(self.rows, (added, 0, 1, 0))
            new = torch.where(real[:, None, None], new, unchanged)
        self.rows = new[:, max(0, new.shape[1] - queries) :].clone()  # a view would keep the whole tensor in memory

    def evict_windows(self, rule: PyramidLengths, state: PyramidState, storage: LayerStorage) -> None:
        """Evict the lowest-scored tokens of the window before the recent tokens, for each row that is due."""
        max_keep = rule.window_keep_count(state.layer_idx, state.num_layers)
        keep, slots = None, self.rows.shape[2]
        for row, length in enumerate(state.lengths):
            first, size = state.window_to_evict(rule, row)
            if not size:
                continue
            keep_count = min(max_keep, size)
            if keep_count < size:
                keep = slots_in_use(storage, 1)[:, :1].clone() if keep is None else keep  # [B, 1, S]
                window = slice(slots - length + first, slots - length + first + size)
                keep[row, 0, window] = keep_mask(self._score(rule, state, row, window), keep_count)
                state.lengths[row] -= size - keep_count
            state.finalized[row] = state.lengths[row] - state.recent[row]
        moved = None if keep is None else storage.drop(keep, compact_now=True)
        if moved is not None:
            self.rows = self.rows.gather(2, moved.expand(-1, self.rows.shape[1], -1))

    def _score(self, rule: PyramidLengths, state: PyramidState, row: int, window: slice) -> torch.Tensor:
        """Return the scores [size] of the slots of a window of one row."""
        attention = self.rows[row, max(0, self.rows.shape[1] - 1 - state.recent[row]) :, window]  # [queries, size]
        weights = torch.linspace(1.0, rule.distance_weight, attention.shape[0], device=attention.device)
        return weights @ attention

    def logical_bytes(self, state: PyramidState) -> int:
        """Return the bytes of the entries in use."""
        return self.rows.nbytes

    def tensors(self) -> list[torch.Tensor]:
        """Return the tensors of the record."""
        return [self.rows]
