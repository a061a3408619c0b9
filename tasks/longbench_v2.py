"""LongBench v2: multiple-choice questions on contexts of 8 thousand to 2 million words.

Paper: LongBench v2 (Bai et al., 2024), arXiv 2412.15204. Protocol: the official ``pred.py`` and ``result.py``, step by
step: prompts, middle truncation, 128 new tokens, the answer's two patterns, and the averages over questions. Three
things differ. Decoding is greedy unless ``runner.temperature`` says otherwise (official: 0.1). An empty reply is wrong;
the official code takes it for a failed request and leaves the question out. Reasoning before the answer is not there:
officially it is a second request with the first one's text in it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from ..conf.errors import InputError, require
from ..conf.options import Bounds, Entries, OneOf, PositiveInt
from ..conf.wording import one_of
from .base import Example, Reply, Source, Task, is_text, names_of, prompt_tokens
from .hub import fetch_or_refuse

FILE = "data.json"
HUB_REPOS = ("THUDM/LongBench-v2", "zai-org/LongBench-v2")
"""The data set's old and new owner; the hub redirects the old name, for now."""

HUB_REVISION = "2b48e494f2c7a2f0af81aae178e05c7e1dde0fe9"
HUB_SHA256 = "15d61c22d92c96900b3c4948b6aeea218d3214b676a65df48e7b8555604c7fe2"
"""Of the file (465,490,535 bytes, 503 rows) at :data:`HUB_REVISION`."""

DOMAINS = {
    "single_document_qa": ("Single-Document QA", 175),
    "multi_document_qa": ("Multi-Document QA", 125),
    "in_context_learning": ("Long In-context Learning", 81),
    "dialogue_history": ("Long-dialogue History Understanding", 39),
    "code_repository": ("Code Repository Understanding", 50),
    "structured_data": ("Long Structured Data Understanding", 33),
}
"""Data set -> its ``domain`` in the file, and its number of rows there."""

DIFFICULTIES = ("easy", "hard")
LENGTHS = ("short", "medium", "long")
"""Up to 32 thousand words, up to 128 thousand, more."""

FIELDS = (
    *("_id", "domain", "sub_domain", "difficulty", "length", "question"),
    *("choice_A", "choice_B", "choice_C", "choice_D", "answer", "context"),
)
OPTIONS: Mapping[str, Sequence[str]] = {
    "domain": [name for name, _ in DOMAINS.values()],
    "difficulty": DIFFICULTIES,
    "length": LENGTHS,
    "answer": ("A", "B", "C", "D"),
}
"""What a field may hold."""

PROMPT = """Please read the following text and answer the question below.

<text>
$DOC$
</text>

What is the correct answer to this question: $Q$
Choices:
(A) $C_A$
(B) $C_B$
(C) $C_C$
(D) $C_D$

Format your response as follows: "The correct answer is (insert answer here)"."""

NO_CONTEXT_PROMPT = """What is the correct answer to this question: $Q$
Choices:
(A) $C_A$
(B) $C_B$
(C) $C_C$
(D) $C_D$

What is the single, most likely answer choice? Format your response as follows: \
"The correct answer is (insert answer here)"."""

PLACES = {
    "$DOC$": "context",
    "$Q$": "question",
    "$C_A$": "choice_A",
    "$C_B$": "choice_B",
    "$C_C$": "choice_C",
    "$C_D$": "choice_D",
}
"""What stands for which field, in the order in which they are filled in."""

MAX_NEW_TOKENS = 128
GUESS = 0.25
"""Score of a reply without an answer where the official ``result.py`` is told to compensate."""

ANSWERS = (re.compile(r"The correct answer is \(([A-D])\)"), re.compile(r"The correct answer is ([A-D])"))


