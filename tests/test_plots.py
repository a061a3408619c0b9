"""Figures from records alone: which points they hold, that looks are stable, that no two labels overlap."""

from __future__ import annotations

import csv
import itertools

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from records import accuracy, efficiency, save

from kvbench.analysis import plots as module
from kvbench.analysis.load import load
from kvbench.analysis.pareto import frontier
from kvbench.analysis.plots import KNOWN, look, main, plots


def drawn(folder, *records):
    return {p.name: p for p in plots(load(save(folder, *records))[0])}


def test_the_frontier_is_what_nothing_beats():
    costs, merits = [1, 2, 3, 4, 2, 3], [5, 7, 6, 9, 4, 7]
    naive = [
        i
        for i in range(6)
        if not any(
            costs[j] <= costs[i] and merits[j] >= merits[i] and (costs[j], merits[j]) != (costs[i], merits[i])
            for j in range(6)
        )
    ]
    assert sorted(frontier(costs, merits)) == naive == [0, 1, 3]
    assert frontier([1, 1], [2, 2]) == [0, 1]  # the same point twice


def test_score_against_bytes_holds_every_run_of_its_group(tmp_path):
    runs = [accuracy("full", None, 22.0), accuracy("snapkv", 128, 18.0), accuracy("snapkv", 256, 20.0)]
    ((name, plot),) = drawn(tmp_path, *runs).items()
    assert name.startswith("pareto-bytes-longbench-m-")
    assert [(p.family, p.mark, p.x, p.y, p.low, p.high) for p in plot.points] == [
        ("full", "", 64.0, 22.0, 21.0, 23.0),
        ("snapkv", "128", 2.0, 18.0, 17.0, 19.0),
        ("snapkv", "256", 4.0, 20.0, 19.0, 21.0),
    ]


def test_sets_of_different_names_have_figures_of_their_own(tmp_path):
    runs = [
        accuracy(m, b, 9.0, task=t)
        for m, b in (("full", None), ("snapkv", 64))
        for t in ("longbench", "longbench-mini")
    ]
    found = drawn(tmp_path, *runs)
    assert len(found) == 2
    assert all(len(plot.points) == 2 for plot in found.values())
    assert any("not LongBench" in plot.title for plot in found.values())


def test_score_against_speed_joins_the_same_method_on_the_same_model(tmp_path):
    runs = [accuracy("full", None, 22.0), accuracy("snapkv", 128, 18.0), accuracy("snapkv", 256, 20.0)]
    speeds = [efficiency("full", None, 10.0), efficiency("snapkv", 128, 5.0), efficiency("snapkv", 512, 6.0)]
    found = drawn(tmp_path, *runs, *speeds)
    (plot,) = (p for name, p in found.items() if name.startswith("pareto-speed"))
    assert [(p.family, p.mark, p.x, p.y) for p in plot.points] == [
        ("full", "", 100.0, 22.0),
        ("snapkv", "128", 200.0, 18.0),
    ]
    assert all(len(p.runs) == 2 for p in plot.points)


def test_speed_in_another_dtype_is_another_matter(tmp_path):
    runs = [accuracy("full", None, 22.0), accuracy("snapkv", 128, 18.0)]
    speeds = [efficiency("full", None, 10.0), efficiency("snapkv", 128, 5.0)]
    for record in speeds:
        record["identity"]["dtype"] = "bfloat16"
    assert not [name for name in drawn(tmp_path, *runs, *speeds) if name.startswith("pareto-speed")]


def test_time_over_length_joins_workloads_of_several_lengths(tmp_path):
    records = [efficiency(m, None, 1.0 * n, n) for m in ("full", "no_cache") for n in (512, 1024, 2048)]
    for record in records:
        record["hash"] += str(record["identity"]["task"]["prompt_tokens"])
    found = drawn(tmp_path, *records)
    (plot,) = (p for name, p in found.items() if name.startswith("length"))
    assert sorted((p.family, p.x, p.y) for p in plot.points) == sorted(
        (m, n, float(n)) for m in ("full", "no_cache") for n in (512, 1024, 2048)
    )


