"""The Pareto front with a tolerance: what does not differ significantly from the front is on it."""

from __future__ import annotations

from collections.abc import Sequence


def front_line(costs: Sequence[float], merits: Sequence[float]) -> list[int]:
    """Return the indices of the best points by mean alone, by rising cost: the corners of the front's line.

    Args:
        costs: Less is better (bytes).
        merits: More is better (score).
    """
    best = float("-inf")
    corners = []
    for i in sorted(range(len(costs)), key=lambda i: (costs[i], -merits[i])):
        if merits[i] > best:
            best = merits[i]
            corners.append(i)
    return corners


def front_members(costs: Sequence[float], merits: Sequence[float], highs: Sequence[float | None]) -> set[int]:
    """Return the indices of the points whose interval reaches the front's line at their cost.

    A point is off the front only if another one that costs no more has a mean above the whole interval of the point.

    Args:
        costs: Less is better.
        merits: More is better.
        highs: Better end of each merit's interval; None is the merit itself.
    """
    reach = [merit if high is None else max(merit, high) for merit, high in zip(merits, highs, strict=True)]
    members = set()
    for i in range(len(costs)):
        line = max(merits[j] for j in range(len(costs)) if costs[j] <= costs[i])
        if reach[i] >= line:
            members.add(i)
    return members
