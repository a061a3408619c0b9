"""Tables as LaTeX (booktabs) that fits the text: type size, rotated heads and panels follow from the widths.

A table is at most :data:`TEXT_WIDTH` points wide, the width of the text of LaTeX's own classes; one that fits a column
of two-column text is a ``table``, another a ``table*``. One with more than :data:`LONGEST` rows is a ``longtable``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from .cells import Cell, Table
from .tex_text import breakable, escape, has_other_script, number_text, text_width

TEXT_WIDTH = 345.0
"""Points: ``article`` at 10 pt, one column."""
COLUMN_WIDTH = 200.0
"""Points: ``article`` at 10 pt, two columns."""
COLUMN_SIZES = 2
"""Number of type sizes, the largest ones, that are tried for one column of two."""
LONGEST = 40
"""Rows of a table that is not broken over pages."""
SIZES = ((9.0, 3.0), (8.0, 2.5), (7.0, 2.0))
"""Type size and half the space between two columns, in points."""
FIRST_COLUMN = 100.0
"""Points: a longer first column is broken into lines."""


@dataclass(frozen=True)
class Layout:
    r"""How a table is set.

    Attributes:
        size: Type size in points.
        separation: Half the space between two columns in points (``\tabcolsep``).
        rotated: Whether the head of each column stands upright.
        first: Width of the first column in points; None: as wide as its longest entry.
        panels: Places of each panel's columns, without the first column, which all have.
        width: Points of the widest panel.
    """

    size: float
    separation: float
    rotated: Sequence[bool]
    first: float | None
    panels: Sequence[Sequence[int]]
    width: float


def latex(table: Table, width: float = TEXT_WIDTH) -> str:
    """One table, or one for each panel; the runs are in comments, because nobody prints a hash.

    Args:
        table: What is set.
        width: Points that it may take.
    """
    if table.columns[-1] == "run":
        table = table.with_columns(range(len(table.columns) - 1))
    layout = layout_of(table, width)
    runs = [f"% {' '.join(run.label.split())}: {' '.join(str(run.path).split())}" for run in table.runs]
    setter = _long_table if len(table.rows) > LONGEST else _float
    return "\n".join([*runs, setter(table, layout)])


def latex_page(tables: Iterable[Table], width: float = TEXT_WIDTH) -> Iterator[str]:
    """All tables, after a comment with the packages that they need."""
    yield "% needs \\usepackage{array,booktabs,graphicx,longtable}"
    for table in tables:
        text = latex(table, width)
        if has_other_script(text):
            yield "\n\n% Characters that pdflatex lacks: use xelatex or lualatex with a font that has them."
        yield "\n\n" + text


# layout ---------------------------------------------------------------------------------------------------------------


def layout_of(table: Table, width: float) -> Layout:
    """The largest type in which the table fits, in panels if it fits in none."""
    for limit in [w for w in (COLUMN_WIDTH, width) if w <= width]:
        for size, separation in SIZES[: COLUMN_SIZES if limit < width else None]:
            for upright in (False, True):
                layout = _one_panel(table, size, separation, upright)
                if layout.width <= limit:
                    return layout
    return _in_panels(table, width)


def _one_panel(table: Table, size: float, separation: float, upright: bool) -> Layout:
    rotated = [upright and _head_is_wide(table, i, size) for i in range(len(table.columns))]
    first = _first_width(table, size)
    places = list(range(1, len(table.columns)))
    total = _panel_width(table, places, rotated, first, size, separation)
    return Layout(size, separation, rotated, first if first == FIRST_COLUMN else None, [places], total)


def _in_panels(table: Table, width: float) -> Layout:
    """The columns in as few panels as they take, with upright heads if those save one."""
    size, separation = SIZES[1]
    first = _first_width(table, size)
    layouts = []
    for upright in (False, True):
        rotated = [upright and _head_is_wide(table, i, size) for i in range(len(table.columns))]

        def width_of(places: Sequence[int], rotated: Sequence[bool] = rotated) -> float:
            return _panel_width(table, places, rotated, first, size, separation)

        panels = _panels(table, width, width_of)
        widest = max(map(width_of, panels))
        layouts.append(Layout(size, separation, rotated, first if first == FIRST_COLUMN else None, panels, widest))
    return min(layouts, key=lambda layout: len(layout.panels))


def _panels(table: Table, width: float, width_of: Callable[[Sequence[int]], float]) -> list[list[int]]:
    """Places of the columns of each panel; the columns of a family stay together where they can."""
    groups: list[list[int]] = []
    start = 0
    for family, count in table.family_spans():
        places = [i for i in range(start, start + count) if i > 0]
        start += count
        groups += [places] if family and width_of(places) <= width else [[place] for place in places]
    panels: list[list[int]] = []
    for group in groups:
        if panels and width_of(panels[-1] + group) <= width:
            panels[-1] += group
        else:
            panels.append(list(group))
    return panels


def _first_width(table: Table, size: float) -> float:
    entries = [table.columns[0], *(row[0].text for row in table.rows)]
    return min(FIRST_COLUMN, max(text_width(escape(text), size) for text in entries))


def _head_is_wide(table: Table, place: int, size: float) -> bool:
    return place > 0 and text_width(escape(table.columns[place]), size) > _body_width(table, place, size)


def _body_width(table: Table, place: int, size: float) -> float:
    return max((text_width(number_text(row[place].text), size, row[place].bold) for row in table.rows), default=0.0)


def _column_width(table: Table, place: int, is_rotated: bool, size: float) -> float:
    head = 1.2 * size if is_rotated else text_width(escape(table.columns[place]), size)
    return max(head, _body_width(table, place, size))


def _panel_width(
    table: Table, places: Sequence[int], rotated: Sequence[bool], first: float, size: float, separation: float
) -> float:
    """Points of a panel; a family's heading may be wider than its columns, and widens the last of them."""
    total, start = first + separation, 0
    for family, span in _spans(table, places):
        inside = places[start : start + span]
        columns = sum(_column_width(table, i, rotated[i], size) for i in inside) + 2 * separation * span
        total += max(columns, text_width(escape(family), size) + 2 * separation)
        start += span
    return total - separation


