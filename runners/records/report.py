"""The last output of a run: the table of its group, the paths of the records, and commands to run next."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from ...analysis.load import RECORD, Run, comparable, read_runs
from ...analysis.tables import KINDS, Table, accuracy_table, markdown
from ..terminal import shown_path


def closing(folders: Sequence[Path]) -> str:
    """The text for the terminal.

    Args:
        folders: The run folders of one command, each with a record.
    """
    parts = []
    for group in comparable(read_runs(folders)):
        lost = [_lost(run) for run in group if not run.done]
        parts += [markdown(_table(group)), "", *lost, *(f"record: {run.path}" for run in group)]
        parts += [f"next:   {line}" for line in _next(group)]
    return "\n".join(parts)


def _lost(run: Run) -> str:
    done = run.record.get("examples_done")
    after = "" if done is None else f" after {done} examples"
    return f"{run.label}: out of memory{after} ({run.record['problem']})"


def _next(group: Sequence[Run]) -> list[str]:
    """Commands to run next."""
    first = group[0].record
    commands = []
    if not all(run.done for run in group):
        commands.append(
            "to save memory: runner.chunk_size=1024, a smaller batch_size, or 'runner.pair_with=[]' without full"
        )
    if first["kind"] == "accuracy" and first["identity"]["task"].get("limit") is not None:
        commands.append("the same command without task.limit for every example; it continues if it is stopped")
    if len(group) == 2 and any(run.record["budget"] is not None for run in group):
        commands.append("'runner.budgets=[128,256,512]' for several budgets in one command")
    folder = shlex.quote(shown_path(common_folder([run.path for run in group])))
    commands.append(f"kvbench table {folder}; kvbench plot {folder}")
    return commands


def joint_table(folders: Sequence[Path]) -> str:
    """The tables of all runs of a sweep, and the command that prints them again; empty without a finished run.

    Args:
        folders: Run folders; those that have no record any more are left out.
    """
    done = [folder for folder in dict.fromkeys(folders) if (folder / RECORD).is_file()]
    if not done:
        return ""
    tables = [markdown(_table(group)) for group in comparable(read_runs(done))]
    folder = shlex.quote(shown_path(common_folder(done)))
    return "\n".join([*tables, f"next:   kvbench table {folder}; kvbench plot {folder}"])


def _table(group: Sequence[Run]) -> Table:
    """The table of comparable runs that fits a terminal: without a column for each data set."""
    kind = group[0].record["kind"]
    return accuracy_table(group, by_set=False) if kind == "accuracy" else KINDS[kind](group)


def common_folder(folders: Sequence[Path]) -> Path:
    """The deepest folder that holds all run folders, or the folder above a single one: its method's."""
    return Path(os.path.commonpath([folder.absolute().parent for folder in folders]))
