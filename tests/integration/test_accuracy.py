"""The accuracy runner end to end, through the command line, on a tiny local model."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from contract_settings import marked_slow
from local_model import Done, kvbench, save_local_model, save_rows
from processes import start as start_process
from transformers import AutoModelForCausalLM

from kvbench.analysis.verify import verify
from kvbench.runners.command import main
from kvbench.runners.records import record
from kvbench.runners.records.record import RunFolder
from kvbench.tasks.longbench import LongBench
from kvbench.tasks.longbench_spec import SPECS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def short_answers() -> Iterator[None]:
    """Generation limits of 12 tokens instead of 32 and 64, in this process; each step costs as much as the last."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("hotpotqa", "lcc"):
            patch.setitem(SPECS, name, replace(SPECS[name], max_new_tokens=12))
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with ``model/`` and ``data/`` (hotpotqa and lcc, whose answers are the shortest)."""
    folder = tmp_path_factory.mktemp("world")
    save_local_model(folder / "model")
    save_rows(folder / "data", "hotpotqa", 6)
    save_rows(folder / "data", "lcc", 5)
    return folder


def settings(world: Path, results: Path, *overrides: str) -> list[str]:
    return [
        "model=local",
        f"model.path={world / 'model'}",
        "model.max_prompt_tokens=700",
        f"task.data_dir={world / 'data'}",
        f"results_dir={results}",
        "method=snapkv",
        "method.budget=40",
        *overrides,
    ]


def run(world: Path, results: Path, *overrides: str, status: int = 0) -> Done:
    done = kvbench("run", *settings(world, results, *overrides))
    assert done.returncode == status, done.stderr
    return done


def start(world: Path, results: Path, *overrides: str) -> ForkServerProcess:
    """The same in a process of its own, which can be killed; what it prints is in the file ``errors``."""
    results.mkdir(exist_ok=True)
    return start_process(main, ["run", *settings(world, results, *overrides)], output=results / "errors")


def stop_after(process: ForkServerProcess, results: Path, count: int, how: signal.Signals) -> Path:
    """Send a signal once ``count`` examples are on disk; returns SnapKV's samples.jsonl."""
    deadline = time.time() + 120
    while time.time() < deadline and process.is_alive():
        samples = list(results.glob("*/*/snapkv/*/samples.jsonl"))
        if samples and samples[0].read_bytes().count(b"\n") >= count:
            os.kill(process.pid, how)
            process.join(60)
            return samples[0]
        time.sleep(0.02)
    raise AssertionError(f"the run ended before it could be stopped: {(results / 'errors').read_text()}")


def folders(results: Path) -> dict[str, Path]:
    """{method label: run folder}."""
    return {json.loads(p.read_text())["method_label"]: p.parent for p in results.glob("*/*/*/*/record.json")}


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory) -> tuple[Path, str]:
    results = tmp_path_factory.mktemp("results")
    return results, run(world, results).stdout


def test_a_run_leaves_one_record_per_method_and_one_row_per_example(finished):
    results, _ = finished
    found = folders(results)
    assert set(found) == {"snapkv 40", "full"}
    for label, folder in found.items():
        samples = rows(folder)
        assert len(samples) == len({(r["dataset"], r["id"]) for r in samples}) == 11
        assert {r["method"] for r in samples} == {label}
        assert {p.name for p in folder.iterdir()} == {"record.json", "samples.jsonl", "sessions.jsonl"}


