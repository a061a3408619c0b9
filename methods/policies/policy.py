"""The contract of a cache policy: which tokens a layer keeps of the prompt, and which leave while decoding.

Most methods are an :class:`.eviction.EvictionPolicy`, a product of a scorer, an allocator and a schedule. What cannot
be such a product subclasses :class:`CachePolicy`: ``select`` says what stays of a prompt, ``attend`` what a step sees
and what leaves after it.

Legend: R rows of one prompt length, B rows of a batch, H stored heads, n new tokens, C kept tokens, S slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch

from ...conf.identity import HasIdentity
from ..cache.kv_shape import KVShape
from ..cache.logits import LogitRule
from ..cache.prompt import Prompt
from ..sharing.plan import KVAccess
from ..storage.base import LayerStorage
from . import ranking
from .scorers.base import ModelLayer


@dataclass(frozen=True)
class PolicyCapabilities:
    """What the cache, the engine and other parts need to know of a policy.

    Attributes:
        keeps_everything: Every layer and head holds all tokens.
        observation_window: Last queries of a prompt that :meth:`CachePolicy.select` looks at.
        evicts_while_decoding: Tokens leave after a step, so several tokens fed at once are fed one after another.
        prefills_by_steps: The prompt goes through the cache token by token (in effect) instead of as a whole.
        attends_whole_prompt: Every layer attends over the complete prompt, so that the first token is the full cache's
            and other methods can share the prefill.
        narrows_prompt: Fewer tokens of the prompt go on from layer to layer, by :meth:`CachePolicy.next_layer_tokens`.
        drops_stored: Tokens leave after they were stored, which a storage that rounds cannot do.
        ranks_tokens: Scores decide which tokens stay, so the rule for equal ones is part of the method's identity.
        keeps_positions: A step attends over the held tokens at their true positions.
        heads_differ: The heads of a layer keep different numbers of tokens; ``kept_tokens`` gives their mean.
        spans_layers: What one layer does depends on another one, so every layer must own keys and values.
        stores_query_heads: Keys and values are stored once per query head instead of once per KV head.
        held_queries: Last queries of decode steps that are held, for a layer's own query heads.
        prefill_block: Columns that a forward may bring at once where several layers of the model share a cache layer.
        static_steps: A decode step can run over fixed shapes (where the storage can, too).
    """

    keeps_everything: bool = False
    observation_window: int = 0
    evicts_while_decoding: bool = False
    prefills_by_steps: bool = False
    attends_whole_prompt: bool = True
    narrows_prompt: bool = False
    drops_stored: bool = False
    ranks_tokens: bool = False
    keeps_positions: bool = True
    heads_differ: bool = False
    spans_layers: bool = False
    stores_query_heads: bool = False
    held_queries: int = 0
    prefill_block: int = 1
    static_steps: bool = False


@dataclass(frozen=True)
class Step:
    """New tokens at one layer, after the prompt.

    Attributes:
        query: [B, H_q, n, D], after RoPE.
        key, value: [B, H, n, D], with H the stored heads; keys after RoPE.
        rule: How logits are formed.
        valid: [B, n] bool, False for pads among the new tokens; None: all real.
        use: What this layer of the model does here. Where several share the keys and values, each of them comes in
            turn with its own query; one of them writes, and tokens leave after the last.
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
        scores: float32 [R, H, C], the running score of each kept token; None: there is none.
    """

    slots: torch.Tensor | None = None
    valid: torch.Tensor | None = None
    scores: torch.Tensor | None = None


class CachePolicy(HasIdentity):
    """What stays in a cache. The defaults keep everything."""

    key_prefix: ClassVar[str] = "method.policy."
    other_keys: ClassVar[Mapping[str, str]] = {"budget": "method.budget"}

    @cached_property
    def capabilities(self) -> PolicyCapabilities:
        """See there."""
        return PolicyCapabilities(static_steps=True)

    def identity(self) -> dict[str, Any]:
        """As of any part; where tokens are ranked, the rule of ties decides with it which ones stay."""
        return super().identity() | ({"ties": ranking.RULE} if self.capabilities.ranks_tokens else {})

    def new_state(self, layer: ModelLayer) -> Any:
        """State of one layer for one batch, handed to the methods below; made fresh each time."""
        return None

    def new_states(self, layers: Sequence[ModelLayer]) -> list[Any]:
        """States of all layers of one cache that the method works on; a policy that spans layers links them here."""
        return [self.new_state(layer) for layer in layers]

    def select(self, prompt: Prompt, state: Any = None) -> Kept:
        """What to keep of a prompt."""
        return Kept()

    def after_prompt(
        self,
        state: Any,
        storage: LayerStorage,
        lengths: torch.Tensor,
        scores: torch.Tensor | None,
        queries: torch.Tensor | None = None,
    ) -> None:
        """Called once the prompt has been compressed.

        Args:
            state: What :meth:`new_state` made for this layer.
            storage: The layer's storage, with the kept tokens.
            lengths: [B] int64, real prompt tokens of each row.
            scores: [B, H, S] float32, those that :meth:`select` gave, slot for slot as stored (0 in padding), or None.
            queries: [B, H_q, w, D], the prompt's last queries, zero where a row has fewer tokens; with
                ``held_queries``.
        """

    def next_layer_tokens(self, state: Any) -> list[torch.Tensor | None]:
        """Tokens of the prompt that go on to the next layer; with ``narrows_prompt``.

        Called once for each layer but the last, after :meth:`after_prompt` and before the next layer begins.

        Args:
            state: What :meth:`new_state` made for this layer.

        Returns:
            For each group of rows, as they came to :meth:`select`: int64 [R, K], tokens by their place among those of
            this layer, increasing; None: all of them.
        """
        raise NotImplementedError

    def attend(self, state: Any, storage: LayerStorage, step: Step) -> torch.Tensor:
        """Append the step's tokens, attend over everything held, drop what has to leave.

        Args:
            state: What :meth:`new_state` made for this layer.
            storage: The layer's storage.
            step: The new tokens.

        Returns:
            [B, H_q, n, D].
        """
        step.append_to(storage, before_attention=True)
        out = storage.attend(step.query, step.rule, step.valid)
        step.append_to(storage, before_attention=False)
        return out

    def make_static(self, state: Any, storage: LayerStorage, steps: int) -> None:
        """Give every tensor of a layer its final shape; see :meth:`.storage.base.LayerStorage.make_static`."""
        storage.make_static(steps)

    def static_state(self, state: Any) -> list[torch.Tensor]:
        """Tensors of ``state`` that a static step changes; see :meth:`.storage.base.LayerStorage.static_state`."""
        return []

    def between_steps(self, state: Any, storage: LayerStorage) -> None:
        """Work after each static step, outside of what is captured; in place."""
        return

    def kept_tokens(self, prompt_length: int, new_tokens: int, layers: int) -> Sequence[int]:
        """Tokens held by each head of each layer after a prompt and ``new_tokens`` decode steps (for the formula)."""
        return [prompt_length + new_tokens] * layers

    def state_tensors(self, state: Any) -> list[torch.Tensor]:
        """Tensors of ``state`` that must stay in memory; they count as stored bytes."""
        return []

    def logical_state_bytes(self, state: Any, tokens: torch.Tensor) -> int:
        """Bytes of ``state`` but for room that no token takes; ``tokens`` [B, 1 or H] are held."""
        return sum(t.nbytes for t in self.state_tensors(state))

    def state_bytes(self, shape: KVShape, heads: int, prompt_length: int, new_tokens: int) -> int:
        """Their bytes by the formula, for one sequence; ``heads`` are stored in each layer."""
        return 0


@dataclass(frozen=True)
class KeepEverything(CachePolicy):
    """Every token stays: the plain cache, and methods that save bits, layers or heads alone."""

    id: ClassVar[str] = "Selection"

    @cached_property
    def capabilities(self) -> PolicyCapabilities:
        return PolicyCapabilities(keeps_everything=True, static_steps=True)
