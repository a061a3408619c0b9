"""The last output of a run: the table of its group, the paths of the records, and commands to run next."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...analysis.load import Run, comparable, read_runs
from ...analysis.tables import KINDS, accuracy_table, markdown


def closing(folders: Sequence[Path], results_dir: str) -> str:
    """The text for the terminal.

    Args:
        folders: The run folders of one command, each with a record.
        results_dir: The option as the user gave it.
    """
    parts = []
    for group in comparable(read_runs(folders)):
        kind = group[0].record["kind"]
        # Without a column for each data set it fits a terminal; `kvbench table` has them all.
        table = accuracy_table(group, by_set=False) if kind == "accuracy" else KINDS[kind](group)
        lost = [_lost(run) for run in group if not run.done]
        parts += [markdown(table), "", *lost, *(f"record: {run.path}" for run in group)]
        parts += [f"next:   {line}" for line in _next(group, results_dir)]
    return "\n".join(parts)


def _lost(run: Run) -> str:
    done = run.record.get("examples_done")
    after = "" if done is None else f" after {done} examples"
    return f"{run.label}: out of memory{after} ({run.record['problem']})"


def _next(group: Sequence[Run], results_dir: str) -> list[str]:
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
    commands.append(f"kvbench table {results_dir}; kvbench plot {results_dir}")
    return commands
