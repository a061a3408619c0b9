"""Figures from records alone: the points they hold, their fronts, their files."""

from __future__ import annotations

import csv
import itertools
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from records import accuracy, efficiency, estimate, save

from kvbench.analysis.figures import KINDS, FigureSpec, Options, Style, cli, draw, figures, quality
from kvbench.analysis.figures.cli import main
from kvbench.analysis.figures.front import front_line, front_members
from kvbench.analysis.load import load

ROOT = Path(__file__).resolve().parents[2]
SWEEP = [accuracy("full", None, 22.0), accuracy("snapkv", 128, 18.0), accuracy("snapkv", 256, 20.0)]


def made(folder: Path, *records: dict[str, Any], kinds: tuple[str, ...] = (), **options: Any) -> list[FigureSpec]:
    runs = load(save(folder, *records))[0]
    return list(figures(runs, kinds or tuple(KINDS), Options(**options)))


def only(specs: list[FigureSpec], kind: str) -> FigureSpec:
    (spec,) = (spec for spec in specs if spec.kind == kind)
    return spec


# the front ------------------------------------------------------------------------------------------------------------


def test_the_line_of_the_front_joins_the_best_means() -> None:
    assert front_line([1, 2, 3, 4, 2, 3], [5, 7, 6, 9, 4, 7]) == [0, 1, 3]


def test_a_point_whose_interval_reaches_the_line_is_on_the_front() -> None:
    costs, merits = [1, 2, 2, 3], [5, 7, 6, 6.5]
    assert front_members(costs, merits, [None] * 4) == {0, 1}
    assert front_members(costs, merits, [5.5, 7.5, 6.9, 7.0]) == {0, 1, 3}  # 6.9 stays below the 7 at the same cost
    assert front_members([1, 2], [20.454641, 20.454638], [20.5, 20.454642]) == {0, 1}  # a difference of rounding


# score against memory -------------------------------------------------------------------------------------------------


def test_pareto_has_paired_differences_and_their_intervals(tmp_path: Path) -> None:
    spec = only(made(tmp_path, *SWEEP), "pareto")
    assert [(p.curve, p.budget, p.x, p.y) for p in spec.points] == [
        ("full", None, 64.0, 0.0),
        ("snapkv", 128, 2.0, pytest.approx(-4.0)),
        ("snapkv", 256, 4.0, pytest.approx(-2.0)),
    ]
    runs = load(tmp_path)[0]
    ends = [run.record["paired"]["difference"] for run in runs if not run.is_full_cache]
    assert [(p.low, p.high) for p in spec.points] == [(None, None), *((end["low"], end["high"]) for end in ends)]
    assert spec.y_label == "difference to the full cache (points)"
    assert "after the prompt" in spec.x_label
    assert all(p.on_front for p in spec.points)


def test_pareto_of_scores_has_the_intervals_of_the_means(tmp_path: Path) -> None:
    spec = only(made(tmp_path, *SWEEP, y="score"), "pareto")
    averages = [run.record["average"] for run in load(tmp_path)[0]]
    assert [p.y for p in spec.points] == pytest.approx([22.0, 18.0, 20.0])
    assert [(p.low, p.high) for p in spec.points] == [(a["low"], a["high"]) for a in averages]
    assert "paired" in " ".join(spec.caption)


def test_the_x_axis_is_memory_share_or_budget(tmp_path: Path) -> None:
    share = only(made(tmp_path / "share", *SWEEP, x="share"), "pareto")
    assert [p.x for p in share.points] == pytest.approx([100.0, 100 * 128 / 4096, 100 * 256 / 4096])
    budget = only(made(tmp_path / "budget", *SWEEP, x="budget"), "pareto")
    assert [p.x for p in budget.points] == [128, 256]
    assert "Not drawn (no budget in tokens): full" in " ".join(budget.caption)