@pytest.mark.parametrize("size", [1, 4])
def test_what_kvzip_needs_is_the_first_line_and_its_forwards_are_in_rows_and_record(world, tmp_path, size):
    done = run(world, tmp_path, "method=kvzip", "task.datasets=[lcc]", f"batch_size={size}", "method.scorer.chunk=200")
    needs = "further forwards over the prompt, and a tokenizer for its request"
    assert (done.stdout + done.stderr).splitlines()[0] == f"kvzip 40: needs {needs}"
    kvzip, full = (folders(tmp_path)[label] for label in ("kvzip 40", "full"))
    made = json.loads((kvzip / "record.json").read_text())
    assert made["needs"] == needs
    samples = rows(kvzip)
    for row in samples:
        assert row["further_forwards"] == -(-(row["prompt_tokens"] - 4) // 200) > 1
        assert row["further_forward_tokens"] > row["prompt_tokens"]
    means = {
        "forwards_per_prompt": sum(row["further_forwards"] for row in samples) / len(samples),
        "tokens_per_prompt": sum(row["further_forward_tokens"] for row in samples) / len(samples),
    }
    assert made["further_forwards"] == pytest.approx(means)
    assert not verify(tmp_path).differing
    other = json.loads((full / "record.json").read_text())
    assert "needs" not in other and "further_forwards" not in other | rows(full)[0]
    made["further_forwards"]["tokens_per_prompt"] += 1
    (kvzip / "record.json").write_text(json.dumps(made))
    assert any("further_forwards.tokens_per_prompt" in line for line in verify(tmp_path).differing)


def test_bytes_are_measured_and_agree_with_the_formula(finished):
    """2 layers x 2 heads x 40 tokens x 16 channels x 2 (K and V) x 4 bytes."""
    results, _ = finished
    found = folders(results)
    for row in rows(found["snapkv 40"]):
        assert row["kv_bytes_stored"] == row["kv_bytes_formula"] == 2 * 2 * 40 * 16 * 2 * 4
        assert row["kv_bytes_stored_end"] > row["kv_bytes_stored"]
    for row in rows(found["full"]):
        assert row["kv_bytes_stored"] == row["kv_bytes_full"] == 2 * 2 * row["prompt_tokens"] * 16 * 2 * 4


def test_the_record_says_what_ran(finished):
    results, _ = finished
    record = json.loads((folders(results)["snapkv 40"] / "record.json").read_text())
    assert record["schema"] == 1
    assert record["status"] == "done"
    assert record["execution"] == "real"
    assert record["task"] == record["data"]["name"] == "longbench-subset"
    assert record["data"]["examples"] == {"lcc": 5, "hotpotqa": 6}
    assert all(len(digest) == 64 for digest in record["data"]["sha256"].values())
    assert record["identity"]["method"]["selection"]["budget"] == 40
    assert record["provenance"]["packages"]["torch"]
    assert record["provenance"]["hardware"]["device"] == "cpu"
    assert record["paired"]["with"] == "full"
    full = json.loads((folders(results)["full"] / "record.json").read_text())
    expected = record["average"]["mean"] - full["average"]["mean"]
    assert record["paired"]["difference"]["mean"] == pytest.approx(expected)
    assert set(record["scores"]) == {"hotpotqa", "lcc"}
    mean = sum(s["mean"] for s in record["scores"].values()) / 2
    assert record["average"]["mean"] == pytest.approx(mean)


def test_intervals_are_those_of_the_samples_to_the_bit(finished):
    results, _ = finished
    found = verify(results)
    assert found.differing == [] and found.notes == []
    assert found.counts == {"samples": 2}
    assert found.intervals.keys() <= {"t", "midp", "bounds"} and not found.left_out
    record = json.loads((folders(results)["snapkv 40"] / "record.json").read_text())
    assert record["interval"] == {"method": record["average"]["method"], "level": 0.95, "resamples": None}
    for name, estimate in (*record["scores"].items(), ("paired", record["paired"]["difference"])):
        assert estimate["low"] < estimate["high"], name
        assert estimate["method"] in ("t", "midp", "bounds")


def test_no_path_of_this_machine_is_recorded(finished, world):
    results, _ = finished
    for folder in folders(results).values():
        text = (folder / "record.json").read_text() + (folder / "samples.jsonl").read_text()
        assert str(world) not in text
        assert str(results) not in text


def test_the_closing_table_shows_what_the_records_hold(finished):
    results, out = finished
    record = json.loads((folders(results)["snapkv 40"] / "record.json").read_text())
    line = next(line for line in out.splitlines() if line.startswith("| snapkv 40"))
    assert f"{record['average']['mean']:.2f}" in line
    assert f"{100 * record['bytes']['kv_ratio_mean']:.1f} %" in line
    assert str(folders(results)["full"]) in out


def test_a_finished_run_is_not_run_again(finished, world):
    results, _ = finished
    before = {p: p.stat().st_mtime_ns for p in results.rglob("*.json*")}
    out = run(world, results).stdout
    assert out.count("already done") == 2
    assert "\nmodel: " not in out
    assert {p: p.stat().st_mtime_ns for p in results.rglob("*.json*")} == before


def test_another_budget_reuses_the_full_cache_of_the_first_run(finished, world):
    results, _ = finished
    out = run(world, results, "method.budget=50").stdout
    assert "full: already done" in out
    assert "paired" in json.loads((folders(results)["snapkv 50"] / "record.json").read_text())


def test_who_rides_along_and_how_prompts_are_batched_change_no_prediction(finished, world, tmp_path):
    """Alone, in a fan-out of four, in a padded batch of three and in chunks: the same text every time."""
    results, _ = finished
    expected = {(r["dataset"], r["id"]): r["prediction"] for r in rows(folders(results)["snapkv 40"])}
    for i, overrides in enumerate(
        (
            ["runner.pair_with=[]"],
            ["runner.budgets=[40,64,33]", "runner.pair_with=[full,'streaming_llm budget=50']"],
            ["batch_size=3"],
            ["runner.chunk_size=37"],
        )
    ):
        other = tmp_path / str(i)
        run(world, other, *overrides)
        found = {(r["dataset"], r["id"]): r["prediction"] for r in rows(folders(other)["snapkv 40"])}
        assert found == expected, overrides


def test_a_run_killed_in_the_middle_continues_at_the_right_example(world, tmp_path):
    """kill -9, a torn last line, and again: no example lost, none twice, the same scores as an undisturbed run."""
    data = tmp_path / "data"
    save_rows(data, "qasper", 6)
    overrides = [f"task.data_dir={data}"]
    undisturbed = tmp_path / "undisturbed"
    run(world, undisturbed, *overrides)

    results = tmp_path / "killed"
    process = start(world, results, *overrides)
    samples = stop_after(process, results, 3, signal.SIGKILL)
    assert process.exitcode == -signal.SIGKILL
    assert not list(results.glob("*/*/*/*/record.json"))
    with samples.open("ab") as file:
        file.write(b'{"dataset": "qasper", "id": "qasp')

    out = run(world, results, *overrides).stdout
    assert "continues after" in out
    for label, folder in folders(undisturbed).items():
        again = folders(results)[label]
        assert len(rows(again)) == 6
        key = lambda r: r["id"]  # noqa: E731
        assert sorted(rows(again), key=key) == sorted(rows(folder), key=key)
        ours, theirs = (json.loads((f / "record.json").read_text()) for f in (again, folder))
        assert ours["scores"] == theirs["scores"]
        assert ours["average"] == theirs["average"]


def test_interrupting_keeps_what_is_complete(world, tmp_path):
    data, results = tmp_path / "data", tmp_path / "results"
    save_rows(data, "qasper", 10)
    process = start(world, results, f"task.data_dir={data}")
    samples = stop_after(process, results, 3, signal.SIGINT)
    errors = (results / "errors").read_text()
    assert process.exitcode == 130
    assert "Traceback" not in errors
    assert "run the same command again" in errors
    assert len(rows(samples.parent)) >= 3


def test_a_second_process_on_the_same_run_waits_and_finds_it_done(world, tmp_path):
    """Jobs of a sweep share the run of the full cache: the later one waits for it and uses it."""
    results = tmp_path / "results"
    processes = [start(world, results, f"method.budget={budget}") for budget in (40, 50)]
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0], (results / "errors").read_text()
    found = folders(results)
    assert set(found) == {"snapkv 40", "snapkv 50", "full"}
    assert all(len(rows(folder)) == 11 for folder in found.values())
    for label in ("snapkv 40", "snapkv 50"):
        assert json.loads((found[label] / "record.json").read_text())["paired"]["hash"] == found["full"].name


