"""Jobs that share a run: who does it, who waits, and that nobody waits for nothing."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from published import ada_kv, pyramidkv

from kvbench.methods.cache.method import Method
from kvbench.methods.policies.eviction import EvictionPolicy
from kvbench.methods.policies.pyramid_infer.policy import PyramidInfer
from kvbench.methods.policies.scorers.attention_sums import AttentionSums
from kvbench.methods.policies.scorers.expected_attention import ExpectedAttention
from kvbench.methods.policies.scorers.key_diff import KeyDiff
from kvbench.methods.policies.scorers.last_query import LastQuery
from kvbench.methods.policies.scorers.random_tokens import RandomTokens
from kvbench.methods.policies.scorers.snapkv import SnapKV
from kvbench.methods.policies.streaming_llm import StreamingLLM
from kvbench.methods.storage.kivi import Kivi
from kvbench.methods.storage.minicache.storage import MiniCache
from kvbench.runners.records.record import RunFolder
from kvbench.runners.records.runs import run_with_locks


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

    run_with_locks(runs, work)


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


def test_what_the_other_job_left_undone_is_done_by_the_one_that_waited(tmp_path, caplog):
    log: list = []
    caplog.set_level(logging.INFO)

    def dies() -> None:
        with pytest.raises(RuntimeError):
            job(tmp_path, ("full",), log, seconds=0.5, fail=("full",))

    first = threading.Thread(target=dies)
    second = threading.Thread(target=lambda: (time.sleep(0.2), job(tmp_path, ("a", "full"), log)))
    at_once(first, second)
    assert [entry[1] for entry in log if entry[0] == "done"] == ["a", "full"]
    assert "waiting for it" in caplog.text


def test_two_jobs_with_the_same_runs_in_another_order_both_end(tmp_path):
    log: list = []
    jobs = [threading.Thread(target=job, args=(tmp_path, names, log)) for names in (("a", "b"), ("b", "a"))]
    at_once(*jobs)
    assert sorted(entry[1] for entry in log if entry[0] == "done") == ["a", "b"]


@pytest.mark.parametrize(
    "selection",
    [
        EvictionPolicy(SnapKV()),
        pyramidkv(),
        ada_kv(),
        EvictionPolicy(AttentionSums()),
        EvictionPolicy(LastQuery()),
        EvictionPolicy(KeyDiff()),
        EvictionPolicy(ExpectedAttention()),
        EvictionPolicy(RandomTokens()),
        PyramidInfer(),
    ],
    ids=lambda s: type(s).__name__,
)
def test_a_method_that_ranks_tokens_names_the_rule_for_equal_scores(selection):
    """So the hash of a run made before there was a rule is another one."""
    assert Method("x", selection).identity()["selection"]["ties"] == "score, unpooled score, index"


def test_methods_that_rank_no_tokens_keep_their_hash():
    """As they stand in records from before there was a rule."""
    dense = {"class": "Dense"}
    stream = {"class": "StreamingLLM", "budget": 1024, "sinks": 4, "mode": "true_stream", "reposition": True}
    kivi = {"class": "Kivi", "bits": 4, "group": 32, "residual": 128, "version": Kivi.version}
    pairs = {"class": "MiniCache", "start": None, "t": 0.6, "gamma": 0.05, "retention": "top_ratio"}
    everything = {"class": "Selection"}
    for method, expected in (
        (Method("full"), {"name": "full", "selection": everything, "storage": dense}),
        (Method("kivi", storage=Kivi(bits=4)), {"name": "kivi", "selection": everything, "storage": kivi}),
        (Method("minicache", storage=MiniCache()), {"name": "minicache", "selection": everything, "storage": pairs}),
        (Method("streaming_llm", StreamingLLM()), {"name": "streaming_llm", "selection": stream, "storage": dense}),
    ):
        assert method.identity() == expected
