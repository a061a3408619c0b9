"""task=longbench_v2: the official prompts, truncation, answers and averages, and what is refused."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from byte_tokenizer import byte_tokenizer, with_chat_template
from fake_hub import FakeHub
from local_model import Done, kvbench, save_local_model
from omegaconf import OmegaConf

from kvbench.conf.errors import InputError
from kvbench.tasks import longbench_v2
from kvbench.tasks.base import question_length
from kvbench.tasks.longbench import truncate_middle
from kvbench.tasks.longbench_v2 import DOMAINS, NO_CONTEXT_PROMPT, PROMPT, LongBenchV2, answer_of, without_middle

YAML = Path(__file__).parents[2] / "conf" / "task" / "longbench_v2.yaml"


def row(number: int = 0, domain: str = "single_document_qa", **changes: Any) -> dict[str, Any]:
    """A question in the official schema."""
    values = {
        "_id": f"id-{number}",
        "domain": DOMAINS[domain][0],
        "sub_domain": "Academic",
        "difficulty": ("easy", "hard")[number % 2],
        "length": ("short", "medium", "long")[number % 3],
        "question": f" Which number is {number}?\n",
        **{f"choice_{letter}": f"{letter.lower()}{number} " for letter in "ABCD"},
        "answer": "ABCD"[number % 4],
        "context": f"\n  Text {number}. " + " ".join(f"w{number}-{j}" for j in range(20)) + "\n",
    }
    return values | changes


def write(path: Path, rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return path


def mixed() -> list[dict[str, Any]]:
    """Two questions of each domain, in an order of their own."""
    return [row(i, list(DOMAINS)[i % 6]) for i in range(12)]


def full() -> list[dict[str, Any]]:
    """As many of each domain as the official file has."""
    domains = [name for name, (_, count) in DOMAINS.items() for _ in range(count)]
    return [row(i, domain) for i, domain in enumerate(domains)]


def one(tmp_path: Path, settings: dict[str, Any] | None = None, **changes: Any) -> tuple[LongBenchV2, Any]:
    """The task over a file of one question, and that question."""
    task = LongBenchV2(data_dir=str(write(tmp_path / "data.json", [row(**changes)])), **(settings or {}))
    return task, task.examples()[0]


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_the_templates_are_the_official_files_byte_for_byte() -> None:
    """prompts/0shot.txt and prompts/0shot_no_context.txt; no newline at their ends."""
    for text, sha256 in (
        (PROMPT, "68a162252bc9ff71d5d7abca3d69bb31aac3c35f832d657a2866f2018b8a6950"),
        (NO_CONTEXT_PROMPT, "125fb44183af01ffc623df19392b80a287db62af3e2a2805e5b2ff9c7b2bee30"),
    ):
        assert hashlib.sha256(text.encode()).hexdigest() == sha256


def test_the_domains_are_the_papers() -> None:
    assert sum(count for _, count in DOMAINS.values()) == 503
    assert len(DOMAINS) == len({name for name, _ in DOMAINS.values()}) == 6


def test_a_row_becomes_the_official_prompt(tmp_path: Path) -> None:
    _, example = one(tmp_path, number=6)
    assert example.prompt == (
        "Please read the following text and answer the question below.\n\n"
        "<text>\nText 6. " + " ".join(f"w6-{j}" for j in range(20)) + "\n</text>\n\n"
        "What is the correct answer to this question: Which number is 6?\n"
        "Choices:\n(A) a6\n(B) b6\n(C) c6\n(D) d6\n\n"
        'Format your response as follows: "The correct answer is (insert answer here)".'
    )
    assert (example.dataset, example.id, example.answers) == ("single_document_qa", "id-6", ("C",))
    assert (example.max_new_tokens, example.stop_strings, example.min_new_tokens, example.chat) == (128, (), 0, True)
    assert example.meta == {"row": 0, "length": "short", "difficulty": "easy", "sub_domain": "Academic"}


def test_the_question_is_all_that_stands_behind_the_context(tmp_path: Path) -> None:
    _, example = one(tmp_path)
    context, question = example.prompt.split("w0-19")
    assert question == example.question
    assert question.startswith("\n</text>\n\nWhat is the correct answer")
    assert context.endswith("w0-18 ")


def test_places_are_filled_one_after_the_other_as_officially(tmp_path: Path) -> None:
    """A paper's LaTeX may hold $Q$, which the official code replaces too; the prompts must be the same to the token."""
    _, example = one(tmp_path, context="Let $Q$ be in $DOC$ and $C_B$.", question="Is $C_A$ in $Q$?", choice_A="$C_D$")
    assert "<text>\nLet Is d0 in $Q$? be in $DOC$ and b0.\n</text>" in example.prompt
    assert "this question: Is d0 in $Q$?\nChoices:\n(A) d0\n(B) b0" in example.prompt
    assert example.prompt.endswith(example.question)
    assert example.question.startswith("\n</text>")


