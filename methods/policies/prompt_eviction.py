"""The prompt's side of token eviction: which tokens stay of it, by scorer, allocator and protection.

Legend: R rows of one prompt length, H stored heads, N candidates, T tokens, C kept tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from ...conf.errors import InputError, require
from ...conf.options import NonNegativeInt
from ..cache.prompt import ALL_QUERIES, Prompt
from ..storage.base import slots_that_stay
from . import ranking
from .allocators.base import Allocator
from .allocators.uniform import Uniform
from .budget import Budget, Recent, resolve_budget
from .eviction_state import Candidates, EvictionState
from .policy import CachePolicy, Kept
from .ranking import keep_mask, keep_slots
from .schedules.after_prefill import AfterPrefill
from .schedules.base import Schedule
from .scorers.base import ModelLayer, Scorer


@dataclass(frozen=True)
class PromptEviction(CachePolicy):
    """The parts of an eviction policy, and what they keep of a prompt.

    Attributes:
        scorer: What a token is worth.
        budget: Mean over layers and heads of the tokens kept, the protected ones included, or a fraction of the prompt.
        allocator: How the budget is shared out among layers and heads.
        schedule: When tokens leave; None: as the scorer's paper does.
        sinks: First tokens that always stay; None: the scorer's default.
        recent: Last tokens that always stay: a number, or a share of the budget in [0, 1] (float); None: the scorer's
            default.
    """

    key_prefix: ClassVar[str] = "method."
    scorer: Scorer
    budget: Budget = 1024
    allocator: Allocator = field(default=Uniform(), kw_only=True)
    schedule: Schedule = field(default=None, kw_only=True)  # type: ignore[assignment]
    sinks: NonNegativeInt = field(default=None, kw_only=True)  # type: ignore[assignment]
    recent: Recent = field(default=None, kw_only=True)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        scorer = self.scorer
        defaults = {
            "schedule": scorer.default_schedule,
            "sinks": scorer.protected_sinks(),
            "recent": scorer.protected_recent(),
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        super().__post_init__()
        self._check_protected()
        if self.allocator.heads_differ and scorer.scores_heads_alike:
            raise InputError(
                "method/allocator",
                self.allocator.id,
                f"compares heads, and method/scorer={scorer.name} scores all heads alike; use uniform or pyramid",
            )

    def _check_protected(self) -> None:
        sinks, recent, budget = self.sinks, self.recent, self.budget
        if isinstance(budget, int):
            last = self.recent_of(budget) if isinstance(recent, float) else recent
            key, value, beside = ("method.recent", recent, sinks) if last else ("method.sinks", sinks, 0)
            allowed = f"must be at most method.budget={budget}, which includes the protected tokens"
            require(sinks + last <= budget, key, value, allowed + (f", with method.sinks={beside}" if beside else ""))
        window, interval = self.scorer.observation_window, self.schedule.interval
        if interval is not None and not self.scorer.tracks_attention and 1 < window < ALL_QUERIES:
            need = max(0, window - interval)
            allowed = f"must be at least {need}: the tokens of the queries that score again have to be there"
            require(isinstance(recent, float) or recent >= need, "method.recent", recent, allowed)

    def identity(self) -> dict[str, Any]:
        """Scorer, budget, protection, allocator and schedule in one mapping, as records have always had it."""
        scorer = self.scorer
        out = {"class": scorer.id, "budget": self.budget, **scorer.parameters()}
        recent_key = scorer.recent_recorded_as
        if recent_key or self.recent != scorer.protected_recent():
            out[recent_key or "recent"] = self.recent
        if self.sinks != scorer.protected_sinks():
            out["protected_sinks" if "sinks" in out else "sinks"] = self.sinks
        if self.allocator != Uniform():
            out["allocator"] = self.allocator.identity()
        if self.schedule != scorer.default_schedule:
            only = scorer.tracks_attention and self.schedule == AfterPrefill()
            out |= {"prefill_only": True} if only else {"schedule": self.schedule.identity()}
        version = {"version": scorer.version} if scorer.version > 1 else {}
        return out | version | {"ties": ranking.RULE}

    # the prompt ---------------------------------------------------------------------------------------------------

    def new_state(self, layer: ModelLayer) -> EvictionState:
        return EvictionState(layer, self.scorer.new_state(layer))

    def recent_of(self, budget: int) -> int:
        """Last tokens that stay, of ``budget`` kept ones."""
        recent = int(self.recent * budget) if isinstance(self.recent, float) else self.recent
        return min(recent, budget)

    def layer_budgets(self, prompt_length: int, layers: int) -> Sequence[int]:
        """Tokens that each layer keeps per head (their mean) of a prompt of ``prompt_length``, protected included."""
        budget = resolve_budget(self.budget, prompt_length)
        return [prompt_length] * layers if prompt_length <= budget else self.limits(prompt_length, layers)

    def limits(self, prompt_length: int, layers: int) -> Sequence[int]:
        """Tokens that each layer may hold per head (their mean) after an eviction, however short the prompt was."""
        budget = resolve_budget(self.budget, prompt_length)
        return self.allocator.layer_budgets(budget, self.recent_of(budget), prompt_length, layers)

    def select(self, prompt: Prompt, state: EvictionState | None = None) -> Kept:
        budget = self.layer_budgets(prompt.length, prompt.num_layers)[prompt.layer_idx]
        keeps_scores = self.scorer.accumulates and self.schedule.interval is not None
        if prompt.length <= budget and not keeps_scores:
            return Kept()
        recent = self.recent_of(budget)
        prompt, of_layer = replace(prompt, protected=recent), None if state is None else state.of_scorer
        rows, kv_heads = prompt.keys.shape[:2]
        heads = prompt.query.shape[1] if self.scorer.stores_query_heads else kv_heads
        if prompt.length <= budget:
            return Kept(scores=self.scorer.score(prompt, of_layer))
        sinks, end = min(self.sinks, budget - recent), prompt.length - recent
        position = torch.arange(prompt.length, device=prompt.keys.device)
        if budget == sinks + recent and not self.allocator.spans_layers:  # nothing is left to rank
            slots = torch.cat([position[:sinks], position[end:]]).expand(rows, heads, -1)
            scores = self.scorer.score(prompt, of_layer) if keeps_scores else None
            return Kept(slots, scores=None if scores is None else scores.gather(-1, slots))
        scores, ties = self.scorer.score(prompt, of_layer), self.scorer.tie_scores(prompt, of_layer)  # [R, H, T]
        candidates = scores[..., sinks:end]  # [R, H, N]
        tie_candidates = None if ties is None else ties[..., sinks:end]
        free = budget - sinks - recent
        if self.allocator.spans_layers:
            assert state is not None
            state.waiting.append(Candidates(candidates, tie_candidates, free, sinks, recent))
            return Kept(scores=scores if keeps_scores else None)
        if self.allocator.heads_differ:
            budgets = self.allocator.head_budgets(candidates, free, tie_candidates)  # [R, H]
            stay = F.pad(keep_mask(candidates, budgets, tie_candidates), (sinks, recent), value=True)  # [R, H, T]
            slots, valid = slots_that_stay(stay)
        else:
            best, valid = keep_slots(candidates, free, tie_candidates) + sinks, None  # [R, H, C - sinks - recent]
            ends = (position[:sinks], position[end:])
            slots = torch.cat([ends[0].expand(*best.shape[:2], -1), best, ends[1].expand(*best.shape[:2], -1)], dim=-1)
            slots = slots.expand(rows, heads, -1)
        return Kept(slots, valid, scores.gather(-1, slots) if keeps_scores else None)
