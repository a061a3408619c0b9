"""The index of a large results folder: the same runs as without it, and never an old or a foreign entry."""

from __future__ import annotations

import json
import os
import pickle
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest
from records import accuracy, efficiency, save

from kvbench.analysis import entries
from kvbench.analysis.compact import LazyRecord, Structure, pack
from kvbench.analysis.examples import _rows
from kvbench.analysis.index import Index
from kvbench.analysis.load import Run, load
from kvbench.analysis.ordering import distinct, without_settings
from kvbench.analysis.processes import each_result
from kvbench.analysis.tables import command

REFERENCE = Path(__file__).resolve().parents[2] / "results/reference"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder, and an index for any number of records."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setattr(entries, "MIN_RECORDS", 1)
    return folder


@pytest.fixture
def results(tmp_path):
    runs = [accuracy("full", None, 22.0), accuracy("snapkv", 128, 20.0), efficiency("full", None, 9.0)]
    return save(tmp_path / "results", *runs)


@pytest.fixture
def reads(monkeypatch):
    """Names of the folders whose record was read from its file."""
    found = []
    read = entries.read_record
    monkeypatch.setattr(entries, "read_record", lambda path: found.append(path.parent.parent.name) or read(path))
    return found


def as_data(found):
    runs, problems = found
    return [(run.path, run.label, run.record, run.examples) for run in runs], problems


def test_a_second_reading_gives_the_same_and_reads_no_record(cache, results, reads, monkeypatch):
    monkeypatch.setattr(entries, "MIN_RECORDS", 10)
    plain = as_data(load(results))
    assert not cache.exists()
    monkeypatch.setattr(entries, "MIN_RECORDS", 1)
    first = as_data(load(results))
    reads.clear()
    assert as_data(load(results)) == first == plain
    assert reads == []


@pytest.mark.parametrize("name", ["pareto_quick", "memory_8k", "family/recall", "needle_agnostic"])
def test_committed_runs_give_the_same_page_from_the_index(name, cache, tmp_path, monkeypatch):
    """Records of all kinds, with intervals of the older rule, by every way to read them."""
    pages = {}
    for reading, least in (("without", 10**6), ("first", 1), ("second", 1)):
        monkeypatch.setattr(entries, "MIN_RECORDS", least)
        for ending in ("md", "csv"):
            page = tmp_path / f"{reading}.{ending}"
            assert command.main([str(REFERENCE / name), "-o", str(page)]) == 0
            pages[reading, ending] = page.read_bytes()
    for ending in ("md", "csv"):
        assert pages["without", ending] == pages["first", ending] == pages["second", ending]


def test_a_command_builds_the_records_that_it_shows(cache, results, monkeypatch, capsys):
    """A page of one method builds one record of three, whose fields are in their order."""
    load(results)
    built = []
    whole = Index._record
    monkeypatch.setattr(Index, "_record", lambda *args: built.append(whole(*args)) or built[-1])
    assert command.main([str(results), "--methods", "snapkv", "--format", "csv"]) == 0
    (path,) = results.glob("*/snapkv/*/record.json")
    recorded = json.loads(path.read_text())
    assert {record["hash"] for record in built} == {recorded["hash"]}
    kept = {name: value for name, value in recorded.items() if name not in entries.NOT_LOADED}
    assert json.dumps(built[0]) == json.dumps(kept)
    assert "snapkv 128" in capsys.readouterr().out


def test_a_record_that_is_built_later_is_a_mapping_like_any_other():
    whole = {"kind": "accuracy", "unit": None, "scores": {"x": 1.5}}
    record = LazyRecord({"kind": "accuracy"}, lambda: dict(whole))
    assert record.whole() == whole and record.whole() is not record.whole()
    assert "scores" in record and "other" not in record and record.get("other", 3) == 3
    with pytest.raises(KeyError):
        record["other"]
    assert record == whole and list(record) == list(whole) and {**record} == whole and str(record) == str(whole)
    assert pickle.loads(pickle.dumps(record)) == whole
    assert record | {"unit": "points"} == {**whole, "unit": "points"}


def test_folders_searched_by_processes_are_the_same(tmp_path, monkeypatch):
    save(tmp_path, *(accuracy("snapkv", budget, 20.0) for budget in range(1, 30)))
    (tmp_path / "reference").mkdir()
    (tmp_path / "reference" / "record.json").write_text("{}")
    alone = entries._stamps(tmp_path)
    monkeypatch.setattr(entries, "MAX_UNSHARED", 20)
    monkeypatch.setattr(entries, "BATCH", 5)
    assert list(entries._stamps(tmp_path).items()) == list(alone.items()) and len(alone) == 29


