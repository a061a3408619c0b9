"""Curves, intervals, legends and axes, drawn alike in every figure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from matplotlib.transforms import Bbox, ScaledTranslation

from .layout import Sheet
from .registry import Look
from .spec import FigureSpec, Point
from .style import POINTS_PER_INCH, Style, text_inches

LINE_STYLES: dict[str, Any] = {
    "solid": "-",
    "dashed": (0, (4, 1.5)),
    "dotted": (0, (1, 1.2)),
    "dashdot": (0, (4, 1.2, 1, 1.2)),
    "longdash": (0, (8, 2)),
}
HALO = "#d0d0d0"
LINEAR_NATS = 0.1
NATS_TICKS = (-2, -1, -0.5, -0.1, 0, 0.1, 0.2, 0.5, 1, 2, 5, 10)
NARROW_RANGE = 8.0
ANGLES = ((1, 1), (1, -1), (-1, 1), (-1, -1), (0, 1), (0, -1))
LARGER_MARKERS = "*XPp8hdv^<>"  # these look smaller than a square of the same size


def draw(spec: FigureSpec, style: Style | None = None) -> Figure:
    """Return the drawn figure; in a notebook it shows itself."""
    style = style or Style()
    with mpl.rc_context(style.rc()):
        sheet = Sheet(style)
        spec.draw(sheet)
        return sheet.finish(spec.title if style.has_title else "")


def marker_style(look: Look, style: Style, emphasis: float = 1.0) -> dict[str, Any]:
    """Return Matplotlib's properties of a look's marker."""
    size = 3.8 * style.scale * emphasis * (1.25 if look.marker in LARGER_MARKERS else 1.0)
    face = "white" if look.fill == "none" else look.color
    return {
        "color": look.color,
        "marker": look.marker,
        "markersize": size,
        "markerfacecolor": face,
        "markeredgecolor": look.color,
        "markerfacecoloralt": "white",
        "fillstyle": "full" if look.fill == "none" else look.fill,
    }


def handle(look: Look, style: Style, has_line: bool = True) -> Line2D:
    """Return the entry of a legend."""
    line: Any = LINE_STYLES[look.line] if has_line else "none"
    return Line2D([], [], linestyle=line, **marker_style(look, style))


def front_handle(style: Style) -> Line2D:
    """Return the legend's entry of the Pareto front."""
    return Line2D(
        [], [], color=HALO, linewidth=2.2 * style.scale, marker="o", markersize=7 * style.scale, markeredgecolor="none"
    )


def draw_curve(
    ax: Axes, points: Sequence[Point], look: Look, style: Style, shift_pt: float = 0.0, has_line: bool = True
) -> None:
    """Draw points with their intervals, joined by a line.

    Args:
        ax: The panel.
        points: Of one curve, in order.
        look: Of the curve.
        style: Of the figure.
        shift_pt: Moves everything sideways, so that intervals at one place do not cover each other.
        has_line: Whether the points are joined.
    """
    figure = ax.get_figure(root=True)
    assert figure is not None
    moved = ScaledTranslation(shift_pt / POINTS_PER_INCH, 0, figure.dpi_scale_trans)
    place = ax.transData + moved if shift_pt else ax.transData
    joined = has_line and len(points) > 1
    discs = [p for p in points if p.on_front]
    size = 7 * style.scale
    ax.plot(
        [p.x for p in discs], [p.y for p in discs], "o", color=HALO, markersize=size, mew=0, zorder=1, transform=place
    )
    ax.errorbar(
        [p.x for p in points],
        [p.y for p in points],
        yerr=bars((p.y, p.low, p.high) for p in points),
        xerr=bars((p.x, p.x_low, p.x_high) for p in points),
        linestyle=LINE_STYLES[look.line] if joined else "none",
        linewidth=1.0 * style.scale,
        elinewidth=0.6 * style.scale,
        capsize=0,
        zorder=3,
        transform=place,
        **marker_style(look, style),
    )


