"""Needle in a haystack: a made-up fact in a long text, and a question that only that sentence answers.

After Kamradt, "Needle In A Haystack - Pressure Testing LLMs" (2023), https://github.com/gkamradt/LLMTest_NeedleInAHaystack:
a grid of prompt lengths and of depths at which the needle stands. It shows what an average over data sets hides: a
method that keeps the ends of a prompt loses the middle. Asking for several needles at once is the multi-query
retrieval of RULER (Hsieh et al., 2024), arXiv 2404.06654, whose wording ours follows. Text, needles and metrics are our
own, so a score compares with no published one.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from ..conf.chat import plain_tokens
from ..conf.errors import InputError, require
from ..conf.options import Bounds, Entries, PositiveInt, Share, Text, Wording
from .base import Example, Source, Task, prompt_tokens
from .longbench_metrics import rouge

Lengths = Annotated[
    Sequence[PositiveInt],
    Entries(differ=True),
    Wording("a list of different whole numbers of tokens, such as [2048,4096]"),
]

NEEDLE = "The special magic number of {place} is {number}."
QUESTION = "What is the special magic number of {place} mentioned in the text?"
QUESTIONS = "What are the special magic numbers of {places} and {last} mentioned in the text?"
PROMPT = (
    "Some special magic numbers are hidden in the following text. Memorize them: you will be asked for them afterwards."
    "\n\n{context}\n\n{question}"
)
OWN_PROMPT = "Read the text and answer the question.\n\n{context}\n\n{question}"
"""For the user's needle, which need not be about a number."""

CONTEXT = "{context}"
"""Where :meth:`Needle.encode` puts the text; the first one counts, so that a question may hold the same characters."""

PLACES = (
    "Amsterdam", "Athlone", "Auckland", "Bangkok", "Barcelona", "Belfast", "Berlin", "Bogota", "Boston", "Brisbane",
    "Brussels", "Budapest", "Calgary", "Chicago", "Copenhagen", "Dakar", "Dallas", "Denver", "Dresden", "Dublin",
    "Edinburgh", "Florence", "Geneva", "Glasgow", "Hamburg", "Hanoi", "Havana", "Helsinki", "Houston", "Istanbul",
    "Jakarta", "Karachi", "Kingston", "Krakow", "Kyoto", "Lagos", "Lisbon", "Liverpool", "London", "Madrid", "Manila",
    "Melbourne", "Miami", "Milan", "Montreal", "Moscow", "Munich", "Nairobi", "Naples", "Oslo", "Ottawa", "Paris",
    "Prague", "Quebec", "Seattle", "Seoul", "Shanghai", "Stockholm", "Sydney", "Tokyo", "Toronto", "Vienna", "Warsaw",
    "Zurich",
)  # fmt: skip
"""None of them occurs in the bundled text."""

FEW_CHARACTERS = 6
"""Characters to a token, at most, of ordinary English text: a haystack with fewer may be too short for a prompt."""

GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass
class Needle(Task):
    """Needle in a haystack.

    Attributes:
        lengths: prompt tokens, one part of the grid each: chat template and question included, at most that many and at
            most a sentence of the haystack fewer.
        depths: where the needle stands: a number of depths, evenly spaced from 0 (before the text) to 1 (after it), or
            the depths themselves. After construction a tuple of floats.
        per_cell: examples of each length and depth, with different needles in different stretches of the haystack.
        needles: needles in one prompt. The first stands at the cell's depth, the others evenly spaced behind it,
            wrapping round; all are asked for together.
        haystack: text file, or folder whose ``.txt`` files are joined in the order of their names; None: the bundled
            text.
        metric: ``contains``: share of the answers that stand in the prediction. ``rouge``: ROUGE-L F of the prediction
            against the needles.
        seed: which needles, and which stretches of the haystack.
        max_new_tokens: generation limit, tokens for each needle.
        chat: use the model's chat template.
        max_length: prompt tokens that the model may be given instead of its own limit. Nothing is ever cut: a length
            above the limit is an error.
        needle, question, answer: the user's own sentence, question and answer; None for the made-up ones.
    """

    id: ClassVar[str] = "Needle"
    name = "needle"
    location_fields = ("haystack",)

    lengths: Lengths = (2048, 4096, 6144)
    depths: Annotated[
        Annotated[int, Bounds(ge=2)] | Annotated[Sequence[Share], Entries(differ=True)],
        Wording("2 or more (their number), or a list of different depths in [0,1]"),
    ] = 8
    per_cell: PositiveInt = 1
    needles: Annotated[int, Bounds(ge=1, le=len(PLACES))] = 1
    haystack: str | None = None
    metric: Literal["contains", "rouge"] = "contains"
    seed: int = 0
    max_new_tokens: PositiveInt = 32
    chat: bool = True
    max_length: PositiveInt | None = None
    needle: Text | None = None
    question: Text | None = None
    answer: Text | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        at = "task."
        self.lengths, self.depths = tuple(self.lengths), _depths(self.depths)
        own = {key: getattr(self, key) for key in ("needle", "question", "answer")}
        given = [key for key, value in own.items() if value is not None]
        for key in given:
            if len(given) < len(own):
                missing = " and ".join(at + other for other in own if other not in given)
                raise InputError(at + key, own[key], f"needs {missing} too: give all three of them or none")
            for alone in ("per_cell", "needles"):
                allowed = "must be 1 with your own task.needle: there is only one"
                require(getattr(self, alone) == 1, at + alone, getattr(self, alone), allowed)
        self._counted: tuple[Any, list[int]] | None = None

    def source(self) -> Source:
        """``needle`` for the bundled text; ``needle-`` and the first 6 digits of its sha256 for the user's."""
        files = self.files
        if self.haystack is None:
            name, location = "needle", "kvbench.tasks/data/needle"
        else:
            name = f"needle-{hashlib.sha256(b''.join(files.values())).hexdigest()[:6]}"
            location = self.haystack
        characters, note = len(self.text), ""
        if characters < FEW_CHARACTERS * max(self.lengths):
            note = f"The haystack has only {characters} characters and is repeated where a prompt needs more."
        hashes = {file: hashlib.sha256(data).hexdigest() for file, data in files.items()}
        return Source(name=name, location=location, revision=None, sha256=hashes, note=note)

    def examples(self) -> list[Example]:
        """One example for each length, depth and number in the cell, in this order.

        ``prompt`` is the prompt with :data:`CONTEXT` in place of the text: how much of it fits is known with the
        tokenizer only. ``meta`` holds ``length`` (tokens), ``depth``, ``needles`` (the sentences) and ``start`` (where
        in the haystack the text begins, in [0, 1)).

        Raises:
            InputError: the haystack cannot be used, or the user's answer stands in it.
        """
        assert not isinstance(self.depths, int)
        ends = sum(sentence.rstrip().endswith((".", "?", "!")) for sentence in self._sentences)
        allowed = 'must have sentence ends (".", "?" or "!" and a blank), where a needle can stand; there is none'
        require(ends > 0, "task.haystack", self.haystack, allowed)
        allowed = f"must be at most {ends}: the haystack has no more sentence ends"
        require(self.needles <= ends, "task.needles", self.needles, allowed)
        places = [place for place in PLACES if place not in self.text]
        if self.needle is None:
            allowed = f"has the names of all places but {len(places)}, and task.needles={self.needles} are wanted"
            require(len(places) >= self.needles, "task.haystack", self.haystack, allowed)
        prompt = PROMPT if self.needle is None else OWN_PROMPT
        used: set[str] = set()
        examples = []
        for length in self.lengths:
            for depth in self.depths:
                for k in range(self.per_cell):
                    # Of the example alone, so that another grid does not change it.
                    rng = random.Random(f"needle {self.seed} {length} {depth:.3f} {k}")
                    sentences, question, answers = self._draw(rng, places, used)
                    first = random.Random(f"start {self.seed} {length} {depth:.3f}").random()
                    meta = {
                        "length": length,
                        "depth": depth,
                        "needles": sentences,
                        "start": (first + k * GOLDEN) % 1.0,  # the golden section lies apart for any number of them
                    }
                    example = Example(
                        dataset=f"needle-{length}",
                        id=f"depth-{depth:.3f}-{k}",
                        prompt=prompt.replace("{question}", question),
                        answers=answers,
                        max_new_tokens=self.max_new_tokens * self.needles,
                        chat=self.chat,
                        question=question,
                        meta=meta,
                    )
                    examples.append(example)
        return examples

    def encode(self, example: Example, tokenizer: Any, max_length: int | None) -> list[int]:
        """Token ids of the prompt: as many whole sentences of the haystack as the example's length holds.

        Depth is counted in tokens of the text; the needle goes to the nearest sentence end.

        Args:
            example: from :meth:`examples`.
            tokenizer: a transformers tokenizer.
            max_length: most tokens of the prompt; None for no limit. ``task.max_length`` holds if it is smaller.

        Raises:
            InputError: the length is above the limit, or holds too little: the question, the needles and as many
                sentences.
        """
        length: int = example.meta["length"]
        limit = self.limit_of(max_length)
        if limit is not None and length > limit:
            allowed = f"the limit is {limit} prompt tokens (task.max_length, or the model's own); use shorter ones"
            raise InputError("task.lengths", length, allowed)
        room = length - self._fixed_tokens(example, tokenizer)
        counts = self._counts(tokenizer)
        start = self._start(counts, example.meta["start"], room)
        taken = list(accumulate((counts[(start + i) % len(counts)] for i in range(room)), initial=0))
        number = bisect_right(taken, room) - 1

        def ids(number: int) -> list[int]:
            return self._ids(example, tokenizer, [(start + i) % len(counts) for i in range(number)])

        # Sentences counted one by one do not add up to the text to the last token, so the real prompts decide.
        found = ids(number)
        if len(found) > length:
            while len(found) > length and number > 0:
                number -= 1
                found = ids(number)
        else:
            while len(longer := ids(number + 1)) <= length:
                number, found = number + 1, longer
        if number < self.needles:
            allowed = (
                f"has room for {number} sentences of the haystack, and task.needles={self.needles} need a sentence end "
                "each; use a longer one"
            )
            raise InputError("task.lengths", length, allowed)
        return found

    def score(self, example: Example, prediction: str) -> float:
        """Share of the answers found (``contains``), or ROUGE-L F against all needles (``rouge``), in [0, 1]."""
        if self.metric == "rouge":
            return rouge(prediction, " ".join(example.meta["needles"]))
        return sum(contains(prediction, answer) for answer in example.answers) / len(example.answers)

    @cached_property
    def files(self) -> dict[str, bytes]:
        """Name -> content of the files of the haystack, in order."""
        if self.haystack is None:
            file = resources.files("kvbench.tasks") / "data" / "needle" / "haystack.txt"
            return {file.name: file.read_bytes()}
        path, at = Path(self.haystack).expanduser(), "task.haystack"
        require(path.exists(), at, self.haystack, "must be a text file, or a folder of .txt files; it does not exist")
        paths = sorted(p for p in path.glob("*.txt") if p.is_file()) if path.is_dir() else [path]  # by name
        require(bool(paths), at, self.haystack, "must hold .txt files; there is none in this folder")
        return {p.name: p.read_bytes() for p in paths}

    @cached_property
    def text(self) -> str:
        """The whole haystack, without blanks at the ends."""
        try:
            parts = [data.decode("utf-8-sig").strip() for data in self.files.values()]
        except UnicodeDecodeError as error:
            raise InputError("task.haystack", self.haystack, f"must be UTF-8 text: {error}") from None
        text = "\n\n".join(part for part in parts if part)
        require(text != "", "task.haystack", self.haystack, "must hold text; it is empty")
        return text

    @cached_property
    def _sentences(self) -> list[str]:
        """The haystack cut at its sentence ends, each with the blanks behind it; the last with a newline."""
        return [match.group() for match in re.finditer(r".+?(?:(?<=[.?!])\s+|\Z)", self.text + "\n", re.DOTALL)]

    def _draw(
        self, rng: random.Random, places: Sequence[str], used: set[str]
    ) -> tuple[tuple[str, ...], str, tuple[str, ...]]:
        """Needles, question and answers of one example; the numbers drawn are added to ``used``."""
        if self.needle is not None:
            assert self.question is not None and self.answer is not None
            allowed = "must not stand in the haystack, where it would be found without the needle"
            require(_plain(self.answer) not in _plain(self.text), "task.answer", self.answer, allowed)
            return (self.needle.strip(),), self.question.strip(), (self.answer.strip(),)
        asked = rng.sample(places, self.needles)
        numbers: list[str] = []
        while len(numbers) < self.needles:
            # No digit twice: a run of zeros is hard to copy, and that is not what is asked.
            number = "".join(rng.sample("0123456789", rng.randint(5, 7)))
            if number[0] != "0" and number not in used and number not in self.text:
                used.add(number)
                numbers.append(number)
        sentences = tuple(NEEDLE.format(place=p, number=n) for p, n in zip(asked, numbers, strict=True))
        question = QUESTION.format(place=asked[0])
        if self.needles > 1:
            question = QUESTIONS.format(places=", ".join(asked[:-1]), last=asked[-1])
        return sentences, question, tuple(numbers)

    def _fixed_tokens(self, example: Example, tokenizer: Any) -> int:
        """Tokens of the prompt without the haystack; :class:`InputError` if the example's length does not hold them."""
        length: int = example.meta["length"]
        if self.needle is not None:
            tokens = len(plain_tokens(self.needle, tokenizer))
            require(tokens < length, "task.needle", self.needle, f"has {tokens} tokens and must fit into {length}")
        tokens = len(self._ids(example, tokenizer, []))
        allowed = f"must hold the question and the needles, which take {tokens} tokens"
        require(tokens < length, "task.lengths", length, allowed)
        return tokens

    def _counts(self, tokenizer: Any) -> list[int]:
        """Tokens of each sentence; counted once for a tokenizer."""
        if self._counted is None or self._counted[0] is not tokenizer:
            # A word in the middle of a text has its blank in front.
            texts = [f" {sentence.strip()}" for sentence in self._sentences]
            self._counted = tokenizer, [len(plain_tokens(text, tokenizer)) for text in texts]
        return self._counted[1]

    def _start(self, counts: Sequence[int], share: float, room: int) -> int:
        """The first sentence: ``share`` of the way to the last one behind which ``room`` tokens are left, if any."""
        last, behind = len(counts), 0
        while last > 0 and behind <= room:
            last -= 1
            behind += counts[last]
        # A text that is too short is repeated wherever it begins.
        return int(share * (last + 1 if behind > room else len(counts)))

    def _ids(self, example: Example, tokenizer: Any, which: Sequence[int]) -> list[int]:
        """Token ids of the prompt whose text is these sentences, with the needles at their depths."""
        context = self._context(example, tokenizer, which)
        return prompt_tokens(example.prompt.replace(CONTEXT, context, 1), tokenizer, example.chat)

    def _context(self, example: Example, tokenizer: Any, which: Sequence[int]) -> str:
        """The sentences with the needles between them."""
        counts = self._counts(tokenizer)
        ends = list(accumulate((counts[i] for i in which), initial=0))
        free = set(range(len(ends)))
        needles: list[list[str]] = [[] for _ in ends]
        for n, needle in enumerate(example.meta["needles"]):
            depth = example.meta["depth"] if n == 0 else (example.meta["depth"] + n / self.needles) % 1.0
            target = depth * ends[-1]
            # Two needles at one sentence end would be one place; with no text, for counting, there is no other.
            place = min(free or [0], key=lambda i: (abs(ends[i] - target), i))
            free.discard(place)
            needles[place].append(needle)
        parts = [f"{needle} " for needle in needles[0]]
        for i, hidden in zip(which, needles[1:], strict=True):
            body = self._sentences[i].rstrip()
            parts += [" ".join([body, *hidden]), self._sentences[i][len(body) :]]
        return "".join(parts).strip()


def contains(prediction: str, answer: str) -> bool:
    """Whether the answer stands in the prediction, blanks and case aside; a number must not go on at either end."""
    wanted = _plain(answer)
    if wanted.isdigit():
        prediction = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", prediction)  # 12,345 is 12345
    before = r"(?<!\d)" if wanted[0].isdigit() else ""
    behind = r"(?!\d)" if wanted[-1].isdigit() else ""
    return re.search(before + re.escape(wanted) + behind, _plain(prediction)) is not None


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def _depths(value: int | Sequence[float]) -> tuple[float, ...]:
    if isinstance(value, int):
        return tuple(i / (value - 1) for i in range(value))
    are_apart = len({f"{depth:.3f}" for depth in value}) == len(value)
    require(are_apart, "task.depths", list(value), "must differ in the first three decimals: they name an example")
    return tuple(float(depth) for depth in value)
