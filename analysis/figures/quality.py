"""Score against memory and against speed, with the Pareto front."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from ..held import share_read
from ..load import Run, average, fewer_is_better, setting
from .front import front_members
from .quality_draw import costs_and_merits, draw_quality
from .registry import FAMILIES
from .spec import (
    MIB,
    Context,
    FigureSpec,
    Options,
    Point,
    panels_by_family,
    score_words,
    settings_of,
    subject,
)

MIN_TIMED = 3  # methods that a figure of speed needs


def pareto(group: Sequence[Run], context: Context) -> Iterator[FigureSpec]:
    """Score, or its difference to the full cache, against the memory of the cache or the bytes that a step reads."""
    if len(group) < 2:
        return
    y, points, left_out = _scores(group, context)
    x_label, xs, dropped = _memory(group, context)
    kept = [_at(point, x) for point, x in zip(points, xs, strict=True) if point is not None and x is not None]
    left_out += dropped
    if not any(p.curve not in _baselines(context) for p in kept):
        return
    record, quantity = group[0].record, "bytes read" if context.options.x == "read" else "memory"
    caption = [
        *settings_of(group),
        _what_bars_are(y),
        "Grey: the Pareto front; a point with a grey disc is not significantly different from it "
        "(its interval reaches the line).",
        f"{quantity.capitalize()} {'is that' if quantity == 'memory' else 'are those'} of one sequence; points of "
        f"methods with the same {quantity} stand side by side.",
        *_left_out(left_out),
    ]
    yield _spec(
        "pareto",
        (group,),
        f"Quality against {quantity}: {subject(record)}",
        caption,
        (x_label, score_words(record, _with_y(context, y))),
        kept,
        context,
        log=context.options.x != "budget" or None,
    )


def speed(groups: Sequence[Sequence[Run]], context: Context) -> Iterator[FigureSpec]:
    """Score against decode throughput: each scored group with the timings of most of its methods."""
    timed = [g for g in groups if g[0].record["kind"] == "efficiency" and "search" not in g[0].record]
    for group in groups:
        if group[0].record["kind"] != "accuracy" or len(group) < 2:
            continue
        shared = {n: _shared(group, speeds) for n, speeds in enumerate(timed)}
        shared = {n: pairs for n, pairs in shared.items() if len(pairs) >= MIN_TIMED}
        if not shared:
            continue
        best = max(shared, key=lambda n: (len(shared[n]), max(run.record.get("finished", "") for run in timed[n])))
        yield _speed(group, timed[best], shared[best], context, [timed[n] for n in shared if n != best])


def _speed(
    group: Sequence[Run],
    speeds: Sequence[Run],
    pairs: Mapping[str, Run],
    context: Context,
    others: Sequence[Sequence[Run]],
) -> FigureSpec:
    y, points, left_out = _scores(group, context)
    kept = []
    for run, point in zip(group, points, strict=True):
        timing = pairs.get(_method(run))
        if point is None or timing is None:
            left_out += [(run.label, "not timed")] if timing is None else []
            continue
        found = timing.record["metrics"]["decode_tokens_per_s"]
        kept.append(_at(point, found["median"], found["min"], found["max"], (run.path, timing.path)))
    record, first = group[0].record, speeds[0].record
    caption = [
        *settings_of(group),
        f"Speed: {first['task']}, {setting(first, speeds)}; horizontal bars: least to greatest of the repetitions.",
        _what_bars_are(y),
        "Grey: the Pareto front; a point with a grey disc is not significantly different from it.",
        *(f"Not drawn: timings of {o[0].record['task']}, {setting(o[0].record, o)}." for o in others),
        *_left_out(left_out),
    ]
    return _spec(
        "speed",
        (group, speeds),
        f"Quality against speed: {subject(record)}",
        caption,
        ("decode throughput, tokens/s (median)", score_words(record, _with_y(context, y))),
        kept,
        context,
        log=False,
        faster_is_right=True,
        parts=(first["task"],),
    )


def _method(run: Run) -> str:
    return json.dumps(run.record["identity"]["method"], sort_keys=True)


def _shared(group: Sequence[Run], speeds: Sequence[Run]) -> dict[str, Run]:
    """Return the timings of a group's methods, where model, dtype and device are the same."""
    record, timed = group[0].record, speeds[0].record
    if any(record["identity"][key] != timed["identity"][key] for key in ("model", "dtype", "device")):
        return {}
    wanted = {_method(run) for run in group}
    return {_method(run): run for run in speeds if _method(run) in wanted}


def _baselines(context: Context) -> set[str]:
    return {curve for curve, look in context.looks.items() if look.family == "baseline"}


def _scores(group: Sequence[Run], context: Context) -> tuple[str, list[Point | None], list[tuple[str, str]]]:
    """Return ``difference`` or ``score``, a point without an x for each run, and what has none."""
    paired = [run for run in group if "difference" in run.record.get("paired", {})]
    y = "difference" if context.options.y == "difference" and paired else "score"
    points: list[Point | None] = []
    left_out = []
    for run in group:
        record = run.record
        if y == "score":
            found: Mapping[str, Any] = average(record)
        elif run.is_full_cache:
            found = {"mean": 0.0, "low": None, "high": None}
        elif "difference" in record.get("paired", {}):
            found = record["paired"]["difference"]
        else:
            left_out.append((run.label, "no paired difference in its record"))
            points.append(None)
            continue
        points.append(
            Point(run.curve, record["budget"], 0.0, found["mean"], found["low"], found["high"], runs=(run.path,))
        )
    return y, points, left_out


