"""``kvbench score``: the official scorer's figures, exit statuses, one line per problem."""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvbench.runners.score import main

TREC_CLASSES = ["Food", "Date"]


def prediction(pred: str = "yes", **changes: Any) -> dict[str, Any]:
    return {"pred": pred, "answers": ["yes"], "all_classes": None, "length": 100} | changes


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    path = folder / name
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, Any, list[str]]:
    """(exit status, the JSON object on standard output or None, lines on standard error)."""
    status = main([str(arg) for arg in args])
    captured = capsys.readouterr()
    return status, json.loads(captured.out) if captured.out else None, captured.err.splitlines()


@pytest.mark.parametrize("code_sim", ["official", "levenshtein"])
@pytest.mark.parametrize(
    "predictions",
    [
        "minilongbench_example",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama2-7b-chat-4k", "adversarial")),
    ],
)
def test_published_figures(
    shared_data: Path, capsys: pytest.CaptureFixture[str], predictions: str, code_sim: str
) -> None:
    """Whole folders, as a user scores them; lcc and repobench-p differ by two points between the variants.

    The same predictions, sample by sample: ``test_longbench.py``.
    """
    folder = shared_data / "longbench/predictions" / predictions
    figures = json.loads((folder / "expected_scores.json").read_text())
    key = "official" if code_sim == "official" else "official_with_python_Levenshtein"
    status, scores, errors = run(capsys, folder, "--code-sim", code_sim)
    assert (status, errors) == (0, [])
    assert scores == {name: figure.get(key, figure["official"]) for name, figure in figures.items()}


def test_as_a_module_prints_one_object_and_nothing_else_and_needs_no_torch(shared_data: Path, tmp_path: Path) -> None:
    """jieba logs to the console when it starts; `kvbench score ... | jq` must not choke on it."""
    folder = shared_data / "longbench/predictions/minilongbench_example"
    code = (
        "import sys, runpy\n"
        "sys.modules['torch'] = sys.modules['transformers'] = None  # importing them would raise\n"
        f"sys.argv = ['score', {str(folder)!r}]\n"
        "runpy.run_module('kvbench.runners.score', run_name='__main__')"
    )
    env = {"PATH": "/usr/bin:/bin", "TMPDIR": str(tmp_path)}  # an empty TMPDIR: jieba has to build its cache
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["vcsum"] == 8.13


def test_buckets_of_longbench_e(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [prediction("yes", length=3999), prediction("no", length=4000), prediction("yes", length=7999)]
    write(tmp_path, "qasper.jsonl", rows)
    status, scores, _ = run(capsys, tmp_path, "--e")
    assert (status, scores) == (0, {"qasper": {"0-4k": 100.0, "4-8k": 50.0, "8k+": None}})


def test_the_classes_of_the_last_row_are_used_for_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The official loop keeps the last row's list; a scorer that takes each row's own gives 100 here."""
    first = prediction("Food Date", answers=["Food"], all_classes=["Food"])
    last = prediction("Date", answers=["Date"], all_classes=TREC_CLASSES)
    write(tmp_path, "trec.jsonl", [first, last])
    assert run(capsys, tmp_path)[1] == {"trec": 75.0}


def test_order_is_the_papers_and_gzip_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "2wikimqa.jsonl", [prediction()])
    write(tmp_path, "qasper.jsonl.gz", [prediction("yes"), prediction("no"), prediction("no")])
    (tmp_path / "result.json").write_text("{}")
    status, scores, _ = run(capsys, tmp_path)
    assert status == 0
    assert list(scores.items()) == [("qasper", 33.33), ("2wikimqa", 100.0)]


def test_output_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "qasper.jsonl", [prediction()])
    target = tmp_path / "out" / "scores.json"
    status, scores, _ = run(capsys, tmp_path, "-o", target)
    assert status == 0
    assert json.loads(target.read_text()) == scores == {"qasper": 100.0}
    status, scores, errors = run(capsys, tmp_path, "-o", tmp_path)
    assert (status, scores, len(errors)) == (2, {"qasper": 100.0}, 1)
    assert "cannot be written" in errors[0]


def test_missing_and_empty_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = f"kvbench score: PREDICTIONS_DIR={tmp_path / 'nope'}: no such folder"
    assert run(capsys, tmp_path / "nope") == (2, None, [missing])
    status, scores, errors = run(capsys, tmp_path)
    assert (status, scores, len(errors)) == (2, None, 1)
    assert "must contain files <dataset>.jsonl" in errors[0]


@pytest.mark.parametrize("args", [[], ["x", "--code-sim", "fast"], ["x", "--what"]])
def test_wrong_arguments_are_one_line_too(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    status, scores, errors = run(capsys, *args)
    assert (status, scores, len(errors)) == (2, None, 1)


GOOD = json.dumps(prediction()).encode() + b"\n"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("hotpot.jsonl", GOOD, "did you mean hotpotqa"),
        ("hotpotqa.jsonl", GOOD + GOOD[:30], "hotpotqa.jsonl:2="),
        ("hotpotqa.jsonl", GOOD + b"\xff\n", "hotpotqa.jsonl:2="),
        ("hotpotqa.jsonl", GOOD + b"null\n", "must be a JSON object"),
        ("hotpotqa.jsonl", b'{"pred": "x"}\n', "hotpotqa.jsonl:1=answers, all_classes"),
        ("hotpotqa.jsonl", json.dumps(prediction(pred=None)).encode(), "hotpotqa.jsonl:1=pred"),
        ("hotpotqa.jsonl", b"", "at least one prediction"),
        ("hotpotqa.jsonl.gz", gzip.compress(GOOD * 9, mtime=0)[:-12], "hotpotqa.jsonl.gz:"),
        ("hotpotqa.jsonl.gz", GOOD, "hotpotqa.jsonl.gz:1=damaged"),
        ("trec.jsonl", GOOD, "`all_classes` must list the class names of trec"),
        (
            "trec.jsonl",
            json.dumps(prediction(all_classes=["a", 5])).encode(),
            "`all_classes` must list the class names",
        ),
        ("hotpotqa.jsonl", GOOD + b"[" * 100_000, "hotpotqa.jsonl:2="),
        ("hotpotqa.jsonl", GOOD + b'{"length": ' + b"7" * 5000 + b"}", "hotpotqa.jsonl:2="),
        ("passage_retrieval_en.jsonl", GOOD, "must look like Paragraph 7"),
        ("qasper.jsonl.gz", gzip.compress(GOOD, mtime=0), "two files contain predictions of the same data set"),
    ],
)
def test_one_bad_file_does_not_cost_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes, expected: str
) -> None:
    """A cut file scored up to the cut would be a plausible, wrong number."""
    write(tmp_path, "qasper.jsonl", [prediction()])
    write(tmp_path, "musique.jsonl", [prediction("no")])
    (tmp_path / name).write_bytes(content)
    status, scores, errors = run(capsys, tmp_path)
    assert (status, len(errors)) == (2, 1), errors
    assert expected in errors[0]
    good = {"musique": 0.0} if name.startswith("qasper") else {"qasper": 100.0, "musique": 0.0}
    assert scores == good


def test_longbench_e_needs_lengths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "qasper.jsonl", [prediction(length=None)])
    assert run(capsys, tmp_path)[0] == 0, "without --e the length is not looked at"
    status, scores, errors = run(capsys, tmp_path, "--e")
    assert (status, scores, len(errors)) == (2, None, 1)
    assert "length:None: must be a whole number for --e" in errors[0]
