"""A figure before it is drawn: its points, its caption, and how to draw it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..load import Run, fewer_is_better, longbench_rows, setting
from .layout import Sheet
from .registry import FAMILIES, Look, looks_of

MIB, GIB = 2**20, 2**30
MAX_CURVES = 8
"""Curves in one panel, beside the full cache's."""

Budget = int | float | None


@dataclass(frozen=True)
class Point:
    """One number of a figure.

    Attributes:
        curve: Label of the method with its settings, without the budget.
        budget: Tokens, a fraction of the prompt, or None.
        x, y: Coordinates.
        low, high: Ends of the interval or range of ``y``; None where there is none.
        x_low, x_high: The same for ``x``.
        panel: Title of its panel; empty where there is one panel, or where it is in all of them.
        place: What the point is of, where that is neither method nor budget: a data set, a needle's depth.
        on_front: Whether it is not significantly different from the Pareto front.
        runs: Folders of the runs that the numbers come from.
    """

    curve: str
    budget: Budget
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    x_low: float | None = None
    x_high: float | None = None
    panel: str = ""
    place: str = ""
    on_front: bool = False
    runs: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Options:
    """What is on the axes.

    Attributes:
        x: ``bytes`` (MiB a sequence), ``share`` (of the full cache), ``read`` (share that a step reads) or ``budget``.
        y: ``difference`` to the full cache, or ``score``.
        every_budget: Whether figures of one budget are made for each budget.
    """

    x: str = "bytes"
    y: str = "difference"
    every_budget: bool = False


@dataclass(frozen=True)
class Context:
    """What all figures of one output share.

    Attributes:
        looks: Look of each curve.
        options: What is on the axes.
        problems: Runs that cannot be drawn, a line each; builders add to it.
    """

    looks: Mapping[str, Look]
    options: Options
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class FigureSpec:
    """One figure before it is drawn.

    Attributes:
        kind: One of the kinds of :mod:`.catalog`.
        groups: Comparable runs that it shows; what tells the figure from others of its kind.
        title: What it shows and of what.
        caption: Sentences below the title: settings, meaning of marks, what is left out.
        x_label, y_label: Of the axes.
        points: Every number in it.
        labels: Texts that must be found in the drawn figure.
        draw: Draws it.
        parts: Words for the file name that the groups do not hold: ``budget-256``.
    """

    kind: str
    groups: tuple[Sequence[Run], ...]
    title: str
    caption: tuple[str, ...]
    x_label: str
    y_label: str
    points: tuple[Point, ...]
    labels: tuple[str, ...]
    draw: Callable[[Sheet], None]
    parts: tuple[str, ...] = ()

    @property
    def record(self) -> Mapping[str, Any]:
        """Record of the first run."""
        return self.groups[0][0].record


def context_of(runs: Iterable[Run], options: Options | None = None) -> Context:
    """Return the looks of all these runs with the options of their figures."""
    return Context(looks_of((run.record["method"], run.curve) for run in runs), options or Options())


def subject(record: Mapping[str, Any]) -> str:
    """Return the data and the model of a run in words."""
    return f"{record['task']}, {record['model']}"


def settings_of(group: Sequence[Run]) -> list[str]:
    """Return the sentences of a caption that say what was run, and what the scores are not."""
    record = group[0].record
    examples = record["data"].get("examples")
    counted = f"{sum(examples.values())} examples of {_sets(len(examples))}, " if examples else ""
    sentences = [f"{counted}{setting(record, group)}."]
    length = record["identity"]["task"].get("max_length")
    if length is not None:
        sentences.append(f"Prompts are cut to {length} tokens.")
    part = longbench_rows(record)
    if part == "mini":
        sentences.append("A small bundled set: these are not LongBench scores.")
    elif part == "subset":
        sentences.append("A part of LongBench's rows: not to be compared with published LongBench scores.")
    return sentences


def _sets(count: int) -> str:
    return "1 data set" if count == 1 else f"{count} data sets"


def score_words(record: Mapping[str, Any], options: Options) -> str:
    """Return the label of the axis of scores or differences."""
    if options.y == "difference":
        unit = "nats per token; lower is better" if fewer_is_better(record) else "points"
        return f"difference to the full cache ({unit})"
    return "perplexity (lower is better)" if fewer_is_better(record) else "mean score (0 to 100)"


def panels_by_family(curves: Iterable[str], looks: Mapping[str, Look]) -> list[tuple[str, list[str]]]:
    """Split curves into panels of at most ``MAX_CURVES``: one panel if they fit, else panels by family of method.

    Returns:
        Title and curves of each panel; the title is empty where there is one panel.
    """
    wanted = sorted(set(curves), key=lambda c: (list(FAMILIES).index(looks[c].family), _order(looks[c]), c))
    if len(wanted) <= MAX_CURVES:
        return [("", wanted)]
    panels = []
    for family, title in FAMILIES.items():
        members = [c for c in wanted if looks[c].family == family]
        parts = -(-len(members) // MAX_CURVES)
        size = -(-len(members) // parts) if parts else 0
        for part in range(parts):
            name = title if parts == 1 else f"{title} ({part + 1} of {parts})"
            panels.append((name, members[part * size : (part + 1) * size]))
    return panels


def _order(look: Look) -> list[tuple[bool, float, str]]:
    """Return a key that sorts by words and numbers: ``Quest (64 read)`` before ``Quest (128 read)``."""
    parts = re.findall(r"\d+(?:\.\d+)?|\D+", look.name.lower())
    return [(not part[0].isdigit(), float(part) if part[0].isdigit() else 0.0, part) for part in parts]


def budget_words(budget: Budget) -> str:
    """Return a budget as figures write it: ``512``, ``0.2`` of the prompt."""
    return "" if budget is None else f"{budget:g}"


def named(look: Look, budget: Budget) -> str:
    """Return the name of a method with its budget: ``SnapKV 512``, ``SnapKV 512 + KIVI-4``."""
    if budget is None:
        return look.name
    head, plus, rest = look.name.partition(" + ")
    head, bracket, settings = head.partition(" (")
    return f"{head} {budget:g}{bracket}{settings}{plus}{rest}"
