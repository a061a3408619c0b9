"""Quality of a method on a task, paired with the full cache on the same examples.

One pass over the examples serves several methods: those that read the prompt whole ride on one prefill and decode as
one batch (``methods/cache/fan_out.py``). Each method has its own run folder, so who rode along changes nothing: a
method that is already done is not run again, and one that was killed continues after its last complete example.
"""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import Any

from tqdm import tqdm

from ..analysis.load import SAMPLES
from ..analysis.stats import macro_mean, paired_difference
from ..conf.errors import InputError, one_of, require
from ..methods.cache.layout import describe_layers, full_shape, model_shape
from ..methods.cache.method import Method
from ..models.base import LoadedModel, ModelSource
from ..tasks.base import PERCENT, Example, Reply, Source, Task, is_text
from . import provenance
from .ask import Answer, Item, ask, encode, row_seed
from .engine import Sampling
from .measure import is_out_of_memory, release_memory
from .record import START_OVER, RunFolder, example_key
from .runs import (
    BASELINE,
    MethodRun,
    PairedRunner,
    distinct_sources,
    find_reusable_runs,
    finished_baseline,
    open_run,
    record_head,
    run_with_locks,
)
from .settings import Settings
from .weights import load

QUESTIONS = ("with_context", "after_compression")


@dataclass(eq=False)
class ScoredRun(MethodRun):
    """A run and its examples so far."""

    rows: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)  # (dataset, id) -> row of samples.jsonl
    problem: str | None = None  # why it cannot go on: out of memory
    cache_layers: dict[str, Any] | None = None  # of the model, once it has answered

    def scores(self, task: Task, examples: Sequence[Example]) -> dict[str, dict[str, float]]:
        """{group of the task: {"dataset/id": score, of 100 where it is a percentage}}."""
        out: dict[str, dict[str, float]] = {}
        factor = 100.0 if task.unit == PERCENT else 1.0
        for e in examples:
            out.setdefault(task.group(e), {})[f"{e.dataset}/{e.id}"] = factor * self.rows[(e.dataset, e.id)]["score"]
        return out


