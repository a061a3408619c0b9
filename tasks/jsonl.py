"""Questions of a user's own file: a row a question, a prompt template, and a metric.

The file is JSON lines. A prompt is the template with fields of the row in it, and the field of the question says where
the question begins, so that a method can compress the context without it. A task of one's own is a YAML with these
keys; one with another metric is a subclass with another :meth:`JsonlTask.score` (docs/how-to/add_a_task.md).
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from ..conf.errors import InputError, require
from ..conf.options import Bounds, OneOf, PositiveInt, Text, Wording
from ..conf.wording import near
from .base import Example, Reply, Source, Task, prompt_tokens
from .longbench_data import numbered_lines, open_jsonl, parse_json_line
from .longbench_metrics import normalize_answer, qa_f1, rouge
from .longbench_v2 import without_middle
from .needle import contains

Segment = tuple[str, str | None]
"""A part of a template: text, and the name of the field behind it; None at the end of the template."""

Label = Annotated[str, Wording("1 to 60 letters, digits and . _ -, not . at first", r"(?!\.)[\w.-]{1,60}")]
CHOICES = (
    re.compile(r"(?i:\banswer(?:\s+is)?)\s*:?\s*\(?([A-Z])\b"),  # "The correct answer is (B).", "Answer: B"
    re.compile(r"^\(?([A-Z])(?:[).:,;]|\s*$)", re.MULTILINE),  # a line that begins with "B.", "(B)" or is "B"
    re.compile(r"^([B-HJ-Z])\b"),  # "B because"; A and I may be words
)
"""Patterns of a multiple-choice answer. The first one that matches decides, at its first match."""


def exact_match(prediction: str, answer: str) -> float:
    """1.0 if both texts have the same words after SQuAD's normalisation, and there are any."""
    words = normalize_answer(answer).split()
    return float(words != [] and normalize_answer(prediction).split() == words)


def choice_of(reply: str) -> str | None:
    """Letter that a reply to a multiple-choice question gives as its answer (:data:`CHOICES`); None without one."""
    reply = reply.replace("*", "").strip()
    match = next(filter(None, (pattern.search(reply) for pattern in CHOICES)), None)
    return match and match.group(1)


def choice_match(prediction: str, answer: str) -> float:
    """1.0 if the prediction gives this letter as its answer."""
    return float(choice_of(prediction) == answer)


WORDS = "must have a word beside the articles a, an and the: use task.metric=contains"
METRICS: Mapping[str, tuple[Callable[[str, str], float], str]] = {
    "f1": (qa_f1, WORDS),
    "exact": (exact_match, WORDS),
    "contains": (lambda prediction, answer: float(contains(prediction, answer)), "must have a text"),
    "rouge": (rouge, "must have a word"),
    "choice": (choice_match, "must be one letter, A to Z, with task.metric=choice"),
}
"""Name -> function of a prediction and one answer, in [0, 1], and what an answer must be to be scored."""


