"""A run on a scored task: its rows so far, and the results of a complete one."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ...analysis.costs import costs_of
from ...analysis.load import SAMPLES
from ...analysis.stats import PERCENT_BOUNDS
from ...analysis.summaries import difference, summarize
from ...tasks.base import PERCENT, Example, Source, Task
from ..config.settings import Settings
from .runs import MethodRun, find_reusable_runs, finished_baseline, record_head
from .samples import checked_rows

log = logging.getLogger(__name__)


@dataclass(eq=False)
class ScoredRun(MethodRun):
    """A run and its examples so far.

    Attributes:
        rows: Row of ``samples.jsonl`` by (data set, id).
        problem: Why the run cannot continue (out of memory), or None.
        cache_layers: Description of the model's layers; None before the model has answered.
    """

    rows: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    problem: str | None = None
    cache_layers: dict[str, Any] | None = None

    def read_rows(self, task: Task, examples: Sequence[Example]) -> None:
        """Read and check the rows that are there, and report rows that a finished record counts and that are lost."""
        self.rows = checked_rows(self.folder, task, self.method.label, examples)
        if lost := self.folder.lost_rows():
            damaged = f"{self.folder.path / SAMPLES} is damaged: it lacks {lost} rows that the record counts"
            log.info(f"{self.method.label}: {damaged}; their examples are run again")

    def reuse_rows(self, task: Task, examples: Sequence[Example]) -> None:
        """Copy rows of the same examples from finished runs, the newest first, and the sessions that made them.

        The rule is the same for all methods: if an example is in several runs, made by different code or on different
        machines, the methods that are compared take it from the same one.
        """
        for other in find_reusable_runs(self.folder, task.chosen_by):
            wanted = {(e.dataset, e.id) for e in examples} - self.rows.keys()
            rows = checked_rows(other, task, self.method.label)
            reused = [rows[key] for key in rows if key in wanted]
            if not reused:
                continue
            count = len(self.rows)
            for session in other.sessions():
                since = count + min(session["after_examples"], len(reused))
                self.folder.begin_session({**session, "after_examples": since, "reused": other.hash})
            for row in reused:
                self.add_row(row)
            log.info(f"{self.method.label}: {len(reused)} examples from {other.path}")

    def add_row(self, row: dict[str, Any]) -> None:
        """Append a row to ``samples.jsonl``."""
        self.folder.append(row)
        self.rows[(row["dataset"], row["id"])] = row

    def scores(self, task: Task, examples: Sequence[Example]) -> dict[str, dict[str, float]]:
        """{group of the task: {"dataset/id": score}}; scores of a percentage are x100."""
        out: dict[str, dict[str, float]] = {}
        factor = 100.0 if task.unit == PERCENT else 1.0
        for e in examples:
            out.setdefault(task.group(e), {})[f"{e.dataset}/{e.id}"] = factor * self.rows[(e.dataset, e.id)]["score"]
        return out

    def finish(
        self,
        task: Task,
        data: Source,
        examples: Sequence[Example],
        settings: Settings,
        co_batched_with: Sequence[str],
        circumstances: dict[str, Any],
    ) -> None:
        """Write ``record.json``.

        Args:
            data: Where the examples come from.
            examples: The run's examples.
            settings: The top-level configuration.
            co_batched_with: Labels of the methods that shared the pass over the examples.
            circumstances: Time, provenance, and ``problem`` if the run was out of memory.
        """
        status = "oom" if "problem" in circumstances else "done"
        record = record_head(status, self.folder, self.method, data, settings)
        record["data"]["examples"] = dict(Counter(e.dataset for e in examples))
        record["rode_with"] = list(co_batched_with)
        record["sessions"] = self.folder.sessions()
        if self.cache_layers is not None:
            record["cache_layers"] = self.cache_layers
        record |= circumstances
        if status == "done":
            record |= self._results(task, examples)
            fields, files = task.conclude([self.rows[(e.dataset, e.id)] for e in examples])
            record |= fields
            for name, content in files.items():
                self.folder.write(name, content)
        self.folder.finish(record)

    def _results(self, task: Task, examples: Sequence[Example]) -> dict[str, Any]:
        """Scores, confidence intervals and bytes of a complete run."""
        rows = [self.rows[(e.dataset, e.id)] for e in examples]
        scores = self.scores(task, examples)
        bounds = PERCENT_BOUNDS if task.unit == PERCENT else None
        return {
            **({} if task.unit == PERCENT else {"unit": task.unit}),
            **({"shown": {key: getattr(task, key) for key in task.shown}} if task.shown else {}),
            **summarize(scores, bounds, task.averages(list(scores))),
            **costs_of(rows),
        }


def add_paired_differences(runs: Sequence[ScoredRun], task: Task, examples: Sequence[Example]) -> None:
    """Add the paired difference to every record that lacks it, also if the baseline finished later."""
    baseline = finished_baseline(runs)
    if baseline is None:
        return
    for run in runs:
        if run is baseline or not run.folder.done or "paired" in run.folder.record():
            continue
        bounds = PERCENT_BOUNDS if task.unit == PERCENT else None
        estimate = difference(run.scores(task, examples), baseline.scores(task, examples), bounds)
        paired = {"with": baseline.method.label, "hash": baseline.folder.hash, "difference": estimate}
        with run.folder:
            run.folder.amend("paired", paired)
