"""The Pareto frontier: what no other run beats on both axes."""

from __future__ import annotations

from collections.abc import Sequence


def frontier(costs: Sequence[float], merits: Sequence[float]) -> list[int]:
    """Indices of the points that no other point equals or beats on both axes and beats on one, by rising cost.

    Args:
        costs: less is better (bytes).
        merits: more is better (score).
    """
    order = sorted(range(len(costs)), key=lambda i: (costs[i], -merits[i]))
    best = float("-inf")
    out: list[int] = []
    for i in order:
        tied = bool(out) and (costs[i], merits[i]) == (costs[out[-1]], merits[out[-1]])  # the same point twice
        if merits[i] > best or tied:
            best = merits[i]
            out.append(i)
    return out
