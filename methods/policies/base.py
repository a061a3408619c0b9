"""The contract of a selection: which tokens a layer keeps.

A new token method is a subclass of :class:`TopKSelection` with one ``score`` function. One whose tokens leave while
decoding too is a subclass of :class:`.evicting.EvictingSelection`, or of :class:`Selection` with ``select`` (what
stays of a prompt) and ``attend`` (what a step sees, and what leaves after it).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from ...conf.errors import is_whole, require
from ...conf.identity import HasIdentity
from ..cache.logits import LogitRule
from ..cache.prefill import Prompt
from ..cache.rotary import Rotary
from ..sharing.plan import KVAccess
from ..storage.base import LayerStorage, slots_that_stay
from . import ranking
from .allocators.base import Allocator
from .allocators.uniform import Uniform
from .ranking import keep_mask, keep_slots

if TYPE_CHECKING:
    from ..cache.cache import KVCache

Budget = int | float
"""Tokens kept per layer, the protected window included (int), or a fraction of the prompt (float in (0, 1])."""


def check_budget(budget: Any, key: str = "method.budget") -> None:
    """Raise InputError unless ``budget`` is an int >= 1 or a float in (0, 1]."""
    allowed = "must be a whole number of tokens >= 1, or a fraction of the prompt in (0, 1]"
    if is_whole(budget):
        require(budget >= 1, key, budget, allowed)
    else:
        require(isinstance(budget, float) and 0.0 < budget <= 1.0, key, budget, allowed)


def resolve_budget(budget: Budget, prompt_length: int) -> int:
    """Tokens to keep of a prompt of ``prompt_length`` tokens; a fraction is rounded to the nearest, never to 0."""
    if isinstance(budget, int):
        return budget
    return max(1, int(budget * prompt_length + 0.5))


@dataclass(frozen=True)
class ModelLayer:
    """The layer of the model that a selection works on.

    Attributes:
        index: which of the model's layers.
        rotary: the rotation of its keys by positions, for methods that re-position tokens; raises InputError where
            there is none. Measured on the model when it is first asked for.
    """

    index: int
    rotary: Callable[[], Rotary]


@dataclass(frozen=True)
class Step:
    """New tokens at one layer, after the prompt.

    Attributes:
        query: [B, H_q, n, D], after RoPE.
        key, value: [B, H, n, D], with H the stored heads; keys after RoPE.
        rule: how logits are formed.
        valid: [B, n] bool, False for pads among the new tokens; None: all real.
        use: what this layer of the model does here. Where several share the keys and values, each of them comes in
            turn with its own query; one of them writes, and what leaves, leaves after the last.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    rule: LogitRule
    valid: torch.Tensor | None
    use: KVAccess = field(default_factory=KVAccess)

    def append_to(self, storage: LayerStorage, *, before_attention: bool) -> None:
        """Write the new tokens, if this is the use and the moment; one that is hidden from itself comes after."""
        if self.use.is_owner and before_attention != self.use.strictly_causal:
            storage.append(self.key, self.value, self.valid)

    def part(self, columns: slice) -> Step:
        """Some of the new tokens."""
        q, k, v = (x[:, :, columns] for x in (self.query, self.key, self.value))
        return Step(q, k, v, self.rule, None if self.valid is None else self.valid[:, columns], self.use)

    def tokens(self) -> list[Step]:
        """The new tokens one by one."""
        return [self.part(slice(i, i + 1)) for i in range(self.query.shape[2])]


@dataclass(frozen=True)
class Kept:
    """What stays of a prompt at one layer.

    Attributes:
        slots: int64 [R, H, C], prompt tokens by position, increasing per head where valid; None: all of them.
        valid: bool [R, H, C], False where a head keeps fewer than C (on the left); None: all real.
        scores: float32 [R, H, C], what the method goes on counting for each kept token; None: nothing.
    """

    slots: torch.Tensor | None = None
    valid: torch.Tensor | None = None
    scores: torch.Tensor | None = None


