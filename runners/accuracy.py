"""Quality of a method on a task, paired with the full cache on the same examples.

One pass over the examples serves several methods: those that read the prompt whole ride on one prefill and decode as
one batch (``kvbench.methods.fan_out``). Each method has its own run folder, so who rode along changes nothing: a method
that is already done is not run again, and one that was killed continues after its last complete example.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from tqdm import tqdm

from ..analysis.stats import macro_mean, paired_difference
from ..conf.errors import InputError, require
from ..methods.base import KVCache, Method, full_shape, kv_shape
from ..methods.fan_out import FanOutCache
from ..models.base import LoadedModel, ModelSource
from ..models.pretrained import input_device
from ..tasks.base import Example, Task
from . import provenance
from .engine import Sampling, generate, left_padded
from .measure import is_out_of_memory, release_memory
from .runs import (
    BASELINE,
    MethodRun,
    PairedRunner,
    distinct_sources,
    finished_baseline,
    in_turns,
    open_run,
    record_head,
)
from .settings import Settings


@dataclass(eq=False)
class ScoredRun(MethodRun):
    """A run and its examples so far."""

    rows: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)  # (dataset, id) -> row of samples.jsonl
    problem: str | None = None  # why it cannot go on: out of memory

    def scores(self, task: Task, examples: Sequence[Example]) -> dict[str, dict[str, float]]:
        """{group of the task: {"dataset/id": score in [0, 100]}}."""
        out: dict[str, dict[str, float]] = {}
        for e in examples:
            out.setdefault(task.group(e), {})[f"{e.dataset}/{e.id}"] = 100.0 * self.rows[(e.dataset, e.id)]["score"]
        return out


@dataclass
class AccuracyRunner(PairedRunner):
    """``runner=accuracy``; several budgets of one method ride on one prefill.

    Attributes:
        temperature, top_p: sampling; temperature 0 is greedy, which LongBench asks for.
    """

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        at = "runner."
        for key in ("temperature", "top_p"):
            value = getattr(self, key)
            require(isinstance(value, int | float), at + key, value, "must be a number")
            setattr(self, key, float(value))  # 0 and 0.0 are the same run
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
        examples = task.examples()
        data = task.source()
        say(f"data: {data.name}, {len(examples)} examples, from {data.location}")
        runs = [self._open(m, source.for_sharing(m.sharing, m.name), task, settings) for m in methods]
        made_by = provenance.collect(settings.torch_device)  # now: the files may change while the run goes on

        def work(mine: list[ScoredRun]) -> None:
            started = time.time()
            for run in mine:
                run.rows = {(r["dataset"], r["id"]): r for r in run.folder.samples()}
            for one in distinct_sources(mine):
                self._complete([run for run in mine if run.source == one], examples, one, task, settings, made_by, say)
            for run in mine:
                if not run.folder.done:
                    circumstances = {"wall_s": round(time.time() - started, 1), "provenance": made_by}
                    if run.problem is not None:
                        circumstances |= {"problem": run.problem, "examples_done": len(run.rows)}
                    self._finish(run, mine, examples, task, settings, circumstances)

        in_turns(runs, work, say)
        self._pair(runs, examples, task)  # with no lock held but the one of the record that is being amended
        return runs

    def _open(self, method: Method, source: ModelSource, task: Task, settings: Settings) -> ScoredRun:
        further: dict[str, Any] = {"sampling": {"temperature": self.temperature, "top_p": self.top_p}}
        if settings.batch_size > 1:  # prompts padded to a common length take more bytes; one at a time is the norm
            further["batch_size"] = settings.batch_size
        folder = open_run("accuracy", method, source, task.source(), task.identity(), settings, **further)
        return ScoredRun(method, folder, source)

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
            loaded = source.load(settings.torch_device, settings.torch_dtype)
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
        total = sum(len(ids) for batch in work for _, ids, _ in batch)
        with tqdm(total=total, unit="tok", unit_scale=True, file=sys.stderr, smoothing=0.1) as bar:
            for batch in work:
                bar.set_description(batch[0][0].dataset)
                self._run_batch(batch, task, loaded, settings, say)
                bar.update(sum(len(ids) for _, ids, _ in batch))

    def _batches(
        self, missing: list[tuple[Example, list[ScoredRun]]], task: Task, loaded: LoadedModel, batch_size: int
    ) -> list[list[tuple[Example, list[int], list[ScoredRun]]]]:
        """Examples of one data set that lack the same methods, sorted by length, in batches."""
        limit = task.max_length or loaded.max_prompt_tokens
        groups: dict[tuple[str, tuple[int, ...]], list[tuple[Example, list[int], list[ScoredRun]]]] = {}
        for example, who in missing:
            ids = task.encode(example, loaded.tokenizer, limit)
            if len(ids) + example.max_new_tokens > loaded.max_positions:
                raise InputError(
                    "task.max_length",
                    limit,
                    f"{example.dataset}/{example.id} has {len(ids)} prompt tokens and may produce "
                    f"{example.max_new_tokens}, but {loaded.name} has {loaded.max_positions} positions; "
                    "the prompts must be shorter (see conf/task for the keys that say how long they are)",
                )
            key = (example.dataset, tuple(id(run) for run in who))
            groups.setdefault(key, []).append((example, ids, who))
        batches = []
        for group in groups.values():
            group.sort(key=lambda item: len(item[1]))
            batches += [group[i : i + batch_size] for i in range(0, len(group), batch_size)]
        return batches

    def _run_batch(
        self,
        batch: list[tuple[Example, list[int], list[ScoredRun]]],
        task: Task,
        loaded: LoadedModel,
        settings: Settings,
        say: Callable[[str], None],
    ) -> None:
        """Generate for one batch with every method that lacks it, and append the rows.

        Where several caches at once are too much for the memory they are tried one by one, so that a method that fits
        is not lost to one that does not.
        """
        config, dtype = loaded.model.config, loaded.model.dtype
        shape = kv_shape(config, dtype)
        groups = list(shared_prompts([run for run in batch[0][2] if run.problem is None]))
        while groups:
            together, problem = groups.pop(0), ""
            try:
                caches = [run.method.new_cache(loaded.model) for run in together]
                outputs = self._generate(caches, [(e, ids) for e, ids, _ in batch], loaded, settings)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                problem = str(error).splitlines()[0]
            if problem:  # outside of the handler: the error holds the caches' tensors alive
                caches = []
                release_memory(settings.torch_device)
                if len(together) > 1:
                    groups = [[run] for run in together] + groups
                else:
                    together[0].problem = problem
                    say(f"{together[0].method.label}: out of memory: {problem}")
                continue
            for run, rows in zip(together, outputs, strict=True):
                for (example, ids, _), row in zip(batch, rows, strict=True):
                    line = {
                        "dataset": example.dataset,
                        "id": example.id,
                        "method": run.method.label,
                        **row,
                        "score": task.score(example, row["prediction"]),
                        "prompt_tokens": len(ids),
                        "kv_bytes_formula": run.method.bytes_formula(shape, len(ids)),
                        "kv_bytes_full": BASELINE.bytes_formula(
                            full_shape(config, dtype, run.method.sharing), len(ids)
                        ),
                        **{k: example.meta[k] for k in ("length", "row") if k in example.meta},
                    }
                    run.folder.append(line)
                    run.rows[(example.dataset, example.id)] = line

    def _generate(
        self,
        caches: list[KVCache],
        prompts: list[tuple[Example, list[int]]],
        loaded: LoadedModel,
        settings: Settings,
    ) -> list[list[dict[str, Any]]]:
        """Outputs of every cache for every prompt: text, and bytes after the prompt and at the end."""
        assert loaded.tokenizer is not None
        example = prompts[0][0]
        where = input_device(loaded.model, settings.torch_device)
        input_ids, mask = left_padded([ids for _, ids in prompts], loaded.tokenizer.pad_token_id, where)
        cache = caches[0] if len(caches) == 1 else FanOutCache(caches)
        after_prompt: list[tuple[int, int]] = []
        result = generate(
            loaded.model,
            cache,
            input_ids,
            mask,
            max_new_tokens=example.max_new_tokens,
            stop_ids=stop_ids(loaded, example.stop_tokens),
            min_new_tokens=example.min_new_tokens,
            sampling=Sampling(self.temperature, self.top_p, [row_seed(settings.seed, e) for e, _ in prompts]),
            chunk_size=self.chunk_size,
            after_prefill=lambda: after_prompt.extend((c.kv_bytes_stored, c.kv_bytes_logical) for c in caches),
        )
        batch = len(prompts)
        return [
            [
                {
                    "prediction": loaded.tokenizer.decode(tokens, skip_special_tokens=True),
                    "new_tokens": len(tokens),
                    "kv_bytes_stored": after_prompt[i][0] // batch,
                    "kv_bytes_logical": after_prompt[i][1] // batch,
                    "kv_bytes_stored_end": c.kv_bytes_stored // batch,
                }
                for tokens in result.tokens[i * batch : (i + 1) * batch]
            ]
            for i, c in enumerate(caches)
        ]

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
            "oom" if "problem" in circumstances else "done", run.folder, run.method, task.source(), settings
        )
        record["data"]["examples"] = dict(Counter(e.dataset for e in examples))
        record["rode_with"] = [r.method.label for r in runs if r is not run]
        record["sessions"] = run.folder.sessions()
        record |= circumstances
        if record["status"] == "done":
            record |= self._results(run, examples, task)
        run.folder.finish(record)

    def _results(self, run: ScoredRun, examples: list[Example], task: Task) -> dict[str, Any]:
        """Scores, intervals and bytes of a complete run."""
        rows = [run.rows[(e.dataset, e.id)] for e in examples]
        scores = run.scores(task, examples)
        by_group = {group: list(by_id.values()) for group, by_id in scores.items()}
        return {
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


def shared_prompts(runs: Sequence[ScoredRun]) -> Iterator[list[ScoredRun]]:
    """Split runs into those that can share one reading of the prompt, and the others one by one."""
    sharing = [r for r in runs if r.method.shares_prompt]
    for passes in dict.fromkeys(r.method.passes for r in sharing):
        yield [r for r in sharing if r.method.passes == passes]
    for run in runs:
        if not run.method.shares_prompt:
            yield [run]


def row_seed(seed: int, example: Example) -> int:
    """Seed of one example's draws: the same whatever stands in its batch and whichever methods ride along."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{example.dataset}/{example.id}".encode()).digest()[:6], "big")


def stop_ids(loaded: LoadedModel, stop_tokens: Sequence[str]) -> list[int]:
    """Ids that end a generation: the model's own end-of-sequence ids, and the last token of each of ``stop_tokens``."""
    assert loaded.tokenizer is not None
    own = loaded.model.generation_config.eos_token_id
    ids = set(own if isinstance(own, list) else [own]) | {loaded.tokenizer.eos_token_id}
    for text in stop_tokens:
        ids.add(loaded.tokenizer.encode(text, add_special_tokens=False)[-1])
    return sorted(i for i in ids if i is not None)
