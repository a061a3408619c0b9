"""Figures of finished runs, from their records alone: SVG, PNG, and the points behind each as CSV.

    kvbench plot results/reference -o figures

makes, for every group of comparable runs,

* ``pareto-bytes-...``: score against the bytes of KV cache that a sequence takes, with 95 % intervals;
* ``pareto-speed-...``: score against decode throughput, where the same methods were timed on the same model and dtype;
* ``length-...``: time per token against prompt length, where one workload was measured at several lengths;
* ``heat-...``: for needles, score over length and depth, a panel a method;
* ``distance-...``: for perplexity, the loss beyond the full cache's by distance from the compressed context;
* ``trained-...``: perplexity on held-out data against bytes of KV cache per token, of architectures trained alike.

A method has the same colour and marker in every figure.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox

from ..conf.errors import InputError
from .heat_maps import draw as draw_heat
from .heat_maps import heat_map, is_needle
from .load import Run, average, by_budget, comparable, fewer_is_better, load, longbench_rows, setting
from .pareto import frontier
from .tables import GIB, MIB, at_best_rate

PALETTE = (
    *("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#e377c2", "#17becf", "#bcbd22", "#393b79"),
    *("#843c39", "#637939", "#7b4173", "#e7969c", "#3182bd"),
)
MARKERS = "os^vDP*X<>hpd8H"
LINES = ("-", "--", ":", "-.")

# A look of their own for the families that are compared most; any other method gets one from its name.
KNOWN = (
    *("snapkv", "streaming_llm", "h2o", "tova", "pyramidkv", "ada_kv", "pyramid_infer", "kivi", "minicache"),
    *("cla", "yoco", "lckv", "no_cache", "key_diff", "expected_attention"),
)


@dataclass(frozen=True)
class Look:
    """Colour and marker of a method."""

    color: str
    marker: str


def look(method: str) -> Look:
    """The same for a method in every figure, whatever else is in it; the full cache is black."""
    if method == "full":
        return Look("#000000", "*")
    if method in KNOWN:
        number = KNOWN.index(method)
    else:
        number = int(hashlib.sha256(method.encode()).hexdigest(), 16) % len(PALETTE)
    return Look(PALETTE[number], MARKERS[number])


@dataclass(frozen=True)
class Point:
    """One run in a figure.

    Attributes:
        family: points of one family are joined by a line: a method and its settings, whatever its budget.
        mark: what stands beside the point: the budget.
        x, y: where it stands; low and high: 95 % interval of y, or spread, or None.
        runs: the folders that its numbers come from.
    """

    family: str
    method: str
    mark: str
    x: float
    y: float
    low: float | None
    high: float | None
    runs: tuple[Path, ...]


@dataclass(frozen=True)
class Plot:
    """One figure before it is drawn."""

    name: str
    title: str
    x_label: str
    y_label: str
    points: list[Point]
    draw: Callable[[Axes, Plot], None] | None = None
    panels: Callable[[Figure], None] | None = None  # instead of ``draw``, where there is more than one pair of axes


# which figures there are ---------------------------------------------------------------------------------------------


def plots(runs: Sequence[Run]) -> Iterator[Plot]:
    """Every figure that these runs can fill."""
    groups = comparable([run for run in runs if run.done])
    scored = [g for g in groups if g[0].record["kind"] == "accuracy" and len(g) > 1]
    timed = [g for g in groups if g[0].record["kind"] == "efficiency" and "search" not in g[0].record]
    for group in scored:
        yield pareto_bytes(group)
    for group in groups:
        if is_needle(group[0]):
            yield from heat_maps(group)
        if "by_distance" in group[0].record:
            yield from by_distance(group)
    for group in scored:
        for speeds in timed:
            plot = pareto_speed(group, speeds)
            if plot is not None:
                yield plot
    yield from lengths(timed)
    yield from batch_sizes(timed)
    for group in groups:
        if group[0].record["kind"] == "train" and len({run.label for run in group}) > 1:
            yield trained(group)


def trained(group: Sequence[Run]) -> Plot:
    """Perplexity against bytes per token, each architecture at the learning rate that suits it; bars over seeds."""
    points = []
    for label, runs in at_best_rate(group).items():
        found = [run.record["validation"]["perplexity"] for run in runs]
        x = runs[0].record["bytes"]["kv_bytes_per_token"]
        spread = (min(found), max(found))
        points.append(Point(label, label, "", x, fmean(found), *spread, tuple(run.path for run in runs)))
    first = group[0].record
    return Plot(
        _name("trained", group),
        f"{first['task']}, {first['model']}: {first['training']['tokens']:,} tokens of training",
        "KV cache, bytes per token (log)",
        "perplexity on held-out data (bars: least to greatest over seeds)",
        points,
        _draw_pareto(left_is_better=True, log=True, up_is_better=False),
    )


def heat_maps(group: Sequence[Run]) -> Iterator[Plot]:
    """Score over length and depth of the needle, the methods of one budget side by side."""
    first = group[0].record
    for budget, runs in by_budget(group):
        maps = [heat_map(run) for run in runs]
        points = [
            Point(one.label, run.record["method"], f"{depth:.3f}", length, score, None, None, (one.run,))
            for run, one in zip(runs, maps, strict=True)
            for depth, row in zip(one.depths, one.scores, strict=True)
            for length, score in zip(one.lengths, row, strict=True)
        ]
        yield Plot(
            _name("-".join(["heat", *budget.split()]), group),
            _budget_title(first, budget, runs),
            "prompt length, tokens",
            "score",
            points,
            panels=lambda figure, maps=maps: draw_heat(figure, maps),  # type: ignore[misc]
        )


def by_distance(group: Sequence[Run]) -> Iterator[Plot]:
    """Loss of the tokens up to each distance behind the compressed context, beyond the full cache's at the same place.

    What is left of it is the method's; how hard the text is at that place is gone.
    """
    full = next((run for run in group if run.is_full_cache), None)
    if full is None:
        return
    first, baseline = full.record, full.record["by_distance"]["nats"]
    for budget, runs in by_budget(group):
        points = []
        for run in runs:
            found = run.record["by_distance"]
            for distance, nats, theirs in zip(found["up_to_tokens"], found["nats"], baseline, strict=True):
                method = run.record["method"]
                points.append(Point(run.label, method, "", distance, nats - theirs, None, None, (run.path,)))
        yield Plot(
            _name("-".join(["distance", *budget.split()]), group),
            _budget_title(first, budget, runs),
            "tokens behind the compressed context, up to",
            "loss beyond the full cache's, nats per token",
            points,
            _draw_distance,
        )


def pareto_bytes(group: Sequence[Run]) -> Plot:
    """Score against stored bytes of KV cache per sequence."""
    points = [_point(run, run.record["bytes"]["kv_bytes_stored"] / MIB, run.path) for run in group]
    first = group[0].record
    return Plot(
        _name("pareto-bytes", group),
        f"{_data_title(first)}, {first['model']}\n{setting(first, group)}",
        "KV cache stored after the prompt, MiB per sequence (log)",
        _score_label(first),
        [p for p in points if p.x > 0],  # no cache at all has no place on a logarithmic axis
        _draw_pareto(True, log=True, up_is_better=not fewer_is_better(first), log_score=fewer_is_better(first)),
    )


def pareto_speed(group: Sequence[Run], speeds: Sequence[Run]) -> Plot | None:
    """Score against decode throughput, of the methods that both groups have; None where they have fewer than two."""
    first, timed = group[0].record, speeds[0].record
    for key in ("model", "dtype", "device"):
        if first["identity"][key] != timed["identity"][key]:
            return None
    by_method = {json.dumps(run.record["identity"]["method"], sort_keys=True): run for run in speeds}
    points = []
    for run in group:
        match = by_method.get(json.dumps(run.record["identity"]["method"], sort_keys=True))
        if match is not None:
            points.append(_point(run, match.record["metrics"]["decode_tokens_per_s"]["median"], run.path, match.path))
    if len(points) < 2:
        return None
    return Plot(
        _name(f"pareto-speed-{timed['task']}-batch{timed['identity']['batch_size']}", group, speeds),
        f"{_data_title(first)}, {first['model']}\nspeed: {timed['task']}, {setting(timed, [*group, *speeds])}",
        "decode throughput, tokens/s (median)",
        _score_label(first),
        points,
        _draw_pareto(left_is_better=False, log=False, up_is_better=not fewer_is_better(first)),
    )


def lengths(timed: Sequence[Sequence[Run]]) -> Iterator[Plot]:
    """Time per token against prompt length: workloads of one shape that differ in their prompt's length alone."""

    def length(record: Mapping[str, Any]) -> int | None:
        found: int | None = record["identity"]["task"].get("prompt_tokens")
        return found

    for family in _families_along(timed, length, ("prompt_tokens", "source")):
        first = family[0].record
        yield Plot(
            _name("length", family),
            f"Time per output token, {first['model']}\n{setting(first, family)}",
            "prompt length, tokens",
            "TPOT, ms (median; bars: min to max)",
            [_measured(run, "tpot_ms", length(run.record)) for run in family],
            _draw_lengths,
        )