ALL_QUERIES = sys.maxsize
"""As an observation window: a method that scores with every query of the prompt."""


@dataclass(frozen=True)
class Selection(HasIdentity):
    """Keep everything: the base of every selection and the one of ``method=full``."""

    id: ClassVar[str] = "Selection"

    def identity(self) -> dict[str, Any]:
        """As of any part; where tokens are ranked, the rule of ties decides with it which ones stay."""
        return super().identity() | ({"ties": ranking.RULE} if self.ranks_tokens else {})

    @property
    def reads_prompt_by_steps(self) -> bool:
        """The prompt goes through the cache token by token (in effect) instead of being read whole."""
        return False

    @property
    def reads_whole_prompt(self) -> bool:
        """Every layer attends over the complete prompt, so that the first token is the full cache's.

        If not, no other method can ride on the same reading.
        """
        return not self.reads_prompt_by_steps

    @property
    def keeps_everything(self) -> bool:
        """Every layer and head holds all tokens."""
        return type(self) is Selection

    @property
    def observation_window(self) -> int:
        """How many of the prompt's last queries :meth:`select` looks at."""
        return 0

    @property
    def evicts_while_decoding(self) -> bool:
        """Tokens leave after a step, so that several tokens at once are not one after another by themselves."""
        return False

    @property
    def ranks_tokens(self) -> bool:
        """Scores decide which tokens stay, so that the rule for equal ones (``ranking.py``) is a part of the method."""
        return False

    @property
    def keeps_positions(self) -> bool:
        """A step attends over the held tokens at their true positions: plain attention, which a test can recompute."""
        return True

    @property
    def heads_differ(self) -> bool:
        """The heads of a layer keep different numbers of tokens (their mean is what :meth:`kept_tokens` gives)."""
        return False

    @property
    def spans_layers(self) -> bool:
        """What one layer does depends on another one, so that every layer must have keys and values of its own."""
        return False

    @property
    def stores_query_heads(self) -> bool:
        """Keys and values are stored once per query head instead of once per KV head."""
        return False

    def new_state(self, layer: ModelLayer) -> Any:
        """State of one layer for one batch, handed to the methods below; made fresh each time."""
        return None

    def attach(self, model: PreTrainedModel, cache: KVCache) -> None:
        """Called with every new cache; a selection that reaches beyond its layer's cache sees the model here."""

    def select(self, prompt: Prompt, state: Any = None) -> Kept:
        """What to keep of a prompt."""
        return Kept()

    def after_prompt(self, state: Any, lengths: torch.Tensor, scores: torch.Tensor | None) -> None:
        """Called once the prompt has been compressed.

        Args:
            state: what :meth:`new_state` made for this layer.
            lengths: [B] int64, real prompt tokens of each row.
            scores: [B, H, S] float32, those that :meth:`select` gave, slot for slot as stored (0 in padding), or None.
        """

    def attend(self, state: Any, storage: LayerStorage, step: Step) -> torch.Tensor:
        """Append the step's tokens, attend over everything held, drop what has to leave.

        Args:
            state: what :meth:`new_state` made for this layer.
            storage: the layer's storage.
            step: the new tokens.

        Returns:
            [B, H_q, n, D].
        """
        step.append_to(storage, before_attention=True)
        out = storage.attend(step.query, step.rule, step.valid)
        step.append_to(storage, before_attention=False)
        return out

    def kept_tokens(self, prompt_length: int, new_tokens: int, layers: int) -> Sequence[int]:
        """Tokens held by each head of each layer after a prompt and ``new_tokens`` decode steps (for the formula)."""
        return [prompt_length + new_tokens] * layers

    def state_tensors(self, state: Any) -> list[torch.Tensor]:
        """Tensors of ``state`` that must stay in memory; they count as stored bytes."""
        return []

    def logical_state_bytes(self, state: Any, tokens: torch.Tensor) -> int:
        """Bytes of ``state`` but for room that no token takes; ``tokens`` [B, 1 or H] are held."""
        return sum(t.nbytes for t in self.state_tensors(state))

    def state_bytes(self, prompt_length: int, new_tokens: int, layers: int, heads: int) -> int:
        """Their bytes by the formula, for one sequence; ``heads`` are stored in each layer."""
        return 0