def test_a_baseline_that_comes_later_still_gives_the_paired_difference(world, tmp_path):
    run(world, tmp_path, "runner.pair_with=[]")
    (alone,) = folders(tmp_path).values()
    assert "paired" not in json.loads((alone / "record.json").read_text())
    run(world, tmp_path)
    record = json.loads((alone / "record.json").read_text())
    assert record["paired"]["hash"] == folders(tmp_path)["full"].name
    assert len(rows(alone)) == 11


def test_a_padded_batch_has_a_run_of_its_own_and_says_what_padding_costs(world, tmp_path):
    run(world, tmp_path, "runner.pair_with=[]", "method=full")
    run(world, tmp_path, "runner.pair_with=[]", "method=full", "batch_size=3")
    by_size = {json.loads(p.read_text())["batch_size"]: p.parent for p in tmp_path.rglob("record.json")}
    single, padded = by_size[1], by_size[3]
    assert sum(r["kv_bytes_stored"] for r in rows(single)) == sum(r["kv_bytes_formula"] for r in rows(single))
    assert sum(r["kv_bytes_stored"] for r in rows(padded)) > sum(r["kv_bytes_formula"] for r in rows(padded))
    assert abs(sum(r["kv_bytes_logical"] for r in rows(padded)) - sum(r["kv_bytes_formula"] for r in rows(padded))) < 11


def test_running_out_of_memory_is_a_result_and_the_run_can_be_tried_again(world, tmp_path, monkeypatch):
    from kvbench.runners import evaluate_batch

    real, calls = evaluate_batch.generate, []

    def greedy_for_memory(*args, **kwargs):
        calls.append(1)
        if len(calls) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        return real(*args, **kwargs)

    monkeypatch.setattr(evaluate_batch, "generate", greedy_for_memory)
    out = run(world, tmp_path).stdout
    assert "out of memory" in out
    for folder in folders(tmp_path).values():
        record = json.loads((folder / "record.json").read_text())
        assert (record["status"], record["examples_done"]) == ("oom", 3)
        assert "scores" not in record
    monkeypatch.undo()
    out = run(world, tmp_path).stdout
    assert "continues after 3 of 11" in out
    for folder in folders(tmp_path).values():
        assert json.loads((folder / "record.json").read_text())["status"] == "done"
        assert len(rows(folder)) == 11


