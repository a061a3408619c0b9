"""``kvbench table``: its options, and the choice of tables and format."""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

from ...conf.errors import InputError
from ...conf.wording import one_of
from ..load import Run, load
from ..processes import each_result
from ..selection import add_selection, matching, select
from .cells import Table
from .groups import each_table, table_makers
from .latex import TEXT_WIDTH, latex_page
from .marks import MAX_TESTED
from .reference import FULL_CACHE, Reference
from .text import csv_page, html_page, markdown_page

FORMATS: Mapping[str, Callable[[Iterable[Table]], Iterator[str]]] = {
    "markdown": markdown_page,
    "latex": latex_page,
    "csv": csv_page,
    "html": html_page,
}
ENDINGS = {"md": "markdown", "tex": "latex", "csv": "csv", "html": "html"}
PER_TASK = 20
"""Groups of runs whose tables one process writes before it is given others."""
NOTHING_READ = 1
"""Exit status if there are records, and none of them can be shown."""


def main(argv: Sequence[str] | None = None) -> int:
    """``kvbench table``; exit status 2 for an input that cannot be used, 1 if no record can be shown."""
    args = _parser().parse_args(argv)
    try:
        page = _format(args)
        runs, problems = load(*args.results)
        gc.freeze()  # all runs stay until the end: the search for cycles need not go through them
        for problem in problems:
            print(problem, file=sys.stderr)
        if not runs:
            print(f"error: none of the {len(problems)} records can be shown", file=sys.stderr)
            return NOTHING_READ
        chosen = select(runs, args)
        Reference(args.against).check(chosen)
        if page is markdown_page and len(chosen) > MAX_TESTED and not args.published and args.columns is None:
            parts = _markdown_in_processes(args, chosen)
        else:
            parts = page(_wanted(args, chosen))
        _print(parts, args.output)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        gc.unfreeze()
    return 0


def _parser() -> argparse.ArgumentParser:
    from . import __doc__ as description

    parser = argparse.ArgumentParser(
        prog="kvbench table", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+", help="results folders, or any folders below them")
    parser.add_argument(
        "-o", "--output", type=Path, help="a file ending in .md, .tex, .csv or .html; default: the terminal"
    )
    parser.add_argument(
        "--format", choices=[*FORMATS, "md", "tex"], help="default: as the file's ending says, otherwise markdown"
    )
    add_selection(parser)
    parser.add_argument("--columns", metavar="NAMES", help="columns to show beside the first: names or patterns")
    parser.add_argument(
        "--width",
        type=float,
        default=TEXT_WIDTH,
        metavar="POINTS",
        help="LaTeX: width of the text (default: %(default)s)",
    )
    parser.add_argument(
        "--against",
        default=FULL_CACHE.name,
        metavar="METHOD",
        help="compare scores with this method on the same examples: at the row's budget (snapkv), or at one budget "
        "('snapkv 256'); default: full",
    )
    parser.add_argument(
        "--margin",
        type=float,
        metavar="POINTS",
        help="a column that says which methods lose less than this against full or METHOD (nats for perplexities)",
    )
    parser.add_argument("--by-budget", action="store_true", help="scores alone, a row a method and a column a budget")
    parser.add_argument(
        "--published", action="store_true", help="papers' figures of speed and memory beside the runs that answer them"
    )
    return parser


def _format(args: argparse.Namespace) -> Callable[[Iterable[Table]], Iterator[str]]:
    """What turns tables into text, from ``--format`` or the ending of ``-o``."""
    ending = args.format or ("markdown" if args.output is None else args.output.suffix.removeprefix("."))
    name = ENDINGS.get(ending, ending)
    if name not in FORMATS:
        raise InputError("-o", args.output, one_of(ending, ENDINGS, "a file ending in one of"))
    if name == "csv" and args.published:
        raise InputError("--published", "csv", "mixes runs and claims: use markdown, latex or html")
    if name == "csv" and args.by_budget:
        raise InputError("--by-budget", "csv", "has a run in each cell: leave it out, the csv names every number")
    if args.published and args.against != FULL_CACHE.name:
        raise InputError("--against", args.against, "compares scores: leave out --published")
    if args.margin is not None and not 0 < args.margin < float("inf"):
        raise InputError("--margin", f"{args.margin:g}", "must be a number of points above 0")
    if args.margin is not None and (args.by_budget or args.published):
        raise InputError("--margin", f"{args.margin:g}", "needs a row a run: leave out --by-budget and --published")
    if args.width < MIN_WIDTH:
        raise InputError("--width", f"{args.width:g}", f"must be at least {MIN_WIDTH:g} points")
    return (lambda tables: latex_page(tables, args.width)) if name == "latex" else FORMATS[name]


MIN_WIDTH = 200.0
"""Points: below that the name of a method and one column do not fit."""


def _wanted(args: argparse.Namespace, runs: Sequence[Run]) -> Iterator[Table]:
    if args.published:
        from ..published import published_table  # it builds on this package

        tables: Iterator[Table] = iter([published_table(runs)])
    else:
        tables = each_table(runs, args.by_budget, args.margin, Reference(args.against))
    return tables if args.columns is None else _with_columns(args.columns, list(tables))


def _markdown_in_processes(args: argparse.Namespace, runs: Sequence[Run]) -> Iterator[str]:
    """The same page, its tables made and written by several processes."""
    makers = table_makers(runs, args.by_budget, args.margin, Reference(args.against))

    def written(some: Sequence[Callable[[], list[Table]]]) -> str:
        return "".join(markdown_page(chain.from_iterable(make() for make in some)))

    work = [partial(written, makers[start : start + PER_TASK]) for start in range(0, len(makers), PER_TASK)]
    for number, part in enumerate(each_result(work)):
        yield ("\n\n" if number else "") + part


def _with_columns(wanted: str, tables: Sequence[Table]) -> Iterator[Table]:
    """The tables with the first column and those that are wanted; tables that have none of them are left out.

    A heading that is in a table twice (``95 % interval``) is in it twice again.
    """
    names = list(dict.fromkeys(chain.from_iterable(table.columns[1:] for table in tables)))
    folded = matching("--columns", wanted.lower(), [name.lower() for name in names])
    for table in tables:
        places = [i for i, name in enumerate(table.columns) if i == 0 or name.lower() in folded]
        if len(places) > 1:
            yield table.with_columns(places)


def _print(parts: Iterator[str], output: Path | None) -> None:
    """Print a text, or write it to a file.

    Raises:
        InputError: it cannot be written.
    """
    if output is None:
        for part in parts:
            print(part, end="")
        print()
        return
    write(output, chain(parts, ["\n"]))


def write(path: Path, text: str | Iterable[str]) -> None:
    """Write a result for the user and say so.

    Raises:
        InputError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            file.writelines([text] if isinstance(text, str) else text)
    except OSError as error:
        raise InputError("-o", path, f"cannot be written: {error.strerror}") from error
    print(f"wrote {path}")
