"""Quality of a method on a task, paired with the full cache on the same examples.

One pass over the examples serves several methods (:mod:`.scoring`). Each method has its own run folder, so it does not
matter which methods share a pass: a method that is done is not run again, and one that was killed continues after its
last complete example.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from ..conf.errors import InputError, require
from ..conf.options import Bounds, NonNegativeFloat
from ..methods.cache.method import Method
from ..methods.policies.transformers_generate import TransformersGenerate
from ..models.base import ModelSource
from ..tasks.base import Described, Example, Source, Task, is_text
from .config.settings import Settings
from .records import provenance
from .records.runs import announce_needs, distinct_sources, open_run, run_with_locks
from .records.scored_run import ScoredRun, add_paired_differences
from .runner import PairedRunner
from .scoring import Scoring

log = logging.getLogger(__name__)


@dataclass
class AccuracyRunner(PairedRunner):
    """``runner=accuracy``; several budgets of one method share one prefill.

    Attributes:
        temperature, top_p: Sampling; temperature 0 is greedy, as LongBench requires.
        question: ``with_context``: a method compresses the whole prompt with its question, as in the papers.
            ``after_compression``: it compresses the context, and the question is fed afterwards, as for a cached
            document with later questions. Scores of the two are never in one table.
        reuse: Copy the rows of the same examples from finished runs under the same ``results_dir`` that differ only in
            the task's choice of examples (``task.limit``, ``task.datasets``). The record's ``sessions`` name those runs
            and their code.
    """

    temperature: NonNegativeFloat = 0.0
    top_p: Annotated[float, Bounds(gt=0, le=1)] = 1.0
    question: Literal["with_context", "after_compression"] = "with_context"
    reuse: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.temperature, self.top_p = float(self.temperature), float(self.top_p)  # 0 and 0.0 are the same run

    def data_group(self) -> str:
        """See :meth:`.runner.Runner.data_group`."""
        return "task"

    def run(
        self, source: ModelSource, methods: Sequence[Method], task: Described, settings: Settings
    ) -> list[ScoredRun]:
        """Run every method on every example and write one record each.

        Args:
            source: Where the model comes from.
            methods: The requested methods, then those they are paired with; the plain full cache among them is
                the baseline of the paired differences.
            settings: The top-level configuration.

        Returns:
            The runs, in the order of ``methods``, all complete.
        """
        task = self._checked(source, task, settings)
        for method in methods:
            is_scored = not isinstance(method, TransformersGenerate)
            require(is_scored, "method", method.name, "is timed, not scored: its answers are those of method=full")
        announce_needs(methods)
        examples = task.examples()
        for e in examples:
            name = f"{e.dataset}/{e.id}"
            require(is_text(name + e.prompt), "task", task.name, f"{name!a} has half of a character in it")
        data = task.source()
        log.info(f"data: {data.name}, {len(examples)} examples, from {data.location}")
        runs = [self._open(m, source.for_sharing(m.sharing, m.name), task, settings) for m in methods]
        made_by = provenance.collect(settings.torch_device)  # now, because files may change during the run
        scoring = Scoring(task, settings, self.temperature, self.top_p, self.chunk_size, self._splits_question, made_by)
        run_with_locks(runs, lambda locked: self._work(locked, examples, scoring))
        add_paired_differences(runs, task, examples)  # the only lock held is that of the record being amended
        return runs

    def _checked(self, source: ModelSource, task: Described, settings: Settings) -> Task:
        """The task, if this runner can score it on this model; otherwise InputError."""
        if not isinstance(task, Task):
            raise InputError("task", task.name, "is timed, not scored: use runner=efficiency, or task=longbench")
        if source.random_weights:
            raise InputError(
                "model",
                source.name,
                "has random weights, so its answers are meaningless: use runner=efficiency, or a trained model",
            )
        if self._splits_question:
            task.require_question()
        if self.reuse:
            one_at_a_time = "must be false with batch_size > 1, where a row's bytes depend on what it is padded to"
            require(settings.batch_size == 1, "runner.reuse", True, one_at_a_time)
            require(len(task.chosen_by) > 0, "runner.reuse", True, f"must be false: {task.name} is one set of examples")
        return task

    def _work(self, runs: list[ScoredRun], examples: list[Example], scoring: Scoring) -> None:
        """Complete the runs that are locked for this process, and read those that are done."""
        started = time.time()
        task, settings = scoring.task, scoring.settings
        for run in runs:
            run.read_rows(task, examples)
            if self.reuse and not run.folder.done:
                run.reuse_rows(task, examples)
        for source in distinct_sources(runs):
            scoring.complete([run for run in runs if run.source == source], examples, source)
        for run in runs:
            if run.folder.done:
                continue
            circumstances = {"wall_s": round(time.time() - started, 1), "provenance": scoring.made_by}
            if run.problem is not None:
                circumstances |= {"problem": run.problem, "examples_done": len(run.rows)}
            others = [other.method.label for other in runs if other is not run]
            run.finish(task, self._data(task), examples, settings, others, circumstances)

    def _open(self, method: Method, source: ModelSource, task: Task, settings: Settings) -> ScoredRun:
        drawn = (self.temperature, self.top_p) if task.writes else (0.0, 1.0)
        fields: dict[str, Any] = {"sampling": dict(zip(("temperature", "top_p"), drawn, strict=True))}
        if settings.batch_size > 1:  # padding changes the stored bytes, so only batch_size=1 has no entry
            fields["batch_size"] = settings.batch_size
        if self._splits_question:
            fields["question"] = self.question
        folder = open_run(
            "accuracy", method, source, self._data(task), task.identity() | task.scoring(), settings, **fields
        )
        return ScoredRun(method, folder, source)

    @property
    def _splits_question(self) -> bool:
        return self.question == "after_compression"

    def _data(self, task: Task) -> Source:
        """Where the examples come from; with the question after compression it is another task."""
        source = task.source()
        return replace(source, name=f"{source.name}-agnostic") if self._splits_question else source
