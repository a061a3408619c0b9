"""The contract between a task and a runner.

A task is examples, a way to turn one into token ids, and a score. It knows nothing of models or methods: the runner
hands it a tokenizer and gets ids back, hands it a prediction and gets a number back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..conf.chat import in_chat_template, plain_tokens
from ..conf.errors import InputError, require
from ..conf.identity import HasIdentity
from ..conf.wording import is_list

PERCENT, NATS = "percent", "nats per token"


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
        stop_strings: strings at the first of which the answer ends, however it is cut into tokens; not part of it.
        min_new_tokens: tokens that must come before anything may stop the generation.
        question: the end of ``prompt``, all that stands behind the context; with ``runner.question=after_compression``
            a method does not see it before it compresses. Empty: the prompt has no such part.
        meta: whatever ``score`` needs beside the answers (class names, length bucket, row number).
    """

    dataset: str
    id: str
    prompt: str
    answers: tuple[str, ...]
    max_new_tokens: int
    chat: bool = True
    stop_tokens: tuple[str, ...] = ()
    stop_strings: tuple[str, ...] = ()
    min_new_tokens: int = 0
    question: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Continuations:
    """What a model is asked where it need not write: how likely continuations of one context are.

    Attributes:
        context: token ids, read as the prompt; the method compresses behind them.
        asked: pairs of token ids that follow the context (seen by the method as later tokens, not scored) and of those
            to be scored. Where the first of a pair is empty, the first scored token is predicted before compression.
        beginning: the context is no more than what begins a text, so there is nothing to compress: scored with the full
            cache whatever the method.
    """

    context: list[int]
    asked: tuple[tuple[list[int], list[int]], ...]
    beginning: bool = False


@dataclass(frozen=True)
class Likelihood:
    """How likely a continuation is.

    Attributes:
        log_probs: natural logarithm of each token's probability, given all before it.
        greedy: whether each token is the most probable one.
    """

    log_probs: list[float]
    greedy: list[bool]


@dataclass(frozen=True)
class Reply:
    """What a model has written: ``text``, and the token ids it was decoded from."""

    text: str
    tokens: list[int]


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


class Described(HasIdentity, ABC):
    """A task, workload or training set: its fields are the YAML keys under ``task.`` or ``workload.``."""

    key_prefix: ClassVar[str] = "task."

    name: str

    def identity(self) -> dict[str, Any]:
        """The settings and the data's sha256 as plain data: what decides the numbers beside seed and tokenizer."""
        source = self.source()
        return super().identity() | {"source": source.name, "sha256": dict(source.sha256)}

    @abstractmethod
    def source(self) -> Source:
        """Where the data comes from; its name goes into result folders and tables. Resolved once; may fetch."""


