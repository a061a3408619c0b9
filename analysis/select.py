"""Selection of runs by method, task, model and budget: the flags that commands on results share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..conf.errors import InputError, one_of
from .load import Run


def add_selection_flags(parser: argparse.ArgumentParser) -> None:
    """Add ``--methods``, ``--tasks``, ``--models`` and ``--budgets``."""
    add = parser.add_argument
    add(
        "--methods",
        metavar="NAME,...",
        default="",
        help="methods or labels (snapkv,kivi2); the full cache always stays",
    )
    add("--tasks", metavar="NAME,...", default="", help="tasks (longbench-subset,needle)")
    add("--models", metavar="NAME,...", default="", help="models")
    add("--budgets", metavar="N,...", default="", help="budgets (256,0.5); runs without a budget stay")


def selected(runs: Sequence[Run], args: argparse.Namespace) -> list[Run]:
    """Return the runs that the flags name.

    Raises:
        InputError: A name or budget that no run has.
    """
    kept = list(runs)
    for flag, key in (("--tasks", "task"), ("--models", "model")):
        wanted = _names(flag, getattr(args, flag[2:]), {run.record[key] for run in runs})
        kept = [run for run in kept if not wanted or run.record[key] in wanted]
    methods = _names("--methods", args.methods, {name for run in runs for name in _method_names(run)})
    kept = [run for run in kept if not methods or run.is_full_cache or methods & _method_names(run)]
    budgets = _names("--budgets", args.budgets, {f"{run.record['budget']:g}" for run in runs if run.record["budget"]})
    return [
        run for run in kept if not budgets or run.record["budget"] is None or f"{run.record['budget']:g}" in budgets
    ]


def _method_names(run: Run) -> set[str]:
    """Return the names that a run answers to: its method's and its label's with and without settings."""
    return {run.record["method"], run.curve, run.curve.partition(" (")[0]}


def _names(flag: str, text: str, existing: set[str]) -> set[str]:
    names = {name.strip() for name in text.split(",") if name.strip()}
    for name in sorted(names - existing):
        raise InputError(flag, name, one_of(name, existing))
    return names
