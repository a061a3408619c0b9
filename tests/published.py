"""SnapKV, PyramidKV and Ada-KV as policies, and the rounding of the published code as an oracle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvbench.methods.policies.allocators.adaptive import Adaptive
from kvbench.methods.policies.allocators.base import Allocator
from kvbench.methods.policies.allocators.pyramid import Pyramid
from kvbench.methods.policies.allocators.uniform import Uniform
from kvbench.methods.policies.budget import Budget
from kvbench.methods.policies.eviction import EvictionPolicy
from kvbench.methods.policies.ranking import keep_mask
from kvbench.methods.policies.scorers.snapkv import SnapKV

UNIFORM = Uniform()


def snapkv(budget: Budget = 1024, allocator: Allocator = UNIFORM, **scorer: Any) -> EvictionPolicy:
    """``method=snapkv``; other options are the scorer's."""
    return EvictionPolicy(SnapKV(**scorer), budget, allocator=allocator)


def pyramidkv(beta: int = 20, allocator: type[Pyramid] = Pyramid, **options: Any) -> EvictionPolicy:
    """``method=pyramidkv``."""
    return snapkv(**{"window": 8} | options, allocator=allocator(beta))


def ada_kv(
    floor: float = 0.2,
    layers: str = "uniform",
    beta: int = 20,
    rule: str = "floor",
    allocator: type[Adaptive] = Adaptive,
    **options: Any,
) -> EvictionPolicy:
    """``method=ada_kv``, but for its storage."""
    return snapkv(**options, allocator=allocator(floor, layers, beta, rule))


@dataclass(frozen=True)
class RoundedDownPyramid(Pyramid):
    """Each layer's budget is rounded down, as in PyramidKV's published code: the total is up to 12 % off."""

    def layer_budgets(self, budget: int, protected: int, prompt_length: int, layers: int) -> Sequence[int]:
        base = budget - protected
        if prompt_length < 2 * base:
            return [budget] * layers
        last = base // self.beta
        first = 2 * base - last
        if first >= prompt_length - protected:
            first = prompt_length - protected
            last = 2 * base - first
        step = (first - last) // (layers - 1)
        return [protected + first - layer * step for layer in range(layers)]


@dataclass(frozen=True)
class RoundedByHeadAdaptive(Adaptive):
    """Each head's budget is rounded by itself, as in Ada-KV's published code: the total is some tokens off."""

    def head_budgets(
        self, scores: torch.Tensor, budget: int, ties: torch.Tensor | None = None, protected: int = 0
    ) -> torch.Tensor:
        _, heads, count = scores.shape
        best = keep_mask(scores.flatten(1), heads * budget, None if ties is None else ties.flatten(1))
        won = best.unflatten(1, (heads, count)).sum(-1).double()
        return ((1 - self.floor) * won + int(self.floor * budget)).round().long().clamp(max=count)
