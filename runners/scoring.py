"""The pass over the examples of a task: batches of prompts, answered by several methods and scored.

Methods that run the whole prompt share one prefill and decode as one batch (``methods/cache/fan_out.py``).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ..methods.cache.layout import describe_layers, full_shape, model_shape
from ..models.base import LoadedModel, ModelSource
from ..tasks.base import Example, Reply, Task
from .config.settings import Settings
from .engine import Sampling
from .engine.weights import load
from .evaluate_batch import Answer, Item, encode, evaluate_batch, row_seed
from .measure.memory import is_out_of_memory, release_memory
from .progress import Progress, status_line
from .progress import Work as BatchWork
from .records.runs import BASELINE
from .records.scored_run import ScoredRun
from .records.step_bytes import step_bytes

log = logging.getLogger(__name__)

Work = tuple[list[Item], list[ScoredRun]]
"""A batch of examples, and the runs that lack it."""


@dataclass(frozen=True)
class Scoring:
    """A pass over the examples of a task.

    Attributes:
        settings: The top-level configuration.
        temperature, top_p, chunk_size: Options of the runner.
        splits_question: Whether the method compresses before it sees the question.
        made_by: Provenance of this process.
    """

    task: Task
    settings: Settings
    temperature: float
    top_p: float
    chunk_size: int | None
    splits_question: bool
    made_by: dict[str, Any]

    def complete(self, runs: list[ScoredRun], examples: list[Example], source: ModelSource) -> None:
        """Run the missing examples of runs with the same model; the model is loaded only if there are any."""
        unfinished = [run for run in runs if not run.folder.done]  # evaluated once, because it reads the record
        missing = [(e, [r for r in unfinished if (e.dataset, e.id) not in r.rows]) for e in examples]
        missing = [(e, lacking) for e, lacking in missing if lacking]
        for run in runs:
            self._announce(run, run in unfinished, len(examples))
        if not missing:
            return
        log.info(f"model: {source.name} on {self.settings.torch_device} in {self.settings.torch_dtype}")
        try:
            loaded = load(source, self.settings.torch_device, self.settings.torch_dtype)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            for run in unfinished:
                run.problem = f"loading the model: {str(error).splitlines()[0]}"
            return
        assert loaded.tokenizer is not None
        log.info(f"tokenising {len(missing)} prompts")
        work = self._batches(missing, loaded)
        for run in {id(run): run for _, lacking in missing for run in lacking}.values():
            session = {"after_examples": len(run.rows), "git": self.made_by["git"]}
            session |= {"packages": self.made_by["packages"], "chunk_size": self.chunk_size}
            run.folder.begin_session(session | {"hardware": self.made_by["hardware"]})
        progress = Progress([_size(batch) for batch, _ in work])
        with status_line(progress.text):
            for batch, lacking in work:
                progress.begin_batch(", ".join(run.method.label for run in lacking))
                self._run_batch(batch, lacking, loaded, progress)

    def _announce(self, run: ScoredRun, is_unfinished: bool, count: int) -> None:
        if not is_unfinished:
            log.info(f"{run.method.label}: already done, in {run.folder.path}")
        elif run.rows:
            log.info(f"{run.method.label}: continues after {len(run.rows)} of {count} examples")
            before = {s["git"]["sha"] for s in run.folder.sessions()}
            if before - {self.made_by["git"]["sha"]}:
                log.info(f"{run.method.label}: its first examples were made by other code; the record lists both")

    def _batches(self, missing: list[tuple[Example, list[ScoredRun]]], loaded: LoadedModel) -> list[Work]:
        """Batches of examples of one data set that the same runs lack, sorted by length."""
        task, size = self.task, self.settings.batch_size
        limit = task.max_length or (loaded.max_positions if task.fills_positions else loaded.max_prompt_tokens)
        by_kind: dict[tuple[Any, ...], Work] = {}
        for example, lacking in missing:
            item = encode(task, example, loaded, limit, self.splits_question)
            key = (example.dataset, example.max_new_tokens, item.kind, tuple(id(run) for run in lacking))
            by_kind.setdefault(key, ([], lacking))[0].append(item)
        batches = []
        for items, lacking in by_kind.values():
            items.sort(key=lambda item: len(item.prompt))
            batches += [(items[i : i + size], lacking) for i in range(0, len(items), size)]
        return batches

    def _run_batch(self, batch: list[Item], lacking: list[ScoredRun], loaded: LoadedModel, progress: Progress) -> None:
        """Run one batch with every method that lacks it, and append the rows.

        If several caches at once do not fit into memory they are tried in smaller groups, at last one by one, so that
        a method that fits does not fail because of one that does not.
        """
        references: list[Reply | None] = [None] * len(batch)
        groups = list(co_batched([run for run in lacking if run.problem is None], apart=bool(batch[0].scored)))
        needs_reference = self.task.compares  # the full cache's replies, from the same prefill
        if needs_reference and not (groups and _shares_plain_prefill(groups[0])):
            groups.insert(0, [])
        while groups:
            runs = groups.pop(0)
            answers, problem = self._answers(runs, needs_reference, batch, loaded, progress)
            if problem is not None:
                release_memory(self.settings.torch_device)
                if len(runs) + needs_reference > 1:
                    groups = [[]] * needs_reference + smaller_groups(runs) + groups
                    continue
                for run in runs or [r for group in groups for r in group]:  # without a reference there is no score
                    run.problem = problem
                    log.info(f"{run.method.label}: out of memory: {problem}")
                if not runs:
                    return
                continue
            if needs_reference:
                references, needs_reference = [answer.reply for answer in answers.pop()], False
            for run, own in zip(runs, answers, strict=True):
                for item, answer, reference in zip(batch, own, references, strict=True):
                    run.add_row(self._row(run, item, answer, reference, loaded))

    def _answers(
        self,
        runs: list[ScoredRun],
        needs_reference: bool,
        batch: list[Item],
        loaded: LoadedModel,
        progress: Progress,
    ) -> tuple[list[list[Answer]], str | None]:
        """(answers of each run and then of the reference, None), or ([], message) if they were out of memory.

        The message is returned and the exception dropped, because its traceback keeps the caches' tensors alive.
        """
        seeds = [row_seed(self.settings.seed, item.example) for item in batch]
        sampling = Sampling(self.temperature, self.top_p, seeds)
        methods = [run.method for run in runs] + [BASELINE] * needs_reference
        try:
            device, task = self.settings.torch_device, self.task
            answers = evaluate_batch(methods, batch, task, loaded, device, sampling, self.chunk_size, progress.advance)
            return answers, None
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return [], str(error).splitlines()[0]

    def _row(
        self, run: ScoredRun, item: Item, answer: Answer, reference: Reply | None, loaded: LoadedModel
    ) -> dict[str, Any]:
        """A row of ``samples.jsonl``."""
        example = item.example
        if run.cache_layers is None:
            run.cache_layers = describe_layers(loaded.model)
        shape, full = model_shape(loaded.model), full_shape(loaded.model, run.method.sharing)
        lengths, group = item.compressed_lengths, self.task.group(example)
        return {
            "dataset": example.dataset,
            "id": example.id,
            **({} if group == example.dataset else {"group": group}),
            "method": run.method.label,
            **answer.fields,
            **self.task.judge(example, answer.fields["prediction"], answer.reply, reference),
            "prompt_tokens": max(lengths) + len(item.question),
            **({"question_tokens": len(item.question)} if item.question else {}),
            "kv_bytes_formula": round(fmean(run.method.bytes_formula(shape, n) for n in lengths)),
            "kv_bytes_full": round(fmean(BASELINE.bytes_formula(full, n) for n in lengths)),
            **step_bytes(run.method, loaded.model, item.steps(answer.fields["new_tokens"]), _padding(answer)),
            **{k: example.meta[k] for k in ("length", "row", "depth") if k in example.meta},
        }


def _padding(answer: Answer) -> int:
    """Bytes stored after the prompt beyond the real tokens."""
    return max(0, answer.fields["kv_bytes_stored"] - answer.fields["kv_bytes_logical"])


def _size(batch: Sequence[Item]) -> BatchWork:
    """A batch as the progress line counts it."""
    example = batch[0].example
    steps = 0 if batch[0].scored else example.max_new_tokens
    return BatchWork(example.dataset, len(batch), sum(item.read_tokens for item in batch), steps)


def _shares_plain_prefill(runs: Sequence[ScoredRun]) -> bool:
    """Whether the full cache can share the prefill of these runs."""
    return runs[0].method.shares_steps and runs[0].method.passes is None


def co_batched(runs: Sequence[ScoredRun], apart: bool = False) -> Iterator[list[ScoredRun]]:
    """Split runs into groups that can be decoded as one batch after the prompt, and the others one by one.

    Args:
        apart: Whether runs whose storage requantizes tokens, which are fed one by one, are kept apart from the others.
    """

    def kind(run: ScoredRun) -> tuple[object, ...]:
        return (
            run.method.passes,
            apart and not run.method.storage.capabilities.keeps_stored,
            run.method.shares_steps or id(run),
        )

    for one in dict.fromkeys(map(kind, runs)):
        yield [r for r in runs if kind(r) == one]


def smaller_groups(runs: Sequence[ScoredRun]) -> list[list[ScoredRun]]:
    """Split runs into groups that need less memory: first without those that need a separate prefill."""
    sharing = [r for r in runs if r.method.shares_prompt]
    if len(sharing) in (0, 1, len(runs)):
        return [[r] for r in runs]
    return [sharing, *([r] for r in runs if not r.method.shares_prompt)]
