"""Inputs of a cache in one forward: the attention call of each layer, and the batch rows grouped by padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from .logits import LogitRule


@dataclass(frozen=True)
class LayerCall:
    """Attention inputs of one layer of the model in one forward.

    Attributes:
        query: [B, H_q, m, D], after RoPE, of the last m of n new columns; a layer may omit queries whose output is not
            needed.
        key, value: [B, H_kv, n, D], keys after RoPE, which the queries attend over.
        rule: How logits are computed.
        new_kv: Keys and values to store, if they differ from ``key`` and ``value``.
        is_stored: Whether the key and the value of a single new token have been written into the layer's next slot
            (:attr:`.layer.CacheLayer.next_slot`); ``key`` is then before RoPE.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    rule: LogitRule
    new_kv: tuple[torch.Tensor, torch.Tensor] | None = None
    is_stored: bool = False

    @property
    def columns(self) -> int:
        """n, the number of new columns."""
        return self.key.shape[2]

    @property
    def written(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values to store."""
        return (self.key, self.value) if self.new_kv is None else self.new_kv

    def select_rows(self, rows: slice) -> LayerCall:
        """Return the call for a slice of the batch rows."""
        new_kv = None if self.new_kv is None else (self.new_kv[0][rows], self.new_kv[1][rows])
        return replace(self, query=self.query[rows], key=self.key[rows], value=self.value[rows], new_kv=new_kv)


@dataclass(frozen=True)
class Rows:
    """Batch rows that have the same number of leading pads.

    Attributes:
        pads: Leading pad columns of each row.
        index: Row indices [R] int64; None: the whole batch.
        tokens_seen: Real tokens of the full text if earlier layers dropped some; None: nothing was dropped.
        text_seeds: [R] int64, see :func:`text_seeds`; None: unknown.
        question_tokens: Number of last tokens of each of the R prompts that are its question; None: unknown.
    """

    pads: int
    index: torch.Tensor | None
    tokens_seen: int | None = None
    text_seeds: torch.Tensor | None = None
    question_tokens: Sequence[int] | None = None

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """Select these rows of a batch-first tensor."""
        return x if self.index is None else x[self.index]

    def by_question(self, device: torch.device) -> list[Rows]:
        """Split into rows whose questions have one length, with indices on ``device``."""
        if self.question_tokens is None or len(set(self.question_tokens)) == 1:
            return [self]
        groups: dict[int, list[int]] = {}
        for row, count in enumerate(self.question_tokens):
            groups.setdefault(count, []).append(row)
        out = []
        for count, chosen in sorted(groups.items()):
            index = torch.tensor(chosen, device=device)
            seeds = None if self.text_seeds is None else self.text_seeds[index.to(self.text_seeds.device)]
            index = index if self.index is None else self.index[index]
            out.append(replace(self, index=index, text_seeds=seeds, question_tokens=[count] * len(chosen)))
        return out


@dataclass
class NewTokens:
    """Token metadata of a forward, computed once and shared by its layers.

    Attributes:
        rows: Batch rows grouped by leading pads, during the prefill.
        valid: [B, n] bool, False for pads; None: no pads.
        prompt_length: Columns of the whole prompt; None: this forward is the whole prompt.
        columns_seen: Length of the full text in columns if earlier layers dropped some; None: nothing was dropped.
    """

    rows: list[Rows]
    valid: torch.Tensor | None
    prompt_length: int | None
    columns_seen: int | None = None

    def on(self, device: torch.device) -> NewTokens:
        """Return the metadata on the device of a layer."""
        tensor = next((x for x in (self.valid, *(r.index for r in self.rows)) if x is not None), None)
        if tensor is None or tensor.device == device:
            return self
        rows = [replace(r, index=None if r.index is None else r.index.to(device)) for r in self.rows]
        return replace(self, rows=rows, valid=None if self.valid is None else self.valid.to(device))


def rows_by_padding(
    mask: torch.Tensor, text_seeds: torch.Tensor | None = None, question_tokens: Sequence[int] | None = None
) -> list[Rows]:
    """Group batch rows by their number of leading pads.

    Args:
        mask: [B, columns so far] bool, True for a real token.
        text_seeds: See :attr:`Rows.text_seeds`, [B].
        question_tokens: See :attr:`Rows.question_tokens`, of B prompts.

    Raises:
        ValueError: A pad follows a real token. Prompts must be padded on the left.
    """
    pads = mask.shape[1] - mask.sum(1)
    columns = torch.arange(mask.shape[1], device=mask.device)
    if not torch.equal(mask, columns[None] >= pads[:, None]):
        raise ValueError("kvbench caches need left padding (tokenizer.padding_side='left')")
    counts = pads.tolist()
    if len(set(counts)) == 1:
        return [Rows(counts[0], None, None, text_seeds, question_tokens)]
    groups: dict[int, list[int]] = {}
    for row, count in enumerate(counts):
        groups.setdefault(count, []).append(row)
    out = []
    for count, chosen in sorted(groups.items()):
        rows = Rows(count, torch.tensor(chosen, device=mask.device))
        seeds = None if text_seeds is None else rows.take(text_seeds)
        questions = None if question_tokens is None else [question_tokens[row] for row in chosen]
        out.append(replace(rows, text_seeds=seeds, question_tokens=questions))
    return out


SEED_FACTOR = 6364136223846793005
"""Multiplier of a polynomial hash modulo 2^64."""


def text_seeds(ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return a hash of the tokens of each row, [B] int64, which does not depend on padding or device.

    Args:
        ids: [B, T], padded on the left.
        mask: [B, T], 1 for a real token; None: no padding.
    """
    real = torch.ones_like(ids) if mask is None else mask.long()
    position = (real.cumsum(1) - 1).clamp(min=0)
    powers = torch.full((ids.shape[1],), SEED_FACTOR, device=ids.device).cumprod(0)  # [T], modulo 2^64
    return (ids * real * powers[position]).sum(1)