def test_a_method_that_fits_is_not_lost_to_a_baseline_that_does_not(world, tmp_path, monkeypatch):
    """The very case that a compressed cache is for: together and full are too much, SnapKV alone is not."""
    from kvbench.runners import evaluate_batch

    real = evaluate_batch.generate

    def room_for_the_compressed_one(model, cache, *args, **kwargs):
        members = getattr(cache, "members", [cache])
        if any(m.layers[0].policy.capabilities.keeps_everything for m in members):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        return real(model, cache, *args, **kwargs)

    monkeypatch.setattr(evaluate_batch, "generate", room_for_the_compressed_one)
    out = run(world, tmp_path).stdout
    found = folders(tmp_path)
    records = {label: json.loads((folder / "record.json").read_text()) for label, folder in found.items()}
    assert records["snapkv 40"]["status"] == "done"
    assert len(rows(found["snapkv 40"])) == 11
    assert "paired" not in records["snapkv 40"]
    assert (records["full"]["status"], records["full"]["examples_done"]) == ("oom", 0)
    assert "full: out of memory after 0 examples" in out
    assert "runner.chunk_size" in out


def test_what_reads_by_itself_rides_along_until_memory_runs_out(world, tmp_path, monkeypatch):
    """Together with all others; where that is too much, those that read the prompt alike still go together."""
    from kvbench.runners import evaluate_batch

    real, asked = evaluate_batch.generate, []

    def room_for_two(model, cache, *args, **kwargs):
        asked.append(cache.copies)
        if asked[-1] > room[0]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        return real(model, cache, *args, **kwargs)

    monkeypatch.setattr(evaluate_batch, "generate", room_for_two)
    pairs = 'runner.pair_with=[full,"streaming_llm budget=40"]'
    answers = []
    for room in ([3], [2]):
        results = tmp_path / str(room[0])
        run(world, results, pairs, "task.datasets=[lcc]")
        answers.append({label: [r["prediction"] for r in rows(folder)] for label, folder in folders(results).items()})
    assert set(answers[0]) == {"snapkv 40", "full", "streaming_llm 40"}
    assert answers[0] == answers[1]
    assert asked == [3] * 5 + [3, 2, 1] * 5


def test_a_resumed_run_lists_the_code_of_every_session(world, tmp_path):
    run(world, tmp_path, "task.datasets=[lcc]")
    folder = folders(tmp_path)["snapkv 40"]
    (folder / "record.json").unlink()
    samples = (folder / "samples.jsonl").read_text().splitlines(keepends=True)
    (folder / "samples.jsonl").write_text("".join(samples[:2]))
    sessions = (folder / "sessions.jsonl").read_text().replace('"sha": "', '"sha": "0123')
    (folder / "sessions.jsonl").write_text(sessions)
    out = run(world, tmp_path, "task.datasets=[lcc]").stdout
    record = json.loads((folder / "record.json").read_text())
    assert [session["after_examples"] for session in record["sessions"]] == [0, 2]
    if record["provenance"]["git"]["sha"]:
        assert "made by other code" in out


def by_example(folder: Path) -> dict[tuple[str, str], dict]:
    return {(row["dataset"], row["id"]): row for row in rows(folder)}


def test_rows_of_runs_on_fewer_examples_are_reused(world, tmp_path, monkeypatch):
    """Three of six questions, then two of five programs, then five of each: only five are asked, and it is one run."""
    from kvbench.runners import scoring

    asked: list[str] = []
    real = scoring.evaluate_batch

    def count(methods, batch, *rest):
        asked.extend(item.example.dataset for item in batch)
        return real(methods, batch, *rest)

    run(world, tmp_path / "parts", "task.datasets=[hotpotqa]", "task.limit=3")
    run(world, tmp_path / "parts", "task.datasets=[lcc]", "task.limit=2")
    parts = {path.parent.name for path in (tmp_path / "parts").glob("*/*/snapkv/*/record.json")}
    monkeypatch.setattr(scoring, "evaluate_batch", count)
    whole = ("task.datasets=[lcc,hotpotqa]", "task.limit=5")
    out = run(world, tmp_path / "parts", *whole, "runner.reuse=true").stdout
    assert asked == ["lcc"] * 3 + ["hotpotqa"] * 2
    assert out.count("3 examples from") == out.count("2 examples from") == 2  # snapkv and full
    run(world, tmp_path / "alone", *whole)

    hash_ = folders(tmp_path / "alone")["snapkv 40"].name
    joined, alone = (next((tmp_path / where).glob(f"*/*/snapkv/{hash_}")) for where in ("parts", "alone"))
    assert by_example(joined) == by_example(alone)
    records = [json.loads((folder / "record.json").read_text()) for folder in (joined, alone)]
    for key in ("scores", "average", "bytes", "prompt_tokens", "paired", "data", "identity"):
        assert records[0][key] == records[1][key], key
    sessions = records[0]["sessions"]
    assert {session.get("reused") for session in sessions} == {*parts, None}
    assert sorted(session["after_examples"] for session in sessions)[0] == 0 and sessions[-1]["after_examples"] == 5


