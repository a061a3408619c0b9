"""Drawing of score against memory or speed: a panel a family of methods, with the Pareto front of all in each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from .draw import (
    HALO,
    draw_curve,
    front_handle,
    handle,
    label_points,
    label_top,
    linear_axis,
    log_axis,
    nats_axis,
    set_limits,
    shifts,
)
from .front import front_line
from .layout import Sheet
from .registry import Look
from .spec import Point, budget_words

SIDE_BY_SIDE = 0.04  # points whose bytes differ by less stand side by side
SAME_PLACE = 0.15  # budgets whose bytes differ by less share a tick above the panel
PANEL_EMS = 15.0


def draw_quality(
    sheet: Sheet,
    points: Sequence[Point],
    panels: Sequence[tuple[str, list[str]]],
    looks: Mapping[str, Look],
    axes: tuple[str, str],
    log: bool | None,
    loss: bool,
    y_scale: str,
    rightwards: bool,
) -> None:
    """One panel a family, with the front of all families in each."""
    style = sheet.style
    columns = (
        len(panels) if len(panels) <= (2 if style.is_wide else 1) else 3 if style.is_wide and len(panels) > 4 else 2
    )
    height = PANEL_EMS * style.em * (1.25 if len(panels) == 1 else 1.0 if style.is_wide else 0.8)
    grid = sheet.grid(len(panels), columns, height)
    marks = []
    for ax, (_, curves) in zip(grid, panels, strict=True):
        _draw_front(ax, points, sheet, loss, rightwards)
        budgets = _draw_panel(ax, points, curves, looks, sheet, rightwards, axes[1].startswith("difference"))
        marks.append(budgets if log and not rightwards else [])
        ax.set(xlabel=axes[0], ylabel=axes[1])
    width = style.inches / columns - 5 * style.em
    set_limits(grid[0], points, log is not False)
    log_axis(grid[0], "x", style, width) if log is not False else linear_axis(grid[0], "x", style, width)
    if y_scale == "nats":
        nats_axis(grid[0], [v for p in points for v in (p.y, p.low, p.high) if v is not None])
    else:
        (log_axis if y_scale == "perplexity" else linear_axis)(grid[0], "y", style, height)
    for number, (ax, (title, curves), budgets) in enumerate(zip(grid, panels, marks, strict=True)):
        if budgets:
            label_top(sheet, ax, budgets, "budget" if sheet.leftmost(number) else "")
        if title:
            sheet.head(ax, title, 2.4 if any(marks) else 0.8)
        own = {c: [p for p in points if p.curve == c] for c in curves}
        if rightwards:
            texts = [(p.x, p.y, budget_words(p.budget), looks[c].color) for c in curves for p in own[c]]
            label_points(sheet, ax, [text for text in texts if text[2]])
        covered = {budget for _, budget in budgets} | (
            {budget_words(p.budget) for p in points} if rightwards else set()
        )
        names = [_legend_name(looks[c], own[c], covered) for c in curves]
        handles = [handle(looks[c], style, len(own[c]) > 1) for c in curves]
        if number == 0:
            handles, names = [*_common_handles(points, looks, sheet), *handles], [*_common_names(points, looks), *names]
        sheet.legend(handles, names, panel=number if len(panels) > 1 else None)


def _common_handles(points: Sequence[Point], looks: Mapping[str, Look], sheet: Sheet) -> list[Any]:
    full = [handle(looks["full"], sheet.style, False)] if any(p.curve == "full" for p in points) else []
    return [*full, front_handle(sheet.style)]


def _common_names(points: Sequence[Point], looks: Mapping[str, Look]) -> list[str]:
    return [*([looks["full"].name] if any(p.curve == "full" for p in points) else []), "Pareto front, all methods"]


def _legend_name(look: Look, points: Sequence[Point], covered: set[str]) -> str:
    """Return a curve's name, with its budgets unless ticks above the panel or labels of points show them."""
    budgets = [budget_words(p.budget) for p in points if p.budget is not None]
    if not budgets or set(budgets) <= covered:
        return look.name
    return f"{look.name}, budget {', '.join(sorted(budgets, key=float))}"


def costs_and_merits(points: Sequence[Point], loss: bool, rightwards: bool) -> tuple[list[float], list[float]]:
    """Return what is better small and what is better large, of each point."""
    return [-p.x if rightwards else p.x for p in points], [-p.y if loss else p.y for p in points]


def _draw_front(ax: Axes, points: Sequence[Point], sheet: Sheet, loss: bool, rightwards: bool) -> None:
    """Draw the line of the best means."""
    corners = sorted((points[i] for i in front_line(*costs_and_merits(points, loss, rightwards))), key=lambda p: p.x)
    width = 2.2 * sheet.style.scale
    x, y = [p.x for p in corners], [p.y for p in corners]
    ax.step(x, y, where="pre" if rightwards else "post", color=HALO, linewidth=width, zorder=0)


def _draw_panel(
    ax: Axes,
    points: Sequence[Point],
    curves: Sequence[str],
    looks: Mapping[str, Look],
    sheet: Sheet,
    rightwards: bool,
    has_zero: bool,
) -> list[tuple[float, str]]:
    """Draw the full cache as a line and each curve; returns the places of budgets that many curves share."""
    style = sheet.style
    if has_zero:
        ax.axhline(0, color="black", linewidth=0.6 * style.scale, linestyle=":", zorder=1)
    for p in (p for p in points if p.curve == "full"):
        ax.axhline(p.y, color=looks["full"].color, linewidth=0.6 * style.scale, linestyle=":", zorder=1)
        draw_curve(ax, [p], looks["full"], style)
    by_budget: dict[str, list[float]] = {}
    drawn = [sorted((p for p in points if p.curve == curve), key=lambda p: (p.budget or 0, p.x)) for curve in curves]
    moved = [0.0] * len(drawn)
    if not rightwards:
        moved = shifts(drawn, style, 8 * style.scale, lambda a, b: max(a, b) <= (1 + SIDE_BY_SIDE) * min(a, b))
    for curve, own, shift in zip(curves, drawn, moved, strict=True):
        draw_curve(ax, own, looks[curve], style, shift)
        for p in own:
            if isinstance(p.budget, int) and len(own) > 1:
                by_budget.setdefault(budget_words(p.budget), []).append(p.x)
    shared = {b: sorted(xs) for b, xs in by_budget.items() if max(xs) <= (1 + SAME_PLACE) * min(xs)}
    if len(shared) < len(by_budget) or len(shared) < 2:  # some budget has several places: the legend names them all
        return []
    return sorted((xs[len(xs) // 2], budget) for budget, xs in shared.items())