class Task(Described):
    """A task: see the module docstring."""

    max_length: int | None = None
    """Prompt tokens the user allows; None leaves the limit to the model."""
    unit: str = PERCENT
    """What scores are in: :data:`PERCENT`, or :data:`NATS`, of which fewer are better."""
    fills_positions: ClassVar[bool] = False
    """Whether the limit of :meth:`encode` is the model's positions, the answer's included, and not its prompt limit."""
    writes: ClassVar[bool] = True
    """Whether the model writes anything, so that sampling matters."""
    shown: ClassVar[tuple[str, ...]] = ()
    """Settings that the title of a table names, because numbers under others do not compare."""
    compares: ClassVar[bool] = False
    """Whether :meth:`judge` needs the full cache's own reply to the same prompt."""
    chosen_by: ClassVar[tuple[str, ...]] = ()
    """Keys of :meth:`identity` that say which examples are asked, and change nothing about any one of them."""

    def scoring(self) -> dict[str, Any]:
        """What decides scores beside :meth:`identity`: settings of a task that is also something else."""
        return {}

    def require_question(self) -> None:
        """Raise InputError where the settings already say that no prompt has a question to feed after compression.

        Called with ``runner.question=after_compression``, before a model is loaded.
        """

    def limit_of(self, max_length: int | None) -> int | None:
        """The least of ``max_length``, which a model allows, and ``task.max_length``; None: neither is a limit."""
        return min((n for n in (max_length, self.max_length) if n is not None), default=None)

    @abstractmethod
    def examples(self) -> list[Example]:
        """Every example of the run, in a fixed order."""

    @abstractmethod
    def encode(self, example: Example, tokenizer: Any, max_length: int | None) -> list[int] | list[Continuations]:
        """Token ids of the prompt, truncated to ``max_length`` prompt tokens as the task defines (None: never).

        A task that asks for likelihoods gives the contexts and continuations of the example instead.
        """

    def score(self, example: Example, prediction: Any) -> float:
        """Score of one prediction: in [0, 1], or in the task's unit."""
        raise NotImplementedError

    def judge(self, example: Example, prediction: Any, reply: Reply | None, reference: Reply | None) -> dict[str, Any]:
        """``score`` and whatever else is kept of one example's outcome.

        Args:
            example: which.
            prediction: the text, cut at the first stop string, or what :meth:`read_off` gave.
            reply: as generated; None where likelihoods were asked for.
            reference: the full cache's reply, where the task :attr:`compares`.
        """
        return {"score": self.score(example, prediction)}

    def read_off(self, example: Example, likelihoods: Sequence[Likelihood]) -> Any:
        """What is kept of the likelihoods of all of an example's continuations, as plain data."""
        raise NotImplementedError

    def conclude(self, rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a finished run's record says beside the scores, and further files of the run: name -> plain data.

        Args:
            rows: of ``samples.jsonl``, in the order of :meth:`examples`.
        """
        return {}, {}

    def group(self, example: Example) -> str:
        """Name of the score that ``example`` counts towards: its data set, unless a task splits data sets further."""
        return example.dataset

    def averages(self, groups: Sequence[str]) -> Mapping[str, Sequence[str]]:
        """Averages to report beside the one over all ``groups``: name -> the groups it is over."""
        return {}


def names_of(value: Any) -> Any:
    """Names that are listed, or written one after another with commas, as a tuple; any other value as it is."""
    if isinstance(value, str):
        return tuple(name.strip() for name in value.split(","))
    return tuple(value) if is_list(value) else value


def is_text(value: str) -> bool:
    """Whether a string is valid text: JSON can encode a lone surrogate (U+D800), which no tokenizer accepts."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def prompt_tokens(prompt: str, tokenizer: Any, chat: bool, answer_prefix: str = "") -> list[int]:
    """Token ids of a whole prompt, in the tokenizer's chat template where it has one and ``chat`` asks for it.

    ``answer_prefix`` is the beginning of the model's own turn. Both are one text, not two lists of ids: some tokenizers
    put a blank of their own at the beginning of a text.

    Raises:
        InputError: the chat template cannot be used.
    """
    if not chat or not getattr(tokenizer, "chat_template", None):
        return list(tokenizer(prompt + answer_prefix, truncation=False, verbose=False).input_ids)
    return plain_tokens(in_chat_template(prompt, tokenizer) + answer_prefix, tokenizer)


def cut_at(text: str, stop_strings: Sequence[str]) -> str:
    """The text up to the first of the strings that stands in it."""
    return text[: min((i for i in map(text.find, stop_strings) if i >= 0), default=len(text))]


def question_length(ids: Sequence[int], question: str, tokenizer: Any) -> int:
    """How many of a prompt's last tokens begin with its question; see :func:`find_question`.

    Raises:
        InputError: the prompt lacks the question, or nothing is in front of it.
    """
    count = find_question(ids, question, tokenizer)
    if count is None:
        allowed = "needs a prompt with a context and a question behind it: use with_context for this task"
        raise InputError("runner.question", "after_compression", allowed)
    return count


def find_question(ids: Sequence[int], question: str, tokenizer: Any) -> int | None:
    """How many of a prompt's last tokens hold the question and all that follows it, such as a chat template's end.

    A token that lies across the border counts as the question's. Blanks are passed over, for some tokenizers move them.

    Returns:
        the number, or None if the prompt lacks the question, or nothing is in front of it.
    """
    wanted = "".join(question.split())

    def holds(count: int) -> bool:
        return wanted in "".join(tokenizer.decode(ids[len(ids) - count :]).split())

    if not wanted or not holds(len(ids)):
        return None
    least, most = 0, 1  # the former does not hold it
    while not holds(most):
        least, most = most, min(2 * most, len(ids))
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (least, middle) if holds(middle) else (middle, most)
    return most if most < len(ids) else None


def require_fit(ids: Sequence[int], limit: int | None, example: Example) -> None:
    """Raise InputError where a prompt that is never cut is longer than ``limit`` (None: no limit)."""
    allowed = f"{example.dataset}/{example.id} has {len(ids)} prompt tokens, and this task cuts none"
    require(limit is None or len(ids) <= limit, "task.max_length", limit, allowed)