def bars(values: Iterable[tuple[float, float | None, float | None]]) -> list[list[float]] | None:
    """Return lengths below and above each value for ``errorbar``; None where no value has an interval."""
    rows = list(values)
    if all(low is None and high is None for _, low, high in rows):
        return None
    below = [0.0 if low is None else max(0.0, value - low) for value, low, _ in rows]
    above = [0.0 if high is None else max(0.0, high - value) for value, _, high in rows]
    return [below, above]


def shifts(
    curves: Sequence[Sequence[Point]], style: Style, spread_pt: float, close: Callable[[float, float], bool]
) -> list[float]:
    """Return a sideways shift in points for each curve, so that points at one place stand side by side.

    Args:
        curves: Points of each.
        style: Of the figure.
        spread_pt: Distance between the outermost ones at most.
        close: Whether two x are at one place.
    """
    out = []
    for own in curves:
        same = [other for other in curves if other is own or any(close(p.x, q.x) for p in own for q in other)]
        place = next(i for i, other in enumerate(same) if other is own)
        step = min(2.0 * style.scale, spread_pt / max(len(same) - 1, 1))
        out.append((place - (len(same) - 1) / 2) * step)
    return out


def set_limits(ax: Axes, points: Sequence[Point], log_x: bool, margin: float = 0.08, both: bool = True) -> None:
    """Set limits that hold every point with its intervals; Matplotlib's own leave out what is moved sideways.

    With ``both`` false, the y axis stays as it is.
    """
    xs = [v for p in points for v in (p.x, p.x_low, p.x_high) if v is not None]
    ys = [v for p in points for v in (p.y, p.low, p.high) if v is not None]
    if log_x:
        width = max(max(xs) / min(xs), 2.0)
        ax.set_xlim(min(xs) / width**margin, max(xs) * width**margin)
    else:
        ax.set_xlim(*_padded(min(xs), max(xs), margin))
    if both:
        ax.set_ylim(*_padded(min(ys), max(ys), margin))


def _padded(low: float, high: float, margin: float) -> tuple[float, float]:
    size = (high - low) or abs(high) or 1.0
    return low - margin * size, high + margin * size


