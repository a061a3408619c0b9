"""Interface of scorers, which rank cached tokens. A scorer knows nothing of budgets, allocators and schedules.

Legend: R rows of one prompt length, B batch rows, H stored heads, g query heads per stored head, T tokens, S slots.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ....conf.identity import HasIdentity
from ...cache.prompt import ALL_QUERIES, Prompt
from ..schedules.after_prefill import AfterPrefill
from ..schedules.base import Schedule

if TYPE_CHECKING:
    from ..model_layer import ModelLayer
    from ..repeated_prompt import Repetitions

DECODE_QUERIES = 128
"""Number of last queries for a scorer with :data:`ALL_QUERIES` when tokens are re-scored while decoding."""


class Scorer(HasIdentity):
    """Scores the tokens of a layer from its keys, values and queries; tokens with larger scores are kept."""

    key_prefix: ClassVar[str] = "method.scorer."

    name: ClassVar[str]
    """Name on the command line (``method/scorer=``)."""
    needs: ClassVar[str] = ""
    """What the scorer needs beyond a model and a prompt, shown when a run starts and recorded; empty: nothing."""
    default_recent: ClassVar[int | float] = 0
    """Default for the policy's ``recent``: a number of tokens, or a share of the budget."""
    recent_recorded_as: ClassVar[str] = ""
    """Key of the policy's ``recent`` in records; "": recorded only if it differs from :meth:`protected_recent`."""
    default_schedule: ClassVar[Schedule] = AfterPrefill()
    tracks_attention: ClassVar[bool] = False
    """Whether scores while decoding come from the attention weights of each step (:meth:`update`)."""
    accumulates: ClassVar[bool] = False
    """Whether :meth:`update` adds to the scores of earlier steps, which are then stored (float32) for each token."""
    averages_query_heads: ClassVar[bool] = False
    """Whether :meth:`update` needs only the mean of the weights over the query heads of a KV head (g = 1)."""
    scores_heads_alike: ClassVar[bool] = False
    """Whether all heads of a layer have the same scores, which then have H = 1."""
    ranks_whole_heads: ClassVar[bool] = False
    """Whether all tokens of a head have one score, so that heads of high scores keep the whole prompt."""
    may_be_negative: ClassVar[bool] = False
    """Whether scores may be negative, so that no other scorer can multiply them."""
    prefill_only: ClassVar[bool] = False
    """Whether :meth:`score` needs the complete prompt, so that tokens cannot be scored again while decoding."""
    repeats_prompt: ClassVar[bool] = False
    """Whether the scores come from further forwards after the prefill (:meth:`repetitions`)."""
    merges_values: ClassVar[bool] = False
    """Whether values of tokens evicted while decoding are added to kept ones (:class:`..merging.MergingScorer`)."""
    observes_question: ClassVar[bool] = False
    """Whether the prompt's question, where its length is known, takes the place of the observation window."""
    repositions: ClassVar[bool] = False
    """Whether the policy stores the keys of kept prompt tokens at consecutive positions."""
    labelled_parameters: ClassVar[tuple[str, ...]] = ()
    """Parameters that a method's label always names, with its allocator, because results depend on them that much."""
    ranks_in_stages: ClassVar[bool] = False
    """Whether the ranking depends on the number of tokens to keep (:meth:`ranking_scores`)."""

    def chain(self) -> list[Scorer]:
        """Return this scorer and those that it builds on, each of them on the next one."""
        return [self]

    @property
    def weighs_values(self) -> str:
        """Setting without which the norm of the value is a factor of the scores; "": it is none."""
        return ""

    @property
    def observation_window(self) -> int:
        """Number of last prompt queries that :meth:`score` needs; :data:`ALL_QUERIES`: all of them."""
        return 0

    def queries_while_decoding(self, steps: int) -> int:
        """Return the number of last queries that score tokens again after ``steps`` decode steps; they are stored."""
        return DECODE_QUERIES if self.observation_window == ALL_QUERIES else self.observation_window

    @property
    def stores_query_heads(self) -> bool:
        """Whether keys and values are scored and stored per query head instead of per KV head."""
        return False

    def protected_recent(self) -> int | float:
        """Return the default for the policy's ``recent``."""
        return self.default_recent

    def protected_sinks(self) -> int:
        """Return the default for the policy's ``sinks``."""
        return 0

    def new_state(self, layer: ModelLayer) -> Any:
        """Return the scorer's state for a layer, made once per batch."""
        return None

    def score(self, prompt: Prompt, state: Any) -> torch.Tensor:
        """Return [R, H, T] float32, not to be modified in place; the scores of protected tokens are ignored.

        Args:
            prompt: Keys, values and last queries; while decoding, those of the tokens still stored.
            state: State of this layer, from :meth:`new_state`.
        """
        raise NotImplementedError

    def tie_scores(self, prompt: Prompt, state: Any) -> torch.Tensor | None:
        """Return scores [R, H, T] that order tokens with equal scores; None: the lower index is kept first."""
        return None

    def repetitions(self, length: int, prefix: int | None, state: Any) -> Repetitions:
        """Return the further forwards for a prompt; only if ``repeats_prompt``.

        Args:
            length: Tokens of the prompt.
            prefix: Tokens of it that the chat template has before the user's text; None: it is not in the template.
            state: See :meth:`score`.
        """
        raise NotImplementedError

    def ranking_scores(
        self, scores: torch.Tensor, ties: torch.Tensor | None, count: int | torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return scores and tie-breaking scores that rank the tokens within a head, once heads have their budgets.

        Args:
            scores, ties: [R, H, N], entries of :meth:`score` and :meth:`tie_scores` for the unprotected tokens.
            count: Number of them that a head keeps, or int64 [R, H].
        """
        return scores, ties

    def update(self, scores: torch.Tensor | None, weights: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
        """Return the scores [B, H or 1, S] float32 after a decode step; only if ``tracks_attention``.

        Args:
            scores: [B, H, S] float32 before the step, zero for the new token; None unless ``accumulates``.
            weights: [B, H, g, S] float32, attention weights of the new token's query heads over all slots.
            real: [B] bool, False for a row whose new token is a pad; None: no pads.
        """
        raise NotImplementedError