def test_mean_bytes_are_the_axis_where_every_record_has_them(tmp_path: Path) -> None:
    records = [json.loads(json.dumps(record)) for record in SWEEP]
    for record in records:
        record["bytes"]["kv_bytes_mean"] = 2 * record["bytes"]["kv_bytes_stored"]
    spec = only(made(tmp_path / "all", *records), "pareto")
    assert "over the run" in spec.x_label
    assert [p.x for p in spec.points] == [128.0, 4.0, 8.0]
    del records[0]["bytes"]["kv_bytes_mean"]
    assert "after the prompt" in only(made(tmp_path / "some", *records), "pareto").x_label


def test_bytes_that_a_step_reads_can_be_the_axis(tmp_path: Path) -> None:
    records = [json.loads(json.dumps(record)) for record in SWEEP]
    for record, read in zip(records[1:], (0.25, 0.5), strict=True):
        record["bytes"] |= {"kv_bytes_read_mean": 2**26 * read, "kv_bytes_full_mean": 2.0**26}
    spec = only(made(tmp_path, *records, x="read"), "pareto")
    assert [p.x for p in spec.points] == [25.0, 50.0] and "a step reads" in spec.x_label
    assert spec.title.startswith("Quality against bytes read: ")
    assert "Bytes read are those of one sequence; points of methods with the same bytes read" in " ".join(spec.caption)
    assert "reads no cache, or its record does not say how much" in " ".join(spec.caption)


def test_a_run_without_a_cache_is_named_with_its_number(tmp_path: Path) -> None:
    nothing = accuracy("no_cache", None, 22.0)
    nothing["bytes"]["kv_bytes_stored"] = 0.0
    spec = only(made(tmp_path, *SWEEP, nothing), "pareto")
    assert "no_cache" not in {p.curve for p in spec.points}
    assert "no_cache (difference " in " ".join(spec.caption)


def test_a_run_without_a_paired_difference_is_named(tmp_path: Path) -> None:
    alone = accuracy("h2o", 128, 18.0)
    runs = load(save(tmp_path, *SWEEP, alone))[0]
    record = {key: value for key, value in runs[1].record.items() if key != "paired"}
    runs[1] = replace(runs[1], record=record)
    (spec,) = figures(runs, ("pareto",))
    assert "Not drawn (no paired difference in its record): h2o 128." in spec.caption


def test_sets_of_different_names_have_figures_of_their_own(tmp_path: Path) -> None:
    pairs = (("full", None), ("snapkv", 64))
    runs = [accuracy(m, b, 9.0, task=t) for m, b in pairs for t in ("longbench", "longbench-mini")]
    found = made(tmp_path, *runs, kinds=("pareto",))
    assert [len(spec.points) for spec in found] == [2, 2]
    assert sum("not LongBench scores" in " ".join(spec.caption) for spec in found) == 1


def test_more_than_eight_curves_are_split_by_family_and_every_one_is_named(tmp_path: Path) -> None:
    methods = ("snapkv", "pyramidkv", "ada_kv", "h2o", "tova", "finch", "key_diff", "key_norm", "lagkv", "random")
    runs = [accuracy(m, b, 15.0 + b / 100) for m in methods for b in (64, 128)]
    spec = only(made(tmp_path, accuracy("full", None, 22.0), *runs), "pareto")
    panels: dict[str, set[str]] = {}
    for p in spec.points:
        panels.setdefault(p.panel, set()).add(p.curve)
    assert panels["Eviction by attention"] == set(methods[:6])
    assert panels["Eviction by position or keys"] == set(methods[6:])
    assert {"SnapKV", "Key norm", "Random tokens", "Eviction by attention"} <= set(spec.labels)


def test_many_settings_of_one_family_are_several_panels(tmp_path: Path) -> None:
    runs = []
    for window in range(1, 20):
        run = accuracy("snapkv", 64, 15.0 + window)
        run["identity"]["method"]["selection"]["window"] = window
        run["hash"] += f"-{window}"
        runs.append(run)
    spec = only(made(tmp_path, *runs), "pareto")
    sizes = [sum(p.panel == panel for p in spec.points) for panel in sorted({p.panel for p in spec.points})]
    assert sum(sizes) == 19 and max(sizes) <= 8


