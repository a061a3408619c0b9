"""The contract of a scorer: what each held token is worth. Budgets, layers and times are no concern of it.

Legend: R rows of one prompt length, B rows of a batch, H stored heads, g query heads a stored head, T tokens, S slots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ....conf.identity import HasIdentity
from ...cache.prompt import Prompt
from ..schedules.after_prefill import AfterPrefill
from ..schedules.base import Schedule

if TYPE_CHECKING:
    from ...cache.rotary import Rotary

DECODE_QUERIES = 128
"""Last queries that a scorer with :data:`ALL_QUERIES` is given when tokens are scored again while decoding."""


@dataclass(frozen=True)
class ModelLayer:
    """The layer of the model that a policy works on.

    Attributes:
        index: Index among the layers of the model.
        place: Index among the layers that the method works on.
        count: Number of the layers that the method works on.
        rotary: Rotation of its keys by positions, for methods that re-position tokens; raises InputError where there is
            none. Measured on the model when it is first asked for.
    """

    index: int
    place: int
    count: int
    rotary: Callable[[], Rotary]

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelLayer:
        """Copies of a cache work on the same model."""
        return self


class Scorer(HasIdentity):
    """Scores tokens by what a layer holds and by its queries; the largest scores stay."""

    key_prefix: ClassVar[str] = "method.scorer."

    name: ClassVar[str]
    """As typed after ``method/scorer=``."""
    default_recent: ClassVar[int | float] = 0
    """Last tokens that a policy protects unless it says otherwise: a number, or a share of the budget."""
    recent_recorded_as: ClassVar[str] = ""
    """Key under which records of this scorer have always had the policy's ``recent``; "": only where it is not
    :meth:`protected_recent`."""
    default_schedule: ClassVar[Schedule] = AfterPrefill()
    tracks_attention: ClassVar[bool] = False
    """Scores while decoding come from the attention that tokens are paid, by :meth:`update`."""
    accumulates: ClassVar[bool] = False
    """:meth:`update` adds to the scores of the steps before, so they are held (float32) for each token."""
    scores_heads_alike: ClassVar[bool] = False
    """One score a token for all heads of a layer: H is 1 in what it returns."""

    @property
    def observation_window(self) -> int:
        """Last queries that :meth:`score` looks at; :data:`ALL_QUERIES`: all of the prompt's."""
        return 0

    @property
    def stores_query_heads(self) -> bool:
        """Keys and values are scored and stored once per query head instead of once per KV head."""
        return False

    def protected_recent(self) -> int | float:
        """Last tokens that a policy protects unless it says otherwise."""
        return self.default_recent

    def protected_sinks(self) -> int:
        """First tokens that a policy protects unless it says otherwise."""
        return 0

    def new_state(self, layer: ModelLayer) -> Any:
        """What the scorer needs to know of a layer, made once for each batch."""
        return None

    def score(self, prompt: Prompt, state: Any) -> torch.Tensor:
        """Scores of all tokens, [R, H, T] float32; entries of protected tokens are ignored.

        Args:
            prompt: Keys, values and last queries. While decoding it holds the tokens that are left.
            state: What :meth:`new_state` made for this layer.
        """
        raise NotImplementedError

    def tie_scores(self, prompt: Prompt, state: Any) -> torch.Tensor | None:
        """Second scores [R, H, T]: of equally scored tokens the largest here stays first; None: the lower index."""
        return None

    def update(self, scores: torch.Tensor | None, weights: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
        """Scores after a decode step, where ``tracks_attention``.

        Args:
            scores: [B, H, S] float32 before the step, zero for the new token; None unless ``accumulates``.
            weights: [B, H, g, S] float32, attention of the new token's query heads over all slots.
            real: [B] bool, False for a row whose new token is a pad; None: all real.

        Returns:
            [B, H or 1, S] float32.
        """
        raise NotImplementedError
