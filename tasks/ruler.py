"""RULER: 13 synthetic tasks that fill a prompt to a given length.

After Hsieh et al., "RULER: What's the Real Context Size of Your Long-Context Language Models?" (2024), arXiv
2404.06654, section 3, and NVIDIA's generator, https://github.com/NVIDIA/RULER (``scripts/synthetic.yaml`` for the 13
configurations, ``scripts/data/synthetic`` for how they are made). Eight retrieval tasks (niah), variable tracking (vt),
common and frequent words (cwe, fwe), and questions on documents that stand among others (qa_1: SQuAD, qa_2: HotpotQA).

A length is that of prompt and answer together, in tokens of the model's tokenizer: a context takes as many units
(words, lines, documents) as leave room for the tokens to generate. What is asked is drawn by :meth:`Ruler.examples`.
How much fits is known with a tokenizer only, so :meth:`Ruler.encode` makes the context, by a search over the number of
units.

The answer prefix ("The special magic number for X mentioned in the provided text is") is the beginning of the model's
own answer: it stands behind the chat template, as the generator has it, and behind the prompt where there is none. The
solved examples of vt and cwe stand in the user's turn.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import uuid
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources
from itertools import islice, pairwise
from pathlib import Path
from random import Random
from string import ascii_lowercase, ascii_uppercase
from typing import Annotated, Any, ClassVar, NamedTuple

from ..conf.errors import InputError, require
from ..conf.options import Entries, OneOf, PositiveInt
from .base import Example, Source, Task, names_of, prompt_tokens
from .needle import CONTEXT, FEW_CHARACTERS, Lengths, Needle

EXAMPLES = 500
"""Of each task and length in the paper."""

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
DEPTHS = tuple(round(100 * i / 39) for i in range(40))
"""Where a needle may stand in an essay, in percent of its sentences."""

WORD_LISTS = ("nounlist.txt", "adjectivelist.txt", "verblist.txt")


class Asked(NamedTuple):
    """What one example asks.

    Attributes:
        prompt: the user's turn, with :data:`CONTEXT` in place of the context.
        answer_prefix: with which the model's answer begins.
        answers: references.
        meta: what the context is made from.
    """

    prompt: str
    answer_prefix: str
    answers: tuple[str, ...]
    meta: dict[str, Any]


class Filling(NamedTuple):
    """The context of one example.

    Attributes:
        text: the context of n units, ``least <= n <= most``.
        unit: what they are.
        most: None: there is no end to them.
    """

    text: Callable[[int], str]
    unit: str
    least: int
    most: int | None = None


class Family(ABC):
    """Tasks of one kind."""

    max_new_tokens: ClassVar[int]
    """Tokens to generate."""

    @abstractmethod
    def ask(self, task: Ruler, key: str, length: int, index: int) -> Asked:
        """What is asked, of ``key`` (names the example and the seed), ``length`` and ``index`` alone."""

    @abstractmethod
    def filling(self, task: Ruler, example: Example) -> Filling:
        """The context that goes with it."""


# The templates and answer prefixes below are NVIDIA's (scripts/data/synthetic/constants.py, Apache-2.0), to the letter:
# they are the definition of the tasks.


@dataclass(frozen=True)
class Niah(Family):
    """Needles in a haystack (section 3.1): pairs of a key and a value, and keys whose values are asked for.

    Attributes:
        haystack: ``noise`` (one line again and again), ``essay`` (running text), or ``needle`` (other needles).
        keys, values: ``words``, ``numbers`` or ``uuids``.
        number, values_each: keys, and values of each.
        queries: keys asked for.
    """

    max_new_tokens: ClassVar[int] = 128
    template: ClassVar[str] = (
        "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you "
        "about the {kind} afterwards.\n{context}\nWhat are all the special magic {kind} for {query} mentioned in the "
        "provided text?"
    )
    prefix: ClassVar[str] = " The special magic {kind} for {query} mentioned in the provided text are"

    haystack: str
    keys: str = "words"
    values: str = "numbers"
    number: int = 1
    values_each: int = 1
    queries: int = 1

    def ask(self, task: Ruler, key: str, length: int, index: int) -> Asked:
        rng = Random(f"ask {key}")
        names = list(islice(_different(rng, self.keys), self.number))
        values = list(islice(_different(rng, self.values), self.number * self.values_each))
        pairs = [(name, value) for i, name in enumerate(names) for value in values[i :: self.number]]
        needles = [NEEDLE.format(kind=self.values, key=name, value=value) for name, value in pairs]
        rng.shuffle(needles)
        asked = rng.sample(names, self.queries)
        answers = tuple(value for wanted in asked for name, value in pairs if name == wanted)
        template, prefix, kind = self.template, self.prefix, self.values
        if len(answers) == 1:  # the generator's own way to the singular
            template, prefix = (
                text.replace("Some", "A").replace("are all", "is").replace("are", "is") for text in (template, prefix)
            )
            kind = kind.removesuffix("s")
        query = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
        fields = {"kind": kind, "query": query}
        meta = {"needles": tuple(needles), "keys": tuple(names), "depths": tuple(rng.sample(DEPTHS, len(needles)))}
        return Asked(template.format(context=CONTEXT, **fields), prefix.format(**fields), answers, meta)

    def filling(self, task: Ruler, example: Example) -> Filling:
        needles, key = example.meta["needles"], example.meta["key"]
        if self.haystack == "essay":
            depths = example.meta["depths"]
            return Filling(lambda n: task.essay.text(n, needles, depths), "words", least=1)
        others = _Growing(self._others(example))

        def text(n: int) -> str:
            lines = [NOISE] * n if self.haystack == "noise" else others.first(n)
            places = sorted(Random(f"places {key}").sample(range(n), len(needles)), reverse=True)
            for place, needle in zip(places, needles, strict=True):
                lines.insert(place, needle)
            return "\n".join(lines)

        return Filling(text, "lines", least=len(needles))

    def _others(self, example: Example) -> Iterator[str]:
        """Needles that are not asked for, all with keys and values of their own."""
        rng = Random(f"others {example.meta['key']}")
        keys = _different(rng, self.keys, example.meta["keys"])
        values = _different(rng, self.values, example.answers)
        return (NEEDLE.format(kind=self.values, key=key, value=value) for key, value in zip(keys, values, strict=False))


@dataclass(frozen=True)
class VariableTracking(Family):
    """A chain of assignments in noise; the answer is all variables with the first one's value (section 3.2).

    One solved example, shorter, stands in front. The generator makes its noise as long as 500 tokens hold in steps of 5
    lines, which is 10 lines with common tokenizers; here it is 10 with all of them. All of it is drawn anew for each
    prompt.
    """

    max_new_tokens: ClassVar[int] = 30
    template: ClassVar[str] = (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: "
        "Find all variables that are assigned the value {query} in the text above."
    )
    # "assgined" is the generator's, and published scores were made with it.
    prefix: ClassVar[str] = (
        " Answer: According to the chain(s) of variable assignment in the text above, {num_v} variables are assgined "
        "the value {query}, they are: "
    )
    example_lines: ClassVar[int] = 10

    hops: int = 4

    def ask(self, task: Ruler, key: str, length: int, index: int) -> Asked:
        rng = Random(f"ask {key}")
        value, names, chain = self._chain(rng, letters=3)
        fields = {"query": value, "num_v": len(names)}
        context = self._text(rng, self.example_lines, chain)
        solved = self.template.format(context=context, **fields) + self.prefix.format(**fields) + " " + " ".join(names)
        value, names, chain = self._chain(rng, letters=5)
        fields = {"query": value, "num_v": len(names)}
        prompt = f"{solved}\n\n\n\n{self.template.format(context=CONTEXT, **fields)}"
        return Asked(prompt, self.prefix.format(**fields), names, {"chain": chain})

    def filling(self, task: Ruler, example: Example) -> Filling:
        key, chain = example.meta["key"], example.meta["chain"]
        return Filling(lambda n: self._text(Random(f"places {key}"), n, chain), "lines", least=len(chain) + 1)

    def _chain(self, rng: Random, letters: int) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
        """The value, the names of the variables and the assignments, in order."""
        names = tuple(islice(_distinct(lambda: "".join(rng.choices(ascii_uppercase, k=letters))), self.hops + 1))
        value = str(rng.randrange(10_000, 99_999))
        later = [f"VAR {name} = VAR {before} " for before, name in pairwise(names)]
        return value, names, (f"VAR {names[0]} = {value}", *later)

    @staticmethod
    def _text(rng: Random, lines: int, chain: Sequence[str]) -> str:
        parts = [f"{NOISE}\n"] * lines
        for i, place in enumerate(sorted(rng.sample(range(lines), len(chain)))):
            parts.insert(place + i, chain[i])
        return " ".join(parts)


@dataclass(frozen=True)
class CommonWords(Family):
    """The 10 words that come more often than the others of a numbered list (section 3.3).

    30 times to 3; 6 times to once in prompts below 4096 tokens. One solved example of 40 words (20) stands in front.
    A list of more words than there are takes adjective-noun pairs for the rest.
    """

    max_new_tokens: ClassVar[int] = 120
    template: ClassVar[str] = (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
        "appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?"
    )
    prefix: ClassVar[str] = " Answer: The top 10 words that appear most often in the list are:"

    common: int = 10

    def ask(self, task: Ruler, key: str, length: int, index: int) -> Asked:
        rng = Random(f"ask {key}")
        words, often, seldom = (20, 3, 1) if length < 4096 else (40, 10, 3)
        drawn = rng.sample(_words().all, words)
        context = self._text(rng, drawn, often, seldom)
        solved = self.template.format(context=context) + self.prefix + _numbered(drawn[: self.common])
        common = tuple(rng.sample(_words().all, self.common))
        return Asked(f"{solved}\n{self.template.format(context=CONTEXT)}", self.prefix, common, {})

    def filling(self, task: Ruler, example: Example) -> Filling:
        often, seldom = (6, 1) if example.meta["length"] < 4096 else (30, 3)
        key = example.meta["key"]
        words = _Growing(self._order(Random(f"words {key}"), example.answers))

        def text(n: int) -> str:
            return self._text(Random(f"order {key}"), words.first(n), often, seldom)

        return Filling(text, "different words", least=self.common + 1)

    @staticmethod
    def _order(rng: Random, common: Sequence[str]) -> Iterator[str]:
        """All words, the common ones first, and pairs without end."""
        rest = [word for word in _words().all if word not in common]
        rng.shuffle(rest)
        yield from (*common, *rest)
        yield from _distinct(lambda: _words().pair(rng))

    def _text(self, rng: Random, words: Sequence[str], often: int, seldom: int) -> str:
        listed = [*words[: self.common]] * often + [*words[self.common :]] * seldom
        rng.shuffle(listed)
        return _numbered(listed)


@dataclass(frozen=True)
class FrequentWords(Family):
    """The three most frequent of made-up words whose frequencies follow a zeta distribution (section 3.3).

    The k-th of ``length // 50`` words comes ``n k^-alpha / zeta(alpha)`` times; the first one is dots.
    """

    max_new_tokens: ClassVar[int] = 50
    template: ClassVar[str] = (
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        "appeared coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
        "What are the three most frequently appeared words in the above coded text?"
    )
    prefix: ClassVar[str] = " Answer: According to the coded text above, the three most frequently appeared words are:"
    alpha: ClassVar[float] = 2.0
    zeta: ClassVar[float] = math.pi**2 / 6  # of alpha

    def ask(self, task: Ruler, key: str, length: int, index: int) -> Asked:
        return Asked(self.template.format(context=CONTEXT), self.prefix, tuple(islice(self._coded(key), 3)), {})

    def filling(self, task: Ruler, example: Example) -> Filling:
        key = example.meta["key"]
        words = ["...", *islice(self._coded(key), max(example.meta["length"] // 50, 5) - 1)]
        shares = [(k + 1) ** -self.alpha / self.zeta for k in range(len(words))]

        def text(n: int) -> str:
            drawn = [word for word, share in zip(words, shares, strict=True) for _ in range(int(n * share))]
            Random(f"order {key}").shuffle(drawn)
            return " ".join(drawn)

        # From here on the third word is more frequent than the fourth, whatever is rounded off.
        return Filling(text, "coded words", least=math.ceil(1 / (shares[3] - shares[4])))

    @staticmethod
    def _coded(key: str) -> Iterator[str]:
        rng = Random(f"coded {key}")
        return _distinct(lambda: "".join(rng.choices(ascii_lowercase, k=6)))


@dataclass(frozen=True)
class QuestionAnswering(Family):
    """A question on documents that stand among others (section 3.4): the i-th question of the file for example i.

    The documents that hold the answer, the others of the same article (SQuAD), then any; all of them in random order.
    """

    max_new_tokens: ClassVar[int] = 32
    template: ClassVar[str] = (
        "Answer the question based on the given documents. Only give me the answer and do not output any other words."
        "\n\nThe following are given documents.\n\n{context}\n\nAnswer the question based on the given documents. Only "
        "give me the answer and do not output any other words.\n\nQuestion: {query}"
    )
    prefix: ClassVar[str] = " Answer:"

    file: str

    def ask(self, task: Ruler, key: str, length: int, index: int) -> Asked:
        row = task.documents(self.file).rows[index]
        prompt = self.template.format(context=CONTEXT, query=row.question)
        return Asked(prompt, self.prefix, row.answers, {"row": index})

    def filling(self, task: Ruler, example: Example) -> Filling:
        documents, key = task.documents(self.file), example.meta["key"]
        row, rng = documents.rows[example.meta["row"]], Random(f"documents {key}")
        known = {*row.needed, *row.near}
        near, far = list(row.near), [i for i in range(len(documents.texts)) if i not in known]
        rng.shuffle(near)
        rng.shuffle(far)
        order = [*row.needed, *near, *far]

        def text(n: int) -> str:
            chosen = order[:n]
            Random(f"order {key}").shuffle(chosen)
            return "\n\n".join(f"Document {i}:\n{documents.texts[which]}" for i, which in enumerate(chosen, 1))

        return Filling(text, "documents", least=len(row.needed), most=len(order))


FAMILIES: dict[str, Family] = {
    "niah_single_1": Niah("noise"),
    "niah_single_2": Niah("essay"),
    "niah_single_3": Niah("essay", values="uuids"),
    "niah_multikey_1": Niah("essay", number=4),
    "niah_multikey_2": Niah("needle"),
    "niah_multikey_3": Niah("needle", keys="uuids", values="uuids"),
    "niah_multivalue": Niah("essay", values_each=4),
    "niah_multiquery": Niah("essay", number=4, queries=4),
    "vt": VariableTracking(),
    "cwe": CommonWords(),
    "fwe": FrequentWords(),
    "qa_1": QuestionAnswering("squad"),
    "qa_2": QuestionAnswering("hotpot"),
}
"""The 13 tasks (``scripts/synthetic.yaml``)."""

ESSAYS = tuple(name for name, family in FAMILIES.items() if isinstance(family, Niah) and family.haystack == "essay")
FILES = {name: family.file for name, family in FAMILIES.items() if isinstance(family, QuestionAnswering)}


@dataclass
class Ruler(Task):
    """RULER.

    Attributes:
        datasets: names of the tasks, in the order to run them; None for all that there is data for.
        lengths: tokens of prompt (chat template included) and answer together; every data set is made at each of them.
        limit: the first examples of each task and length; None for 500, as in the paper. qa has no more than its file.
        seed: seed of all examples. An example depends on seed, task, length and number, not on the other keys.
        haystack: text file, or folder whose ``.txt`` files are joined by name, for the essays; None: the bundled text.
        squad, hotpot: JSON files of SQuAD v2 (``dev-v2.0.json``) and HotpotQA (``hotpot_dev_distractor_v1.json``) as
            published, ``.gz`` or not, for qa_1 and qa_2.
        chat: use the model's chat template.
        max_length: prompt tokens that the model may be given instead of its own limit. Nothing is ever cut: a length
            above the limit is an error.
    """

    id: ClassVar[str] = "Ruler"
    name = "ruler"
    location_fields = ("haystack", "squad", "hotpot")

    datasets: Annotated[Sequence[Annotated[str, OneOf(FAMILIES)]], Entries(differ=True)] | None = None
    lengths: Lengths = (4096,)
    limit: PositiveInt | None = None
    seed: int = 0
    haystack: str | None = None
    squad: str | None = None
    hotpot: str | None = None
    chat: bool = True
    max_length: PositiveInt | None = None

    def __post_init__(self) -> None:
        self.datasets = names_of(self.datasets)
        super().__post_init__()
        self.lengths = tuple(self.lengths)
        for name in self.datasets or ():
            if name in FILES:
                allowed = f"must be the JSON file of its questions for task.datasets={name}"
                require(getattr(self, FILES[name]) is not None, f"task.{FILES[name]}", None, allowed)
        self._hay = Needle(haystack=self.haystack)  # reads the text, and refuses it in the same words
        self._documents: dict[str, Documents] = {}

    def source(self) -> Source:
        """``ruler`` for the bundled haystack; ``ruler-`` and the first 6 digits of the sha256 of the user's text."""
        files = self._hay.files
        hashes = {f"words/{name}": hashlib.sha256(data).hexdigest() for name, data in _word_files().items()}
        hashes |= {f"haystack/{name}": hashlib.sha256(data).hexdigest() for name, data in files.items()}
        hashes |= {file: self.documents(file).sha256 for name, file in FILES.items() if name in self._chosen}
        name, location = "ruler", "kvbench.tasks/data/ruler"
        if self.haystack is not None:
            name, location = f"ruler-{hashlib.sha256(b''.join(files.values())).hexdigest()[:6]}", self.haystack
        return Source(name=name, location=location, revision=None, sha256=hashes, note=" ".join(self._notes()))

    def examples(self) -> list[Example]:
        """``limit`` examples of each length and data set, in this order.

        ``dataset`` is task and length, ``vt-4096``. ``prompt`` is the user's turn with :data:`CONTEXT` in place of the
        context; the answer prefix, which does not belong to it, is in ``meta``. ``question`` is what stands behind the
        context in the user's turn. ``meta`` also holds ``task``, ``length`` (tokens) and what the context is made from.

        Raises:
            InputError: a file cannot be used.
        """
        if set(self._chosen) & set(ESSAYS):
            allowed = 'must have sentence ends (".", "?" or "!" and a blank), where a needle can stand; there is none'
            require(bool(self.essay.ends), "task.haystack", self.haystack, allowed)
        return [
            self._example(name, length, index)
            for length in self.lengths
            for name in self._chosen
            for index in range(self._number(name))
        ]

    def encode(self, example: Example, tokenizer: Any, max_length: int | None) -> list[int]:
        """Token ids of the prompt, chat template and answer prefix included.

        The context has as many units as its length holds; one more would be too long.

        Args:
            example: from :meth:`examples`.
            tokenizer: a transformers tokenizer.
            max_length: most tokens of the prompt; None for no limit. ``task.max_length`` holds if it is smaller.

        Raises:
            InputError: the length is above the limit, or holds less than the least context.
        """
        length, family = example.meta["length"], FAMILIES[example.meta["task"]]
        room = length - example.max_new_tokens
        limit = self.limit_of(max_length)
        if limit is not None and room > limit:
            allowed = (
                f"leaves {room} prompt tokens to {example.dataset}, and the limit is {limit} (task.max_length, "
                "or the model's own); use shorter ones"
            )
            raise InputError("task.lengths", length, allowed)
        filling = family.filling(self, example)

        def ids(n: int) -> list[int]:
            prompt = example.prompt.replace(CONTEXT, filling.text(n), 1)
            return prompt_tokens(prompt, tokenizer, example.chat, example.meta["answer_prefix"])

        least = ids(filling.least)
        if len(least) > room:
            units = f"{filling.least} {filling.unit if filling.least > 1 else filling.unit.removesuffix('s')}"
            allowed = (
                f"must be at least {len(least) + example.max_new_tokens} for {example.dataset}/{example.id}: "
                f"{len(least)} tokens of a prompt with {units}, and {example.max_new_tokens} to generate"
            )
            raise InputError("task.lengths", length, allowed)
        return _fill(ids, least, room, filling)

    def score(self, example: Example, prediction: str) -> float:
        """Share of the references that stand in the prediction; for qa whether any does. Case is passed over."""
        found = [answer.lower() in prediction.lower() for answer in example.answers]
        return float(any(found)) if example.meta["task"] in FILES else sum(found) / len(found)

    def averages(self, groups: Sequence[str]) -> Mapping[str, Sequence[str]]:
        """The average over the tasks at each length, where there are several of both."""
        by_length = {length: [g for g in groups if g.endswith(f"-{length}")] for length in self.lengths}
        if len(by_length) == 1 or len(self._chosen) == 1:
            return {}
        return {f"mean at {length}": members for length, members in by_length.items() if members}

    @cached_property
    def essay(self) -> Essay:
        """The haystack as words."""
        words = self._hay.text.split()
        return Essay(words, [i for i, word in enumerate(words, 1) if word.endswith((".", "?", "!"))])

    def documents(self, file: str) -> Documents:
        """Of ``squad`` or ``hotpot``; read once."""
        if file not in self._documents:
            self._documents[file] = _read(f"task.{file}", getattr(self, file), _PARSERS[file])
        return self._documents[file]

    @cached_property
    def _chosen(self) -> tuple[str, ...]:
        """The tasks to run."""
        assert self.datasets is None or isinstance(self.datasets, tuple)
        there = tuple(name for name in FAMILIES if name not in FILES or getattr(self, FILES[name]) is not None)
        return self.datasets or there

    def _number(self, name: str) -> int:
        """Examples of one task and length."""
        wanted = self.limit or EXAMPLES
        return min(wanted, len(self.documents(FILES[name]).rows)) if name in FILES else wanted

    def _example(self, name: str, length: int, index: int) -> Example:
        family, dataset = FAMILIES[name], f"{name}-{length}"
        key = f"{dataset} {self.seed} {index}"
        asked = family.ask(self, key, length, index)
        meta = {"task": name, "length": length, "key": key, "answer_prefix": asked.answer_prefix, **asked.meta}
        return Example(
            dataset=dataset,
            id=f"{index:03d}",
            prompt=asked.prompt,
            answers=asked.answers,
            max_new_tokens=family.max_new_tokens,
            chat=self.chat,
            question=asked.prompt.split(CONTEXT, 1)[1],
            meta=meta,
        )

    def _notes(self) -> Iterator[str]:
        """Sentences that a reader of the numbers needs."""
        longest = FEW_CHARACTERS * max(self.lengths)
        essays = [name for name in self._chosen if name in ESSAYS]
        if essays and self.haystack is None:
            names = ", ".join(essays)
            yield f"The essays are the bundled text, not Paul Graham's: {names} do not compare with published scores."
        if essays and (characters := len(self._hay.text)) < longest:
            yield f"The haystack has only {characters} characters and is repeated where a prompt needs more."
        if missing := [name for name in FILES if self.datasets is None and name not in self._chosen]:
            keys = " and ".join(f"task.{FILES[name]}" for name in missing)
            yield f"Left out: {' and '.join(missing)}, for want of {keys}."
        for name in self._chosen:
            if name in FILES and (characters := sum(map(len, self.documents(FILES[name]).texts))) < longest:
                yield f"The documents of {name} have only {characters} characters; a longer prompt takes all of them."


