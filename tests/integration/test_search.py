"""The largest size that fits: the search by itself, against a limit that is known, and through a process that dies."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass

import pytest
import torch
from local_model import kvbench

from kvbench.conf.errors import InputError
from kvbench.methods.cache.method import Method
from kvbench.models.random import RandomModel
from kvbench.runners.measure.job import Job
from kvbench.runners.search import SearchJob, largest, outcomes, search
from kvbench.tasks.max_batch import MaxBatch
from kvbench.tasks.max_context import MaxContext


@pytest.mark.parametrize("start", [1, 3, 8, 64])
@pytest.mark.parametrize("most", [None, 1, 7, 40])
@pytest.mark.parametrize("step", [1, 4])
def test_every_limit_is_found_exactly_and_no_size_is_tried_twice(start, most, step):
    start = max(start, step)
    for limit in range(150):
        asked = []

        def fits(size, limit=limit, asked=asked):
            asked.append(size)
            return size <= limit

        allowed = limit if most is None else min(limit, most)
        expected = allowed // step * step or None
        assert largest(fits, start, most, step, 0.0) == expected
        assert len(set(asked)) == len(asked) and all(size % step == 0 for size in asked)
        assert most is None or all(size <= most for size in asked)


@pytest.mark.parametrize("tolerance", [0.02, 0.25])
def test_a_tolerance_saves_questions_and_keeps_its_word(tolerance):
    for limit in range(1, 5000, 37):
        asked = []

        def fits(size, limit=limit, asked=asked):
            asked.append(size)
            return size <= limit

        found = largest(fits, 8, None, 1, tolerance)
        assert limit / (1 + tolerance) - 1 <= found <= limit
        assert len(asked) <= 4 + limit.bit_length() + 1 / tolerance


@dataclass
class Ends(MaxBatch):
    """A machine with room for a number of sequences, which says so in one way or kills."""

    room: int = 11
    kills: bool = False

    def at(self, value, batch_size):
        if value > self.room:
            if self.kills:
                os.kill(os.getpid(), signal.SIGKILL)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        return super().at(value, batch_size)


def job(method: Method) -> Job:
    return Job(RandomModel("tiny"), method, None, "cpu", torch.float32, 0, 1, None, 0, 1)


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("kills", [False, True])
def test_the_search_survives_what_ends_a_process(tmp_path, kills):
    wanted = Ends(prompt_tokens=5, new_tokens=2, start=4, tolerance=0.0, kills=kills)
    todo = SearchJob(job(Method("full")), wanted, None, tmp_path / "tried")
    found = search(todo)
    assert (found["largest"], found["stopped_by"]) == (11, "memory")
    problems = {t["value"]: t["problem"] for t in found["tried"]}
    assert [v for v, p in problems.items() if p] == [12, 16]
    assert ("killed" in problems[12]) == kills and ("CUDA out of memory" in problems[16]) != kills


@pytest.mark.usefixtures("forked")
def test_a_search_that_was_cut_off_goes_on_and_asks_again_what_it_was_asking(tmp_path):
    """Sizes that are known are not tried again; the one under way when the machine went away says nothing."""
    log = tmp_path / "tried"
    known = {"value": 4, "fits": True, "peak_bytes": 1, "problem": None}
    log.write_text(json.dumps({"began": 4}) + "\n" + json.dumps(known) + "\n" + '{"began": 8}\n{"val')
    assert outcomes(log) == {4: known}
    wanted = Ends(prompt_tokens=5, new_tokens=2, start=4, tolerance=0.0)
    found = search(SearchJob(job(Method("full")), wanted, None, log))
    assert found["largest"] == 11
    tried = {t["value"]: t for t in found["tried"]}
    assert tried[4] == known
    assert tried[8]["fits"] and tried[8]["peak_bytes"] > 1
    assert "began" not in log.read_text().splitlines()[0]


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_the_largest_batch_is_what_the_bytes_say(tmp_path):
    """A limit on the whole process: what the cache of one sequence takes decides how many there are.

    On the tiny shape 2000 tokens are 2000 x 1024 bytes; beside them a sequence takes activations in prefill, the same
    for every method, so the limit is far above the first sizes and the peak is compared size by size.
    """
    wanted = MaxBatch(prompt_tokens=2000, new_tokens=4, start=4, tolerance=0.0)
    free = search(SearchJob(job(Method("full")), MaxBatch(2000, 4, start=4, most=4), None, tmp_path / "free"))
    (four,) = (t["peak_bytes"] for t in free["tried"])
    limit = four + 40 * 2**20
    found = search(SearchJob(job(Method("full")), wanted, limit, tmp_path / "tried"))
    peaks = {t["value"]: t["peak_bytes"] for t in found["tried"]}
    size = found["largest"]
    assert peaks[size] <= limit < peaks[size + 1]
    a_sequence = (peaks[size] - four) / (size - 4)
    assert a_sequence >= 2000 * 1024  # at least its cache


@pytest.mark.usefixtures("forked")
def test_the_longest_prompt_ends_with_the_positions(tmp_path):
    found = search(SearchJob(job(Method("full")), MaxContext(new_tokens=8, start=512), None, tmp_path / "tried"))
    assert (found["largest"], found["stopped_by"]) == ((2048 - 8) // 256 * 256, "positions")


@pytest.mark.usefixtures("forked")
@pytest.mark.slow
def test_a_run_of_a_search_is_measured_at_its_largest_size_and_compared(tmp_path):
    command = ("workload=max_batch", "workload.prompt_tokens=200", "workload.new_tokens=4")
    command += ("workload.most=3", "workload.start=2")
    rest = ("runner=efficiency", "runner.repeats=2", "model=random", "model.shape=tiny", "device=cpu")
    done = kvbench("run", "method=snapkv", "method.budget=64", *command, *rest, f"results_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    records = {r["method"]: r for r in (json.loads(p.read_text()) for p in tmp_path.rglob("record.json"))}
    for record in records.values():
        assert record["search"]["largest"] == record["search"]["measured_at"] == record["batch_size"] == 3
        assert record["search"]["stopped_by"] == "most"
        assert record["workload"]["batches"][0]["requests"] == record["bytes"]["requests"] == 3
    ratio = [records[m]["metrics"]["output_tokens_per_s"]["median"] for m in ("snapkv", "full")]
    assert records["snapkv"]["paired"]["output_tokens_per_s_ratio"] == ratio[0] / ratio[1]
    assert records["snapkv"]["paired"]["largest_ratio"] == 1
    assert "largest batch" in done.stdout and "batch None" not in done.stdout


@pytest.mark.usefixtures("forked")
def test_a_run_that_is_cut_off_while_it_is_timed_searches_no_more(tmp_path, monkeypatch):
    from kvbench.runners import efficiency
    from kvbench.runners.measure.passes import Passes

    command = ("workload=max_batch", "workload.prompt_tokens=40", "workload.new_tokens=4")
    command += ("workload.most=2", "workload.start=2")
    rest = ("runner=efficiency", "runner.repeats=1", "model=random", "model.shape=tiny", "device=cpu")
    arguments = ("run", "method=full", *command, *rest, f"results_dir={tmp_path}", "runner.pair_with=[]")
    real = Passes.measure

    def cut_off(self, job):
        raise KeyboardInterrupt

    monkeypatch.setattr(Passes, "measure", cut_off)
    assert kvbench(*arguments).returncode != 0
    (log,) = tmp_path.rglob(efficiency.TRIED_SIZES)
    tried = log.read_text()
    assert '"value": 2' in tried
    during = []
    monkeypatch.setattr(Passes, "measure", lambda self, job: during.append(log.read_text()) or real(self, job))
    done = kvbench(*arguments)
    assert done.returncode == 0, done.stderr
    assert during == [tried.splitlines(keepends=True)[-1]]  # with the same peak to the byte: it was not tried again
    assert not log.exists()
    (record,) = (json.loads(p.read_text()) for p in tmp_path.rglob("record.json"))
    assert record["search"]["largest"] == record["search"]["measured_at"] == 2


@pytest.mark.usefixtures("forked")
def test_nothing_fits_is_out_of_memory_and_no_crash(tmp_path):
    command = ("workload=max_context", "workload.start=512", "runner.memory_limit_gib=0.01", "runner.pair_with=[]")
    rest = ("runner=efficiency", "runner.repeats=1", "model=random", "model.shape=tiny", "device=cpu")
    done = kvbench("run", "method=full", *command, *rest, f"results_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    (record,) = (json.loads(p.read_text()) for p in tmp_path.rglob("record.json"))
    assert (record["status"], record["problem"]) == ("oom", "not even prompt_tokens=256 fits")


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: MaxBatch(step=0), r"workload\.step=0"),
        (lambda: MaxBatch(start=0), r"workload\.start=0"),
        (lambda: MaxContext(start=100), r"workload\.start=100: must be at least workload\.step=256"),
        (lambda: MaxContext(most=100), r"workload\.most=100"),
        (lambda: MaxBatch(tolerance=1), r"workload\.tolerance=1"),
        (lambda: MaxBatch(new_tokens=1), r"workload\.new_tokens=1"),
    ],
)
def test_bad_settings_are_refused(made, said):
    with pytest.raises(InputError, match=said):
        made()


def test_a_memory_limit_is_for_searches_alone(tmp_path):
    done = kvbench("run", "runner=efficiency", "runner.memory_limit_gib=1", "model=random", f"results_dir={tmp_path}")
    assert done.returncode == 2
    assert "runner.memory_limit_gib=1: is for workload=max_batch and max_context" in done.stderr
