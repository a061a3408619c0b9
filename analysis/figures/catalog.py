"""Every kind of figure, and all figures that a list of runs can fill."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from ..load import Run, comparable
from .losses import distance, trained
from .needle import heatmaps
from .quality import pareto, speed
from .rows import footprint, forest, step_times
from .sets import datasets
from .spec import Context, FigureSpec, Options, context_of
from .timing import batch, length, memory

OfGroup = Callable[[Sequence[Run], Context], Iterator[FigureSpec]]
OfGroups = Callable[[Sequence[Sequence[Run]], Context], Iterator[FigureSpec]]

BY_GROUP: dict[str, tuple[str, OfGroup]] = {
    "pareto": ("accuracy", pareto),
    "datasets": ("accuracy", datasets),
    "heatmap": ("accuracy", heatmaps),
    "distance": ("accuracy", distance),
    "trained": ("train", trained),
    "forest": ("accuracy", forest),
    "steps": ("efficiency", step_times),
    "footprint": ("", footprint),
}
"""Figures of one group of comparable runs, with the kind of run that they are of (empty: any that stores a cache)."""

OVER_GROUPS: dict[str, OfGroups] = {"speed": speed, "length": length, "memory": memory, "batch": batch}
"""Figures that join several groups."""

KINDS = {
    "pareto": "score against memory, with the Pareto front",
    "speed": "score against decode throughput",
    "datasets": "score of each data set at one budget",
    "heatmap": "needles: score over length and depth",
    "distance": "perplexity: loss by distance from the compressed context",
    "trained": "architectures trained alike: perplexity against bytes per token",
    "length": "time per token over prompt length",
    "memory": "memory over prompt length",
    "batch": "throughput and memory over batch size",
    "forest": "difference of each run to the full cache",
    "steps": "times of single decode steps",
    "footprint": "memory before and after the generation",
}

MAIN_KINDS = tuple(kind for kind in KINDS if kind not in ("forest", "steps", "footprint"))
"""Kinds that are made when none is asked for."""

Builder = Callable[[], Iterator[FigureSpec]]


def builders(runs: Sequence[Run], context: Context, kinds: Sequence[str]) -> Iterator[tuple[str, Builder]]:
    """Yield what makes the figures of each kind and group, so that one that fails does not stop the others."""
    groups = [group for group in comparable([run for run in runs if run.done]) if "search" not in group[0].record]
    for kind in kinds:
        if kind in OVER_GROUPS:
            yield kind, partial(OVER_GROUPS[kind], groups, context)
            continue
        wanted, build = BY_GROUP[kind]
        for group in groups:
            if group[0].record["kind"] in (wanted or ("accuracy", "efficiency")):
                yield f"{kind} of {group[0].record['task']}", partial(build, group, context)


def figures(
    runs: Sequence[Run], kinds: Sequence[str] = MAIN_KINDS, options: Options | None = None
) -> Iterator[FigureSpec]:
    """Yield every figure of these kinds that the runs can fill; ``KINDS`` has them all."""
    context = context_of(runs, options)
    for _, build in builders(runs, context, kinds):
        yield from build()