# --- the search -------------------------------------------------------------------------------------------------------


def _fill(ids: Callable[[int], list[int]], least: list[int], room: int, filling: Filling) -> list[int]:
    """``ids(n)`` for an n with at most ``room`` tokens, where n + 1 has more or is more than there are.

    Tokens grow nearly in proportion to units, so a line through two known points leads there in a few steps.

    Args:
        ids: token ids of the prompt with n units.
        least: of ``filling.least`` units; not longer than ``room``.
        room: tokens.
    """
    # Units of less than a quarter of a token: a tokenizer that finds none in a text must not keep us here for ever.
    most = min(filling.most or math.inf, filling.least + 4 * room)
    n, found = filling.least, least  # the most that is known to fit
    over, tokens = int(most) + 1, 0  # the least that is known not to; no tokens: none is known
    slope, attempt = 0.0, 0
    while n + 1 < over:
        attempt += 1
        step = (room - len(found)) / slope if slope > 0 else math.inf
        if not tokens:
            step = min(step, 15 * (n - filling.least + 1))  # the first units are a rough estimate of the others
        elif attempt % 4 == 0:
            step = (over - n) / 2  # ends what a bent line draws out
        tried = int(min(max(n + step, n + 1), over - 1))
        longer = ids(tried)
        if len(longer) > room:
            over, tokens = tried, len(longer)
        else:
            slope = (len(longer) - len(found)) / (tried - n)
            n, found = tried, longer
        if tokens:
            slope = (tokens - len(found)) / (over - n)
    return found


