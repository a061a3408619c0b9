"""Options that choose runs, rows and columns."""

from __future__ import annotations

import pytest
from records import accuracy, save

from kvbench.analysis.tables import main


@pytest.fixture
def results(tmp_path):
    for task in ("longbench", "longbench-mini"):
        runs = [accuracy("full", None, 22.0, task=task), accuracy("snapkv", 128, 20.0, task=task)]
        save(tmp_path, *runs, accuracy("snapkv", 256, 21.0, task=task), accuracy("h2o", 128, 19.0, task=task))
    return tmp_path


def rows(capsys):
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    return [line.split("|")[1].strip() for line in lines if "method" not in line]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--methods", "snapkv", "--tasks", "longbench"], ["snapkv 128", "snapkv 256"]),
        (["--methods", "snapkv 128,full", "--tasks", "*-mini"], ["full", "snapkv 128"]),
        (["--methods", "s*,h2o", "--tasks", "longbench", "--budgets", "128"], ["h2o 128", "snapkv 128"]),
        (["--budgets", "none,256", "--tasks", "longbench"], ["full", "snapkv 256"]),
        (["--models", "m", "--methods", "full"], ["full", "full"]),
    ],
)
def test_rows_are_chosen(results, capsys, options, expected):
    assert main([str(results), *options]) == 0
    assert rows(capsys) == expected


def test_a_label_with_commas_in_parentheses_is_one_name(tmp_path, capsys):
    runs = [accuracy("expected_attention", budget, 20.0) for budget in (64, 128)]
    for run in runs:
        run["method_label"] = f"expected_attention {run['budget']} (epsilon 0.01, adaptive)"
    save(tmp_path, accuracy("full", None, 22.0), accuracy("snapkv", 64, 19.0), *runs)
    assert main([str(tmp_path), "--methods", "expected_attention 64 (epsilon 0.01, adaptive),full"]) == 0
    assert rows(capsys) == ["full", "expected_attention 64 (epsilon 0.01, adaptive)"]
    assert main([str(tmp_path), "--methods", "expected_attention (epsilon 0.01, adaptive)"]) == 0
    assert rows(capsys) == [f"expected_attention {budget} (epsilon 0.01, adaptive)" for budget in (64, 128)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--methods", "snapvk"],
            "--methods=snapvk: is in none of these results: they have full, h2o, snapkv; did you",
        ),
        (["--tasks", "ruler"], "--tasks=ruler: is in none of these results: they have longbench, longbench-mini"),
        (["--budgets", "64"], "--budgets=64: is in none of these results: they have 128, 256, none"),
        (["--columns", "speed"], "--columns=speed: is in none of these results: they have"),
        (["--width", "50"], "--width=50: must be at least 200 points"),
    ],
)
def test_a_choice_that_there_is_not_is_one_line(results, capsys, options, message):
    assert main([str(results), *options, "--format", "latex"]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {message}") and len(printed.err.splitlines()) == 1


@pytest.mark.parametrize("form", ["markdown", "latex", "html", "csv"])
def test_columns_are_chosen(results, capsys, form):
    assert main([str(results), "--columns", "mean,KV*", "--tasks", "longbench", "--format", form]) == 0
    out = capsys.readouterr().out
    assert "KV MiB" in out and "KV kept" in out and "mean" in out
    assert "Qasper" not in out
    assert ("95 % interval" in out) == (form == "csv")  # its column of what `low` and `high` are


def test_several_folders_are_one_table(tmp_path, capsys):
    save(tmp_path / "a", accuracy("full", None, 22.0))
    save(tmp_path / "b", accuracy("snapkv", 128, 20.0))
    assert main([str(tmp_path / "a"), str(tmp_path / "b"), "--columns", "mean"]) == 0
    out = capsys.readouterr().out
    assert out.count("**longbench / m") == 1 and "| full " in out and "| snapkv 128 " in out


def test_an_ending_chooses_the_format(results, tmp_path, capsys):
    for ending, start in (("md", "**"), ("tex", "% needs"), ("csv", "task,"), ("html", "<!doctype html>")):
        target = tmp_path / "out" / f"table.{ending}"
        assert main([str(results), "-o", str(target)]) == 0
        assert target.read_text().startswith(start)
        assert capsys.readouterr().out == f"wrote {target}\n"
