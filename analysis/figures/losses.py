"""Losses: by distance from the compressed context, and of architectures trained alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Any

from ..load import Run
from ..tables import at_best_rate
from .draw import (
    HALO,
    LINEAR_NATS,
    draw_curve,
    front_handle,
    handle,
    linear_axis,
    log_axis,
    nats_axis,
    set_limits,
    shifts,
)
from .front import front_line
from .layout import Sheet
from .registry import FAMILIES, Look
from .spec import MAX_CURVES, Context, FigureSpec, Point, budget_words, panels_by_family, settings_of, subject

NO_BUDGET = "No budget"
PANEL_EMS = 14.0


def distance(group: Sequence[Run], context: Context) -> Iterator[FigureSpec]:
    """Loss by distance from the compressed context, beyond the full cache's at the same place; a panel a budget."""
    full = next((run for run in group if run.is_full_cache and "by_distance" in run.record), None)
    measured = [run for run in group if "by_distance" in run.record and run is not full]
    if full is None or not measured:
        return
    baseline = full.record["by_distance"]["nats"]
    points, panels = [], []
    for budget in sorted({run.record["budget"] for run in measured}, key=lambda b: (b is not None, b or 0)):
        runs = [run for run in measured if run.record["budget"] == budget]
        name = NO_BUDGET if budget is None else f"Budget {budget_words(budget)}"
        families = panels_by_family({run.curve for run in runs}, context.looks)
        for family, curves in families:
            title = f"{name}: {family}" if family else name
            panels.append((title, curves))
            for run in (r for r in runs if r.curve in curves):
                found = run.record["by_distance"]
                points += [
                    Point(run.curve, budget, upto, nats - full_nats, panel=title, runs=(run.path, full.path))
                    for upto, nats, full_nats in zip(found["up_to_tokens"], found["nats"], baseline, strict=True)
                ]
    record = group[0].record
    caption = [
        *settings_of(group),
        "Loss beyond the full cache's at the same place; "
        f"the scale is linear up to {LINEAR_NATS} and logarithmic above. Means over the stretches, without intervals.",
    ]
    axes = ("tokens behind the compressed context, up to", "loss beyond the full cache's, nats per token")
    draw = partial(_draw_distance, points=points, panels=panels, looks=context.looks, axes=axes)
    labels = [*(title for title, _ in panels), *(context.looks[p.curve].name for p in points)]
    title = f"Loss by distance: {subject(record)}"
    yield FigureSpec(
        "distance", (group,), title, tuple(caption), *axes, tuple(points), tuple(dict.fromkeys(labels)), draw
    )


def _draw_distance(
    sheet: Sheet,
    points: Sequence[Point],
    panels: Sequence[tuple[str, list[str]]],
    looks: Mapping[str, Look],
    axes: tuple[str, str],
) -> None:
    style = sheet.style
    columns = min(len(panels), 3 if style.is_wide else 2)
    height = PANEL_EMS * style.em
    grid = sheet.grid(len(panels), columns, height)
    for ax, (title, curves) in zip(grid, panels, strict=True):
        for curve in curves:
            draw_curve(ax, [p for p in points if p.panel == title and p.curve == curve], looks[curve], style)
        ax.axhline(0, color="black", linewidth=0.6 * style.scale, linestyle=":", zorder=1)
        sheet.head(ax, title)
    sheet.shared_labels(*axes)
    first = grid[0]
    nats_axis(first, [p.y for p in points])
    first.set_xlim(left=0)
    linear_axis(first, "x", style, style.inches / columns - 4 * style.em)
    curves = list(dict.fromkeys(c for _, names in panels for c in names))
    sheet.legend([handle(looks[c], style) for c in curves], [looks[c].name for c in curves])


def trained(group: Sequence[Run], context: Context) -> Iterator[FigureSpec]:
    """Perplexity of architectures trained alike against bytes per token, those that do not grow included."""
    if len({run.label for run in group}) < 2:
        return
    points, seeds = [], []
    for runs in at_best_rate(group, reported=True).values():
        found = [run.record["validation"]["perplexity"] for run in runs]
        record = runs[0].record
        x = record["bytes"]["kv_bytes_per_token"] + record["bytes"]["kv_bytes_fixed"] / _sequence(record)
        paths = tuple(run.path for run in runs)
        points.append(Point(runs[0].curve, None, x, fmean(found), min(found), max(found), runs=paths))
        seeds.append([run.record["identity"]["seed"] for run in runs])
    record = group[0].record
    sequence = _sequence(record)
    caption = [
        *settings_of(group),
        *([f"Seeds {', '.join(map(str, seeds[0]))}."] if all(own == seeds[0] for own in seeds) else []),
        f"{record['training']['tokens']:,} tokens of training; each architecture at its best learning rate, chosen "
        "on the same held-out data by other seeds where there are any. Bars: least to greatest over the seeds. Grey: "
        "the Pareto front of the means.",
        f"Bytes that do not grow with the sequence (a sliding window's) are spread over its {sequence} tokens.",
    ]
    axes = (f"KV cache, bytes per token at {sequence} tokens", "perplexity on held-out data (lower is better)")
    draw = partial(_draw_trained, points=points, looks=context.looks, axes=axes)
    title = f"Architectures trained alike: {subject(record)}"
    labels = tuple(context.looks[p.curve].name for p in points)
    yield FigureSpec("trained", (group,), title, tuple(caption), *axes, tuple(points), labels, draw)


def _sequence(record: Mapping[str, Any]) -> int:
    """Return the number of tokens of a training sequence."""
    length: int = record["training"].get("sequence") or record["identity"]["train"].get("sequence") or 1
    return length


def _draw_trained(sheet: Sheet, points: Sequence[Point], looks: Mapping[str, Look], axes: tuple[str, str]) -> None:
    style = sheet.style
    panels = panels_by_family({p.curve for p in points}, looks)
    if len({looks[p.curve].family for p in points}) > 1 and len(points) <= MAX_CURVES + 1:
        panels = [("", [p.curve for p in points])]
    panels = [(name, curves) for name, curves in panels if name != FAMILIES["baseline"]]
    columns = min(len(panels), 2 if style.is_wide else 1)
    height = 1.2 * PANEL_EMS * style.em
    grid = sheet.grid(len(panels), columns, height)
    corners = [points[i] for i in front_line([p.x for p in points], [-p.y for p in points])]
    for number, (ax, (title, curves)) in enumerate(zip(grid, panels, strict=True)):
        ax.step(
            [p.x for p in corners],
            [p.y for p in corners],
            where="post",
            color=HALO,
            linewidth=2.2 * style.scale,
            zorder=0,
        )
        drawn = [[p for p in points if p.curve == curve] for curve in curves]
        moved = shifts(drawn, style, 12 * style.scale, lambda a, b: abs(a - b) <= 0.04 * a)
        for curve, own, shift in zip(curves, drawn, moved, strict=True):
            draw_curve(ax, own, looks[curve], style, shift)
        ax.set(xlabel=axes[0], ylabel=axes[1])
        if title:
            sheet.head(ax, title)
        handles = [*(handle(looks[c], style, False) for c in curves), front_handle(style)]
        sheet.legend(
            handles, [*(looks[c].name for c in curves), "Pareto front"], panel=number if len(panels) > 1 else None
        )
    set_limits(grid[0], points, log_x=True)
    log_axis(grid[0], "x", style, style.inches / columns - 5 * style.em)
    linear_axis(grid[0], "y", style, height)