@dataclass
class JsonlTask(Task):
    """Questions of a JSON-lines file.

    Attributes:
        path: the file, ``.jsonl`` or ``.jsonl.gz``: one JSON object a line.
        prompt: template of the prompts. ``{context}`` stands for the row's field of that name, ``{choices.0}`` for the
            first item of a list, ``{{`` and ``}}`` for braces.
        question: field with which the question begins. The question is the rest of the prompt from there on, with the
            text of the template directly in front of the field.
        answer: field with the reference answer, or a list of accepted ones.
        metric: ``f1``: F1 of the words after SQuAD's normalisation. ``exact``: equal after it. ``contains``: the answer
            stands in the prediction, blanks and case aside. ``rouge``: ROUGE-L F. ``choice``: the letter of a
            multiple-choice answer. The best over the accepted answers counts.
        dataset: field with the name of the row's data set, which has a column of its own in tables; None: one data set.
        limit: the first rows of each data set; None for all.
        max_new_tokens: generation limit, tokens.
        stop: strings at the first of which the prediction ends; None for none.
        chat: use the model's chat template.
        max_length: prompt tokens before the chat template; None leaves it to the caller of :meth:`encode`.
        truncate: ``none``: a longer prompt is an error. ``middle``: it loses its middle.
        label: name in result folders and tables, to which the first 6 digits of the file's sha256 are added; None: the
            file's name.
    """

    id: ClassVar[str] = "JsonlTask"
    name = "jsonl"
    location_fields = ("path", "label")  # the file's name is recorded with its sha256, the label as the data's name
    chosen_by = ("limit",)
    shown = ("metric", "max_length")

    path: Text
    prompt: str
    question: str = "question"
    answer: str = "answer"
    metric: Annotated[str, OneOf(METRICS)] = "f1"
    dataset: str | None = None
    limit: PositiveInt | None = None
    max_new_tokens: PositiveInt = 64
    stop: Sequence[Annotated[str, Wording("a text that is not empty", ".+")]] | None = None
    chat: bool = True
    max_length: Annotated[int, Bounds(ge=2)] | None = None
    truncate: Literal["none", "middle"] = "none"
    label: Label | None = None

    def __post_init__(self) -> None:
        if self.stop is not None:
            self.stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop) or None
        super().__post_init__()
        self._segments = segments(self.prompt)
        self._loaded: tuple[Source, list[Example]] | None = None

    def source(self) -> Source:
        """The file: its sha256, of the uncompressed bytes, under its name; ``name`` is :attr:`label` and 6 digits."""
        return self._load()[0]

    def examples(self) -> list[Example]:
        """The rows in the order of the file; the id is the line, and ``meta`` has ``row``, from 0.

        Raises:
            InputError: the file cannot be read or has no row; a line is no JSON object, lacks a field, or has no answer
                that the metric can score.
        """
        return list(self._load()[1])

    def encode(self, example: Example, tokenizer: Any, max_length: int | None) -> list[int]:
        """Token ids of the prompt: truncated as raw text first, then put into the chat template.

        Raises:
            InputError: the prompt is longer than ``max_length`` or ``task.max_length``, and ``task.truncate`` is none.
        """
        limit, prompt = self.limit_of(max_length), example.prompt
        ids = tokenizer(prompt, truncation=False, verbose=False).input_ids
        if limit is not None and len(ids) > limit:
            where = f"{example.dataset}/{example.id} has {len(ids)} prompt tokens and the limit is {limit}"
            allowed = f"{where}; middle cuts out the middle of a longer prompt"
            require(self.truncate == "middle", "task.truncate", self.truncate, allowed)
            prompt = without_middle(ids, tokenizer, limit)
        return prompt_tokens(prompt, tokenizer, example.chat)

    def score(self, example: Example, prediction: str) -> float:
        """Best score over the accepted answers, in [0, 1]."""
        metric, _ = METRICS[self.metric]
        return max(metric(prediction, answer) for answer in example.answers)

    def judge(self, example: Example, prediction: Any, reply: Reply | None, reference: Reply | None) -> dict[str, Any]:
        """The score; with ``task.metric=choice`` also the letter that was read, or None."""
        choice = {"choice": choice_of(prediction)} if self.metric == "choice" else {}
        return {"score": self.score(example, prediction), **choice}

    def require_question(self) -> None:
        """See :meth:`.Task.require_question`."""
        allowed = f"must have {{{self.question}}} behind the field of a context, for runner.question=after_compression"
        allowed += " (task.question names the field)"
        require(self._question_at > 0, "task.prompt", shortened(self.prompt), allowed)

    @property
    def _question_at(self) -> int:
        """Place among the segments where the question begins; 0 if the prompt has none, or no field in front of it."""
        fields = [field for _, field in self._segments]
        return fields.index(self.question) if self.question in fields else 0

    def _load(self) -> tuple[Source, list[Example]]:
        if self._loaded is None:
            file = Path(self.path).expanduser()
            name = file.name.removesuffix(".gz")
            stem = re.sub(r"[^\w.-]+", "-", Path(name).stem).lstrip(".")
            digest = hashlib.sha256()
            examples: list[Example] = []
            counts: Counter[str] = Counter()
            for number, line in self._lines(file):
                digest.update(line)
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if line.strip():
                    row = parse_json_line(line, f"{file.name}:{number}")
                    example = self._example(row, number, stem, f"{file.name}:{number}")
                    counts[example.dataset] += 1
                    if self.limit is None or counts[example.dataset] <= self.limit:
                        examples.append(example)
            require(bool(examples), "task.path", self.path, "must hold at least one row; it has none")
            sha256 = digest.hexdigest()
            label = f"{self.label or stem}-{sha256[:6]}"
            self._loaded = Source(label, self.path, None, {name: sha256}), examples
        return self._loaded

    def _lines(self, file: Path) -> Iterator[tuple[int, bytes]]:
        """The file's numbered lines."""
        problem = "it is a folder" if file.is_dir() else "there is no such file"
        require(file.is_file(), "task.path", self.path, f"must be a .jsonl or .jsonl.gz file; {problem}")
        try:
            with open_jsonl(file) as opened:
                yield from numbered_lines(opened, file.name)
        except OSError as error:
            raise InputError("task.path", self.path, f"cannot be read: {error.strerror or error}") from error

    def _example(self, row: Mapping[str, Any], number: int, stem: str, where: str) -> Example:
        """One row as an example; InputErrors name ``where``, its file and line."""
        dataset = self.label or stem if self.dataset is None else text_of(row, self.dataset, "task.dataset", where)
        at = self._question_at
        context, question = (self._filled(part, row, where) for part in (self._segments[:at], self._segments[at:]))
        return Example(
            dataset=dataset,
            id=f"line-{number}",
            prompt=context + question,
            answers=self._answers(row, where),
            max_new_tokens=self.max_new_tokens,
            chat=self.chat,
            stop_strings=tuple(self.stop or ()),
            question=question if at else "",
            meta={"row": number - 1},
        )

    def _filled(self, template: Sequence[Segment], row: Mapping[str, Any], where: str) -> str:
        return "".join(
            text if field is None else text + text_of(row, field, "task.prompt", where) for text, field in template
        )

    def _answers(self, row: Mapping[str, Any], where: str) -> tuple[str, ...]:
        """The accepted answers of a row, each of which the metric can score."""
        found = field_of(row, self.answer, "task.answer", where)
        values = found if isinstance(found, list) else [found]
        answers = tuple(as_text(value, self.answer, "task.answer", where) for value in values)
        allowed = f"{where} has no answer there: must be a text that is not empty, or a list of them"
        require(bool(answers) and all(answer.strip() for answer in answers), "task.answer", self.answer, allowed)
        metric, wanted = METRICS[self.metric]
        for answer in answers:
            require(metric(answer, answer) > 0, f"{where} {self.answer}", shortened(answer), wanted)
        return answers


