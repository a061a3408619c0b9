"""Token counts of each layer under PyramidInfer's rule, after the prompt and after any number of decode steps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import InitVar, dataclass
from functools import lru_cache
from typing import Annotated, Literal

from ....conf.errors import InputError
from ....conf.options import Bounds, NonNegativeInt, PositiveFloat, PositiveInt, Share, check
from ...cache.kv_shape import KVShape
from ..budget import Budget, resolve_budget
from ..policy import CachePolicy

DECAY_RATIO_STEPS = 1024
"""To meet a budget, the decay ratios 0, 1 / DECAY_RATIO_STEPS, ..., 1 are tried."""


@dataclass(frozen=True)
class Progress:
    """Token counts of each layer after a number of decode steps, for one sequence.

    Attributes:
        lengths: Number of tokens that each layer stores.
        pending: Number of stored tokens that may still be evicted, per layer.
        recent: R of the last step.
    """

    lengths: tuple[int, ...]
    pending: tuple[int, ...]
    recent: int


@dataclass(frozen=True)
class PyramidLengths(CachePolicy):
    """Settings of PyramidInfer, and the token counts that follow from them.

    Attributes:
        budget: Prompt tokens stored per layer on average, or a fraction of the prompt, which determines the decay
            ratio; None: ``prefill_decay_ratio`` is used.
        prefill_decay_ratio: p, the share of the context that the deepest layer forwards (paper: 0.9 for 7B models).
        strategy: Decrease of the forwarded share from 1 to p over the layers: ``cosine``, ``linear``; or ``constant``.
        interval: Every ``interval``-th layer drops tokens.
        recent_ratio: Share of the prompt, at its end, that is always forwarded and whose attention scores the context.
        min_context: A layer whose context would shrink to this many tokens or fewer drops none.
        sinks: Number of first tokens that are always forwarded.
        distance_weight: Weight of the last query's attention; that of the first recent query is 1.
        trigger: When generated tokens are evicted: ``own_length``, ``published`` or ``never``; see :mod:`.policy`.
        gen_window, gen_keep_ratio, gen_decay_ratio: Of ``gen_window`` generated tokens the first layer keeps the share
            ``gen_keep_ratio``, and the last layer ``gen_decay_ratio`` of that share.
        prefill_only: Alias of ``trigger=never``, named as in other methods.
    """

    budget: Budget | None = None
    prefill_decay_ratio: Share = 0.9
    strategy: Literal["cosine", "linear", "constant"] = "cosine"
    interval: PositiveInt = 1
    recent_ratio: Annotated[float, Bounds(ge=0, lt=1)] = 0.2
    min_context: NonNegativeInt = 64
    sinks: NonNegativeInt = 4
    distance_weight: PositiveFloat = 1.2
    trigger: Literal["own_length", "published", "never"] = "own_length"
    gen_window: PositiveInt = 16
    gen_keep_ratio: Share = 0.9
    gen_decay_ratio: Share = 0.1
    prefill_only: InitVar[bool] = False

    def __post_init__(self, prefill_only: bool) -> None:
        check(prefill_only, "method.policy.prefill_only", bool)
        if prefill_only:
            object.__setattr__(self, "trigger", "never")
        super().__post_init__()

    def recent(self, length: int) -> int:
        """Return R, the number of recent tokens besides the last one, for a length."""
        return int(self.recent_ratio * length)

    def limit(self, prompt_length: int) -> int:
        """Return the length up to which no token is evicted: the budget if it covers the prompt, else 0."""
        budget = 0 if self.budget is None else resolve_budget(self.budget, prompt_length)
        return budget if budget >= prompt_length else 0

    def layer_lengths(self, prompt_length: int, layers: int) -> tuple[int, ...]:
        """Return the number of prompt tokens that each layer stores.

        Raises:
            InputError: Their mean exceeds the budget with every decay ratio.
        """
        return _layer_lengths(self, prompt_length, layers)

    def forwarded_share(self, layer: int, layers: int, decay: float) -> float:
        """Return the share of the context that a layer forwards to the next."""
        if self.strategy == "constant":
            return decay
        factor = 1 - layer / layers if self.strategy == "linear" else (math.cos(math.pi * layer / layers) + 1) / 2
        return (1 - decay) * factor + decay

    def window_keep_count(self, layer: int, layers: int) -> int:
        """Return the number of tokens that a layer keeps of a generated window."""
        factor = (math.cos(math.pi * layer / layers) + 1) / 2
        share = self.gen_keep_ratio * ((1 - self.gen_decay_ratio) * factor + self.gen_decay_ratio)
        return max(int(self.gen_window * share), 1)

    def progress(self, prompt_length: int, new_tokens: int, layers: int) -> Progress:
        """Return the token counts after ``new_tokens`` decode steps, simulated without tensors."""
        return _progress(self, prompt_length, new_tokens, layers)

    def max_progress(self, prompt_length: int, new_tokens: int, steps: int, layers: int) -> Progress:
        """Return the maximum counts during ``steps`` steps after ``new_tokens`` steps, before each step's eviction."""
        return _max_progress(self, prompt_length, new_tokens, steps, layers)

    def window_to_evict(self, length: int, finalized: int, seen: int, recent: int, limit: int) -> tuple[int, int]:
        """Return (first slot, size) of the window to reduce now in a layer of ``length`` tokens; (0, 0): none."""
        if self.trigger == "never" or length <= limit:
            return 0, 0
        if self.trigger == "own_length":
            is_due = length - max(1, recent) - finalized >= self.gen_window
            return (finalized, self.gen_window) if is_due else (0, 0)
        if seen - recent - finalized < self.gen_window:
            return 0, 0
        size = max(0, min(self.gen_window, length - 1 - recent))
        return length - 1 - recent - size, size

    def finalized_after(self, length: int, finalized: int, recent: int, keep: int) -> int:
        """Return the number of tokens exempt from further eviction, after a window is reduced to ``keep`` tokens."""
        return finalized + keep if self.trigger == "own_length" else length - recent

    def kept_tokens(self, prompt_length: int, new_tokens: int, layers: int, heads: int) -> Sequence[int]:
        return self.progress(prompt_length, new_tokens, layers).lengths

    def state_bytes(self, shape: KVShape, heads: int, prompt_length: int, new_tokens: int) -> int:
        """Two float32 sums per pending token; ``published``: one row of attention per recent query."""
        progress = self.progress(prompt_length, new_tokens, shape.layers)
        if self.trigger == "own_length":
            return 8 * sum(progress.pending)
        return 4 * (1 + progress.recent) * sum(progress.lengths) if self.trigger == "published" else 0


