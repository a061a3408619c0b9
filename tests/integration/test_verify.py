"""``kvbench verify``: sound records agree, and each kind of damage is named."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvbench.analysis.describe import has_current_intervals
from kvbench.analysis.schema import identity_hash
from kvbench.analysis.summaries import with_current_statistics
from kvbench.analysis.verify import main, read_rows, scores_of, verify

REFERENCE = Path(__file__).resolve().parents[2] / "results/reference"
SCORED = "longbench-mini/smollm2-135m"
TIMED = "memory_8k/shape-8000+32/smollm2-135m"
Record = dict[str, Any]


def copied(source: str, target: Path) -> dict[str, Path]:
    """{method: folder of one of its runs} of a copy of committed runs."""
    shutil.copytree(REFERENCE / source, target / source)
    return {folder.name: next(folder.iterdir()) for folder in sorted((target / source).iterdir())}


def read(folder: Path) -> Record:
    record: Record = json.loads((folder / "record.json").read_text())
    return record


def write(folder: Path, record: Record) -> None:
    (folder / "record.json").write_text(json.dumps(record))


def made_current(runs: dict[str, Path], full: Path) -> None:
    """Give the records the intervals of today's rules, as a new run has them."""
    baseline = scores_of(read_rows(full, read(full)), read(full))
    for folder in runs.values():
        record = read(folder)
        write(folder, with_current_statistics(record, scores_of(read_rows(folder, record), record), baseline))


@pytest.fixture
def scored(tmp_path: Path) -> dict[str, Path]:
    return copied(SCORED, tmp_path)


@pytest.fixture
def timed(tmp_path: Path) -> dict[str, Path]:
    return copied(TIMED, tmp_path)


def output(results: Path, capsys: pytest.CaptureFixture[str], status: int) -> str:
    assert main([str(results)]) == status
    return capsys.readouterr().out


def test_committed_runs_agree(scored, tmp_path, capsys) -> None:
    copied(TIMED, tmp_path)
    shutil.copytree(REFERENCE / "family/recall/scratch/mqa", tmp_path / "family/recall/scratch/mqa")
    text = output(tmp_path, capsys, 0)
    assert text.splitlines() == [
        "11 records computed again: 2 from repetitions, 5 from samples, 4 from their loss",
        "49 intervals computed again: 49 percentile bootstrap",
        "all agree",
    ]


def test_intervals_of_today_are_computed_again_to_the_bit(scored, tmp_path) -> None:
    made_current(scored, scored["full"])
    found = verify(tmp_path)
    assert found.differing == [] and found.intervals == {"t": 15, "midp": 4, "percentile bootstrap": 30}
    for folder in scored.values():
        record, lines = read(folder), (folder / "samples.jsonl").read_text().split("\n")[:-1]
        assert has_current_intervals(record) and record["interval"] == {"method": "t", "level": 0.95, "resamples": None}
        (folder / "samples.jsonl").write_text("\n".join(reversed(lines)) + "\n")
        again = with_current_statistics(record, scores_of(read_rows(folder, record), record))
        for part in ("scores", "average", "averages"):
            assert again.get(part) == record.get(part)


def test_the_hash_is_the_one_that_runs_are_written_under(scored, tmp_path, capsys) -> None:
    record = read(scored["snapkv"])
    record["identity"]["seed"] = 7
    write(scored["snapkv"], record)
    text = output(tmp_path, capsys, 1)
    expected = identity_hash(record["identity"])
    assert f"hash is {record['hash']}: the identity gives {expected}" in text
    assert f"lies in a folder named {record['hash']}" in text


