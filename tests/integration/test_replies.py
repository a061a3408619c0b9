"""task=sharegpt with runner=accuracy: replies against the full cache's own; and needles as heat maps, end to end."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pandas as pd
import pytest
from local_model import Done, kvbench, save_local_model
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from kvbench.conf.errors import InputError
from kvbench.runners.stopping import stops
from kvbench.tasks.base import Example, Reply, cut_at, question_length
from kvbench.tasks.lm_eval import LmEval
from kvbench.tasks.sharegpt import ShareGPT


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with ``model/`` and ``talk.json``."""
    folder = tmp_path_factory.mktemp("replies")
    save_local_model(folder / "model")
    talks = [
        {
            "id": f"talk-{i}",
            "conversations": [
                {"from": "human", "value": f"Tell me of number {i}. " + "It is a long story. " * (5 + i)},
                {"from": "gpt", "value": "Well."},
            ],
        }
        for i in range(8)
    ]
    talks.append({"id": "short", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]})
    talks.append({"id": "alone", "conversations": [{"from": "human", "value": "Is anybody there tonight?"}]})
    (folder / "talk.json").write_text(json.dumps(talks))
    (folder / "hay.txt").write_text(" ".join(f"The boat of man {i} is old." for i in range(200)))
    return folder


def run(world: Path, results: Path, *overrides: str, status: int = 0) -> Done:
    model = ("model=local", f"model.path={world / 'model'}", "model.max_prompt_tokens=1000")
    done = kvbench("run", *model, f"results_dir={results}", *overrides)
    assert done.returncode == status, done.stderr
    return done


def rows(results: Path, method: str) -> dict[str, dict]:
    (path,) = results.glob(f"*/*/{method}/*/samples.jsonl")
    return {r["id"]: r for r in map(json.loads, path.read_text().splitlines())}


def replies(world: Path, results: Path, *overrides: str) -> Done:
    data = f"task.data_dir={world / 'talk.json'}"
    return run(world, results, "task=sharegpt", data, "task.limit=8", "task.max_new_tokens=12", *overrides)


def test_a_reply_is_compared_with_the_full_caches_own(world, tmp_path):
    replies(world, tmp_path, "method=snapkv", "method.budget=40")
    full, ours = rows(tmp_path, "full"), rows(tmp_path, "snapkv")
    assert len(full) == 8
    assert {(r["score"], r["tokens"], r["rouge"]) for r in full.values()} == {(1.0, 1.0, 1.0)}
    assert any(r["score"] < 1 for r in ours.values())
    for key, row in ours.items():
        theirs = full[key]["prediction"]  # the byte tokenizer's tokens are characters
        mine = row["prediction"]
        together = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), None)
        if "\ufffd" not in mine + theirs:
            assert together is None or row["tokens_together"] <= together
        assert row["score"] == pytest.approx(row["tokens_together"] / max(row["new_tokens"], row["reference_tokens"]))
        assert row["reference_tokens"] == full[key]["new_tokens"]


def test_the_reference_does_not_depend_on_who_rides_along(world, tmp_path):
    """Alone, beside a method that reads its prompt itself, and in a run that was broken off: the same scores."""
    replies(
        world, tmp_path / "both", "method=snapkv", "method.budget=40", 'runner.pair_with=["streaming_llm budget=40"]'
    )
    replies(world, tmp_path / "alone", "method=streaming_llm", "method.budget=40", "runner.pair_with=[]")
    replies(world, tmp_path / "snapkv", "method=snapkv", "method.budget=40", "runner.pair_with=[]")
    for method, other in (("streaming_llm", "alone"), ("snapkv", "snapkv")):
        first, second = rows(tmp_path / "both", method), rows(tmp_path / other, method)
        assert {k: r["score"] for k, r in first.items()} == {k: r["score"] for k, r in second.items()}


def test_the_three_measures():
    example = Example("sharegpt", "a", "", (), 8)

    def judged(ours: list[int], theirs: list[int], metric: str = "prefix") -> dict:
        task = ShareGPT(metric=metric)
        texts = [" ".join(map(str, tokens)) for tokens in (ours, theirs)]
        return task.judge(example, texts[0], Reply(texts[0], ours), Reply(texts[1], theirs))

    assert judged([1, 2, 3, 4], [1, 2, 9, 4]) == {
        "score": 0.5,
        "tokens": 0.75,
        "rouge": pytest.approx(0.75, abs=1e-6),
        "tokens_together": 2,
        "reference_tokens": 4,
    }
    assert judged([1, 2], [1, 2, 3, 4])["score"] == 0.5
    assert judged([1, 2, 3, 4], [1, 2])["score"] == 0.5
    assert judged([], [])["score"] == 1.0
    assert judged([], [1])["score"] == 0.0
    assert judged([1, 2, 3, 4], [1, 2, 9, 4], "tokens")["score"] == 0.75
    assert "prefix" in judged([1], [1], "rouge")


def test_which_conversations_are_replied_to(world):
    task = ShareGPT(data_dir=str(world / "talk.json"), limit=8)
    assert {e.id for e in task.examples()} == {f"talk-{i}" for i in range(8)}
    assert [e.id for e in task.examples()] != [e.id for e in ShareGPT(str(world / "talk.json"), 8, seed=1).examples()]
    few = ShareGPT(str(world / "talk.json"), 3).examples()
    assert few == task.examples()[:3]
    with pytest.raises(InputError, match=r"task.limit=9: only 8 conversations"):
        ShareGPT(str(world / "talk.json"), 9).examples()
    # What decides scores alone does not name a measurement anew.
    timed = ShareGPT(str(world / "talk.json"), 8, metric="rouge", seed=3)
    assert timed.identity() == task.identity()
    assert timed.scoring() != task.scoring()


