"""docs/how-to/your_own.md: every command of its blocks, run on small files of the kinds that it names."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from local_model import kvbench, save_local_model, save_rows

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "how-to" / "your_own.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line)
    for block in re.findall(r"^```\n(.*?)^```", PAGE, re.M | re.S)
    for line in re.sub(r"\\\n\s*", " ", block).splitlines()
]
SMALL = {
    "longbench": [],
    "jsonl": ["task.max_new_tokens=4"],
    "perplexity": ["task.context=128", "task.chunk=32", "task.stretches=2"],
    "needle": ["task.lengths=[600]", "task.depths=2", "task.max_new_tokens=4"],
    "ruler": ["task.lengths=[900]", "task.limit=1"],
    "sharegpt": ["task.limit=2", "task.max_new_tokens=4"],
    "text": ["model.layers=2", "model.hidden_size=32", "model.heads=2", "model.head_dim=16", "runner.steps=2"],
}
"""Overrides that make the run of a task small enough for a model of 1024 positions."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and one file of each kind."""
    folder = tmp_path_factory.mktemp("own")
    save_local_model(folder / "my-model")
    save_rows(folder / "rows", "qasper", 2)
    row = {"context": "The cat sleeps on the roof. " * 3, "question": "Where?", "answer": "on the roof"}
    (folder / "questions.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "mine.txt").write_text(" ".join(f"The boat of man {i} is old." for i in range(400)))
    talks = [
        {
            "id": f"{i}",
            "conversations": [{"from": "human", "value": f"Tell me {i} things."}, {"from": "gpt", "value": "Yes."}],
        }
        for i in range(4)
    ]
    (folder / "talks.json").write_text(json.dumps(talks))
    (folder / "predictions").mkdir()
    scored = {"pred": "on the roof", "answers": ["on the roof"], "all_classes": None, "length": 9}
    (folder / "predictions" / "qasper.jsonl").write_text(json.dumps(scored) + "\n")
    (folder / "texts").mkdir()
    for name in ("a.txt", "b.txt"):
        (folder / "texts" / name).write_text((folder / "mine.txt").read_text() * 4)
    return folder


def test_the_page_has_a_command_for_each_kind() -> None:
    assert len(COMMANDS) == 11 and all(words[0] == "kvbench" for words in COMMANDS)


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words[1:])[-60:])
def test_a_command_of_the_page_runs(
    words: list[str], world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world)
    task = next((word.removeprefix("task=") for word in words if word.startswith("task=")), "longbench")
    small = [*SMALL[task], f"results_dir={tmp_path}"] if words[1] == "run" else []
    small += ["model.max_prompt_tokens=850"] if "model=local" in words else []
    done = kvbench(*words[1:], *small)
    assert done.returncode == 0, done.stderr
    if words[1] != "run":
        assert ("100.0" in done.stdout) if words[1] == "score" else ("my-model" in done.stdout)
        return
    records = [json.loads(path.read_text()) for path in tmp_path.rglob("record.json")]
    if "runner=train" not in words:
        assert {record["model"] for record in records} == {"my-model"}
        assert sum("paired" in record for record in records) == 1, "the method, paired with full"
        assert "next:   " in done.stdout
