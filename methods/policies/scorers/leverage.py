"""Approximate leverage scores of keys before RoPE (Chari and Van Durme, 2025, arXiv 2507.08143, section 3.1).

The leverage of a token says how far its key lies from the directions that the other keys of the head span; tokens that
no others can stand for have the largest. With the keys before RoPE minus their mean, multiplied by a Gaussian matrix of
``sketch`` columns, as the rows x_t of X, the leverage is ``x_t (X^T X + ridge I)^-1 x_t^T``. Scores are standardized
over the tokens and heads of a layer, so that they can be added to others. No query is used.

The Gaussian matrix depends only on ``seed``, layer and head; kvpress draws it anew at each call.

Legend: R rows of one prompt length, H_kv KV heads, T tokens, D channels, s sketch columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from ....conf.options import NonNegativeInt, PositiveFloat, PositiveInt
from ...cache.prompt import Prompt
from .base import Scorer

if TYPE_CHECKING:
    from ...cache.rotary import Rotary
    from ..model_layer import ModelLayer

SMALLEST_DEVIATION = 1e-6
"""Standard deviations below it count as this, so that equal scores are zero and not NaN."""


@dataclass(frozen=True)
class Leverage(Scorer):
    """Standardized leverage scores of keys.

    Attributes:
        sketch: Columns of the Gaussian matrix.
        ridge: Added to the diagonal of the matrix that is inverted.
        seed: Random seed of the Gaussian matrix.
    """

    id: ClassVar[str] = "Leverage"
    name: ClassVar[str] = "leverage"
    prefill_only: ClassVar[bool] = True
    may_be_negative: ClassVar[bool] = True
    sketch: PositiveInt = 48
    ridge: PositiveFloat = 0.01
    seed: NonNegativeInt = 0

    def new_state(self, layer: ModelLayer) -> Rotary:
        return layer.rotary()

    def score(self, prompt: Prompt, state: Rotary) -> torch.Tensor:
        position = torch.arange(prompt.length, device=prompt.keys.device)
        return prompt.cached(repr(self), lambda prompt: self.standardized_leverage(prompt, state, position))

    def standardized_leverage(self, prompt: Prompt, rotary: Rotary, position: torch.Tensor) -> torch.Tensor:
        """Return the scores [R, H_kv, T] of keys at the positions [T]."""
        rows, heads, _, dim = prompt.keys.shape
        keys = rotary.rotate(prompt.keys.double(), -position.expand(rows, -1))  # before RoPE
        sketch = self.gaussian(prompt.layer_idx, heads, dim).to(keys) / self.sketch**0.5  # [H_kv, D, s]
        x = (keys - keys.mean(dim=2, keepdim=True)) @ sketch  # [R, H_kv, T, s]
        ridge = self.ridge * torch.eye(self.sketch, dtype=x.dtype, device=x.device)
        factor = torch.linalg.cholesky_ex(x.mT @ x + ridge).L  # [R, H_kv, s, s], NaN for keys that are not finite
        leverage = (x * torch.cholesky_solve(x.mT, factor).mT).sum(dim=-1).clamp(min=0)  # [R, H_kv, T]
        return standardized(leverage).float()

    def gaussian(self, layer_idx: int, heads: int, dim: int) -> torch.Tensor:
        """Return the standard normal numbers of the sketch, [heads, dim, s]."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + layer_idx)
        return torch.randn(heads, dim, self.sketch, generator=generator)


def standardized(scores: torch.Tensor) -> torch.Tensor:
    """Subtract the mean over heads and tokens of each row [R, H, T] and divide by the unbiased standard deviation."""
    flat = scores.flatten(1)
    deviation = flat.std(dim=1).nan_to_num(0.0).clamp(min=SMALLEST_DEVIATION)  # NaN: a single number
    return (scores - flat.mean(dim=1)[:, None, None]) / deviation[:, None, None]
