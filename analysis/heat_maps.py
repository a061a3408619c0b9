"""Needles as everyone draws them: for each method a map of score over prompt length and depth."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure

from .load import Run


@dataclass(frozen=True)
class HeatMap:
    """One method's map.

    Attributes:
        label: the method.
        lengths, depths: of the axes, rising; depth 0 is the beginning of the text.
        scores: ``scores[d][l]``, mean of 0 .. 100; NaN for a cell without an example.
        run: the folder they come from.
    """

    label: str
    lengths: list[int]
    depths: list[float]
    scores: list[list[float]]
    run: Path


def is_needle(run: Run) -> bool:
    """Whether a run has prompts of several lengths or depths to draw."""
    return bool(run.done and run.record["identity"]["task"].get("class") == "Needle")


def heat_map(run: Run) -> HeatMap:
    """A run's map, from the rows of its samples."""
    cells: dict[tuple[float, int], list[float]] = {}
    for row in run.samples():  # an example is named by its depth, its data set by its length
        depth, length = float(row["id"].split("-")[1]), int(row["dataset"].rpartition("-")[2])
        cells.setdefault((depth, length), []).append(100 * row["score"])
    depths, lengths = sorted({d for d, _ in cells}), sorted({n for _, n in cells})
    scores = [[fmean(cells[d, n]) if (d, n) in cells else math.nan for n in lengths] for d in depths]
    return HeatMap(run.label, lengths, depths, scores, run.path)


def draw(figure: Figure, maps: Sequence[HeatMap]) -> None:
    """One panel a map, on one scale of colours."""
    columns = min(len(maps), math.ceil(math.sqrt(1.6 * len(maps))))
    rows = math.ceil(len(maps) / columns)
    figure.set_size_inches(1.2 + 1.9 * columns, 1.2 + 1.9 * rows)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    image = None
    for number, ax in enumerate(panels.flat):
        if number >= len(maps):
            ax.set_axis_off()
            continue
        one = maps[number]
        image = ax.imshow(one.scores, cmap="RdYlGn", vmin=0, vmax=100, aspect="auto")
        ax.grid(False)
        mean = fmean(score for row in one.scores for score in row if not math.isnan(score))
        ax.set_title("\n".join(textwrap.wrap(f"{one.label}: {mean:.0f}", 28)), fontsize=7.5)
        ax.set_xticks(range(len(one.lengths)), [f"{n / 1024:.3g}k" for n in one.lengths], fontsize=7)
        ax.set_yticks(range(len(one.depths)), [f"{100 * d:.0f} %" for d in one.depths], fontsize=7)
    assert image is not None
    figure.supxlabel("prompt length, tokens", fontsize=9)
    figure.supylabel("depth of the needle", fontsize=9)
    figure.colorbar(image, ax=panels, label="score", shrink=0.8)