def segments(prompt: str) -> list[Segment]:
    """The parts of a prompt template, in order.

    Raises:
        InputError: a brace has no partner, a field is more than a name, or there is no field.
    """
    key, shown = "task.prompt", shortened(prompt)
    braces = "a field is {name} and nothing else; braces of the text are written {{ and }}"
    parts: list[Segment] = []
    try:
        for text, field, spec, conversion in string.Formatter().parse(prompt):
            is_name = field is None or (field.strip() != "" and not spec and conversion is None)
            require(is_name, key, shown, braces)
            parts.append((text, field))
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(key, shown, f"{error}: {braces}") from None
    has_field = any(field is not None for _, field in parts)
    require(has_field, key, shown, "must name a field of the rows, as in {context}")
    return parts


def shortened(text: str) -> str:
    """The beginning of a long text, for an error message."""
    return text if len(text) <= 80 else f"{text[:77]}..."


def field_of(row: Mapping[str, Any], name: str, key: str, where: str) -> Any:
    """Value of a row's field, or of an item in one: ``choices.0``, ``article.text``.

    Raises:
        InputError: the row has no such field; names ``key``, which named the field, and ``where`` the row is.
    """
    value: Any = row
    for part in [name] if name in row else name.split("."):
        if isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        elif isinstance(value, dict) and part in value:
            value = value[part]
        else:
            raise InputError(key, name, f"{where} has no such field; it has {', '.join(row)}{near(name, row)}")
    return value


def as_text(value: Any, name: str, key: str, where: str) -> str:
    """A field's value as text: a text, or a number as JSON writes it."""
    if isinstance(value, str):
        return value
    kinds: dict[type, str] = {list: f"a list: use {name}.0", dict: f"an object: use {name}.KEY", bool: "true or false"}
    allowed = f"must be text or a number, and {where} has there {kinds.get(type(value), 'null')}"
    require(type(value) in (int, float), key, name, allowed)
    return json.dumps(value)


def text_of(row: Mapping[str, Any], name: str, key: str, where: str) -> str:
    """Text of a row's field: see :func:`field_of` and :func:`as_text`."""
    return as_text(field_of(row, name, key, where), name, key, where)