def test_a_figure_of_more_curves_than_fit_on_a_page_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save(tmp_path / "runs", *(accuracy(name, 64, 20.0) for name in ("snapkv", "h2o", "tova", "random")))
    arguments = [str(folder), "-o", str(tmp_path / "figures"), "--figure", "pareto", "--style", "paper"]
    for most, is_said in ((4, False), (3, True)):
        monkeypatch.setattr(cli, "MAX_CURVES_OF_A_PAGE", most)
        assert main(arguments) == 0
        assert ("has 4 methods and may be higher than a page" in capsys.readouterr().out) == is_said


# speed, lengths, batches ----------------------------------------------------------------------------------------------


def timings(*sizes: tuple[str, int | None, float]) -> list[dict[str, Any]]:
    return [efficiency(method, budget, tpot) for method, budget, tpot in sizes]


def test_speed_joins_the_same_methods_and_has_the_spread(tmp_path: Path) -> None:
    speeds = timings(("full", None, 10.0), ("snapkv", 128, 5.0), ("snapkv", 256, 6.0), ("snapkv", 512, 7.0))
    spec = only(made(tmp_path, *SWEEP, *speeds), "speed")
    assert [(p.curve, p.budget, p.x, p.y) for p in spec.points] == [
        ("full", None, 100.0, 0.0),
        ("snapkv", 128, 200.0, pytest.approx(-4.0)),
        ("snapkv", 256, pytest.approx(1000 / 6), pytest.approx(-2.0)),
    ]
    assert (spec.points[1].x_low, spec.points[1].x_high) == pytest.approx((180.0, 220.0))
    assert all(len(p.runs) == 2 for p in spec.points)


def test_speed_needs_three_methods_and_the_same_dtype(tmp_path: Path) -> None:
    few = timings(("full", None, 10.0), ("snapkv", 128, 5.0))
    assert "speed" not in {spec.kind for spec in made(tmp_path / "few", *SWEEP, *few)}
    other = timings(("full", None, 10.0), ("snapkv", 128, 5.0), ("snapkv", 256, 5.0))
    for record in other:
        record["identity"]["dtype"] = "bfloat16"
    assert "speed" not in {spec.kind for spec in made(tmp_path / "other", *SWEEP, *other)}


def test_a_scored_group_has_one_figure_of_speed_and_names_the_other_timings(tmp_path: Path) -> None:
    here, there = (timings(("full", None, 9.0), ("snapkv", 128, 5.0), ("snapkv", 256, 6.0)) for _ in range(2))
    for record in there:
        record["identity"]["hardware"]["torch_threads"] = 8
        record["hash"] += "-8"
    spec = only(made(tmp_path, *SWEEP, *here, *there), "speed")
    assert sum(sentence.startswith("Not drawn: timings of shape-4096+65") for sentence in spec.caption) == 1


def test_time_and_memory_over_length(tmp_path: Path) -> None:
    records = [efficiency(m, None, 1.0 * n, n) for m in ("full", "no_cache") for n in (512, 1024, 2048)]
    for record in records:
        record["hash"] += str(record["identity"]["task"]["prompt_tokens"])
        record["bytes"]["kv_bytes_stored"] = 2**20 * (0 if record["method"] == "no_cache" else 4)
    found = made(tmp_path, *records)
    assert sorted((p.curve, p.x, p.y) for p in only(found, "length").points) == sorted(
        (m, n, float(n)) for m in ("full", "no_cache") for n in (512, 1024, 2048)
    )
    memory = only(found, "memory").points
    assert {(p.curve, p.y) for p in memory if "KV cache" in p.panel} == {("full", 4.0), ("no_cache", 0.0)}
    assert {p.y for p in memory if "peak" in p.panel} == {900 / 1024}


def test_throughput_and_memory_over_batch_size(tmp_path: Path) -> None:
    records = []
    for method in ("full", "no_cache"):
        for batch in (1, 4, 16):
            record = efficiency(method, None, 10.0 / batch)
            record["identity"]["batch_size"] = batch
            record["hash"] += str(batch)
            record["memory"]["peak_prefill"]["allocated"] = batch * 2**30
            records.append(record)
    spec = only(made(tmp_path, *records), "batch")
    assert {(p.curve, p.x): p.y for p in spec.points if "tokens/s" in p.panel} == pytest.approx(
        {(m, b): 90.0 * b for m in ("full", "no_cache") for b in (1, 4, 16)}
    )
    assert {(p.x, p.y) for p in spec.points if "memory" in p.panel} == {(b, float(b)) for b in (1, 4, 16)}
    assert "batch 1" not in spec.caption[0]


