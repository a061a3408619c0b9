"""Quest (Tang et al., 2024, arXiv 2406.10774): hold all tokens, read the pages that the query may attend to most.

Section 3: tokens are grouped into pages of ``page``, and for each page and channel the smallest and the largest key are
stored. For a query q they bound the logit of every token in a page:

    U = sum_j max(q_j low_j, q_j high_j) = relu(q) . high + min(q, 0) . low

A decode step reads the bounds of all pages, and keys and values of the pages with the largest U only. The prompt's
attention is complete, and so is that of the first ``full_layers`` layers.

As in the published kernels, the last page is always read. They are for one query head per KV head; here pages are
chosen per KV head, by the mean over its query heads of the softmax of U over the pages.

Legend: N segments (heads of all rows), B rows, H stored heads, H_q query heads, g query heads per segment, S slots,
P tokens per page, K pages that a step reads, D channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Annotated, ClassVar

import torch

from ...conf.options import Bounds, NonNegativeInt, PositiveInt
from ..cache.kv_shape import KVShape
from ..cache.logits import LogitRule
from ..cache.products import cached_attention
from .base import Storage, StorageCapabilities
from .buffer import Buffer, take_slots
from .planes import PlaneSegments, capacities
from .ragged import DenseSegments, StaticRagged
from .segmented import SegmentedLayer
from .segments import Groups
from .static import StaticSegments
from .step_attention import ragged_step_attention, step_attention

FEWEST_PAGES = 3
"""Pages that a step reads at least, as in the authors' evaluation."""