def log_axis(ax: Axes, which: str, style: Style, inches: float) -> None:
    """Make an axis logarithmic, with as many powers of two as there is room for; its limits must be set."""
    axis = ax.xaxis if which == "x" else ax.yaxis
    getattr(ax, f"set_{which}scale")("log", base=2)
    room = 2.8 if which == "x" else 2.0
    ticks = max(2, int(inches / (room * style.em)))
    low, high = axis.get_view_interval()
    few = high / low < NARROW_RANGE  # powers of two are too far apart
    axis.set_major_locator(FixedLocator(_round_ticks(low, high, ticks)) if few else LogLocator(base=2, numticks=ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def _round_ticks(low: float, high: float, count: int) -> list[float]:
    ticks = MaxNLocator(nbins=min(count, 5), steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    return [tick for tick in ticks if low <= tick <= high]


def nats_axis(ax: Axes, values: Sequence[float]) -> None:
    """Make the y axis one of losses beyond the full cache's: linear up to ``LINEAR_NATS`` and logarithmic above."""
    ax.set_yscale("symlog", linthresh=LINEAR_NATS, linscale=0.4)
    low, high = min(-0.02, 1.2 * min(values)), 1.3 * max(*values, LINEAR_NATS)
    ax.yaxis.set_major_locator(FixedLocator([tick for tick in NATS_TICKS if low <= tick <= high]))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_ylim(low, high)


def linear_axis(ax: Axes, which: str, style: Style, inches: float) -> None:
    """Limit the number of ticks to what there is room for."""
    axis = ax.xaxis if which == "x" else ax.yaxis
    room = 4.5 if which == "x" else 2.0
    axis.set_major_locator(MaxNLocator(nbins=max(2, min(7, int(inches / (room * style.em)))), steps=[1, 2, 2.5, 5, 10]))


def label_top(sheet: Sheet, ax: Axes, places: Sequence[tuple[float, str]], name: str) -> None:
    """Write labels above a panel at places of its x axis, on as many lines as they need; ``name`` stands before them.

    A title of the panel must leave room: see :func:`top_lines`.
    """
    style = sheet.style
    texts = [
        ax.text(x, 1.0, text, transform=ax.get_xaxis_transform(), ha="center", va="bottom", color="#555555")
        for x, text in places
    ]
    ax.text(0.0, 1.0, name, transform=ax.transAxes, ha="right", va="bottom", color="#555555").set_visible(bool(name))

    def spread() -> bool:
        ends: list[float] = []
        for text in texts:
            center = ax.transData.transform((text.get_position()[0], 0))[0] / sheet.figure.dpi
            half = text_inches(text.get_text(), style.text_pt) / 2
            line = next((n for n, end in enumerate(ends) if center - half > end + 0.3 * style.em), len(ends))
            ends[line : line + 1] = [center + half]
            text.set_y(1.0 + line * 1.15 * style.em / (ax.get_position().height * sheet.figure.get_figheight()))
        return len(ends) > 1

    sheet.hooks.append(spread)


def label_points(sheet: Sheet, ax: Axes, points: Sequence[tuple[float, float, str, str]]) -> None:
    """Write a text beside each (x, y, text, colour), where it covers neither another text nor a point.

    A text for which there is no room nearby stands further away, at the end of a thin line.
    """
    style = sheet.style

    def place() -> bool:
        unit = sheet.figure.dpi / POINTS_PER_INCH
        spots = [ax.transData.transform((x, y)) for x, y, _, _ in points]
        taken = [Bbox.from_bounds(x - 3 * unit, y - 3 * unit, 6 * unit, 6 * unit) for x, y in spots]
        frame = ax.get_window_extent()
        for (x, y), (data_x, data_y, text, color) in zip(spots, points, strict=True):
            width, height = text_inches(text, style.text_pt) * sheet.figure.dpi, 0.95 * style.text_pt * unit
            boxes = [
                _box(x, y, angle, radius * 5 * style.scale * unit, width, height)
                for radius in (1, 1.6, 2.5, 4, 6)
                for angle in ANGLES
            ]
            free = [
                b
                for b in boxes
                if not any(b.overlaps(t) for t in taken) and frame.containsx(b.x0) and frame.containsx(b.x1)
            ]
            free = [b for b in free if frame.containsy(b.y0) and frame.containsy(b.y1)] or free or boxes[:1]
            taken.append(free[0])
            middle = ((free[0].x0 + free[0].x1) / 2, (free[0].y0 + free[0].y1) / 2)
            far = max(abs(middle[0] - x) - width / 2, abs(middle[1] - y) - height / 2) > 8 * style.scale * unit
            ax.annotate(
                text,
                (data_x, data_y),
                xytext=((middle[0] - x) / unit, (middle[1] - y) / unit),
                textcoords="offset points",
                ha="center",
                va="center",
                color=color,
                arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.4 * style.scale} if far else None,
            )
        return True

    sheet.hooks.append(place)


def _box(x: float, y: float, angle: tuple[int, int], radius: float, width: float, height: float) -> Bbox:
    """Return the box of a text beside a point."""
    left = x + angle[0] * radius - (width if angle[0] < 0 else 0 if angle[0] > 0 else width / 2)
    bottom = y + angle[1] * radius - (height if angle[1] < 0 else 0 if angle[1] > 0 else height / 2)
    return Bbox.from_bounds(left, bottom, width, height)


def rows_axis(ax: Axes, labels: Sequence[str]) -> None:
    """Make the y axis one of names, the first on top."""
    ax.yaxis.set_major_locator(FixedLocator(list(range(len(labels)))))
    ax.set_yticklabels(labels)
    ax.set_ylim(len(labels) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
