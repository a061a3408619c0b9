"""task=lm_eval: against lm-eval's own model where nothing is dropped, and different from it where something is."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
from local_model import Done, kvbench, save_local_model

pytest.importorskip("lm_eval")

from kvbench.conf.errors import InputError
from kvbench.tasks.lm_eval import LmEval

TEXT = """a boat is tied to the old pier while two men lift their nets and talk about the cold wind of last
week"""
WORDS = TEXT.split()


def text(start: int, count: int) -> str:
    return " ".join(WORDS[(start + 3 * i) % len(WORDS)] for i in range(count))


EVALUATED = {"hellaswag": "validation", "winogrande": "validation", "gsm8k": "test", "wikitext": "test"}


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, str]:
    """A model and data in the form of hellaswag, winogrande, gsm8k and wikitext."""
    folder = tmp_path_factory.mktemp("lm_eval")
    save_local_model(folder / "model")
    hellaswag = [
        {
            "activity_label": "Fishing",
            "ctx": text(i, 30),
            "ctx_a": text(i, 30),
            "ctx_b": "they",
            "endings": [text(i + j, 4 + j) for j in range(4)],
            "label": str(i % 4),
        }
        for i in range(3)
    ]
    winogrande = [
        {
            "sentence": f"{text(i, 12)} so _ was {text(i + 5, 3)}.",
            "option1": "the boat",
            "option2": "a net",
            "answer": str(1 + i % 2),
        }
        for i in range(3)
    ]
    gsm8k = [{"question": text(i, 20) + "?", "answer": f"It is {i}.\n#### {i}"} for i in range(2)]
    wikitext = [{"page": text(0, 150)}, {"page": text(7, 40)}]
    data = {"hellaswag": hellaswag, "winogrande": winogrande, "gsm8k": gsm8k, "wikitext": wikitext}
    files = {name: write(folder / f"{name}.jsonl", rows) for name, rows in data.items()}
    others = {f"other-{name}": write(folder / f"other-{name}.jsonl", rows[::-1]) for name, rows in data.items()}
    return {"model": str(folder / "model"), **files, **others}


def run(world: dict[str, str], results: Path, names: list[str], *overrides: str, status: int = 0) -> Done:
    files = [f"{n}:{{{EVALUATED[n]}:{world[n]},train:{world['other-' + n]}}}" for n in names]
    done = kvbench(
        "run",
        "model=local",
        f"model.path={world['model']}",
        "model.max_prompt_tokens=900",
        "task=lm_eval",
        f"task.names=[{','.join(names)}]",
        f"task.data_files={{{','.join(files)}}}",
        f"results_dir={results}",
        *overrides,
    )
    assert done.returncode == status, done.stderr
    return done


def rows(results: Path, method: str) -> dict[tuple[str, str], dict]:
    (path,) = results.glob(f"lm_eval/*/{method}/*/samples.jsonl")
    return {(r["dataset"], r["id"]): r for r in map(json.loads, path.read_text().splitlines())}


NAMES = ["hellaswag", "winogrande", "gsm8k"]


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory) -> Path:
    results = tmp_path_factory.mktemp("results")
    run(world, results, NAMES, "method=snapkv", "method.budget=0.1", "task.fewshot=1")
    return results


def task_of(world: dict[str, str], *names: str, **settings) -> LmEval:
    files = {n: {EVALUATED[n]: world[n], "train": world["other-" + n]} for n in names}
    return LmEval(names=names, data_files=files, **settings)


@pytest.fixture
def own_tasks_alone(monkeypatch):
    """The index of lm-eval's own tasks, which is read for each further folder, takes seconds."""
    from lm_eval import tasks

    monkeypatch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))


