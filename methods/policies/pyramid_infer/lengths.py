"""How many tokens each layer holds under PyramidInfer's rule, of the prompt and after any number of steps."""

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

GRID = 1024
"""Decay ratios tried to meet a budget: 0, 1 / GRID, ..., 1."""


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
class PyramidLengths(CachePolicy):
    """The settings of PyramidInfer, and the lengths that follow from them.

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

    def most_during(self, prompt_length: int, new_tokens: int, steps: int, layers: int) -> Progress:
        """The largest numbers within ``steps`` steps after ``new_tokens`` others, the token of each step included."""
        return _most_during(self, prompt_length, new_tokens, steps, layers)

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


@lru_cache(maxsize=4096)
def _layer_lengths(rule: PyramidLengths, prompt_length: int, layers: int) -> tuple[int, ...]:
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


def _lengths_with(rule: PyramidLengths, decay: float, prompt_length: int, layers: int) -> tuple[int, ...]:
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


def _steps(rule: PyramidLengths, prompt_length: int, layers: int) -> Iterator[Progress]:
    """Where the layers stand after the prompt, after one step, and so on without an end."""
    lengths = list(rule.layer_lengths(prompt_length, layers))
    settled, recent = list(lengths), rule.recent(prompt_length)
    limit = rule.limit(prompt_length)
    for seen in itertools.count(prompt_length + 1):
        yield Progress(tuple(lengths), tuple(n - s for n, s in zip(lengths, settled, strict=True)), recent)
        recent = rule.recent(lengths[0] + 1)
        for i in range(layers):
            lengths[i] += 1
            _, number = rule.window_to_thin(lengths[i], settled[i], seen, recent, limit)
            if number:
                stay = min(rule.stay_of_window(i, layers), number)
                lengths[i] -= number - stay
                settled[i] = rule.settled_after(lengths[i], settled[i], recent, stay)


@lru_cache(maxsize=4096)
def _progress(rule: PyramidLengths, prompt_length: int, new_tokens: int, layers: int) -> Progress:
    return next(itertools.islice(_steps(rule, prompt_length, layers), new_tokens, None))


@lru_cache(maxsize=256)
def _most_during(rule: PyramidLengths, prompt_length: int, new_tokens: int, steps: int, layers: int) -> Progress:
    before = list(itertools.islice(_steps(rule, prompt_length, layers), new_tokens, new_tokens + max(1, steps)))
    lengths = (1 + max(p.lengths[layer] for p in before) for layer in range(layers))
    pending = (1 + max(p.pending[layer] for p in before) for layer in range(layers))
    return Progress(tuple(lengths), tuple(pending), max(p.recent for p in before))