@dataclass(frozen=True)
class TopKSelection(Selection):
    """Keep the best-scored prompt tokens and a protected window of the last ones; nothing leaves while decoding.

    Attributes:
        budget: mean over heads and layers of the tokens kept, the window included, or a fraction of the prompt.
        window: last tokens that are always kept.
        allocator: how the budget is shared out among layers and heads.
    """

    omitted_at: ClassVar[Mapping[str, Any]] = {"allocator": Uniform()}
    budget: Budget
    window: int
    allocator: Allocator = field(default=Uniform(), kw_only=True)

    least_window: ClassVar[int] = 1
    """Smallest ``window`` that makes sense; a method that scores every token by itself may protect none."""

    def __post_init__(self) -> None:
        check_budget(self.budget)
        least = self.least_window
        allowed = f"must be a whole number >= {least}"
        require(isinstance(self.window, int) and self.window >= least, "method.selection.window", self.window, allowed)
        if isinstance(self.budget, int):
            require(
                self.window <= self.budget,
                "method.selection.window",
                self.window,
                f"must be at most method.budget={self.budget}, which includes the window",
            )

    @property
    def ranks_tokens(self) -> bool:
        return True

    @property
    def heads_differ(self) -> bool:
        return self.allocator.heads_differ

    def score(self, prompt: Prompt, state: Any) -> torch.Tensor:
        """Score of every prompt token before the window: [R, H, T - window]; the largest stay."""
        raise NotImplementedError

    def tie_scores(self, prompt: Prompt, state: Any) -> torch.Tensor | None:
        """Of the same shape: which of equally scored tokens stays, the largest first; None: the lower index."""
        return None

    def layer_budgets(self, prompt_length: int, layers: int) -> Sequence[int]:
        """Tokens that each layer keeps per head (their mean) of a prompt of ``prompt_length``, window included."""
        budget = resolve_budget(self.budget, prompt_length)
        if prompt_length <= budget:
            return [prompt_length] * layers
        return self.allocator.layer_budgets(budget, min(self.window, budget), prompt_length, layers)

    def select(self, prompt: Prompt, state: Any = None) -> Kept:
        budget = self.layer_budgets(prompt.length, prompt.num_layers)[prompt.layer_idx]
        if prompt.length <= budget:
            return Kept()
        # A fraction of a short prompt may be less than the window: then the budget's last tokens are what stays.
        window = min(self.window, budget)
        recent = torch.arange(prompt.length - window, prompt.length, device=prompt.keys.device)
        if budget == window:
            heads = prompt.query.shape[1] if self.stores_query_heads else prompt.keys.shape[1]
            return Kept(recent.expand(prompt.keys.shape[0], heads, -1))
        scores, ties = self._candidates(prompt, state, prompt.length - window)  # [R, H, N]
        if self.allocator.heads_differ:
            budgets = self.allocator.head_budgets(scores, budget - window, ties)  # [R, H]
            stay = F.pad(keep_mask(scores, budgets, ties), (0, window), value=True)  # [R, H, T]
            return Kept(*slots_that_stay(stay))
        best = keep_slots(scores, budget - window, ties)  # [R, H, C - w]
        return Kept(torch.cat([best, recent.expand(*best.shape[:2], -1)], dim=-1))

    def _candidates(self, prompt: Prompt, state: Any, count: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scores [R, H, count] of the first ``count`` tokens, and what decides between equal ones."""
        ties = self.tie_scores(prompt, state)
        return self.score(prompt, state)[..., :count], None if ties is None else ties[..., :count]

    def kept_tokens(self, prompt_length: int, new_tokens: int, layers: int) -> Sequence[int]:
        return [kept + new_tokens for kept in self.layer_budgets(prompt_length, layers)]