def _memory(group: Sequence[Run], context: Context) -> tuple[str, list[float | None], list[tuple[str, str]]]:
    """Return the label of the x axis, a place on it for each run, and what has none."""
    has_mean = all(run.record["bytes"].get("kv_bytes_mean") is not None for run in group)
    key = "kv_bytes_mean" if has_mean else "kv_bytes_stored"
    what = "mean KV cache over the run" if has_mean else "KV cache after the prompt"
    held = [run.record["bytes"][key] for run in group]
    full = next((size for run, size in zip(group, held, strict=True) if run.is_full_cache), None)
    if context.options.x == "budget":
        xs: list[float | None] = [
            run.record["budget"] if isinstance(run.record["budget"], int) else None for run in group
        ]
        reason = "no budget in tokens"
        label = "budget, tokens"
    elif context.options.x == "share":
        ratios = [run.record["bytes"].get("kv_ratio", 0.0) for run in group]
        xs = [
            100 * (ratio if full is None or not has_mean else size / full) or None
            for ratio, size in zip(ratios, held, strict=True)
        ]
        reason = "holds no cache, which has no place on a logarithmic axis"
        label = f"{what}, % of the full one"
    elif context.options.x == "read":
        xs = [100 * (share_read(run) or 0.0) or None for run in group]
        reason = "reads no cache, or its record does not say how much"
        label = "KV cache that a step reads, % of full"
    else:
        xs = [size / MIB or None for size in held]
        reason = "holds no cache, which has no place on a logarithmic axis"
        label = f"{what}, MiB"
    dropped = [(f"{run.label} ({_result(run)})", reason) for run, x in zip(group, xs, strict=True) if x is None]
    return label, xs, dropped


def _result(run: Run) -> str:
    """Return a run's number in words, for what a figure cannot show."""
    found = run.record.get("paired", {}).get("difference")
    if found is None:
        return f"score {average(run.record)['mean']:.3g}"
    ends = "" if found["low"] is None else f" [{found['low']:+.3g}, {found['high']:+.3g}]"
    return f"difference {found['mean']:+.3g}{ends}"


def _at(
    point: Point, x: float, low: float | None = None, high: float | None = None, runs: tuple[Any, ...] = ()
) -> Point:
    return Point(point.curve, point.budget, x, point.y, point.low, point.high, low, high, runs=runs or point.runs)


def _with_y(context: Context, y: str) -> Options:
    return replace(context.options, y=y)


def _what_bars_are(y: str) -> str:
    if y == "difference":
        return "Vertical bars: 95 % intervals of the paired difference to the full cache."
    return (
        "Vertical bars: 95 % intervals of each mean by itself; paired differences have narrower ones (--y difference)."
    )


def _left_out(pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Return a sentence for each reason, with the runs that are left out for it."""
    reasons = dict.fromkeys(reason for _, reason in pairs)
    return [f"Not drawn ({reason}): {', '.join(label for label, r in pairs if r == reason)}." for reason in reasons]


def _spec(
    kind: str,
    groups: tuple[Sequence[Run], ...],
    title: str,
    caption: Sequence[str],
    axes: tuple[str, str],
    points: Sequence[Point],
    context: Context,
    log: bool | None,
    faster_is_right: bool = False,
    parts: tuple[str, ...] = (),
) -> FigureSpec:
    loss = fewer_is_better(groups[0][0].record)
    y_scale = ("nats" if axes[1].startswith("difference") else "perplexity") if loss else "linear"
    baselines = _baselines(context)
    panels = panels_by_family({p.curve for p in points} - {"full"}, context.looks)
    if len(panels) > 1:  # the baselines are in every panel
        panels = [(name, [*curves]) for name, curves in panels if name != FAMILIES["baseline"]]
    shown = [name for name, _ in panels if name]
    title_of = {curve: name for name, curves in panels for curve in curves}
    points = [replace(p, panel=title_of.get(p.curve, "")) for p in _on_front(points, loss, faster_is_right)]
    draw = partial(
        draw_quality,
        points=points,
        panels=panels,
        looks=context.looks,
        axes=axes,
        log=log,
        loss=loss,
        y_scale=y_scale,
        rightwards=faster_is_right,
    )
    labels = [*shown, *(context.looks[c].name for _, curves in panels for c in curves if c not in baselines)]
    return FigureSpec(kind, groups, title, tuple(caption), *axes, tuple(points), tuple(labels), draw, parts)


def _on_front(points: Sequence[Point], loss: bool, rightwards: bool) -> list[Point]:
    """Return the points with those marked that do not differ significantly from the front."""
    ends = [p.low if loss else p.high for p in points]
    costs, merits = costs_and_merits(points, loss, rightwards)
    members = front_members(costs, merits, [None if end is None else (-end if loss else end) for end in ends])
    return [replace(p, on_front=i in members) for i, p in enumerate(points)]