@dataclass
class LongBenchV2(Task):
    """LongBench v2.

    Attributes:
        data_dir: :data:`FILE`, or the folder that holds it; None for the hub, at a pinned revision.
        datasets: domains in the order to run them; None for all that the file has. After construction a tuple.
        lengths: parts to ask for: ``short``, ``medium``, ``long``; None for all. After construction a tuple.
        limit: the first questions of each domain (and of these lengths); None for all.
        max_length: tokens of the prompt before the chat template; a longer one loses its middle. None leaves it to the
            caller of :meth:`encode`. Official: 120000 for models of 128 thousand positions.
        chat: use the model's chat template.
        no_context: control: the official prompt without the text.
    """

    id: ClassVar[str] = "LongBenchV2"
    name = "longbench_v2"
    location_fields = ("data_dir",)
    chosen_by = ("datasets", "lengths", "limit")

    data_dir: str | None = None
    datasets: Annotated[Sequence[Annotated[str, OneOf(DOMAINS)]], Entries(differ=True)] | None = None
    lengths: Annotated[Sequence[Annotated[str, OneOf(LENGTHS)]], Entries(differ=True)] | None = None
    limit: PositiveInt | None = None
    max_length: Annotated[int, Bounds(ge=2)] | None = None
    chat: bool = True
    no_context: bool = False

    def __post_init__(self) -> None:
        self.datasets, self.lengths = names_of(self.datasets), names_of(self.lengths)
        super().__post_init__()
        if self.lengths is not None:  # the order decides nothing
            self.lengths = tuple(length for length in LENGTHS if length in self.lengths)
        self._loaded: tuple[Source, list[Example]] | None = None

    def source(self) -> Source:
        """Where the questions come from.

        ``name`` is ``longbench_v2`` only for all the official rows of the domains and lengths asked for; with fewer, or
        when ``limit`` leaves some out, ``longbench_v2-subset``. The control has ``-no-context`` behind it.
        """
        return self._load()[0]

    def examples(self) -> list[Example]:
        """Questions in the order of ``datasets``, then of the file.

        ``meta`` holds ``length``, ``difficulty``, ``sub_domain`` and ``row`` (from 0, of the file).
        """
        return list(self._load()[1])

    def encode(self, example: Example, tokenizer: Any, max_length: int | None) -> list[int]:
        """Token ids of the prompt: truncated as raw text first, then put into the chat template.

        So the template's tokens come on top of ``max_length``, as in the official code, which leaves room for them.

        Args:
            example: from :meth:`examples`.
            tokenizer: a transformers tokenizer.
            max_length: most tokens of the raw prompt; None for no limit. ``task.max_length`` holds if it is smaller.
        """
        limit, prompt = self.limit_of(max_length), example.prompt
        if limit is not None:
            ids = tokenizer(prompt, truncation=False, verbose=False).input_ids
            if len(ids) > limit:
                prompt = without_middle(ids, tokenizer, limit)
        return prompt_tokens(prompt, tokenizer, example.chat)

    def score(self, example: Example, prediction: str) -> float:
        """1.0 if the reply names the right choice, else 0.0, also where it names none."""
        return float(answer_of(prediction) == example.answers[0])

    def judge(self, example: Example, prediction: Any, reply: Reply | None, reference: Reply | None) -> dict[str, Any]:
        """The score, and the choice that was read: a letter, or None."""
        return {"score": self.score(example, prediction), "choice": answer_of(prediction)}

    def conclude(self, rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The official figures, and how many replies had no answer in them.

        ``averages`` are those of the official ``result.py``, over questions: ``overall``, by difficulty and by length.
        They take the place of the runner's, which are over data sets and give each domain the same weight.
        ``unanswered`` holds the number of replies without an answer, and ``overall`` as it would be if each of them
        counted as a guess: the official ``compensated``, which is off there and takes no part in scores here.
        """
        asked = list(zip(self.examples(), rows, strict=True))
        parts = {
            "overall": [row for _, row in asked],
            **{part: [row for e, row in asked if e.meta["difficulty"] == part] for part in DIFFICULTIES},
            **{part: [row for e, row in asked if e.meta["length"] == part] for part in LENGTHS},
        }
        unanswered = sum(row["choice"] is None for row in rows)
        compensated = 100 * (sum(row["score"] for row in rows) + GUESS * unanswered) / len(rows)
        return {
            "averages": {part: _share([row["score"] for row in those]) for part, those in parts.items() if those},
            "unanswered": {"n": unanswered, "compensated": compensated},
        }, {}

    def _load(self) -> tuple[Source, list[Example]]:
        if self._loaded is None:
            path, location = self._find()
            sha256 = _sha256(path)
            if self.data_dir is None and sha256 != HUB_SHA256:
                allowed = f"the sha256 must be {HUB_SHA256}; delete the file to fetch it again"
                raise InputError(str(path), sha256, allowed)
            rows = _read(path)
            examples = self._chosen(path, rows)
            source = Source(
                name=self._source_name(rows, examples) + ("-no-context" if self.no_context else ""),
                location=location,
                revision=HUB_REVISION if sha256 == HUB_SHA256 else None,
                sha256={self.name: sha256},
            )
            self._loaded = source, examples
        return self._loaded

    def _find(self) -> tuple[Path, str]:
        """The file, and what the record says of where it was."""
        if self.data_dir is None:
            how = {"what": "LongBench v2 (465 MB)", "key": "task.data_dir", "instead": f"give {FILE} as task.data_dir"}
            path, repo = fetch_or_refuse(HUB_REPOS, FILE, HUB_REVISION, **how)
            return path, f"{repo}/{FILE}"
        place = Path(self.data_dir).expanduser()
        file = place / FILE if place.is_dir() else place
        allowed = f"must be LongBench v2's {FILE} or a folder that holds it"
        require(file.is_file(), "task.data_dir", self.data_dir, allowed)
        return file, self.data_dir

    def _chosen(self, path: Path, rows: Sequence[Mapping[str, Any]]) -> list[Example]:
        """The questions asked for: their domains, lengths and the first ``limit`` of each domain."""
        chosen = {
            dataset: [
                (number, row)
                for number, row in enumerate(rows)
                if row["domain"] == domain and (self.lengths is None or row["length"] in self.lengths)
            ][: self.limit]
            for dataset, (domain, _) in DOMAINS.items()
            if self.datasets is None or dataset in self.datasets
        }
        missing = [dataset for dataset in self.datasets or () if not chosen[dataset]]
        if missing or not any(chosen.values()):
            key = "lengths" if self.lengths is not None else "datasets"
            value = ",".join(getattr(self, key) or ())
            what = f"{path} has no such question" + (f" of {', '.join(missing)}" if missing else "")
            raise InputError(f"task.{key}", value, what)
        return [self._example(dataset, *one) for dataset in self.datasets or chosen for one in chosen[dataset]]

    def _example(self, dataset: str, number: int, row: Mapping[str, Any]) -> Example:
        prompt = NO_CONTEXT_PROMPT if self.no_context else PROMPT
        return Example(
            dataset=dataset,
            id=row["_id"],
            prompt=_filled(prompt, row),
            answers=(row["answer"],),
            max_new_tokens=MAX_NEW_TOKENS,
            chat=self.chat,
            question=_filled(prompt.partition("$DOC$")[2], row),  # empty without a context
            meta={"row": number, **{key: row[key] for key in ("length", "difficulty", "sub_domain")}},
        )

    def _source_name(self, rows: Sequence[Mapping[str, Any]], examples: Sequence[Example]) -> str:
        whole = 0  # questions that would be asked without a limit
        for dataset in self.datasets or DOMAINS:
            domain, official = DOMAINS[dataset]
            those = [row for row in rows if row["domain"] == domain]
            if len(those) != official:
                return f"{self.name}-subset"
            whole += sum(self.lengths is None or row["length"] in self.lengths for row in those)
        return self.name if len(examples) == whole else f"{self.name}-subset"


def without_middle(ids: Sequence[int], tokenizer: Any, max_length: int) -> str:
    """Text of the first ``max_length // 2`` tokens and of as many of the last as make up ``max_length``.

    Not :func:`.longbench.truncate_middle`: this benchmark decodes both ends as one text, so that a character or a blank
    at the seam comes out differently, and an odd limit gives the odd token to the end.

    Args:
        ids: token ids of the prompt with the tokenizer's special tokens; more than ``max_length``, which is at least 2.
        tokenizer: decodes them; special tokens are left out of the text.
    """
    head = max_length // 2
    return tokenizer.decode([*ids[:head], *ids[head - max_length :]], skip_special_tokens=True)


def answer_of(reply: str) -> str | None:
    """The letter that a reply gives as its answer; None where it does not say it in the official words.

    The words with a letter in brackets come first, wherever they stand; only without those, the words with a bare one.
    """
    reply = reply.strip().replace("*", "")
    found = next(filter(None, (pattern.search(reply) for pattern in ANSWERS)), None)
    return found and found.group(1)


def _filled(prompt: str, row: Mapping[str, str]) -> str:
    """The prompt with a row's texts in it, one after the other: a ``$Q$`` in a context becomes the question too."""
    for place, key in PLACES.items():
        prompt = prompt.replace(place, row[key].strip())
    return prompt


def _share(scores: Sequence[float]) -> dict[str, Any]:
    """Mean of scores of 0 or 1, in percent, with its 95 % Wilson interval."""
    from scipy.stats import binomtest  # slow to import

    right, n = round(sum(scores)), len(scores)
    interval = binomtest(right, n).proportion_ci(0.95, method="wilson")
    return {"mean": 100 * right / n, "low": 100 * interval.low, "high": 100 * interval.high, "n": n, "method": "wilson"}


# --- the file ---------------------------------------------------------------------------------------------------------


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(str(path), "unreadable", error.strerror or str(error)) from error


def _read(path: Path) -> list[dict[str, str]]:
    """The rows, each with all :data:`FIELDS`."""
    try:
        with path.open(encoding="utf-8") as file:
            rows = json.load(file)
    except (ValueError, RecursionError) as error:
        raise InputError(str(path), "damaged", f"must be JSON in UTF-8: {error}") from error
    require(isinstance(rows, list) and len(rows) > 0, str(path), "rows", "must be a JSON list of at least one question")
    seen: set[str] = set()
    for number, row in enumerate(rows):
        where = f"{path}[{number}]"
        require(isinstance(row, dict), where, type(row).__name__, "must be a JSON object")
        missing = [field for field in FIELDS if field not in row]
        require(not missing, where, ", ".join(missing), "the row lacks these fields of LongBench v2")
        for field in FIELDS:
            value = row[field]
            require(isinstance(value, str), f"{where}.{field}", _short(value), "must be a string")
            require(is_text(value), f"{where}.{field}", _short(ascii(value)), "has half of a character")
            if field in OPTIONS:
                require(value in OPTIONS[field], f"{where}.{field}", _short(value), one_of(value, OPTIONS[field]))
        # A resumed run finds its place by it.
        require(
            row["_id"] not in seen and row["_id"] != "", f"{where}._id", row["_id"], "must be there once, not empty"
        )
        seen.add(row["_id"])
    return rows


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
