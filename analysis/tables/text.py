"""Tables as Markdown, HTML and CSV. What stands in a record is text in each of them, never markup."""

from __future__ import annotations

import csv
import html
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from unicodedata import east_asian_width

from ..describe import setting
from ..load import Run
from .cells import Table
from .notes import warnings_of

# Markdown -------------------------------------------------------------------------------------------------------------


def markdown(table: Table) -> str:
    """A table that reads well as text too."""
    count = len(table.columns)
    assert all(len(row) == count for row in table.rows)
    texts = _md_all([*table.columns, *(cell.text for row in table.rows for cell in row)])
    for place, cell in enumerate(chain.from_iterable(table.rows), start=count):
        if cell.bold:
            texts[place] = f"**{texts[place]}**"
    columns = [_padded(texts[i::count], to_left=i == 0) for i in range(count)]
    head, *body = ("| " + " | ".join(line) + " |" for line in zip(*columns, strict=True))
    widths = [_width(column[0]) for column in columns]
    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])]) + "|"
    notes = [f"\n{_md(' '.join(table.notes))}"] if table.notes else []
    return "\n".join([f"**{_md(table.title)}**", "", head, rule, *body, *notes])


MARKUP = re.compile(r"[\\`*|$<~]|&(?=[#\w]+;)|(?<![^\W_])_|_(?![^\W_])|\](?=[(\[:])")
"""What Markdown takes for markup: `_` only at the edge of a word, `]` only before a link's target, `&` of an entity."""
END = "\0"
"""Separator of the texts that :func:`_md_all` escapes together."""


def _md(text: str) -> str:
    return MARKUP.sub(lambda match: "\\" + match[0], " ".join(text.split()))


def _md_all(texts: Sequence[str]) -> list[str]:
    """:func:`_md` of each text, in one go: the end of a text is neither part of a word nor white space to it."""
    joined = END.join(texts)
    if joined.count(END) >= len(texts):
        return [_md(text) for text in texts]
    words = " ".join(joined.split()).replace(f" {END}", END).replace(f"{END} ", END)
    return MARKUP.sub(lambda match: "\\" + match[0], words).split(END)


def _padded(texts: Sequence[str], to_left: bool) -> list[str]:
    """The texts of a column, all of one width."""
    widths = [len(text) for text in texts] if "".join(texts).isascii() else [_width(text) for text in texts]
    widest = max(widths)
    spaces = [" " * (widest - width) for width in widths]
    return [text + pad if to_left else pad + text for text, pad in zip(texts, spaces, strict=True)]


def _width(text: str) -> int:
    """Columns that a text takes on a terminal: two for a Chinese character."""
    return len(text) if text.isascii() else sum(2 if east_asian_width(c) in "WF" else 1 for c in text)


def markdown_page(tables: Iterable[Table]) -> Iterator[str]:
    """The tables below one another."""
    for number, table in enumerate(tables):
        yield ("\n\n" if number else "") + markdown(table)


# HTML -----------------------------------------------------------------------------------------------------------------

STYLE = (
    "body{font:14px/1.4 system-ui,sans-serif;margin:2em}table{border-collapse:collapse;margin-top:2em}"
    "caption{text-align:left;font-weight:bold;padding-bottom:.4em}th,td{padding:.15em .6em;text-align:right;"
    "white-space:nowrap}th:first-child,td:first-child{text-align:left}thead tr:last-child th{border-bottom:1px solid}"
    "th[colspan]{text-align:center}tr.block td{border-top:1px solid #bbb}"
)


def html_page(tables: Iterable[Table]) -> Iterator[str]:
    """A page of its own with all tables."""
    yield '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>kvbench tables</title>'
    yield f"\n<style>{STYLE}</style>"
    for table in tables:
        yield "\n" + html_table(table)
    yield "\n</html>"


def html_table(table: Table) -> str:
    """One ``<table>``, with its notes in a paragraph below it."""
    lines = [f'<table id="{html.escape(table.name)}">', f"<caption>{_html(table.title)}</caption>", "<thead>"]
    if table.families:
        spans = "".join(f'<th colspan="{count}">{_html(family)}</th>' for family, count in table.family_spans())
        lines.append(f"<tr>{spans}</tr>")
    lines += [
        "<tr>" + "".join(f"<th>{_html(column)}</th>" for column in table.columns) + "</tr>",
        "</thead>",
        "<tbody>",
    ]
    for place, row in enumerate(table.rows):
        starts = bool(table.blocks) and place > 0 and table.blocks[place] != table.blocks[place - 1]
        cells = "".join(f"<td><b>{_html(c.text)}</b></td>" if c.bold else f"<td>{_html(c.text)}</td>" for c in row)
        lines.append(f'<tr class="block">{cells}</tr>' if starts else f"<tr>{cells}</tr>")
    lines += ["</tbody>", "</table>"]
    if table.notes:
        lines.append(f"<p>{_html(' '.join(table.notes))}</p>")
    return "\n".join(lines)


def _html(text: str) -> str:
    return html.escape(" ".join(text.split()))


# CSV ------------------------------------------------------------------------------------------------------------------

CSV_COLUMNS = (
    *(
        "task",
        "model",
        "setting",
        "method",
        "budget",
        "column",
        "value",
        "low",
        "high",
        "spread",
        "n",
        "p_holm",
        "bold",
    ),
    *("warning", "dtype", "device", "commit", "finished", "hash", "run"),
)


def csv_page(tables: Iterable[Table]) -> Iterator[str]:
    """Long form: one row for each number of each table, with its interval and its run."""
    yield _csv_line(CSV_COLUMNS)
    for table in tables:
        for run, row in zip(table.runs, table.rows, strict=True):
            head, tail = _csv_head(run, table), _csv_tail(run)
            for column, cell in zip(table.columns, row, strict=True):
                if cell.value is not None:
                    spread = (cell.low, cell.high, cell.spread, cell.n, cell.p, "yes" if cell.bold else "")
                    yield "\n" + _csv_line([*head, column, cell.value, *spread, *tail])
            if not run.done:
                yield "\n" + _csv_line([*head, "status", run.record["status"], "", "", "", "", "", "", *tail])


def _csv_head(run: Run, table: Table) -> list[object]:
    record = run.record
    return [record["task"], record["model"], table.setting or setting(record, [run]), run.label, record["budget"]]


def _csv_tail(run: Run) -> list[object]:
    record = run.record
    identity, provenance = record["identity"], record.get("provenance", {})
    commit = provenance.get("git", {}).get("sha") or ""
    where = os.path.relpath(run.path)
    origin = [identity["dtype"], identity["device"], commit, record.get("finished", ""), record["hash"], where]
    return [" ".join(warnings_of(run)), *origin]


def _csv_line(cells: Sequence[object]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\r\n").writerow(cells)  # what is in it is quoted: both ends of a line
    return out.getvalue().removesuffix("\r\n")
