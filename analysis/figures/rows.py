"""Figures of one row a run: differences to the full cache, times of single steps, memory before and after."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from ..load import Run, fewer_is_better
from .draw import bars, linear_axis, log_axis, marker_style, rows_axis, set_limits
from .layout import Sheet
from .registry import FAMILIES, Look
from .spec import MIB, Context, FigureSpec, Point, named, settings_of, subject
from .style import MAX_HEIGHT_INCHES, wrapped

ROW_EMS = 1.35
LABEL_SHARE = 0.36  # of the width of a panel and its labels
FEW_ROWS = 24
MAX_ROWS = 40  # of a figure; more are several figures


@dataclass(frozen=True)
class Row:
    """One run.

    Attributes:
        label: Name with the budget.
        look: Of the method.
        values: Numbers or None; the meaning is the figure's.
        runs: The run.
    """

    label: str
    look: Look
    values: Mapping[str, Any]
    run: Run


Marks = Mapping[str, Any]
OPEN: Marks = {"marker": "o", "markerfacecolor": "white"}
FILLED: Marks = {"marker": "o"}
THICK: Marks = {"linestyle": "-", "linewidth": 2.4}
THIN: Marks = {"linestyle": "-", "linewidth": 0.6}
STROKE: Marks = {"marker": "|", "markersize": 7, "markeredgewidth": 1.2}
DrawRow = Callable[[Axes, float, Row, Sheet], None]


def forest(group: Sequence[Run], context: Context) -> Iterator[FigureSpec]:
    """Paired difference of each run to the full cache, with its interval."""
    paired = [run for run in group if "difference" in run.record.get("paired", {})]
    if not paired:
        return
    rows = [
        _row(run, context, {k: run.record["paired"]["difference"][k] for k in ("mean", "low", "high")})
        for run in paired
    ]
    record = group[0].record
    unit = "nats per token; lower is better" if fewer_is_better(record) else "points"
    caption = [
        *settings_of(group),
        "Mean paired difference to the full cache with its 95 % interval, not corrected for the number of rows; "
        "a white marker: the interval holds zero.",
    ]
    label = f"difference to the full cache ({unit})"
    title = f"Differences to the full cache: {subject(record)}"
    yield from _specs(
        "forest",
        group,
        title,
        caption,
        label,
        rows,
        _draw_difference,
        zero=True,
        legend=((OPEN, "interval holds zero"), (FILLED, "it does not")),
    )


def step_times(group: Sequence[Run], context: Context) -> Iterator[FigureSpec]:
    """Distribution of the times of single decode steps."""
    timed = [run for run in group if "step_ms" in run.record.get("metrics", {})]
    if not timed:
        return
    keys = ("median", "p90", "p99", "min", "max")
    rows = [_row(run, context, {k: run.record["metrics"]["step_ms"].get(k) for k in keys}) for run in timed]
    steps = sorted({run.record["metrics"]["step_ms"]["steps"] for run in timed})
    caption = [
        *settings_of(group),
        f"Single decode steps ({', '.join(map(str, steps))} a run): thin line, least to greatest; thick line, median "
        "to 90th percentile; bar, 99th percentile; marker, median.",
    ]
    yield from _specs(
        "steps",
        group,
        f"Times of single decode steps: {subject(group[0].record)}",
        caption,
        "ms per decode step",
        rows,
        _draw_steps,
        log=True,
        legend=(
            (FILLED, "median"),
            (THICK, "to 90th percentile"),
            (STROKE, "99th percentile"),
            (THIN, "least to greatest"),
        ),
    )


def footprint(group: Sequence[Run], context: Context) -> Iterator[FigureSpec]:
    """Memory of the cache after the prompt, at the end of the generation and, where recorded, on average."""
    held = [run for run in group if run.record["bytes"].get("kv_bytes_stored_end")]
    if len(held) < 2 or all(
        r.record["bytes"]["kv_bytes_stored_end"] == r.record["bytes"]["kv_bytes_stored"] for r in held
    ):
        return
    names = {"start": "kv_bytes_stored", "end": "kv_bytes_stored_end", "mean": "kv_bytes_mean"}
    rows = []
    for run in held:
        found = {key: run.record["bytes"].get(name) for key, name in names.items()}
        rows.append(_row(run, context, {key: None if not size else size / MIB for key, size in found.items()}))
    caption = [
        *settings_of(group),
        "White marker: after the prompt; filled marker: after the last token; bar: mean over the run, where recorded.",
    ]
    title = f"Memory over a generation: {subject(group[0].record)}"
    legend = [(OPEN, "after the prompt"), (FILLED, "after the last token")]
    legend += [(STROKE, "mean over the run")] if any(row.values["mean"] for row in rows) else []
    x_label = "KV cache, MiB per sequence"
    yield from _specs("footprint", group, title, caption, x_label, rows, _draw_footprint, log=True, legend=legend)


def _row(run: Run, context: Context, values: Mapping[str, float | None]) -> Row:
    look = context.looks[run.curve]
    return Row(named(look, run.record["budget"]), look, values, run)


def _specs(
    kind: str,
    group: Sequence[Run],
    title: str,
    caption: Sequence[str],
    x_label: str,
    rows: Sequence[Row],
    draw_row: DrawRow,
    zero: bool = False,
    log: bool = False,
    legend: Sequence[tuple[Marks, str]] = (),
) -> Iterator[FigureSpec]:
    """Yield one figure of all rows by family, or several where there are many."""
    families = list(FAMILIES)
    rows = sorted(rows, key=lambda r: (families.index(r.look.family), r.look.name.lower(), r.run.record["budget"] or 0))
    count = -(-len(rows) // MAX_ROWS)
    size = -(-len(rows) // count)
    for part in range(count):
        shown = rows[part * size : (part + 1) * size]
        draw = partial(_draw, rows=shown, x_label=x_label, draw_row=draw_row, zero=zero, log=log, legend=legend)
        yield FigureSpec(
            kind,
            (group,),
            title if count == 1 else f"{title} ({part + 1} of {count})",
            tuple(caption),
            x_label,
            "",
            tuple(map(_point, shown)),
            tuple(row.label for row in shown),
            draw,
            () if count == 1 else (f"part-{part + 1}",),
        )


def _point(row: Row) -> Point:
    values = row.values
    middle = next(values[key] for key in ("median", "end", "mean") if values.get(key) is not None)
    low = next((values[key] for key in ("low", "min", "start") if key in values), None)
    high = next((values[key] for key in ("high", "max", "end") if key in values), None)
    assert middle is not None
    return Point(row.run.curve, row.run.record["budget"], middle, 0.0, x_low=low, x_high=high, runs=(row.run.path,))


def _draw(
    sheet: Sheet,
    rows: Sequence[Row],
    x_label: str,
    draw_row: DrawRow,
    zero: bool,
    log: bool,
    legend: Sequence[tuple[Marks, str]],
) -> None:
    """One column of rows, or two where there are many and the figure is wide."""
    style = sheet.style
    fits = int((MAX_HEIGHT_INCHES - 4 * style.em) / (ROW_EMS * style.em))
    columns = 2 if style.is_wide and len(rows) > FEW_ROWS else 1
    columns = max(columns, -(-len(rows) // fits)) if style.is_wide else columns
    size = -(-len(rows) // columns)
    parts = [rows[i * size : (i + 1) * size] for i in range(columns)]
    parts = [part for part in parts if part]
    cell = style.inches / len(parts)
    labels = [[wrapped(r.label, LABEL_SHARE * cell, style.text_pt) for r in part] for part in parts]
    lines = [[text.count("\n") + 1 for text in column] for column in labels]
    height = max(sum(column) for column in lines) * ROW_EMS * style.em
    grid = sheet.grid(len(parts), len(parts), height, share_y=False)
    most = max(sum(column) for column in lines)
    for ax, part, texts, counts in zip(grid, parts, labels, lines, strict=True):
        places = [sum(counts[:i]) + (count - 1) / 2 for i, count in enumerate(counts)]
        rows_axis(ax, texts)
        ax.set_yticks(places, texts)
        ax.set_ylim(most - 0.4, -0.6)
        ax.grid(axis="y", visible=False)
        for place, row in zip(places, part, strict=True):
            draw_row(ax, place, row, sheet)
        if zero:
            ax.axvline(0, color="black", linewidth=0.6 * style.scale, zorder=1)
        ax.set_xlabel(wrapped(x_label, (1 - LABEL_SHARE) * cell - 2 * style.em, style.text_pt))
    grey = {"color": "#555555", "linestyle": "none", "markersize": 4 * style.scale}
    sheet.legend([Line2D([], [], **{**grey, **look}) for look, _ in legend], [text for _, text in legend])
    values = [value for row in rows for value in row.values.values() if value is not None and (value > 0 or not log)]
    set_limits(grid[0], [Point("", None, value, 0.0) for value in values], log, both=False)
    width = (1 - LABEL_SHARE) * cell
    log_axis(grid[0], "x", style, width) if log else linear_axis(grid[0], "x", style, width)


def _draw_difference(ax: Axes, y: float, row: Row, sheet: Sheet) -> None:
    mean, low, high = row.values["mean"], row.values["low"], row.values["high"]
    assert mean is not None
    holds_zero = low is None or high is None or low <= 0 <= high
    marker = marker_style(row.look, sheet.style)
    if holds_zero:
        marker |= {"markerfacecolor": "white", "fillstyle": "full"}
    ax.errorbar(
        [mean], [y], xerr=bars([(mean, low, high)]), elinewidth=0.9 * sheet.style.scale, linestyle="none", **marker
    )


def _draw_steps(ax: Axes, y: float, row: Row, sheet: Sheet) -> None:
    values, scale = row.values, sheet.style.scale
    ax.hlines([y], values["min"], values["max"], color=row.look.color, linewidth=0.6 * scale)
    ax.hlines([y], values["median"], values["p90"], color=row.look.color, linewidth=2.4 * scale)
    ax.plot([values["p99"]], [y], "|", color=row.look.color, markersize=6 * scale, markeredgewidth=1.2 * scale)
    ax.plot([values["median"]], [y], linestyle="none", **marker_style(row.look, sheet.style))


def _draw_footprint(ax: Axes, y: float, row: Row, sheet: Sheet) -> None:
    marker = marker_style(row.look, sheet.style)
    values, scale = row.values, sheet.style.scale
    if values["start"] is not None:
        ax.hlines([y], values["start"], values["end"], color=row.look.color, linewidth=0.9 * scale)
        ax.plot([values["start"]], [y], linestyle="none", **{**marker, "markerfacecolor": "white", "fillstyle": "full"})
    if values["mean"] is not None:
        ax.plot([values["mean"]], [y], "|", color=row.look.color, markersize=6 * scale, markeredgewidth=1.2 * scale)
    ax.plot(
        [values["end"]], [y], linestyle="none", **{**marker, "markerfacecolor": row.look.color, "fillstyle": "full"}
    )
