"""How the vectors of two layers become one direction and two magnitudes, and which tokens must not be merged.

Section 4 of arXiv 2405.14366: the two directions are merged by spherical interpolation (SLERP), ``t`` of the way from
the lower layer's to the upper layer's, and each layer keeps its own magnitude. Tokens whose directions differ most are
retained unmerged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ...policies.ranking import keep_mask

RETENTIONS = ("top_ratio", "range_distinct", "range_literal")

NEAR = 1e-3
"""Radians from 0 within which directions count as one (sin is in a denominator), and from pi as opposite."""


def angle_between(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Angle of directions of length one [..., D]: [...]; exact for small angles too, where an arccos is not."""
    return 2 * torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1))


def slerp(lower: torch.Tensor, upper: torch.Tensor, t: float) -> torch.Tensor:
    """The direction ``t`` of the way from ``lower`` to ``upper``, both [..., D] of length one."""
    angle = angle_between(lower, upper)[..., None]
    sine = angle.sin()
    near = angle < NEAR
    safe = torch.where(near, torch.ones_like(sine), sine)
    first = torch.where(near, torch.full_like(angle, 1 - t), ((1 - t) * angle).sin() / safe)
    second = torch.where(near, torch.full_like(angle, t), (t * angle).sin() / safe)
    return F.normalize(first * lower + second * upper, dim=-1)


@dataclass(frozen=True)
class MergedVectors:
    """Vectors of two layers, merged.

    Attributes:
        direction: [B, H, n, D], shared.
        magnitudes: [2, B, H, n], of the lower and the upper layer.
        angle: [B, H, n] between the two directions.
        unmergeable: bool [B, H, n]: nothing lies between opposite directions, and a zero vector has none.
    """

    direction: torch.Tensor
    magnitudes: torch.Tensor
    angle: torch.Tensor
    unmergeable: torch.Tensor


@dataclass(frozen=True)
class MergeRule:
    """MiniCache's settings; see :class:`.storage.MiniCache`."""

    t: float
    gamma: float
    retention: str

    @property
    def has_threshold(self) -> bool:
        """Whether an angle decides, for later tokens too, which ones are retained."""
        return self.gamma not in (0, 1) and self.retention != "top_ratio"

    def merge(self, lower: torch.Tensor, upper: torch.Tensor) -> MergedVectors:
        """Merge the vectors [B, H, n, D] of two layers; computed in float32 or wider."""
        both = torch.stack([lower, upper]).to(torch.promote_types(lower.dtype, torch.float32))
        magnitudes = both.norm(dim=-1)  # [2, B, H, n]
        directions = F.normalize(both, dim=-1)
        angle = angle_between(directions[0], directions[1])
        unmergeable = (angle > math.pi - NEAR) | (magnitudes.amin(0) == 0)
        direction = slerp(directions[0], directions[1], self.t)
        return MergedVectors(direction.to(lower.dtype), magnitudes.to(lower.dtype), angle, unmergeable)

    def retain_first(self, merged: MergedVectors, real: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Which of the tokens that are merged first are retained, and the threshold for later ones.

        Args:
            merged: the tokens.
            real: bool [B, H, n], False for pads.

        Returns:
            bool [B, H, n], and the angle [B, H]; None: no later token is retained for its angle.
        """
        angle, unmergeable = merged.angle, merged.unmergeable & real
        if not self.gamma:
            return unmergeable, None
        if self.gamma == 1:
            return real, None
        if self.retention == "top_ratio":
            count = (self.gamma * real.sum(-1).to(torch.float64)).ceil()  # [B, H]
            largest = keep_mask(torch.where(real, angle, -math.inf), count.long())  # [B, H, n]
            return largest | unmergeable, None
        lowest = torch.where(real, angle, math.inf).amin(-1)
        highest = torch.where(real, angle, -math.inf).amax(-1)
        width = self.gamma * (highest - lowest)
        threshold = lowest + width if self.retention == "range_literal" else highest - width
        return (self._beyond(angle, threshold) & real) | unmergeable, threshold

    def retain_later(
        self, merged: MergedVectors, real: torch.Tensor | None, threshold: torch.Tensor | None
    ) -> torch.Tensor:
        """Which of later tokens are retained: bool [B, H, n]; ``real`` None: no pads; ``threshold`` [B, H] or None."""
        retain = merged.unmergeable
        if self.gamma == 1:
            retain = torch.ones_like(retain)
        elif threshold is not None:
            retain = retain | self._beyond(merged.angle, threshold)
        return retain if real is None else retain & real

    def _beyond(self, angle: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
        """Whether an angle [B, H, n] is on the side of the threshold [B, H] that is retained."""
        at = threshold[..., None]
        return angle < at if self.retention == "range_literal" else angle > at
