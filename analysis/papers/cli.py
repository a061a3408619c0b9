"""A paper's published numbers beside ours: reproduced, not reproduced, not comparable or not run.

    kvbench paper                                  # the papers
    kvbench paper snapkv results/reference         # one of them, as Markdown
    kvbench paper all results -o papers.html       # all of them as one page
    kvbench paper kivi results -o kivi.csv         # one row a published number

Each number has its source. Beside it stand the run of ours that comes nearest with its interval, what differs (model,
data, length, hardware), a verdict, and the commands that make what is missing. A verdict needs the same model and data,
and for times the same kind of card; it has two sides, so a number far above the published one is not reproduced either.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ...conf.errors import InputError
from ...conf.wording import one_of
from ..load import Run, load
from ..tables import write
from .compare import compare
from .paper import names, paper
from .render import blocks, cells_csv, markdown, page_html

FORMATS = {"md": "md", "markdown": "md", "html": "html", "csv": "csv"}
DEFAULT_RESULTS = Path("results")


def main(argv: Sequence[str] | None = None) -> int:
    """``kvbench paper``; exit status 2 for an input that cannot be used."""
    parser = argparse.ArgumentParser(
        prog="kvbench paper", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help=f"{', '.join(names())} or all; default: list them")
    parser.add_argument(
        "results", nargs="?", type=Path, help="a results folder; default: results, or no runs where that is empty"
    )
    parser.add_argument("-o", "--output", type=Path, help="a file ending in .md, .html or .csv; default: the terminal")
    parser.add_argument("--format", choices=sorted(FORMATS), help="default: as the file's ending says, else md")
    parser.add_argument("--cells", action="store_true", help="Markdown: each data set too, not the averages alone")
    args = parser.parse_args(argv)
    try:
        ending = args.format or ("md" if args.output is None else args.output.suffix.removeprefix("."))
        if ending not in FORMATS:
            raise InputError("-o", args.output, one_of(ending, FORMATS, "a file ending in one of"))
        if args.name is None:
            print(_list())
            return 0
        papers = [paper(name) for name in (names() if args.name == "all" else [args.name])]
        text = _page(args, papers, FORMATS[ending], _runs(args.results))
        if args.output is None:
            print(text)
        else:
            write(args.output, text + "\n")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _page(args: argparse.Namespace, papers: Sequence, form: str, runs: Sequence[Run]) -> str:
    found = [(one, compare(one, runs)) for one in papers]
    if form == "csv":
        return cells_csv((one, cell) for one, cells in found for cell in cells)
    results = str(args.results or DEFAULT_RESULTS)
    page = [b for one, cells in found for b in blocks(one, cells, runs, results, args.cells or form == "html")]
    return markdown(page) if form == "md" else page_html(page, f"kvbench: {args.name}").rstrip("\n")


def _runs(folder: Path | None) -> list[Run]:
    """The runs; none where the default folder has none."""
    try:
        runs, problems = load(folder or DEFAULT_RESULTS)
    except InputError:
        if folder is not None:
            raise
        return []
    for problem in problems:
        print(problem, file=sys.stderr)
    return runs


def _list() -> str:
    found = [paper(name) for name in names()]
    width = max(len(one.name) for one in found)
    lines = []
    for one in found:
        count = sum(len(row.values) for table in one.tables for row in table.rows) + len(one.claims)
        lines.append(f"{one.name:<{width}}  arXiv {one.arxiv}  {count:>4} published numbers  {one.title}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
