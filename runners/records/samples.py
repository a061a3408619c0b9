"""Rows of ``samples.jsonl``, read back and checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ...analysis.costs import KV_BYTES, STEP_BYTES
from ...conf.errors import InputError
from ...tasks.base import PERCENT, Example, Task
from .record import START_OVER, RunFolder, example_key

MEASURED = ("score", "prompt_tokens", *KV_BYTES)
"""Numbers that every row has."""


def checked_rows(
    folder: RunFolder, task: Task, label: str, examples: Sequence[Example] | None = None
) -> dict[tuple[str, str], dict[str, Any]]:
    """Rows of a run by (data set, id), each checked to be one that this run can have written.

    Args:
        folder: The run.
        task: The task, which defines the range of a score.
        label: The method's label.
        examples: The run's examples; None: the run has another choice of examples, so any may occur.

    Raises:
        InputError: A row is damaged, of another method or of no example of the run, or it contradicts an earlier row of
            its example; names file and line.
    """
    known = None if examples is None else {(e.dataset, e.id) for e in examples}
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for place, row in folder.numbered_samples():
        problem = _problem_of(row, task, label)
        key = example_key(row)
        name = "row" if key is None else "/".join(key)
        if key is not None and problem is None:
            if known is not None and key not in known:
                problem = "is no example of this run"
            elif rows.setdefault(key, row) != row:
                problem = "has another row before this one, with other content"
        if problem is not None:
            raise InputError(place, name, f"{problem}; {START_OVER}")
    return rows


def _problem_of(row: Mapping[str, Any], task: Task, label: str) -> str | None:
    """Why a row cannot have been written by a run of ``label`` on ``task``, or None."""
    missing = [key for key in ("dataset", "id", "method", "prediction", *MEASURED) if key not in row]
    if missing:
        return f"lacks {', '.join(missing)}"
    if example_key(row) is None:
        return "has a dataset or an id that is no text"
    if row["method"] != label:
        return f"is of {row['method']}, not of {label}"
    for key in (*MEASURED, *(key for key in STEP_BYTES if key in row)):
        value = row[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            return f"has {key}={value!r}, which is no number of 0 or more"
    if task.unit == PERCENT and row["score"] > 1:
        return f"has score={row['score']!r}, which is no share of 1"
    return None