def test_braces_and_odd_characters_stay_as_they_are(tmp_path: Path) -> None:
    _, example = one(tmp_path, context="int main() { return {0}; } \u2028 \x85 %s \\1")
    assert "<text>\nint main() { return {0}; } \u2028 \x85 %s \\1\n</text>" in example.prompt


def test_without_a_context_the_prompt_is_the_official_one_for_that(tmp_path: Path) -> None:
    task, example = one(tmp_path, {"no_context": True})
    assert example.prompt == (
        "What is the correct answer to this question: Which number is 0?\n"
        "Choices:\n(A) a0\n(B) b0\n(C) c0\n(D) d0\n\n"
        "What is the single, most likely answer choice? Format your response as follows: "
        '"The correct answer is (insert answer here)".'
    )
    assert example.question == "", "there is no context in front of it"
    assert task.source().name == "longbench_v2-subset-no-context"


# --- tokens -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture
def chat_tokenizer(tokenizer: Any) -> Any:
    return with_chat_template(tokenizer)


def official_ids(question: dict[str, Any], tokenizer: Any, limit: int) -> list[int]:
    """What a server is given to read by the official steps: fill in, encode, cut, decode, chat template."""
    text = PROMPT.replace("$DOC$", question["context"].strip()).replace("$Q$", question["question"].strip())
    for letter in "ABCD":
        text = text.replace(f"$C_{letter}$", question[f"choice_{letter}"].strip())
    ids = tokenizer.encode(text)
    if len(ids) > limit:
        text = tokenizer.decode(ids[: limit // 2] + ids[-limit // 2 :], skip_special_tokens=True)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    return tokenizer.encode(chat, add_special_tokens=False)


@pytest.mark.parametrize("limit", [2, 3, 100, 101, 300, 301, 479, 480, 481, 10_000])
def test_the_token_ids_are_the_official_ones(tmp_path: Path, chat_tokenizer: Any, limit: int) -> None:
    """At every kind of limit, on a text with characters of 2, 3 and 4 bytes at the seam."""
    text = "Größe € 𝔘 " * 12
    task, example = one(tmp_path, context=text)
    assert task.encode(example, chat_tokenizer, limit) == official_ids(row(context=text), chat_tokenizer, limit)


def test_a_long_prompt_loses_its_middle(tmp_path: Path, tokenizer: Any) -> None:
    ids = tokenizer("abcdefghijklmnopqrstuvwxyz").input_ids
    assert len(ids) == 27, "<s> and 26 letters"
    assert without_middle(ids, tokenizer, 10) == "abcdvwxyz", "<s> is one of the first five, and not in the text"
    assert without_middle(ids, tokenizer, 11) == "abcduvwxyz", "an odd limit gives its odd token to the end"
    task, example = one(tmp_path)
    whole = task.encode(example, tokenizer, None)
    assert task.encode(example, tokenizer, len(whole)) == whole, "just as long as allowed: untouched"
    assert len(task.encode(example, tokenizer, len(whole) - 1)) == len(whole) - 1


def test_the_ends_are_decoded_as_one_text(tokenizer: Any) -> None:
    """LongBench v1 decodes them one by one; with its function a character at the seam would be two broken ones."""
    ids = tokenizer("aé" + "-" * 10 + "éz").input_ids[1:]
    assert without_middle(ids, tokenizer, 4) == "aéz"
    assert truncate_middle(ids, tokenizer, 4) == "a\ufffd\ufffdz"


def test_the_smaller_of_the_two_limits_holds(tmp_path: Path, tokenizer: Any) -> None:
    task, example = one(tmp_path, {"max_length": 50})
    assert len(task.encode(example, tokenizer, None)) == len(task.encode(example, tokenizer, 200)) == 50
    assert len(task.encode(example, tokenizer, 20)) == 20


def test_the_chat_template_is_used_unless_told_otherwise(tmp_path: Path, tokenizer: Any, chat_tokenizer: Any) -> None:
    task, example = one(tmp_path)
    ids = task.encode(example, chat_tokenizer, None)
    assert chat_tokenizer.decode(ids) == f"<s>[user]{example.prompt}[assistant]"
    assert ids.count(chat_tokenizer.bos_token_id) == 1
    assert tokenizer.decode(task.encode(example, tokenizer, None)) == f"<s>{example.prompt}", "a base model"
    task, example = one(tmp_path, {"chat": False})
    assert chat_tokenizer.decode(task.encode(example, chat_tokenizer, None)) == f"<s>{example.prompt}"


def test_the_question_is_found_at_the_end_of_a_truncated_prompt(tmp_path: Path, chat_tokenizer: Any) -> None:
    task, example = one(tmp_path, context="word " * 500)
    ids = task.encode(example, chat_tokenizer, 800)
    count = question_length(ids, example.question, chat_tokenizer)
    assert chat_tokenizer.decode(ids[-count:]).strip() == example.question.strip() + "[assistant]"


# --- answers ----------------------------------------------------------------------------------------------------------

REPLIES = [
    ("The correct answer is (B).", "B"),
    ("The correct answer is B", "B"),
    ("The correct answer is B) because", "B"),
    ("\n  The correct answer is (D)  \n", "D"),
    ("**The correct answer is (C)**", "C"),
    ("The correct answer is **C**.", "C"),
    ("The correct answer is *(*A*)*", "A"),
    ('"The correct answer is (A)".', "A"),
    ("Let me think. The correct answer is (C). The text says so.", "C"),
    # The first of several, and brackets before a bare letter wherever they stand.
    ("The correct answer is (A). No: The correct answer is (B).", "A"),
    ("The correct answer is A. No: The correct answer is (B).", "B"),
    ("The correct answer is not (A). The correct answer is D", "D"),
    # The official patterns look no further than the letter.
    ("The correct answer is Definitely not this", "D"),
    ("The correct answer is (A", None),
    ("The correct answer is (AB)", None),
    ("The correct answer is AB", "A"),
    ("The correct answer is A or B", "A"),
    # Not the official words.
    ("", None),
    ("   \n", None),
    ("***", None),
    ("B", None),
    ("(B)", None),
    ("Answer: B", None),
    ("The answer is (B)", None),
    ("the correct answer is (B)", None),
    ("The Correct Answer Is (B)", None),
    ("The correct answer is: (B)", None),
    ("The correct answer is  (B)", None),
    ("The correct answer is\n(B)", None),
    ("The correct answer is (b)", None),
    ("The correct answer is ( B )", None),
    ("The correct answer is [B]", None),
    ("The correct answer is `B`", None),
    ("The correct answer is (E)", None),
    ("The correct answer is E", None),
    ("The correct answer is (Ａ)", None),
    ("The correct answer is (insert answer here)", None),
    ("The correct answer to this question is (B)", None),
    ("The correct answer is\u00a0(B)", None),
]


@pytest.mark.parametrize(("reply", "letter"), REPLIES)
def test_what_a_reply_answers(reply: str, letter: str | None) -> None:
    assert answer_of(reply) == letter


def test_a_reply_is_right_or_wrong(tmp_path: Path) -> None:
    task, example = one(tmp_path, answer="B")
    assert task.score(example, "The correct answer is (B).") == 1.0
    assert task.score(example, "The correct answer is (A).") == 0.0
    assert task.score(example, "") == 0.0, "an empty reply is wrong, and is not left out"
    assert task.judge(example, "The correct answer is C", None, None) == {"score": 0.0, "choice": "C"}
    assert task.judge(example, "I cannot say.", None, None) == {"score": 0.0, "choice": None}


# --- averages ---------------------------------------------------------------------------------------------------------


def conclusion(tmp_path: Path, rows: list[dict[str, Any]], reply: Callable[[Any], str]) -> dict[str, Any]:
    task = LongBenchV2(data_dir=str(write(tmp_path / "data.json", rows)))
    judged = [task.judge(example, reply(example), None, None) for example in task.examples()]
    record, files = task.conclude(judged)
    assert files == {}
    return record


def test_the_averages_are_over_questions_as_in_the_official_code(tmp_path: Path) -> None:
    """Not over domains: 175 questions of one domain weigh more than 33 of another."""
    rows = full()
    right = {r["_id"] for i, r in enumerate(rows) if i % 5 < 2 or r["domain"].startswith("Single")}

    def reply(example: Any) -> str:
        return f"The correct answer is ({example.answers[0]})" if example.id in right else "I do not know."

    record = conclusion(tmp_path, rows, reply)
    parts = {
        "overall": rows,
        "easy": [r for r in rows if r["difficulty"] == "easy"],
        "hard": [r for r in rows if r["difficulty"] != "easy"],
        "short": [r for r in rows if r["length"] == "short"],
        "medium": [r for r in rows if r["length"] == "medium"],
        "long": [r for r in rows if r["length"] not in ("short", "medium")],
    }
    assert list(record["averages"]) == list(parts), "the order of the official table"
    for part, those in parts.items():
        found = record["averages"][part]
        assert found["mean"] == pytest.approx(100 * sum(r["_id"] in right for r in those) / len(those))
        assert found["n"] == len(those)
    wrong = 503 - len(right)
    assert record["unanswered"]["n"] == wrong
    assert record["unanswered"]["compensated"] == pytest.approx(100 * (len(right) + 0.25 * wrong) / 503)


def test_an_empty_reply_counts_in_the_denominator(tmp_path: Path) -> None:
    record = conclusion(tmp_path, mixed(), lambda example: "" if example.id != "id-0" else "The correct answer is (A)")
    assert record["averages"]["overall"]["mean"] == pytest.approx(100 / 12)
    assert record["unanswered"] == {"n": 11, "compensated": pytest.approx(100 * (1 + 11 / 4) / 12)}


def test_a_wrong_letter_is_an_answer(tmp_path: Path) -> None:
    record = conclusion(tmp_path, mixed(), lambda example: "The correct answer is B")
    assert record["unanswered"]["n"] == 0
    assert record["unanswered"]["compensated"] == record["averages"]["overall"]["mean"] == pytest.approx(25)


def test_parts_without_questions_are_left_out(tmp_path: Path) -> None:
    record = conclusion(tmp_path, [row(0)], lambda example: "")
    assert list(record["averages"]) == ["overall", "easy", "short"]
    assert record["averages"]["overall"]["n"] == 1


@pytest.mark.parametrize(("n", "right"), [(503, 160), (60, 30), (12, 3), (9, 0), (9, 9), (1, 0)])
def test_the_interval_is_wilsons(n: int, right: int) -> None:
    found = longbench_v2._share([1.0] * right + [0.0] * (n - right))
    z, p = 1.959964, right / n
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    assert (found["low"], found["high"]) == pytest.approx((100 * (center - half), 100 * (center + half)), abs=1e-4)
    assert (found["mean"], found["n"], found["method"]) == (pytest.approx(100 * p), n, "wilson")


# --- which questions --------------------------------------------------------------------------------------------------


def test_questions_come_by_domain_and_keep_their_place_in_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "data.json", mixed())
    found = [(e.dataset, e.id, e.meta["row"]) for e in LongBenchV2(data_dir=str(path)).examples()]
    assert found == [(name, f"id-{i}", i) for k, name in enumerate(DOMAINS) for i in (k, k + 6)]
    chosen = LongBenchV2(data_dir=str(tmp_path), datasets=["structured_data", "multi_document_qa"])
    assert [e.id for e in chosen.examples()] == ["id-5", "id-11", "id-1", "id-7"], "the user's order; a folder will do"
    assert [e.id for e in LongBenchV2(data_dir=str(path), limit=1).examples()] == [f"id-{k}" for k in range(6)]
    short = LongBenchV2(data_dir=str(path), lengths=["short"], limit=1)
    assert {e.meta["length"] for e in short.examples()} == {"short"}
    assert [e.id for e in short.examples()] == ["id-0", "id-3"], (
        "the first of these lengths, domains without are left out"
    )


def test_a_selection_may_be_given_as_hydra_gives_it(tmp_path: Path) -> None:
    lists = LongBenchV2(datasets=OmegaConf.create(["code_repository"]), lengths=OmegaConf.create(["long", "short"]))
    texts = LongBenchV2(datasets="code_repository", lengths="short, long")
    assert lists == texts
    assert (texts.datasets, texts.lengths) == (("code_repository",), ("short", "long"))


def test_a_score_on_fewer_rows_is_never_called_longbench_v2(tmp_path: Path) -> None:
    path = str(write(tmp_path / "all" / "data.json", full()))
    rows = [r for r in full() if r["_id"] != "id-502"]  # one of structured_data is gone
    cut = str(write(tmp_path / "cut" / "data.json", rows))

    def name(path: str, **settings: Any) -> str:
        return LongBenchV2(data_dir=path, **settings).source().name

    assert name(path) == name(path, limit=175) == name(path, datasets=["code_repository"]) == "longbench_v2"
    assert name(path, lengths=["short"]) == name(path, lengths=["short"], limit=59) == "longbench_v2"
    assert name(path, limit=174) == name(path, lengths=["short"], limit=58) == "longbench_v2-subset"
    assert name(cut) == name(cut, lengths=["long"]) == "longbench_v2-subset"
    assert name(cut, datasets=["code_repository"]) == "longbench_v2", "all of that domain"
    assert name(path, no_context=True) == "longbench_v2-no-context"


def test_where_the_file_lies_decides_nothing(tmp_path: Path) -> None:
    here = LongBenchV2(data_dir=str(write(tmp_path / "a" / "data.json", mixed())))
    there = LongBenchV2(data_dir=str(write(tmp_path / "b" / "copy.json", mixed())))
    assert here.identity() == there.identity()
    assert here.source().revision is None
    sha256 = hashlib.sha256((tmp_path / "a" / "data.json").read_bytes()).hexdigest()
    assert here.source().sha256 == {"longbench_v2": sha256}
    for settings in ({"limit": 1}, {"lengths": ["long"]}, {"chat": False}, {"max_length": 99}, {"no_context": True}):
        assert LongBenchV2(data_dir=here.data_dir, **settings).identity() != here.identity()


# --- the hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeHub:
    file = write(tmp_path / "hub" / "data.json", full())
    monkeypatch.setattr(longbench_v2, "HUB_SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    return FakeHub(monkeypatch, file, "data.json", longbench_v2.HUB_REVISION)


def test_the_hubs_file_is_pinned(hub: FakeHub) -> None:
    """Without a pinned revision the same command scores other rows next year."""
    hub.reachable = ("THUDM/LongBench-v2",)
    task = LongBenchV2()
    source = task.source()
    assert (source.name, source.location) == ("longbench_v2", "THUDM/LongBench-v2/data.json")
    assert source.revision == "2b48e494f2c7a2f0af81aae178e05c7e1dde0fe9"
    assert len(task.examples()) == 503
    assert [what for what, _ in hub.calls] == ["probe", "download"], "fetched once, not once per call"
    assert f"/resolve/{source.revision}/data.json" in hub.calls[0][1]
    local = LongBenchV2(data_dir=str(hub.file))
    assert local.identity() == task.identity(), "the same file from a folder is the same run"
    assert local.source().revision == source.revision


def test_the_renamed_repository_is_tried_too(hub: FakeHub) -> None:
    hub.reachable = ("zai-org/LongBench-v2",)
    assert LongBenchV2().source().location == "zai-org/LongBench-v2/data.json"
    assert hub.calls[-1] == ("download", "zai-org/LongBench-v2")


def test_a_cached_file_needs_no_network(hub: FakeHub) -> None:
    hub.cached, hub.offline = ("zai-org/LongBench-v2",), True
    assert LongBenchV2().source().name == "longbench_v2"
    assert hub.calls == []


def test_other_bytes_are_refused(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.cached = ("THUDM/LongBench-v2",)
    monkeypatch.setattr(longbench_v2, "HUB_SHA256", "0" * 64)
    for content in (hub.file.read_bytes(), b"[{"):  # another file, and a download that was cut
        hub.file.write_bytes(content)
        assert_refused(lambda: LongBenchV2().source(), f"{hub.file}=", "the sha256 must be 000", "delete the file")


def test_no_hub_is_said_in_one_line(hub: FakeHub) -> None:
    assert_refused(
        lambda: LongBenchV2().source(),
        "task.data_dir=None: LongBench v2 (465 MB) cannot be fetched from the hub: ",
        "THUDM/LongBench-v2 (ConnectionError: Name or service not known) and zai-org/LongBench-v2 (ConnectionError",
        "give data.json as task.data_dir",
    )
    hub.offline, hub.calls = True, []
    assert_refused(lambda: LongBenchV2().source(), "not in the cache and HF_HUB_OFFLINE is set; give data.json")
    assert hub.calls == []
    hub.offline, hub.reachable = False, longbench_v2.HUB_REPOS
    hub.broken = longbench_v2.HUB_REPOS
    assert_refused(lambda: LongBenchV2().source(), "cannot be fetched", "No space left on device")
    hub.broken = longbench_v2.HUB_REPOS[:1]
    assert LongBenchV2().source().location.startswith(longbench_v2.HUB_REPOS[1])


# --- input that cannot be used ----------------------------------------------------------------------------------------


def assert_refused(do: Callable[[], Any], *expected: str) -> None:
    with pytest.raises(InputError) as error:
        do()
    text = str(error.value)
    assert "\n" not in text, "an error for the user is one line"
    assert len(text) < 500, text
    assert all(part in text for part in expected), text


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"limit": 0}, "task.limit=0: must be a whole number >= 1, or null"),
        ({"limit": 2.5}, "task.limit=2.5: must be a whole number >= 1, or null"),
        ({"limit": True}, "task.limit=true: must be a whole number >= 1, or null"),
        ({"max_length": 1}, "task.max_length=1: must be a whole number >= 2, or null"),
        ({"chat": "yes"}, "task.chat=yes: must be true or false"),
        ({"no_context": 1}, "task.no_context=1: must be true or false"),
        ({"datasets": ["code_repo"]}, "task.datasets=code_repo: must be one of code_repository, dialogue_history"),
        ({"datasets": ["code_repo"]}, "did you mean code_repository"),
        ({"datasets": []}, "task.datasets=[]: must be a list, each one of code_repository"),
        ({"datasets": ""}, "task.datasets=: must be one of"),
        ({"datasets": 3}, "task.datasets=3: must be a list, each one of code_repository"),
        ({"datasets": "code_repository,code_repository"}, "task.datasets=[code_repository,code_repository]: must be"),
        ({"lengths": ["8k"]}, "task.lengths=8k: must be one of long, medium, short"),
        ({"lengths": "shrt"}, "task.lengths=shrt: must be one of long, medium, short; did you mean short?"),
        ({"lengths": []}, "task.lengths=[]: must be a list, each one of long, medium, short"),
    ],
)
def test_a_value_that_cannot_be_used_is_refused_with_its_key(settings: dict[str, Any], expected: str) -> None:
    assert_refused(lambda: LongBenchV2(**settings), expected)


