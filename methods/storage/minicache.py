"""MiniCache (Liu et al., 2024, arXiv 2405.14366): in the deeper half, two neighbouring layers share one cache.

Section 4: from layer ``start`` on, layers are taken in pairs. For each token and head the keys of a pair (and likewise
the values) are split into length and direction. The two directions are merged into one by spherical interpolation,
``t`` of the way from the lower layer to the upper one; both lengths are kept, so each layer's vector comes back with
its own length and the shared direction. Tokens whose directions differ most are retained: both layers keep them as
they are.

The prompt's attention is computed on full keys and values, so the first token is exact. A pair is merged as soon as
its upper layer has read the prompt, and a new token as soon as the upper layer's step is done; until then the lower
layer reads it as it is.

No code was published, and the paper leaves choices open, which are keys here: a vector is one head of one token;
tokens are retained head by head, keys and values by themselves; ``retention: top_ratio`` retains the share ``gamma``
of the prompt (the share that the paper's memory formula counts), ``range_distinct`` those beyond ``d_max - gamma
(d_max - d_min)`` of the prompt's angles (what the text describes), and ``range_literal`` those below ``d_min + gamma
(d_max - d_min)`` (the rule as printed, which retains the tokens that are *most* alike). Merging commutes with RoPE, so
it makes no difference that keys are merged after it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from ...conf.errors import InputError, require
from ..cache.kv_shape import KVShape
from ..cache.logits import LogitRule
from ..cache.products import exact_products
from ..policies.ranking import keep_mask
from .base import LayerStorage, Storage
from .buffer import Buffer, Growing
from .dense import DenseLayer

RETENTIONS = ("top_ratio", "range_distinct", "range_literal")
RETAINED_GROWTH = 32
"""Places for retained tokens made at a time in a generation; the host asks how many are taken as rarely."""

NEAR = 1e-3
"""Radians from 0 within which directions count as one (sin is in a denominator), and from pi as opposite."""


def angle_between(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Angle of directions of length one [..., D]: [...]; exact for small angles too, where an arccos is not."""
    return 2 * torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1))


def slerp(lower: torch.Tensor, upper: torch.Tensor, t: float) -> torch.Tensor:
    """The direction ``t`` of the way from ``lower`` to ``upper``, both [..., D] of length one."""
    angle = angle_between(lower, upper)[..., None]
    sine = angle.sin()
    near = angle < NEAR
    safe = torch.where(near, torch.ones_like(sine), sine)
    first = torch.where(near, torch.full_like(angle, 1 - t), ((1 - t) * angle).sin() / safe)
    second = torch.where(near, torch.full_like(angle, t), (t * angle).sin() / safe)
    return F.normalize(first * lower + second * upper, dim=-1)


