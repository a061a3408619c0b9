"""What a published number and ours say of each other: one of four verdicts, with two sides."""

from __future__ import annotations

from collections.abc import Sequence

REPRODUCED = "reproduced"
NOT_REPRODUCED = "not reproduced"
NOT_COMPARABLE = "not comparable"
NOT_RUN = "not run"
VERDICTS = (REPRODUCED, NOT_REPRODUCED, NOT_COMPARABLE, NOT_RUN)

LOW, HIGH = 0.9, 1.1
"""Ours divided by the published number, where ours counts as the same."""
WIDEST = 0.2
"""Distance from our mean to an end of its interval, as a share of the published number, up to which ours can agree
with it. A wider interval reaches twice as far as :data:`LOW` and :data:`HIGH`, so it agrees with almost any result; it
can still contradict one."""
TOO_FEW = "too few examples"
"""The remark of a number that only a too wide interval lets agree."""


def verdict(
    published: float,
    ours: float | None,
    low: float | None,
    high: float | None,
    differs: Sequence[str],
    is_sample: bool = False,
) -> tuple[str, str]:
    """The verdict, and a remark: where the number lies above, something else was measured, or better.

    Args:
        published: the paper's number.
        ours: ours, or None where there is no run.
        low, high: 95 % interval of ours, where it has one.
        differs: what differs between the two beside chance; anything makes them not comparable.
        is_sample: whether ours is a mean over examples; without an interval such a mean agrees with nothing.
    """
    if ours is None:
        return NOT_RUN, ""
    if differs:
        return NOT_COMPARABLE, ""
    inside = low is not None and high is not None and low <= published <= high
    near = published != 0 and LOW <= ours / published <= HIGH
    if inside or near:
        if low is None or high is None:
            return (NOT_COMPARABLE, TOO_FEW) if is_sample else (REPRODUCED, "")
        is_wide = max(ours - low, high - ours) > WIDEST * abs(published)
        return (NOT_COMPARABLE, TOO_FEW) if is_wide else (REPRODUCED, "")
    return NOT_REPRODUCED, "above: look again" if ours > published else "below"