def test_bad_input(world, tmp_path):
    for override, expected in (
        ("task.metric=bleu", "task.metric=bleu: must be one of prefix, rouge, tokens"),
        ("task.max_new_tokens=0", "task.max_new_tokens=0: must be a whole number >= 1"),
        ("task.max_length=20", "task.max_length=20: sharegpt/talk-"),
        ("runner.question=after_compression", "needs a prompt with a context and a question behind it"),
    ):
        data = f"task.data_dir={world / 'talk.json'}"
        done = run(world, tmp_path, "task=sharegpt", data, "task.limit=3", override, status=2)
        assert expected in done.stderr.splitlines()[-1]


def test_stop_strings_end_an_answer_wherever_they_stand():
    assert cut_at("one\nQuestion: two", ["\n\n", "Question:"]) == "one\n"
    assert cut_at("one Q two \n\n", ["\n\n", "Q"]) == "one "
    assert cut_at("one", []) == "one"


def test_a_stop_string_is_found_at_the_token_that_completes_it():
    """In tokens that are bytes of characters, where the last few need not be text, and among special ones."""
    words = ["<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "a", "b", "\u2581"]
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True))
    strip = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(strip)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    pieces = [*([2 + byte] for byte in b"\n\n\nab"), *([2 + b for b in c.encode()] for c in "\u00e4\u20ac\U0001f600")]
    pieces += [[0], [258], [259], [260], [2 + 0xF0]]
    rng, found = random.Random(0), 0
    for strings in (("\n",), ("\n\n", "b "), ("\u20ac\n",), ("\U0001f600", "a\u20ac")):
        for _ in range(60):
            tokens = [token for _ in range(12) for token in rng.choice(pieces)]
            for n in range(1, len(tokens) + 1):
                text = tokenizer.decode(tokens[:n], skip_special_tokens=True)
                there = any(string in text for string in strings)
                assert stops(tokens[:n], strings, tokenizer) == there, (tokens[:n], strings)
                if there:
                    found += 1
                    break
    assert found > 60


def test_without_lm_eval_the_task_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for ask in (LmEval.source, LmEval.examples):
        with pytest.raises(InputError, match=r"^task=lm_eval: needs lm-eval: pip install"):
            ask(LmEval())


@pytest.mark.parametrize("question", ["What is it?", "  What\n is   it? "])
def test_the_question_is_found_at_the_end_of_a_prompt(world, question):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    text = f"A text. What is it? More text.\n\n{question}<|end|>assistant:"
    ids = tokenizer(text).input_ids
    count = question_length(ids, question, tokenizer)
    assert tokenizer.decode(ids[-count:]).lstrip() == f"{question}<|end|>assistant:".lstrip()
    assert question_length(ids, text[2:], tokenizer) == len(ids) - 2  # however little is in front of it
    for wrong in ("Who is it?", "", text):
        with pytest.raises(InputError, match=r"runner.question=after_compression: needs a prompt with a context"):
            question_length(ids, wrong, tokenizer)


@pytest.mark.parametrize("question", ["with_context", "after_compression"])
def test_needles_leave_a_heat_map_in_both_modes(world, tmp_path, question):
    lengths = "task.lengths=[600,900]"
    run(
        world,
        tmp_path / "results",
        *(
            "task=needle",
            f"task.haystack={world / 'hay.txt'}",
            lengths,
            "task.depths=3",
            "task.max_new_tokens=4",
            "method=snapkv",
            "method.budget=40",
        ),
        *('runner.pair_with=["full","kivi"]', f"runner.question={question}"),
    )
    (name,) = (p.name for p in (tmp_path / "results").glob("needle*"))
    assert name.startswith("needle-")
    assert name.endswith("-agnostic") == (question == "after_compression")
    done = kvbench("plot", str(tmp_path / "results"), "-o", str(tmp_path / "figures"))
    assert done.returncode == 0, done.stderr
    made = {name: next((tmp_path / "figures").glob(f"heatmap-*-{name}.csv")) for name in ("by-budget", "others")}
    tables = {name: pd.read_csv(table) for name, table in made.items()}
    assert {name: set(table["curve"]) for name, table in tables.items()} == {
        "by-budget": {"full", "snapkv"},
        "others": {"full", "kivi4"},
    }
    cells = pd.concat(tables.values())
    assert len(cells) == 3 * 2 * 4
    cells["depth"] = cells["place"].str.removeprefix("depth ").astype(float)
    assert set(cells["depth"]) == {0.0, 0.5, 1.0}
    for _, cell in cells.iterrows():
        method = cell["curve"].removesuffix("4")
        (path,) = (tmp_path / "results").glob(f"*/*/{method}/*/samples.jsonl")
        row = next(
            r
            for r in map(json.loads, path.read_text().splitlines())
            if r["dataset"] == f"needle-{cell['prompt length, tokens']}" and r["depth"] == cell["depth"]
        )
        assert cell["score"] == 100 * row["score"]
    assert all("<svg" in table.with_suffix(".svg").read_text(encoding="utf-8") for table in made.values())
