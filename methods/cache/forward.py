"""What one forward brings to a cache: its rows grouped by padding, and the call of each layer."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .logits import LogitRule


@dataclass(frozen=True)
class LayerCall:
    """What one layer of the model hands to the cache in one forward.

    Attributes:
        query: [B, H_q, m, D], after RoPE, of the last m of n new columns: a layer may leave out what nobody asks for.
        key, value: [B, H_kv, n, D], keys after RoPE; what the new columns show.
        rule: How logits are formed.
        new_kv: What the new columns leave in the cache, where that is not ``key`` and ``value``.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    rule: LogitRule
    new_kv: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def columns(self) -> int:
        """n, new columns."""
        return self.key.shape[2]

    @property
    def written(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values that the cache keeps."""
        return (self.key, self.value) if self.new_kv is None else self.new_kv

    def part(self, rows: slice) -> LayerCall:
        """The call for some rows of the batch."""
        new_kv = None if self.new_kv is None else (self.new_kv[0][rows], self.new_kv[1][rows])
        return LayerCall(self.query[rows], self.key[rows], self.value[rows], self.rule, new_kv)


@dataclass(frozen=True)
class Rows:
    """Rows of a batch that have the same number of leading pads.

    Attributes:
        pads: leading pad columns of these rows.
        index: row numbers [R], or None for the whole batch.
        tokens_seen: real tokens of the text, where this layer is given fewer of them; None: it is given all.
    """

    pads: int
    index: torch.Tensor | None
    tokens_seen: int | None = None

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """These rows of a batch-first tensor."""
        return x if self.index is None else x[self.index]


@dataclass
class NewTokens:
    """What a forward adds, worked out once and shared by its layers.

    Attributes:
        rows: the batch grouped by leading pads, while the prompt is read.
        valid: [B, n] bool, False for pads; None: all real.
        prompt_length: columns of the whole prompt; None: this forward is all of it.
        columns_seen: columns of the text, where this layer is given fewer of them; None: it is given all.
    """

    rows: list[Rows]
    valid: torch.Tensor | None
    prompt_length: int | None
    columns_seen: int | None = None

    def on(self, device: torch.device) -> NewTokens:
        """The same for a layer that lies on another device."""
        one = self.valid if self.valid is not None else next((r.index for r in self.rows if r.index is not None), None)
        if one is None or one.device == device:
            return self
        rows = [replace(r, index=None if r.index is None else r.index.to(device)) for r in self.rows]
        return replace(self, rows=rows, valid=None if self.valid is None else self.valid.to(device))


def rows_by_padding(mask: torch.Tensor) -> list[Rows]:
    """Group a batch's rows by their leading pads.

    Args:
        mask: [B, columns so far], True for a real token.

    Raises:
        ValueError: a pad stands after a real token: prompts must be padded on the left.
    """
    pads = mask.shape[1] - mask.sum(1)
    columns = torch.arange(mask.shape[1], device=mask.device)
    if not torch.equal(mask, columns[None] >= pads[:, None]):
        raise ValueError("kvbench caches need left padding (tokenizer.padding_side='left')")
    counts = pads.tolist()
    if len(set(counts)) == 1:
        return [Rows(counts[0], None)]
    groups: dict[int, list[int]] = {}
    for row, count in enumerate(counts):
        groups.setdefault(count, []).append(row)
    return [Rows(count, torch.tensor(index, device=mask.device)) for count, index in sorted(groups.items())]
