"""A figure of a given width whose height follows from its contents, so that nothing is clipped or covered.

    sheet = Sheet(style)
    axes = sheet.grid(count=4, columns=2, height_inches=1.5)
    ...                                   # draw into the axes
    sheet.legend(handles, labels)         # below all panels, or below one: panel=0
    figure = sheet.finish("title")

``finish`` measures what stands around each pair of axes (tick labels, axis labels, panel titles) and then sets the
positions: panels of a column have the same width, and the width of the figure is exactly that of the style.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.legend import Legend

from .style import Style, text_inches, wrapped

MEASURE_DPI = 100
EDGE_EMS, GAP_EMS = 0.4, 1.0  # around the figure, and between two columns of panels
HANDLE_EMS = 2.2
HANDLE_PAD_EMS = 0.5
COLUMN_GAP_EMS = 1.2


class Sheet:
    """Axes in rows and columns, a legend below each of them or below all, and a colour bar.

    Attributes:
        style: Size of the text and width of the figure.
        figure: The figure; its height is set by :meth:`finish`.
        hooks: Called when the sizes of the panels are known; each says whether it changed what stands around a panel,
            which is then measured again.
    """

    def __init__(self, style: Style):
        self.style = style
        self.figure = Figure(figsize=(style.inches, style.inches), dpi=MEASURE_DPI)
        self.hooks: list[Callable[[], bool]] = []
        self._canvas = FigureCanvasAgg(self.figure)
        self._axes: list[Axes] = []
        self._columns = 1
        self._heights: list[float] = []
        self._shared_y = True
        self._legends: dict[int | None, tuple[Sequence[Artist], Sequence[str]]] = {}
        self._legend: dict[int | None, Legend] = {}
        self._legend_sizes: dict[Legend, tuple[float, float]] = {}
        self._bar: tuple[Any, str] | None = None
        self._shared_labels = ("", "")

    def grid(
        self,
        count: int,
        columns: int,
        height_inches: float | Sequence[float],
        share_x: bool = True,
        share_y: bool = True,
    ) -> list[Axes]:
        """Add ``count`` axes row by row; ``height_inches`` is that of all rows, or of each."""
        self._columns = min(columns, count)
        rows = -(-count // self._columns)
        self._heights = [height_inches] * rows if isinstance(height_inches, float) else list(height_inches)
        self._shared_y = share_y
        for number in range(count):
            first = self._axes[0] if self._axes else None
            row, column = divmod(number, self._columns)
            box = (0.1 + 0.9 * column / self._columns, 0.1, 0.7 / self._columns, 0.5)
            ax = self.figure.add_axes(
                box,
                sharex=first if share_x else None,
                sharey=first if share_y is True else None,
                label=f"{row}-{column}",
            )
            self._axes.append(ax)
        return self._axes

    @property
    def room_inches(self) -> float:
        """Width of a panel without its tick labels, at least."""
        return (self.style.inches - 5 * self.style.em) / self._columns - 1.5 * self.style.em

    def head(self, ax: Axes, title: str, pad_ems: float = 0.8) -> None:
        """Write the title of a panel, on as many lines as it needs."""
        text = wrapped(title, self.room_inches, self.style.text_pt, "bold")
        ax.set_title(text, pad=pad_ems * self.style.text_pt)

    def lowest(self, number: int) -> bool:
        """Whether no panel stands below this one."""
        return number + self._columns >= len(self._axes)

    def leftmost(self, number: int) -> bool:
        """Whether no panel stands to the left of this one."""
        return number % self._columns == 0

    def legend(self, handles: Sequence[Artist], labels: Sequence[str], panel: int | None = None) -> None:
        """Add a legend below a panel, or below all of them."""
        if handles:
            self._legends[panel] = (handles, labels)

    def color_bar(self, image: Any, label: str) -> None:
        """Add the scale of an image's colours below everything."""
        self._bar = (image, label)

    def shared_labels(self, x: str = "", y: str = "") -> None:
        """Label the axes of all panels together: ``x`` below the panels and ``y`` at the left."""
        self._shared_labels = (x, y)

    def finish(self, title: str = "") -> Figure:
        """Set all positions and the height; returns the figure."""
        self._label_outer_panels()
        margins = self._margins()
        self._make_legends(margins)
        if self.hooks:
            self._place(margins, "", False)
            changed = [hook() for hook in self.hooks]
            if any(changed):
                margins = self._margins()
        self._place(margins, title, True)
        return self.figure

    # ------------------------------------------------------------------------------------------------------------------

    def _label_outer_panels(self) -> None:
        """Leave tick labels and axis labels to the panels at the left and at the bottom."""
        for number, ax in enumerate(self._axes):
            row = number // self._columns
            ax.set_ylabel(wrapped(ax.get_ylabel(), max(self._heights[row], 8 * self.style.em), self.style.text_pt))
            ax.set_xlabel(wrapped(ax.get_xlabel(), self.room_inches, self.style.text_pt))
            if not self.leftmost(number) and self._shared_y:
                ax.tick_params(labelleft=False)
                ax.set_ylabel("")
            has_legend = number in self._legends or (self._legends and None not in self._legends)
            if not self.lowest(number) and not has_legend:
                ax.tick_params(labelbottom=False)
                ax.set_xlabel("")

    def _make_legends(self, margins: Sequence[tuple[float, ...]]) -> None:
        """Create each legend with as many columns as fit, long labels on several lines."""
        em = self.style.em
        left, right, inner = self._column_inches(margins)
        for panel, (handles, labels) in self._legends.items():
            column = 0 if panel is None else panel % self._columns
            room = self.style.inches - 0.5 * em if panel is None else left[column] + inner + right[column]
            text_room = room - (HANDLE_EMS + HANDLE_PAD_EMS) * em
            texts = [wrapped(label, text_room, self.style.text_pt) for label in labels]
            columns = next(n for n in range(len(texts), 0, -1) if n == 1 or self._legend_inches(texts, n) <= room)
            self._legend[panel] = self._new_legend(handles, texts, columns)

    def _legend_inches(self, texts: Sequence[str], columns: int) -> float:
        """Return the width of a legend with so many columns, which are filled one after the other."""
        em = self.style.em
        widths = [max(text_inches(line, self.style.text_pt) for line in text.split("\n")) for text in texts]
        rows, longer = divmod(len(texts), columns)  # the first columns have one more, as Matplotlib has it
        starts = [i * rows + min(i, longer) for i in range(columns + 1)]
        parts = [max(widths[a:b]) for a, b in pairwise(starts)]
        return 1.02 * sum(parts) + columns * (HANDLE_EMS + HANDLE_PAD_EMS + COLUMN_GAP_EMS) * em

    def _new_legend(self, handles: Sequence[Artist], texts: Sequence[str], columns: int) -> Legend:
        legend = self.figure.legend(
            handles,
            texts,
            loc="upper left",
            ncols=columns,
            frameon=False,
            borderpad=0.0,
            borderaxespad=0.0,
            labelspacing=0.35,
            handlelength=HANDLE_EMS,
            handletextpad=HANDLE_PAD_EMS,
            columnspacing=COLUMN_GAP_EMS,
        )
        legend.set_in_layout(False)
        return legend

    def _extent(self, legend: Legend) -> tuple[float, float]:
        """Return width and height of a legend in inches; measured once, because its place does not change them."""
        if legend not in self._legend_sizes:
            box = legend.get_window_extent(self._canvas.get_renderer())
            self._legend_sizes[legend] = box.width / MEASURE_DPI, box.height / MEASURE_DPI
        return self._legend_sizes[legend]

    def _margins(self) -> list[tuple[float, ...]]:
        """Return what stands left, right, below and above each pair of axes, in inches."""
        renderer = self._canvas.get_renderer()
        found: list[tuple[float, ...]] = []
        for ax in self._axes:
            inner, outer = ax.get_window_extent(renderer), ax.get_tightbbox(renderer)
            assert outer is not None
            sides = (inner.x0 - outer.x0, outer.x1 - inner.x1, inner.y0 - outer.y0, outer.y1 - inner.y1)
            found.append(tuple(max(0.0, side) / MEASURE_DPI for side in sides))
        return found

    @property
    def _side_inches(self) -> float:
        """Width left of the first column: the edge, and the label of all rows."""
        return (EDGE_EMS + (1.7 if self._shared_labels[1] else 0.0)) * self.style.em

    def _column_inches(self, margins: Sequence[tuple[float, ...]]) -> tuple[list[float], list[float], float]:
        """Return what stands left and right of the axes of each column, and the width of one pair of axes."""
        columns, em = self._columns, self.style.em
        left, right = ([max(m[side] for m in margins[c::columns]) for c in range(columns)] for side in (0, 1))
        outside = self._side_inches + (EDGE_EMS + GAP_EMS * (columns - 1)) * em + sum(left) + sum(right)
        return left, right, (self.style.inches - outside) / columns

    def _place(self, margins: Sequence[tuple[float, ...]], title: str, last: bool) -> None:
        """Set the height of the figure and the positions of everything in it; ``margins`` of each pair of axes."""
        em, width = self.style.em, self.style.inches
        columns, rows = self._columns, len(self._heights)
        edge, gap, side = EDGE_EMS * em, GAP_EMS * em, self._side_inches
        left, right, panel = self._column_inches(margins)
        in_row = [margins[r * columns : (r + 1) * columns] for r in range(rows)]
        legends = [
            max((self._below(n) for n in range(r * columns, min((r + 1) * columns, len(self._axes)))), default=0.0)
            for r in range(rows)
        ]
        head = wrapped(title, width - 2 * edge, self.style.text_pt, "bold") if title else ""
        y = edge + ((head.count("\n") + 1) * 1.3 * em + 0.5 * em if head else 0.0)
        tops, below = [], []
        for row in range(rows):
            y += max(m[3] for m in in_row[row])
            tops.append(y)
            y += self._heights[row] + max(m[2] for m in in_row[row])
            below.append(y)
            y += legends[row] + (1.2 * em if row < rows - 1 else 0.0)
        panels_bottom = y
        if self._shared_labels[0]:
            y += 1.5 * em
        legend_top = y + 0.6 * em
        if None in self._legend:
            y = legend_top + self._extent(self._legend[None])[1]
        bar_top = y + 0.8 * em
        height = (bar_top + 3.6 * em if self._bar else y) + edge
        self.figure.set_size_inches(width, height)
        x0 = [side + sum(left[: c + 1]) + sum(right[:c]) + c * (panel + gap) for c in range(columns)]
        for number, ax in enumerate(self._axes):
            row, c = divmod(number, columns)
            ax.set_position(
                (
                    x0[c] / width,
                    1 - (tops[row] + self._heights[row]) / height,
                    panel / width,
                    self._heights[row] / height,
                )
            )
            if number in self._legend:
                cell_left = min(x0[c] - left[c], width - edge - self._extent(self._legend[number])[0])
                self._move(self._legend[number], cell_left, below[row] + 0.4 * em, height)
        if None in self._legend:
            middle = max(edge, (width - self._extent(self._legend[None])[0]) / 2)
            self._move(self._legend[None], middle, legend_top, height)
        if self._bar:
            self._place_bar(bar_top, height)
        self._write_shared_labels(last, side, (tops[0], panels_bottom), height)
        if head:
            self.figure.text(
                edge / width, 1 - edge / height, head, va="top", ha="left", weight="bold", linespacing=1.25
            )

    def _write_shared_labels(self, last: bool, side: float, span: tuple[float, float], height: float) -> None:
        """Write the labels of all panels; ``span``: upper and lower end of the panels from the top, in inches."""
        x, y = self._shared_labels
        em, width = self.style.em, self.style.inches
        if x and last:
            self.figure.text((side + width) / 2 / width, 1 - (span[1] + 0.3 * em) / height, x, ha="center", va="top")
        if y and last:
            middle = 1 - (span[0] + span[1] - 2 * em) / 2 / height
            text = wrapped(y, span[1] - span[0], self.style.text_pt)
            self.figure.text(0.4 * em / width, middle, text, rotation=90, ha="left", va="center")

    def _below(self, panel: int) -> float:
        """Return the height that a panel's own legend takes."""
        return self._extent(self._legend[panel])[1] + 0.4 * self.style.em if panel in self._legend else 0.0

    def _move(self, legend: Legend, x: float, y: float, height: float) -> None:
        """Put the upper left corner of a legend ``x`` inches from the left and ``y`` from the top."""
        legend.set_bbox_to_anchor((x / self.style.inches, 1 - y / height), transform=self.figure.transFigure)

    def _place_bar(self, top: float, height: float) -> None:
        """Add or move the colour bar."""
        em, width = self.style.em, self.style.inches
        assert self._bar is not None
        image, label = self._bar
        bar_width = min(0.6 * width, 30 * em)
        box = ((width - bar_width) / 2 / width, 1 - (top + 0.8 * em) / height, bar_width / width, 0.8 * em / height)
        existing = next((ax for ax in self.figure.axes if ax.get_label() == "colorbar"), None)
        if existing is not None:
            existing.set_position(box)
            return
        ax = self.figure.add_axes(box, label="colorbar")
        bar = self.figure.colorbar(image, cax=ax, orientation="horizontal")
        bar.set_label(label)
        bar.outline.set_visible(False)
        ax.grid(False)
