"""Interface of cache policies, which decide the tokens that a layer keeps of the prompt and while decoding.

Most methods are an :class:`.eviction.EvictionPolicy` (scorer x allocator x schedule). Other methods subclass
:class:`CachePolicy`: ``select`` returns the prompt tokens to keep; in a decode step ``attend`` attends over the stored
tokens and ``after_attention`` evicts.

Legend: R rows of one prompt length, B batch rows, H_q query heads, H stored heads, n new tokens, C kept tokens,
S slots, w queries, D channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ...conf.identity import HasIdentity
from ..cache.kv_shape import KVShape
from ..cache.logits import LogitRule
from ..cache.prompt import Prompt
from ..storage.base import LayerStorage
from . import ranking
from .model_layer import ModelLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..sharing.plan import Plan


@dataclass(frozen=True)
class PolicyCapabilities:
    """Properties of a policy that the cache and the engine depend on.

    Attributes:
        keeps_everything: Every layer and head stores all tokens.
        observation_window: Number of last prompt queries that :meth:`CachePolicy.select` needs.
        observes_question: :meth:`CachePolicy.select` needs the queries of the prompt's question instead, if its length
            is known.
        evicts_while_decoding: Tokens may be evicted after a step.
        prefills_by_steps: The prompt is processed with the result of token-by-token steps, not as a whole.
        attends_whole_prompt: Every layer attends over the complete prompt, so the first generated token is the full
            cache's and other methods can share the prefill.
        narrows_prompt: Each layer forwards only some prompt tokens to the next (:meth:`CachePolicy.next_layer_tokens`).
        drops_stored: Tokens are evicted after they have been stored, which lossy storages do not support.
        ranks_tokens: Tokens are kept by score, so the tie-breaking rule is part of the method's identity.
        keeps_positions: A step attends over the stored tokens at their true positions.
        heads_differ: The heads of a layer keep different numbers of tokens; ``kept_tokens`` returns their mean.
        heads_part: Some heads of a layer grow while others keep their length, so that padding would grow.
        merges_values: Values of evicted tokens are added to those that stay, so the storage must be able to.
        spans_layers: A layer's tokens depend on another layer, so every layer must own keys and values.
        stores_query_heads: Keys and values are stored per query head instead of per KV head.
        stored_queries: Number of last queries that are stored while decoding.
        max_step_tokens: Maximum new tokens of a step, because tokens may be evicted after it; None: any number. More
            tokens fed at once are processed in several steps.
        static_problem: Why a decode step cannot run over fixed shapes; None: it can, if the storage supports it.
        needs: What the policy needs beyond a model and a prompt, shown when a run starts and recorded; empty: nothing.
    """

    keeps_everything: bool = False
    observation_window: int = 0
    observes_question: bool = False
    evicts_while_decoding: bool = False
    prefills_by_steps: bool = False
    attends_whole_prompt: bool = True
    narrows_prompt: bool = False
    drops_stored: bool = False
    ranks_tokens: bool = False
    keeps_positions: bool = True
    heads_differ: bool = False
    heads_part: bool = False
    merges_values: bool = False
    spans_layers: bool = False
    stores_query_heads: bool = False
    stored_queries: int = 0
    max_step_tokens: int | None = None
    static_problem: str | None = "the policy has no steps of fixed shapes"
    needs: str = ""


@dataclass(frozen=True)
class FurtherForwards:
    """Forwards of the model that the compression of one prompt takes after the prefill.

    Attributes:
        count: Number of forwards.
        tokens: Number of tokens of them all.
    """

    count: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Step:
    """Queries of the new tokens of one layer, after the prompt; the cache layer stores their keys and values.

    Attributes:
        query: [B, H_q, n, D], after RoPE.
        rule: How logits are computed.
        valid: [B, n] bool, False for pads among the new tokens; None: no pads.
        first: Index of the first of these tokens in the forward.
    """

    query: torch.Tensor
    rule: LogitRule
    valid: torch.Tensor | None = None
    first: int = 0


@dataclass(frozen=True)
class Kept:
    """Prompt tokens that one layer keeps.

    Attributes:
        slots: int64 [R, H, C], positions in the prompt, increasing per head where valid; None: all tokens.
        valid: bool [R, H, C], False for left padding of heads that keep fewer than C tokens; None: no padding.
        scores: float32 [R, H, C], running scores or ranks of the kept tokens; None: neither.
    """

    slots: torch.Tensor | None = None
    valid: torch.Tensor | None = None
    scores: torch.Tensor | None = None


class CachePolicy(HasIdentity):
    """Decides which tokens a cache keeps. The default implementation keeps all of them."""

    key_prefix: ClassVar[str] = "method.policy."
    other_keys: ClassVar[Mapping[str, str]] = {"budget": "method.budget"}

    @cached_property
    def capabilities(self) -> PolicyCapabilities:
        """Properties of the policy."""
        return PolicyCapabilities(static_problem=None)

    def identity(self) -> dict[str, Any]:
        """Return the identity of the policy, with the tie-breaking rule if it ranks tokens."""
        return super().identity() | ({"ties": ranking.RULE} if self.capabilities.ranks_tokens else {})

    def max_step_tokens(self, query: torch.Tensor) -> int | None:
        """Return the maximum new tokens of a step with queries [B, H_q, n, D]; see :class:`PolicyCapabilities`."""
        return self.capabilities.max_step_tokens

    def new_state(self, layer: ModelLayer) -> Any:
        """Return a new state of one layer for one batch, which is passed to the methods below."""
        return None

    def new_states(self, layers: Sequence[ModelLayer]) -> list[Any]:
        """Return new states of all layers of a cache on which the method works, linked if the policy spans layers."""
        return [self.new_state(layer) for layer in layers]

    def select(self, prompt: Prompt, state: Any = None) -> Kept:
        """Return the prompt tokens to keep."""
        return Kept()

    def stored_keys(self, keys: torch.Tensor, slots: torch.Tensor, length: int, state: Any) -> torch.Tensor:
        """Return the keys to store for the kept tokens, [R, H, C, D]: unchanged, or rotated to other positions.

        Args:
            keys: [R, H, C, D], keys of the kept tokens.
            slots: [R, H, C], their positions in the prompt; see :attr:`Kept.slots`.
            length: T, the number of prompt tokens.
            state: State of this layer.
        """
        return keys

    def after_prompt(
        self,
        state: Any,
        storage: LayerStorage,
        lengths: torch.Tensor,
        scores: torch.Tensor | None,
        queries: torch.Tensor | None = None,
    ) -> None:
        """Initialize the state for decoding, after the prompt has been compressed and stored.

        Args:
            state: State of this layer.
            storage: Storage of the layer, with the kept tokens.
            lengths: [B] int64, real prompt tokens of each row.
            scores: [B, H, S] float32, scores from :meth:`select` in the order of the stored slots (0 in padding), or
                None.
            queries: [B, H_q, w, D], last queries of the prompt, zero-padded on the left; None unless
                ``stored_queries``.
        """

    def after_prefill(
        self,
        model: PreTrainedModel,
        plan: Plan,
        layers: Sequence[tuple[Any, LayerStorage]],
        prompts: Sequence[torch.Tensor],
        earlier: list[Any] | None = None,
    ) -> list[FurtherForwards]:
        """Compress the prompts with further forwards of the model; called once, by the engine, after the prefill.

        Args:
            model: The model.
            plan: Plan of the model.
            layers: State and storage of each layer on which the method works.
            prompts: Token ids of each row, without pads.
            earlier: Results of other members of a fan-out, which the policy may use and append to; None: it is alone.

        Returns:
            The forwards for each row, those shared with another member included; empty for a policy without any.
        """
        return []

    def next_layer_tokens(self, state: Any) -> list[torch.Tensor | None]:
        """Return the prompt tokens that are forwarded to the next layer; only if ``narrows_prompt``.

        Called once for each layer except the last, after :meth:`after_prompt` and before the next layer's forward.

        Args:
            state: State of this layer.

        Returns:
            One entry per group of rows, in the order of the :meth:`select` calls: int64 [R, K], increasing indices into
            the tokens of this layer; None: all of them.
        """
        raise NotImplementedError

    def after_append(self, state: Any, slots: torch.Tensor) -> None:
        """Move what the state keeps for each slot, if stored tokens have moved when the new ones were appended.

        Args:
            state: State of this layer.
            slots: See :meth:`.storage.base.LayerStorage.append`.
        """

    def attend(self, state: Any, storage: LayerStorage, step: Step) -> torch.Tensor:
        """Attend over all stored tokens, which usually include the new ones.

        Called once for each layer of the model that attends over this cache layer. A layer whose tokens do not attend
        to themselves is called before the new token is stored.

        Args:
            state: State of this layer.
            storage: Storage of the layer.
            step: Queries of the new tokens.

        Returns:
            [B, H_q, n, D].
        """
        return storage.attend(step.query, step.rule, step.valid)

    def after_attention(self, state: Any, storage: LayerStorage, step: Step) -> None:
        """Evict tokens if needed; called once per step, after every :meth:`attend` of it.

        Args:
            state: State of this layer.
            storage: Storage of the layer, with the new tokens.
            step: The step of the last :meth:`attend`.
        """

    def make_static(self, state: Any, storage: LayerStorage, steps: int) -> None:
        """Give every tensor of a layer its final shape; see :meth:`.storage.base.LayerStorage.make_static`."""
        storage.make_static(steps)

    def static_state(self, state: Any) -> list[torch.Tensor]:
        """Return the tensors of ``state`` that a static step changes, as for :meth:`.LayerStorage.static_state`."""
        return []

    def between_steps(self, state: Any, storage: LayerStorage) -> None:
        """Do the uncaptured work after a static step, in place."""
        return

    def kept_tokens(self, prompt_length: int, new_tokens: int, layers: int, heads: int) -> Sequence[int | Fraction]:
        """Return the tokens per head of each layer after a prompt and ``new_tokens`` steps, or the mean over heads."""
        return [prompt_length + new_tokens] * layers

    def state_tensors(self, state: Any) -> list[torch.Tensor]:
        """Return the tensors of ``state`` that stay in memory and count as stored bytes."""
        return []

    def logical_state_bytes(self, state: Any, tokens: torch.Tensor) -> int:
        """Return the bytes of ``state`` without unused slots; ``tokens`` [B, 1 or H] are stored."""
        return sum(t.nbytes for t in self.state_tensors(state))

    def state_bytes(self, shape: KVShape, heads: int, prompt_length: int, new_tokens: int) -> int:
        """Return the bytes of the state for one sequence by the formula, with ``heads`` stored heads per layer."""
        return 0


@dataclass(frozen=True)
class KeepEverything(CachePolicy):
    """Keeps every token: the full cache, and methods that reduce only bits, layers or heads."""

    id: ClassVar[str] = "Selection"

    @cached_property
    def capabilities(self) -> PolicyCapabilities:
        return PolicyCapabilities(keeps_everything=True, static_problem=None)
