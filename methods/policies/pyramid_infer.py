"""PyramidInfer (Yang et al., 2024, arXiv 2405.12532): fewer tokens go on to each next layer, already in the prompt.

Section 4: deeper layers need fewer tokens. A layer reads the tokens that the layer before passed on and caches all of
them; then the attention that the prompt's last tokens pay to each, averaged over the heads and weighted towards the
latest, decides which go on. What does not has no hidden state, no key and no value in any deeper layer, so that the
later layers also compute less. The first tokens and the last ones always go on.

While tokens are generated, a window of ``gen_window`` generated tokens is thinned out once ``recent_ratio`` of the
length has been generated after it, by the attention that those later tokens paid to it; deeper layers keep fewer.

Two choices differ from the published code, which has them as options or faults. ``trigger=own_length`` counts a layer's
own tokens: prompt tokens never leave while decoding. The published code for transformers 4.46 counts all tokens seen
(``trigger=published``), so that the deep layers thin out at every step and eat up the prompt; and its window begins one
token early, with the prompt's last one. Its linear schedule is constant by a fault; here it is linear.

The hidden states are the model's, not the cache's. So this policy hooks the model's layers when its cache is made
and lets go of them when the last layer has read the prompt; a forward with another cache passes through untouched.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass, field
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from ...conf.errors import InputError, is_whole, require
from ..cache.forward import Rows
from ..cache.kv_shape import KVShape
from ..cache.prefill import ALL_QUERIES, Prompt
from ..cache.prompt_attention import attention_blocks
from ..storage.base import LayerStorage, slots_that_stay
from .budget import Budget, check_budget, resolve_budget
from .decoding import attend_and_weigh
from .policy import CachePolicy, Kept, PolicyCapabilities, Step
from .ranking import keep_mask, keep_slots
from .scorers.base import ModelLayer

if TYPE_CHECKING:
    from ..cache.cache import KVCache

STRATEGIES = ("cosine", "linear", "constant")
TRIGGERS = ("own_length", "published", "never")
GRID = 1024
"""Decay ratios tried to meet a budget: 0, 1 / GRID, ..., 1."""
ROOM = 256
"""Columns added at once to the sums over generated tokens."""


@dataclass
class Sequences:
    """What the layers of one cache share.

    Attributes:
        cache: gives the cache while it lives.
        layers: how many there are.
        prompts: tokens of each group of rows' whole prompt.
        recent: R of each row, for every token of the step under way.
        columns: [B, W] columns of the batch that the layer under way reads (anything in padding); None: all.
    """

    cache: Callable[[], KVCache | None]
    layers: int
    prompts: list[int] = field(default_factory=list)
    recent: list[list[int]] = field(default_factory=list)
    columns: torch.Tensor | None = None


@dataclass
class PyramidState:
    """One layer and batch.

    Attributes:
        layer_idx: of this layer.
        shared: of the whole cache.
        chosen: int64 [R, K] for each group of rows: which of this layer's tokens go on; None: all.
        rows: where published, [R, 1 + R, T] attention of each group's recent queries, until the prompt is in.
        lengths: tokens held, of each row.
        settled: how many of them need no more thinning, of each row.
        limit: tokens below which nothing leaves, of each row: a budget that holds the whole prompt.
        seen: tokens fed, of each row.
        recent: R of each row at the step under way, from the first layer's length.
        record: what is remembered of later tokens' attention.
    """

    layer_idx: int = 0
    shared: Sequences | None = None
    chosen: list[torch.Tensor | None] = field(default_factory=list)
    rows: list[torch.Tensor] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    settled: list[int] = field(default_factory=list)
    limit: list[int] = field(default_factory=list)
    seen: list[int] = field(default_factory=list)
    recent: list[int] = field(default_factory=list)
    record: WindowSums | AttentionRows | None = None

    def waiting(self) -> list[int]:
        """Generated tokens of each row that wait to be thinned out."""
        return [n - s for n, s in zip(self.lengths, self.settled, strict=True)]


@dataclass(frozen=True)
class Progress:
    """Where the layers of one sequence stand after a number of generated tokens.

    Attributes:
        lengths: tokens held by each layer.
        pending: of them, those that wait to be thinned out.
        recent: R of the last step.
    """

    lengths: tuple[int, ...]
    pending: tuple[int, ...]
    recent: int


@dataclass(frozen=True)
class PyramidInfer(CachePolicy):
    """PyramidInfer's rule.

    Attributes:
        budget: prompt tokens held per layer on average, or a fraction of the prompt: sets the decay ratio; None:
            ``prefill_decay_ratio`` does.
        prefill_decay_ratio: p; how much of the context goes on from the deepest layer (0.9 in the paper's 7B setting).
        strategy: how the share that goes on falls from 1 to p over the layers: ``cosine``, ``linear``; or ``constant``.
        interval: every how many layers tokens are dropped.
        recent_ratio: share of the prompt, at its end, that always goes on and whose attention decides.
        min_context: context tokens below which a layer drops nothing.
        sinks: first tokens that always go on.
        distance_weight: weight of the last query's attention, where that of the first recent one is 1.
        trigger: ``own_length``, ``published`` or ``never``; see the module's docstring.
        gen_window, gen_keep_ratio, gen_decay_ratio: of ``gen_window`` generated tokens the share ``gen_keep_ratio``
            stays in the first layer, and ``gen_decay_ratio`` of that in the last.
        prefill_only: the same as ``trigger=never``, under the name that other methods have for it.
    """

    id: ClassVar[str] = "PyramidInfer"
    budget: Budget | None = None
    prefill_decay_ratio: float = 0.9
    strategy: str = "cosine"
    interval: int = 1
    recent_ratio: float = 0.2
    min_context: int = 64
    sinks: int = 4
    distance_weight: float = 1.2
    trigger: str = "own_length"
    gen_window: int = 16
    gen_keep_ratio: float = 0.9
    gen_decay_ratio: float = 0.1
    prefill_only: InitVar[bool] = False

    def __post_init__(self, prefill_only: bool) -> None:
        at = "method.policy."
        require(isinstance(prefill_only, bool), at + "prefill_only", prefill_only, "must be true or false")
        if prefill_only:
            object.__setattr__(self, "trigger", "never")
        if self.budget is not None:
            check_budget(self.budget)
        for key in ("prefill_decay_ratio", "gen_keep_ratio", "gen_decay_ratio"):
            value = getattr(self, key)
            require(isinstance(value, int | float) and 0 <= value <= 1, at + key, value, "must be between 0 and 1")
        ratio = self.recent_ratio
        require(isinstance(ratio, int | float) and 0 <= ratio < 1, at + "recent_ratio", ratio, "must be in [0, 1)")
        for key, least in (("interval", 1), ("min_context", 0), ("sinks", 0), ("gen_window", 1)):
            value = getattr(self, key)
            require(is_whole(value, least), at + key, value, f"must be a whole number >= {least}")
        weight = self.distance_weight
        require(isinstance(weight, int | float) and weight > 0, at + "distance_weight", weight, "must be above 0")
        for key, allowed in (("strategy", STRATEGIES), ("trigger", TRIGGERS)):
            value = getattr(self, key)
            require(value in allowed, at + key, value, f"must be one of {', '.join(allowed)}")

    @cached_property
    def capabilities(self) -> PolicyCapabilities:
        return PolicyCapabilities(
            observation_window=ALL_QUERIES,
            evicts_while_decoding=self.trigger != "never",
            attends_whole_prompt=False,
            ranks_tokens=True,
            spans_layers=True,
        )

    # how many ----------------------------------------------------------------------------------------------------

    def recent(self, length: int) -> int:
        """R: recent tokens beside the last one, of ``length``."""
        return int(self.recent_ratio * length)

    def limit(self, prompt_length: int) -> int:
        """Tokens up to which nothing leaves a layer: a budget that holds the whole prompt; 0: there is none."""
        budget = 0 if self.budget is None else resolve_budget(self.budget, prompt_length)
        return budget if budget >= prompt_length else 0

    def layer_lengths(self, prompt_length: int, layers: int) -> tuple[int, ...]:
        """Prompt tokens that each layer holds.

        Raises:
            InputError: no decay ratio brings their mean down to the budget.
        """
        return _layer_lengths(self, prompt_length, layers)

    def share_going_on(self, layer: int, layers: int, decay: float) -> float:
        """Share of the context that goes on from a layer."""
        if self.strategy == "constant":
            return decay
        falling = 1 - layer / layers if self.strategy == "linear" else (math.cos(math.pi * layer / layers) + 1) / 2
        return (1 - decay) * falling + decay

    def stay_of_window(self, layer: int, layers: int) -> int:
        """Tokens of a generated window that stay in a layer."""
        falling = (math.cos(math.pi * layer / layers) + 1) / 2
        share = self.gen_keep_ratio * ((1 - self.gen_decay_ratio) * falling + self.gen_decay_ratio)
        return max(int(self.gen_window * share), 1)

    def progress(self, prompt_length: int, new_tokens: int, layers: int) -> Progress:
        """Where the layers stand, step by step but without tensors."""
        return _progress(self, prompt_length, new_tokens, layers)

    def window_to_thin(self, length: int, settled: int, seen: int, recent: int, limit: int) -> tuple[int, int]:
        """(first slot, number) of the tokens to thin out at a layer that holds ``length``; (0, 0): none now."""
        if self.trigger == "never" or length <= limit:
            return 0, 0
        if self.trigger == "own_length":
            return (settled, self.gen_window) if length - max(1, recent) - settled >= self.gen_window else (0, 0)
        if seen - recent - settled < self.gen_window:
            return 0, 0
        number = max(0, min(self.gen_window, length - 1 - recent))
        return length - 1 - recent - number, number

    def settled_after(self, length: int, settled: int, recent: int, stay: int) -> int:
        """Tokens that need no more thinning, once ``stay`` of a window have stayed and ``length`` tokens are left."""
        return settled + stay if self.trigger == "own_length" else length - recent

    def kept_tokens(self, prompt_length: int, new_tokens: int, layers: int) -> Sequence[int]:
        return self.progress(prompt_length, new_tokens, layers).lengths

    def state_bytes(self, shape: KVShape, heads: int, prompt_length: int, new_tokens: int) -> int:
        """Two float32 sums for each token that waits; ``published``: a row of attention for each recent query."""
        now = self.progress(prompt_length, new_tokens, shape.layers)
        if self.trigger == "own_length":
            return 8 * sum(now.pending)
        return 4 * (1 + now.recent) * sum(now.lengths) if self.trigger == "published" else 0

    # the prompt --------------------------------------------------------------------------------------------------

    def new_state(self, layer: ModelLayer) -> PyramidState:
        return PyramidState()

    def attach(self, model: PreTrainedModel, cache: KVCache) -> None:
        if not hasattr(model.get_decoder(), "layers") or not hasattr(model.get_decoder(), "rotary_emb"):
            raise InputError(
                "method",
                "pyramid_infer",
                f"drops tokens between decoder layers that share one RoPE, and {type(model).__name__} is not built so",
            )
        shared = Sequences(weakref.ref(cache), len(cache.layers))
        for i, layer in enumerate(cache.layers):
            layer.state.layer_idx, layer.state.shared = i, shared
        hook_layers(model, shared)

    def select(self, prompt: Prompt, state: Any = None) -> Kept:
        """Everything that came here stays here; notes what goes on to the next layer."""
        group = len(state.chosen)
        if state.layer_idx == 0:
            state.shared.prompts.append(prompt.length)
        whole = state.shared.prompts[group]
        lengths = self.layer_lengths(whole, prompt.num_layers)
        recent = 1 + self.recent(whole)
        last = prompt.layer_idx == prompt.num_layers - 1
        going_on = prompt.length if last else lengths[prompt.layer_idx + 1]
        published = self.trigger == "published"
        if going_on == prompt.length and not published:
            state.chosen.append(None)
            return Kept()
        weights = torch.linspace(1.0, self.distance_weight, recent, device=prompt.keys.device)
        score = torch.zeros(prompt.keys.shape[0], prompt.length, device=prompt.keys.device)
        rows = []
        for start, block in attention_blocks(prompt, recent):
            attention = block.mean(dim=(1, 2))  # [R, n, columns]
            n, columns = attention.shape[1:]
            score[:, :columns] += torch.einsum("q,rqt->rt", weights[start : start + n], attention)
            if published:
                rows.append(F.pad(attention, (0, prompt.length - columns)))
        if published:
            state.rows.append(torch.cat(rows, dim=1))
        if going_on == prompt.length:
            state.chosen.append(None)
            return Kept()
        context = prompt.length - recent
        sinks = min(self.sinks, context)
        score[:, :sinks] = 1e6 - torch.arange(sinks, device=score.device)  # above any attention; the earliest first
        best = keep_slots(score[:, :context], going_on - recent)  # [R, going_on - recent]
        tail = torch.arange(context, prompt.length, device=best.device).expand(best.shape[0], -1)
        state.chosen.append(torch.cat([best, tail], dim=1))
        return Kept()

    def after_prompt(
        self,
        state: PyramidState,
        storage: LayerStorage,
        lengths: torch.Tensor,
        scores: torch.Tensor | None,
        queries: torch.Tensor | None = None,
    ) -> None:
        assert state.shared is not None
        cache = state.shared.cache()
        assert cache is not None and cache.new_tokens is not None
        rows = cache.new_tokens.rows
        state.lengths = lengths.tolist()
        state.settled = list(state.lengths)
        state.seen = [0] * len(state.lengths)
        for group, whole in zip(rows, state.shared.prompts, strict=True):
            for row in range(len(state.seen)) if group.index is None else group.index.tolist():
                state.seen[row] = whole
        state.limit = [self.limit(n) for n in state.seen]
        if self.trigger == "own_length":
            state.record = WindowSums.empty(len(state.lengths), lengths.device)
        elif self.trigger == "published":
            state.record = AttentionRows.of_prompt(rows, state.rows, max(state.lengths))
            state.rows = []

    # steps -------------------------------------------------------------------------------------------------------

    def attend(self, state: PyramidState, storage: LayerStorage, step: Step) -> torch.Tensor:
        if self.trigger == "never":
            return super().attend(state, storage, step)
        assert state.shared is not None
        if state.layer_idx == 0:
            state.shared.recent = []
        return torch.cat([self._attend_one(state, storage, token, i) for i, token in enumerate(step.tokens())], dim=2)

    def _attend_one(self, state: PyramidState, storage: LayerStorage, step: Step, number: int) -> torch.Tensor:
        out, weights, held = attend_and_weigh(storage, step)
        assert state.shared is not None and state.record is not None
        real = [True] * len(state.lengths) if step.valid is None else step.valid[:, 0].tolist()
        for row, is_real in enumerate(real):
            state.lengths[row] += is_real
            state.seen[row] += is_real
        if state.layer_idx == 0:
            state.shared.recent.append([self.recent(n) for n in state.lengths])
        state.recent = state.shared.recent[number]
        if step.valid is not None:  # the row of a pad stands still: put its tokens at the end again
            assert held is not None
            kept, valid = slots_that_stay(held[:, :1])
            storage.keep(kept, valid)
            weights = weights.gather(3, kept[:, :, None].expand(*weights.shape[:3], -1))
            held = valid
        state.record.observe(self, state, weights, step.valid)
        self._thin_out(state, storage, weights.shape[3], held)
        return out

    def _thin_out(self, state: PyramidState, storage: LayerStorage, slots: int, held: torch.Tensor | None) -> None:
        assert state.shared is not None and state.record is not None
        stay = self.stay_of_window(state.layer_idx, state.shared.layers)
        staying = None
        for row, length in enumerate(state.lengths):
            settled, recent = state.settled[row], state.recent[row]
            first, number = self.window_to_thin(length, settled, state.seen[row], recent, state.limit[row])
            if not number:
                continue
            left = min(stay, number)
            if left < number:
                worth = state.record.score(self, state, row, first, number)
                if staying is None:
                    every = torch.ones(len(state.lengths), 1, slots, dtype=torch.bool, device=worth.device)
                    staying = every if held is None else held[:, :1].clone()
                at = slots - length + first
                staying[row, 0, at : at + number] = keep_mask(worth, left)
                state.lengths[row] -= number - left
            state.settled[row] = self.settled_after(state.lengths[row], settled, recent, left)
        if staying is not None:
            kept, valid = slots_that_stay(staying)
            storage.keep(kept, valid)
            state.record.keep(kept[:, 0])

    def state_tensors(self, state: Any) -> list[torch.Tensor]:
        return [] if state.record is None else state.record.tensors()

    def logical_state_bytes(self, state: Any, tokens: torch.Tensor) -> int:
        return 0 if state.record is None else state.record.logical_bytes(state)


@lru_cache(maxsize=4096)
def _layer_lengths(rule: PyramidInfer, prompt_length: int, layers: int) -> tuple[int, ...]:
    if rule.budget is None:
        return _lengths_with(rule, rule.prefill_decay_ratio, prompt_length, layers)
    budget = resolve_budget(rule.budget, prompt_length)
    if prompt_length <= budget:
        return (prompt_length,) * layers
    # A rule of the method (a layer left with min_context or less drops nothing) makes the mean rise in places as the
    # decay ratio falls, so the ratios are tried one by one.
    tried = [_lengths_with(rule, i / GRID, prompt_length, layers) for i in range(GRID + 1)]
    fitting = [t for t in tried if sum(t) <= budget * layers]
    if not fitting:
        least = min(sum(t) for t in tried) / layers
        raise InputError(
            "method.budget",
            rule.budget,
            f"cannot be met on a prompt of {prompt_length} tokens: with the other settings as they are, pyramid_infer "
            f"holds at least {math.ceil(least)} per layer on average; lower method.policy.recent_ratio or "
            "min_context, or use strategy=constant",
        )
    return max(fitting, key=sum)


def _lengths_with(rule: PyramidInfer, decay: float, prompt_length: int, layers: int) -> tuple[int, ...]:
    recent = 1 + rule.recent(prompt_length)
    least = min(rule.min_context, prompt_length - recent)
    lengths = [prompt_length]
    for layer in range(layers - 1):
        context, share = lengths[-1] - recent, rule.share_going_on(layer, layers, decay)
        going_on = context
        if layer % rule.interval == 0 and context > least and share < 1 and int(context * share) > least:
            going_on = int(context * share)
        lengths.append(going_on + recent)
    return tuple(lengths)


@lru_cache(maxsize=4096)
def _progress(rule: PyramidInfer, prompt_length: int, new_tokens: int, layers: int) -> Progress:
    lengths = list(rule.layer_lengths(prompt_length, layers))
    settled, recent = list(lengths), rule.recent(prompt_length)
    limit = rule.limit(prompt_length)
    for step in range(1, new_tokens + 1):
        recent = rule.recent(lengths[0] + 1)
        for i in range(layers):
            lengths[i] += 1
            seen = prompt_length + step
            _, number = rule.window_to_thin(lengths[i], settled[i], seen, recent, limit)
            if number:
                stay = min(rule.stay_of_window(i, layers), number)
                lengths[i] -= number - stay
                settled[i] = rule.settled_after(lengths[i], settled[i], recent, stay)
    return Progress(tuple(lengths), tuple(n - s for n, s in zip(lengths, settled, strict=True)), recent)


# what later tokens paid ------------------------------------------------------------------------------------------


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
        self, rule: PyramidInfer, state: PyramidState, weights: torch.Tensor, real: torch.Tensor | None
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

    def score(self, rule: PyramidInfer, state: PyramidState, row: int, first: int, number: int) -> torch.Tensor:
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
    def of_prompt(groups: Sequence[Rows], rows: Sequence[torch.Tensor], slots: int) -> AttentionRows:
        """From each group's rows [R, P, T], padded on the left."""
        if len(groups) == 1:
            return AttentionRows(rows[0])
        queries = max(r.shape[1] for r in rows)
        out = rows[0].new_zeros(sum(r.shape[0] for r in rows), queries, slots)
        for group, r in zip(groups, rows, strict=True):
            out[group.index, queries - r.shape[1] :, slots - r.shape[2] :] = r
        return AttentionRows(out)

    def observe(
        self, rule: PyramidInfer, state: PyramidState, weights: torch.Tensor, real: torch.Tensor | None
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

    def score(self, rule: PyramidInfer, state: PyramidState, row: int, first: int, number: int) -> torch.Tensor:
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


# the model's side ------------------------------------------------------------------------------------------------


def hook_layers(model: PreTrainedModel, shared: Sequences) -> None:
    """Let the hidden states of the cache's prompt shrink from layer to layer; the hooks go when it is read."""
    layers = model.get_decoder().layers
    handles: list[Any] = []

    def done() -> None:
        for handle in handles:
            handle.remove()

    def before(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cache = shared.cache()
        if cache is None:
            done()
            return None
        mine = kwargs.get("past_key_values") is cache
        return _shrink(cache, shared, order[module], args, kwargs) if mine else None

    def after(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        cache = shared.cache()
        mine = kwargs.get("past_key_values") is cache
        if cache is not None and mine:
            for layer in cache.layers:
                layer.seen = cache.layers[0].seen
                layer.state.chosen = []
            shared.columns = None
            done()

    order = {layer: i for i, layer in enumerate(layers)}
    handles += [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers[1:]]
    handles.append(layers[-1].register_forward_hook(after, with_kwargs=True))


def _shrink(
    cache: KVCache, shared: Sequences, layer_idx: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """What a layer is given: only the tokens that the one before passes on."""
    from ..cache.forward import NewTokens  # at run time: that module imports this package's base

    hidden = args[0]
    before, new = cache.layers[layer_idx - 1], cache.new_tokens
    assert new is not None
    if before.reading:
        raise InputError(
            "runner.chunk_size",
            hidden.shape[1],
            "method=pyramid_infer looks at the prompt's end before its next layer begins: use runner.chunk_size=null",
        )
    if any(chosen is not None for chosen in before.state.chosen):
        batch, width = hidden.shape[0], hidden.shape[1]
        stay = torch.zeros(batch, width, dtype=torch.bool, device=hidden.device)
        rows = []
        for group, chosen in zip(new.rows, before.state.chosen, strict=True):
            which = slice(None) if group.index is None else group.index
            if chosen is None:
                stay[which, group.pads :] = True
                rows.append((group, width - group.pads))
            else:
                stay[which] = torch.zeros_like(stay[which]).scatter(1, chosen + group.pads, True)
                rows.append((group, chosen.shape[1]))
        columns, _ = slots_that_stay(stay)  # in order, padded on the left
        longest = columns.shape[1]
        cache.new_tokens = NewTokens([Rows(longest - n, group.index) for group, n in rows], None, longest)
        hidden = hidden.gather(1, columns[..., None].expand(-1, -1, hidden.shape[2]))
        shared.columns = columns if shared.columns is None else shared.columns.gather(1, columns)
    if shared.columns is None:
        return None
    at = shared.columns
    changed = dict(kwargs)
    cos_sin = []
    for x in kwargs["position_embeddings"]:
        x = x.expand(at.shape[0], -1, -1)
        cos_sin.append(x.gather(1, at[..., None].expand(-1, -1, x.shape[2])))
    changed["position_embeddings"] = tuple(cos_sin)
    if kwargs.get("position_ids") is not None:
        changed["position_ids"] = kwargs["position_ids"].expand(at.shape[0], -1).gather(1, at)
    return (hidden, *args[1:]), changed