def test_a_search_is_no_point_of_a_curve(tmp_path: Path) -> None:
    records = [efficiency("full", None, 1.0, n) for n in (512, 1024)]
    records[1]["search"] = {"largest": 3}
    assert not {"length", "memory"} & {spec.kind for spec in made(tmp_path, *records)}


# rows, data sets, architectures ---------------------------------------------------------------------------------------


def test_forest_has_a_row_a_run_with_its_interval(tmp_path: Path) -> None:
    spec = only(made(tmp_path, *SWEEP), "forest")
    differences = [run.record["paired"]["difference"] for run in load(tmp_path)[0][1:]]
    assert [p.x for p in spec.points] == pytest.approx([-4.0, -2.0])
    assert [(p.x_low, p.x_high) for p in spec.points] == [(d["low"], d["high"]) for d in differences]
    assert spec.labels == ("SnapKV 128", "SnapKV 256")


def test_data_sets_are_drawn_at_the_budget_that_most_methods_have(tmp_path: Path) -> None:
    runs = [*SWEEP, accuracy("h2o", 256, 19.0)]
    (spec,) = made(tmp_path / "one", *runs, kinds=("datasets",))
    assert {(p.curve, p.budget) for p in spec.points} == {("full", None), ("snapkv", 256), ("h2o", 256)}
    assert {p.place for p in spec.points} == {"lcc", "qasper", "mean"}
    assert "Not drawn (other budgets; choose with --budgets): snapkv 128." in spec.caption
    every = made(tmp_path / "all", *SWEEP, kinds=("datasets",), every_budget=True)
    assert [spec.parts for spec in every] == [("budget", "128"), ("budget", "256")]


def test_a_figure_of_trainings_has_fixed_bytes_and_names_the_seeds(tmp_path: Path) -> None:
    records = []
    arms = (("yoco", 2048, 190464), ("mqa", 3072, 0))
    for (name, per_token, fixed), seed in itertools.product(arms, (3, 1)):
        record = accuracy(name, None, 1.0, task="text", seed=seed)
        record |= {"kind": "train", "validation": {"perplexity": 4.0, "loss": 1.4, "accuracy": 0.5}}
        record["identity"] |= {"kind": "train", "train": {"lr": 0.001}}
        record["training"] = {
            "lr": 0.001,
            "tokens": 1000,
            "sequence": 128,
            "parameters": 9,
            "seconds": 1.0,
            "tokens_per_s": 1.0,
        }
        record["bytes"] = {"kv_bytes_per_token": per_token, "kv_bytes_fixed": fixed}
        records.append(record | {"curve": [], "weights": {}})
    spec = only(made(tmp_path / "all", *records), "trained")
    assert {p.curve: p.x for p in spec.points} == {"yoco": 2048 + 190464 / 128, "mqa": 3072}
    assert "seed" not in spec.caption[0] and spec.caption[1] == "Seeds 1, 3."
    some = only(made(tmp_path / "some", *records[1:]), "trained")  # of one arm seed 1 alone
    assert not any("eeds 1" in sentence for sentence in some.caption)


def test_step_times_and_footprint(tmp_path: Path) -> None:
    timed = efficiency("snapkv", 128, 5.0)
    timed["metrics"]["step_ms"] = {"median": 1.0, "p90": 2.0, "p99": 3.0, "min": 0.5, "max": 4.0, "steps": 64}
    runs = [json.loads(json.dumps(record)) for record in SWEEP]
    for record in runs:
        record["bytes"]["kv_bytes_stored_end"] = record["bytes"]["kv_bytes_stored"] + 2**20
    found = made(tmp_path, *runs, timed)
    assert [(p.x, p.x_low, p.x_high) for p in only(found, "steps").points] == [(1.0, 0.5, 4.0)]
    assert [(p.x_low, p.x_high) for p in only(found, "footprint").points] == [(64.0, 65.0), (2.0, 3.0), (4.0, 5.0)]
    for kind in ("steps", "footprint"):
        draw(only(found, kind), Style("paper", "single"))


