"""Jobs that share a run: who does it, who waits, and that nobody waits for nothing."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvbench.runners.record import RunFolder
from kvbench.runners.runs import in_turns


@dataclass
class Run:
    name: str
    folder: RunFolder


def job(root: Path, names: tuple[str, ...], log: list, seconds: float = 0.3, fail: tuple[str, ...] = ()) -> None:
    """Do these runs as a job of a sweep would: each takes a while and leaves a record."""
    runs = [Run(name, RunFolder(root, "task", "model", name, {"name": name})) for name in names]

    def work(mine: list[Run]) -> None:
        for run in mine:
            if run.folder.done:
                log.append(("read", run.name, names[0]))
                continue
            start = time.monotonic()
            time.sleep(seconds)
            if run.name in fail:
                raise RuntimeError(run.name)
            fields = ("kind", "hash", "identity", "task", "model", "method", "method_label", "budget", "data")
            run.folder.finish(
                dict.fromkeys(fields, "") | {"status": "done"} | {k: [] for k in ("scores", "average", "bytes")}
            )
            log.append(("done", run.name, names[0], start, time.monotonic()))

    in_turns(runs, work, lambda line: log.append(("said", line)))


def at_once(*jobs: threading.Thread) -> None:
    for thread in jobs:
        thread.start()
    for thread in jobs:
        thread.join(30)
        assert not thread.is_alive()


def test_jobs_that_share_the_full_cache_do_their_own_runs_side_by_side(tmp_path):
    """Holding the shared run's lock to the end of one's own would make the jobs of a sweep follow one another."""
    log: list = []
    at_once(*(threading.Thread(target=job, args=(tmp_path, (name, "full"), log)) for name in ("a", "b", "c")))
    done = {entry[1]: entry for entry in log if entry[0] == "done"}
    assert set(done) == {"a", "b", "c", "full"}
    assert sum(entry[0] == "done" for entry in log) == 4, "nothing is done twice"
    assert sum(entry[:2] == ("read", "full") for entry in log) == 2, "the others wait for it and read it"
    starts, ends = zip(*(done[name][3:] for name in "abc"), strict=True)
    assert max(starts) < min(ends), "the three overlap"


def test_what_the_other_job_left_undone_is_done_by_the_one_that_waited(tmp_path):
    log: list = []

    def dies() -> None:
        with pytest.raises(RuntimeError):
            job(tmp_path, ("full",), log, seconds=0.5, fail=("full",))

    first = threading.Thread(target=dies)
    second = threading.Thread(target=lambda: (time.sleep(0.2), job(tmp_path, ("a", "full"), log)))
    at_once(first, second)
    assert [entry[1] for entry in log if entry[0] == "done"] == ["a", "full"]
    assert any(entry[0] == "said" and "waiting for it" in entry[1] for entry in log)


def test_two_jobs_with_the_same_runs_in_another_order_both_end(tmp_path):
    log: list = []
    jobs = [threading.Thread(target=job, args=(tmp_path, names, log)) for names in (("a", "b"), ("b", "a"))]
    at_once(*jobs)
    assert sorted(entry[1] for entry in log if entry[0] == "done") == ["a", "b"]