@dataclass
class AccuracyRunner(PairedRunner):
    """``runner=accuracy``; several budgets of one method ride on one prefill.

    Attributes:
        temperature, top_p: sampling; temperature 0 is greedy, which LongBench asks for.
        question: ``with_context``: a method compresses the whole prompt, its question included, as the papers do.
            ``after_compression``: it compresses the context, and the question comes after that: the cache of a document
            that is asked about later. Scores of the two are never in one table.
        reuse: begin with the rows that finished runs under the same ``results_dir`` have of the same examples, where
            only the task's choice of examples differs (``task.limit``, ``task.datasets``). The record's ``sessions``
            name those runs and the code that made them.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    question: str = "with_context"
    reuse: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        at = "runner."
        for key in ("temperature", "top_p"):
            value = getattr(self, key)
            require(isinstance(value, int | float), at + key, value, "must be a number")
            setattr(self, key, float(value))  # 0 and 0.0 are the same run
        require(self.question in QUESTIONS, at + "question", self.question, one_of(self.question, QUESTIONS))
        require(isinstance(self.reuse, bool), at + "reuse", self.reuse, "must be true or false")
        require(self.temperature >= 0, at + "temperature", self.temperature, "must be >= 0")
        require(0 < self.top_p <= 1, at + "top_p", self.top_p, "must be in (0, 1]")

    def run(
        self, source: ModelSource, methods: Sequence[Method], task: Task, settings: Settings, say: Callable[[str], None]
    ) -> list[ScoredRun]:
        """Run every method on every example and write one record each.

        Args:
            source: where the model comes from.
            methods: the methods asked for first, then those they are paired with; the plain full cache among them is
                the baseline of the paired differences.
            task: the task.
            settings: the top-level configuration.
            say: prints a line for the person at the keyboard.

        Returns:
            The runs, in the order of ``methods``, all complete.
        """
        if not isinstance(task, Task):
            raise InputError("task", task.name, "is timed, not scored: use runner=efficiency, or task=longbench")
        if source.random_weights:
            raise InputError(
                "model",
                source.name,
                "has random weights, so its answers mean nothing: use runner=efficiency, or a real model",
            )
        if self.reuse:
            one_at_a_time = "must be false with batch_size > 1, where a row's bytes depend on what it is padded to"
            require(settings.batch_size == 1, "runner.reuse", True, one_at_a_time)
            require(len(task.chosen_by) > 0, "runner.reuse", True, f"must be false: {task.name} is one set of examples")
        examples = task.examples()
        for e in examples:
            name = f"{e.dataset}/{e.id}"
            require(is_text(name + e.prompt), "task", task.name, f"{name!a} has half of a character in it")
        data = task.source()
        say(f"data: {data.name}, {len(examples)} examples, from {data.location}")
        runs = [self._open(m, source.for_sharing(m.sharing, m.name), task, settings) for m in methods]
        made_by = provenance.collect(settings.torch_device)  # now: the files may change while the run goes on

        def work(mine: list[ScoredRun]) -> None:
            started = time.time()
            for run in mine:
                run.rows = checked_rows(run.folder, task, run.method.label, examples)
                if lost := run.folder.lost_rows():
                    damaged = f"{run.folder.path / SAMPLES} is damaged: it lacks {lost} rows that the record counts"
                    say(f"{run.method.label}: {damaged}; their examples are run again")
                if self.reuse and not run.folder.done:
                    self._reuse(run, examples, task, say)
            for one in distinct_sources(mine):
                self._complete([run for run in mine if run.source == one], examples, one, task, settings, made_by, say)
            for run in mine:
                if not run.folder.done:
                    circumstances = {"wall_s": round(time.time() - started, 1), "provenance": made_by}
                    if run.problem is not None:
                        circumstances |= {"problem": run.problem, "examples_done": len(run.rows)}
                    self._finish(run, mine, examples, task, settings, circumstances)

        run_with_locks(runs, work, say)
        self._pair(runs, examples, task)  # with no lock held but the one of the record that is being amended
        return runs

    @staticmethod
    def _reuse(run: ScoredRun, examples: list[Example], task: Task, say: Callable[[str], None]) -> None:
        """Copy rows of the same examples from finished runs, the newest first, and with them who made them.

        By one rule for all methods: where an example is in several runs, made by different code or on different
        machines, what is compared with each other should be of the same one.
        """
        for other in find_reusable_runs(run.folder, task.chosen_by):
            wanted = {(e.dataset, e.id) for e in examples} - run.rows.keys()
            rows = checked_rows(other, task, run.method.label)
            taken = [rows[key] for key in rows if key in wanted]
            if not taken:
                continue
            had = len(run.rows)
            for session in other.sessions():
                since = had + min(session["after_examples"], len(taken))
                run.folder.begin_session({**session, "after_examples": since, "reused": other.hash})
            for row in taken:
                run.folder.append(row)
                run.rows[(row["dataset"], row["id"])] = row
            say(f"{run.method.label}: {len(taken)} examples from {other.path}")

    def _open(self, method: Method, source: ModelSource, task: Task, settings: Settings) -> ScoredRun:
        drawn = (self.temperature, self.top_p) if task.writes else (0.0, 1.0)
        further: dict[str, Any] = {"sampling": dict(zip(("temperature", "top_p"), drawn, strict=True))}
        if settings.batch_size > 1:  # prompts padded to a common length take more bytes; one at a time is the norm
            further["batch_size"] = settings.batch_size
        if self._splits:
            further["question"] = self.question
        folder = open_run(
            "accuracy", method, source, self._data(task), task.identity() | task.scoring(), settings, **further
        )
        return ScoredRun(method, folder, source)

    @property
    def _splits(self) -> bool:
        return self.question == "after_compression"

    def _data(self, task: Task) -> Source:
        """Where the examples come from; asked in another way they are another task."""
        source = task.source()
        return replace(source, name=f"{source.name}-agnostic") if self._splits else source

    def _complete(
        self,
        runs: list[ScoredRun],
        examples: list[Example],
        source: ModelSource,
        task: Task,
        settings: Settings,
        made_by: dict[str, Any],
        say: Callable[[str], None],
    ) -> None:
        """Generate what is missing; loads the model only if something is."""
        unfinished = [run for run in runs if not run.folder.done]  # once: asking reads the record
        missing = [(e, [r for r in unfinished if (e.dataset, e.id) not in r.rows]) for e in examples]
        missing = [(e, who) for e, who in missing if who]
        for run in runs:
            if run not in unfinished:
                say(f"{run.method.label}: already done, in {run.folder.path}")
            elif run.rows:
                say(f"{run.method.label}: continues after {len(run.rows)} of {len(examples)} examples")
                before = {s["git"]["sha"] for s in run.folder.sessions()}
                if before - {made_by["git"]["sha"]}:
                    say(f"{run.method.label}: its first examples were made by other code; the record lists both")
        if not missing:
            return
        say(f"model: {source.name} on {settings.torch_device} in {settings.torch_dtype}")
        try:
            loaded = load(source, settings.torch_device, settings.torch_dtype)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            for run in unfinished:
                run.problem = f"loading the model: {str(error).splitlines()[0]}"
            return
        assert loaded.tokenizer is not None
        say(f"tokenising {len(missing)} prompts")
        work = self._batches(missing, task, loaded, settings.batch_size)
        for run in {id(run): run for _, who in missing for run in who}.values():
            session = {"after_examples": len(run.rows), "git": made_by["git"], "packages": made_by["packages"]}
            run.folder.begin_session({**session, "chunk_size": self.chunk_size, "hardware": made_by["hardware"]})
        total = sum(item.read_tokens for batch, _ in work for item in batch)
        with tqdm(total=total, unit="tok", unit_scale=True, file=sys.stderr, smoothing=0.1) as bar:
            for batch, who in work:
                bar.set_description(batch[0].example.dataset)
                self._run_batch(batch, who, task, loaded, settings, say)
                bar.update(sum(item.read_tokens for item in batch))

    def _batches(
        self, missing: list[tuple[Example, list[ScoredRun]]], task: Task, loaded: LoadedModel, batch_size: int
    ) -> list[tuple[list[Item], list[ScoredRun]]]:
        """Examples of one data set that lack the same methods, sorted by length, in batches."""
        limit = task.max_length or (loaded.max_positions if task.fills_positions else loaded.max_prompt_tokens)
        groups: dict[tuple[Any, ...], tuple[list[Item], list[ScoredRun]]] = {}
        for example, who in missing:
            item = encode(task, example, loaded, limit, self._splits)
            key = (example.dataset, example.max_new_tokens, item.kind, tuple(id(run) for run in who))
            groups.setdefault(key, ([], who))[0].append(item)
        batches = []
        for items, who in groups.values():
            items.sort(key=lambda item: len(item.prompt))
            batches += [(items[i : i + batch_size], who) for i in range(0, len(items), batch_size)]
        return batches

    def _run_batch(
        self,
        batch: list[Item],
        who: list[ScoredRun],
        task: Task,
        loaded: LoadedModel,
        settings: Settings,
        say: Callable[[str], None],
    ) -> None:
        """Ask one batch of every method that lacks it, and append the rows.

        Where several caches at once are too much for the memory they are tried in smaller groups, at last one by one,
        so that a method that fits is not lost to one that does not.
        """
        sampling = Sampling(self.temperature, self.top_p, [row_seed(settings.seed, item.example) for item in batch])
        references: list[Reply | None] = [None] * len(batch)
        groups = list(together([run for run in who if run.problem is None], apart=bool(batch[0].scored)))
        wanted = task.compares  # the full cache's own replies, of the same reading
        if wanted and not (groups and groups[0][0].method.shares_steps and groups[0][0].method.passes is None):
            groups.insert(0, [])
        while groups:
            asked, problem = groups.pop(0), ""
            try:
                methods = [run.method for run in asked] + [BASELINE] * wanted
                answers = ask(methods, batch, task, loaded, settings.torch_device, sampling, self.chunk_size)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                problem = str(error).splitlines()[0]
            if problem:  # outside of the handler: the error holds the caches' tensors alive
                release_memory(settings.torch_device)
                if len(asked) + wanted > 1:
                    groups = [[]] * wanted + smaller(asked) + groups
                    continue
                for run in asked or [r for group in groups for r in group]:  # without a reference there is no score
                    run.problem = problem
                    say(f"{run.method.label}: out of memory: {problem}")
                if not asked:
                    return
                continue
            if wanted:
                references, wanted = [answer.reply for answer in answers.pop()], False
            for run, mine in zip(asked, answers, strict=True):
                for item, answer, reference in zip(batch, mine, references, strict=True):
                    line = self._row(run, item, answer, task, reference, loaded)
                    run.folder.append(line)
                    run.rows[(item.example.dataset, item.example.id)] = line

    def _row(
        self, run: ScoredRun, item: Item, answer: Answer, task: Task, reference: Reply | None, loaded: LoadedModel
    ) -> dict[str, Any]:
        """A line of ``samples.jsonl``."""
        example = item.example
        if run.cache_layers is None:
            run.cache_layers = describe_layers(loaded.model)
        shape, full = model_shape(loaded.model), full_shape(loaded.model, run.method.sharing)
        read = item.compressed_lengths
        return {
            "dataset": example.dataset,
            "id": example.id,
            "method": run.method.label,
            **answer.fields,
            **task.judge(example, answer.fields["prediction"], answer.reply, reference),
            "prompt_tokens": max(read) + len(item.question),
            **({"question_tokens": len(item.question)} if item.question else {}),
            "kv_bytes_formula": round(fmean(run.method.bytes_formula(shape, n) for n in read)),
            "kv_bytes_full": round(fmean(BASELINE.bytes_formula(full, n) for n in read)),
            **{k: example.meta[k] for k in ("length", "row", "depth") if k in example.meta},
        }

    def _finish(
        self,
        run: ScoredRun,
        runs: list[ScoredRun],
        examples: list[Example],
        task: Task,
        settings: Settings,
        circumstances: dict[str, Any],
    ) -> None:
        """Write ``record.json``."""
        record = record_head(
            "oom" if "problem" in circumstances else "done", run.folder, run.method, self._data(task), settings
        )
        record["data"]["examples"] = dict(Counter(e.dataset for e in examples))
        record["rode_with"] = [r.method.label for r in runs if r is not run]
        record["sessions"] = run.folder.sessions()
        if run.cache_layers is not None:
            record["cache_layers"] = run.cache_layers
        record |= circumstances
        if record["status"] == "done":
            record |= self._results(run, examples, task)
            further, files = task.conclude([run.rows[(e.dataset, e.id)] for e in examples])
            record |= further
            for name, content in files.items():
                run.folder.write(name, content)
        run.folder.finish(record)

    def _results(self, run: ScoredRun, examples: list[Example], task: Task) -> dict[str, Any]:
        """Scores, intervals and bytes of a complete run."""
        rows = [run.rows[(e.dataset, e.id)] for e in examples]
        scores = run.scores(task, examples)
        by_group = {group: list(by_id.values()) for group, by_id in scores.items()}
        return {
            **({} if task.unit == PERCENT else {"unit": task.unit}),
            **({"shown": {key: getattr(task, key) for key in task.shown}} if task.shown else {}),
            "scores": {group: asdict(macro_mean({group: values})) for group, values in by_group.items()},
            "average": asdict(macro_mean(by_group)),
            "averages": {
                name: asdict(macro_mean({group: by_group[group] for group in over}))
                for name, over in task.averages(list(by_group)).items()
            },
            "bytes": {
                "kv_bytes_stored": fmean(r["kv_bytes_stored"] for r in rows),
                "kv_bytes_stored_end": fmean(r["kv_bytes_stored_end"] for r in rows),
                "kv_bytes_logical": fmean(r["kv_bytes_logical"] for r in rows),
                "kv_bytes_formula": fmean(r["kv_bytes_formula"] for r in rows),
                "kv_bytes_full": fmean(r["kv_bytes_full"] for r in rows),
                "kv_ratio": sum(r["kv_bytes_stored"] for r in rows) / sum(r["kv_bytes_full"] for r in rows),
            },
            "prompt_tokens": fmean(r["prompt_tokens"] for r in rows),
        }

    def _pair(self, runs: list[ScoredRun], examples: list[Example], task: Task) -> None:
        """Add the paired difference to every record that lacks it, also where the baseline came later."""
        baseline = finished_baseline(runs)
        if baseline is None:
            return
        for run in runs:
            if run is baseline or not run.folder.done or "paired" in run.folder.record():
                continue
            difference = paired_difference(run.scores(task, examples), baseline.scores(task, examples))
            with run.folder:
                run.folder.amend(
                    "paired",
                    {"with": baseline.method.label, "hash": baseline.folder.hash, "difference": asdict(difference)},
                )


KV_BYTES = tuple(f"kv_bytes_{kind}" for kind in ("stored", "stored_end", "logical", "formula", "full"))
MEASURED = ("score", "prompt_tokens", *KV_BYTES)
"""Numbers that every row of ``samples.jsonl`` has."""


def checked_rows(
    folder: RunFolder, task: Task, label: str, examples: Sequence[Example] | None = None
) -> dict[tuple[str, str], dict[str, Any]]:
    """Rows of a run by (data set, id), each checked to be one that this run can have written.

    Args:
        folder: the run.
        task: the task, which says what a score can be.
        label: the method's label.
        examples: the run's examples; None: those of another choice, of which any may be there.

    Raises:
        InputError: a row is damaged, of another method or of no example of the run, or it contradicts an earlier row of
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
    """What shows that a row was not written by a run of ``label`` on ``task``, or None."""
    missing = [key for key in ("dataset", "id", "method", "prediction", *MEASURED) if key not in row]
    if missing:
        return f"lacks {', '.join(missing)}"
    if example_key(row) is None:
        return "has a dataset or an id that is no text"
    if row["method"] != label:
        return f"is of {row['method']}, not of {label}"
    for key in MEASURED:
        value = row[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            return f"has {key}={value!r}, which is no number of 0 or more"
    if task.unit == PERCENT and row["score"] > 1:
        return f"has score={row['score']!r}, which is no share of 1"
    return None


def together(runs: Sequence[ScoredRun], apart: bool = False) -> Iterator[list[ScoredRun]]:
    """Split runs into those that can go on together after the prompt, and the others one by one.

    ``apart``: those whose tokens are rounded as they age are fed one by one, and the others should not wait for them.
    """

    def kind(run: ScoredRun) -> tuple[object, ...]:
        return run.method.passes, apart and not run.method.storage.is_exact, run.method.shares_steps or id(run)

    for one in dict.fromkeys(map(kind, runs)):
        yield [r for r in runs if kind(r) == one]


def smaller(runs: Sequence[ScoredRun]) -> list[list[ScoredRun]]:
    """The same runs in groups that hold less at a time: first without those that read the prompt by themselves."""
    alike = [r for r in runs if r.method.shares_prompt]
    if len(alike) in (0, 1, len(runs)):
        return [[r] for r in runs]
    return [alike, *([r] for r in runs if not r.method.shares_prompt)]