@lru_cache(maxsize=4096)
def _layer_lengths(rule: PyramidLengths, prompt_length: int, layers: int) -> tuple[int, ...]:
    if rule.budget is None:
        return _lengths_with(rule, rule.prefill_decay_ratio, prompt_length, layers)
    budget = resolve_budget(rule.budget, prompt_length)
    if prompt_length <= budget:
        return (prompt_length,) * layers
    # The mean is not monotonic in the decay ratio, because a layer that would be left with min_context tokens or fewer
    # drops none. So all ratios are tried.
    tried = [_lengths_with(rule, i / DECAY_RATIO_STEPS, prompt_length, layers) for i in range(DECAY_RATIO_STEPS + 1)]
    fitting = [t for t in tried if sum(t) <= budget * layers]
    if not fitting:
        min_mean = min(sum(t) for t in tried) / layers
        raise InputError(
            "method.budget",
            rule.budget,
            f"cannot be met on a prompt of {prompt_length} tokens: with the other settings as they are, pyramid_infer "
            f"keeps at least {math.ceil(min_mean)} per layer on average; lower method.policy.recent_ratio or "
            "min_context, or use strategy=constant",
        )
    return max(fitting, key=sum)


def _lengths_with(rule: PyramidLengths, decay: float, prompt_length: int, layers: int) -> tuple[int, ...]:
    recent = 1 + rule.recent(prompt_length)
    min_context = min(rule.min_context, prompt_length - recent)
    lengths = [prompt_length]
    for layer in range(layers - 1):
        context, share = lengths[-1] - recent, rule.forwarded_share(layer, layers, decay)
        forwarded = context
        if layer % rule.interval == 0 and share < 1 and int(context * share) > min_context:
            forwarded = int(context * share)
        lengths.append(forwarded + recent)
    return tuple(lengths)


def _steps(rule: PyramidLengths, prompt_length: int, layers: int) -> Iterator[Progress]:
    """Yield the token counts after the prompt, after one step, and so on without end."""
    lengths = list(rule.layer_lengths(prompt_length, layers))
    finalized, recent, limit = list(lengths), rule.recent(prompt_length), rule.limit(prompt_length)
    for seen in itertools.count(prompt_length + 1):
        yield Progress(tuple(lengths), tuple(n - f for n, f in zip(lengths, finalized, strict=True)), recent)
        recent = rule.recent(lengths[0] + 1)
        for i in range(layers):
            lengths[i] += 1
            _, size = rule.window_to_evict(lengths[i], finalized[i], seen, recent, limit)
            if size:
                keep = min(rule.window_keep_count(i, layers), size)
                lengths[i] -= size - keep
                finalized[i] = rule.finalized_after(lengths[i], finalized[i], recent, keep)


@lru_cache(maxsize=4096)
def _progress(rule: PyramidLengths, prompt_length: int, new_tokens: int, layers: int) -> Progress:
    return next(itertools.islice(_steps(rule, prompt_length, layers), new_tokens, None))


@lru_cache(maxsize=256)
def _max_progress(rule: PyramidLengths, prompt_length: int, new_tokens: int, steps: int, layers: int) -> Progress:
    previous = list(itertools.islice(_steps(rule, prompt_length, layers), new_tokens, new_tokens + max(1, steps)))
    lengths = (1 + max(p.lengths[layer] for p in previous) for layer in range(layers))
    pending = (1 + max(p.pending[layer] for p in previous) for layer in range(layers))
    return Progress(tuple(lengths), tuple(pending), max(p.recent for p in previous))