def edited(*keys: str, value: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        record = read(folder)
        part = record
        for key in keys[:-1]:
            part = part[key]
        part[keys[-1]] = value
        write(folder, record)

    return edit


def rows_edited(change: Callable[[list[str]], list[str]]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "samples.jsonl"
        lines = path.read_text().split("\n")[:-1]
        path.write_text("\n".join(change(lines)) + "\n")

    return edit


def with_field(line: str, **fields: Any) -> str:
    return json.dumps({**json.loads(line), **fields})


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (edited("average", "mean", value=99.0), "average.mean is 99: the samples give"),
        (edited("average", "mean", value=math.nan), "average.mean is nan: the samples give"),
        (edited("average", "mean", value=None), "average.mean is None: the samples give"),
        (edited("scores", "trec", "mean", value=1.0), "scores.trec.mean is 1: the samples give"),
        (edited("scores", "trec", "n", value=9), "scores.trec.n is 9: the samples give 8"),
        (edited("scores", "trec", value=None), "scores.trec is None, not a mapping"),
        (edited("paired", "difference", "mean", value=1.0), "paired.difference.mean is 1: the samples give"),
        (edited("bytes", "kv_ratio", value=0.5), "bytes.kv_ratio is 0.5: the samples give"),
        (edited("bytes", value={}), "bytes.kv_bytes_stored is missing: the samples give"),
        (edited("average", "high", value=1.0), "average has its mean"),
        (edited("data", "examples", value={"trec": 8}), "rows of"),
        (edited("data", value=None), "mapping"),
        (edited("schema", value=2), "has schema 2"),
        (rows_edited(lambda lines: lines[:-1]), "the record counts"),
        (rows_edited(lambda lines: [*lines, lines[0]]), "a second time"),
        (rows_edited(lambda lines: [lines[0][:40], *lines[1:]]), "samples.jsonl:1 is no row of an example"),
        (rows_edited(lambda lines: [with_field(lines[0], score=math.nan), *lines[1:]]), "has score=nan"),
        (rows_edited(lambda lines: [with_field(lines[0], score=0.123), *lines[1:]]), "average.mean is"),
        (rows_edited(lambda lines: [with_field(lines[0], kv_bytes_stored=1), *lines[1:]]), "bytes.kv_bytes_stored is"),
        (lambda folder: (folder / "samples.jsonl").unlink(), "samples.jsonl cannot be read"),
        (lambda folder: (folder / "record.json").write_text('{"a'), "is not JSON"),
        (lambda folder: folder.rename(folder.with_name("x")), "lies in a folder named x"),
    ],
)
def test_each_damage_is_named(edit, said, scored, tmp_path, capsys) -> None:
    edit(scored["snapkv"])
    text = output(tmp_path, capsys, 1)
    assert said in text
    assert all(line.startswith(f"differs: {scored['snapkv'].parent}/") for line in text.splitlines() if said in line)
    assert "5 records" in text or "4 records" in text, "the others are computed"


@pytest.mark.parametrize("is_current", [True, False])
@pytest.mark.parametrize("end", [("average", "low"), ("scores", "trec", "high"), ("paired", "difference", "low")])
def test_an_interval_that_was_edited_is_named(end, is_current, scored, tmp_path, capsys) -> None:
    """Those of older records were left out once, and the last line still said that all agree."""
    if is_current:
        made_current(scored, scored["full"])
    edited(*end, value=-99.0 if end[-1] == "low" else 99.0)(scored["snapkv"])
    assert f"{'.'.join(end)} is" in output(tmp_path, capsys, 1)


def test_a_baseline_that_is_elsewhere_is_a_note(scored, tmp_path, capsys) -> None:
    shutil.rmtree(scored["full"])
    text = output(tmp_path, capsys, 0)
    assert text.count("which is not here: not compared") == 4
    assert "4 intervals not computed again: 4 of differences to a run that is not here\n" in text
    assert text.endswith("what was computed again agrees\n")


def test_an_average_of_unnamed_data_sets_is_counted(scored, tmp_path, capsys) -> None:
    edited("averages", value={"English": read(scored["snapkv"])["average"]})(scored["snapkv"])
    text = output(tmp_path, capsys, 0)
    assert "1 intervals not computed again: 1 of averages whose data sets the record does not name\n" in text


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (edited("metrics", "tpot_ms", "median", value=1.0), "metrics.tpot_ms.median is 1: the repetitions give"),
        (edited("limit", "mbu", "max", value=1.0), "limit.mbu.max is 1: the repetitions give"),
        (edited("paired", "decode_speed_up", value=9.0), "paired.decode_speed_up is 9: the repetitions give"),
        (edited("metrics", value={}), "metrics.ttft_ms is missing"),
    ],
)
def test_damaged_times_are_named(edit, said, timed, tmp_path, capsys) -> None:
    edit(timed["snapkv"])
    assert said in output(tmp_path, capsys, 1)


def test_no_record_is_an_error(tmp_path, capsys) -> None:
    assert main([str(tmp_path)]) == 2
    assert "holds no finished run" in capsys.readouterr().err


@pytest.mark.slow
def test_all_committed_records_agree() -> None:
    found = verify(REFERENCE)
    assert found.differing == [] and found.notes == [] and not found.left_out
    assert found.intervals == {"percentile bootstrap": 2129, "midp": 2622, "t": 2152, "bounds": 151}