class Directions:
    """Shared directions of merged tokens, as they are: [B, H, tokens, D]; ``capacity``: tokens to make room for."""

    def __init__(self, x: torch.Tensor, capacity: int = 0):
        self._x = Buffer(x, 2, capacity)

    def append(self, x: torch.Tensor, capacity: int) -> None:
        """Directions [B, H, n, D] of further tokens; where there is no room, make it for ``capacity`` in all."""
        self._x.append(x, capacity)

    def multiply_into(self, lengths: torch.Tensor, out: torch.Tensor) -> None:
        """Vectors of these ``lengths`` [B, H, tokens] into ``out`` [B, H, tokens, D]."""
        torch.mul(self._x.used, lengths[..., None], out=out)

    def scores(self, query: torch.Tensor) -> torch.Tensor:
        """Products [B, H, G, tokens], float32 or wider, of queries [B, H, G, D] with the directions."""
        return exact_products(query, self._x.used)

    def weighted(self, weights: torch.Tensor) -> torch.Tensor:
        """Sums [B, H, G, D] of the directions with weights [B, H, G, tokens]."""
        return torch.matmul(weights, self._x.used)

    def take(self, index: torch.Tensor) -> Directions:
        """Those of some rows."""
        return Directions(self._x.used[index])

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor that must stay in memory."""
        return [self._x.whole]

    @property
    def room(self) -> int:
        """Bytes that hold nothing yet."""
        return self._x.room


@dataclass
class Merged:
    """The keys (or the values) of a pair of layers.

    Attributes:
        directions: shared by both layers.
        lengths: [2, B, H, tokens], of the lower and the upper layer.
        retained: [B, H, R] int32, slots held as they are; -1 where a row or head has fewer than R.
        exact: [2, B, H, R, D], those tokens of both layers.
        threshold: [B, H] angle that decides for later tokens; None: none of them is retained.
        spare: so many of R are surely free in every row and head, beside the last one.
    """

    directions: Directions
    lengths: Buffer
    retained: torch.Tensor
    exact: torch.Tensor
    threshold: torch.Tensor | None
    spare: int = 0

    def retain(self, which: torch.Tensor, start: int, exact: torch.Tensor) -> None:
        """Hold further tokens as they are: ``which`` [B, H, n] of the slots from ``start`` on, out of [2, B, H, n, D].

        A single token is not asked after, for the answer would make the host wait for the device at every step of a
        generation: it is put in its place, or into the last one as nothing.
        """
        n = which.shape[2]
        most = 1 if n == 1 else int(which.sum(-1).max())
        if not most:
            return
        if self.spare < most:
            used = self.used
            if self.retained.shape[2] - used - 1 < most:
                room = (RETAINED_GROWTH if n == 1 else most) + 1
                self.retained = F.pad(self.retained[..., :used], (0, room), value=-1)
                self.exact = F.pad(self.exact[..., :used, :], (0, 0, 0, room))
            self.spare = self.retained.shape[2] - used - 1
        self.spare -= most
        nothing = self.retained.shape[2] - 1
        at = (self.retained >= 0).sum(-1, keepdim=True) + which.cumsum(-1) - 1
        at = torch.where(which, at, nothing)
        slots = torch.arange(start, start + n, dtype=torch.int32, device=which.device)
        self.retained.scatter_(2, at, torch.where(which, slots, -1))
        self.exact.scatter_(3, at[None, ..., None].expand_as(exact), exact.masked_fill(~which[..., None], 0))

    @property
    def used(self) -> int:
        """Slots of ``retained`` up to the last one that any row or head uses; asks the device."""
        return int((self.retained >= 0).sum(-1).max())

    def tensors(self) -> list[torch.Tensor]:
        rest = [] if self.threshold is None else [self.threshold]
        return [*self.directions.tensors(), self.lengths.whole, self.retained, self.exact, *rest]

    def take(self, index: torch.Tensor) -> Merged:
        """That of some rows."""
        threshold = None if self.threshold is None else self.threshold[index]
        lengths, exact = Buffer(self.lengths.used[:, index], dim=3), self.exact[:, index]
        return Merged(self.directions.take(index), lengths, self.retained[index], exact, threshold, self.spare)


class Pair(Growing):
    """Two layers. Each appends its own new tokens; when the upper one is done with a step they are merged.

    Args:
        t, gamma, retention: see :class:`MiniCache`.
        block: tokens are merged so many at a time; those of an incomplete block wait as they are.
        new_directions: (directions [B, H, n, D], whether they are keys', tokens to make room for) -> how they are held.
    """

    def __init__(
        self,
        t: float,
        gamma: float,
        retention: str,
        block: int = 1,
        new_directions: Callable[[torch.Tensor, bool, int], Directions] = lambda x, _, room: Directions(x, room),
    ):
        self.t, self.gamma, self.retention = t, gamma, retention
        self.block, self.new_directions = block, new_directions
        self.length = 0  # slots merged
        self.valid: torch.Tensor | None = None  # [B, 1, S], of all slots, merged and new
        self.keys: Merged | None = None
        self.values: Merged | None = None
        self.new: list[tuple[Buffer, Buffer] | None] = [None, None]  # [B, H, n, D], keys and values of each layer
        self._parts: dict[tuple[int, ...], Pair] = {}

    def append(self, which: int, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor | None) -> None:
        """New tokens [B, H, n, D] of one layer; ``valid`` [B, 1, n] or None."""
        mine = self.new[which]
        if which == 0:
            self._extend_valid(keys, valid)
        spare = self.spare(at_rest=not self.length) if self.block > 1 else 0  # a block of one is merged at once
        if mine is None:
            capacity = keys.shape[2] + spare
            self.new[which] = (Buffer(keys, 2, capacity), Buffer(values, 2, capacity))
            return
        for recent, new in zip(mine, (keys, values), strict=True):
            recent.append(new, recent.length + spare)

    def _extend_valid(self, keys: torch.Tensor, valid: torch.Tensor | None) -> None:
        if valid is None and self.valid is None:
            return
        batch, n = keys.shape[0], keys.shape[2]
        held = self.length + (0 if self.new[0] is None else self.new[0][0].length)
        ones = torch.ones(batch, 1, max(held, n), dtype=torch.bool, device=keys.device)
        before = ones[..., :held] if self.valid is None else self.valid
        self.valid = torch.cat([before, ones[..., :n] if valid is None else valid], dim=-1)

    def read(self, which: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(keys, values) of one layer as it sees them: merged tokens restored, new ones as they are."""
        new = self.new[which]
        if self.keys is None or self.values is None:
            assert new is not None, "read before append"
            return new[0].used, new[1].used
        return (
            self._restored(self.keys, which, None if new is None else new[0].used),
            self._restored(self.values, which, None if new is None else new[1].used),
        )

    def _restored(self, merged: Merged, which: int, new: torch.Tensor | None) -> torch.Tensor:
        n, exact = self.length, merged.exact
        more = 0 if new is None else new.shape[2]
        # One slot behind the last one takes what a row or head has fewer retained tokens of.
        x = exact.new_empty(*exact.shape[1:3], n + more + 1, exact.shape[4])
        merged.directions.multiply_into(merged.lengths.used[which], x[:, :, :n])
        if merged.retained.shape[2]:
            at = torch.where(merged.retained >= 0, merged.retained, n + more).long()
            x.scatter_(2, at[..., None].expand(-1, -1, -1, x.shape[3]), exact[which])
        if new is not None:
            x[:, :, n : n + more] = new
        return x[:, :, : n + more]

    def attend(self, which: int, query: torch.Tensor, rule: LogitRule) -> torch.Tensor:
        """Attention of one new token of one layer: [B, H, G, D] in and out.

        Over the shared directions themselves: a product with a merged vector is its length times that with the
        direction, so nothing is restored. Retained tokens are put in their places among the products.
        """
        keys, values, new = self.keys, self.values, self.new[which]
        assert keys is not None and values is not None
        n = self.length
        exact = torch.promote_types(query.dtype, torch.float32)
        # One slot behind the last one takes what a row or head has fewer retained tokens of.
        logits = query.new_empty(*query.shape[:3], n + 1, dtype=exact)
        torch.mul(keys.directions.scores(query), keys.lengths.used[which][:, :, None], out=logits[..., :n])
        logits.scatter_(3, _places(keys, n, query), exact_products(query, keys.exact[which]))
        if new is None:
            logits = logits[..., :n]
        else:
            recent = exact_products(query, new[0].used)
            logits = torch.cat([logits[..., :n], recent], dim=-1)
        logits = rule.logits(logits.contiguous())
        if self.valid is not None:
            logits = logits.masked_fill(~self.valid[:, :, None], -math.inf)
        weights = rule.weights(logits, head_dims=2)  # rounded once, when they have been multiplied with the lengths
        merged = F.pad(weights[..., :n], (0, 1))
        places = _places(values, n, query)
        retained = merged.gather(3, places)
        merged = merged.scatter(3, places, 0.0)[..., :n] * values.lengths.used[which][:, :, None]
        out = values.directions.weighted(merged.to(query.dtype)).to(exact)
        out += torch.matmul(retained.to(query.dtype), values.exact[which])
        if new is not None:
            out += torch.matmul(weights[..., n:].to(query.dtype), new[1].used)
        return out.to(query.dtype)

    def merge(self) -> None:
        """Both layers are done with their new tokens: keep one direction, two lengths, and what must not be merged."""
        lower, upper = self.new
        if lower is None and upper is None:  # a step of pads alone
            return
        assert lower is not None and upper is not None, "the upper layer is done before the lower one"
        devices = [layer[0].whole.device for layer in (lower, upper)]
        if devices[0] != devices[1]:
            where = ", ".join(map(str, devices))
            raise InputError("model.device_map", where, "splits a pair of layers that MiniCache merges")
        waiting = lower[0].length
        n = waiting // self.block * self.block
        if not n:
            return
        valid = None if self.valid is None else self.valid[..., self.length : self.length + n]
        capacity = self.capacity(self.length + n, n)
        if self.expected:
            capacity = (self.length + waiting + self.expected) // self.block * self.block
        (lower_keys, lower_values), (upper_keys, upper_values) = (
            [recent.used[:, :, :n] for recent in layer] for layer in (lower, upper)
        )
        self.keys = self._merged(self.keys, lower_keys, upper_keys, valid, True, capacity)
        self.values = self._merged(self.values, lower_values, upper_values, valid, False, capacity)
        self.length += n
        if n == waiting:
            self.new = [None, None]
        else:
            for recent in (*lower, *upper):
                recent.drop(n, self.spare(at_rest=True))

    def _merged(
        self,
        before: Merged | None,
        lower: torch.Tensor,
        upper: torch.Tensor,
        valid: torch.Tensor | None,
        is_keys: bool,
        capacity: int,
    ) -> Merged:
        exact = torch.promote_types(lower.dtype, torch.float32)
        both = torch.stack([lower, upper]).to(exact)
        lengths = both.norm(dim=-1)
        directions = F.normalize(both, dim=-1)
        angle = angle_between(directions[0], directions[1])  # [B, H, n]
        direction = slerp(directions[0], directions[1], self.t)
        # Opposite directions have nothing between them, and a vector without length has none.
        must = (angle > math.pi - NEAR) | (lengths.amin(0) == 0)
        real = torch.ones_like(must) if valid is None else valid.expand_as(must)
        if before is None:
            retain, threshold = self._retain(angle, must & real, real)
        else:
            threshold, retain = before.threshold, must & real
            if self.gamma == 1:
                retain = real
            elif threshold is not None:
                retain |= self._beyond(angle, threshold) & real
        direction, lengths = direction.to(lower.dtype), lengths.to(lower.dtype)
        if before is not None:
            before.retain(retain, self.length, torch.stack([lower, upper]))
            before.directions.append(direction, capacity)
            before.lengths.append(lengths, capacity)
            return before
        if not self.expected:  # a prompt alone takes what it takes
            capacity = 0
        index, kept = _slots(retain)
        at = index.long().clamp(min=0)[..., None].expand(-1, -1, -1, lower.shape[3])
        exact_tokens = torch.stack([x.gather(2, at) for x in (lower, upper)]) * kept[..., None].to(lower.dtype)
        held = self.new_directions(direction, is_keys, capacity)
        return Merged(held, Buffer(lengths, 3, capacity), index, exact_tokens, threshold)

    def _retain(
        self, angle: torch.Tensor, must: torch.Tensor, real: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Which of the prompt's tokens stay as they are [B, H, n], and the threshold for later ones [B, H]."""
        if self.gamma in (0, 1):
            return (real if self.gamma else must), None
        if self.retention == "top_ratio":
            count = (self.gamma * real.sum(-1).to(torch.float64)).ceil()  # [B, H]
            largest = keep_mask(torch.where(real, angle, -math.inf), count.long())  # [B, H, n]
            return largest | must, None
        lowest = torch.where(real, angle, math.inf).amin(-1)
        highest = torch.where(real, angle, -math.inf).amax(-1)
        width = self.gamma * (highest - lowest)
        threshold = lowest + width if self.retention == "range_literal" else highest - width
        return (self._beyond(angle, threshold) & real) | must, threshold

    def _beyond(self, angle: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
        """Whether an angle [B, H, n] is on the side of the threshold [B, H] that is retained."""
        at = threshold[..., None]
        return angle < at if self.retention == "range_literal" else angle > at

    def part(self, index: torch.Tensor) -> Pair:
        """Some of the rows, as a pair of their own; the same one for both layers, which ask one after the other."""
        key = tuple(index.tolist())
        if key not in self._parts:
            part = Pair(self.t, self.gamma, self.retention, self.block, self.new_directions)
            part.length = self.length
            part.valid = None if self.valid is None else self.valid[index]
            part.keys, part.values = (None if m is None else m.take(index) for m in (self.keys, self.values))
            part.new = [None if x is None else _rows_of(x, index) for x in self.new]
            self._parts[key] = part
        return self._parts[key]

    @property
    def head_count(self) -> int:
        """KV heads, once something is merged."""
        assert self.keys is not None
        return self.keys.lengths.whole.shape[2]

    def tensors(self, which: int) -> list[torch.Tensor]:
        """What one layer holds; what they share is the lower one's (0)."""
        new = self.new[which]
        out = [] if new is None else [recent.whole for recent in new]
        if which == 0:
            out += [t for merged in (self.keys, self.values) if merged is not None for t in merged.tensors()]
            out += [] if self.valid is None else [self.valid]
        return out

    def logical_bytes(self, which: int) -> int:
        """Bytes of :meth:`tensors` but for room to grow."""
        total = sum(t.nbytes for t in self.tensors(which)) - sum(recent.room for recent in self.new[which] or ())
        for merged in (self.keys, self.values):
            if which == 0 and merged is not None:
                total -= merged.directions.room + merged.lengths.room
                used = merged.used
                total -= merged.retained[..., used:].nbytes + merged.exact[..., used:, :].nbytes
        return total


def _rows_of(recent: tuple[Buffer, Buffer], index: torch.Tensor) -> tuple[Buffer, Buffer]:
    keys, values = recent
    return Buffer(keys.used[index], 2), Buffer(values.used[index], 2)


def _slots(retain: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots that are True [B, H, n]: (int32 [B, H, R] with -1 for none, bool [B, H, R])."""
    width = int(retain.sum(-1).max())
    order = retain.int().sort(dim=-1, descending=True, stable=True).indices[..., :width]
    kept = retain.gather(-1, order)
    return torch.where(kept, order, -1).to(torch.int32), kept


def _places(merged: Merged, end: int, query: torch.Tensor) -> torch.Tensor:
    """Slots of retained tokens [B, H, G, R] for the queries [B, H, G, D] of each head; ``end`` stands for none."""
    at = torch.where(merged.retained >= 0, merged.retained, end).long()
    return at[:, :, None].expand(-1, -1, query.shape[2], -1)


class PairLayer(LayerStorage):
    """One layer of a pair, 0 the lower and 1 the upper. What they share is counted with the lower one."""

    def __init__(self, pair: Pair, which: int):
        self.pair, self.which = pair, which

    def write(self, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor | None = None) -> None:
        self.pair.expected = self.expected
        self.pair.append(self.which, keys, values, valid)
        self.settle()

    def append(self, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor | None = None) -> None:
        self.count_down(keys.shape[2])
        self.pair.growth, self.pair.expected = self.growth, self.expected
        self.pair.append(self.which, keys, values, None if valid is None else valid[:, None])

    def attend(self, query: torch.Tensor, rule: LogitRule, valid: torch.Tensor | None) -> torch.Tensor:
        if query.shape[2] > 1 or not self.pair.length:
            return super().attend(query, rule, valid)
        heads = self.pair.head_count
        one = query[:, :, 0].unflatten(1, (heads, -1))  # [B, H, G, D]
        return self.pair.attend(self.which, one, rule).flatten(1, 2)[:, :, None]

    def settle(self) -> None:
        if self.which == 1:
            self.pair.merge()

    def read(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        return *self.pair.read(self.which), self.pair.valid

    def keep(self, slots: torch.Tensor, valid: torch.Tensor | None = None) -> None:
        raise NotImplementedError("tokens cannot leave a pair of layers")

    def tensors(self) -> list[torch.Tensor]:
        return self.pair.tensors(self.which)

    @property
    def tokens(self) -> torch.Tensor:
        keys, _, valid = self.read()
        if valid is None:
            return torch.full((keys.shape[0], 1), keys.shape[2], dtype=torch.int64, device=keys.device)
        return valid.sum(-1)

    @property
    def logical_bytes(self) -> int:
        """Padding of rows of different lengths included: lengths and directions of a pair have one shape."""
        return self.pair.logical_bytes(self.which)


@dataclass(frozen=True)
class MiniCache(Storage):
    """MiniCache's storage.

    Attributes:
        start: first layer of the first pair; None: the middle. With an odd number of layers from there on, the last one
            stays as it is.
        t: where the shared direction lies between the lower layer's (0) and the upper layer's (1); 0.6 in the paper.
        gamma: how much is retained, 0.05 in the paper; 0 nothing, 1 everything.
        retention: ``top_ratio``, ``range_distinct`` or ``range_literal``; see the module's docstring.
    """

    id: ClassVar[str] = "MiniCache"
    start: int | None = None
    t: float = 0.6
    gamma: float = 0.05
    retention: str = "top_ratio"

    def __post_init__(self) -> None:
        at = "method.storage."
        start = self.start
        ok = start is None or (isinstance(start, int) and start >= 0)
        require(ok, at + "start", start, "must be a layer's number, or null for the middle")
        for key in ("t", "gamma"):
            value = getattr(self, key)
            require(isinstance(value, int | float) and 0 <= value <= 1, at + key, value, "must be between 0 and 1")
        require(
            self.retention in RETENTIONS, at + "retention", self.retention, f"must be one of {', '.join(RETENTIONS)}"
        )

    @property
    def requires_same_tokens_across_layers(self) -> bool:
        return True

    def first_pair(self, num_layers: int) -> int:
        """Number of the first merged layer.

        Raises:
            InputError: the model has no such layer.
        """
        start = num_layers // 2 if self.start is None else self.start
        require(start <= num_layers, "method.storage.start", start, f"must be at most the model's {num_layers} layers")
        return start

    def new_layers(self, num_layers: int) -> Sequence[LayerStorage]:
        start = self.first_pair(num_layers)
        layers: list[LayerStorage] = [DenseLayer() for _ in range(start)]
        while len(layers) + 1 < num_layers:
            pair = Pair(self.t, self.gamma, self.retention)
            layers += [PairLayer(pair, 0), PairLayer(pair, 1)]
        return layers + [DenseLayer() for _ in range(num_layers - len(layers))]

    def bytes_formula(self, tokens: Sequence[int], heads: int, shape: KVShape, new_tokens: int = 0) -> int:
        """Whole layers as they are; a pair one direction, two lengths, and the retained tokens twice, with their slots.

        ``top_ratio`` retains a share of the prompt and no later token. The range rules retain a number of tokens that
        depends on the data: the formula then counts none.
        """
        return self._bytes(tokens, heads, shape, new_tokens, readers=1)

    def bytes_read_formula(self, tokens: Sequence[int], heads: int, shape: KVShape, new_tokens: int = 0) -> int:
        """Both layers of a pair read its directions, and where what is retained stands: merging saves no reading."""
        return self._bytes(tokens, heads, shape, new_tokens, readers=2)

    def _bytes(self, tokens: Sequence[int], heads: int, shape: KVShape, new_tokens: int, readers: int) -> int:
        """What a pair's layers share counted ``readers`` times."""
        size, channels = shape.element_bytes, shape.token_channels
        start = self.first_pair(len(tokens))
        pairs = (len(tokens) - start) // 2
        total = heads * channels * size * (sum(tokens[:start]) + sum(tokens[start + 2 * pairs :]))
        for held in tokens[start : start + 2 * pairs : 2]:
            retained = held
            if self.gamma < 1:
                retained = math.ceil(self.gamma * (held - new_tokens)) if self.retention == "top_ratio" else 0
            shared = held * channels * size + 2 * retained * 4
            total += heads * (readers * shared + 2 * held * 2 * size + retained * 2 * channels * size)
        return total