def page_bounds(keys: torch.Tensor, page: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the smallest and largest keys of each page, [N, pages, D], of keys [N, S, D]; the last may be partial."""
    missing = -keys.shape[1] % page
    if missing:
        keys = torch.cat([keys, keys[:, -1:].expand(-1, missing, -1)], dim=1)
    pages = keys.unflatten(1, (-1, page))  # [N, pages, P, D]
    return pages.amin(2), pages.amax(2)


def choose_pages(
    query: torch.Tensor,
    bounds: tuple[torch.Tensor, torch.Tensor],
    length: torch.Tensor,
    page: int,
    count: int,
    scaling: float,
) -> torch.Tensor:
    """Return the pages to read: the last one, and of the others those with the largest bounds.

    Args:
        query: [N, g, D].
        bounds: Smallest and largest keys of each page, [N, pages, D].
        length: [N] int64, number of tokens.
        page, count: P and K.
        scaling: Factor of logits.

    Returns:
        [N, at most K] int64; -1: no page. Of equal pages the lower one is chosen.
    """
    acc_dtype = torch.promote_types(query.dtype, torch.float32)
    q, low, high = (x.to(acc_dtype) for x in (query, *bounds))
    bound = q.clamp(min=0) @ high.transpose(1, 2) + q.clamp(max=0) @ low.transpose(1, 2)  # [N, g, pages]
    last = (length - 1).div(page, rounding_mode="floor")[:, None]  # [N, 1]
    is_earlier = torch.arange(bound.shape[2], device=query.device) < last  # [N, pages]
    share = (bound * scaling).masked_fill(~is_earlier[:, None], float("-inf")).softmax(-1).mean(1)  # [N, pages]
    best = share.masked_fill(~is_earlier, -1).sort(dim=-1, descending=True, stable=True).indices[:, : count - 1]
    return torch.cat([torch.where(is_earlier.gather(1, best), best, -1), last], dim=1)


class QuestSegments(DenseSegments):
    """Segments of equal length with the bounds of their pages.

    Args:
        page, count: P and K.
    """

    supports_static_drop = False

    def __init__(self, page: int, count: int):
        super().__init__()
        self.page, self.count = page, count
        self._bounds: list[Buffer] = []

    def empty(self, index: torch.Tensor) -> PlaneSegments:
        return QuestSegments(self.page, self.count)

    def append_stored(self, stored: Sequence[torch.Tensor]) -> None:
        super().append_stored(stored)
        first = self._bounds[0].length if self._bounds else 0
        first = max(0, first - 1)  # the last page may have been partial
        new = page_bounds(self.stored[0][:, first * self.page :], self.page)
        if not self._bounds:
            room = -(-(self.length + self.reserved) // self.page)
            self._bounds = [Buffer(x, 1, room) for x in new]
            return
        for buffer, x in zip(self._bounds, new, strict=True):
            buffer.used[:, first:] = x[:, : buffer.length - first]
            if buffer.length < first + x.shape[1]:
                room = -(-self._buffers[0].whole.shape[1] // self.page)
                buffer.append(x[:, buffer.length - first :], room)

    @property
    def bounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Smallest and largest keys of each page, [N, pages, D]."""
        return self._bounds[0].used, self._bounds[1].used

    def shrink_to_fit(self) -> None:
        super().shrink_to_fit()
        for x in self._bounds:
            x.shrink_to_fit()

    def tensors(self) -> list[torch.Tensor]:
        return [*super().tensors(), *(x.whole for x in self._bounds)]

    @property
    def logical_bytes(self) -> int:
        return super().logical_bytes + sum(x.used.nbytes for x in self._bounds)

    @classmethod
    def static(
        cls, groups: Groups, shape: tuple[int, int], steps: int, limits: torch.Tensor | None = None
    ) -> StaticSegments:
        assert limits is None, "tokens do not leave"
        return StaticQuest(groups, shape, capacities(groups, steps, None))


class StaticQuest(StaticRagged):
    """Segments one after another in one tensor of keys and one of values, with the bounds of their pages."""

    def __init__(self, groups: Groups, shape: tuple[int, int], capacities: torch.Tensor):
        super().__init__(groups, shape, capacities)
        quest = [(index, segments) for index, segments in groups if isinstance(segments, QuestSegments)]
        self._page, self._count = quest[0][1].page, quest[0][1].count
        pages, dim = -(-self._width // self._page), self._planes[0].shape[1]
        self._bounds = [self._planes[0].new_zeros(len(capacities), pages, dim) for _ in range(2)]
        for index, segments in quest:
            for whole, x in zip(self._bounds, segments.bounds, strict=True):
                whole[index, : x.shape[1]] = x
        self._segment = torch.arange(len(capacities), device=capacities.device)
        self.chosen: torch.Tensor | None = None  # [N, K], pages that the last step read

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().append(keys, values)
        last = self.end - 1  # [N], the new token
        page = last.div(self._page, rounding_mode="floor")  # [N]
        slots = page[:, None] * self._page + torch.arange(self._page, device=page.device)  # [N, P]
        slots = torch.minimum(slots, last[:, None])  # of the whole page again: a step that is undone leaves no trace
        own = self._planes[0][self._starts[:, None] + slots]  # [N, P, D]
        for whole, x in zip(self._bounds, (own.amin(1), own.amax(1)), strict=True):
            whole[self._segment, page] = x

    def attend(self, query: torch.Tensor, rule: LogitRule) -> torch.Tensor:
        low, high = self._bounds
        q = query.reshape(len(self.length), -1, query.shape[3])  # [N, g, D]
        pages = choose_pages(q, (low, high), self.length, self._page, self._count, rule.scaling)
        self.chosen = pages
        keys, values = self._planes
        places = self._starts, self.length, None, self.shape, self._width
        out = ragged_step_attention(query, keys, values, *places, rule, (pages, self._page))
        if out is not None:
            return out
        slots, is_read = slots_of(pages, self.length, self._page)  # [N, K * P]
        keys, values = (x[self._starts[:, None] + slots].unflatten(0, self.shape) for x in (keys, values))
        return cached_attention(query, keys, values, rule, is_read.unflatten(0, self.shape))

    def tensors(self) -> list[torch.Tensor]:
        return [*super().tensors(), *self._bounds]

    @property
    def logical_bytes(self) -> int:
        pages = int(pages_of(self.length, self._page).sum())
        return super().logical_bytes + pages * sum(x[0, 0].nbytes for x in self._bounds)


def pages_of(length: torch.Tensor, page: int) -> torch.Tensor:
    """Return the number of pages that ``length`` [N] tokens take: int64 [N]."""
    return (length + page - 1) // page


def slots_of(pages: torch.Tensor, length: torch.Tensor, page: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the slots [N, K * P] of pages [N, K], 0 where there is no token, and whether each holds a token."""
    slots = pages[..., None] * page + torch.arange(page, device=pages.device)  # [N, K, P]
    holds = (pages >= 0)[..., None] & (slots < length[:, None, None])
    return torch.where(holds, slots, 0).flatten(1), holds.flatten(1)


class QuestLayer(SegmentedLayer):
    """A layer whose decode steps read some pages of each head."""

    def __init__(self, page: int, count: int):
        super().__init__(partial(QuestSegments, page, count))
        self._page, self._count = page, count
        self._reads: list[tuple[torch.Tensor, torch.Tensor]] = []  # pages [n, K] that an eager step read, lengths [n]

    def attend(self, query: torch.Tensor, rule: LogitRule, valid: torch.Tensor | None) -> torch.Tensor:
        if self._static is not None:
            return self._static.attend(query, rule)
        self._reads = []
        if query.shape[2] > 1 or valid is not None:
            return super().attend(query, rule, valid)
        batch, heads, _ = self._shape
        rows = query.reshape(batch * heads, -1, query.shape[3])  # [N, g, D]
        chosen = []
        for index, segments in self._groups:
            assert isinstance(segments, QuestSegments)
            length = torch.full((len(index),), segments.length, device=index.device)
            pages = choose_pages(rows[index], segments.bounds, length, self._page, self._count, rule.scaling)
            slots, is_read = slots_of(pages, length, self._page)  # [n, K * P]
            read = [take_slots(x, slots) for x in segments.stored]
            chosen.append((index, read, is_read))
            self._reads.append((pages, length))
        width = max(is_read.shape[1] for _, _, is_read in chosen)
        keys, values = (x.new_zeros(batch * heads, width, x.shape[2]) for x in chosen[0][1])
        holds = torch.zeros(batch * heads, width, dtype=torch.bool, device=query.device)
        for index, (k, v), is_read in chosen:
            n = is_read.shape[1]
            keys[index, :n], values[index, :n], holds[index, :n] = k, v, is_read
        keys, values, holds = (x.unflatten(0, (batch, heads)) for x in (keys, values, holds))
        return step_attention(query, keys, values, rule, holds)

    @property
    def step_bytes_read(self) -> int:
        reads = self._reads  # counted here, so that a captured step runs no kernel that only a record needs
        if isinstance(self._static, StaticQuest) and self._static.chosen is not None:
            reads = [(self._static.chosen, self._static.length)]
        if not reads:
            return super().step_bytes_read
        keys, values = (x[..., 0, :] for x in self.read()[:2])
        key, value = keys[0, 0].nbytes, values[0, 0].nbytes
        tokens = sum(int(slots_of(pages, length, self._page)[1].sum()) for pages, length in reads)
        pages = sum(int(pages_of(length, self._page).sum()) for _, length in reads)
        return tokens * (key + value) + pages * 2 * key


@dataclass(frozen=True)
class Quest(Storage):
    """Quest storage: uncompressed keys and values, of which a step reads some pages.

    Attributes:
        page: Tokens per page.
        reads: Tokens that a step reads of each head, in whole pages; at least 3 pages.
        full_layers: Number of first layers that read all tokens.
    """

    id: ClassVar[str] = "Quest"
    page: PositiveInt = 16
    reads: Annotated[int, Bounds(ge=1)] = 1024
    full_layers: NonNegativeInt = 2

    @property
    def name(self) -> str:
        return f"quest{self.reads}"

    @property
    def count(self) -> int:
        """Pages that a step reads."""
        return max(FEWEST_PAGES, self.reads // self.page)

    @cached_property
    def capabilities(self) -> StorageCapabilities:
        return StorageCapabilities(reads_part=True)

    def new_layers(self, num_layers: int) -> Sequence[SegmentedLayer]:
        full = min(self.full_layers, num_layers)
        others = [QuestLayer(self.page, self.count) for _ in range(num_layers - full)]
        return [*(SegmentedLayer(DenseSegments) for _ in range(full)), *others]

    def bytes_formula(self, tokens: Sequence[int], heads: int, shape: KVShape, new_tokens: int = 0) -> int:
        """Return the bytes of all keys and values, and of two keys per page except in the first layers."""
        pages = sum(-(-n // self.page) for n in tokens[self.full_layers :])
        return heads * shape.element_bytes * (shape.token_channels * sum(tokens) + 2 * shape.head_dim * pages)

    def bytes_read_formula(self, tokens: Sequence[int], heads: int, shape: KVShape, new_tokens: int = 0) -> int:
        """Return the bytes of the pages that a step reads and of the bounds of all pages."""
        read = sum(tokens[: self.full_layers]) + sum(map(self._tokens_read, tokens[self.full_layers :]))
        pages = sum(-(-n // self.page) for n in tokens[self.full_layers :])
        return heads * shape.element_bytes * (shape.token_channels * read + 2 * shape.head_dim * pages)

    def _tokens_read(self, tokens: int) -> int:
        last = (tokens - 1) % self.page + 1
        return min(tokens, (self.count - 1) * self.page + last)
