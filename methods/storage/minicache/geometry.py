"""Merging of the vectors of two layers into one direction and two magnitudes, and the choice of retained tokens.

Section 4 of arXiv 2405.14366: directions are merged by spherical interpolation (SLERP) with parameter ``t`` from the
lower to the upper layer, and each layer keeps its magnitude. Tokens whose directions differ most are retained unmerged.

Legend: B batch rows, H KV heads, n tokens, D channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ...policies.ranking import keep_mask

RETENTIONS = ("top_ratio", "range_distinct", "range_literal")

ANGLE_TOLERANCE = 1e-3
"""Radians. Directions within it count as equal (SLERP divides by the sine), and within it of pi as opposite."""


def angle_between(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the angle [...] between unit vectors [..., D]; unlike arccos, it is accurate for small angles."""
    return 2 * torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1))


def slerp(lower: torch.Tensor, upper: torch.Tensor, t: float) -> torch.Tensor:
    """Interpolate spherically between unit vectors [..., D], from ``lower`` (t = 0) to ``upper`` (t = 1)."""
    angle = angle_between(lower, upper)[..., None]  # [..., 1]
    sine = angle.sin()
    is_small = angle < ANGLE_TOLERANCE  # interpolate linearly
    divisor = torch.where(is_small, torch.ones_like(sine), sine)
    lower_weight = torch.where(is_small, torch.full_like(angle, 1 - t), ((1 - t) * angle).sin() / divisor)
    upper_weight = torch.where(is_small, torch.full_like(angle, t), (t * angle).sin() / divisor)
    return F.normalize(lower_weight * lower + upper_weight * upper, dim=-1)


@dataclass(frozen=True)
class MergedVectors:
    """Merged vectors of two layers.

    Attributes:
        direction: [B, H, n, D], shared direction.
        magnitudes: [2, B, H, n], of the lower and the upper layer.
        angle: [B, H, n], angle between the two directions.
        unmergeable: bool [B, H, n], True where SLERP is undefined: opposite directions or a zero vector.
    """

    direction: torch.Tensor
    magnitudes: torch.Tensor
    angle: torch.Tensor
    unmergeable: torch.Tensor


@dataclass(frozen=True)
class MergeRule:
    """Options of MiniCache; see :class:`.storage.MiniCache`."""

    t: float
    gamma: float
    retention: str

    @property
    def has_threshold(self) -> bool:
        """Whether a threshold on the angle decides which tokens are retained, also while decoding."""
        return self.gamma not in (0, 1) and self.retention != "top_ratio"

    def merge(self, lower: torch.Tensor, upper: torch.Tensor) -> MergedVectors:
        """Merge the vectors [B, H, n, D] of two layers; computed in float32 or wider."""
        both = torch.stack([lower, upper]).to(torch.promote_types(lower.dtype, torch.float32))  # [2, B, H, n, D]
        magnitudes = both.norm(dim=-1)  # [2, B, H, n]
        directions = F.normalize(both, dim=-1)
        angle = angle_between(directions[0], directions[1])
        unmergeable = (angle > math.pi - ANGLE_TOLERANCE) | (magnitudes.amin(0) == 0)
        direction = slerp(directions[0], directions[1], self.t)
        return MergedVectors(direction.to(lower.dtype), magnitudes.to(lower.dtype), angle, unmergeable)

    def retain_first(self, merged: MergedVectors, real: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Choose the tokens to retain of the first merge, and the threshold for later tokens.

        Args:
            merged: The merged tokens.
            real: bool [B, H, n], False for pads.

        Returns:
            The mask of retained tokens, bool [B, H, n], and the threshold angle [B, H]; None: no threshold.
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
        """Choose the tokens to retain of a later merge, bool [B, H, n]; see :meth:`retain_first`."""
        retain = merged.unmergeable
        if self.gamma == 1:
            retain = torch.ones_like(retain)
        elif threshold is not None:
            retain = retain | self._beyond(merged.angle, threshold)
        return retain if real is None else retain & real

    def _beyond(self, angle: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
        """Return where the angle [B, H, n] is on the retained side of the threshold [B, H]."""
        threshold = threshold[..., None]
        return angle < threshold if self.retention == "range_literal" else angle > threshold
