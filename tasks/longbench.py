"""LongBench as a task: rows to prompts, prompts to token ids, predictions to scores.

Paper: LongBench (Bai et al., 2023), arXiv 2308.14508. Protocol: the official ``pred.py`` and ``eval.py``, step by step
and in their order, so that scores can stand beside published ones. What the 21 data sets are is in
:mod:`.longbench_spec`, where rows come from in :mod:`.longbench_data`, the metrics in :mod:`.longbench_metrics`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from ..conf.errors import InputError, require
from ..conf.options import Bounds, Entries, OneOf, PositiveInt
from ..conf.wording import one_of
from .base import Example, Source, Task, names_of, prompt_tokens
from .hub import HubUnavailable
from .longbench_data import DatasetFile, Store, open_data_dir, open_hub, open_mini
from .longbench_metrics import CODE_SIMS, example_score
from .longbench_spec import E_DATASETS, ENGLISH_16, SPECS, bucket

log = logging.getLogger(__name__)


@dataclass(init=False)
class LongBench(Task):
    """LongBench, LongBench-E, or the bundled ``longbench-mini``.

    Attributes:
        datasets: data sets in the order to run them; None for all 21 (13 with ``e``), or all that the source has.
        e: LongBench-E.
        limit: the first examples of each data set; None for all.
        data_dir: folder or ``data.zip``.
        origin: the key ``source``: ``auto``, ``hub`` or ``mini``.
        max_length: prompt tokens; None leaves it to the caller of :meth:`encode`.
        truncate: ``middle`` or ``none``.
        code_sim: ``official`` or ``levenshtein``, see :func:`.longbench_metrics.code_sim`.
        no_context: control: the prompt with an empty context.
    """

    id: ClassVar[str] = "LongBench"
    name = "longbench"
    location_fields = ("data_dir", "origin")
    chosen_by = ("datasets", "limit")
    other_keys: ClassVar[Mapping[str, str]] = {"origin": "task.source"}

    datasets: Annotated[Sequence[Annotated[str, OneOf(SPECS)]], Entries(differ=True)] | None
    e: bool
    limit: PositiveInt | None
    data_dir: str | None
    origin: Literal["auto", "hub", "mini"]
    max_length: Annotated[int, Bounds(ge=2)] | None
    truncate: Literal["middle", "none"]
    code_sim: Annotated[str, OneOf(CODE_SIMS)]
    no_context: bool

    # Written out because a key of the YAML, `source`, has the name of a method that every task has.
    def __init__(
        self,
        datasets: Sequence[str] | str | None = None,
        e: bool = False,
        limit: int | None = None,
        data_dir: str | None = None,
        source: Literal["auto", "hub", "mini"] = "auto",
        max_length: int | None = None,
        truncate: Literal["middle", "none"] = "middle",
        code_sim: str = "official",
        no_context: bool = False,
    ):
        self.datasets = names_of(datasets)
        self.e = e
        self.limit = limit
        self.data_dir = data_dir
        self.origin = source
        self.max_length = max_length
        self.truncate = truncate
        self.code_sim = code_sim
        self.no_context = no_context
        self._loaded: tuple[Source, list[Example]] | None = None
        super().__post_init__()

        for name in self.datasets or () if e else ():
            require(name in E_DATASETS, "task.datasets", name, one_of(name, E_DATASETS))
        allowed = f"must be auto when task.data_dir is given ({data_dir})"
        require(data_dir is None or source == "auto", "task.source", source, allowed)
        require(not (e and source == "mini"), "task.source", source, "longbench-mini has no LongBench-E files")

    def source(self) -> Source:
        """Where the rows come from.

        ``name`` is ``longbench`` only for all the official rows of every data set asked for: the hub's archive, or a
        folder or archive with the official number of rows. With fewer, or when ``limit`` leaves rows out, it is
        ``longbench-subset``: such a score cannot stand beside a published one. LongBench-E has ``longbench-e`` and
        ``longbench-e-subset``, the bundled set is ``longbench-mini`` whatever the limit. The control without contexts
        has ``-no-context`` behind any of them.
        """
        return self._load()[0]

    def examples(self) -> list[Example]:
        """Examples in the order of ``datasets``, then of the file.

        ``meta`` holds ``length`` (words of the context and answer, characters in Chinese), ``row`` (from 0),
        ``all_classes``, ``language``, ``category`` and, with ``e``, ``bucket``.
        """
        return list(self._load()[1])

    def encode(self, example: Example, tokenizer: Any, max_length: int | None) -> list[int]:
        """Token ids of the prompt: truncated as raw text first, then put into the chat template.

        So the chat template's tokens come on top of ``max_length``, and joining the two halves may change the count
        by a token or so: the official protocol, which leaves room for both and for the answer by giving each model a
        limit below its positions.

        Args:
            example: from :meth:`examples`.
            tokenizer: a transformers tokenizer.
            max_length: most tokens of the raw prompt; None for no limit. ``task.max_length`` holds if it is smaller.

        Raises:
            InputError: the prompt is longer and ``task.truncate`` is ``none``.
        """
        limit = self.limit_of(max_length)
        prompt = example.prompt if limit is None else self._shorten(example, tokenizer, limit)
        return prompt_tokens(prompt, tokenizer, example.chat)

    def score(self, example: Example, prediction: str) -> float:
        """Best score over the accepted answers, in [0, 1]."""
        classes = example.meta["all_classes"]
        return example_score(example.dataset, prediction, example.answers, classes, self.code_sim)

    def group(self, example: Example) -> str:
        """The data set; for LongBench-E the data set and its length bucket, ``qasper/0-4k``."""
        return f"{example.dataset}/{example.meta['bucket']}" if self.e else example.dataset

    def averages(self, groups: Sequence[str]) -> Mapping[str, Sequence[str]]:
        """The average that papers report, over the 16 English and code sets, where there are others beside them."""
        return {"mean of 16 en": ENGLISH_16} if set(ENGLISH_16) < set(groups) else {}

    def _shorten(self, example: Example, tokenizer: Any, max_length: int) -> str:
        ids = tokenizer(example.prompt, truncation=False, verbose=False).input_ids
        if len(ids) <= max_length:
            return example.prompt
        if self.truncate == "none":
            where = f"{example.dataset} example {example.id}"
            what = f"{where} has {len(ids)} prompt tokens and the limit is {max_length}; use task.truncate=middle"
            raise InputError("task.truncate", self.truncate, what)
        return truncate_middle(ids, tokenizer, max_length)

    def _load(self) -> tuple[Source, list[Example]]:
        if self._loaded is None:
            store, tried = self._open_store()
            names = self._names_in(store, tried)
            files = {name: store.read(self._stem(name), SPECS[name], self.limit) for name in names}
            source = Source(
                name=self._source_name(store, files) + ("-no-context" if self.no_context else ""),
                location=store.location,
                revision=store.revision,
                sha256={name: file.sha256 for name, file in files.items()},
            )
            self._loaded = source, [example for name in names for example in self._examples_of(name, files[name].rows)]
        return self._loaded

    def _open_store(self) -> tuple[Store, str]:
        """The place to read from, and, where it is a fallback, what was tried before it."""
        if self.data_dir is not None:
            return open_data_dir(self.data_dir), ""
        if self.origin == "mini":
            return open_mini(), ""
        try:
            return open_hub(), ""
        except HubUnavailable as error:
            tried = f"tried on the hub: {error}"
        if self.origin == "hub":
            allowed = f"LongBench cannot be fetched; {tried}; give task.data_dir or use task.source=mini"
            raise InputError("task.source", self.origin, allowed)
        if self.e:
            allowed = f"longbench-mini has no LongBench-E files: give task.data_dir; {tried}"
            raise InputError("task.source", self.origin, allowed)
        log.warning("LongBench: using the bundled longbench-mini, whose scores are not LongBench scores; %s", tried)
        return open_mini(), tried

    def _names_in(self, store: Store, tried: str) -> tuple[str, ...]:
        """Names of the data sets to run, all of them in ``store``."""
        official = E_DATASETS if self.e else tuple(SPECS)
        present = [name for name in official if self._stem(name) in store.files]
        wanted = tuple(self.datasets or present)
        missing = [name for name in wanted if name not in present]
        if wanted and not missing:
            return wanted
        where = f"{store.location} has {', '.join(present) or 'no LongBench data set'}"
        where += f" ({tried})" if tried else ""
        files = ", ".join(f"{self._stem(name)}.jsonl" for name in missing) or "<dataset>.jsonl"
        if store.kind == "data_dir":
            raise InputError("task.data_dir", self.data_dir, f"must hold {files}; {where}")
        raise InputError("task.datasets", ",".join(missing) or None, f"must be in the source; {where}")

    def _source_name(self, store: Store, files: Mapping[str, DatasetFile]) -> str:
        if store.kind == "mini":
            return "longbench-mini"
        name = "longbench-e" if self.e else "longbench"
        asked = self.datasets or (E_DATASETS if self.e else tuple(SPECS))
        complete = all(
            dataset in files
            and len(files[dataset].rows)
            == files[dataset].total
            == (SPECS[dataset].rows_e if self.e else SPECS[dataset].rows)
            for dataset in asked
        )
        return name if complete else f"{name}-subset"

    def _examples_of(self, dataset: str, rows: Sequence[Mapping[str, Any]]) -> list[Example]:
        spec = SPECS[dataset]
        examples: list[Example] = []
        seen: set[str] = set()
        for number, row in enumerate(rows):
            # Some copies of the data carry no ids, and an id that comes twice would make a resumed run skip a row.
            identifier = str(row["_id"]) if row.get("_id") else f"{dataset}:{number}"
            while identifier in seen:
                identifier += f":{number}"
            seen.add(identifier)
            meta = {
                "length": row["length"],
                "row": number,
                "all_classes": row["all_classes"],
                "language": row["language"],
                "category": spec.category,
            }
            if self.e:
                meta["bucket"] = bucket(row["length"])
            fields = {**row, "context": ""} if self.no_context else row
            example = Example(
                dataset=dataset,
                id=identifier,
                prompt=spec.prompt.format(**fields),
                answers=tuple(row["answers"]),
                max_new_tokens=spec.max_new_tokens,
                chat=spec.chat,
                stop_tokens=spec.stop_tokens,
                min_new_tokens=spec.min_new_tokens,
                question=spec.prompt.partition("{context}")[2].format(**fields),
                meta=meta,
            )
            examples.append(example)
        return examples

    def _stem(self, dataset: str) -> str:
        return f"{dataset}_e" if self.e else dataset


def truncate_middle(ids: Sequence[int], tokenizer: Any, max_length: int) -> str:
    """Text of the first and the last ``max_length // 2`` tokens: both ends of a prompt may carry the instruction.

    Args:
        ids: token ids of the prompt with the tokenizer's special tokens; more than ``max_length``, at least 2.
        tokenizer: decodes them; special tokens are left out of the text.
    """
    half = max_length // 2
    head, tail = ids[:half], ids[-half:]
    return tokenizer.decode(head, skip_special_tokens=True) + tokenizer.decode(tail, skip_special_tokens=True)
