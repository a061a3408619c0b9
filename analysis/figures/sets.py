"""Score of each data set, a dot a method, at one budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

from ..load import Run, average, fewer_is_better
from ..tables.longbench import paper_order, short_name
from .draw import draw_curve, handle, linear_axis, rows_axis
from .layout import Sheet
from .needle import is_needle
from .registry import FAMILIES, Look
from .spec import Context, FigureSpec, Point, budget_words, panels_by_family, settings_of, subject

ROW_EMS = 1.9
SPREAD_ROWS = 0.5
MEAN = "mean"


def datasets(group: Sequence[Run], context: Context) -> Iterator[FigureSpec]:
    """Scores by data set at the budget that most methods have, or at each of the budgets that were asked for."""
    sets = list(dict.fromkeys(name for run in group for name in run.record["scores"]))
    if len(sets) < 2 or len(group) < 2 or is_needle(group[0]):
        return
    sets.sort(key=paper_order)
    counts = Counter(run.record["budget"] for run in group if run.record["budget"] is not None)
    most = sorted(budget for budget, count in counts.items() if count == max(counts.values()))
    chosen = most if len(most) <= 1 or context.options.every_budget else [most[len(most) // 2]]
    for budget in chosen or [None]:
        yield _spec(group, [run for run in group if run.record["budget"] in (budget, None)], sets, context)


def _spec(group: Sequence[Run], shown: Sequence[Run], sets: Sequence[str], context: Context) -> FigureSpec:
    record = group[0].record
    budget = next((run.record["budget"] for run in shown if run.record["budget"] is not None), None)
    points = []
    for run in shown:
        for row, name in enumerate([*sets, MEAN]):
            if name in run.record["scores"] or name == MEAN:
                score = average(run.record, None if name == MEAN else name)["mean"]
                points.append(Point(run.curve, run.record["budget"], score, row, place=name, runs=(run.path,)))
    panels = panels_by_family({p.curve for p in points} - {"full"}, context.looks)
    panels = [(name, curves) for name, curves in panels if name != FAMILIES["baseline"]]
    others = sorted({run.label for run in group} - {run.label for run in shown})
    counts = record["data"].get("examples", {})
    sizes = sorted(set(counts.values()))
    many = f"{sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else f"{sizes[0]}" if sizes else "few"
    caption = [
        *settings_of(group),
        *(
            [f"Budget {budget_words(budget)}; methods without a budget are shown at their own size."]
            if budget is not None
            else []
        ),
        f"Vertical strokes: the full cache. {many} examples a data set, so a single dot says little.",
        *([f"Not drawn (other budgets; choose with --budgets): {', '.join(others)}."] if others else []),
    ]
    names = [short_name(name) for name in sets] + [MEAN]
    x_label = "perplexity" if fewer_is_better(record) else "score (0 to 100)"
    draw = partial(_draw, points=points, panels=panels, names=names, looks=context.looks, x_label=x_label)
    labels = [*names, *(context.looks[c].name for _, curves in panels for c in curves)]
    title = f"Scores by data set{'' if budget is None else f', budget {budget_words(budget)}'}: {subject(record)}"
    parts = () if budget is None else ("budget", budget_words(budget))
    return FigureSpec(
        "datasets", (group,), title, tuple(caption), x_label, "data set", tuple(points), tuple(labels), draw, parts
    )


def _draw(
    sheet: Sheet,
    points: Sequence[Point],
    panels: Sequence[tuple[str, list[str]]],
    names: Sequence[str],
    looks: Mapping[str, Look],
    x_label: str,
) -> None:
    style = sheet.style
    if style.is_wide:
        columns = 2 if len(panels) == 4 else 3
    else:
        columns = 2 if len(panels) <= 6 else 1  # the legends of more do not fit side by side
    columns = min(len(panels), columns)
    row = ROW_EMS if len(panels) <= columns else ROW_EMS * 0.65
    grid = sheet.grid(len(panels), columns, len(names) * row * style.em)
    for number, (ax, (title, curves)) in enumerate(zip(grid, panels, strict=True)):
        full = [p for p in points if p.curve == "full"]
        ax.plot(
            [p.x for p in full],
            [p.y for p in full],
            "|",
            color="black",
            markersize=6 * style.scale,
            markeredgewidth=1.2 * style.scale,
        )
        for place, curve in enumerate(curves):  # a little above each other: equal scores are all seen
            shift = SPREAD_ROWS * (place - (len(curves) - 1) / 2) / max(len(curves) - 1, 1)
            own = [replace(p, y=p.y + shift) for p in points if p.curve == curve]
            draw_curve(ax, own, looks[curve], style, has_line=False)
        ax.axhline(len(names) - 1.5, color="#888888", linewidth=0.6 * style.scale)
        ax.set_xlabel(x_label)
        if title:
            sheet.head(ax, title)
        handles = [handle(looks[curve], style, False) for curve in curves]
        sheet.legend(handles, [looks[curve].name for curve in curves], panel=number if len(panels) > 1 else None)
    rows_axis(grid[0], names)
    linear_axis(grid[0], "x", style, style.inches / columns - 6 * style.em)