@pytest.mark.parametrize(("newest", "taken"), [(2, [2, 1]), (3, [3])])
def test_of_two_runs_the_newest_gives_its_rows(world, tmp_path, newest, taken):
    for limit in (2, 3):
        run(world, tmp_path, "task.datasets=[hotpotqa]", f"task.limit={limit}", "runner.pair_with=[]")
    for path in tmp_path.glob("*/*/snapkv/*/record.json"):
        record = json.loads(path.read_text())
        record["finished"] = f"20{20 + (record['data']['examples']['hotpotqa'] == newest)}-01-01T00:00:00Z"
        path.write_text(json.dumps(record))
    whole = ("task.datasets=[hotpotqa]", "task.limit=4", "runner.pair_with=[]", "runner.reuse=true")
    out = run(world, tmp_path, *whole).stdout
    assert [int(n) for n in re.findall(r"(\d) examples from", out)] == taken


@pytest.mark.parametrize("change", ["task.max_length=300", "method.budget=41", "seed=1", "task.data_dir={other}"])
def test_rows_of_another_setting_or_of_other_data_are_not_reused(world, tmp_path, change):
    save_rows(tmp_path / "data", "hotpotqa", 7)  # one row more: other bytes
    run(world, tmp_path / "results", "task.datasets=[hotpotqa]", "task.limit=3", "runner.pair_with=[]")
    further = ["task.limit=4", "runner.reuse=true", change.format(other=tmp_path / "data")]
    out = run(world, tmp_path / "results", "task.datasets=[hotpotqa]", "runner.pair_with=[]", *further).stdout
    assert "examples from" not in out
    newest = max(tmp_path.glob("results/*/*/snapkv/*/record.json"), key=lambda path: path.stat().st_mtime_ns)
    assert len(json.loads(newest.read_text())["sessions"]) == 1


def test_runs_under_another_rule_for_equal_scores_are_neither_reused_nor_taken_as_done(world, tmp_path):
    """A record from before there was a rule has no ``ties``; the full cache ranks nothing, and its rows are taken."""
    from kvbench.runners.records.record import identity_hash

    part = ("task.datasets=[hotpotqa]", "task.limit=2")
    run(world, tmp_path, *part)
    (old,) = tmp_path.glob("*/*/snapkv/*")
    record = json.loads((old / "record.json").read_text())
    assert record["identity"]["method"]["selection"].pop("ties") == "score, unpooled score, index"
    record["hash"] = identity_hash(record["identity"])
    (old / "record.json").write_text(json.dumps(record))
    old = old.rename(old.with_name(record["hash"]))
    out = run(world, tmp_path, "task.datasets=[hotpotqa]", "task.limit=3", "runner.reuse=true").stdout
    assert re.findall(r"(\w+)(?: \d+)?: (\d) examples from", out) == [("full", "2")]
    again = run(world, tmp_path, *part).stdout
    assert "full: already done" in again and "snapkv 40: already done" not in again
    assert len(list(tmp_path.glob("*/*/snapkv/*/record.json"))) == 3


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["runner.reuse=yes please"], ["runner.reuse", "yes please", "true or false"]),
        (["runner.reuse=true", "batch_size=2"], ["runner.reuse", "batch_size > 1"]),
    ],
)
def test_reuse_that_cannot_be_is_one_line(world, tmp_path, overrides, words):
    error = run(world, tmp_path, *overrides, status=2).stderr.strip()
    assert len(error.splitlines()) == 1 and all(word in error for word in words)


