"""Interface of allocators, which distribute a mean budget over layers and heads.

Legend: R rows of one prompt length, H stored heads, N candidates (unprotected tokens).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from ....conf.identity import HasIdentity


class Allocator(HasIdentity):
    """Distributes a budget over layers and heads; works with any scorer."""

    key_prefix: ClassVar[str] = "method.allocator."

    heads_differ: ClassVar[bool] = False
    """Whether the heads of a layer keep different numbers of tokens (:meth:`head_budgets`)."""
    spans_layers: ClassVar[bool] = False
    """Whether layers share one budget (:meth:`cache_budgets`), allocated after all of them have prefilled."""

    def layer_budgets(self, budget: int, protected: int, prompt_length: int, layers: int) -> Sequence[int]:
        """Return the number of tokens that each layer keeps per head, on average over its heads.

        Args:
            budget: As configured, protected tokens included; below ``prompt_length``. The mean over the layers, but
                for allocators that say otherwise.
            protected: Number of last tokens that every layer keeps, at most ``budget``.
            prompt_length: Tokens of the prompt.
            layers: Number of layers that the method works on.
        """
        return [budget] * layers

    @property
    def label(self) -> str:
        """Short name for tables."""
        return self.id

    def head_budgets(
        self, scores: torch.Tensor, budget: int, ties: torch.Tensor | None = None, protected: int = 0
    ) -> torch.Tensor:
        """Return the number of candidates that each head of a layer keeps; only if ``heads_differ``.

        Args:
            scores: [R, H, N]; the largest are kept.
            budget: Mean over the heads.
            ties: [R, H, N] tie-breaking scores; then the lower head and the lower index are kept first.
            protected: Number of other tokens that every head keeps, the sinks and the last ones.

        Returns:
            [R, H] int64 with a sum of H * ``budget`` per row.
        """
        raise NotImplementedError

    def sure_of_each_head(self, budget: int, protected: int) -> int:
        """Return how many candidates each head keeps whatever its scores; only if ``heads_differ``.

        Args:
            budget, protected: See :meth:`head_budgets`.
        """
        raise NotImplementedError

    def cache_budgets(
        self, scores: Sequence[torch.Tensor], budget: int, ties: Sequence[torch.Tensor | None]
    ) -> list[torch.Tensor]:
        """Return the number of candidates that each head of each layer keeps; only if ``spans_layers``.

        Args:
            scores: [R, H, N] per layer; the largest are kept.
            budget: Mean over layers and heads.
            ties: Tie-breaking scores per layer, of the same shape, or None.

        Returns:
            [R, H] int64 per layer.
        """
        raise NotImplementedError