def test_throughput_and_memory_over_batch_size(tmp_path):
    records = []
    for method in ("full", "no_cache"):
        for batch in (1, 4, 16):
            record = efficiency(method, None, 10.0 / batch)
            record["identity"]["batch_size"] = batch
            record["hash"] += str(batch)
            record["memory"]["peak_prefill"]["allocated"] = batch * 2**30
            records.append(record)
    found = drawn(tmp_path, *records)
    (speed,) = (p for name, p in found.items() if name.startswith("batch-throughput"))
    (memory,) = (p for name, p in found.items() if name.startswith("batch-memory"))
    assert {(p.family, p.x): p.y for p in speed.points} == pytest.approx(
        {(m, b): 90.0 * b for m in ("full", "no_cache") for b in (1, 4, 16)}
    )
    assert {(p.family, p.x, p.y) for p in memory.points} == {  # the larger of both phases' peaks
        (m, b, float(b)) for m in ("full", "no_cache") for b in (1, 4, 16)
    }
    assert "batch" not in speed.title and not [name for name in found if name.startswith("length")]


def test_a_search_is_no_point_of_a_curve(tmp_path):
    records = [efficiency("full", None, 1.0, n) for n in (512, 1024)]
    records[1]["search"] = {"largest": 3}
    assert not drawn(tmp_path, *records)


def test_a_method_looks_the_same_everywhere_and_no_two_known_ones_alike():
    assert len({(look(m).color, look(m).marker) for m in ("full", *KNOWN)}) == len(KNOWN) + 1
    assert look("my_method") == look("my_method")


def test_no_two_labels_overlap_even_where_points_crowd(tmp_path):
    crowd = [
        accuracy(m, b, 20.0 + 0.01 * b / 64, task="longbench") for m in ("snapkv", "h2o", "tova") for b in (64, 80, 96)
    ]
    ((_, plot),) = drawn(tmp_path, *crowd).items()
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    ax = figure.add_subplot()
    plot.draw(ax, plot)
    module._mark(figure, ax, plot.points)
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [t.get_window_extent(renderer) for t in ax.texts]
    assert len(boxes) >= 3
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_the_command_writes_figures_and_their_points_and_the_same_again(tmp_path, capsys):
    save(tmp_path / "r", accuracy("full", None, 22.0), accuracy("snapkv", 128, 18.0))
    assert main([str(tmp_path / "r"), "-o", str(tmp_path / "a")]) == 0
    assert main([str(tmp_path / "r"), "-o", str(tmp_path / "b")]) == 0
    first = sorted((tmp_path / "a").iterdir())
    assert [p.suffix for p in first] == [".csv", ".png", ".svg"]
    for path in first:
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    rows = list(csv.DictReader(first[0].open()))
    assert [r["family"] for r in rows] == ["full", "snapkv"]
    assert all(r["runs"].startswith(str(tmp_path)) for r in rows)
    assert capsys.readouterr().out.count("wrote ") == 6


@pytest.mark.parametrize("broken", [False, True])
def test_what_cannot_be_plotted_is_said(tmp_path, capsys, broken):
    if broken:
        (tmp_path / "record.json").write_text("{")
        assert main([str(tmp_path), "-o", str(tmp_path / "f")]) == 0
        shown = capsys.readouterr().err
        assert "is not JSON" in shown
        assert "nothing to plot" in shown
    else:
        assert main([str(tmp_path), "-o", str(tmp_path / "f")]) == 2
        assert "holds no finished run" in capsys.readouterr().err


def test_two_settings_of_a_method_are_two_curves(tmp_path):
    runs = [accuracy("snapkv", budget, 18.0 + budget / 100) for budget in (64, 128)]
    for budget in (64, 128):
        other = accuracy("snapkv", budget, 17.0)
        other["identity"]["method"]["selection"]["window"] = 16
        other["hash"] += "-16"
        runs.append(other)
    ((_, plot),) = drawn(tmp_path, *runs).items()
    assert {p.family for p in plot.points} == {"snapkv (window=32)", "snapkv (window=16)"}
    ax = Figure().add_subplot()
    plot.draw(ax, plot)
    lines = {line.get_linestyle() for line in ax.get_lines() if len(line.get_xdata()) == 2}
    assert {"-", "--"} <= lines


def test_the_same_workload_on_two_machines_gives_two_figures(tmp_path):
    runs = [accuracy("full", None, 22.0), accuracy("snapkv", 128, 18.0)]
    here, there = ([efficiency("full", None, 10.0), efficiency("snapkv", 128, 5.0)] for _ in range(2))
    for record in there:
        record["identity"]["hardware"]["torch_threads"] = 8
        record["hash"] += "-8"
    names = [p.name for p in plots(load(save(tmp_path, *runs, *here, *there))[0]) if p.name.startswith("pareto-speed")]
    assert len(names) == len(set(names)) == 2