# needles --------------------------------------------------------------------------------------------------------------


LENGTHS, DEPTHS = (1024, 2048), (0, 0.5, 1)


def needle(method: str, budget: int | None) -> dict[str, Any]:
    """A record of one example a cell, of which the deepest alone is solved."""
    record = accuracy(method, budget, 100 / 3, task="needle")
    record["identity"]["task"]["class"] = "Needle"
    record["data"]["examples"] = {f"needle-{length}": len(DEPTHS) for length in LENGTHS}
    record["scores"] = {f"needle-{length}": estimate(100 / 3, len(DEPTHS), None) for length in LENGTHS}
    record["average"] = estimate(100 / 3, 6, None)
    if method != "full":
        record["paired"] = {"with": "full", "difference": estimate(0.0, 6, None)}
    return record


def with_samples(folder: Path, *records: dict[str, Any]) -> Path:
    save(folder, *records)
    rows = [
        {"id": f"0-{depth}", "dataset": f"needle-{length}", "score": float(depth == 1), "new_tokens": 3}
        for length in LENGTHS
        for depth in DEPTHS
    ]
    for path in folder.rglob("samples.jsonl"):
        path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def test_needles_are_a_table_of_methods_and_budgets_and_say_how_many_examples(tmp_path: Path) -> None:
    records = [needle("full", None), needle("snapkv", 64), needle("snapkv", 128), needle("kivi", None)]
    runs = load(with_samples(tmp_path, *records))[0]
    table, others = figures(runs, ("heatmap",))
    assert {(p.curve, p.budget) for p in table.points} == {("full", None), ("snapkv", 64), ("snapkv", 128)}
    assert {p.curve for p in others.points} == {"full", "kivi"}
    assert {(p.place, p.x, p.y) for p in table.points if p.budget == 64} == {
        (f"depth {depth:.3f}", length, 100.0 * (depth == 1)) for depth in (0, 0.5, 1) for length in (1024, 2048)
    }
    assert "1 example a cell" in " ".join(table.caption)


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_needles_without_samples_are_named_and_the_other_figures_are_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    with_samples(tmp_path / "r", needle("full", None), needle("snapkv", 64), needle("snapkv", 128))
    folder = next(run.path for run in load(tmp_path / "r")[0] if run.record["budget"] == 64)
    if damage == "missing":
        (folder / "samples.jsonl").unlink()
    else:
        (folder / "samples.jsonl").write_text('{"id": "0-0.5')
    assert main([str(tmp_path / "r"), "-o", str(tmp_path / "f"), "--format", "csv"]) == 0
    assert "no needle map of snapkv 64" in capsys.readouterr().err
    names = {path.name for path in (tmp_path / "f").glob("*.csv")}
    assert {"heatmap-needle-m-by-budget.csv", "pareto-needle-m.csv"} <= names


def number_or_text(cell: str) -> float | str:
    """A cell of a CSV file; the last digits of a number depend on the processor."""
    try:
        return float(cell)
    except ValueError:
        return cell


