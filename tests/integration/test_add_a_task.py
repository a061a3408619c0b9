"""docs/how-to/add_a_task.md, followed to the letter in a folder of one's own."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from local_model import Done, kvbench, save_local_model

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "how-to" / "add_a_task.md").read_text(encoding="utf-8")
MODULES = ("measured_number", "last_word")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.S)


COMMANDS = [
    shlex.split(command.replace("\\\n", " "))
    for command in re.findall(r"^((?:PYTHONPATH=\. )?kvbench run (?:.*\\\n)*.*)$", PAGE, re.M)
]


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The page's files, and a tiny model."""
    config = tmp_path / "conf_of_mine" / "task"
    config.mkdir(parents=True)
    (rows,) = blocks("json")
    (tmp_path / "animals.jsonl").write_text(rows)
    for name, code in zip(MODULES, blocks("python"), strict=True):
        (tmp_path / f"{name}.py").write_text(code)
    for name, text in zip(("animals", "last_word"), blocks("yaml"), strict=True):
        (config / f"{name}.yaml").write_text(text)
    save_local_model(tmp_path / "model")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in MODULES:
        sys.modules.pop(name, None)


def run(command: list[str]) -> Done:
    words = command[command.index("kvbench") + 1 :]
    local = ("model=local", "model.path=model", "model.max_prompt_tokens=700", "results_dir=results")
    done = kvbench(*words, *local)
    assert done.returncode == 0, done.stderr
    return done


def records() -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in Path("results").rglob("record.json")]


def test_the_commands_of_the_page_run(own_folder: Path) -> None:
    """A file without Python in both question modes, the same as a YAML, and a task in Python; all paired with full."""
    assert len(COMMANDS) == 5
    sha256 = hashlib.sha256((own_folder / "animals.jsonl").read_bytes()).hexdigest()
    name = f"animals-{sha256[:6]}"
    outputs = [run(command).stdout for command in COMMANDS]
    titles = (name, f"{name}-agnostic", name, f"{name}-agnostic", "last_word")
    for output, title in zip(outputs, titles, strict=True):
        assert re.search(rf"^\*\*{title} / \w+: {8 if title == 'last_word' else 3} examples", output, re.M), output
    made = records()
    assert len(made) == 10, "five commands, each of them with full"
    for record in made:
        assert ("paired" in record) == (record["method"] == "snapkv")
        assert not record["task"].startswith("longbench")
    animals = [record for record in made if record["task"].startswith("animals")]
    assert all(record["data"]["sha256"] == {"animals.jsonl": sha256} for record in animals)
    assert all(record["identity"]["task"]["sha256"] == {"animals.jsonl": sha256} for record in animals)
    assert sorted({tuple(record["scores"]) for record in animals}) == [("animals",), ("pets", "birds", "herds")]
    table = kvbench("table", "results").stdout
    assert set(re.findall(r"^\*\*(.*?) / ", table, re.M)) == set(titles)
    assert "LongBench" not in table


def test_a_yaml_with_the_target_alone_runs(own_folder: Path) -> None:
    text = blocks("yaml")[0]
    target = re.sub(r"defaults:.*?\n\n", "_target_: kvbench.tasks.jsonl.JsonlTask\n", text, flags=re.S)
    assert "defaults" not in target
    (own_folder / "conf_of_mine" / "task" / "animals.yaml").write_text(target)
    run([*COMMANDS[2], "+task.limit=1", "method=full"])
    (record,) = records()
    assert record["data"]["examples"] == {"pets": 1, "birds": 1, "herds": 1}


def test_a_subclass_has_a_metric_of_its_own(own_folder: Path) -> None:
    task_class = importlib.import_module("measured_number").MeasuredNumber
    (own_folder / "numbers.jsonl").write_text('{"question": "How far is it?", "answer": 40}\n')
    task = task_class(path="numbers.jsonl", prompt="{question}", tolerance=0.1)
    (example,) = task.examples()
    assert [task.score(example, reply) for reply in ("about 43 km", "45", "far")] == [1.0, 0.0, 0.0]
    assert task.identity()["class"] == "MeasuredNumber" and task.identity()["tolerance"] == 0.1


def test_what_the_page_points_to_is_there() -> None:
    for path in re.findall(r"`((?:tasks|tests|conf)/[\w./]*)`", PAGE):
        assert (ROOT / path).exists(), path
    keys = re.findall(r"^(\w+):", (ROOT / "conf/task/jsonl.yaml").read_text(), re.M)
    rows = re.findall(r"`task\.(\w+)`", "\n".join(re.findall(r"^\| `task\..*$", PAGE, re.M)))
    assert set(keys) - {"_target_"} == set(rows), "a row for each key"
