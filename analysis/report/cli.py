"""A page of finished runs that opens in any browser, without network or server.

    kvbench report results/reference -o report.html
    kvbench report RESULTS MORE_RESULTS --methods full,snapkv --tasks 'longbench*'

The page holds the runs' numbers, settings and provenance and their predictions, with filters, sortable tables, Pareto
plots, needle maps, and each run's predictions beside the full cache's. It is one file, to be sent as it is.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ...conf.errors import InputError
from ..load import load
from ..selection import add_selection, select
from ..tables import write
from .data import report_data
from .page import page

LARGE_PAGE_BYTES = 50 * 10**6
"""Size from which the command names the way to a smaller page."""


def main(argv: Sequence[str] | None = None) -> int:
    """``kvbench report``; exit status 2 for an input that cannot be used."""
    parser = argparse.ArgumentParser(
        prog="kvbench report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+", help="results folders, or any folders below them")
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"), help="default: report.html")
    parser.add_argument(
        "--no-predictions",
        action="store_true",
        help="leave out the texts of the predictions (their scores stay): a smaller page, or data not to be passed on",
    )
    add_selection(parser)
    args = parser.parse_args(argv)
    try:
        if args.output.suffix.lower() not in (".html", ".htm"):
            raise InputError("-o", args.output, "must be a file ending in .html")
        runs, problems = load(*args.results)
        for problem in problems:
            print(problem, file=sys.stderr)
        if not runs:
            raise InputError("RESULTS", args.results[0], "holds no record that can be read")
        data = report_data(select(runs, args), problems, args.results, _version(), not args.no_predictions)
        text = page(data)
        write(args.output, text)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if len(text) > LARGE_PAGE_BYTES and not args.no_predictions:
        print(f"the page has {len(text) / 1e6:.0f} MB; --no-predictions makes a smaller one", file=sys.stderr)
    return 0


def _version() -> str:
    try:
        return version("kvbench")
    except PackageNotFoundError:  # a checkout that was never installed
        return "of a checkout"


if __name__ == "__main__":
    sys.exit(main())