@pytest.mark.parametrize("full", ["samples.jsonl", "record.json.partial"])
def test_a_full_disk_is_one_line_and_the_run_continues_later(world, tmp_path, monkeypatch, full):
    """The device that is always full stands in for a full disk."""
    from kvbench.conf.errors import InputError
    from kvbench.runners.records.record import RunFolder

    folder = RunFolder(tmp_path, "task", "model", "method", {"a": 1})
    with folder:
        folder.append({"dataset": "d", "id": "1"})
        kept = (folder.path / "samples.jsonl").read_bytes()
        real_open = Path.open

        def open_full(self, *args, **kwargs):
            return (
                real_open(Path("/dev/full"), *args, **kwargs) if self.name == full else real_open(self, *args, **kwargs)
            )

        monkeypatch.setattr(Path, "open", open_full)
        with pytest.raises(InputError, match="disk is full"):
            folder.append({"id": "2"}) if full == "samples.jsonl" else folder.finish({"status": "done"})
        monkeypatch.undo()
        assert (folder.path / "samples.jsonl").read_bytes() == kept
        assert not folder.done


def test_a_question_after_compression_is_another_task_with_the_same_prompts(world, finished, tmp_path):
    out = run(world, tmp_path, "runner.question=after_compression", "task.datasets=[lcc]").stdout
    assert "longbench-subset-agnostic" in out
    ours, whole = folders(tmp_path), folders(finished[0])
    assert {p.relative_to(tmp_path).parts[0] for p in ours.values()} == {"longbench-subset-agnostic"}
    predictions = {}
    for label in ours:
        before = {r["id"]: r for r in rows(whole[label]) if r["dataset"] == "lcc"}
        for row in rows(ours[label]):
            asked_whole = before[row["id"]]
            assert row["prompt_tokens"] == asked_whole["prompt_tokens"]
            assert row["question_tokens"] == len("Next line of code:\n")  # a token is a byte here
            read = row["prompt_tokens"] - row["question_tokens"]
            assert row["kv_bytes_full"] == asked_whole["kv_bytes_full"] * read // row["prompt_tokens"]
            held = row["kv_bytes_full"] if label == "full" else asked_whole["kv_bytes_stored"]
            assert row["kv_bytes_stored"] == row["kv_bytes_formula"] == held
            predictions.setdefault(label, []).append(row["prediction"] == asked_whole["prediction"])
    assert all(predictions["full"])
    assert not all(predictions["snapkv 40"])


def test_finch_takes_the_length_of_the_question_from_the_task(world, tmp_path):
    """With the question in the prompt, as with a window of its length; after compression, as with the window."""
    asked = len("Next line of code:\n")  # a token is a byte here
    for question, window, other in (("with_context", asked, 32), ("after_compression", 32, asked)):
        texts = ["finch", *(f"finch scorer.question=false scorer.window={w}" for w in (window, other))]
        results, entries = tmp_path / question, [f"{text} budget=40" for text in texts[1:]]
        given = ("method=finch", f"runner.pair_with={json.dumps(entries)}", f"runner.question={question}")
        run(world, results, *given, "task.datasets=[lcc]")
        predictions = {}
        for path in results.glob("*/*/finch/*/record.json"):
            selection = json.loads(path.read_text())["identity"]["method"]["selection"]
            key = "question" if selection.get("question") else selection["window"]
            predictions[key] = [row["prediction"] for row in rows(path.parent)]
        assert set(predictions) == {"question", asked, 32}
        assert predictions["question"] == predictions[window] != predictions[other]


def test_a_prompt_whose_question_was_cut_off_cannot_be_asked_after_compression(world, tmp_path):
    done = run(world, tmp_path, "runner.question=after_compression", "task.max_length=30", status=2)
    assert "runner.question=after_compression: needs a prompt with a context and a question" in done.stderr
    done = run(world, tmp_path, "runner.question=later", status=2)
    assert "runner.question=later: must be one of after_compression, with_context" in done.stderr


# --- damaged runs ----------------------------------------------------------------------------------------------------


