"""Papers' numbers beside ours: the facts can be answered, verdicts have two sides, and what differs is said."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
import yaml
from records import accuracy, estimate, head, save

from kvbench.analysis.load import load
from kvbench.analysis.papers.cli import main
from kvbench.analysis.papers.compare import commands, compare
from kvbench.analysis.papers.paper import names, paper
from kvbench.analysis.papers.render import Block, markdown, page_html
from kvbench.analysis.papers.verdict import verdict

ROOT = Path(__file__).resolve().parents[2]
MISTRAL = "mistral-7b-instruct-v0.2"
SETS = [name for name in paper("snapkv").tables[0].columns if name != "average"]


def scored(label: str, mean: float, half: float | None = 0.5, model: str = MISTRAL, sets=SETS, **record) -> dict:
    """A LongBench record with the same mean for each of these sets."""
    method, _, budget = label.partition(" ")
    made = accuracy(method, int(budget) if budget else None, mean)
    made |= {"model": model, "scores": {name: estimate(mean, 5, half) for name in sets}}
    made |= {"average": estimate(mean, 5 * len(sets), half), "data": {"name": "x", "examples": dict.fromkeys(sets, 5)}}
    if method == "snapkv":
        made["identity"]["method"]["selection"] |= {"kernel": 7}
    made["identity"]["model"] = {"name": model, "mean": mean}  # so that records differ in their hash
    return made | record


def found(folder: Path, name: str, row: str, column: str = "average"):
    """The comparison of one published number."""
    (one,) = (one for one in compare(paper(name), load(folder)[0]) if one.row == row and one.column == column)
    return one


SNAPKV = "Mistral-7B-Instruct-v0.2, snapkv capacity=1024 w=32 k=7 maxpool"


@pytest.mark.parametrize("name", names())
def test_every_line_is_translated_or_says_why_not(name):
    read = paper(name)
    assert read.title and read.arxiv and read.methods
    stems = {path.stem for path in (ROOT / "conf" / "method").glob("*.yaml")}
    assert set(read.methods) <= stems
    models = {yaml.safe_load(path.read_text())["name"] for path in (ROOT / "conf" / "model").glob("*.yaml")}
    for table in read.tables:
        assert table.name and table.source and table.rows
        for row in table.rows:
            assert row.values and all(value == value for value in row.values.values())
            assert bool(row.label) == bool(row.run), row
            assert row.label is not None or row.reason, row
            assert row.our_model in models or (row.our_model is None and row.reason), row
            assert "{" not in f"{row.label}{row.run}{row.settings}", row
    assert read.tables or read.claims or read.note


def test_all_papers_are_there():
    wanted = "snapkv streaming_llm h2o tova pyramidkv ada_kv kivi minicache pyramid_infer cla yoco lckv"
    assert {*wanted.split(), "expected_attention", "key_diff"} == set(names())


def test_facts_are_those_of_the_paper():
    """Cells of three tables, typed from the papers."""
    table = {row.name: row.values for row in paper("snapkv").tables[0].rows}
    assert table[SNAPKV]["qasper"] == 29.51 and table["LWM-Text-Chat-1M, full_kv"]["narrativeqa"] == 18.18
    table = {row.name: row.values for row in paper("minicache").tables[0].rows}
    assert table["Llama-2-7B-Chat, minicache-4bit"]["lcc"] == 58.03
    table = {row.name: row.values for row in paper("streaming_llm").tables[0].rows}
    assert table["Falcon-7B, sinks=0 + recent=2048"] == {"perplexity": 17.9}


def test_a_sum_in_the_paper_s_words_is_our_budget():
    rows = {row.setting: row for row in paper("streaming_llm").tables[1].rows if row.model == "Llama-2-7B"}
    assert rows["cache 4+1020"].label == "streaming_llm 1024"
    assert rows["cache 4+1020"].run == "method=streaming_llm method.budget=1024 method.policy.sinks=4"


@pytest.mark.parametrize(
    ("ours", "low", "high", "differs", "said"),
    [
        (None, None, None, [], ("not run", "")),
        (40.0, 39.0, 41.0, ["model"], ("not comparable", "")),
        (36.0, None, None, [], ("reproduced", "")),  # 0.9
        (44.0, None, None, [], ("reproduced", "")),  # 1.1
        (35.9, None, None, [], ("not reproduced", "below")),
        (44.1, None, None, [], ("not reproduced", "above: look again")),
        (35.0, 29.0, 40.5, [], ("reproduced", "")),  # the interval holds 40
        (35.0, 29.0, 39.9, [], ("not reproduced", "below")),
        (40.0, 32.0, 48.0, [], ("reproduced", "")),  # a fifth of the published number to each side
        (40.0, 31.9, 48.1, [], ("not comparable", "too few examples")),
        (32.0, 20.0, 41.0, [], ("not comparable", "too few examples")),  # holds 40, and 20 too
        (70.0, 50.0, 90.0, [], ("not reproduced", "above: look again")),  # a wide interval can contradict
    ],
)
def test_verdicts(ours, low, high, differs, said):
    assert verdict(40.0, ours, low, high, differs) == said


def test_a_mean_without_an_interval_agrees_with_nothing():
    assert verdict(40.0, 40.0, None, None, [], is_sample=True) == ("not comparable", "too few examples")
    assert verdict(40.0, 20.0, None, None, [], is_sample=True) == ("not reproduced", "below")


def test_the_same_model_and_data_get_a_verdict(tmp_path):
    folder = save(
        tmp_path,
        scored("full", 42.0),
        scored(
            "snapkv 1024",
            41.0,
            paired={"with": "full", "difference": {"mean": -1.0, "low": -1.5, "high": -0.5, "n": 3200}},
        ),
    )
    one = found(folder, "snapkv", SNAPKV)
    assert (one.verdict, one.differs) == ("reproduced", ())
    mean, low, high, n = one.ours
    assert (mean, n) == (pytest.approx(41.0), 80) and low < 41.0 < high
    assert one.our_difference[0] == pytest.approx(-1.0)
    assert one.published == pytest.approx(41.45, abs=0.005) and one.published_difference == pytest.approx(
        -1.11, abs=0.01
    )
    cell = found(folder, "snapkv", SNAPKV, "qasper")  # 29.51 in the paper, which the interval of five examples holds
    assert (cell.verdict, cell.remark) == ("not comparable", "too few examples")
    lines = commands(paper("snapkv"), [cell], "mine")
    assert any("method=snapkv" in line for line in lines)  # so its run is still missing
    cell = found(folder, "snapkv", SNAPKV, "passage_count")  # 2.98 in the paper
    assert (cell.verdict, cell.remark) == ("not reproduced", "above: look again")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda r: r.update(model="smollm2-135m"), "model: smollm2-135m, not Mistral-7B-Instruct-v0.2"),
        (lambda r: r["identity"]["task"].update(limit=10), "data: first 10 of each set"),
        (lambda r: r["identity"]["task"].update(max_length=4000), "prompts: at most 4000 tokens"),
        (lambda r: r.update(task="longbench-subset"), "data: a part of LongBench's rows"),
        (lambda r: r.update(task="longbench-agnostic"), "question: not known when the prompt is compressed"),
    ],
)
def test_what_differs_is_said_and_makes_it_not_comparable(tmp_path, change, told):
    made = scored("snapkv 1024", 41.0)
    change(made)
    one = found(save(tmp_path, made), "snapkv", SNAPKV)
    assert (one.verdict, one.differs) == ("not comparable", (told,))
    assert one.ours[0] == pytest.approx(41.0)


def test_some_of_the_paper_s_sets_are_not_all(tmp_path):
    one = found(save(tmp_path, scored("snapkv 1024", 41.0, sets=SETS[:3])), "snapkv", SNAPKV)
    assert (one.verdict, one.differs) == ("not comparable", ("data sets: 3 of the paper's 16",))
    assert one.ours == (41.0, None, None, 15)


def test_the_run_that_differs_least_answers(tmp_path):
    near, far = scored("snapkv 1024", 30.0), scored("snapkv 1024", 41.0, model="smollm2-135m")
    other = scored("snapkv 1024", 50.0)
    other["identity"]["method"]["selection"]["kernel"] = 5
    one = found(save(tmp_path, near, far, other), "snapkv", SNAPKV)
    assert one.ours[0] == 30.0 and one.verdict == "not reproduced"


def test_a_run_without_context_or_of_longbench_e_answers_nothing(tmp_path):
    runs = [scored("snapkv 1024", 41.0), scored("snapkv 1024", 42.0)]
    for run, key in zip(runs, ("no_context", "e"), strict=True):
        run["identity"]["task"] = run["identity"]["task"] | {key: True}
    assert found(save(tmp_path, *runs), "snapkv", SNAPKV).verdict == "not run"


def test_trained_models_are_means_over_seeds_at_the_best_rate(tmp_path):
    made = []
    for seed, rate, loss in ((0, 1e-3, 3.0), (1, 1e-3, 4.0), (0, 1e-2, 9.0), (1, 1e-2, 9.0)):
        one = head("train", "yoco", None, "text", {"task": {"class": "Text"}, "train": {"lr": rate}})
        one["identity"]["seed"] = seed
        counts = {"tokens": 1, "parameters": 1, "seconds": 1.0, "tokens_per_s": 1.0}
        one |= {"model": "scratch", "training": {"lr": rate, **counts}, "curve": [], "weights": {}}
        one |= {"validation": {"loss": loss, "perplexity": 2.0, "accuracy": 0.5}}
        one |= {"bytes": {"kv_bytes_per_token": 1, "kv_bytes_fixed": 0}}
        made.append(one)
    one = found(save(tmp_path, *made), "yoco", "YOCO_SWA, 160M 12 layers d=768, 10B tokens", "loss")
    assert one.ours == (3.5, 3.0, 4.0, 2) and one.verdict == "not comparable"
    assert one.differs[-1] == "data: text"


def test_commands_make_what_is_missing_a_line_a_method(tmp_path):
    read = paper("pyramidkv")
    lines = commands(read, compare(read, []), "mine")
    common = f"kvbench run results_dir=mine model={MISTRAL} task=longbench device=cuda dtype=float16"
    assert f"{common} method=pyramidkv 'runner.budgets=[128,2048]'" in lines
    assert not any("method=full" in line for line in lines)  # every run is paired with it
    folder = save(tmp_path, *(scored(f"pyramidkv {budget}", 40.0) for budget in (128, 2048)))
    lines = commands(read, compare(read, load(folder)[0]), "mine")
    assert not any(f"{MISTRAL} " in line and "method=pyramidkv" in line for line in lines)
    speed = commands(paper("kivi"), compare(paper("kivi"), []), "mine")[-1]
    assert speed == "kvbench run results_dir=mine experiment=gpu_campaign 'campaign=glob([minicache-*])'"


def test_texts_of_records_cannot_break_a_page():
    evil = "<script>a|b</script>\nc"
    page = [Block("heading", evil), Block("text", evil), Block("table", rows=[["h"], [evil]])]
    assert r"| &lt;script>a\|b&lt;/script> c |" in markdown(page)
    text = page_html([*page, Block("list", rows=[[evil]]), Block("code", rows=[[evil]])], evil)
    assert "<script" not in text and "default-src 'none'" in text


def test_the_command(tmp_path, capsys):
    assert main([]) == 0 and "2404.14469" in capsys.readouterr().out
    assert main(["SnapKV", str(ROOT / "results" / "reference")]) == 0
    page = capsys.readouterr().out
    assert (
        page.startswith("# SnapKV: ")
        and "not comparable [1]" in page
        and "not reproduced" not in page.split("reproduced:")[0]
    )
    assert "\n* [1] model: smollm2-135m" in page and "Source: " in page
    assert main(["ada-kv", str(ROOT / "results" / "reference"), "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == 4 * 26 * 17 and {row["verdict"] for row in rows} == {"not comparable", "not run"}
    assert main(["all", str(ROOT / "results" / "reference"), "-o", str(tmp_path / "all.html")]) == 0
    assert (tmp_path / "all.html").read_text().count("<h1>") == len(names())


def test_no_results_is_no_error_and_a_wrong_name_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["yoco"]) == 0
    assert "17 published numbers: 17 not run." in capsys.readouterr().out
    for arguments in (["snapvk"], ["snapkv", "nowhere"], ["snapkv", "-o", "x.pdf"]):
        assert main(arguments) == 2
        told = capsys.readouterr().err
        assert told.startswith("error: ") and told.count("\n") == 1