def batch_sizes(timed: Sequence[Sequence[Run]]) -> Iterator[Plot]:
    """Throughput and peak memory against batch size, as in PyramidInfer's figure 11 and MiniCache's figure 5."""

    def batch(record: Mapping[str, Any]) -> int | None:
        found: int | None = record["identity"]["batch_size"]
        return found

    for family in _families_along(timed, batch, ("limit", "batch_size")):
        first = family[0].record
        title = f"{first['task']}, {first['model']}\n{setting(first, family)}".replace(f", batch {batch(first)}", "")
        yield Plot(
            _name("batch-throughput", family),
            f"Throughput, {title}",
            "batch size",
            "output tokens/s (median; bars: min to max)",
            [_measured(run, "output_tokens_per_s", batch(run.record)) for run in family],
            _draw_lengths,
        )
        points = []
        for run in family:
            peaks = [run.record["memory"][phase] for phase in ("peak_prefill", "peak_decode")]
            if all(peaks):
                y = max(peak["allocated"] for peak in peaks) / GIB
                points.append(Point(run.label, run.record["method"], "", batch(run.record) or 0, y, y, y, (run.path,)))
        if len({p.x for p in points}) > 1:
            yield Plot(
                _name("batch-memory", family),
                f"Peak memory, {title}",
                "batch size",
                "peak memory, GiB",
                points,
                _draw_lengths,
            )


