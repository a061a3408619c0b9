"""Figures of finished runs, from their records alone: SVG, PDF or PNG, and the points behind each as CSV.

    kvbench plot results/reference -o figures
    kvbench plot results/reference --figure pareto,forest --style paper --width single
    kvbench plot results/reference --methods snapkv,h2o --tasks longbench-subset --budgets 256,512 --x share

Runs stand in one figure only when nothing but the method differs; the full cache is in all of them, whatever is chosen.
Titles and captions are in index.md and manifest.json beside the figures. A method looks the same in every figure. One
whose numbers and style did not change is not drawn again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ...conf.errors import InputError
from ...conf.wording import one_of
from ..load import Run, load
from ..selection import add_selection, select
from .catalog import KINDS, MAIN_KINDS, builders
from .output import FORMATS, INDEX, plan, update_manifest, write_all
from .spec import Context, FigureSpec, Options, context_of
from .style import MAX_CURVES_OF_A_PAGE, WIDTH_INCHES, Style

OPTIONAL = [kind for kind in KINDS if kind not in MAIN_KINDS]
EPILOG = "figures:\n" + "\n".join(
    f"{'  ' if kind in MAIN_KINDS else '* '}{kind:<10} {meaning}" for kind, meaning in KINDS.items()
)


def main(argv: Sequence[str] | None = None) -> int:
    """``kvbench plot``; exit status 1 if a figure failed, 2 for an input that cannot be used."""
    args = _parser().parse_args(argv)
    try:
        return _plot(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="kvbench plot", description=__doc__, epilog=EPILOG, formatter_class=formatter)
    add = parser.add_argument
    add("results", type=Path, help="a results folder, or any folder below it")
    add("-o", "--output", type=Path, default=Path("figures"), help="folder for the files (./figures)")
    kinds = f"kinds of figures: {', '.join(KINDS)}; or all (default: all but {', '.join(OPTIONAL)})"
    add("--figure", metavar="KIND,...", default="", help=kinds)
    add_selection(parser)
    add(
        "--x",
        choices=("bytes", "share", "read", "budget"),
        default="bytes",
        help="x axis of pareto: memory by default (bytes); read: bytes of the cache that a step reads",
    )
    add(
        "--y",
        choices=("difference", "score"),
        default="difference",
        help="y axis of pareto and speed (difference)",
    )
    add("--style", choices=WIDTH_INCHES, default="screen", help="paper: 7 pt text, captions outside (screen)")
    add(
        "--width",
        choices=("single", "double"),
        default="double",
        help="3.25 or 6.75 inches in a paper (double)",
    )
    add("--format", metavar="ENDING,...", default="", help="files: pdf,svg,png,csv (svg,csv on a screen, else pdf,csv)")
    return parser


def _choices(flag: str, text: str, allowed: Sequence[str], default: Sequence[str]) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in allowed:
            raise InputError(flag, name, one_of(name, allowed))
    return [name for name in allowed if name in names] or list(default)


def _plot(args: argparse.Namespace) -> int:
    kinds = list(KINDS) if args.figure == "all" else _choices("--figure", args.figure, list(KINDS), MAIN_KINDS)
    style = Style(args.style, args.width)
    formats = _choices("--format", args.format, FORMATS, style.formats)
    runs, problems = load(args.results)
    context = context_of(runs, Options(args.x, args.y, bool(args.budgets)))
    specs, failures = _specs(_with_full_cache(runs, select(runs, args)), context, kinds)
    named = {flag: getattr(args, flag) for flag in ("methods", "tasks", "models", "budgets", "x", "y")}
    source = " ".join([str(args.results), *(f"{flag}={value}" for flag, value in named.items() if value)])
    jobs = plan(specs, args.output, source, style, formats)
    done = []
    for job, (status, failure) in zip(jobs, write_all(jobs, args.output, style), strict=True):
        if failure:
            failures.append(f"{job.name}: {failure}")
            continue
        done.append(job)
        for file in job.entry["files"]:
            print(f"{status} {args.output / file}")
        curves = len({point.curve for point in job.spec.points})
        if style.name == "paper" and curves > MAX_CURVES_OF_A_PAGE:
            print(f"note: {job.name} has {curves} methods and may be higher than a page: choose some with --methods")
    if done:
        for path in update_manifest(args.output, done, source, kinds):
            print(f"removed {path}")
        print(f"captions: {args.output / INDEX}")
    for line in [*problems, *context.problems, *(f"failed: {failure}" for failure in failures)]:
        print(" ".join(line.split()), file=sys.stderr)
    if not specs and not failures:
        print(f"nothing to plot in {args.results}: a figure needs two comparable runs", file=sys.stderr)
    return 1 if failures or not specs else 0


def _with_full_cache(runs: Sequence[Run], chosen: Sequence[Run]) -> list[Run]:
    """Return the chosen runs with the full cache of each group, which figures compare with."""
    ids, groups = {id(run) for run in chosen}, {run.group_key for run in chosen}
    return [run for run in runs if id(run) in ids or (run.is_full_cache and run.group_key in groups)]


def _specs(runs: Sequence[Run], context: Context, kinds: Sequence[str]) -> tuple[list[FigureSpec], list[str]]:
    """Return the figures, and a line for each that cannot be made, which does not stop the others."""
    specs: list[FigureSpec] = []
    failures = []
    for what, build in builders(runs, context, kinds):
        try:
            specs.extend(build())
        except Exception as error:
            failures.append(f"{what}: {type(error).__name__}: {error}")
    return specs, failures


if __name__ == "__main__":
    sys.exit(main())
