"""task=jsonl: prompts from the rows of a user's file, the question, the metrics, and what is refused."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from byte_tokenizer import byte_tokenizer, with_chat_template
from local_model import kvbench, save_local_model
from omegaconf import OmegaConf
from records import accuracy

from kvbench.analysis.load import longbench_rows
from kvbench.conf.errors import InputError
from kvbench.runners.config.arguments import quote_texts
from kvbench.tasks.base import question_length
from kvbench.tasks.jsonl import JsonlTask, choice_of, exact_match

PROMPT = "Read.\n\n{context}\n\nQuestion: {question}\nAnswer:"


def row(number: int = 0, **changes: Any) -> dict[str, Any]:
    return {"context": f"text {number}", "question": f"What is {number}?", "answer": f"number {number}"} | changes


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    return path


def task_of(folder: Path, rows: list[Any], **settings: Any) -> JsonlTask:
    return JsonlTask(**{"path": str(write(folder / "mine.jsonl", rows)), "prompt": PROMPT, **settings})


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_a_row_becomes_a_prompt(tmp_path: Path) -> None:
    rows = [row(0, context="a {brace} $x \u2028"), row(1, answer=["one", 1])]
    first, second = task_of(tmp_path, rows, stop=["\n"], chat=False, max_new_tokens=7).examples()
    assert first.prompt == "Read.\n\na {brace} $x \u2028\n\nQuestion: What is 0?\nAnswer:"
    assert (first.dataset, first.id, first.answers) == ("mine", "line-1", ("number 0",))
    assert (first.max_new_tokens, first.stop_strings, first.chat, first.meta) == (7, ("\n",), False, {"row": 0})
    assert (second.id, second.answers) == ("line-2", ("one", "1"))


def test_a_template_reaches_items_and_writes_numbers_and_braces(tmp_path: Path) -> None:
    one = row(choices=["red", 2.5], article={"text": "long"}, **{"a.b": "dotted"})
    (example,) = task_of(
        tmp_path, [one], prompt="{{{article.text}}} {choices.0} {choices.1} {a.b} {question}"
    ).examples()
    assert example.prompt == "{long} red 2.5 dotted What is 0?"


@pytest.mark.parametrize(
    ("prompt", "question"),
    [
        (PROMPT, "\n\nQuestion: What is 0?\nAnswer:"),
        ("{context}{question}", "What is 0?"),
        ("{context} Q: {question} {context} {question}", " Q: What is 0? text 0 What is 0?"),
        ("{question} {context}", ""),
        ("{context}", ""),
    ],
)
def test_the_question_is_the_prompt_from_its_field_on(tmp_path: Path, prompt: str, question: str) -> None:
    task = task_of(tmp_path, [row()], prompt=prompt)
    (example,) = task.examples()
    assert example.question == question
    assert example.prompt.endswith(question)
    if question:
        task.require_question()
        tokenizer = with_chat_template(byte_tokenizer())
        ids = task.encode(example, tokenizer, None)
        count = question_length(ids, example.question, tokenizer)
        assert tokenizer.decode(ids[-count:]).split() == f"{question}[assistant]".split()
    else:
        with pytest.raises(InputError, match=r"task\.prompt=.* must have \{question\} behind the field of a context"):
            task.require_question()


def test_a_long_prompt_is_refused_or_loses_its_middle(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    rows = [row(context="word " * 100)]
    task = task_of(tmp_path, rows, max_length=300)
    with pytest.raises(
        InputError, match=r"task\.truncate=none: mine/line-1 has 5\d\d prompt tokens and the limit is 3"
    ):
        task.encode(task.examples()[0], tokenizer, None)
    task = task_of(tmp_path, rows, max_length=300, truncate="middle")
    ids = task.encode(task.examples()[0], tokenizer, 400)
    assert len(ids) == 300 and tokenizer.decode(ids).endswith("Question: What is 0?\nAnswer:")
    assert len(task.encode(task.examples()[0], tokenizer, 200)) == 200, "the smaller limit holds"


# --- the file and its names -------------------------------------------------------------------------------------------


def test_data_has_the_name_and_the_hash_of_its_file(tmp_path: Path) -> None:
    task = task_of(tmp_path, [row()])
    content = (tmp_path / "mine.jsonl").read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    assert (task.source().name, task.source().sha256) == (f"mine-{sha256[:6]}", {"mine.jsonl": sha256})
    assert task.identity()["sha256"] == {"mine.jsonl": sha256}
    assert task.identity()["source"] == f"mine-{sha256[:6]}"
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.jsonl.gz").write_bytes(gzip.compress(content))
    packed = JsonlTask(path=str(tmp_path / "b" / "mine.jsonl.gz"), prompt=PROMPT)
    assert packed.identity() == task.identity(), "neither folder nor compression decides anything"
    assert packed.examples() == task.examples()
    for change in ({"label": "own"}, {"prompt": "{question}"}, {"metric": "rouge"}, {"limit": 1}):
        assert task_of(tmp_path, [row()], **change).identity() != task.identity()
    assert task_of(tmp_path, [row()], label="own").source().name == f"own-{sha256[:6]}"
    assert task_of(tmp_path, [row(1)]).identity() != task.identity()


def test_a_name_is_that_of_a_folder(tmp_path: Path) -> None:
    path = write(tmp_path / ".my rows (v2).jsonl", [row()])
    assert JsonlTask(path=str(path), prompt=PROMPT).source().name.startswith("my-rows-v2-")


def test_rows_have_data_sets_and_a_limit_for_each(tmp_path: Path) -> None:
    rows = [row(i, topic="ab"[i % 2]) for i in range(6)]
    examples = task_of(tmp_path, rows, dataset="topic", limit=2).examples()
    assert [(e.dataset, e.id) for e in examples] == [(d, f"line-{n}") for n, d in enumerate("abab", start=1)]


def test_empty_lines_and_a_byte_order_mark_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(row()).encode() + b"\r\n\r\n" + json.dumps(row(1)).encode())
    assert [e.id for e in JsonlTask(path=str(path), prompt=PROMPT).examples()] == ["line-1", "line-3"]


def test_a_name_like_a_part_of_longbench_is_not_taken_for_it() -> None:
    """The notes of a table are told by the task's class: a file may be called anything."""
    for name, rows in (("longbench-subset", "subset"), ("longbench-mini", "mini"), ("longbench", None)):
        record = accuracy("full", None, 20.0, name)
        assert longbench_rows(record) == rows
        record["identity"]["task"]["class"] = "JsonlTask"
        assert longbench_rows(record) is None


