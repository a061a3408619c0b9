"""Time, throughput and memory over prompt length and batch size."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from ..load import Run, setting
from .draw import draw_curve, handle, linear_axis
from .layout import Sheet
from .registry import Look
from .spec import GIB, MIB, Context, FigureSpec, Point, budget_words, panels_by_family

PANEL_EMS = 15.0
Measure = tuple[str, Callable[[Run], tuple[float, float | None, float | None] | None]]


def _metric(name: str) -> Callable[[Run], tuple[float, float | None, float | None] | None]:
    def measured(run: Run) -> tuple[float, float | None, float | None] | None:
        found = run.record["metrics"].get(name)
        return None if found is None else (found["median"], found["min"], found["max"])

    return measured


def _cache(run: Run) -> tuple[float, None, None]:
    return run.record["bytes"]["kv_bytes_stored"] / MIB, None, None


def _peak(run: Run) -> tuple[float, None, None] | None:
    """Return the larger one of both phases' peaks; None where one was not measured."""
    peaks = [run.record["memory"].get(phase) for phase in ("peak_prefill", "peak_decode")]
    return (max(peak["allocated"] for peak in peaks if peak) / GIB, None, None) if all(peaks) else None


TIME: tuple[Measure, ...] = (("time per output token, ms (median)", _metric("tpot_ms")),)
MEMORY: tuple[Measure, ...] = (
    ("KV cache after the prompt, MiB", _cache),
    ("peak memory of the process or device, GiB", _peak),
)
BATCH: tuple[Measure, ...] = (
    ("output tokens/s (median)", _metric("output_tokens_per_s")),
    ("peak memory, GiB", _peak),
)


def length(groups: Sequence[Sequence[Run]], context: Context) -> Iterator[FigureSpec]:
    """Time per token over prompt length, of workloads that differ in their prompt's length alone."""
    for family in _along(groups, _prompt_tokens, ("prompt_tokens", "source")):
        yield from _spec(
            "length",
            "Time per output token over length",
            family,
            context,
            _prompt_tokens,
            "prompt length, tokens",
            TIME,
        )


def memory(groups: Sequence[Sequence[Run]], context: Context) -> Iterator[FigureSpec]:
    """Memory over prompt length: the cache's own bytes and the peak."""
    for family in _along(groups, _prompt_tokens, ("prompt_tokens", "source")):
        yield from _spec(
            "memory", "Memory over length", family, context, _prompt_tokens, "prompt length, tokens", MEMORY
        )


def batch(groups: Sequence[Sequence[Run]], context: Context) -> Iterator[FigureSpec]:
    """Throughput and peak memory over batch size, as in PyramidInfer's figure 11 and MiniCache's figure 5."""
    for family in _along(groups, _batch_size, ("limit", "batch_size")):
        yield from _spec(
            "batch", "Throughput and memory over batch size", family, context, _batch_size, "batch size", BATCH
        )


def _prompt_tokens(record: Mapping[str, Any]) -> int | None:
    found: int | None = record["identity"]["task"].get("prompt_tokens")
    return found


def _batch_size(record: Mapping[str, Any]) -> int | None:
    found: int | None = record["identity"].get("batch_size")
    return found


def _along(
    groups: Sequence[Sequence[Run]], value: Callable[[Mapping[str, Any]], int | None], names: Sequence[str]
) -> Iterator[list[Run]]:
    """Yield groups that differ in one number alone, as one list each; ``names`` are the fields that follow it."""
    families: dict[str, list[Run]] = {}
    for group in groups:
        record = group[0].record
        if record["kind"] == "efficiency" and "search" not in record and value(record) is not None:
            task = {k: v for k, v in record["identity"]["task"].items() if k not in names}
            others = {k: v for k, v in record["identity"].items() if k not in ("method", "task", *names)}
            families.setdefault(json.dumps([task, others], sort_keys=True), []).extend(group)
    yield from (f for f in families.values() if len({value(run.record) for run in f}) > 1)


def _spec(
    kind: str,
    title: str,
    family: Sequence[Run],
    context: Context,
    value: Callable[[Mapping[str, Any]], int | None],
    x_label: str,
    measures: Sequence[Measure],
) -> Iterator[FigureSpec]:
    """Yield a panel a measure, or a panel a family of methods and measure where there are many methods."""
    families = panels_by_family({run.curve for run in family}, context.looks)
    points, panels = [], []
    for y_label, measure in measures:
        for name, curves in families:
            panel = f"{y_label}\n{name}" if name else y_label
            for run in (r for r in family if r.curve in curves):
                found, x = measure(run), value(run.record)
                if found is not None and x is not None:
                    points.append(Point(run.curve, run.record["budget"], x, *found, panel=panel, runs=(run.path,)))
            if len({p.x for p in points if p.panel == panel}) > 1:
                panels.append((panel, y_label, name))
    if not panels:
        return
    record = family[0].record
    words = setting(record, family)
    if kind == "batch":
        words = words.replace(f", batch {_batch_size(record)}", "")
    caption = [f"{words}.", "Bars: least to greatest of the repetitions."]
    lines = {(p.curve, p.budget) for p in points}
    draw = partial(_draw, points=points, panels=panels, looks=context.looks, x_label=x_label)
    labels = [_line_name(context.looks[curve], budget) for curve, budget in lines]
    shown = f"{title}: {record['model']}" if kind != "batch" else f"{title}: {record['task']}, {record['model']}"
    yield FigureSpec(
        kind, (family,), shown, tuple(caption), x_label, measures[0][0], tuple(points), tuple(labels), draw
    )


def _line_name(look: Look, budget: int | float | None) -> str:
    return look.name if budget is None else f"{look.name}, budget {budget_words(budget)}"


def _draw(
    sheet: Sheet,
    points: Sequence[Point],
    panels: Sequence[tuple[str, str, str]],
    looks: Mapping[str, Look],
    x_label: str,
) -> None:
    style = sheet.style
    columns = min(len(panels), 2 if style.is_wide else 1)
    height = PANEL_EMS * style.em
    grid = sheet.grid(len(panels), columns, height, share_y=False)
    lines: dict[tuple[str, int | float | None], Look] = {}
    for number, (ax, (panel, y_label, name)) in enumerate(zip(grid, panels, strict=True)):
        own = [p for p in points if p.panel == panel]
        for curve, budget in dict.fromkeys((p.curve, p.budget) for p in own):
            lines[curve, budget] = looks[curve]
            draw_curve(
                ax,
                sorted((p for p in own if (p.curve, p.budget) == (curve, budget)), key=lambda p: p.x),
                looks[curve],
                style,
            )
        ax.set(xlabel=x_label if sheet.lowest(number) else "", ylabel=y_label)
        if name:
            sheet.head(ax, name)
        ax.set_ylim(bottom=0)
        linear_axis(ax, "y", style, height)
    grid[0].set_xlim(left=0)
    linear_axis(grid[0], "x", style, style.inches / columns - 5 * style.em)
    sheet.legend(
        [handle(look, style) for look in lines.values()],
        [_line_name(look, budget) for (_, budget), look in lines.items()],
    )