def test_what_changed_is_read_again_and_what_is_gone_is_forgotten(cache, results, reads):
    load(results)
    (path,) = results.glob("*/snapkv/*/record.json")
    record = json.loads(path.read_text())
    record["average"] = {**record["average"], "low": 18.5}
    path.write_text(json.dumps(record))
    reads.clear()
    runs, _ = load(results)
    assert reads == ["snapkv"]
    assert next(run for run in runs if run.label == "snapkv 128").record["average"]["low"] == 18.5
    for name in ("record.json", "samples.jsonl"):
        (path.parent / name).unlink()
    assert len(load(results)[0]) == 2
    reads.clear()
    assert len(load(results)[0]) == 2
    assert reads == []


def test_samples_that_change_are_checked_again(cache, results):
    assert load(results)[1] == []
    (path,) = results.glob("*/snapkv/*/samples.jsonl")
    path.write_text(path.read_text() + "x\n")
    for _ in range(2):  # from the file, and from the index
        ((note,), runs) = (load(results)[1], load(results)[0])
        assert "line 41 is no row of an example" in note
        assert next(run for run in runs if run.label == "snapkv 128").examples is None


def test_skipped_records_are_named_again(cache, results):
    (path,) = results.glob("*/snapkv/*/record.json")
    path.write_text("{")
    first, second = load(results), load(results)
    assert first[1] == second[1] and "is not JSON" in first[1][0]
    assert len(first[0]) == len(second[0]) == 2


@pytest.mark.parametrize("content", [b"", b"no database", b"SQLite format 3\0" + bytes(200)])
def test_a_damaged_index_is_made_again(cache, results, reads, content):
    expected = as_data(load(results))
    (path,) = (cache / "kvbench").glob("index-*.sqlite")
    path.write_bytes(content)
    assert as_data(load(results)) == expected
    load(results)
    reads.clear()
    assert as_data(load(results)) == expected
    assert reads == []


def test_a_damaged_entry_is_one_line_and_the_index_is_made_again(cache, results, capsys):
    expected = as_data(load(results))
    (path,) = (cache / "kvbench").glob("index-*.sqlite")
    with closing(sqlite3.connect(path)) as base, base:
        base.execute("UPDATE entries SET others = '[' WHERE path LIKE '%snapkv%'")
    assert command.main([str(results)]) == 2
    assert "is damaged at" in capsys.readouterr().err and not path.exists()
    assert as_data(load(results)) == expected


def test_a_record_that_links_to_itself_stops_no_command(results):
    loop = results / "loop" / "record.json"
    loop.parent.mkdir()
    loop.symlink_to(loop)
    assert len(load(results)[0]) == 3


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_cannot_be_written_is_no_error(cache, results):
    cache.mkdir()
    cache.chmod(0o500)
    assert len(load(results)[0]) == 3


def test_a_cache_that_is_a_file_is_no_error(cache, results):
    cache.write_text("")
    assert len(load(results)[0]) == 3


def test_nothing_is_written_into_the_results(cache, results):
    before = sorted(results.rglob("*"))
    load(results)
    assert sorted(results.rglob("*")) == before


def test_labels_of_many_runs_of_one_method_take_linear_time():
    """4,000 runs of one curve, with seven settings."""
    runs = []
    for number in range(4000):
        record = efficiency("snapkv", 1 + number, 5.0)
        record["identity"]["method"]["selection"]["window"] = number % 7
        runs.append(Run(Path(str(number)), record, record["method_label"]))
    start = time.process_time()
    labelled = distinct(runs)
    assert time.process_time() - start < 2.0
    assert len({run.label for run in labelled}) == 4000 and "(window=6)" in labelled[6].label


def test_settings_of_a_scorer_are_told_where_two_runs_differ_in_them():
    """Expected attention with its library's epsilon and with its evaluation's; the allocator has a label of its own."""
    runs = []
    for epsilon, parts in ((0.0, ""), (0.01, ""), (0.01, " + adaptive")):
        record = accuracy("expected_attention", 1024, 5.0)
        record["method_label"] += parts
        record["identity"]["method"]["selection"] = {"class": "ExpectedAttention", "budget": 1024, "epsilon": epsilon}
        runs.append(Run(Path(str(len(runs))), record, record["method_label"]))
    assert [run.label for run in distinct(runs)] == [
        "expected_attention 1024 (epsilon=0.0)",
        "expected_attention 1024 (epsilon=0.01)",
        "expected_attention 1024 + adaptive",
    ]


