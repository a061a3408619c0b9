"""The contract between a task and a runner.

A task is examples, a way to turn one into token ids, and a score. It knows nothing of models or methods: the runner
hands it a tokenizer and gets ids back, hands it a prediction and gets a number back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar


@dataclass(frozen=True)
class Example:
    """One question.

    Attributes:
        dataset: the data set it belongs to (``qasper``); scores are averaged inside a data set.
        id: unique inside its data set and stable between machines and runs; a resumed run finds its place by it.
        prompt: the whole prompt as text, before truncation and before the chat template.
        answers: accepted answers.
        max_new_tokens: the task's generation limit, tokens.
        chat: wrap the prompt in the model's chat template (few-shot and code prompts are not wrapped).
        stop_tokens: strings whose last token ends the generation when it is produced (LongBench's samsum: a newline).
        min_new_tokens: tokens that must come before anything may stop the generation.
        meta: whatever ``score`` needs beside the answers (class names, length bucket, row number).
    """

    dataset: str
    id: str
    prompt: str
    answers: tuple[str, ...]
    max_new_tokens: int
    chat: bool = True
    stop_tokens: tuple[str, ...] = ()
    min_new_tokens: int = 0
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """Where the examples came from; printed, recorded and carried into every table.

    Attributes:
        name: the name scores may be shown under (``longbench``, ``longbench-subset``, ``longbench-mini``); sets of
            different names are never mixed.
        location: folder, archive or repository id.
        revision: commit of a hub repository, else None.
        sha256: data set name -> sha256 of the bytes its rows were read from.
        note: what a reader of the numbers must know about the data (a file that is cut), one sentence.
    """

    name: str
    location: str
    revision: str | None
    sha256: Mapping[str, str]
    note: str = ""


class Described(ABC):
    """A dataclass whose fields are the YAML keys under ``task.``, and whose data comes from somewhere."""

    name: str
    location_fields: ClassVar[tuple[str, ...]] = ()
    """Fields that say where data is looked for, not what it is; they take no part in :meth:`identity`."""

    def identity(self) -> dict[str, Any]:
        """The settings and the data's sha256 as plain data: what decides the numbers beside seed and tokenizer."""
        settings = {f.name: getattr(self, f.name) for f in fields(self) if f.init}  # type: ignore[arg-type]
        source = self.source()
        return {
            **{k: list(v) if isinstance(v, tuple) else v for k, v in settings.items() if k not in self.location_fields},
            "class": type(self).__name__,
            "source": source.name,
            "sha256": dict(source.sha256),
        }

    @abstractmethod
    def source(self) -> Source:
        """Where the data comes from; its name goes into result folders and tables. Resolved once; may fetch."""


class Task(Described):
    """A task: see the module docstring."""

    max_length: int | None = None
    """Prompt tokens the user allows; None leaves the limit to the model."""

    @abstractmethod
    def examples(self) -> list[Example]:
        """Every example of the run, in a fixed order."""

    @abstractmethod
    def encode(self, example: Example, tokenizer: Any, max_length: int | None) -> list[int]:
        """Token ids of the prompt, truncated to ``max_length`` prompt tokens as the task defines (None: never)."""

    @abstractmethod
    def score(self, example: Example, prediction: str) -> float:
        """Score of one prediction, in [0, 1]."""

    def group(self, example: Example) -> str:
        """Name of the score that ``example`` counts towards: its data set, unless a task splits data sets further."""
        return example.dataset

    def averages(self, groups: Sequence[str]) -> Mapping[str, Sequence[str]]:
        """Averages to report beside the one over all ``groups``: name -> the groups it is over."""
        return {}


def prompt_tokens(prompt: str, tokenizer: Any, chat: bool) -> list[int]:
    """Token ids of a whole prompt, in the tokenizer's chat template where it has one and ``chat`` asks for it."""
    if not chat or not getattr(tokenizer, "chat_template", None):
        return list(tokenizer(prompt, truncation=False, verbose=False).input_ids)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        tokenize=False,
        add_generation_prompt=True,
        # Templates that do not know it ignore it; a generation limit of 32 tokens leaves no room to think aloud.
        enable_thinking=False,
    )
    return plain_tokens(text, tokenizer)


def plain_tokens(text: str, tokenizer: Any) -> list[int]:
    """Token ids of text alone; a template has written its special tokens itself, and a second <s> would be wrong."""
    return list(tokenizer(text, truncation=False, add_special_tokens=False, verbose=False).input_ids)
