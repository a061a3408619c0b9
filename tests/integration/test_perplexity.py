"""task=perplexity: against a forward over each stretch, and what its protocols do."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from local_model import Done, kvbench, save_local_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvbench.conf.errors import InputError
from kvbench.tasks import perplexity
from kvbench.tasks.perplexity import Perplexity

TEXT = " ".join(f"The {w} of number {i} is {i * i % 97}." for i in range(120) for w in ("square", "rest"))


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with ``model/``, ``text.txt`` and ``text.txt.gz``."""
    folder = tmp_path_factory.mktemp("perplexity")
    save_local_model(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    (folder / "text.txt.gz").write_bytes(gzip.compress(TEXT.encode()))
    return folder


def run(world: Path, results: Path, *overrides: str, status: int = 0) -> Done:
    done = kvbench(
        "run",
        "model=local",
        f"model.path={world / 'model'}",
        "model.max_prompt_tokens=1000",
        "task=perplexity",
        f"task.path={world / 'text.txt'}",
        "task.context=200",
        "task.chunk=40",
        "task.stretches=7",
        f"results_dir={results}",
        *overrides,
    )
    assert done.returncode == status, done.stderr
    return done


def records(results: Path) -> dict[str, dict]:
    found = [json.loads(p.read_text()) for p in results.glob("*/*/*/*/record.json")]
    return {r["method_label"]: r for r in found}


def direct(world: Path, context: int, chunk: int, stretches: int) -> list[float]:
    """Mean loss of each stretch's chunk, by one forward without any cache."""
    model = AutoModelForCausalLM.from_pretrained(world / "model").eval()
    ids = AutoTokenizer.from_pretrained(world / "model")(TEXT, return_tensors="pt").input_ids[0]
    losses = []
    for i in range(stretches):
        start = round(i / (stretches - 1) * (len(ids) - context - chunk))
        stretch = ids[start : start + context + chunk]
        with torch.inference_mode():
            logits = model(stretch[None], use_cache=False).logits[0].double().log_softmax(-1)
        losses.append(-logits[context - 1 : -1].gather(-1, stretch[context:, None]).mean().item())
    return losses


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory) -> tuple[Path, str]:
    results = tmp_path_factory.mktemp("results")
    methods = 'runner.pair_with=["full","no_cache","streaming_llm budget=30","h2o budget=30","kivi storage=kivi2"]'
    return results, run(world, results, "method=snapkv", "method.budget=40", methods).stdout


