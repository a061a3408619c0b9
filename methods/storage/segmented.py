"""A layer whose heads hold different numbers of tokens, as groups of segments of equal length or as static segments.

Legend: N segments of one length, B batch rows, H stored heads, g query heads per stored head, S slots, n new tokens,
D channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..cache.logits import LogitRule
from .base import LayerStorage, previous_slots, slots_to_keep
from .planes import as_bytes
from .segments import Groups, Segments, segment_lengths
from .static import StaticSegments


class SegmentedLayer(LayerStorage):
    """A layer as groups of segments. Segment ``b * H + h`` is head h of row b.

    Args:
        new: Creates empty segments; the first ``append`` determines their number.
    """

    def __init__(self, new: Callable[[], Segments]):
        self._new = new
        self._groups: Groups = []
        self._shape = (0, 0, 0)  # B, H, D
        self._static: StaticSegments | None = None  # replaces the groups once static

    def write(self, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor | None = None) -> None:
        assert self._static is None, "a static layer takes single tokens"
        self._shape = (*keys.shape[:2], keys.shape[3])
        self._replace([keys, values], valid)

    def _replace(self, tensors: Sequence[torch.Tensor], valid: torch.Tensor | None, are_stored: bool = False) -> None:
        """Replace the contents by left-padded tokens.

        Args:
            tensors: [B, H, S, ...], keys and values, or what :attr:`.segments.Segments.stored` returns.
            valid: [B, 1 or H, S] bool, False for padding; None: no padding.
            are_stored: Whether the tensors are in the stored form.
        """
        batch, heads, slots = tensors[0].shape[:3]
        all_segments = torch.arange(batch * heads, device=tensors[0].device)
        self._groups = [(all_segments, self._new())]
        self._append_real(tensors, None if valid is None else valid.expand(batch, heads, slots), are_stored)
        self.flush()

    def append(
        self, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        if self._static is not None:
            assert keys.shape[2] == 1 and valid is None, "a static layer takes single tokens"
            self._static.append(keys.flatten(0, 2), values.flatten(0, 2))
            return None
        if not self._groups:
            self.write(keys, values, None if valid is None else valid[:, None])
            return None
        self.count_down(keys.shape[2])
        before = None if valid is None else (self.tokens, self.slots)
        self._append_real([keys, values], valid)
        return None if before is None else previous_slots(*before, self.slots - self.tokens, self.slots)

    def _append_real(
        self, tensors: Sequence[torch.Tensor], valid: torch.Tensor | None, are_stored: bool = False
    ) -> None:
        """Append left-padded tokens without their padding; ``valid`` [B, n] or [B, H, n]; see :meth:`_replace`."""
        batch, heads, n = tensors[0].shape[:3]
        tensors = [x.flatten(0, 1) for x in tensors]
        if valid is None:
            for index, segments in self._groups:
                self._append_to(segments, [_rows(x, index) for x in tensors], are_stored)
            return
        counts = valid[:, None] if valid.dim() == 2 else valid
        counts = counts.expand(batch, heads, n).sum(-1).flatten()  # real tokens of each segment
        groups = []
        for index, segments in self._groups:
            group_counts = counts[index]
            for count in group_counts.unique().tolist():
                members = (group_counts == count).nonzero()[:, 0]
                group = segments if len(members) == len(index) else segments.take(members)
                if count or group.appends_nothing:
                    real = [as_bytes(x)[index[members], n - count :].view(x.dtype) for x in tensors]
                    self._append_to(group, real, are_stored)
                groups.append((index[members], group))
        self._groups = groups

    def _append_to(self, segments: Segments, tensors: Sequence[torch.Tensor], are_stored: bool) -> None:
        segments.growth, segments.reserved = self.growth, self.reserved
        if are_stored:
            segments.append_stored(tensors)
        else:
            segments.append(*tensors)

    def read(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return keys, values and ``valid``, left-padded to the longest segment for this call."""
        if self._static is not None:
            keys, values, valid = (x.unflatten(0, self._shape[:2]) for x in self._static.read())
            return keys, values, valid
        keys, values = self._padded([s.read() for _, s in self._groups])
        return keys, values, self.valid

    def _padded(self, contents: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
        """Return tensors [N, length, ...] of each group of segments as [B, H, S, ...], left-padded to the longest."""
        if len(contents) == 1:
            return [x.unflatten(0, self._shape[:2]) for x in contents[0]]
        out = [x.new_zeros(self._shape[0] * self._shape[1], self.slots, *x.shape[2:]) for x in contents[0]]
        for (index, segments), tensors in zip(self._groups, contents, strict=True):
            for whole, x in zip(out, tensors, strict=True):
                as_bytes(whole)[index, self.slots - segments.length :] = as_bytes(x)
        return [x.unflatten(0, self._shape[:2]) for x in out]

    @property
    def slots(self) -> int:
        return max(s.length for _, s in self._groups) if self._static is None else self._static.slots

    @property
    def valid(self) -> torch.Tensor | None:
        batch, heads, _ = self._shape
        if self._static is not None:
            return self._static.valid.unflatten(0, (batch, heads))
        if len({segments.length for _, segments in self._groups}) == 1:
            return None
        offset = torch.arange(self.slots, device=self._groups[0][0].device)
        return offset >= self.slots - self.tokens[..., None]  # [B, H, S]

    @property
    def end(self) -> int | torch.Tensor:
        return self.slots if self._static is None else self._static.end.unflatten(0, self._shape[:2])  # [B, H]

    def attend(self, query: torch.Tensor, rule: LogitRule, valid: torch.Tensor | None) -> torch.Tensor:
        if self._static is not None:
            return self._static.attend(query, rule)
        if rule.sinks is not None:  # sinks depend on the head, and segments are grouped by length
            return super().attend(query, rule, valid)
        batch, query_heads, n, dim = query.shape
        segments = self._shape[0] * self._shape[1]
        rows = query.reshape(segments, -1, n, dim)  # [B * H, g, n, D]
        out: torch.Tensor | None = None  # [B * H, g, n, D_v]
        for index, group in self._groups:
            real = n  # new tokens without the left padding, which is not stored
            if valid is not None:
                real = int(valid[index[0] // self._shape[1]].sum())
            if not real:
                continue
            attended = group.attend(_rows(rows, index)[:, :, n - real :], rule)
            if out is None:
                out = attended.new_zeros(*rows.shape[:3], attended.shape[3])
            out[index, :, n - real :] = attended
        assert out is not None
        return out.reshape(batch, query_heads, n, -1)

    def flush(self) -> None:
        if self._static is not None:
            self._static.flush()
        for _, segments in self._groups:
            segments.flush()

    @property
    def static_problem(self) -> str | None:
        return next((segments.static_problem for _, segments in self._groups), None)

    def make_static(self, steps: int, mask_heads: int = 1) -> None:
        self._make_static(steps, None)

    def _make_static(self, steps: int, limits: torch.Tensor | None) -> None:
        self._static, self._groups = type(self._groups[0][1]).static(self._groups, self._shape[:2], steps, limits), []

    @property
    def supports_static_drop(self) -> bool:  # type: ignore[override]
        """Whether tokens can leave between static steps: whether those of every group of heads can."""
        return all(segments.supports_static_drop for _, segments in self._groups)

    def make_static_within(
        self, limit: int | torch.Tensor, extra_slots: int, mask_heads: int = 1
    ) -> torch.Tensor | None:
        tokens, before = self.tokens, self.slots
        limits = torch.as_tensor(limit, device=tokens.device).expand_as(tokens).flatten()
        self._make_static(extra_slots, limits)
        return previous_slots(tokens, before, torch.zeros_like(tokens), self.slots)

    def drop(self, keep: torch.Tensor, compact_now: bool) -> torch.Tensor | None:
        of_segments = keep.expand(*self._shape[:2], -1).flatten(0, 1)  # [N, S]
        if self._static is not None:
            self._static.drop(of_segments)
            return self.compact() if compact_now else None
        if compact_now:  # every segment is written again, with room for what is to come
            return super().drop(keep, compact_now)
        counts = of_segments.sum(-1).tolist()
        per_group = [sorted({counts[i] for i in index.tolist()}) for index, _ in self._groups]
        if per_group == [[segments.length] for _, segments in self._groups]:  # no token leaves
            return None
        if sum(map(len, per_group)) > len(set(counts)):  # segments of several groups get one length, and one group
            return super().drop(keep, compact_now)
        slots, _ = slots_to_keep(keep)
        groups: Groups = []
        for (index, segments), lengths in zip(self._groups, per_group, strict=True):
            real = of_segments[index, keep.shape[-1] - segments.length :]  # [N of the group, its S]
            groups += [self._dropped(index, segments, real, length) for length in lengths]
        self._groups = groups
        return slots

    def _dropped(
        self, index: torch.Tensor, segments: Segments, keep: torch.Tensor, length: int
    ) -> tuple[torch.Tensor, Segments]:
        """The segments of a group that keep ``length`` tokens, with these alone; ``keep`` [N, S] is the group's."""
        members = (keep.sum(-1) == length).nonzero()[:, 0]
        if length == segments.length:
            return (index, segments) if len(members) == len(index) else (index[members], segments.take(members))
        slots = keep[members].nonzero()[:, 1].view(len(members), length)  # [M, length]
        kept = [as_bytes(x)[members[:, None], slots].view(x.dtype) for x in segments.stored]
        new = self._new().take(index[members])
        if length or new.appends_nothing:
            self._append_to(new, kept, are_stored=True)
            new.flush()
        return index[members], new

    def compact(self) -> torch.Tensor | None:
        assert self._static is not None, "compact before make_static"
        return self._static.compact().unflatten(0, self._shape[:2])

    def static_state(self) -> list[torch.Tensor]:
        assert self._static is not None, "static_state before make_static"
        return self._static.static_state()

    def between_steps(self) -> None:
        assert self._static is not None, "between_steps before make_static"
        self._static.between_steps()

    def end_steps(self) -> None:
        assert self._static is not None, "end_steps before make_static"
        self._static.end_steps()

    def keep(self, slots: torch.Tensor, valid: torch.Tensor | None = None) -> None:
        tensors, stored = self._padded([s.stored for _, s in self._groups]), self.valid
        batch, heads, _ = self._shape
        if slots.dim() == 1:
            slots = slots.expand(batch, 1, -1)
        slots = slots.expand(-1, heads, -1)  # [B, H, C]
        real = None if stored is None else stored.gather(2, slots)
        if valid is not None:
            real = valid.expand_as(slots) if real is None else real & valid
        segment = torch.arange(batch * heads, device=slots.device).view(batch, heads, 1)
        kept = [as_bytes(x).flatten(0, 1)[segment, slots].view(x.dtype) for x in tensors]  # [B, H, C, ...]
        self._replace(kept, real, are_stored=True)

    def shrink_to_fit(self) -> None:
        for _, segments in self._groups:
            segments.shrink_to_fit()

    def tensors(self) -> list[torch.Tensor]:
        if self._static is not None:
            return self._static.tensors()
        return [t for _, segments in self._groups for t in segments.tensors()]

    @property
    def tokens(self) -> torch.Tensor:
        length = segment_lengths(self._groups) if self._static is None else self._static.length.clone()
        return length.unflatten(0, self._shape[:2])  # [B, H]

    @property
    def logical_bytes(self) -> int:
        if self._static is not None:
            return self._static.logical_bytes
        return sum(segments.logical_bytes for _, segments in self._groups)


def _rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return ``x[index]``, without a copy if it contains all rows."""
    return x if len(index) == x.shape[0] else x[index]