# --- what contexts are made of ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Essay:
    """Running text.

    Attributes:
        words: of the text.
        ends: words up to the end of each sentence.
    """

    words: list[str]
    ends: list[int]

    def text(self, n: int, needles: Sequence[str], depths: Sequence[int]) -> str:
        """The first n words, from the beginning again where there are fewer, with the needles between sentences.

        Args:
            needles: in the order in which they are to stand.
            depths: percent of the sentences in front of them, in any order.
        """
        times = -(-n // len(self.words))
        ends = [i * len(self.words) + end for i in range(times) for end in self.ends]
        ends = [0, *(end for end in ends if end < n), n]
        words, parts, done = self.words * times, [], 0
        for needle, depth in zip(needles, sorted(depths), strict=True):
            place = ends[(len(ends) - 1) * depth // 100]
            parts += [*words[done:place], needle]
            done = place
        return " ".join([*parts, *words[done:n]])


class Row(NamedTuple):
    """One question on documents; ``needed`` and ``near`` are their places among all.

    Attributes:
        needed: what every prompt holds.
        near: of the same article.
    """

    question: str
    answers: tuple[str, ...]
    needed: tuple[int, ...]
    near: tuple[int, ...]


@dataclass(frozen=True)
class Documents:
    """A file of questions and all its documents."""

    rows: list[Row]
    texts: list[str]
    sha256: str = ""


def _squad(data: Any) -> Documents:
    """Paragraphs are the documents; those of the same article are near. Questions without an answer are left out."""
    articles = [article["paragraphs"] for article in data["data"]]
    texts = sorted({paragraph["context"] for article in articles for paragraph in article})
    place = {text: i for i, text in enumerate(texts)}
    rows = []
    for article in articles:
        whole = dict.fromkeys(place[paragraph["context"]] for paragraph in article)
        for paragraph in article:
            here = place[paragraph["context"]]
            near = tuple(i for i in whole if i != here)
            for asked in paragraph["qas"]:
                answers = tuple(dict.fromkeys(answer["text"] for answer in asked["answers"] if answer["text"]))
                if answers and not asked.get("is_impossible", False):
                    rows.append(Row(asked["question"], answers, (here,), near))
    return Documents(rows, texts)


def _hotpot(data: Any) -> Documents:
    """All ten paragraphs of a question, the two that answer it and the eight that distract, are needed."""
    given = [[f"{title}\n{''.join(sentences)}" for title, sentences in row["context"]] for row in data]
    texts = sorted({text for paragraphs in given for text in paragraphs})
    place = {text: i for i, text in enumerate(texts)}
    rows = [
        Row(row["question"], (row["answer"],), tuple(dict.fromkeys(place[text] for text in paragraphs)), ())
        for row, paragraphs in zip(data, given, strict=True)
        if row["answer"]
    ]
    return Documents(rows, texts)


_PARSERS = {
    "squad": (_squad, "dev-v2.0.json of SQuAD"),
    "hotpot": (_hotpot, "hotpot_dev_distractor_v1.json of HotpotQA"),
}


def _read(key: str, name: str, parser: tuple[Callable[[Any], Documents], str]) -> Documents:
    parse, what = parser
    path = Path(name).expanduser()
    require(path.is_file(), key, name, f"must be a file: {what}; there is none")
    data = path.read_bytes()
    try:
        made = parse(json.loads(gzip.decompress(data) if path.suffix == ".gz" else data))
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError, OSError, EOFError, zlib.error) as error:
        raise InputError(key, name, f"must be {what}, as published: {type(error).__name__} {error}") from None
    require(bool(made.rows), key, name, f"must be {what}, as published: it has no question with an answer")
    return Documents(made.rows, made.texts, hashlib.sha256(data).hexdigest())


@dataclass(frozen=True)
class Words:
    """The bundled word lists."""

    nouns: list[str]
    adjectives: list[str]
    all: list[str]

    def pair(self, rng: Random) -> str:
        """Draw an adjective and a noun, joined by a hyphen."""
        return f"{rng.choice(self.adjectives)}-{rng.choice(self.nouns)}"


@cache
def _word_files() -> dict[str, bytes]:
    folder = resources.files("kvbench.tasks") / "data" / "ruler"
    return {name: (folder / name).read_bytes() for name in WORD_LISTS}


@cache
def _words() -> Words:
    nouns, adjectives, verbs = (
        sorted({word.strip() for word in data.decode().splitlines()}) for data in _word_files().values()
    )
    return Words(nouns, adjectives, sorted({*nouns, *adjectives, *verbs}))


class _Growing:
    """The first elements of an iterator, each made once."""

    def __init__(self, elements: Iterator[str]):
        self._elements, self._made = elements, list[str]()

    def first(self, n: int) -> list[str]:
        self._made += islice(self._elements, max(0, n - len(self._made)))
        return self._made[:n]


def _different(rng: Random, kind: str, taken: Sequence[str] = ()) -> Iterator[str]:
    """Keys or values without end, no two alike and none of ``taken``."""
    draw = {
        "words": lambda: _words().pair(rng),
        "numbers": lambda: str(rng.randint(1_000_000, 9_999_999)),
        "uuids": lambda: str(uuid.UUID(int=rng.getrandbits(128), version=4)),
    }
    return _distinct(draw[kind], taken)


def _distinct(draw: Callable[[], str], taken: Sequence[str] = ()) -> Iterator[str]:
    seen = set(taken)
    while True:
        if (drawn := draw()) not in seen:
            seen.add(drawn)
            yield drawn


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))