def test_settings_join_those_that_a_label_has():
    """A second number of future positions, beside a label that names epsilon and allocation."""
    runs = []
    for future in (64, 512):
        record = accuracy("expected_attention", 1024, 5.0)
        record["method_label"] += " (epsilon 0.01, adaptive)"
        record["identity"]["method"]["selection"] = {"class": "ExpectedAttention", "budget": 1024, "future": future}
        runs.append(Run(Path(str(len(runs))), record, record["method_label"]))
    assert [run.label for run in distinct(runs)] == [
        "expected_attention 1024 (epsilon 0.01, adaptive, future=64)",
        "expected_attention 1024 (epsilon 0.01, adaptive, future=512)",
    ]
    assert {without_settings(run.curve) for run in distinct(runs)} == {"expected_attention"}


def test_a_recorded_window_that_is_a_number_of_recent_tokens_has_that_name():
    """Records of some scorers call ``method.recent`` a window; one that has a window keeps the word."""
    runs = []
    for kind, window in (("KeyDiff", 0), ("KeyDiff", 32), ("SnapKV", 8), ("SnapKV", 32)):
        record = accuracy(kind.lower(), 64, 5.0)
        record["identity"]["method"]["selection"] = {"class": kind, "budget": 64, "window": window}
        runs.append(Run(Path(str(len(runs))), record, record["method_label"]))
    assert [run.label for run in distinct(runs)] == [
        *("keydiff 64 (recent=0)", "keydiff 64 (recent=32)", "snapkv 64 (window=8)", "snapkv 64 (window=32)"),
    ]


def test_a_first_reading_in_batches_holds_common_parts_once(cache, results, reads, monkeypatch):
    """A folder of 100,000 records does not fit in memory with a whole record each."""
    monkeypatch.setattr(entries, "BATCH", 1)
    runs, _ = load(results)
    first, second = (run for run in runs if run.record["kind"] == "accuracy")
    assert first.record["data"] is second.record["data"] and first.examples.keys is second.examples.keys
    reads.clear()
    assert as_data(load(results)) == as_data((runs, []))
    assert reads == []


def test_half_a_surrogate_pair_in_a_name_is_no_error(cache, results):
    """JSON may hold ``\\ud800``, which has no UTF-8."""
    (path,) = results.glob("*/snapkv/*/record.json")
    record = json.loads(path.read_text())
    record["method_label"] = "snapkv \ud800"
    path.write_text(json.dumps(record))
    for _ in range(2):
        assert "snapkv \ud800" in {run.label for run in load(results)[0]}


@pytest.mark.parametrize(
    "record",
    [
        {"a": 1.5, "b": {"c": [1.5, {"d": 2.5}], "e": {}, "f": [], "g": None}, "h": [1, "x"], "i": True},
        {"scores": {"x": {"mean": 0.1 + 0.2, "n": 3}, "y": {"mean": 1e-310, "n": 4}}, "deep": {"one": {"two": 1.0}}},
        {"data": {"examples": {"x": 3}}, "identity": {"kind": "k", "method": {"a": 1}, "seed": 0}, "list": [[1], [2]]},
        {},
    ],
)
def test_a_packed_record_is_built_again_with_its_types_and_order(record):
    stored = {}

    def refer(path, value):
        if path not in {("data",), ("identity", "method")}:
            return None
        stored[str(path[-1])] = value
        return str(path[-1])

    program, values = pack(record, refer)
    program = json.loads(json.dumps(program))
    built = Structure(program).build([*values.numbers, *map(stored.__getitem__, values.parts), *values.others])
    assert json.dumps(built) == json.dumps(record)


@pytest.mark.parametrize(
    "line", [b'{"a": 1}, {"a": 2}', b'{"a": "', b"", b'{"a": 1}],[{"a": 2}', b"\xff", b"[" * 10**5]
)
def test_a_damaged_line_is_no_row_whatever_the_others_are(line):
    """All lines are parsed at once, in brackets: a line must not become whole by the next one."""
    for lines in ([line, b'"}'], [b'{"a": "', line, b'{"b": 3}'], [line, line]):
        expected = []
        for one in lines:
            try:
                expected.append(json.loads(one.decode()))
            except (ValueError, RecursionError):
                expected.append(None)
        assert list(_rows(b"\n".join([*lines, b""]))) == expected


def test_results_of_processes_come_in_order_and_a_failure_is_raised():
    assert list(each_result([lambda n=n: n * n for n in range(40)])) == [n * n for n in range(40)]
    with pytest.raises(ZeroDivisionError):
        list(each_result([lambda n=n: 1 // n for n in range(3)]))


def test_a_large_page_by_processes_is_the_same(results, tmp_path, monkeypatch):
    command.main([str(results), "-o", str(tmp_path / "one.md")])
    monkeypatch.setattr(command, "MAX_TESTED", 0)
    monkeypatch.setattr(command, "PER_TASK", 1)
    command.main([str(results), "-o", str(tmp_path / "many.md")])
    page = (tmp_path / "one.md").read_text()
    assert page == (tmp_path / "many.md").read_text() and page.count("| method") == 2
