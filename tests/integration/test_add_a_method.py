"""docs/how-to/add_a_method.md, followed to the letter in a folder of one's own."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from local_model import kvbench, save_local_model, save_rows

from kvbench.methods.policies.ranking import RULE

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "how-to" / "add_a_method.md").read_text(encoding="utf-8")
PARTS = {"scorer": "value_weighted", "allocator": "lower_half", "schedule": "every_sentence", "storage": "rounded"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.S)


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """The page's files: a Python file and a YAML for each part, and a method's YAML."""
    config = tmp_path / "conf_of_mine" / "method"
    yamls = blocks("yaml")
    method = yamls.pop(1)
    for (group, name), code, text in zip(PARTS.items(), blocks("python")[:-1], yamls, strict=True):
        (config / group).mkdir(parents=True)
        (tmp_path / f"{name}.py").write_text(code)
        (config / group / f"{name}.yaml").write_text(text)
    (config / "value_weighted.yaml").write_text(method)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in PARTS.values():
        sys.modules.pop(name, None)


def test_the_page_gives_parts_that_run_and_combine(own_folder):
    model = save_local_model(own_folder / "model")
    save_rows(own_folder / "data", "qasper", 3, words=60)
    (command,) = re.findall(r"^PYTHONPATH=\. kvbench (.*)$", PAGE, re.M)
    local = (f"model.path={model}", "model.max_prompt_tokens=700", f"task.data_dir={own_folder / 'data'}")
    command = [*command.replace("256", "64").split(), "model=local", *local, "results_dir=results"]
    done = kvbench(*command)
    assert done.returncode == 0, done.stderr
    (ours,) = [r for r in records("results") if r["method"] == "value_weighted"]
    scored = {"class": "ValueWeighted", "budget": 64, "window": 8, "ties": RULE}
    assert ours["identity"]["method"]["selection"] == scored
    assert ours["bytes"]["kv_bytes_stored"] == ours["bytes"]["kv_bytes_formula"]
    assert ours["paired"]["with"] == "full"
    chosen = [f"method/{group}={name}" for group, name in PARTS.items() if group in ("allocator", "schedule")]
    done = kvbench(
        *[a.replace("method=value_weighted", "method=snapkv") for a in command], *chosen, "method/scorer=key_norm"
    )
    assert done.returncode == 0, done.stderr
    (ours,) = [r for r in records("results") if r["method"] == "snapkv"]
    selection = ours["identity"]["method"]["selection"]
    assert selection["allocator"] == {"class": "lower_half"} and selection["schedule"] == {"class": "every_sentence"}
    done = kvbench(*[a.replace("method=value_weighted", "method=full") for a in command], "method/storage=rounded")
    assert done.returncode == 0, done.stderr
    assert "Rounded" in [r["identity"]["method"]["storage"]["class"] for r in records("results")]


def test_the_page_s_test_of_its_scorer_passes(own_folder):
    names: dict[str, Any] = {}
    exec(blocks("python")[-1], names)
    (test,) = [value for name, value in names.items() if name.startswith("test_")]
    for seed in range(3):
        torch.manual_seed(seed)
        test()


def records(folder: str) -> list[dict]:
    return [json.loads(p.read_text()) for p in Path(folder).rglob("record.json")]


def test_what_the_page_points_to_is_there():
    root = Path(__file__).resolve().parents[2]
    for path in re.findall(r"`((?:methods|tests|conf)/[\w./]*)`", PAGE):
        assert (root / path).exists(), path
    rows = re.findall(r"^\| a.*?`(methods/[\w/]+)`.*?`(\w+\.py)` \|$", PAGE, re.M)
    assert len(rows) == 6
    for folder, example in rows:
        assert (root / folder / example).is_file(), example