def _families_along(
    timed: Sequence[Sequence[Run]], value: Callable[[Mapping[str, Any]], int | None], names: Sequence[str]
) -> Iterator[list[Run]]:
    """Groups that differ in one number alone, as one list each; ``names`` are the fields that follow it."""
    families: dict[str, list[Run]] = {}
    for group in timed:
        record = group[0].record
        if value(record) is not None:
            task = {k: v for k, v in record["identity"]["task"].items() if k not in names}
            rest = {k: v for k, v in record["identity"].items() if k not in ("method", "task", *names)}
            families.setdefault(json.dumps([task, rest], sort_keys=True), []).extend(group)
    yield from (f for f in families.values() if len({value(run.record) for run in f}) > 1)


def _measured(run: Run, metric: str, x: int | None) -> Point:
    """A run's metric with its range at ``x``."""
    found = run.record["metrics"][metric]
    return Point(run.label, run.record["method"], "", x or 0, found["median"], found["min"], found["max"], (run.path,))


def _point(run: Run, x: float, *runs: Path) -> Point:
    """A run's mean score with its interval at ``x``."""
    score, budget = average(run.record), run.record["budget"]
    mark = "" if budget is None else str(budget)
    return Point(run.curve, run.record["method"], mark, x, score["mean"], score["low"], score["high"], runs)


def _score_label(record: Mapping[str, Any]) -> str:
    return "perplexity" if fewer_is_better(record) else "mean score over the data sets"


