"""The closing table, made again from records alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvbench.runners.report import closing_table, main


def record(method: str, budget: int | None, mean: float, task: str = "longbench", seed: int = 0) -> dict:
    label = method if budget is None else f"{method} {budget}"
    estimate = {"mean": mean, "low": mean - 1, "high": mean + 1, "n": 40}
    selection = {"class": "Selection"} if budget is None else {"class": "SnapKV", "budget": budget}
    identity = {"name": method, "selection": selection, "storage": {"class": "Dense"}}
    made = {
        "schema": 1,
        "status": "done",
        "identity": {"task": {"name": task, "limit": None}, "seed": seed, "method": identity},
        "task": task,
        "model": "m",
        "method": method,
        "method_label": label,
        "budget": budget,
        "data": {"examples": {"qasper": 20, "lcc": 20}},
        "scores": {"qasper": estimate, "lcc": estimate},
        "average": estimate,
        "bytes": {"kv_bytes_stored": 2**20, "kv_ratio": 0.25},
    }
    if method != "full":
        made["paired"] = {"with": "full", "difference": {"mean": -2.0, "low": -3.0, "high": 0.5, "n": 40}}
    return made


def save(folder: Path, name: str, made: dict) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "record.json").write_text(json.dumps(made))


def test_the_table_holds_score_full_score_difference_and_bytes():
    text = closing_table([record("snapkv", 128, 20.0), record("full", None, 22.0)], ["a", "b"])
    line = next(line for line in text.splitlines() if line.startswith("snapkv 128"))
    expected = "snapkv 128  20.00  [19.00, 21.00]  22.00  -2.00  [-3.00, +0.50]  1.00  25.0 %"
    assert line.split() == expected.split()


def test_a_mini_score_is_named_as_one():
    assert "not LongBench scores" in closing_table([record("full", None, 1.0, task="longbench-mini")], ["a"])
    assert "not LongBench scores" not in closing_table([record("full", None, 1.0)], ["a"])


def test_runs_that_differ_in_more_than_the_method_stand_in_different_tables(tmp_path, capsys):
    save(tmp_path, "a", record("snapkv", 128, 20.0))
    save(tmp_path, "b", record("full", None, 22.0))
    save(tmp_path, "c", record("full", None, 99.0, seed=1))
    save(tmp_path, "d", record("full", None, 77.0, task="longbench-mini"))
    assert main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.count(": mean over 2 data sets") == 3
    snapkv = next(line for line in out.splitlines() if line.startswith("snapkv"))
    assert "22.00" in snapkv
    assert "99.00" not in snapkv


def test_a_run_that_ran_out_of_memory_is_a_line_of_its_own():
    lost = record("streaming_llm", 64, 0.0) | {"status": "oom", "problem": "CUDA out of memory", "examples_done": 3}
    del lost["scores"], lost["average"], lost["bytes"]
    text = closing_table([record("full", None, 22.0), lost], ["a", "b"])
    assert "streaming_llm 64: out of memory after 3 examples" in text
    assert "out of memory" in closing_table([lost], ["b"])


@pytest.mark.parametrize(
    ("content", "said"), [(None, "holds no record.json"), ("{", "is not JSON"), ('{"schema": 99}', "has schema 99")]
)
def test_what_cannot_be_read_is_one_line(tmp_path, capsys, content, said):
    if content is not None:
        (tmp_path / "record.json").write_text(content)
    assert main([str(tmp_path)]) == 2
    errors = capsys.readouterr().err
    assert said in errors
    assert errors.count("\n") == 1