@pytest.fixture(scope="module")
def stock(world):
    """(lm-eval's own model, the task's requests by data set and document)."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(world["model"]),
        tokenizer=AutoTokenizer.from_pretrained(world["model"]),
        batch_size=1,
    )
    task = task_of(world, *NAMES, fewshot=1)
    return model, {(e.dataset, e.id): e.meta["requests"] for e in task.examples()}


def test_with_everything_kept_it_is_lm_evals_own_model(finished, stock):
    model, requests = stock
    full = rows(finished, "full")
    assert set(full) == set(requests)
    for key, mine in requests.items():
        found = full[key]["prediction"]
        if key[0] == "gsm8k":
            assert [found] == model.generate_until(mine, disable_tqdm=True)
        else:
            for (ours, ours_greedy), (theirs, theirs_greedy) in zip(
                found, model.loglikelihood(mine, disable_tqdm=True), strict=True
            ):
                assert ours == pytest.approx(theirs, abs=1e-4)
                assert ours_greedy == theirs_greedy


def test_the_table_is_lm_evals_own(finished, stock):
    """What lm-eval works out from its own model's answers is what stands in the run's folder."""
    model, requests = stock
    (folder,) = finished.glob("lm_eval/*/full/*")
    table = json.loads((folder / "lm_eval.json").read_text())["results"]
    record = json.loads((folder / "record.json").read_text())
    assert record["lm_eval"]["results"] == table
    for dataset in ("hellaswag", "winogrande"):
        best = []
        for key, mine in requests.items():
            if key[0] == dataset:
                likelihoods = [one for one, _ in model.loglikelihood(mine, disable_tqdm=True)]
                gold = int(mine[0].doc["label"]) if dataset == "hellaswag" else int(mine[0].doc["answer"]) - 1
                best.append(likelihoods.index(max(likelihoods)) == gold)
        assert table[dataset]["acc,none"] == pytest.approx(sum(best) / len(best))
        assert record["scores"][dataset]["mean"] == pytest.approx(100 * sum(best) / len(best))
    assert {"exact_match,strict-match", "exact_match,flexible-extract"} < set(table["gsm8k"])


def test_a_long_text_is_scored_chunk_by_chunk(world, stock, tmp_path):
    """With the full cache lm-eval's own total; compressed, all but the first chunk change; no padding is counted."""
    run(world, tmp_path, ["wikitext"], "method=snapkv", "method.budget=0.1", "task.chunk=100")
    model, _ = stock
    requests = {e.id: e.meta["requests"] for e in task_of(world, "wikitext").examples()}
    full, ours = rows(tmp_path, "full"), rows(tmp_path, "snapkv")
    for (_, document), row in full.items():
        ((total, tokens),) = row["prediction"]
        assert total == pytest.approx(model.loglikelihood_rolling(requests[document], disable_tqdm=True)[0], abs=1e-3)
        assert row["score"] == pytest.approx(-total / tokens)
        assert row["kv_bytes_stored"] == row["kv_bytes_full"] == row["kv_bytes_formula"]
        mine = ours["wikitext", document]
        assert abs(mine["score"] - row["score"]) > 1e-3
        assert mine["kv_bytes_stored"] < 0.15 * row["kv_bytes_stored"]
    (record,) = tmp_path.glob("lm_eval/*/full/*/record.json")
    found = json.loads(record.read_text())
    assert found["unit"] == "nats per token"
    assert "word_perplexity,none" in found["lm_eval"]["results"]["wikitext"]
    # One chunk: nothing is before it, so there is nothing to compress.
    run(world, tmp_path / "one", ["wikitext"], "method=snapkv", "method.budget=0.1", "task.chunk=900")
    scores = [[r["score"] for r in rows(tmp_path / "one", m).values()] for m in ("full", "snapkv")]
    assert scores[0] == scores[1]


def test_what_judges_an_answer_is_part_of_the_run(world, tmp_path):
    """Other labels under the same questions are another run, wherever the file lies; a copy of it is the same."""
    task = task_of(world, "hellaswag", fewshot=0)
    lines = [json.loads(line) for line in Path(world["hellaswag"]).read_text().splitlines()]
    copied = write(tmp_path / "copy.jsonl", lines)
    same = LmEval(names="hellaswag", data_files={"hellaswag": copied}, fewshot=0)
    assert same.source().sha256 == task.source().sha256
    moved = write(tmp_path / "moved.jsonl", [row | {"label": str((int(row["label"]) + 1) % 4)} for row in lines])
    other = LmEval(names="hellaswag", data_files={"hellaswag": moved}, fewshot=0)
    assert other.source().sha256 != task.source().sha256


