"""Needles: maps of score over prompt length and depth, a row a method and a column a budget."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.image import AxesImage

from ..describe import is_needle
from ..load import Run
from .layout import EDGE_EMS, Sheet
from .registry import FAMILIES, Look
from .spec import Budget, Context, FigureSpec, Point, named, settings_of, subject
from .style import wrapped

CELL_EMS = 0.8  # height of a map's row
COLOR_MAP = "viridis"
MIN_BUDGETS = 2


@dataclass(frozen=True)
class HeatMap:
    """One run's map.

    Attributes:
        look: Of the method.
        budget: Of the run.
        lengths, depths: Of the axes, ascending; depth 0 is the beginning of the text.
        scores: ``scores[d][l]``, mean of 0 to 100; NaN for a cell without an example.
        counts: Examples of each cell.
        curve: Label without the budget.
        run: Folder of the run.
    """

    look: Look
    budget: Budget
    lengths: list[int]
    depths: list[float]
    scores: list[list[float]]
    counts: list[list[int]]
    curve: str
    run: Path

    @property
    def mean(self) -> float:
        """Mean over the cells that have examples."""
        return fmean(score for row in self.scores for score in row if not math.isnan(score))


def heat_map(run: Run, look: Look) -> HeatMap:
    """Return a run's map, from the scores of its examples.

    Raises:
        ValueError: The samples are missing, damaged or not those of needles.
    """
    if run.examples is None:
        raise ValueError("its samples are missing or do not fit its record")
    cells: dict[tuple[float, int], list[float]] = {}
    for (dataset, name), score in zip(run.examples.keys, run.examples.scores, strict=True):
        depth, length = name.split("-")[1:2], dataset.rpartition("-")[2]  # as the task names examples and data sets
        cells.setdefault((float("".join(depth)), int(length)), []).append(score)
    depths, lengths = sorted({d for d, _ in cells}), sorted({n for _, n in cells})
    scores = [[fmean(cells[d, n]) if (d, n) in cells else math.nan for n in lengths] for d in depths]
    counts = [[len(cells.get((d, n), ())) for n in lengths] for d in depths]
    return HeatMap(look, run.record["budget"], lengths, depths, scores, counts, run.curve, run.path)


def heatmaps(group: Sequence[Run], context: Context) -> Iterator[FigureSpec]:
    """Maps of the methods that have several budgets, as a table of them; and maps of all other runs."""
    if not is_needle(group[0]):
        return
    maps = []
    for run in group:
        try:
            maps.append(heat_map(run, context.looks[run.curve]))
        except ValueError as error:
            context.problems.append(f"no needle map of {run.label} ({run.path}): {error}")
    families = list(FAMILIES)
    maps.sort(key=lambda m: (families.index(m.look.family), m.look.name.lower(), m.budget or 0))
    budgets = sorted({m.budget for m in maps if isinstance(m.budget, int)})
    swept = [m.curve for m in maps if isinstance(m.budget, int)]
    swept = [c for c in dict.fromkeys(swept) if swept.count(c) >= min(MIN_BUDGETS, len(budgets))]
    table = [m for m in maps if m.curve in swept and isinstance(m.budget, int)]
    full = [m for m in maps if m.curve == "full"][:1]
    rest = [m for m in maps if m not in table]
    if table:
        table = full + table
        rest = [m for m in rest if m not in full] and rest
        yield _spec(group, table, context, budgets)
    if rest:
        yield _spec(group, rest, context, None)


def _spec(group: Sequence[Run], maps: Sequence[HeatMap], context: Context, budgets: Sequence[int] | None) -> FigureSpec:
    counts = sorted({n for m in maps for row in m.counts for n in row})
    many = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    examples = "1 example" if counts == [1] else f"{many} examples"
    caption = [
        *settings_of(group),
        f"Score over prompt length and depth of the needle, {examples} a cell, so single cells say little.",
        "A number above a map is its mean."
        if budgets is None
        else "Columns: budgets in tokens; the number above a map is its mean.",
    ]
    points = [
        Point(m.curve, m.budget, length, score, place=f"depth {depth:.3f}", runs=(m.run,))
        for m in maps
        for depth, row in zip(m.depths, m.scores, strict=True)
        for length, score in zip(m.lengths, row, strict=True)
    ]
    draw = partial(_draw, maps=maps, budgets=budgets, examples=examples)
    if budgets is None:
        labels = tuple(named(m.look, m.budget) for m in maps)
    else:
        labels = (*dict.fromkeys(m.look.name for m in maps), "budget", *map(str, budgets))
    title = f"Needles, {'one map a run' if budgets is None else 'methods by budget'}: {subject(group[0].record)}"
    part = ("others",) if budgets is None else ("by-budget",)
    return FigureSpec(
        "heatmap", (group,), title, tuple(caption), "prompt length, tokens", "depth", tuple(points), labels, draw, part
    )


@dataclass(frozen=True)
class Cell:
    """One place of the mosaic.

    Attributes:
        heat: The map; None where there is none.
        head: Lines above it.
        missing: Text instead of the map.
    """

    heat: HeatMap | None
    head: str = ""
    missing: str = ""


def _draw(sheet: Sheet, maps: Sequence[HeatMap], budgets: Sequence[int] | None, examples: str) -> None:
    style = sheet.style
    if budgets is None:
        columns = 5 if style.is_wide else 3
        width = (style.inches - 6 * style.em) / columns - style.em
        heads = [wrapped(f"{named(m.look, m.budget)}: {m.mean:.0f}", width, style.text_pt) for m in maps]
        cells = [Cell(one, head) for one, head in zip(maps, heads, strict=True)]
        rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
        names = [""] * len(rows)
    else:
        rows, names = _table(maps, budgets)
        columns = max(len(budgets), 3)
    sheet.color_bar(_draw_mosaic(sheet, rows, names, columns), f"score, {examples} a cell")


def _table(maps: Sequence[HeatMap], budgets: Sequence[int]) -> tuple[list[list[Cell]], list[str]]:
    """Return a row a method with a cell a budget, and the names of the rows; the full cache is alone in its row."""
    found = {(m.curve, m.budget): m for m in maps}
    curves = list(dict.fromkeys(m.curve for m in maps))
    rows = []
    for curve in curves:
        if curve == "full":
            full = found[curve, None]
            rows.append([Cell(full, f"{full.mean:.0f}")])
            continue
        is_first = all(row[0].heat is not None and row[0].heat.curve == "full" for row in rows)
        row = []
        for budget in budgets:
            one = found.get((curve, budget))
            mean = "" if one is None else f"{one.mean:.0f}"
            row.append(Cell(one, f"{budget}\n{mean}" if is_first else mean, "" if one else "not run"))
        rows.append(row)
    return rows, [next(m.look.name for m in maps if m.curve == curve) for curve in curves]


def _draw_mosaic(sheet: Sheet, rows: Sequence[Sequence[Cell]], names: Sequence[str], columns: int) -> AxesImage:
    """Draw all maps into one pair of axes whose unit is an inch; many axes would take seconds."""
    style, em = sheet.style, sheet.style.em
    depths = max(len(cell.heat.depths) for row in rows for cell in row if cell.heat)
    heads = [1.3 * em * max(cell.head.count("\n") + 1 for cell in row) for row in rows]
    room = (style.max_height_inches - 10 * em - sum(heads)) / len(rows) - 0.8 * em
    height = min(depths * CELL_EMS * em, max(room, 2.5 * em))
    labels = [wrapped(name, height + 2.0 * em, style.text_pt) for name in names]
    name_width = 1.3 * em * max(label.count("\n") + 1 for label in labels) if any(labels) else 1.6 * em
    total = sum(heads) + len(rows) * (height + 0.8 * em) + 2.8 * em
    (ax,) = sheet.grid(1, 1, total)
    ax.set_axis_off()
    right, left = style.inches - 2 * EDGE_EMS * em, 0.4 * em + name_width + 3.6 * em
    width = (right - left) / columns - 0.8 * em
    y, image = 0.0, None
    for row, label, head in zip(rows, labels, heads, strict=True):
        y += head
        if any(labels) and "\n" in row[0].head:
            ax.text(left - 0.3 * em, y - 1.4 * em, "budget", ha="right", va="bottom")
        for column, cell in enumerate(row):
            x = left + column * (width + 0.8 * em)
            text_x, align = (x, "left") if not any(labels) else (x + width / 2, "center")
            ax.text(text_x, y - 0.2 * em, cell.head, ha=align, va="bottom")
            box = (x, x + width, y + height, y)
            if cell.heat is None:
                ax.text(x + width / 2, y + height / 2, cell.missing, ha="center", va="center", color="#777777")
                continue
            image = ax.imshow(cell.heat.scores, cmap=COLOR_MAP, vmin=0, vmax=100, extent=box, aspect="auto")
            if row is rows[-1] or column >= len(rows[list(rows).index(row) + 1]):
                _label_lengths(ax, cell.heat, x, y + height, width, em)
        first = next(cell.heat for cell in row if cell.heat)
        for depth, place in ((first.depths[0], 0.5), (first.depths[-1], len(first.depths) - 0.5)):
            at = y + height * place / len(first.depths)
            ax.text(left - 0.3 * em, at, f"{100 * depth:.0f} %", ha="right", va="center")
        ax.text(0.4 * em, y + (height - 0.5 * em) / 2, label, rotation=90, ha="left", va="center")
        y += height + 0.8 * em
    if not any(labels):
        ax.text(0.0, total / 2, "depth of the needle", rotation=90, ha="left", va="center")
    ax.text((left + right) / 2, total, "prompt length, tokens (k = 1024)", ha="center", va="bottom")
    ax.set(xlim=(0, right), ylim=(total, 0))
    assert image is not None
    return image


def _label_lengths(ax: Axes, one: HeatMap, x: float, y: float, width: float, em: float) -> None:
    """Write as many prompt lengths below a map as fit."""
    texts = [f"{n / 1024:.3g}k" if n >= 1024 else str(n) for n in one.lengths]
    step = max(1, math.ceil(2.4 * em * len(texts) / width))
    for place in range(0, len(texts), step):
        ax.text(x + width * (place + 0.5) / len(texts), y + 0.2 * em, texts[place], ha="center", va="top")
