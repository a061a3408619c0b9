"""Compression of a prompt by an eviction policy: scorer, allocator and protected tokens.

Legend: R rows of one prompt length, H stored heads, T prompt tokens, C kept tokens, N candidates (unprotected tokens).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from ...conf.errors import InputError, require
from ...conf.options import NonNegativeInt
from ...conf.versions import RESCORING_VERSIONS
from ..cache.prompt import ALL_QUERIES, Prompt
from ..storage.base import slots_to_keep
from . import ranking
from .allocators.base import Allocator
from .allocators.global_budget import Global
from .allocators.uniform import Uniform
from .budget import Budget, Recent, resolve_budget
from .eviction_state import Candidates, EvictionState
from .merging import Merging
from .model_layer import ModelLayer
from .policy import CachePolicy, Kept
from .prompt_ranks import prompt_ranks, ranks_under
from .ranking import indices_of, keep_mask
from .schedules.after_prefill import AfterPrefill
from .schedules.base import Schedule
from .scorers.base import Scorer

SHARED_HOLD_VERSION = 2
"""Version of ``hold`` for heads that share a budget: before, each of them lost one token at each step."""


@dataclass(frozen=True)
class PromptEviction(CachePolicy):
    """Components of an eviction policy, and the compression of a prompt.

    Attributes:
        scorer: Ranks the tokens.
        budget: Tokens to keep, protected ones included, as the mean over layers and heads, or as a fraction of the
            prompt.
        allocator: Distributes the budget over layers and heads.
        schedule: When tokens are evicted; None: as in the scorer's paper.
        sinks: Number of first tokens that are always kept; None: the scorer's default.
        recent: Number of last tokens that are always kept, or their share of the budget in [0, 1] (float); None: the
            scorer's default.
    """

    key_prefix: ClassVar[str] = "method."
    scorer: Scorer
    budget: Budget = 1024
    allocator: Allocator = field(default=Uniform(), kw_only=True)
    schedule: Schedule = field(default=None, kw_only=True)  # type: ignore[assignment]
    sinks: NonNegativeInt = field(default=None, kw_only=True)  # type: ignore[assignment]
    recent: Recent = field(default=None, kw_only=True)  # type: ignore[assignment]
    _observes_question: bool = field(init=False, repr=False, compare=False)  # unless `recent` is given

    def __post_init__(self) -> None:
        scorer = self.scorer
        object.__setattr__(self, "_observes_question", scorer.observes_question and self.recent is None)
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
        if self.allocator.spans_layers and scorer.repositions:
            problem = (
                "moves keys when they are stored, which is before method/allocator=global chooses among them; use false"
            )
            raise InputError("method.scorer.reposition", True, problem)
        if self.allocator.heads_differ and scorer.scores_heads_alike:
            raise InputError(
                "method/allocator",
                self.allocator.id,
                f"compares heads, and method/scorer={scorer.name} scores all heads alike; use uniform or pyramid",
            )

    def _check_protected(self) -> None:
        sinks, recent, budget = self.sinks, self.recent, self.budget
        if isinstance(budget, int):
            n_recent = self.recent_of(budget) if isinstance(recent, float) else recent
            parts = [f"method.recent={recent}"] if n_recent else []
            protected = " and ".join([*parts, f"method.sinks={sinks}"] if sinks else parts)
            allowed = f"must be at least {sinks + n_recent}, the tokens kept whatever their scores ({protected})"
            require(sinks + n_recent <= budget, "method.budget", budget, allowed)
        splits_heads = self.scorer.ranks_whole_heads and self.allocator == Global()
        if not self.schedule.evicts_from_whole_heads and not splits_heads:
            raise InputError(
                "method/schedule",
                self.schedule.id,
                "is for heads that keep the whole prompt or first and last tokens; use it with "
                "method/scorer=duo_attention, method/allocator=global and method.allocator.floor=0",
            )
        if self.schedule.evicts_by == "age":
            allowed = f"must be above 0: method/schedule={self.schedule.id} keeps that many of the newest tokens"
            require(recent > 0, "method.recent", recent, allowed)
        if self.rescores and self.scorer.prefill_only:
            raise InputError(
                "method/schedule",
                self.schedule.id,
                f"scores tokens again while decoding, and method/scorer={self.scorer.name} needs the complete prompt; "
                "use after_prefill, hold or ring",
            )
        if self.scorer.merges_values and not self.follows_attention:
            raise InputError(
                "method/schedule",
                self.schedule.id,
                f"evicts no token by its attention while decoding, and method/scorer={self.scorer.name} merges such "
                "tokens; use every_step or every_n",
            )
        if self.rescores and 1 < self.scorer.observation_window < ALL_QUERIES:
            steps = self.schedule.steps_between(budget if isinstance(budget, int) else 1)
            need = max(0, self.scorer.queries_while_decoding(steps) - steps)
            allowed = f"must be at least {need}: the tokens of the queries that score again have to be there"
            require(isinstance(recent, float) or recent >= need, "method.recent", recent, allowed)

    def identity(self) -> dict[str, Any]:
        """Return scorer, budget, protection, allocator and schedule as one mapping, the format of all records."""
        scorer = self.scorer
        out = {"class": scorer.id, "budget": self.budget, **scorer.parameters()}
        recent_key = scorer.recent_recorded_as
        is_own = self.recent != scorer.protected_recent() or (scorer.observes_question and not self._observes_question)
        if recent_key or is_own:
            out[recent_key or "recent"] = self.recent
        if self.sinks != scorer.protected_sinks():
            out["protected_sinks" if "sinks" in out else "sinks"] = self.sinks
        if self.allocator != Uniform():
            out["allocator"] = self.allocator.identity()
        if self.schedule != scorer.default_schedule:
            prefill_only = scorer.tracks_attention and self.schedule == AfterPrefill()
            shared = {"version": SHARED_HOLD_VERSION} if self.keeps_ranks and self.allocator.heads_differ else {}
            out |= {"prefill_only": True} if prefill_only else {"schedule": self.schedule.identity() | shared}
        rescoring = [RESCORING_VERSIONS.get(part.id, 1) for part in scorer.chain()] if self.rescores else []
        number = max([scorer.version, *rescoring])
        return out | ({"version": number} if number > 1 else {}) | {"ties": ranking.RULE}

    @property
    def _needs(self) -> str:
        """What the scorer and the one that it builds on need."""
        return "; ".join(scorer.needs for scorer in self.scorer.chain() if scorer.needs)

    # prefill ------------------------------------------------------------------------------------------------------

    def new_state(self, layer: ModelLayer) -> EvictionState:
        if self.scorer.repositions:
            layer.rotary()  # measured, or refused, before the prefill
        merging = Merging(self.scorer, layer.place) if self.scorer.merges_values else None  # type: ignore[arg-type]
        return EvictionState(layer, self.scorer.new_state(layer), merging=merging)

    def select(self, prompt: Prompt, state: EvictionState | None = None) -> Kept:
        if self.scorer.repeats_prompt:  # compressed after the prefill of all layers
            return Kept(scores=self._ages(prompt) if self.keeps_ranks else None)
        if state is not None:
            state.add_prompts(prompt)
        budget = self.layer_budgets(prompt.length, prompt.num_layers)[prompt.layer_idx]
        if prompt.length <= budget and not self.stores_scores:
            return Kept()
        sinks, recent = self.protected_of(budget, prompt.question_tokens)
        prompt, scorer_state = (
            replace(prompt, protected=recent, kept=budget),
            None if state is None else state.scorer_state,
        )
        if prompt.length <= budget and not self.keeps_ranks:
            return Kept(scores=self.scorer.score(prompt, scorer_state))

        # The first `sinks` and the last `recent` tokens are kept whatever their scores.
        end = prompt.length - recent
        rows, kv_heads = prompt.keys.shape[:2]
        heads = prompt.query.shape[1] if self.scorer.stores_query_heads else kv_heads
        if budget == sinks + recent and not self.allocator.spans_layers:  # no other token can be kept
            position = torch.arange(prompt.length, device=prompt.keys.device)  # [T]
            slots = torch.cat([position[:sinks], position[end:]]).expand(rows, heads, -1)  # [R, H, C]
            if not self.stores_scores:
                return Kept(slots)
            return _kept(
                slots, None, self._ages(prompt) if self.keeps_ranks else self.scorer.score(prompt, scorer_state)
            )

        # Score the tokens in between.
        scores, ties = self.scorer.score(prompt, scorer_state), self.scorer.tie_scores(prompt, scorer_state)
        candidates = scores[..., sinks:end]  # [R, H, T] -> [R, H, N]
        tie_candidates = None if ties is None else ties[..., sinks:end]
        free = budget - sinks - recent  # candidates to keep, as the mean over heads

        # Keep the highest-ranked candidates.
        if self.allocator.spans_layers:  # after the last layer, in across_layers.py
            assert state is not None
            state.candidates.append(Candidates(prompt.rows, candidates, tie_candidates, free, sinks, recent))
            stored = self._ages(prompt) if self.keeps_ranks else scores
            return Kept(scores=stored if self.stores_scores else None)
        ragged = self.allocator.heads_differ
        count: torch.Tensor | int = free
        if ragged:
            count = self.allocator.head_budgets(candidates, free, tie_candidates, sinks + recent)  # [R, H]
        candidates, tie_candidates = self.scorer.ranking_scores(candidates, tie_candidates, count)
        keep = F.pad(keep_mask(candidates, count, tie_candidates), (sinks, recent), value=True)  # [R, H or 1, T]
        if self.keeps_ranks:
            kept = keep[..., sinks:end]
            (scores,) = ranks_under(self.allocator, [candidates], [tie_candidates], [kept], free, sinks, recent)
        if ragged:
            slots, valid = slots_to_keep(keep)  # [R, H, C]
        else:
            slots, valid = indices_of(keep, budget).expand(rows, heads, -1), None  # [R, H, C]
        return _kept(slots, valid, scores) if self.stores_scores else Kept(slots, valid)

    def _ages(self, prompt: Prompt) -> torch.Tensor:
        """Return ranks [R, H, T] of a prompt that evict the oldest token first."""
        rows, kv_heads = prompt.keys.shape[:2]
        heads = prompt.query.shape[1] if self.scorer.stores_query_heads else kv_heads
        none = prompt.keys.new_zeros(rows, 1 if self.scorer.scores_heads_alike else heads, 0)
        return prompt_ranks(none, None, 0, prompt.length)

    def stored_keys(self, keys: torch.Tensor, slots: torch.Tensor, length: int, state: EvictionState) -> torch.Tensor:
        if not self.scorer.repositions:
            return keys
        last = torch.arange(length - slots.shape[-1], length, device=slots.device)  # [C], the last positions
        return state.layer.rotary().rotate(keys, last - slots)

    @property
    def keeps_ranks(self) -> bool:
        """Whether each decode step evicts by the ranking of the prompt, which is then stored."""
        return self.schedule.evicts_by == "rank"

    @property
    def stores_scores(self) -> bool:
        """Whether the cache holds a running score or a rank of each token while decoding."""
        return self.keeps_ranks or (self.scorer.accumulates and self.follows_attention)

    @property
    def follows_attention(self) -> bool:
        """Whether each decode step updates the scores by its attention weights."""
        return self.scorer.tracks_attention and self._scores_while_decoding

    @property
    def rescores(self) -> bool:
        """Whether stored tokens are scored again while decoding, as if they were a prompt."""
        return self._scores_while_decoding and not self.scorer.tracks_attention

    @property
    def _scores_while_decoding(self) -> bool:
        schedule = self.schedule
        return schedule.interval is not None and schedule.evicts_by == "score"

    def recent_of(self, budget: int, question_tokens: int | None = None) -> int:
        """Return the number of last tokens that are always kept within a layer's budget."""
        recent = self.recent
        if question_tokens is not None and self._observes_question:
            recent = question_tokens
        recent = int(recent * budget) if isinstance(recent, float) else recent
        return min(recent, budget)

    def protected_of(self, budget: int, question_tokens: int | None = None) -> tuple[int, int]:
        """Return the numbers of first and of last tokens that are always kept within a layer's budget."""
        recent = self.recent_of(budget, question_tokens)
        return min(self.sinks, budget - recent), recent

    def layer_budgets(self, prompt_length: int, layers: int) -> Sequence[int]:
        """Return the prompt tokens that each layer keeps per head on average, protected ones included."""
        budget = resolve_budget(self.budget, prompt_length)
        return [prompt_length] * layers if prompt_length <= budget else self.limits(prompt_length, layers)

    def share_of_whole_heads(self, prompt_length: int, layers: int, heads: int) -> Fraction:
        """Return the share of heads that keep the whole prompt, for a scorer that ``ranks_whole_heads``.

        It assumes that no two heads have exactly equal scores, which would share what is left of the budget.
        """
        budget = resolve_budget(self.budget, prompt_length)
        if prompt_length <= budget:
            return Fraction(1)
        sinks, recent = self.protected_of(budget)
        whole = layers * heads * (budget - sinks - recent) // (prompt_length - sinks - recent)
        return Fraction(whole, layers * heads)

    def limits(self, prompt_length: int, layers: int) -> Sequence[int]:
        """Return the tokens that each layer may store per head after an eviction while decoding, on average."""
        budget = resolve_budget(self.budget, prompt_length)
        return self.allocator.layer_budgets(budget, self.recent_of(budget), prompt_length, layers)


def _kept(slots: torch.Tensor, valid: torch.Tensor | None, scores: torch.Tensor) -> Kept:
    """Return the kept tokens with their scores, of those [R, H or 1, T] of the prompt."""
    return Kept(slots, valid, scores.gather(-1, slots[:, : scores.shape[1]]))