def _data_title(record: Mapping[str, Any]) -> str:
    what = {"mini": " (bundled set, not LongBench)", "subset": " (part of the rows)", None: ""}[longbench_rows(record)]
    return f"{record['task']}{what}"


def _budget_title(record: Mapping[str, Any], budget: str, runs: Sequence[Run]) -> str:
    """Of a figure of one budget; ``budget`` is empty where no run has one."""
    return f"{_data_title(record)}, {record['model']}, {budget}".removesuffix(", ") + f"\n{setting(record, runs)}"


def _name(kind: str, *groups: Sequence[Run]) -> str:
    """File name: what is shown, and a hash of all settings, so that no two figures have the same one."""
    record = groups[0][0].record
    left_out = ("method", "task") if kind == "length" else ("method",)
    rest = [{k: v for k, v in g[0].record["identity"].items() if k not in left_out} for g in groups]
    number = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:6]
    parts = [kind] + ([] if kind == "length" else [record["task"]]) + [record["model"], number]
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", "-".join(parts))


# drawing ------------------------------------------------------------------------------------------------------------


def _draw_pareto(
    left_is_better: bool, log: bool, up_is_better: bool = True, log_score: bool = False
) -> Callable[[Axes, Plot], None]:
    def draw(ax: Axes, plot: Plot) -> None:
        seen: Counter[str] = Counter()
        for family, method, points in _families(plot.points):
            style = look(method)
            line = LINES[seen[method] % len(LINES)]  # several settings of one method share its colour, not its line
            seen[method] += 1
            alone = method == "full"
            ax.errorbar(
                [p.x for p in points],
                [p.y for p in points],
                yerr=_bars(points),
                color=style.color,
                marker=style.marker,
                markersize=10 if alone else 6,
                linestyle="none" if len(points) == 1 else line,
                linewidth=1.4,
                elinewidth=0.8,
                capsize=2,
                label=family,
                zorder=4 if alone else 3,
            )
            if alone:
                ax.axhline(points[0].y, color=style.color, linewidth=0.7, linestyle=":", zorder=1)
        costs = [p.x if left_is_better else -p.x for p in plot.points]
        merits = [p.y if up_is_better else -p.y for p in plot.points]
        best = [plot.points[i] for i in frontier(costs, merits)]
        where = "post" if left_is_better else "pre"
        best.sort(key=lambda p: p.x)
        ax.step(
            [p.x for p in best],
            [p.y for p in best],
            where=where,  # type: ignore[arg-type]
            color="#bbbbbb",
            linewidth=5,
            alpha=0.5,
            zorder=0,
            label="Pareto frontier",
        )
        for axis, wanted in ((ax.xaxis, log), (ax.yaxis, log_score)):
            if wanted:
                getattr(ax, f"set_{axis.axis_name}scale")("log", base=2)
                axis.set_major_locator(LogLocator(base=2, numticks=12))
                axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                axis.set_minor_formatter(NullFormatter())

    return draw


def _draw_lengths(ax: Axes, plot: Plot) -> None:
    for family, method, points in _families(plot.points):
        style = look(method)
        ax.errorbar(
            [p.x for p in points],
            [p.y for p in points],
            yerr=_bars(points),
            color=style.color,
            marker=style.marker,
            linewidth=1.4,
            elinewidth=0.8,
            capsize=2,
            label=family,
        )
    ax.set_ylim(bottom=0)
    ax.set_xlim(left=0)


def _draw_distance(ax: Axes, plot: Plot) -> None:
    _draw_lengths(ax, plot)
    ax.set_yscale("symlog", linthresh=0.1)
    ax.set_yticks([0, 0.05, 0.1, 0.2, 0.5, 1, 2, 5])
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    values = [p.y for p in plot.points]
    ax.set_ylim(min(*values, 0) - 0.02, 1.2 * max(*values, 0.1))


def _families(points: Sequence[Point]) -> Iterator[tuple[str, str, list[Point]]]:
    """(family, method, its points by budget, or by x where they have none)."""
    for family in dict.fromkeys(p.family for p in points):
        mine = sorted((p for p in points if p.family == family), key=lambda p: float(p.mark) if p.mark else p.x)
        yield family, mine[0].method, mine


