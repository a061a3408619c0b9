"""Damaged, edited and odd records: each is named in one line, and never shown as a number, as the best or as markup."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from records import accuracy, efficiency, estimate, save

from kvbench.analysis.checks import problem_of
from kvbench.analysis.load import load
from kvbench.analysis.tables import main
from kvbench.analysis.tables.groups import each_table
from kvbench.analysis.tables.text import csv_page, markdown_page

REFERENCE = Path(__file__).resolve().parents[2] / "results" / "reference"
FORMS = {
    "markdown": ["--format", "markdown"],
    "latex": ["--format", "latex"],
    "csv": ["--format", "csv"],
    "html": ["--format", "html"],
    "by budget": ["--by-budget"],
}
NO_NUMBER = re.compile(r"\b(nan|inf|infinity|none)\b(?!, |\]|\))", re.I)

Edit = Callable[[dict[str, Any]], object]


def put(path: str, value: Any) -> Edit:
    """Set the field at a dotted path."""

    def edit(record: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for name in parents:
            record = record[name]
        record[last] = value

    return edit


def drop(path: str) -> Edit:
    def edit(record: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for name in parents:
            record = record[name]
        del record[last]

    return edit


def shift_the_mean_in_its_interval(record: dict[str, Any]) -> None:
    """Only the samples can tell."""
    record["scores"]["lcc"]["mean"] += 0.5
    record["average"]["mean"] += 0.25


EDITS: dict[str, tuple[Edit, str]] = {
    "NaN mean": (put("average.mean", math.nan), "average.mean is NaN: must be a number"),
    "infinite mean": (put("average.mean", math.inf), "average.mean is Infinity: must be a number"),
    "no mean": (put("average.mean", None), "average.mean is null: must be a number"),
    "mean as text": (put("average.mean", "31.0"), 'average.mean is "31.0": must be a number'),
    "mean as true": (put("average.mean", True), "average.mean is true: must be a number"),
    "NaN in a data set": (put("scores.lcc.mean", math.nan), "scores.lcc.mean is NaN"),
    "infinite end": (put("scores.lcc.low", -math.inf), "scores.lcc.low is -Infinity"),
    "one end": (put("scores.lcc.low", None), "scores.lcc has one end of its interval"),
    "mean outside its interval": (put("average.mean", 99.0), "average.mean is 99: outside its own interval [30, 32]"),
    "difference outside": (put("paired.difference.mean", 99.0), "paired.difference.mean is 99: outside"),
    "average of other sets": (
        put("average", estimate(31.5, 40)),
        "average.mean is 31.5: the mean of its data sets is 31",
    ),
    "mean that the samples do not give": (
        shift_the_mean_in_its_interval,
        "scores.lcc.mean is 32.5: samples.jsonl gives 32",
    ),
    "a data set is missing": (drop("scores.lcc"), "lacks the score of lcc, which data.examples counts"),
    "a data set too many": (put("scores.extra", estimate(1.0)), "scores are of 60 examples"),
    "no data set": (put("scores", {}), "scores is empty"),
    "scores as a list": (put("scores", []), "scores is []: must be a mapping"),
    "zero examples": (put("data.examples.lcc", 0), "data.examples.lcc is 0: must be a whole number >= 1"),
    "examples that nobody counted": (put("data.examples.lcc", 21), "data.examples counts 41"),
    "no bytes": (drop("bytes"), "lacks bytes"),
    "no stored bytes": (drop("bytes.kv_bytes_stored"), "bytes.kv_bytes_stored is missing"),
    "negative bytes": (put("bytes.kv_bytes_stored", -1), "bytes.kv_bytes_stored is -1: must be a number >= 0"),
    "NaN share": (put("bytes.kv_ratio", math.nan), "bytes.kv_ratio is NaN"),
    "no dtype": (drop("identity.dtype"), "identity.dtype is missing"),
    "no method": (drop("identity.method"), "identity.method is missing"),
    "identity as text": (put("identity", "h2o"), 'identity is "h2o": must be a mapping'),
    "NaN in the identity": (
        put("identity.method.selection.beta", math.nan),
        "identity holds a number that is not finite",
    ),
    "budget as text": (put("budget", "128"), 'budget is "128": must be a number above 0, or null'),
    "negative budget": (put("budget", -5), "budget is -5: must be a number above 0"),
    "label as a number": (put("method_label", 7), "method_label is 7: must be text that is not blank"),
    "blank label": (put("method_label", "  "), "method_label is"),
    "wrong hash": (put("hash", "0" * 12), 'hash is "000000000000": its identity has'),
    "edited identity": (put("identity.method.selection.window", 64), "so one of the two was edited"),
    "unknown kind": (put("kind", "quality"), "must be one of accuracy, efficiency, train"),
    "another kind": (put("identity.kind", "train"), "kind is accuracy: identity.kind says train"),
    "unknown status": (put("status", "half"), 'status is "half": must be one of done, oom'),
    "sessions as text": (put("sessions", "many"), 'sessions is "many": must be a list'),
    "no sessions": (put("provenance", None), "provenance is null: must be a mapping"),
    "layers without a count": (put("cache_layers", {"local": []}), "cache_layers.full_attention is missing"),
    "newer schema": (put("schema", 2), "has schema 2; this version reads 1"),
    "no schema": (drop("schema"), "has schema None"),
}
CONTENTS = {
    "truncated": b'{"schema": 1, "sta',
    "empty": b"",
    "binary": bytes(range(256)),
    "deeply nested": b"[" * 100_000,
    "a number of 5,000 digits": b"1" * 5000,
}
"""Files that are no JSON."""


def results(folder: Path, victim: dict[str, Any] | None = None) -> Path:
    """A full cache, a method, and the one that is to be damaged: it would be the best."""
    victim = victim or accuracy("h2o", 128, 31.0)
    return save(folder, accuracy("full", None, 22.0), accuracy("snapkv", 128, 20.0), victim)


def path_of(folder: Path, method: str) -> Path:
    (found,) = folder.glob(f"*/{method}/*/record.json")
    return found


def shown(folder: Path, form: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, list[str]]:
    status = main([str(folder), *FORMS[form]])
    printed = capsys.readouterr()
    return status, printed.out, printed.err.splitlines()


def assert_left_out(folder: Path, form: str, capsys: pytest.CaptureFixture[str], expected: str) -> None:
    status, out, lines = shown(folder, form, capsys)
    assert status == 0
    assert len(lines) == 1 and lines[0].startswith("skipped: results_dir=") and expected in lines[0], lines
    assert "h2o" not in out and "snapkv" in out and "full" in out
    assert not NO_NUMBER.search(out)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", EDITS)
def test_an_unsound_record_is_named_and_left_out(tmp_path, capsys, case, form):
    edit, expected = EDITS[case]
    folder = results(tmp_path)
    path = path_of(folder, "h2o")
    record = json.loads(path.read_text())
    edit(record)
    path.write_text(json.dumps(record))
    assert_left_out(folder, form, capsys, expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CONTENTS)
def test_a_file_that_is_no_record_is_named_and_left_out(tmp_path, capsys, case, form):
    folder = results(tmp_path)
    path_of(folder, "h2o").write_bytes(CONTENTS[case])
    status, out, lines = shown(folder, form, capsys)
    assert (status, len(lines)) == (0, 1)
    assert "is not JSON; remove this file and run the command again" in lines[0] or "has schema None" in lines[0]
    assert "snapkv" in out


def test_a_list_is_no_record(tmp_path, capsys):
    folder = results(tmp_path)
    path_of(folder, "h2o").write_text("[]")
    assert_left_out(folder, "markdown", capsys, "has schema None")


@pytest.mark.parametrize("form", FORMS)
def test_a_loss_whose_exponential_is_no_number(tmp_path, capsys, form):
    victim = accuracy("h2o", 128, 31.0)
    for name, mean in (("lcc", 800.0), ("qasper", 800.0)):
        victim["scores"][name] = estimate(mean)
    victim["average"], victim["unit"] = estimate(800.0, 40), "nats per token"
    folder = results(tmp_path, victim)
    assert_left_out(folder, form, capsys, "scores hold 800 nats per token: too many for a perplexity")


EFFICIENCY_EDITS = {
    "NaN time": (put("metrics.tpot_ms.median", math.nan), "metrics.tpot_ms.median is NaN"),
    "median outside": (put("metrics.tpot_ms.median", 0.001), "metrics.tpot_ms.median is 0.001: outside its own range"),
    "no repetition": (put("metrics.tpot_ms.repetitions", []), "metrics.tpot_ms.repetitions is empty"),
    "no metric": (drop("metrics.tpot_ms"), "metrics.tpot_ms is missing"),
    "no peak": (drop("memory.peak_decode"), "memory.peak_decode is missing"),
    "peak as text": (put("memory.peak_decode", "600"), 'memory.peak_decode is "600": must be a mapping'),
    "no repeats": (drop("identity.runner"), "identity.runner is missing"),
    "infinite gain": (put("paired.decode_speed_up", math.inf), "paired.decode_speed_up is Infinity"),
}


@pytest.mark.parametrize("form", [form for form in FORMS if form != "by budget"])
@pytest.mark.parametrize("case", EFFICIENCY_EDITS)
def test_an_unsound_record_of_times_is_named_and_left_out(tmp_path, capsys, case, form):
    edit, expected = EFFICIENCY_EDITS[case]
    folder = save(
        tmp_path, *(efficiency(*run) for run in (("full", None, 9.0), ("snapkv", 128, 8.0), ("h2o", 128, 1.0)))
    )
    path = path_of(folder, "h2o")
    record = json.loads(path.read_text())
    edit(record)
    path.write_text(json.dumps(record))
    assert_left_out(folder, form, capsys, expected)


@pytest.mark.parametrize(
    "place", ["accuracy", *(pytest.param(p, marks=pytest.mark.slow) for p in ("efficiency", "train"))]
)
def test_whatever_one_value_is_the_rest_is_shown(tmp_path, place):
    """Every value of a committed record, in turn, as null, NaN, text and a list: no exception, no NaN in a table."""
    folders = {
        "accuracy": "make_run",
        "efficiency": "memory_8k",
        "train": "family/text-stdlib/scratch/yoco",
    }
    source = next(p for p in sorted((REFERENCE / folders[place]).rglob("record.json")) if "/full/" not in str(p))
    record = json.loads(source.read_text())
    folder = results(tmp_path)
    victim = path_of(folder, "h2o").parent
    if (source.parent / "samples.jsonl").exists():
        shutil.copy(source.parent / "samples.jsonl", victim)
    for path in leaves({key: value for key, value in record.items() if key not in ("config", "curve", "validations")}):
        for value in (None, math.nan, "x", []):
            changed = json.loads(json.dumps(record))
            inner = changed
            for name in path[:-1]:
                inner = inner[name]
            inner[path[-1]] = value
            (victim / "record.json").write_text(json.dumps(changed))
            runs, _ = load(folder)
            for page in (markdown_page, csv_page):
                out = "".join(page(each_table(runs)))
                assert "snapkv" in out and "nan" not in out.lower().split(), (path, value)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of some values: the first of a list stands for all, and the first two of a mapping with many names."""
    if isinstance(value, dict) and value:
        names = list(value)[:2] if len(value) > 30 or path[-1:] in (("sha256",), ("packages",), ("scores",)) else value
        return (
            [path, *(leaf for name in names for leaf in leaves(value[name], (*path, name)))]
            if path
            else [leaf for name in names for leaf in leaves(value[name], (name,))]
        )
    if isinstance(value, list) and value:
        return [path, *leaves(value[0], (*path, 0))]
    return [path]


