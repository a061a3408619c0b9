"""docs/add_a_method.md, followed to the letter in a folder of one's own."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from local_model import kvbench, save_local_model, save_rows

from kvbench.methods.policies.ranking import RULE

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "add_a_method.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.S)
    return found


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    (tmp_path / "conf_of_mine" / "method").mkdir(parents=True)
    (tmp_path / "key_norm.py").write_text(block("python"))
    (tmp_path / "conf_of_mine" / "method" / "key_norm.yaml").write_text(block("yaml"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("key_norm", None)


def test_the_page_gives_a_method_that_runs(own_folder):
    model = save_local_model(own_folder / "model")
    save_rows(own_folder / "data", "qasper", 3, words=60)
    (command,) = re.findall(r"^PYTHONPATH=\. kvbench (.*)$", PAGE, re.M)
    local = (f"model.path={model}", "model.max_prompt_tokens=700", f"task.data_dir={own_folder / 'data'}")
    done = kvbench(*command.replace("256", "64").split(), "model=local", *local, "results_dir=results")
    assert done.returncode == 0, done.stderr
    records = [json.loads(p.read_text()) for p in Path("results").rglob("record.json")]
    ours = next(r for r in records if r["method"] == "key_norm")
    assert ours["identity"]["method"]["selection"] == {"class": "KeyNorm", "budget": 64, "window": 0, "ties": RULE}
    assert ours["bytes"]["kv_bytes_stored"] == ours["bytes"]["kv_bytes_formula"]
    assert ours["paired"]["with"] == "full"


def test_what_the_page_points_to_is_there():
    root = Path(__file__).resolve().parents[1]
    for path in re.findall(r"`((?:methods|tests|conf)/[\w./]*)`", PAGE):
        assert (root / path).exists(), path