# --- metrics ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "answers", "prediction", "score"),
    [
        ("f1", ["red house"], "The red dog.", 0.5),
        ("f1", ["blue", "red dog"], "the Red Dog!", 1.0),
        ("exact", ["the red dog"], " Red  dog.", 1.0),
        ("exact", ["red dog"], "a red dog barks", 0.0),
        ("exact", ["red dog"], "", 0.0),
        ("contains", ["Red  dog"], "I saw the red dog.", 1.0),
        ("contains", ["12"], "It is 123", 0.0),
        ("rouge", ["a b c"], "a b c", pytest.approx(1, abs=1e-6)),
        ("rouge", ["a b c"], "", 0.0),
        ("choice", ["B"], "The answer is (B).", 1.0),
        ("choice", ["B", "C"], "C", 1.0),
        ("choice", ["B"], "A or B", 0.0),
    ],
)
def test_scores(tmp_path: Path, metric: str, answers: list[str], prediction: str, score: float) -> None:
    task = task_of(tmp_path, [row(answer=answers)], metric=metric)
    (example,) = task.examples()
    assert task.score(example, prediction) == score
    assert task.judge(example, prediction, None, None)["score"] == score


REPLIES = [
    ("B", "B"),
    (" (B) ", "B"),
    ("B.", "B"),
    ("B) the second", "B"),
    ("B because of that", "B"),
    ("The answer is (C).", "C"),
    ("The correct answer is **C**.", "C"),
    ("the answer is A because", "A"),
    ("Answer: D", "D"),
    ("B. The answer is (C)", "C"),
    ("I think about it.\n(B) fits.", "B"),
    ("A dog", None),
    ("I do not know", None),
    ("Paris", None),
    ("The answer is Paris", None),
    ("b", None),
    ("", None),
]


@pytest.mark.parametrize(("reply", "letter"), REPLIES)
def test_the_letter_of_a_reply(reply: str, letter: str | None) -> None:
    assert choice_of(reply) == letter


def test_the_letter_is_kept(tmp_path: Path) -> None:
    task = task_of(tmp_path, [row(answer="B")], metric="choice")
    assert task.judge(task.examples()[0], "I do not know", None, None) == {"score": 0.0, "choice": None}


def test_nothing_is_never_an_exact_match() -> None:
    """An article alone is normalised to no words, as an empty prediction is."""
    assert exact_match("", "the") == exact_match("", "") == 0.0