@pytest.mark.usefixtures("own_tasks_alone")
def test_a_groups_figure_is_lm_evals(world, tmp_path):
    """Weighted by documents where the group says so, which the mean over its tasks is not; in a group of groups too."""
    (tmp_path / "tasks").mkdir()
    rows_of = [json.loads(line) for line in Path(world["winogrande"]).read_text().splitlines()]
    for name, part in (("one", rows_of[:1]), ("two", rows_of[1:])):
        data = {"data_files": {"test": write(tmp_path / f"{name}.jsonl", part)}}
        config = {
            "task": f"part_{name}",
            "dataset_path": "json",
            "dataset_kwargs": data,
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{sentence}}",
            "doc_to_target": "{{answer|int - 1}}",
            "doc_to_choice": "{{[option1, option2]}}",
            "metric_list": [{"metric": "acc"}],
        }
        (tmp_path / "tasks" / f"{name}.yaml").write_text(json.dumps(config))
    group = {"group": "parts", "task": ["part_one", "part_two"], "aggregate_metric_list": [{"metric": "acc"}]}
    (tmp_path / "tasks" / "group.yaml").write_text(json.dumps(group))
    outer = {"group": "outer", "task": ["parts"], "aggregate_metric_list": [{"metric": "acc"}]}
    (tmp_path / "tasks" / "outer.yaml").write_text(json.dumps(outer))
    overrides = [f"task.include_path={tmp_path / 'tasks'}", "task.names=[outer]", "task.data_files=null"]
    run(world, tmp_path / "results", [], *overrides, "method=full")
    (path,) = (tmp_path / "results").glob("lm_eval/*/full/*/record.json")
    record = json.loads(path.read_text())
    scores = {key[0] + key[1]: r["score"] for key, r in rows(tmp_path / "results", "full").items()}
    assert len(scores) == 3
    for name in ("parts acc", "outer acc"):
        assert record["averages"][name]["mean"] == pytest.approx(100 * sum(scores.values()) / 3)


def test_at_a_tenth_of_the_cache_every_answer_changes(finished):
    """lm-eval's own model would give the same numbers for every method."""
    full, ours = rows(finished, "full"), rows(finished, "snapkv")
    for key, row in full.items():
        if key[0] == "gsm8k":
            continue
        for (theirs, _), (mine, _) in zip(row["prediction"], ours[key]["prediction"], strict=True):
            assert abs(theirs - mine) > 1e-3, key
        assert ours[key]["kv_bytes_stored"] < 0.15 * row["kv_bytes_stored"]


@pytest.mark.usefixtures("own_tasks_alone")
def test_an_answer_of_one_token_is_scored_through_the_compressed_cache(world, tmp_path):
    """Without held-back tokens it would be predicted before compression, and no method would change it."""
    path = write(
        tmp_path / "one.jsonl", [{"sentence": text(0, 60) + " _ .", "option1": "x", "option2": "y", "answer": "1"}]
    )
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "one.yaml").write_text(
        json.dumps(
            {
                "task": "one_token",
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": path}},
                "output_type": "multiple_choice",
                "test_split": "test",
                "doc_to_text": "{{sentence}}",
                "doc_to_target": "{{answer|int - 1}}",
                "doc_to_choice": "{{[option1, option2]}}",
                "target_delimiter": "",
                "metric_list": [{"metric": "acc"}],
            }
        )
    )
    overrides = [f"task.include_path={tmp_path / 'tasks'}", "task.names=[one_token]", "task.data_files=null"]
    run(world, tmp_path / "a", [], *overrides, "method=snapkv", "method.budget=0.1")
    ((_, full),) = rows(tmp_path / "a", "full").items()
    ((_, ours),) = rows(tmp_path / "a", "snapkv").items()
    for (theirs, _), (mine, _) in zip(full["prediction"], ours["prediction"], strict=True):
        assert abs(theirs - mine) > 1e-3
    # More tokens held back leave a full cache's answers as they are.
    run(world, tmp_path / "b", [], *overrides, "method=full", "task.held_back=7")
    ((_, later),) = rows(tmp_path / "b", "full").items()
    for (theirs, _), (mine, _) in zip(full["prediction"], later["prediction"], strict=True):
        assert theirs == pytest.approx(mine, abs=1e-4)


