"""Any task of lm-evaluation-harness, answered through a compressed cache.

Published zero-shot numbers of compressed caches are mostly numbers of no compression at all: lm-eval's own model scores
a continuation by one forward over context and continuation, in which no cache takes part. Here the context is read as a
prompt and compressed, and the continuation is scored through what is left. The last context tokens are held back, so
that the first scored token, too, is predicted by a token that has seen the compressed cache alone.

lm-eval builds the requests and works out the metrics (Gao et al., "The Language Model Evaluation Harness", 2024,
https://zenodo.org/records/12608602); its tokenisation of contexts and continuations is used as it is, so the full cache
gets what its own model gets. In between, requests are examples like any other: one for each document.

A long text (``loglikelihood_rolling``) is scored in chunks, each through the compressed cache of all before it. The
first chunk has nothing before it and is scored with the full cache for every method.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import math
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar

from ..conf.errors import InputError, require
from ..conf.options import Entries, NonNegativeInt, PositiveInt, Wording
from ..conf.wording import near
from .base import NATS, PERCENT, Continuations, Example, Likelihood, Reply, Source, Task, names_of

INSTALL = "pip install 'kvbench[eval]'"
RESULTS = "lm_eval.json"
"""In the run's folder: what ``lm_eval.simple_evaluate`` gives, without the samples."""

MAX_NEW_TOKENS = 256
"""Of a request that names no limit, as lm-eval's own model has it."""

BOOTSTRAPS = 1000
"""For lm-eval's standard errors of metrics that have no formula for it."""

WHERE = (
    *("dataset_path", "dataset_name", "dataset_kwargs", "training_split", "validation_split", "test_split"),
    *("fewshot_split", "fewshot_config", "metadata"),
)
"""Of a task's configuration: where its documents come from, and what the requests show."""

LIKELIHOOD, ROLLING, GENERATE = "loglikelihood", "loglikelihood_rolling", "generate_until"


