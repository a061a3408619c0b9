"""What every task must do, whatever it is: each YAML in conf/task goes through all of these.

A new task gets them for free. Settings that make a task short, or that its data needs, are a line of its YAML:
``# contract tests: limit=1``; ``none``, and why, for a task whose data only the hub has.
"""

from __future__ import annotations

import json
import re
from functools import cache as memoize
from importlib.resources import files
from pathlib import Path
from typing import Any

import hydra
import pytest
from byte_tokenizer import byte_tokenizer, with_chat_template
from hydra.utils import instantiate

from kvbench.runners.config.arguments import quote_texts
from kvbench.runners.config.checks import target_class
from kvbench.tasks.base import Continuations, Example, Task, question_length

ROOT = Path(__file__).resolve().parents[2]
YAMLS = sorted(p for p in files("kvbench.conf").joinpath("task").iterdir() if p.name.endswith(".yaml"))


def own_settings(text: str) -> list[str] | None:
    """Settings of a task in this suite; None for one that it leaves out."""
    found = re.search(r"^# contract tests: (.*)$", text, re.MULTILINE)
    settings = [] if found is None else found[1].split()
    return None if settings[:1] == ["none"] else settings


def is_task(text: str) -> bool:
    """Whether a YAML's class is a :class:`Task`; task=text is only trained on."""
    target = re.search(r"^_target_: (\S+)", text, re.MULTILINE)
    return target is None or issubclass(target_class(target[1], "task"), Task)


TEXTS = {path.name.removesuffix(".yaml"): path.read_text(encoding="utf-8") for path in YAMLS}
NAMES = [name for name, text in TEXTS.items() if is_task(text) and own_settings(text) is not None]


def new_task(name: str) -> Task:
    settings = quote_texts([f"task.{setting}" for setting in own_settings(TEXTS[name]) or []])
    with hydra.initialize_config_module("kvbench.conf", version_base="1.3"):
        task: Task = instantiate(hydra.compose("config", overrides=[f"task={name}", *settings]).task)
    return task


@memoize
def made(name: str) -> tuple[Task, tuple[Example, ...]]:
    task = new_task(name)
    return task, tuple(task.examples())


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def tokenizer_for(task: Any, chat: bool = False) -> Any:
    """One token a byte, or the tokenizer of the task's own vocabulary."""
    if hasattr(task, "new_tokenizer"):
        return task.new_tokenizer()
    return with_chat_template(byte_tokenizer()) if chat else byte_tokenizer()


@pytest.mark.parametrize("name", NAMES)
def test_examples_are_the_same_every_time_and_named_once(name: str) -> None:
    task, examples = made(name)
    assert examples == tuple(new_task(name).examples()) == tuple(task.examples())
    keys = [(example.dataset, example.id) for example in examples]
    assert len(keys) == len(set(keys)) > 0
    assert all(dataset and number for dataset, number in keys)


@pytest.mark.parametrize("name", NAMES)
def test_identity_is_plain_data_without_locations(name: str) -> None:
    task, _ = made(name)
    identity, again = task.identity(), new_task(name).identity()
    assert json.loads(json.dumps(identity)) == again, "one dictionary of JSON's types, the same every time"
    assert identity["class"] == type(task).id
    assert identity["source"] == task.source().name and identity["sha256"] == task.source().sha256
    assert identity.keys().isdisjoint(task.location_fields)
    assert set(task.chosen_by) <= identity.keys()
    assert all(re.fullmatch("[0-9a-f]{64}", value) for value in identity["sha256"].values())


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_every_example_is_token_ids(name: str, chat: bool) -> None:
    task, examples = made(name)
    tokenizer = tokenizer_for(task, chat)
    for example in examples:
        encoded = task.encode(example, tokenizer, None)
        assert encoded == task.encode(example, tokenizer, None)
        if isinstance(encoded[0], Continuations):
            assert all(one.context and one.asked for one in encoded)
        else:
            assert all(isinstance(token, int) and 0 <= token < len(tokenizer) for token in encoded)
            assert example.max_new_tokens > 0


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_shares_and_an_accepted_answer_scores(name: str) -> None:
    task, examples = made(name)
    if not task.writes:
        return
    for example in examples:
        assert 0 < max(task.score(example, answer) for answer in example.answers) <= 1
        assert 0 <= task.score(example, "") <= 1
        judged = task.judge(example, "", None, None)
        assert judged["score"] == task.score(example, "") and json.dumps(judged)


@pytest.mark.parametrize("name", NAMES)
def test_the_question_is_the_end_of_the_prompt(name: str) -> None:
    task, examples = made(name)
    tokenizer = tokenizer_for(task)
    if any(example.question for example in examples):
        task.require_question()
    for example in examples:
        if example.question:
            ids = task.encode(example, tokenizer, None)
            count = question_length(ids, example.question, tokenizer)
            assert 0 < count < len(ids)
            words = example.question.split()  # behind them may be the beginning of the reply
            assert tokenizer.decode(ids[-count:]).split()[: len(words)] == words