def run_full(world: Path, results: Path, status: int = 0) -> Done:
    """The full cache alone, on six examples."""
    given = [o for o in settings(world, results) if not o.startswith("method")]
    done = kvbench("run", *given, "method=full", "runner.pair_with=[]", "task.datasets=[hotpotqa]")
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_the_bytes_over_the_steps_are_added_to_runs_that_lack_them(world, finished, tmp_path, monkeypatch, capsys):
    """To what the runner writes itself; a run whose bytes are other ones by formula is left as it is."""
    spec = importlib.util.spec_from_file_location("add_step_bytes", ROOT / "scripts/add_step_bytes.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    made, older = finished[0], tmp_path / "older"
    shutil.copytree(made, older)
    model = AutoModelForCausalLM.from_pretrained(str(world / "model"))
    monkeypatch.setattr(script, "MODEL", "model")
    monkeypatch.setattr(script, "loaded", lambda dtype: model)
    for folder in folders(older).values():
        record = json.loads((folder / "record.json").read_text())
        for key in ("kv_bytes_mean", "kv_bytes_read_mean", "kv_bytes_full_mean", "kv_ratio_mean"):
            del record["bytes"][key]
        (folder / "record.json").write_text(json.dumps(record))
        wrong = 1 if record["method_label"] == "full" else 0
        kept = [{k: v for k, v in row.items() if not k.endswith("_mean")} for row in rows(folder)]
        kept[0]["kv_bytes_formula"] += wrong
        (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    script.main([str(older)])
    assert "full has other bytes by formula today\n" in capsys.readouterr().out
    one, other = (folders(place)["snapkv 40"] for place in (made, older))
    assert rows(one) == rows(other)
    assert json.loads((one / "record.json").read_text()) == json.loads((other / "record.json").read_text())


@pytest.fixture(scope="module")
def six_rows(world, tmp_path_factory) -> Path:
    results = tmp_path_factory.mktemp("six")
    run_full(world, results)
    return results


@pytest.fixture
def again(six_rows, tmp_path) -> Path:
    """A copy of the finished run's results folder."""
    return Path(shutil.copytree(six_rows, tmp_path / "again"))


def change(row: str, **keys: object) -> bytes:
    return (json.dumps(json.loads(row) | keys) + "\n").encode()


def without(row: str, key: str) -> bytes:
    return (json.dumps({k: v for k, v in json.loads(row).items() if k != key}) + "\n").encode()


DAMAGED_ROWS: dict[str, tuple[Callable[[str], bytes], str]] = {
    "no UTF-8": (lambda row: row.encode().replace(b"hotpotqa", b"hotpot\xffqa", 1) + b"\n", "no JSON object"),
    "no object": (lambda row: b"[1]\n", "no JSON object"),
    "zeros": (lambda row: b"\0" * 64 + b"\n", "no JSON object"),
    "blank": (lambda row: b"\n", "no JSON object"),
    "nested": (lambda row: b"[" * 100_000 + b"\n", "no JSON object"),
    "digits": (lambda row: b'{"score": ' + b"9" * 5000 + b"}\n", "no JSON object"),
    "no dataset": (lambda row: without(row, "dataset"), "lacks dataset"),
    "no score": (lambda row: without(row, "score"), "lacks score"),
    "no bytes": (lambda row: without(row, "kv_bytes_formula"), "lacks kv_bytes_formula"),
    "id is a number": (lambda row: change(row, id=5), "an id that is no text"),
    "score is a text": (lambda row: change(row, score="1"), "has score='1'"),
    "score is NaN": (lambda row: change(row, score=float("nan")), "has score=nan"),
    "score of 7": (lambda row: change(row, score=7.0), "has score=7.0, which is no share of 1"),
    "score below 0": (lambda row: change(row, score=-0.5), "has score=-0.5"),
    "bytes are true": (lambda row: change(row, kv_bytes_stored=True), "has kv_bytes_stored=True"),
    "another method": (lambda row: change(row, method="snapkv 40"), "is of snapkv 40, not of full"),
    "unknown example": (lambda row: change(row, id="hotpotqa-99"), "hotpotqa/hotpotqa-99: is no example of this run"),
    "a second score": (lambda row: f"{row}\n".encode() + change(row, score=1.0), "has another row before this one"),
}


SAME_CHECK = {"zeros", "nested", "digits", "no score", "no bytes", "score is NaN", "score below 0", "bytes are true"}


@pytest.mark.parametrize(
    ("name", "finished"),
    [*marked_slow(DAMAGED_ROWS, SAME_CHECK, True), *marked_slow(("no object", "blank", "unknown example"), (), False)],
)
def test_a_damaged_row_is_named_by_file_and_line(world, again, name, finished):
    damage, said = DAMAGED_ROWS[name]
    (folder,) = folders(again).values()
    lines = (folder / "samples.jsonl").read_text().splitlines()
    written = damage(lines[2])
    (folder / "samples.jsonl").write_bytes(
        "".join(f"{line}\n" for line in lines[:2]).encode() + written + "".join(f"{x}\n" for x in lines[3:]).encode()
    )
    if not finished:
        (folder / "record.json").unlink()
    errors = [line for line in run_full(world, again, status=2).stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert f"samples.jsonl:{2 + written.count(b'%c' % 10)}=" in errors[0]
    assert said in errors[0]
    assert "delete the line" in errors[0]


@pytest.mark.parametrize(
    "left", marked_slow(["half a row", "no file", "a row twice", "", "two rows"], {"", "two rows"})
)
def test_a_finished_run_that_has_lost_rows_is_completed(world, again, left):
    (folder,) = folders(again).values()
    before, record = rows(folder), json.loads((folder / "record.json").read_text())
    samples = folder / "samples.jsonl"
    lines = samples.read_bytes().splitlines(keepends=True)
    if left == "no file":
        samples.unlink()
    else:
        kept = {"": [], "half a row": [*lines[:3], lines[3][:40]], "two rows": lines[:2], "a row twice": lines[:1] * 6}
        samples.write_bytes(b"".join(kept[left]))
    out = run_full(world, again).stdout
    lost = {"": 6, "half a row": 3, "two rows": 4, "no file": 6, "a row twice": 5}[left]
    assert f"{samples} is damaged: it lacks {lost} rows" in out
    assert "already done" not in out
    key = lambda r: r["id"]  # noqa: E731
    assert sorted({r["id"]: r for r in rows(folder)}.values(), key=key) == sorted(before, key=key)
    assert json.loads((folder / "record.json").read_text())["scores"] == record["scores"]
    assert "already done" in run_full(world, again).stdout


def test_a_new_method_beside_a_full_cache_that_has_lost_rows(world, again):
    (folder,) = folders(again).values()
    (folder / "samples.jsonl").write_bytes((folder / "samples.jsonl").read_bytes()[:1000])
    run(world, again, "task.datasets=[hotpotqa]")
    assert "paired" in json.loads((folders(again)["snapkv 40"] / "record.json").read_text())
    assert len(rows(folder)) == 6


def test_an_identical_second_row_is_harmless(world, again):
    (folder,) = folders(again).values()
    lines = (folder / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "samples.jsonl").write_bytes(b"".join([*lines, lines[1]]))
    assert "already done" in run_full(world, again).stdout


def test_a_cut_last_line_is_not_cut_off_a_run_that_another_process_may_be_writing(six_rows, again):
    (folder,) = folders(again).values()
    identity = json.loads((folder / "record.json").read_text())["identity"]
    opened = RunFolder(again, folder.parents[2].name, folder.parents[1].name, folder.parent.name, identity)
    assert opened.path == folder
    with (folder / "samples.jsonl").open("ab") as file:
        file.write(b'{"data')
    assert len(opened.samples()) == 6
    assert (folder / "samples.jsonl").read_bytes().endswith(b'{"data')
    with opened:
        assert len(opened.samples()) == 6
    assert (folder / "samples.jsonl").read_bytes().endswith(b"}\n")


def test_damaged_sessions_are_named_by_file_and_line(world, again):
    (folder,) = folders(again).values()
    (folder / "record.json").unlink()
    (folder / "sessions.jsonl").write_text('{"after_examples": 0}\n')
    assert "sessions.jsonl:1=" in run_full(world, again, status=2).stderr


def test_files_without_the_right_to_read_them_are_one_line(world, again, monkeypatch):
    (folder,) = folders(again).values()
    (folder / "samples.jsonl").unlink()
    (folder / "samples.jsonl").mkdir()
    assert "samples.jsonl: cannot be read" in run_full(world, again, status=2).stderr
    monkeypatch.setattr(record, "read_record", Mock(side_effect=PermissionError(13, "Permission denied")))
    assert "record.json: cannot be read: Permission denied" in run_full(world, again, status=2).stderr


# --- prompts that cannot be asked -------------------------------------------------------------------------------------


def test_a_prompt_of_no_tokens_is_one_line(world, tmp_path, monkeypatch):
    monkeypatch.setattr(LongBench, "encode", lambda *_: [])
    said = run(world, tmp_path, "task.datasets=[hotpotqa]", status=2).stderr
    assert "error: task=longbench: hotpotqa/hotpotqa-0 is a prompt of no tokens" in said


def test_a_token_without_an_embedding_is_one_line(world, tmp_path, monkeypatch):
    monkeypatch.setattr(LongBench, "encode", lambda *_: [5, 400, 7])
    said = run(world, tmp_path, "task.datasets=[hotpotqa]", status=2).stderr
    error = "its tokenizer encodes hotpotqa/hotpotqa-0 with token 400, but its embedding has only 258 rows"
    assert f"error: model=model: {error}" in said, "named by its folder"


BAD_TEMPLATES = {
    "syntax": "{{ messages",
    "unknown name": "{{ nothing.of.this }}",
    "sandbox": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "raises": "{{ raise_exception('no') }}",
    "wrong type": "{{ messages + 1 }}",
}


@pytest.mark.parametrize("name", marked_slow(BAD_TEMPLATES, {"unknown name", "raises", "wrong type"}))
def test_a_bad_chat_template_is_one_line(world, tmp_path, name):
    folder = Path(shutil.copytree(world / "model", tmp_path / "model"))
    (folder / "chat_template.jinja").write_text(BAD_TEMPLATES[name])
    run_it = [*settings(world, tmp_path / "results", "task.datasets=[hotpotqa]"), f"model.path={folder}"]
    done = kvbench("run", *run_it)
    assert done.returncode == 2
    assert "error: model.chat_template=" in done.stderr
    assert "Traceback" not in done.stderr
