"""Options that choose runs by method, task, model and budget; for every command that reads results."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

from ..conf.errors import InputError
from ..conf.wording import near
from .load import Run

MOST_NAMES = 20
"""Names in a message."""
COMMA = re.compile(r",(?![^()]*\))")
"""A comma between two names; one in parentheses is part of a label: ``expected_attention (epsilon 0.01, adaptive)``."""


def add_selection(parser: argparse.ArgumentParser) -> None:
    """Add the options to a command."""
    patterns = "names or patterns, with commas between them"
    parser.add_argument("--methods", metavar="NAMES", help=f"methods to show: {patterns} (full,snapkv,'kivi*')")
    parser.add_argument("--tasks", metavar="NAMES", help=f"tasks to show: {patterns}")
    parser.add_argument("--models", metavar="NAMES", help=f"models to show: {patterns}")
    parser.add_argument(
        "--budgets", metavar="NUMBERS", help="budgets to show, with commas between them; none: no budget"
    )


def select(runs: Sequence[Run], args: argparse.Namespace) -> list[Run]:
    """The runs that the options choose, in their order.

    A method's pattern may match its name (``snapkv``), its name with the budget (``snapkv 512``), or the row's label.

    Raises:
        InputError: a pattern or a number that no run has.
    """
    chosen = list(runs)
    chosen = _matching(chosen, "--methods", args.methods, _method_names)
    chosen = _matching(chosen, "--tasks", args.tasks, lambda run: [run.record["task"]])
    chosen = _matching(chosen, "--models", args.models, lambda run: [run.record["model"]])
    return _matching(chosen, "--budgets", args.budgets, lambda run: [_budget(run)])


def _matching(runs: list[Run], option: str, wanted: str | None, names_of: Callable[[Run], Sequence[str]]) -> list[Run]:
    if wanted is None:
        return runs
    names = [names_of(run) for run in runs]
    known = {name for of_run in names for name in of_run}
    matched = matching(option, wanted, sorted(known), sorted({of_run[0] for of_run in names}))
    return [run for run, of_run in zip(runs, names, strict=True) if not matched.isdisjoint(of_run)]


def matching(option: str, wanted: str, known: Sequence[str], shown: Sequence[str] | None = None) -> set[str]:
    """Those of the known names that one of the patterns matches.

    Args:
        option: Name of the option.
        wanted: Its value: patterns with commas between them.
        known: All names.
        shown: Those to be named in a message; default: all.

    Raises:
        InputError: a pattern that matches none.
    """
    matched: set[str] = set()
    for pattern in (part.strip() for part in COMMA.split(wanted)):
        names = {name for name in known if fnmatchcase(name, pattern)}
        if not names:
            options = list(known if shown is None else shown)
            raise InputError(
                option, pattern, f"is in none of these results: {_listed(options)}{near(pattern, options)}"
            )
        matched |= names
    return matched


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return f"they have {', '.join(names[:MOST_NAMES])}{more}" if names else "no run is left"


def _method_names(run: Run) -> list[str]:
    return [run.record["method"], run.record["method_label"], run.curve, run.label]


def _budget(run: Run) -> str:
    budget = run.record["budget"]
    return "none" if budget is None else f"{budget:g}" if isinstance(budget, float) else str(budget)