def test_questions_that_are_not_there(tmp_path: Path) -> None:
    data_dir = str(write(tmp_path / "data.json", [row(0), row(3)]))
    for settings, expected in (
        ({"datasets": ["code_repository"]}, f"task.datasets=code_repository: {data_dir} has no such question of code"),
        ({"lengths": ["long"]}, f"task.lengths=long: {data_dir} has no such question"),
        ({"lengths": ["short"], "datasets": ["dialogue_history"]}, "has no such question of dialogue_history"),
    ):
        assert_refused(lambda s=settings: LongBenchV2(data_dir=data_dir, **s).source(), expected)
    for missing in (tmp_path / "nope", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        expected = f"task.data_dir={missing}: must be LongBench v2's data.json or a folder that holds it"
        assert_refused(lambda m=missing: LongBenchV2(data_dir=str(m)).source(), expected)


GOOD = json.dumps([row()]).encode()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "data.json=damaged: must be JSON in UTF-8"),
        (GOOD[: len(GOOD) // 2], "data.json=damaged: must be JSON in UTF-8"),
        (b'["\xff\xfe"]', "data.json=damaged: must be JSON in UTF-8"),
        (b"[" * 100_000, "data.json=damaged: must be JSON in UTF-8"),
        (GOOD[1:-1] + b"\n" + GOOD[1:-1], "data.json=damaged: must be JSON in UTF-8: Extra data"),
        (b"[]", "data.json=rows: must be a JSON list of at least one question"),
        (GOOD[1:-1], "data.json=rows: must be a JSON list of at least one question"),
        (b"[1]", "data.json[0]=int: must be a JSON object"),
        (
            json.dumps([row() | {"question": "\udc00"}]).encode(),
            "data.json[0].question='\\udc00': has half of a character",
        ),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, content: bytes, expected: str) -> None:
    """A download that was cut must not become a smaller benchmark."""
    (tmp_path / "data.json").write_bytes(content)
    assert_refused(lambda: LongBenchV2(data_dir=str(tmp_path)).source(), expected)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"context": None}, "data.json[1].context=None: must be a string"),
        ({"choice_B": 4}, "data.json[1].choice_B=4: must be a string"),
        ({"question": ["x" * 999]}, "data.json[1].question=['xxx"),
        ({"domain": "Single-Doc QA"}, "data.json[1].domain=Single-Doc QA: must be one of Code Repository"),
        ({"domain": "Single-Doc QA"}, "did you mean Single-Document QA"),
        ({"difficulty": "Easy"}, "data.json[1].difficulty=Easy: must be one of easy, hard"),
        ({"length": "8k"}, "data.json[1].length=8k: must be one of long, medium, short"),
        ({"answer": "E"}, "data.json[1].answer=E: must be one of A, B, C, D"),
        ({"answer": ""}, "data.json[1].answer=: must be one of A, B, C, D"),
        ({"answer": "AB"}, "data.json[1].answer=AB: must be one of A, B, C, D"),
        ({"_id": ""}, "data.json[1]._id=: must be there once, not empty"),
        ({"_id": "id-0"}, "data.json[1]._id=id-0: must be there once, not empty"),
    ],
)
def test_a_row_that_cannot_be_used_is_refused_also_behind_the_limit(
    tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    write(tmp_path / "data.json", [row(0), row(6) | changes])
    assert_refused(lambda: LongBenchV2(data_dir=str(tmp_path), limit=1).source(), expected)


def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "data.json", [row()])

    def denied(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    assert_refused(lambda: LongBenchV2(data_dir=str(tmp_path)).source(), "data.json=unreadable: Permission denied")


def test_missing_fields_are_named(tmp_path: Path) -> None:
    write(tmp_path / "data.json", [{k: v for k, v in row().items() if k not in ("choice_C", "answer")}])
    expected = "data.json[0]=choice_C, answer: the row lacks these fields of LongBench v2"
    assert_refused(lambda: LongBenchV2(data_dir=str(tmp_path)).source(), expected)


# --- configuration ----------------------------------------------------------------------------------------------------


def test_the_yaml_has_every_key_and_explains_it() -> None:
    lines = YAML.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# LongBench v2")
    assert all(" # " in line for line in lines[2:] if not line.startswith("#"))
    config = OmegaConf.to_container(OmegaConf.load(YAML))
    assert isinstance(config, dict)
    assert config.pop("_target_") == "kvbench.tasks.longbench_v2.LongBenchV2"
    assert set(config) == {f.name for f in fields(LongBenchV2)}
    assert LongBenchV2(**config) == LongBenchV2(), "the YAML's defaults are the class's"


def test_the_task_imports_nothing_heavy() -> None:
    code = (
        "import sys, kvbench.tasks.longbench_v2\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'scipy', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# --- a run ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``model/`` (a token a byte, 1024 positions) and ``data.json``, whose last contexts are cut."""
    folder = tmp_path_factory.mktemp("longbench_v2")
    save_local_model(folder / "model")
    rows = [row(i, list(DOMAINS)[i % 3], context=f"Text {i}. " + f"word{i} " * 40 * (1 + i // 3)) for i in range(6)]
    write(folder / "data.json", rows)
    return folder


def run(world: Path, results: Path, *overrides: str, status: int = 0) -> Done:
    model = ("model=local", f"model.path={world / 'model'}", "model.max_prompt_tokens=700")
    data = ("task=longbench_v2", f"task.data_dir={world / 'data.json'}", "method=snapkv", "method.budget=40")
    done = kvbench("run", *model, *data, f"results_dir={results}", *overrides)
    assert done.returncode == status, done.stderr
    return done


def test_a_run_end_to_end(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights never say the official words, so here the answer is read off the reply in another way."""
    monkeypatch.setattr(longbench_v2, "answer_of", lambda reply: "ABC"[len(reply) % 3] if len(reply) % 7 else None)
    out = run(world, tmp_path).stdout
    records = {(r := json.loads(p.read_text()))["method_label"]: r for p in tmp_path.glob("*/*/*/*/record.json")}
    assert set(records) == {"full", "snapkv 40"}
    for label, record in records.items():
        (path,) = tmp_path.glob(f"*/*/{label.split()[0]}/*/samples.jsonl")
        samples = [json.loads(line) for line in path.read_text().splitlines()]
        assert record["task"] == "longbench_v2-subset"
        assert record["data"]["examples"] == dict.fromkeys(list(DOMAINS)[:3], 2)
        assert set(record["scores"]) == set(list(DOMAINS)[:3])
        lengths = [s["prompt_tokens"] for s in sorted(samples, key=lambda s: s["id"])]
        assert max(lengths[:3]) < 700 and lengths[3:] == [700, 700, 700]
        truth = {f"id-{i}": (("easy", "hard")[i % 2], "ABCD"[i % 4]) for i in range(6)}
        for part in ("easy", "hard"):
            those = [s for s in samples if truth[s["id"]][0] == part]
            right = sum(s["choice"] == truth[s["id"]][1] for s in those)
            assert record["averages"][part]["mean"] == pytest.approx(100 * right / 3)
        assert [s["length"] for s in sorted(samples, key=lambda s: s["id"])] == ["short", "medium", "long"] * 2
        assert record["averages"]["overall"]["mean"] == pytest.approx(100 * sum(s["score"] for s in samples) / 6)
        assert record["unanswered"]["n"] == sum(s["choice"] is None for s in samples)
    header = next(line for line in out.splitlines() if line.startswith("| method"))
    columns = [column.strip() for column in header.strip("|").split("|")]
    assert columns[1:8] == ["overall", "easy", "hard", "short", "medium", "long", "mean"]
    assert "already done" in run(world, tmp_path).stdout


def test_the_question_may_come_after_compression(world: Path, tmp_path: Path) -> None:
    """The context of a document that is asked about later; without a context there is nothing to compress before."""
    later = ("runner.question=after_compression", "task.limit=1", "task.datasets=[multi_document_qa]")
    run(world, tmp_path, *later)
    (record,) = tmp_path.glob("*/*/snapkv/*/record.json")
    assert json.loads(record.read_text())["task"] == "longbench_v2-subset-agnostic"
    done = run(world, tmp_path, *later, "task.no_context=true", status=2)
    assert "needs a prompt with a context and a question behind it" in done.stderr.splitlines()[-1]


def test_a_bad_value_ends_the_command_with_one_line(world: Path, tmp_path: Path) -> None:
    done = run(world, tmp_path, "task.lengths=[tiny]", status=2)
    assert "task.lengths=tiny: must be one of long, medium, short" in done.stderr.splitlines()[-1]