def _bars(points: Sequence[Point]) -> list[list[float]]:
    """[[below ...], [above ...]]; 0 where there is no interval."""
    return [
        [0.0 if p.low is None else max(0.0, p.y - p.low) for p in points],
        [0.0 if p.high is None else max(0.0, p.high - p.y) for p in points],
    ]


def _mark(figure: Figure, ax: Axes, points: Sequence[Point]) -> None:
    """Write each point's budget beside it, at the first of a few places where it covers no other text or point."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    taken: list[Bbox] = []
    spots = ax.transData.transform([(p.x, p.y) for p in points])
    for p in points:
        if not p.mark:
            continue
        for dx, dy in ((6, -12), (6, 6), (-6, 6), (-6, -12), (6, 16), (6, -22), (-6, 16), (-6, -22)):
            text: Annotation = ax.annotate(
                p.mark,
                (p.x, p.y),
                xytext=(dx, dy),
                textcoords="offset points",
                ha="left" if dx > 0 else "right",
                fontsize=7.5,
                color=look(p.method).color,
            )
            box = text.get_window_extent(renderer).padded(1)
            if not any(box.overlaps(other) for other in taken) and not any(box.contains(x, y) for x, y in spots):
                taken.append(box)
                break
            text.remove()


# The same records give the same bytes: no date and no random ids in the SVG.
STYLE: Any = {"svg.hashsalt": "kvbench", "font.size": 9, "axes.grid": True, "grid.alpha": 0.25}


def figure(plot: Plot) -> Figure:
    """The drawn figure; in a notebook it shows itself."""
    with mpl.rc_context(STYLE):
        made = Figure(figsize=(6.4, 4.4), layout="constrained")
        # Beside the legend there is room for so many characters.
        title = "\n".join(line for part in plot.title.split("\n") for line in textwrap.wrap(part, 64))
        if plot.panels is not None:
            plot.panels(made)
            made.suptitle(title, fontsize=9)
            return made
        ax = made.add_subplot()
        assert plot.draw is not None
        plot.draw(ax, plot)
        ax.set(xlabel=plot.x_label, ylabel=plot.y_label)
        ax.set_title(title, fontsize=9)
        ax.spines[["top", "right"]].set_visible(False)
        ax.margins(x=0.08, y=0.08)
        made.legend(loc="outside right upper", fontsize=8, frameon=False)
        _mark(made, ax, plot.points)
    return made


def save(plot: Plot, folder: Path) -> list[Path]:
    """Write one figure as ``.svg`` and ``.png`` and its points, with the runs behind each, as ``.csv``.

    Raises:
        InputError: ``folder`` cannot be written.
    """
    out = [folder / f"{plot.name}.{ending}" for ending in ("svg", "png", "csv")]
    made = figure(plot)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with mpl.rc_context(STYLE):
            made.savefig(out[0], metadata={"Date": None})
            made.savefig(out[1], dpi=160)
        with out[2].open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(
                ["family", "depth" if plot.panels else "budget", plot.x_label, plot.y_label, "low", "high", "runs"]
            )
            for p in plot.points:
                writer.writerow([p.family, p.mark, p.x, p.y, p.low, p.high, " ".join(map(str, p.runs))])
    except OSError as error:
        raise InputError("-o", folder, f"cannot be written: {error.strerror}") from error
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """``kvbench plot``; exit status 2 for an input that cannot be used."""
    parser = argparse.ArgumentParser(
        prog="kvbench plot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="a results folder, or any folder below it")
    parser.add_argument("-o", "--output", type=Path, default=Path("figures"), help="folder for the files (./figures)")
    args = parser.parse_args(argv)
    try:
        runs, problems = load(args.results)
        for problem in problems:
            print(problem, file=sys.stderr)
        made = [path for plot in plots(runs) for path in save(plot, args.output)]
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not made:
        print(f"nothing to plot in {args.results}: a figure needs two comparable runs", file=sys.stderr)
    for path in made:
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
