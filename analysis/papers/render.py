"""A paper's page as Markdown, HTML or CSV."""

from __future__ import annotations

import csv
import html
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..load import Run, average, fewer_is_better
from .compare import Comparison, Numbers, commands, numbers
from .paper import AVERAGE, Paper
from .verdict import HIGH, LOW, TOO_FEW, VERDICTS, WIDEST

HEADS = ("published row", "published", "vs full", "ours", "ours vs full", "ours / published", "verdict", "ours on")
STYLE = """body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1200px; padding: 0 1em; }
table { border-collapse: collapse; margin: .6em 0; font-size: 14px; }
th, td { border: 1px solid #d0d5dd; padding: 3px 8px; text-align: left; vertical-align: top; }
th { background: #f5f7fa; } pre { background: #f5f7fa; padding: .7em; overflow-x: auto; }"""


@dataclass(frozen=True)
class Block:
    """One part of a page.

    Attributes:
        kind: ``heading`` (of a level), ``text``, ``table``, ``list`` or ``code``.
        text: of a heading or a paragraph.
        level: of a heading.
        rows: of a table, its head first; of a list or code, rows of one entry.
        folded: a table that is closed until it is asked for, under this name.
    """

    kind: str
    text: str = ""
    level: int = 2
    rows: Sequence[Sequence[str]] = ()
    folded: str = ""


def blocks(paper: Paper, found: Sequence[Comparison], runs: Sequence[Run], results: str, cells: bool) -> list[Block]:
    """The page of one paper.

    Args:
        paper: the paper.
        found: its numbers beside ours.
        runs: all of ours, for the list of the method's own runs.
        results: folder for the commands.
        cells: whether to show each data set, not the averages alone.
    """
    said = Counter(one.verdict for one in found)
    counts = ", ".join(f"{said[one]} {one}" for one in VERDICTS if said[one])
    out = [Block("heading", f"{paper.title} (arXiv {paper.arxiv})", 1)]
    if paper.note:
        out.append(Block("text", paper.note))
    if found:
        out.append(Block("text", f"{len(found)} published numbers: {counts}."))
    sources = {table.name: table.source for table in paper.tables}
    differs: dict[str, int] = {}
    for name in dict.fromkeys(one.table for one in found):
        group = [one for one in found if one.table == name]
        out.append(Block("heading", name))
        if name in sources:
            out.append(Block("text", f"Source: {sources[name]}."))
        shown = _shown(group)
        out.append(Block("table", rows=[HEADS, *(_line(one, differs) for one in shown)]))
        rest = [one for one in group if one not in shown]
        if rest:
            out.append(Block("table", rows=[HEADS, *(_line(one, differs) for one in rest)], folded="Each data set"))
    if not cells:
        out = [block for block in out if not block.folded]
    if found:
        out.append(Block("text", _legend(paper)))
    if differs:
        numbered = [[f"[{n}] {text}"] for text, n in differs.items()]
        out += [Block("heading", "What differs"), Block("list", rows=numbered)]
    missing = commands(paper, found, results)
    if missing:
        out += [Block("heading", "Commands for the missing runs"), Block("code", rows=[[line] for line in missing])]
    mine = [run for run in runs if run.record["method"] in paper.methods and run.done]
    if mine:
        out += [Block("heading", "Runs of this method here"), Block("table", rows=_own_runs(mine))]
    return out


def _shown(group: Sequence[Comparison]) -> list[Comparison]:
    """The averages; every number of a row that has none."""
    with_average = {one.row for one in group if one.column == AVERAGE}
    return [one for one in group if one.column == AVERAGE or one.row not in with_average]


def _legend(paper: Paper) -> str:
    text = (
        f"reproduced: ours is {LOW:g} to {HIGH:g} of the published number, or its 95 % interval holds it. "
        "not comparable: something differs beside chance (numbers in brackets, listed below), or there are "
        f"{TOO_FEW}: the interval reaches more than {100 * WIDEST:g} % of the published number away from our mean. "
        "vs full: difference to the full cache of the same model, ours paired by example."
    )
    if any(table.kind == "train" for table in paper.tables):
        text += " Intervals of trained models are the range of the seeds."
    return text