# samples --------------------------------------------------------------------------------------------------------------


def rows_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


SAMPLES: dict[str, tuple[Callable[[str], str | None], str]] = {
    "missing": (lambda text: None, "is missing"),
    "a row is missing": (
        lambda text: "".join(text.splitlines(keepends=True)[:-1]),
        "has 19 rows of qasper; the record counts 20",
    ),
    "the last row is cut": (lambda text: text[:-20], "line 40 is no row of an example"),
    "no rows": (lambda text: "", "has 0 rows of lcc; the record counts 20"),
    "rows twice": (lambda text: text + text, "line 41 repeats the example lcc/000"),
    "a row of another set": (
        lambda text: text + '{"dataset": "x", "id": "1", "score": 1}\n',
        "has 1 rows of x; the record counts 0",
    ),
    "NaN score": (
        lambda text: re.sub(r'"score": [\d.]+', '"score": NaN', text, count=1),
        "line 1 is no row of an example",
    ),
    "a list": (lambda text: "[]\n" + text, "line 1 is no row of an example"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", SAMPLES)
def test_samples_that_do_not_fit_are_named_and_the_run_is_not_the_best(tmp_path, capsys, case, form):
    damage, expected = SAMPLES[case]
    folder = results(tmp_path)
    path = path_of(folder, "h2o").with_name("samples.jsonl")
    text = damage(path.read_text())
    path.unlink() if text is None else path.write_text(text)
    status, out, lines = shown(folder, form, capsys)
    assert status == 0 and len(lines) == 1
    assert lines[0].startswith("note: results_dir=") and f"samples.jsonl: {expected}" in lines[0]
    assert "h2o" in out and "snapkv" in out
    assert not any(
        "h2o" in line and "32" in line and re.search(r"\*\*3\d|textbf\{3|<b>3|,yes,", line) for line in out.splitlines()
    )


def test_rows_of_a_part_of_a_data_set_are_compared_with_the_score_of_the_part(tmp_path):
    """LongBench-E splits its data sets by length: ``group`` names the part that a row counts in."""
    parts = {"lcc/0-4k": (0.3, 0.1), "lcc/4-8k": (0.5, 0.7), "qasper": (0.2, 0.4)}
    record = accuracy("h2o", 128, 31.0)
    path = path_of(save(tmp_path, record), "h2o")
    record["scores"] = {name: estimate(50 * sum(scores), 2) for name, scores in parts.items()}
    record["average"], record["data"]["examples"] = estimate(110 / 3, 6), {"lcc": 4, "qasper": 2}
    path.write_text(json.dumps(record))
    rows = [
        {"dataset": name.partition("/")[0], "id": f"{name}-{i}", "score": score, "group": name}
        for name, scores in parts.items()
        for i, score in enumerate(scores)
    ]
    del rows[-1]["group"], rows[-2]["group"]  # a data set that is not split
    samples = path.with_name("samples.jsonl")
    samples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run,), problems = load(tmp_path)
    assert problems == [] and run.examples is not None
    found = run.examples.by_data_set()
    assert {name: list(scores.values()) for name, scores in found.items()} == {
        name: pytest.approx([100 * score for score in scores]) for name, scores in parts.items()
    }
    samples.write_text(samples.read_text().replace("0.7", "0.9"))
    assert "scores.lcc/4-8k.mean is 60: samples.jsonl gives 70" in load(tmp_path)[1][0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lacking", ["h2o", "full"])
def test_a_run_of_fewer_data_sets_is_shown_with_a_gap_and_named(tmp_path, capsys, form, lacking):
    """A sound record that lacks a data set of the others: no column is lost, and no missing score is a number."""
    folder = results(tmp_path)
    path = path_of(folder, lacking)
    record = json.loads(path.read_text())
    del record["scores"]["lcc"], record["data"]["examples"]["lcc"]
    record["average"] = record["scores"]["qasper"]
    path.write_text(json.dumps(record))
    samples = path.with_name("samples.jsonl")
    samples.write_text(
        "".join(f"{json.dumps(row)}\n" for row in rows_of(samples.read_text()) if row["dataset"] != "lcc")
    )
    status, out, lines = shown(folder, form, capsys)
    assert (status, lines) == (0, [])
    assert "lcc" in out.lower() or form == "by budget"  # which has no columns of data sets
    assert "h2o" in out and "snapkv" in out and not NO_NUMBER.search(out)
    if form != "csv":  # a row of which has one score, and there is none
        assert f"these means are of other data: {lacking}" in " ".join(out.split())


# copies ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_of_two_copies_of_a_run_the_later_is_shown(tmp_path, capsys, form):
    folder = results(tmp_path / "a")
    shutil.copytree(folder, tmp_path / "b")
    path = path_of(tmp_path / "b", "h2o")
    record = json.loads(path.read_text()) | {"finished": "2030-01-01T00:00:00Z"}
    path.write_text(json.dumps(record))
    status, out, lines = shown(tmp_path, form, capsys)
    assert status == 0 and len(lines) == 3
    assert all("is the same run as" in line for line in lines)
    assert any("/a/" in line.partition(": is the same")[0] and "h2o" in line for line in lines)
    if form in ("markdown", "html"):
        assert out.count(record["hash"]) == 1


@pytest.mark.parametrize("form", FORMS)
def test_another_name_of_the_task_does_not_make_longbench_scores_of_the_bundled_set(tmp_path, capsys, form):
    source = next((REFERENCE / "make_run").rglob("snapkv/*/record.json")).parent
    shutil.copytree(source, tmp_path / "run")
    path = tmp_path / "run" / "record.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"task": "longbench"}))
    status, out, _ = shown(tmp_path, form, capsys)
    assert status == 0 and "not LongBench scores" in " ".join(out.split())


def test_two_full_caches_have_two_names(tmp_path, capsys):
    other = accuracy("full", None, 21.0)
    other["identity"]["method"]["name"] = "full2"
    folder = save(tmp_path, accuracy("full", None, 22.0), other)
    status, out, _ = shown(folder, "markdown", capsys)
    assert status == 0 and "full (name=full) " in out and "full (name=full2)" in out


# nothing to show ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_records_of_which_none_can_be_shown_are_a_failure(tmp_path, capsys, form):
    folder = results(tmp_path)
    for path in folder.rglob("record.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 2}))
    status, out, lines = shown(folder, form, capsys)
    assert (status, out, len(lines)) == (1, "", 4)
    assert lines[-1] == "error: none of the 3 records can be shown"


@pytest.mark.parametrize("form", FORMS)
def test_no_records_and_no_folder_are_an_error(tmp_path, capsys, form):
    for folder in (tmp_path, tmp_path / "none"):
        status, out, lines = shown(folder, form, capsys)
        assert (status, out, len(lines)) == (2, "", 1) and "holds no finished run" in lines[0]


# text -----------------------------------------------------------------------------------------------------------------

TEXTS = {
    "script": "<script>alert(1)</script>",
    "bars": "a|b||c",
    "math": "$\\bad{$",
    "commands": "\\evil{x} ^ ~ # % & _",
    "entity": "&lt; &amp;",
    "link": "[a](http://x.y)",
    "emphasis": "**a** _b_ `c` ~~d~~",
    "two lines": "first\nsecond\r\nthird",
    "Chinese": "多跳 [问答]",
    "separators": "a,b;\"c\"\t'd'",
}


class Text(HTMLParser):
    """The text of a page and the names of its elements."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", TEXTS)
def test_names_are_text_in_every_format(tmp_path, capsys, case, form):
    text = TEXTS[case]
    victim = accuracy("h2o", 128, 31.0)
    victim["method_label"] = f"h2o {text}"
    for part in ("scores", "data"):
        inner = victim[part] if part == "scores" else victim["data"]["examples"]
        inner[text] = inner.pop("lcc")
    victim["identity"]["note"] = text
    status, out, lines = shown(save(tmp_path, victim), form, capsys)
    assert (status, lines) == (0, [])
    flat = " ".join(text.split())
    if form == "csv":
        rows = list(csv.reader(out.splitlines(keepends=True)))
        assert len({len(row) for row in rows}) == 1 and any(row[5] == text for row in rows)
    elif form == "html":
        page = Text()
        page.feed(out)
        assert f"h2o {flat}" in page.texts and not page.names & {"script", "a", "em"}
    elif form == "latex":
        plain = re.sub(r"(?m)(?<!\\)%.*", "", out)
        assert balanced(plain) and "\\evil" not in plain and "\\bad" not in plain
    else:
        cells = [re.split(r"(?<!\\)\|", line) for line in out.splitlines() if line.startswith("|")]
        assert len({len(row) for row in cells}) == 1
        assert any(unescaped(row[1].strip()) == f"h2o {flat}" for row in cells)
        assert "<script" not in out.replace("\\<", "")


def unescaped(text: str) -> str:
    return re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", text)


def balanced(text: str) -> bool:
    """Whether a LaTeX text has as many closing braces as opening ones."""
    plain = re.sub(r"\\[{}]", "", text)
    return plain.count("{") == plain.count("}")


# what is sound --------------------------------------------------------------------------------------------------------


def test_every_committed_record_is_sound():
    for path in REFERENCE.rglob("record.json"):
        assert problem_of(json.loads(path.read_text(encoding="utf-8"))) is None, path
    runs, problems = load(REFERENCE)
    assert all("is the same run as" in problem for problem in problems)
    assert all(run.examples is not None for run in runs if run.record["kind"] == "accuracy")