def test_the_figures_of_the_docs_have_the_points_that_the_records_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`kvbench plot SOURCE -o docs/figures/NAME` with the options that the manifest names makes them again."""
    monkeypatch.chdir(ROOT)
    manifests = sorted((ROOT / "docs" / "figures").glob("*/manifest.json"))
    assert manifests
    for path in manifests:
        entries, again = json.loads(path.read_text())["figures"], tmp_path / path.parent.name
        for source in {entry["source"] for entry in entries.values()}:
            results, *named = source.split()
            options = [part for name in named for part in (f"--{name.partition('=')[0]}", name.partition("=")[2])]
            kinds = ",".join(sorted({e["kind"] for e in entries.values() if e["source"] == source}))
            assert main([results, *options, "--figure", kinds, "--format", "csv", "-o", str(again)]) == 0
        made_again = json.loads((again / "manifest.json").read_text())["figures"]
        assert set(made_again) == set(entries)
        for name, entry in entries.items():
            drawn, now = (
                list(csv.reader((folder / f"{name}.csv").read_text().splitlines())) for folder in (path.parent, again)
            )
            assert len(drawn) == len(now)
            for row, row_now in zip(drawn, now, strict=True):
                assert list(map(number_or_text, row)) == pytest.approx(list(map(number_or_text, row_now))), name
            assert [made_again[name][key] for key in ("title", "caption")] == [entry["title"], entry["caption"]]


# the command ----------------------------------------------------------------------------------------------------------


def test_a_screen_gets_one_picture_and_its_points_and_a_paper_a_pdf(tmp_path: Path) -> None:
    save(tmp_path / "r", *SWEEP)
    for style, endings in (("screen", {".svg", ".csv"}), ("paper", {".pdf", ".csv"})):
        assert main([str(tmp_path / "r"), "-o", str(tmp_path / style), "--figure", "pareto", "--style", style]) == 0
        assert {path.suffix for path in (tmp_path / style).glob("pareto*")} == endings


def test_the_command_writes_all_formats_and_the_same_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "r", *SWEEP)
    flags = ["--figure", "pareto", "--style", "paper", "--width", "single", "--format", "pdf,svg,png,csv"]
    for name in ("a", "b"):
        assert main([str(tmp_path / "r"), "-o", str(tmp_path / name), *flags]) == 0
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    stem = "pareto-longbench-m"
    assert files == ["index.md", "manifest.json", *(f"{stem}.{ending}" for ending in ("csv", "pdf", "png", "svg"))]
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    pdf = (tmp_path / "a" / f"{stem}.pdf").read_bytes()
    assert b"/FontFile2" in pdf and b"/Type3" not in pdf
    assert f"/MediaBox [ 0 0 {3.25 * 72:g} ".encode() in pdf
    svg = (tmp_path / "a" / f"{stem}.svg").read_text()
    assert "<text" in svg and ">SnapKV<" in svg and "Quality against memory" not in svg.split("</metadata>")[1]
    rows = list(csv.DictReader((tmp_path / "a" / f"{stem}.csv").open()))
    assert [row["curve"] for row in rows] == ["full", "snapkv", "snapkv"]
    assert all(row["runs"].startswith(str(tmp_path)) for row in rows)
    assert capsys.readouterr().out.count("wrote ") == 8


def test_the_manifest_has_captions_hashes_and_runs(tmp_path: Path) -> None:
    save(tmp_path / "r", *SWEEP)
    assert main([str(tmp_path / "r"), "-o", str(tmp_path / "f"), "--figure", "pareto", "--format", "csv,svg"]) == 0
    entry = json.loads((tmp_path / "f" / "manifest.json").read_text())["figures"]["pareto-longbench-m"]
    assert entry["title"] == "Quality against memory: longbench, m"
    assert "95 % intervals of the paired difference" in entry["caption"]
    assert len(entry["runs"]) == 3 and len(entry["settings_hash"]) == 12
    assert entry["settings_hash"] in (tmp_path / "f" / "pareto-longbench-m.svg").read_text()
    assert "![pareto-longbench-m](pareto-longbench-m.svg)" in (tmp_path / "f" / "index.md").read_text()


def test_names_hold_the_settings_that_differ_and_no_hash(tmp_path: Path) -> None:
    records = []
    for limit in (None, 3):
        for dtype in ("float32", "bfloat16"):
            for record in SWEEP:
                other = json.loads(json.dumps(record))
                other["identity"] |= {"dtype": dtype, "task": other["identity"]["task"] | {"limit": limit}}
                other["hash"] += f"-{limit}-{dtype}"
                records.append(other)
    save(tmp_path / "r", *records)
    assert main([str(tmp_path / "r"), "-o", str(tmp_path / "f"), "--figure", "pareto", "--format", "csv"]) == 0
    assert {path.stem for path in (tmp_path / "f").glob("*.csv")} == {
        f"pareto-longbench-m-dtype-{dtype}{limit}" for dtype in ("float32", "bfloat16") for limit in ("", "-limit-3")
    }


def test_figures_that_are_not_made_any_more_are_removed_and_others_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "f"
    for name, task in (("one", "longbench"), ("two", "jsonl")):
        save(tmp_path / name, *(accuracy(m, b, 9.0, task=task) for m, b in (("full", None), ("snapkv", 64))))
        assert main([str(tmp_path / name), "-o", str(folder), "--format", "csv", "--figure", "pareto,forest"]) == 0
    (folder / "mine.txt").write_text("not a figure")
    for path in (tmp_path / "one").rglob("record.json"):
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | {"task": "longbench-e"}))
    assert main([str(tmp_path / "one"), "-o", str(folder), "--format", "csv", "--figure", "pareto"]) == 0
    assert "removed" in capsys.readouterr().out
    names = {path.name for path in folder.iterdir()} - {"manifest.json", "index.md"}
    assert names == {
        *("pareto-longbench-e-m.csv", "forest-longbench-m.csv", "pareto-jsonl-m.csv", "forest-jsonl-m.csv", "mine.txt"),
    }


def test_a_figure_whose_numbers_did_not_change_is_not_drawn_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "r", *SWEEP)
    argv = [str(tmp_path / "r"), "-o", str(tmp_path / "f"), "--figure", "pareto,forest", "--format", "csv"]
    assert main(argv) == main(argv) == 0
    out = capsys.readouterr().out
    assert out.count("wrote") == out.count("unchanged") == 2
    (tmp_path / "f" / "forest-longbench-m.csv").unlink()
    assert main(argv) == 0
    assert capsys.readouterr().out.count("wrote") == 1
    shutil.rmtree(next((tmp_path / "r" / "longbench" / "snapkv").iterdir()))
    assert main(argv) == 0
    assert capsys.readouterr().out.count("wrote") == 2


def test_one_figure_that_fails_does_not_stop_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "r", *SWEEP)

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("cannot be drawn")

    monkeypatch.setattr("kvbench.analysis.figures.rows.rows_axis", fails)
    assert main([str(tmp_path / "r"), "-o", str(tmp_path / "f"), "--figure", "pareto,forest"]) == 1
    assert "failed: forest-longbench-m: RuntimeError: cannot be drawn" in capsys.readouterr().err
    assert (tmp_path / "f" / "pareto-longbench-m.svg").is_file()
    assert not (tmp_path / "f" / "forest-longbench-m.svg").exists()


def test_one_group_that_fails_does_not_stop_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "r", *SWEEP, *(accuracy(m, b, 9.0, task="jsonl") for m, b in (("full", None), ("snapkv", 64))))
    settings_of = quality.settings_of

    def fails_for_jsonl(group: Any) -> list[str]:
        if group[0].record["task"] == "jsonl":
            raise KeyError("kv_bytes_stored")
        return settings_of(group)

    monkeypatch.setattr(quality, "settings_of", fails_for_jsonl)
    assert main([str(tmp_path / "r"), "-o", str(tmp_path / "f"), "--figure", "pareto", "--format", "csv"]) == 1
    assert "failed: pareto of jsonl: KeyError: 'kv_bytes_stored'" in capsys.readouterr().err
    assert (tmp_path / "f" / "pareto-longbench-m.csv").is_file()


@pytest.mark.parametrize("label", ["$\\bad{$", "a | b_c % & ^ ~", "<script>alert(1)</script>", "\u6570\u636e \u03b3"])
@pytest.mark.filterwarnings("ignore:Glyph")  # a machine without a font for Chinese draws boxes
def test_labels_of_any_kind_are_drawn_as_they_are(tmp_path: Path, label: str) -> None:
    other = accuracy("snapkv", None, 15.0)
    other |= {"method": label, "method_label": label}
    save(tmp_path / "r", *SWEEP, other)
    assert main([str(tmp_path / "r"), "-o", str(tmp_path / "f"), "--figure", "pareto,forest,datasets"]) == 0
    svg = (tmp_path / "f" / "pareto-longbench-m.svg").read_text()
    assert "<script>" not in svg
    assert "<script>" not in (tmp_path / "f" / "index.md").read_text()


def test_the_name_of_a_task_cannot_leave_the_folder_or_break_a_line(tmp_path: Path) -> None:
    runs = [accuracy(method, budget, 9.0) for method, budget in (("full", None), ("snapkv", 64))]
    save(tmp_path / "r", *runs)
    for path in (tmp_path / "r").rglob("record.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"task": "../../evil\n## name"}))
    assert main([str(tmp_path / "r"), "-o", str(tmp_path / "f"), "--figure", "pareto", "--format", "csv"]) == 0
    assert sorted(path.name for path in (tmp_path / "f").iterdir()) == [
        "index.md",
        "manifest.json",
        "pareto-evil-name-m.csv",
    ]
    assert "\n## name" not in (tmp_path / "f" / "index.md").read_text()
    assert not list(tmp_path.parent.glob("*evil*"))


@pytest.mark.parametrize("mean", [math.nan, math.inf, None, "20"])
def test_an_unsound_record_is_named_and_the_others_are_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mean: object
) -> None:
    save(tmp_path / "r", *SWEEP, accuracy("h2o", 128, 31.0))
    (path,) = (tmp_path / "r").glob("*/h2o/*/record.json")
    record = json.loads(path.read_text())
    record["average"]["mean"] = mean
    path.write_text(json.dumps(record))
    assert main([str(tmp_path / "r"), "-o", str(tmp_path / "f"), "--figure", "pareto", "--format", "csv"]) == 0
    assert "average.mean is" in capsys.readouterr().err
    rows = (tmp_path / "f" / "pareto-longbench-m.csv").read_text()
    assert "h2o" not in rows and "snapkv" in rows and "nan" not in rows


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        (["--methods", "snapkv"], {("full", None), ("snapkv", 128), ("snapkv", 256)}),
        (["--methods", "h2o", "--budgets", "128"], {("full", None), ("h2o", 128)}),
        (["--budgets", "256"], {("full", None), ("snapkv", 256)}),
    ],
)
def test_flags_select_runs_and_keep_the_full_cache(
    tmp_path: Path, flags: list[str], kept: set[tuple[str, int | None]]
) -> None:
    save(tmp_path / "r", *SWEEP, accuracy("h2o", 128, 17.0))
    argv = [str(tmp_path / "r"), "-o", str(tmp_path / "f"), "--figure", "pareto", "--format", "csv", *flags]
    assert main(argv) == 0
    (path,) = (tmp_path / "f").glob("*.csv")
    rows = csv.DictReader(path.open())
    assert {(row["curve"], int(row["budget"]) if row["budget"] else None) for row in rows} == kept


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--methods", "snapkb"], "did you mean snapkv?"),
        (["--budgets", "512"], "--budgets=512: is in none of these results"),
        (["--figure", "parreto"], "did you mean pareto?"),
        (["--format", "eps"], "--format=eps: must be one of csv, pdf, png, svg"),
    ],
)
def test_a_wrong_flag_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    save(tmp_path / "r", *SWEEP)
    assert main([str(tmp_path / "r"), "-o", str(tmp_path / "f"), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize("broken", [False, True])
def test_what_cannot_be_plotted_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str], broken: bool) -> None:
    if broken:
        (tmp_path / "record.json").write_text("{")
        assert main([str(tmp_path), "-o", str(tmp_path / "f")]) == 1
        assert "is not JSON" in capsys.readouterr().err
    else:
        assert main([str(tmp_path), "-o", str(tmp_path / "f")]) == 2
        assert "holds no finished run" in capsys.readouterr().err


@pytest.mark.parametrize("runs", [SWEEP[:1], SWEEP[1:2]], ids=["the full cache", "one method"])
def test_one_run_alone_is_a_table_and_no_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], runs: list[dict[str, Any]]
) -> None:
    save(tmp_path / "r", *runs)
    assert main([str(tmp_path / "r"), "-o", str(tmp_path / "f"), "--format", "csv"]) == 1
    assert capsys.readouterr().err.startswith("nothing to plot in")


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "r", *SWEEP)
    (tmp_path / "f").write_text("a file")
    assert main([str(tmp_path / "r"), "-o", str(tmp_path / "f"), "--figure", "pareto", "--format", "csv"]) == 2
    assert "cannot be written" in capsys.readouterr().err