def _spans(table: Table, places: Sequence[int]) -> list[tuple[str, int]]:
    """Headings over some of the columns; columns without one stand alone."""
    spans: list[tuple[str, int]] = []
    for place in places:
        family = table.families[place] if table.families else ""
        if family and spans and spans[-1][0] == family:
            spans[-1] = (family, spans[-1][1] + 1)
        else:
            spans.append((family, 1))
    return spans


# environments ---------------------------------------------------------------------------------------------------------


def _float(table: Table, layout: Layout) -> str:
    kind = "table" if layout.width <= COLUMN_WIDTH else "table*"
    parts = [rf"\begin{{{kind}}}", r"\centering", *_caption(table), *_type(layout)]
    for number, places in enumerate(layout.panels):
        head, body = _head(table, layout, places), _body(table, layout, places)
        start = rf"\begin{{tabular}}{{{_format(layout, places)}}}"
        parts += [r"\par\medskip"] if number else []
        parts += [start, r"\toprule", *head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}"]
    return "\n".join([*parts, rf"\end{{{kind}}}"])


def _long_table(table: Table, layout: Layout) -> str:
    """A longtable a panel. Two-column text has none, so it is left for the table and taken up again."""
    parts = [
        r"\makeatletter\if@twocolumn\onecolumn\def\kvbenchafter{\twocolumn}\else\def\kvbenchafter{}\fi\makeatother",
        r"\begingroup",
        *_type(layout),
        r"\setlength{\LTcapwidth}{\linewidth}",
    ]
    for number, places in enumerate(layout.panels):
        head, body = _head(table, layout, places), _body(table, layout, places)
        start = rf"\begin{{longtable}}{{{_format(layout, places)}}}"
        caption = [f"{line}%" for line in _caption(table)] if number == 0 else [r"\caption[]{(continued)}%"]
        caption[-1] = caption[-1].removesuffix("%") + r"\\"
        counter = [] if number == 0 else [r"\addtocounter{table}{-1}"]
        repeated = [r"\toprule", *head, r"\midrule", r"\endhead", r"\bottomrule", r"\endfoot"]
        parts += [*counter, start, *caption, *repeated, *body, r"\end{longtable}"]
    return "\n".join([*parts, r"\endgroup", r"\kvbenchafter"])


def _caption(table: Table) -> list[str]:
    text = breakable(" ".join([f"{table.title}.", *table.notes]))
    return [rf"\caption[{escape(table.title)}]{{\sloppy {text}}}", rf"\label{{tab:{table.name or 'table'}}}"]


def _type(layout: Layout) -> list[str]:
    size = rf"\fontsize{{{layout.size:g}}}{{{1.2 * layout.size:g}}}\selectfont"
    return [rf"{size}\setlength{{\tabcolsep}}{{{layout.separation:g}pt}}"]


def _format(layout: Layout, places: Sequence[int]) -> str:
    first = "l" if layout.first is None else rf">{{\raggedright\arraybackslash}}p{{{layout.first:g}pt}}"
    return f"@{{}}{first}{'r' * len(places)}@{{}}"


def _head(table: Table, layout: Layout, places: Sequence[int]) -> list[str]:
    lines = []
    spans = _spans(table, places)
    if any(family for family, _ in spans):
        cells = [rf"\multicolumn{{{n}}}{{c}}{{{escape(family)}}}" if family else "" for family, n in spans]
        lines.append(rf"  & {' & '.join(cells)} \\")
        rules, column = [], 2
        for family, n in spans:
            rules += [rf"\cmidrule(lr){{{column}-{column + n - 1}}}"] if family else []
            column += n
        lines.append("  " + "".join(rules))
    heads = [escape(table.columns[i]) for i in (0, *places)]
    heads = [rf"\rotatebox{{90}}{{{h}}}" if layout.rotated[i] else h for i, h in zip((0, *places), heads, strict=True)]
    return [*lines, rf"  {' & '.join(heads)} \\"]


def _body(table: Table, layout: Layout, places: Sequence[int]) -> list[str]:
    lines = []
    label = escape if layout.first is None else breakable
    for place, row in enumerate(table.rows):
        if table.blocks and place and table.blocks[place] != table.blocks[place - 1]:
            lines.append(r"\midrule")
        lines.append(rf"  {' & '.join([label(row[0].text), *(_cell(row[i]) for i in places)])} \\")
    return lines


def _cell(cell: Cell) -> str:
    text = number_text(cell.text)
    return rf"\textbf{{{text}}}" if cell.bold else text