@dataclass
class LmEval(Task):
    """Tasks of lm-eval.

    Attributes:
        names: tasks, groups or tags, as ``lm_eval --tasks`` takes them.
        fewshot: examples in front of each question; None: as the task says.
        limit: documents of each task; None: all.
        data_files: for a task whose data shall come from files: its name -> the file with the split that is evaluated,
            or split -> file. JSON lines, gzipped or not, with the columns of the task's own data set.
        include_path: folder with lm-eval YAMLs of the user's own.
        held_back: last tokens of a context that are not compressed with it, 1 or more. With none, what comes first
            after a context would be predicted before compression, and one-token answers would not depend on the method.
        chunk: tokens of a long text scored through one compressed cache.
        metric: what ``score`` is: one that lies in [0, 1] and is averaged; None: each task's first of that kind. A long
            text's score is its loss in nats per token.
        seed: seed of the few-shot examples (lm-eval's is 1234).
        max_length: tokens of a context and its continuation; a longer context loses its beginning, as in lm-eval.
    """

    id: ClassVar[str] = "LmEval"
    name = "lm_eval"
    fills_positions = True
    shown = ("fewshot", "metric", "held_back", "chunk")
    location_fields = ("data_files", "include_path")

    names: Annotated[Sequence[str], Entries(), Wording("names of lm-eval's tasks, such as [hellaswag,piqa]")] = (
        "hellaswag",
    )
    fewshot: NonNegativeInt | None = None
    limit: PositiveInt | None = None
    data_files: Annotated[Mapping[str, Any], Wording("name -> file, such as {hellaswag: validation.jsonl}")] | None = (
        None
    )
    include_path: str | None = None
    held_back: PositiveInt = 1
    chunk: PositiveInt = 512
    metric: str | None = None
    seed: NonNegativeInt = 1234
    max_length: PositiveInt | None = None

    def __post_init__(self) -> None:
        at = "task."
        self.names = names_of(self.names)
        super().__post_init__()
        for name, files in (self.data_files or {}).items():
            if name not in self.names:
                raise InputError(at + "data_files", name, f"must be one of task.names={','.join(self.names)}")
            for file in files.values() if isinstance(files, Mapping) else [files]:
                there = isinstance(file, str | Path) and Path(file).expanduser().is_file()
                require(there, f"{at}data_files.{name}", file, "must be a file")
        if self.include_path is not None:
            folder = Path(self.include_path).expanduser()
            require(folder.is_dir(), at + "include_path", self.include_path, "must be a folder with lm-eval YAMLs")
            self.include_path = str(folder)

    @property
    def unit(self) -> str:  # type: ignore[override]
        """Nats where all tasks ask for the likelihood of long texts, which cannot be averaged with anything else."""
        return NATS if self._rolls else PERCENT

    def source(self) -> Source:
        """``lm_eval``, with a sha256 over each task: requests, documents, and how they are judged."""
        return self._source

    @cached_property
    def _source(self) -> Source:
        hashes = {}
        for name, documents in self._documents.items():
            config = {k: v for k, v in self._tasks[name].dump_config().items() if k not in WHERE}
            asked = [[[i.request_type, i.args, i.doc] for i in document] for document in documents]
            text = json.dumps([_lm_eval().__version__, config, asked], ensure_ascii=False, sort_keys=True, default=str)
            text = re.sub(r" at 0x[0-9a-f]+", "", text)  # where a function happens to lie in memory
            hashes[name] = hashlib.sha256(text.encode()).hexdigest()
        return Source("lm_eval", "lm-eval " + _lm_eval().__version__, _lm_eval().__version__, hashes)

    def examples(self) -> list[Example]:
        """One for each document of each task; ``meta["requests"]`` are lm-eval's."""
        examples, _ = [], self._metrics  # a metric that is not there is no news for the end of a run
        for name, documents in self._documents.items():
            for requests in documents:
                first = requests[0]
                further: dict[str, Any] = {}
                if first.request_type == GENERATE:
                    further = self._how_to_generate(name, first.args[1])
                prompt = str(first.args[0])
                meta = {"requests": requests, "row": first.doc_id}
                examples.append(
                    Example(
                        name, str(first.doc_id), prompt, (), chat=False, meta=meta, **{"max_new_tokens": 0} | further
                    )
                )
        return examples

    def encode(self, example: Example, tokenizer: Any, max_length: int | None) -> list[int] | list[Continuations]:
        """Token ids by lm-eval's own rules; see :class:`.base.Task`."""
        limit = self.limit_of(max_length) or 1 << 60
        encoder = self._encoder(tokenizer)
        requests = example.meta["requests"]
        if requests[0].request_type == GENERATE:
            ids: list[int] = encoder.tok_encode(example.prompt)
            require(bool(ids), "task.names", example.dataset, f"document {example.id} has an empty prompt")
            room = limit - example.max_new_tokens
            allowed = f"must be above the {example.max_new_tokens} tokens that {example.dataset} may generate"
            require(room > 0, "task.max_length", limit, allowed)
            return ids[-room:]
        if requests[0].request_type == ROLLING:
            return [part for request in requests for part in self._rolling(encoder, request.args[0], limit)]
        found: list[Continuations] = []
        for request in requests:
            context, continuation = self._pair(encoder, *request.args)
            whole = [*context, *continuation][-(limit + 1) :]
            context = whole[: len(whole) - len(continuation)]
            allowed = f"is too short for {example.dataset} document {example.id}, whose answer has {len(continuation)}"
            require(len(context) > 0, "task.max_length", limit, allowed + " tokens")
            back = min(self.held_back, len(context) - 1)  # a context of one token has to be read, and cannot be held
            cut = len(context) - back
            asked = (context[cut:], continuation)
            if found and found[-1].context == context[:cut]:
                found[-1] = Continuations(context[:cut], (*found[-1].asked, asked))
            else:
                found.append(Continuations(context[:cut], (asked,)))
        return found

    def read_off(self, example: Example, likelihoods: Sequence[Likelihood]) -> list[list[float | bool]]:
        """For each request [log-probability, whether greedy decoding would give it]; of a long text the total."""
        answers = [[math.fsum(one.log_probs), all(one.greedy)] for one in likelihoods]
        if example.meta["requests"][0].request_type == ROLLING:
            return [[math.fsum(a[0] for a in answers), sum(len(one.log_probs) for one in likelihoods)]]
        return answers

    def judge(self, example: Example, prediction: Any, reply: Reply | None, reference: Reply | None) -> dict[str, Any]:
        """All of lm-eval's metrics of a document that are numbers, and the one that is its score."""
        requests = example.meta["requests"]
        if requests[0].request_type == ROLLING:
            total, tokens = prediction[0]
            return {"score": -total / tokens, "log_likelihood": total, "scored_tokens": tokens}
        task = self._tasks[example.dataset]
        for request, answer in zip(requests, _answers(requests[0].request_type, prediction), strict=True):
            request.resps = [answer] * request.repeats
            request.filtered_resps = {}
        for one in task._filters:
            one.apply(requests)
        metrics: dict[str, float] = {}
        for key in requests[0].filtered_resps:
            found = task.process_results(requests[0].doc, [r.filtered_resps[key] for r in requests])
            for metric, value in found.items():
                if isinstance(value, int | float) or (hasattr(value, "item") and getattr(value, "size", 1) == 1):
                    metrics[_key(metric, key)] = float(value)
        wanted = self._metrics[example.dataset]
        value = metrics.get(wanted, math.nan)
        allowed = f"of {example.dataset} document {example.id} is {value}, which is no share: take another metric"
        require(0 <= value <= 1, "task.metric", wanted, allowed)
        return {"score": value, "metrics": metrics}

    def conclude(self, rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
        """lm-eval's own table, from the answers in ``rows``; the figures of its groups are averages of the record."""
        by_document = {(row["dataset"], int(row["id"])): row["prediction"] for row in rows}
        results = self._evaluate(_replay(by_document))
        plain = _plain({k: v for k, v in results.items() if k not in ("samples", "config", "pretty_env_info")})
        averages = {}
        for group, found in (results.get("groups") or {}).items():
            key = next((k for k in found if k.startswith(("acc,", "exact_match,"))), None)
            if key is not None:
                n = found.get("sample_len") or len(rows)
                averages[f"{group} {key.partition(',')[0]}"] = {
                    "mean": 100 * found[key],
                    "low": None,
                    "high": None,
                    "n": n,
                }
        further = {"averages": averages} if averages else {}
        return {"lm_eval": {"version": _lm_eval().__version__, "results": plain["results"]}} | further, {RESULTS: plain}

    # lm-eval's side ------------------------------------------------------------------------------------------------

    @cached_property
    def _loaded(self) -> tuple[list[Any], dict[str, Any]]:
        """Groups and tasks that are in no other group, as lm-eval takes them; and all tasks by name."""
        manager = _manager(self.include_path)
        with self._quietly(), tempfile.TemporaryDirectory() as folder:
            loaded = manager.load([self._spec(manager, name, Path(folder)) for name in self.names])
        groups = list(loaded["groups"].values())
        grouped = {task for group in groups for task in group.get_all_tasks()}
        inner = {inside.name for group in groups for inside in group.get_all_groups() if inside is not group}
        alone = [task for task in loaded["tasks"].values() if task not in grouped]
        return [*(group for group in groups if group.name not in inner), *alone], loaded["tasks"]

    @cached_property
    def _documents(self) -> dict[str, list[list[Any]]]:
        """The requests of each document of each task."""

        def stop(request: Any) -> Any:
            raise _CollectedError

        with contextlib.suppress(_CollectedError):
            self._evaluate(stop)
        built: dict[str, list[list[Any]]] = {}
        for name, task in self._tasks.items():
            documents: dict[int, list[Any]] = defaultdict(list)
            for instance in task.instances:
                documents[instance.doc_id].append(instance)
            built[name] = [sorted(documents[i], key=lambda r: r.idx) for i in sorted(documents)]
        return built

    @cached_property
    def _rolls(self) -> bool:
        kinds = {name: documents[0][0].request_type == ROLLING for name, documents in self._documents.items()}
        rolling = [name for name, rolls in kinds.items() if rolls]
        allowed = (
            "asks for the likelihood of long texts, whose loss has no mean with shares of right answers: run it alone"
        )
        require(len(rolling) in (0, len(kinds)), "task.names", ",".join(rolling), allowed)
        return bool(rolling)

    @cached_property
    def _metrics(self) -> dict[str, str]:
        """The metric that is each task's score; :class:`InputError` where there is none, or not the one asked for."""
        if self._rolls:
            return {}
        from lm_eval.api.metrics import mean

        chosen = {}
        for name, task in self._tasks.items():
            better = task.higher_is_better()
            shares = [m for m, how in task.aggregation().items() if how is mean and better.get(m, True)]
            names = [_key(metric, one.name) for one in task._filters for metric in shares]
            wanted = self.metric or next(iter(names), None)
            allowed = f"must be a metric of {name} that is a mean of shares: {', '.join(names) or 'it has none'}"
            require(wanted in names, "task.metric", self.metric, allowed)
            chosen[name] = str(wanted)
        return chosen

    @property
    def _tasks(self) -> dict[str, Any]:
        return self._loaded[1]

    def _evaluate(self, answer: Any) -> dict[str, Any]:
        """Results of ``lm_eval.simple_evaluate`` with a model that answers by ``answer(request)``."""
        lm_eval = _lm_eval()
        from lm_eval.api.model import LM

        class Asked(LM):
            def loglikelihood(self, requests: Any) -> Any:
                return [answer(request) for request in requests]

            loglikelihood_rolling = generate_until = loglikelihood

        with self._quietly():
            results: dict[str, Any] = lm_eval.simple_evaluate(
                model=Asked(),
                tasks=self._loaded[0],
                num_fewshot=self.fewshot,
                limit=self.limit,
                task_manager=_manager(self.include_path),
                fewshot_random_seed=self.seed,
                bootstrap_iters=BOOTSTRAPS,
            )
        return results

    @contextlib.contextmanager
    def _quietly(self) -> Iterator[None]:
        """lm-eval without its bars and notes; :class:`InputError` where it cannot load a task's data."""
        for logger in ("lm_eval", "datasets", "huggingface_hub"):
            logging.getLogger(logger).setLevel(logging.ERROR)
        quiet = io.StringIO()  # a progress bar for each task, and again at the end
        try:
            with contextlib.redirect_stderr(quiet), contextlib.redirect_stdout(quiet):
                yield
        except (InputError, _CollectedError):
            raise
        except Exception as error:  # whatever a task's data set raises: no network, a file of another form
            root = error
            while root.__cause__ is not None and not str(root).strip():
                root = root.__cause__  # type: ignore[assignment]
            reason = f"{type(root).__name__}: {next(iter(str(root).splitlines()), 'no detail')}"
            instead = "data on this machine goes into task.data_files"
            if self.data_files:
                instead = "files in task.data_files must be JSON lines with the columns of the task's own data"
            allowed = f"lm-eval cannot build its requests ({reason}); {instead}"
            raise InputError("task.names", ",".join(self.names), allowed) from error

    def _spec(self, manager: Any, name: str, folder: Path) -> str:
        """A task's name, or a YAML in ``folder`` that is the task with the user's files in place of its data set."""
        if name not in manager.task_index:
            allowed = f"must be a task of lm-eval {_lm_eval().__version__}{near(name, manager.task_index)}"
            raise InputError("task.names", name, allowed)
        if name not in (self.data_files or {}):
            return name
        entry = manager.task_index[name]
        if entry.yaml_path is None or not entry.cfg or "task" not in entry.cfg:
            raise InputError("task.data_files", name, "must be a single task: name the tasks of a group one by one")
        assert self.data_files is not None
        own, given = entry.cfg, self.data_files[name]
        if "class" in own or not (own.get("test_split") or own.get("validation_split")):
            raise InputError("task.data_files", name, "finds its data by code of its own and takes no files")
        evaluated = own.get("test_split") or own.get("validation_split")
        splits = dict(given) if isinstance(given, Mapping) else {evaluated: given}
        if evaluated not in splits:
            raise InputError(f"task.data_files.{name}", list(splits), f"must hold the split {evaluated}")
        shots = own.get("num_fewshot") if self.fewshot is None else self.fewshot
        solved = own.get("fewshot_split") or own.get("training_split") or own.get("validation_split")
        if shots and solved not in splits and not (own.get("fewshot_config") or {}).get("samples"):
            allowed = f"must hold the split {solved} too, for its {shots} few-shot examples; or use task.fewshot=0"
            raise InputError(f"task.data_files.{name}", list(splits), allowed)
        missing = {
            key: None
            for key in ("training_split", "validation_split", "test_split", "fewshot_split")
            if own.get(key) not in (None, *splits)
        }
        paths = {split: str(Path(file).expanduser().resolve()) for split, file in splits.items()}
        data = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": paths}}
        file = folder / f"{name}.yaml"
        file.write_text(json.dumps({"include": str(entry.yaml_path), "task": name, **data, **missing}))
        return str(file)

    # tokens --------------------------------------------------------------------------------------------------------

    def _how_to_generate(self, name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of an :class:`Example` from lm-eval's ``generation_kwargs``."""
        from lm_eval.models.utils import normalize_gen_kwargs

        normal: Any = normalize_gen_kwargs(dict(settings), MAX_NEW_TOKENS)
        if normal.get("do_sample") and normal.get("temperature", 1.0) > 0:
            allowed = "draws its answers, and lm-eval's settings for that are not supported; take a task that does not"
            raise InputError("task.names", name, allowed)
        until = normal.get("until") or []
        ends = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
        return {"max_new_tokens": normal["max_gen_toks"], "stop_strings": ends}

    def _encoder(self, tokenizer: Any) -> Any:
        """lm-eval's model with nothing but a tokenizer: it cuts texts into tokens as lm-eval does."""
        from lm_eval.models.huggingface import HFLM

        encoder: Any = object.__new__(HFLM)
        encoder.tokenizer, encoder.add_bos_token, encoder.custom_prefix_token_id = tokenizer, None, None
        encoder.backend = "causal"
        return encoder

    def _pair(self, encoder: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of a context and its continuation; an empty context is the token that begins a text."""
        if context:
            pair: tuple[list[int], list[int]] = encoder._encode_pair(context, continuation)
            return pair
        ids = encoder.tok_encode(continuation, add_special_tokens=False)
        prefix = encoder.prefix_token_id
        return (ids[:1], ids[1:]) if ids[0] == prefix else ([prefix], ids)

    def _rolling(self, encoder: Any, text: str, limit: int) -> list[Continuations]:
        """A text cut as lm-eval cuts it, each piece in chunks."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows = get_rolling_token_windows(
            token_list=encoder.tok_encode(text), prefix_token=encoder.prefix_token_id, max_seq_len=limit, context_len=1
        )
        parts = []
        for context, scored in map(make_disjoint_window, windows):
            whole = [*context, *scored]
            for start in range(len(context), len(whole), self.chunk):
                back = min(self.held_back, start - 1)
                given = whole[start - back : start]
                asked = (given, whole[start : start + self.chunk])
                parts.append(Continuations(whole[: start - back], (asked,), beginning=start == len(context)))
        return parts


class _CollectedError(Exception):
    """lm-eval has built all its requests."""


def _answers(kind: str, prediction: Any) -> list[Any]:
    """What lm-eval expects for each request of a document."""
    if kind == GENERATE:
        return [prediction]
    if kind == ROLLING:
        return [total for total, _ in prediction]
    return [(total, bool(greedy)) for total, greedy in prediction]


def _key(metric: str, filter_name: str) -> str:
    """As lm-eval writes it, but for the filter that does nothing."""
    return metric if filter_name == "none" else f"{metric},{filter_name}"


def _plain(value: Any) -> Any:
    """``value`` as JSON can hold it: no NaN, no infinity, text for what is no data."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    return _plain(value.item()) if hasattr(value, "item") and getattr(value, "size", 1) == 1 else str(value)


def _replay(by_document: Mapping[tuple[str, int], Any]) -> Any:
    """A model that gives the answers again."""

    def answer(request: Any) -> Any:
        prediction = by_document[(request.task_name, request.doc_id)]
        return _answers(request.request_type, prediction)[request.idx if request.request_type == LIKELIHOOD else 0]

    return answer


@cache
def _manager(include_path: str | None) -> Any:
    """lm-eval's index of tasks; making it takes seconds."""
    _lm_eval()
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def _lm_eval() -> Any:
    try:
        import lm_eval
    except ImportError:
        raise InputError("task", "lm_eval", f"needs lm-eval: {INSTALL}") from None
    return lm_eval