def _line(one: Comparison, differs: dict[str, int]) -> list[str]:
    """A row of the page; ``differs`` numbers what differs."""
    marks = "".join(f"[{differs.setdefault(text, len(differs) + 1)}]" for text in one.differs)
    said = " ".join(filter(None, [one.verdict, f"({one.remark})" if one.remark else "", marks]))
    if one.verdict == "not run" and one.reason:
        said += f": {one.reason}"
    column = "" if one.column in ("", AVERAGE) else f": {one.column}"
    return [
        one.row + column,
        f"{one.published:.6g} {one.unit}" if one.unit not in ("percent", "perplexity") else f"{one.published:.2f}",
        "-" if one.published_difference is None else f"{one.published_difference:+.2f}",
        _interval(one.ours),
        _interval(one.our_difference, "+.2f"),
        "-" if one.ours is None or not one.published else f"{one.ours[0] / one.published:.2f}",
        said,
        one.device or "-",
    ]


def _interval(found: Numbers | None, form: str = ".2f") -> str:
    if found is None:
        return "-"
    mean, low, high, _ = found
    form = form if abs(mean) < 1000 else form.replace(".2f", ",.0f")
    return f"{mean:{form}}" if low is None or high is None else f"{mean:{form}} [{low:{form}}, {high:{form}}]"


def _own_runs(runs: Iterable[Run]) -> list[list[str]]:
    rows = [["task", "model", "method", "score", "examples", "vs full", "run"]]
    for run in runs:
        record = run.record
        if record["kind"] != "accuracy":
            continue
        mean = average(record)
        difference = (record.get("paired") or {}).get("difference")
        paired = "-" if not difference else _interval(numbers(difference), "+.2f")
        unit = " (perplexity; difference in nats)" if fewer_is_better(record) else ""
        shown = [_interval(numbers(mean)), str(mean["n"]), paired, record["hash"]]
        rows.append([record["task"] + unit, record["model"], run.label, *shown])
    return rows if len(rows) > 1 else [["task"], ["none with a score"]]


def markdown(page: Iterable[Block]) -> str:
    """Blocks as Markdown; texts of records cannot end a cell."""
    out = []
    for block in page:
        if block.kind == "heading":
            out.append(f"{'#' * block.level} {_plain(block.text)}")
        elif block.kind == "text":
            out.append(_plain(block.text))
        elif block.kind == "code":
            out.append("\n".join(["```bash", *(row[0] for row in block.rows), "```"]))
        elif block.kind == "list":
            out.append("\n".join(f"* {_plain(row[0])}" for row in block.rows))
        else:
            head, *body = ([_plain(cell).replace("|", r"\|") for cell in row] for row in block.rows)
            lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)]
            out.append("\n".join(([f"**{block.folded}**", ""] if block.folded else []) + lines))
    return "\n\n".join(out)


def _plain(text: str) -> str:
    """A text on one line, in which Markdown finds no HTML."""
    return " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")


def page_html(page: Iterable[Block], title: str) -> str:
    """Blocks as one HTML file that loads nothing; every text is escaped."""
    out = []
    for block in page:
        text = html.escape(block.text)
        if block.kind == "heading":
            out.append(f"<h{block.level}>{text}</h{block.level}>")
        elif block.kind == "text":
            out.append(f"<p>{text}</p>")
        elif block.kind == "code":
            code = "\n".join(html.escape(row[0]) for row in block.rows)
            out.append(f"<pre>{code}</pre>")
        elif block.kind == "list":
            out.append("<ul>" + "".join(f"<li>{html.escape(row[0])}</li>" for row in block.rows) + "</ul>")
        else:
            head, *body = block.rows
            lines = [_html_row(head, "th"), *(_html_row(row, "td") for row in body)]
            table = "<table>\n" + "\n".join(lines) + "\n</table>"
            folded = html.escape(block.folded)
            out.append(f"<details><summary>{folded}</summary>{table}</details>" if folded else table)
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<title>{html.escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n" + "\n".join(out) + "\n</body>\n</html>\n"
    )


def _html_row(row: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"


def cells_csv(found: Iterable[tuple[Paper, Comparison]]) -> str:
    """Every published number, one a line."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    head = ["paper", "table", "row", "column", "published", "unit", "published_vs_full", "ours", "low95", "high95", "n"]
    writer.writerow([*head, "ours_vs_full", "ratio", "verdict", "remark", "differs", "device", "run", "reason"])
    for paper, one in found:
        ours = one.ours or (None, None, None, None)
        ratio = None if one.ours is None or not one.published else one.ours[0] / one.published
        paired = None if one.our_difference is None else one.our_difference[0]
        row = [paper.name, one.table, one.row, one.column, one.published, one.unit, one.published_difference, *ours]
        path = "" if one.run is None else one.run.path
        differs = "; ".join(one.differs)
        writer.writerow([*row, paired, ratio, one.verdict, one.remark, differs, one.device, path, one.reason])
    return out.getvalue().rstrip("\n")
