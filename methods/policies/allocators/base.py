"""The contract of an allocator: a budget is a mean, and an allocator says which layers and heads get more of it.

Legend: R rows of one prompt length, H stored heads, N tokens that may leave.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from ....conf.identity import HasIdentity


class Allocator(HasIdentity):
    """Shares a budget out; it works over the scores of any method that ranks a prompt's tokens."""

    key_prefix: ClassVar[str] = "method.allocator."

    heads_differ: ClassVar[bool] = False
    """The heads of a layer keep different numbers of tokens, by :meth:`head_budgets`."""
    spans_layers: ClassVar[bool] = False
    """Layers are compared, by :meth:`cache_budgets`, once all of them have seen the prompt."""

    def layer_budgets(self, budget: int, protected: int, prompt_length: int, layers: int) -> Sequence[int]:
        """Tokens that each layer keeps per head (their mean over the heads).

        Args:
            budget: mean over the layers, protected tokens included; below ``prompt_length``.
            protected: last tokens that every layer keeps, at most ``budget``.
            prompt_length: tokens of the prompt.
            layers: layers that the method works on.
        """
        return [budget] * layers

    def head_budgets(self, scores: torch.Tensor, budget: int, ties: torch.Tensor | None = None) -> torch.Tensor:
        """Tokens that each head of a layer keeps beside the protected ones, where heads differ.

        Args:
            scores: [R, H, N], the largest stay.
            budget: mean over the heads.
            ties: [R, H, N], decides between equal scores; then the lower head does, then the lower index.

        Returns:
            [R, H] int64, adding up to H x ``budget``.
        """
        raise NotImplementedError

    def cache_budgets(
        self, scores: Sequence[torch.Tensor], budget: int, ties: Sequence[torch.Tensor | None]
    ) -> list[torch.Tensor]:
        """Tokens that each head of each layer keeps beside the protected ones, where ``spans_layers``.

        Args:
            scores: [R, H, N] of each layer, the largest stay.
            budget: Mean over layers and heads.
            ties: Second scores of each layer, of the same shape, or None.

        Returns:
            [R, H] int64 of each layer.
        """
        raise NotImplementedError