# --- input that cannot be used ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "settings", "expected"),
    [
        ([], {}, "task.path={path}: must hold at least one row"),
        ([row(), {"context": "c"}], {}, "task.prompt=question: mine.jsonl:2 has no such field; it has context"),
        ([row()], {"prompt": "{contxt}"}, "has no such field; it has context, question, answer; did you mean context?"),
        ([row()], {"answer": "answers"}, "task.answer=answers: mine.jsonl:1 has no such field; it has context"),
        ([row()], {"dataset": "set"}, "task.dataset=set: mine.jsonl:1 has no such field"),
        ([row(), row(answer="")], {}, "task.answer=answer: mine.jsonl:2 has no answer there"),
        ([row(answer=[])], {}, "mine.jsonl:1 has no answer there"),
        ([row(answer=["x", " "])], {}, "mine.jsonl:1 has no answer there"),
        ([row(answer=None)], {}, "must be text or a number, and mine.jsonl:1 has there null"),
        ([row(context=["a"])], {}, "mine.jsonl:1 has there a list: use context.0"),
        ([row(context={"a": 1})], {}, "mine.jsonl:1 has there an object: use context.KEY"),
        ([row(answer="the")], {"metric": "exact"}, "mine.jsonl:1 answer=the: must have a word beside the articles"),
        ([row(answer="(B)")], {"metric": "choice"}, "mine.jsonl:1 answer=(B): must be one letter, A to Z"),
        ([[1]], {}, "mine.jsonl:1=[1]: must be a JSON object"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path: Path, rows: list[Any], settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError) as error:
        task_of(tmp_path, rows, **settings).examples()
    assert expected.format(path=tmp_path / "mine.jsonl") in str(error.value)


def test_rows_beyond_the_limit_are_checked_too(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"mine\.jsonl:2 has no such field"):
        task_of(tmp_path, [row(), {"context": "c"}], limit=1).examples()


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(row()) + "\n{'context': 1}\n")
    with pytest.raises(InputError, match=r"mine\.jsonl:2=\{'context': 1\}: not a line of JSON"):
        JsonlTask(path=str(path), prompt=PROMPT).examples()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"path": "gone.jsonl"}, "task.path=gone.jsonl: must be a .jsonl or .jsonl.gz file; there is no such file"),
        ({"path": "/"}, "it is a folder"),
        ({"prompt": "{context"}, "expected '}' before end of string"),
        ({"prompt": '{"a": 1}'}, "braces of the text are written {{ and }}"),
        ({"prompt": "{}"}, "a field is {name} and nothing else"),
        ({"prompt": "{context!r}"}, "a field is {name} and nothing else"),
        ({"prompt": "no field"}, "must name a field of the rows, as in {context}"),
        ({"metric": "f2"}, "task.metric=f2: must be one of choice, contains, exact, f1, rouge; did you mean f1?"),
        ({"truncate": "end"}, "task.truncate=end: must be one of middle, none"),
        ({"limit": 0}, "task.limit=0: must be a whole number >= 1, or null"),
        ({"max_new_tokens": 0}, "task.max_new_tokens=0"),
        ({"max_length": 1}, "task.max_length=1"),
        ({"label": "../x"}, "task.label=../x"),
        ({"stop": [""]}, "task.stop=[]: must be a list, each a text that is not empty, or null"),
    ],
)
def test_settings_that_cannot_be_used(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError) as error:
        JsonlTask(**{"path": "mine.jsonl", "prompt": PROMPT, **settings}).examples()
    assert expected in str(error.value)


def test_lists_may_be_given_as_hydra_gives_them() -> None:
    assert JsonlTask("a", "{b}", stop=OmegaConf.create(["x"])) == JsonlTask("a", "{b}", stop="x")  # type: ignore[arg-type]


# --- the command line -------------------------------------------------------------------------------------------------


def test_a_prompt_needs_no_quotes_of_hydras() -> None:
    assert quote_texts(["task.prompt={a}, {b}\\nc", "task.path={a}"]) == ['task.prompt="{a}, {b}\nc"', "task.path={a}"]
    assert quote_texts(["+task.prompt='{a}\\n'"]) == ["+task.prompt='{a}\n'"], "quotes that are there stay"
    assert quote_texts(['task.prompt=say "{a}"']) == ['task.prompt="say \\"{a}\\""']


def test_errors_end_the_command_with_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_local_model(tmp_path / "model")
    write(tmp_path / "mine.jsonl", [row()])
    monkeypatch.chdir(tmp_path)
    command = ("run", "model=local", f"model.path={model}", "task=jsonl", "method=full")
    for further, expected in (
        (("task.prompt={context}{question}",), "error: task.path=???: must be given on the command line"),
        (("task.path=gone.jsonl", "task.prompt={context}"), "error: task.path=gone.jsonl: must be a .jsonl"),
        (("task.path=mine.jsonl", "task.prompt={text}"), "error: task.prompt=text: mine.jsonl:1 has no such field"),
        (
            ("task.path=mine.jsonl", "task.prompt={context}", "runner.question=after_compression"),
            "error: task.prompt={context}: must have {question} behind the field of a context",
        ),
    ):
        done = kvbench(*command, *further)
        assert done.returncode == 2, done.stderr
        assert done.stderr.splitlines()[-1].startswith(expected), done.stderr


def test_the_help_shows_the_task() -> None:
    assert re.search(r"^  jsonl +Your own data: a JSON-lines file", kvbench("run", "--help").stdout, re.M)