def test_the_full_cache_gives_the_perplexity_of_a_forward(world, finished):
    expected = direct(world, 200, 40, 7)
    for label in ("full", "no_cache"):
        record = records(finished[0])[label]
        assert record["average"]["mean"] == pytest.approx(sum(expected) / 7, abs=1e-5)
        assert record["unit"] == "nats per token"
    (path,) = finished[0].glob("*/*/full/*/samples.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["score"] for r in rows] == pytest.approx(expected, abs=1e-5)


def test_compression_costs_something_and_the_table_shows_perplexity(finished):
    found = records(finished[0])
    full = found["full"]["average"]["mean"]
    for label in ("snapkv 40", "streaming_llm 30", "h2o 30", "kivi2"):
        assert abs(found[label]["average"]["mean"] - full) > 1e-4
        difference = found[label]["paired"]["difference"]["mean"]
        assert difference == pytest.approx(found[label]["average"]["mean"] - full)
    assert f"{math.exp(full):.2f}" in finished[1]
    assert "perplexity" in finished[1]
    assert "nats vs full" in finished[1]


def test_the_loss_by_distance_is_kept_and_its_mean_is_the_score(finished):
    for record in records(finished[0]).values():
        by = record["by_distance"]
        sizes = [b - a for a, b in zip([0, *by["up_to_tokens"]], by["up_to_tokens"], strict=False)]
        assert (len(sizes), sum(sizes)) == (16, 40)
        mean = sum(n * size for n, size in zip(by["nats"], sizes, strict=True)) / 40
        assert mean == pytest.approx(record["average"]["mean"], abs=1e-6)


def test_the_figures_have_perplexity_on_the_axis_where_less_is_better(finished, tmp_path):
    done = kvbench("plot", str(finished[0]), "-o", str(tmp_path), "--y", "score")
    assert done.returncode == 0, done.stderr
    (pareto,) = tmp_path.glob("pareto-*.csv")
    table = pd.read_csv(pareto).set_index("curve")
    mean = records(finished[0])["full"]["average"]["mean"]
    assert table.loc["full", "perplexity (lower is better)"] == pytest.approx(math.exp(mean))
    (distance,) = tmp_path.glob("distance-*.csv")
    points = pd.read_csv(distance)
    drawn = points.groupby(["curve", "budget"], dropna=False)["loss beyond the full cache's, nats per token"]
    assert set(drawn.size()) == {16}
    assert {"no_cache", "kivi2", "streaming_llm", "h2o"} <= set(points["curve"])
    for (curve, budget), mean in drawn.mean().items():
        label = curve if math.isnan(budget) else f"{curve} {budget:.0f}"
        difference = records(finished[0])[label]["paired"]["difference"]["mean"]
        assert mean == pytest.approx(difference, abs=0.3 * abs(difference) + 1e-6)  # parts are not all equally long


def test_streaming_keeps_a_budget_that_holds_while_decoding(world, tmp_path):
    """StreamingLLM's cache stays as it was after the context; SnapKV's grows by what is scored."""
    methods = 'runner.pair_with=["streaming_llm budget=30"]'
    overrides = ("task.protocol=streaming", "task.chunk=300", "task.stretches=2", methods)
    out = run(world, tmp_path, "method=snapkv", "method.budget=40", *overrides).stdout
    assert "perplexity-streaming" in out
    held = {}
    for path in tmp_path.glob("*/*/*/*/samples.jsonl"):
        row = json.loads(path.read_text().splitlines()[0])
        held[row["method"]] = row["kv_bytes_stored_end"] - row["kv_bytes_stored"]
    a_token = 2 * 2 * 2 * 16 * 4  # keys and values, layers, heads, channels, bytes
    assert held["snapkv 40"] >= 300 * a_token
    # Room to grow, and the slots of tokens that have left, are closed from time to time.
    assert held["streaming_llm 30"] <= 200 * a_token


def test_a_gzipped_file_is_the_same_text_and_a_bos_token_begins_every_stretch(world):
    plain = Perplexity(path=str(world / "text.txt"), context=20, chunk=10, stretches=3)
    zipped = Perplexity(path=str(world / "text.txt.gz"), context=20, chunk=10, stretches=3)
    assert list(plain.source().sha256.values()) == list(zipped.source().sha256.values())
    assert list(plain.source().sha256.values()) == [hashlib.sha256(TEXT.encode()).hexdigest()]

    class WithBegin:
        def __init__(self):
            self.inner = AutoTokenizer.from_pretrained(world / "model")

        def __call__(self, text, add_special_tokens=True, **how):
            found = self.inner(text, **how)
            found["input_ids"] = [7] * add_special_tokens + list(found.input_ids)
            return found

    tokenizer = WithBegin()
    for example in plain.examples():
        ((one,), (two,)) = plain.encode(example, tokenizer.inner, None), plain.encode(example, tokenizer, None)
        assert two.context[0] == 7
        assert len(one.context) == len(two.context) == 19
        assert len(two.asked[0][0]) == 1
        assert len(two.asked[0][1]) == 10


def test_wikitext_comes_from_the_hub_and_must_be_the_published_text(monkeypatch, tmp_path, shared_data):
    file = shared_data / "wikitext2" / "wiki.test.raw.gz"
    if not file.is_file():
        pytest.skip("no wikitext-2 here")
    text = gzip.decompress(file.read_bytes()).decode()
    # The hub's rows are the lines of the file; a blank one has lost its blank and its end.
    lines = [line if line.strip() else "" for line in text.splitlines(keepends=True)]
    pd.DataFrame({"text": lines}).to_parquet(tmp_path / "test.parquet")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *a, **k: str(tmp_path / "test.parquet"))
    task = Perplexity()
    assert task.source().sha256 == {"wikitext-2": perplexity.WIKITEXT_SHA256}
    assert Perplexity(path=str(file)).source().name == task.source().name == "perplexity-sliding"
    pd.DataFrame({"text": lines[:-1]}).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(InputError, match="the sha256 must be"):
        Perplexity().source()


def test_bad_input(world, tmp_path, monkeypatch):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xfa")
    for override, expected in (
        ("task.path=/nowhere.txt", "task.path=/nowhere.txt: must be a text file; it does not exist"),
        (f"task.path={tmp_path / 'empty.txt'}", "must hold text; it is empty"),
        (f"task.path={tmp_path / 'bytes.txt'}", "must be UTF-8 text"),
        ("task.protocol=slide", "task.protocol=slide: must be one of sliding, streaming; did you mean sliding?"),
        ("task.context=1", "task.context=1: must be a whole number >= 2"),
        ("task.stretches=0", "task.stretches=0: must be a whole number >= 1"),
        ("task.stretches=100000", "task.stretches=100000: must be at most"),
        ("task.context=990", "task.context=990: and task.chunk=40 are 1030 tokens, and the model takes 1000"),
        ("task.chunk=700000", "task.context=200: and task.chunk=700000"),
        ("runner.question=after_compression", "task=perplexity asks no questions"),
    ):
        done = run(world, tmp_path / "results", override, status=2)
        assert expected in done.stderr.splitlines()[-1]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = run(world, tmp_path / "results", "task.path=null", status=2)
    assert "wikitext-2 cannot be fetched from the hub: Salesforce/wikitext" in done.stderr.splitlines()[-1]
    assert "give a text file as task.path" in done.stderr.splitlines()[-1]