def test_a_padded_batch_gives_the_same_answers_and_a_run_continues(world, finished, tmp_path):
    names = ["hellaswag", "winogrande"]
    settings = ("method=snapkv", "method.budget=0.1", "task.fewshot=1")
    run(world, tmp_path, names, *settings, "batch_size=3")
    before = rows(finished, "snapkv")
    for key, row in rows(tmp_path, "snapkv").items():
        for (theirs, _), (mine, _) in zip(before[key]["prediction"], row["prediction"], strict=True):
            assert theirs == pytest.approx(mine, abs=1e-4)
    (path,) = tmp_path.glob("lm_eval/*/snapkv/*/samples.jsonl")
    (path.parent / "record.json").unlink()
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:4]))
    run(world, tmp_path, names, *settings, "batch_size=3")
    assert len(rows(tmp_path, "snapkv")) == 6


def test_bad_input(world, tmp_path):
    hellaswag = ["task.names=[hellaswag]", f"task.data_files={{hellaswag:{world['hellaswag']}}}"]
    wikitext = f"wikitext:{world['wikitext']}"
    for overrides, expected in (
        (["task.names=[helaswag]"], "did you mean hellaswag"),
        (["task.names=5"], "task.names=5: must be names of lm-eval's tasks"),
        (["task.names=null"], "task.names=null: must be names of lm-eval's tasks"),
        (["task.data_files=x.jsonl"], "task.data_files=x.jsonl: must be name -> file"),
        (["task.data_files={hellaswag:null}"], "task.data_files.hellaswag=None: must be a file"),
        (["task.data_files={hellaswag:/nowhere}"], "task.data_files.hellaswag=/nowhere: must be a file"),
        ([f"task.data_files={{piqa:{world['hellaswag']}}}"], "must be one of task.names=hellaswag"),
        (["task.names=[squadv2]", f"task.data_files={{squadv2:{world['hellaswag']}}}"], "takes no files"),
        (["task.include_path=5"], "task.include_path=5: must be text, or null"),
        (["task.names=[gsm8k]", f"task.data_files={{gsm8k:{{train:{world['gsm8k']}}}}}"], "must hold the split test"),
        (
            ["task.names=[gsm8k]", f"task.data_files={{gsm8k:{world['gsm8k']}}}"],
            "must hold the split train too, for its 5",
        ),
        ([*hellaswag, "task.fewshot=2"], "must hold the split train too, for its 2 few-shot examples"),
        ([*hellaswag, "task.metric=f2"], "must be a metric of hellaswag that is a mean of shares: acc, acc_norm"),
        (["task.held_back=0"], "task.held_back=0: must be a whole number >= 1"),
        (["task.fewshot=-1"], "task.fewshot=-1: must be a whole number >= 0, or null"),
        ([*hellaswag, "task.max_length=10"], "task.max_length=10: is too short"),
        ([*hellaswag, "runner.question=after_compression"], "task=lm_eval asks no questions"),
        (
            ["task.names=[hellaswag,wikitext]", f"task.data_files={{hellaswag:{world['hellaswag']},{wikitext}}}"],
            "task.names=wikitext: asks for the likelihood of long texts",
        ),
        (
            ["task.names=[hellaswag]", f"task.data_files={{hellaswag:{world['gsm8k']}}}"],
            "files in task.data_files must be JSON lines with the columns of the task's own data",
        ),
    ):
        command = ["run", "model=local", f"model.path={world['model']}", "model.max_prompt_tokens=900", "task=lm_eval"]
        done = kvbench(*command, "task.names=[hellaswag]", f"results_dir={tmp_path}", *overrides)
        assert done.returncode == 2
        assert expected in done.stderr.splitlines()[-1]


def test_without_a_network_the_local_file_is_named(monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'Rowan/hellaswag' on the Hub")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(InputError, match=r"Couldn't reach 'Rowan/hellaswag'.*goes into task.data_files"):
        LmEval(names="hellaswag").examples()
